//! The listening socket of a Function's pod.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr, set_tcp_nodelay};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept_with, bind, getsockname, ipproto, listen,
    socket_with,
};
use tokio::io::unix::AsyncFd;

use super::connections::register;

/// Completed connections that the kernel keeps for us; it cuts this down to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Accepts connections on one port of every address that the pod has.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<Rc<OwnedFd>>,
}

/// What [`Listener::take`] found.
#[derive(Debug)]
pub enum Accepted {
    /// A connection.
    Connection(OwnedFd),
    /// No connection waits.
    Nothing,
    /// There may be one, but descriptors or memory have run out.
    Failed(Errno),
}

impl Listener {
    /// Binds in the network namespace of the calling thread: for IPv6 and IPv4 together, or for IPv4
    /// alone where the namespace has no IPv6.
    ///
    /// # Errors
    /// What `bind(2)` says, `EADDRINUSE` above all.
    pub fn bind(port: u16) -> io::Result<Listener> {
        let socket = match bind_v6(port) {
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => bind_v4(port),
            other => other,
        }?;
        listen(&socket, BACKLOG)?;
        Ok(Listener {
            socket: register(Rc::new(socket))?,
        })
    }

    /// The port, also when it was the kernel's choice.
    ///
    /// # Errors
    /// What `getsockname(2)` says.
    pub fn port(&self) -> io::Result<u16> {
        let address = SocketAddr::try_from(getsockname(&self.socket)?)?;
        Ok(address.port())
    }

    /// The next connection. Cancel safe.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket.
    pub async fn accept(&self) -> io::Result<Accepted> {
        loop {
            let mut guard = self.socket.readable().await?;
            match self.take() {
                Accepted::Nothing => guard.clear_ready(),
                other => return Ok(other),
            }
        }
    }

    /// A connection that waits already.
    pub fn take(&self) -> Accepted {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connection) => {
                    // Answers are written whole; waiting for more to send would only delay them.
                    let _ = set_tcp_nodelay(&connection, true);
                    return Accepted::Connection(connection);
                }
                Err(Errno::AGAIN) => return Accepted::Nothing,
                Err(Errno::INTR) => {}
                // Errors of the connection that was to be accepted, which is gone (accept(2)).
                Err(
                    Errno::CONNABORTED
                    | Errno::PROTO
                    | Errno::NOPROTOOPT
                    | Errno::PERM
                    | Errno::NETDOWN
                    | Errno::NETUNREACH
                    | Errno::HOSTDOWN
                    | Errno::HOSTUNREACH
                    | Errno::NONET,
                ) => {}
                Err(errno) => return Accepted::Failed(errno),
            }
        }
    }
}

fn bind_v6(port: u16) -> Result<OwnedFd, Errno> {
    let socket = tcp_socket(AddressFamily::INET6)?;
    set_ipv6_v6only(&socket, false)?;
    bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    Ok(socket)
}

fn bind_v4(port: u16) -> Result<OwnedFd, Errno> {
    let socket = tcp_socket(AddressFamily::INET)?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    Ok(socket)
}

fn tcp_socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // A container that restarts must not wait for the connections of its predecessor.
    set_socket_reuseaddr(&socket, true)?;
    Ok(socket)
}
