//! Local ports, taken in turn.
//!
//! kube-proxy sends a connection to where connection tracking has sent the last one with the same two ends, and a
//! connection to a pod that is gone is tracked for two minutes more (`nf_conntrack_tcp_timeout_syn_sent`, in
//! `Documentation/networking/nf_conntrack-sysctl.rst`). Whoever gets its local port again by then is sent
//! to the pod that is gone. The kernel chooses ports at random; in turn, each comes again when all others have.

use std::io::{Error, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::now;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Many in a row may be taken by others.
const TRIES: usize = 1000;

/// See the module.
#[derive(Debug)]
pub struct Ports {
    range: RangeInclusive<u16>,
    next: AtomicUsize,
}

impl Ports {
    /// Of this network namespace. The first is another one each time.
    ///
    /// # Errors
    /// If the kernel does not tell them.
    pub fn of_host() -> Result<Ports> {
        let text = std::fs::read_to_string(RANGE).context(RANGE)?;
        let mut bounds = text.split_whitespace().map(str::parse);
        let (Some(Ok(first)), Some(Ok(last))) = (bounds.next(), bounds.next()) else {
            anyhow::bail!("{RANGE}: {text:?}");
        };
        let start = usize::try_from(now() % (1 << 20))?;
        Ok(Ports::from(first..=last, start))
    }

    fn from(range: RangeInclusive<u16>, start: usize) -> Ports {
        Ports {
            range,
            next: AtomicUsize::new(start),
        }
    }

    fn take(&self) -> u16 {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.range.len().max(1);
        let mut range = self.range.clone();
        range.nth(turn).unwrap_or(*self.range.start())
    }

    /// A connection from the next port that is free.
    ///
    /// # Errors
    /// What `bind(2)` and `connect(2)` say.
    pub fn connect(&self, to: SocketAddr, within: Duration) -> std::io::Result<TcpStream> {
        for _ in 0..TRIES {
            let local: SocketAddr = match to {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, self.take()).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, self.take()).into(),
            };
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            match socket
                .bind(&local.into())
                .and_then(|()| socket.connect_timeout(&to.into(), within))
            {
                Ok(()) => return Ok(socket.into()),
                Err(error) if is_taken(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::AddrInUse, "no local port is free"))
    }
}

fn is_taken(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable
    )
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn each_connection_has_the_next_port_that_is_free() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        // Outside of what the kernel gives away by itself.
        let first = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap();
        let taken = TcpListener::bind(("0.0.0.0", first + 1)).unwrap();
        let ports = Ports::from(first..=first + 3, 0);
        let second = Duration::from_secs(1);
        let streams: Vec<TcpStream> = (0..3).map(|_| ports.connect(to, second).unwrap()).collect();
        let locals: Vec<u16> = streams
            .iter()
            .map(|stream| stream.local_addr().unwrap().port())
            .collect();
        assert_eq!(locals, [first, first + 2, first + 3]);
        assert_eq!(
            ports.connect(to, second).unwrap_err().kind(),
            ErrorKind::AddrInUse
        );
        drop(taken);
        let last = ports.connect(to, second).unwrap();
        assert_eq!(last.local_addr().unwrap().port(), first + 1);
    }

    #[test]
    fn a_port_that_nobody_listens_at_is_refused() {
        let ports = Ports::of_host().unwrap();
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let error = ports.connect(gone.unwrap(), Duration::from_secs(1));
        assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}
