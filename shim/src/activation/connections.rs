//! The connections of a pod. The shim keeps its own descriptor of each for as long as it lives, also
//! while a leaf has another: to answer in the leaf's place, and to take the connection back.
//!
//! A leaf may do to the shared socket what it likes, for instance clear `O_NONBLOCK`. So every call
//! here says itself that it does not want to wait.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use super::decide::Conn;
use super::tcp::Position;

/// Most connections that are watched of either kind. Beyond it the one watched longest is closed.
pub const MOST_WATCHED: usize = 1_000;
/// Connections that are being closed while their clients still send; beyond it they are cut off.
const MOST_LINGERING: usize = 256;
/// A closed connection is read from for as long and as much, so that what arrives does not make the
/// kernel send a reset, which would destroy the answer on its way (RFC 9112, section 9.6).
const LINGER: (Duration, usize) = (Duration::from_secs(2), 1024 * 1024);

/// What a watched connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// Its first request.
    Silent,
    /// Its next request.
    Parked,
}

impl Watch {
    /// How long it may.
    #[must_use]
    pub fn limit(self) -> Duration {
        match self {
            Watch::Silent => Duration::from_secs(60),
            Watch::Parked => Duration::from_secs(300),
        }
    }
}

/// What is there to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peeked {
    /// At least a byte.
    Bytes,
    /// Nothing yet.
    Nothing,
    /// Nothing, for ever.
    End,
}

/// Looks without reading.
#[must_use]
pub fn peek(socket: &OwnedFd) -> Peeked {
    loop {
        return match recv(socket, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Peeked::End,
            Ok(_) => Peeked::Bytes,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Peeked::Nothing,
            Err(_) => Peeked::End,
        };
    }
}

/// Has the runtime tell when `socket` becomes readable.
///
/// # Errors
/// When epoll takes no more descriptors.
pub fn register(socket: Rc<OwnedFd>) -> io::Result<AsyncFd<Rc<OwnedFd>>> {
    // SAFETY: an `Rc<OwnedFd>` gives out the same descriptor for as long as it lives and keeps it
    // open; nothing takes the descriptor out of it.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Waits until the connection has bytes or its end to read, or the time is over ([`Peeked::Nothing`]).
/// The runtime forgets the descriptor before this returns: a leaf's traffic must not wake the shim.
///
/// # Errors
/// When the descriptor cannot be watched.
pub async fn readable(socket: Rc<OwnedFd>, until: Instant) -> io::Result<Peeked> {
    let socket = register(socket)?;
    let bytes_or_end = async {
        loop {
            let mut guard = socket.readable().await?;
            match peek(socket.get_ref()) {
                Peeked::Nothing => guard.clear_ready(),
                other => return Ok(other),
            }
        }
    };
    timeout_at(until, bytes_or_end)
        .await
        .unwrap_or(Ok(Peeked::Nothing))
}

/// Sends a whole response if there is room for it, which there is when nothing was sent before.
fn send_whole(socket: &OwnedFd, response: &[u8]) {
    loop {
        match send(socket, response, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            // A client that gets less sees a response cut short by the end of the connection.
            _ => return,
        }
    }
}

#[derive(Debug)]
struct Connection {
    socket: Rc<OwnedFd>,
    /// Where it was when the request that is under way began; `None` while no leaf has had it since
    /// the last watch.
    mark: Option<Result<Position, Errno>>,
    watch: Option<(Watch, u64)>,
}

/// All connections by name.
#[derive(Debug, Default)]
pub struct Connections {
    by_name: HashMap<Conn, Connection>,
    next_name: u64,
    /// The watched ones, by the order in which their watch began.
    silent: BTreeMap<u64, (Conn, AbortHandle)>,
    parked: BTreeMap<u64, (Conn, AbortHandle)>,
    next_watch: u64,
    lingering: Rc<()>,
}

impl Connections {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Takes in a new connection.
    pub fn add(&mut self, socket: OwnedFd) -> Conn {
        let name = Conn(self.next_name);
        self.next_name += 1;
        self.by_name.insert(
            name,
            Connection {
                socket: Rc::new(socket),
                mark: None,
                watch: None,
            },
        );
        name
    }

    /// Its socket, while it is known.
    #[must_use]
    pub fn socket(&self, conn: Conn) -> Option<Rc<OwnedFd>> {
        self.by_name
            .get(&conn)
            .map(|connection| Rc::clone(&connection.socket))
    }

    /// Notes where the connection is as a request begins.
    pub fn mark(&mut self, conn: Conn) {
        if let Some(connection) = self.by_name.get_mut(&conn) {
            connection.mark = Some(Position::of(&connection.socket));
        }
    }

    /// Whether nobody has read from it or written to it since the mark.
    #[must_use]
    pub fn untouched(&self, conn: Conn) -> bool {
        self.by_name.get(&conn).is_some_and(|connection| {
            let now = Position::of(&connection.socket);
            matches!((now, connection.mark), (Ok(now), Some(Ok(mark))) if now.untouched_since(&mark))
        })
    }

    /// The connection's watcher, of which `task` can be aborted. Yields the connection that had to
    /// make room.
    pub fn watched(&mut self, conn: Conn, watch: Watch, task: AbortHandle) -> Option<Conn> {
        let Some(connection) = self.by_name.get_mut(&conn) else {
            task.abort();
            return None;
        };
        let order = self.next_watch;
        self.next_watch += 1;
        connection.watch = Some((watch, order));
        connection.mark = None;
        let list = self.list(watch);
        list.insert(order, (conn, task));
        if list.len() > MOST_WATCHED {
            list.first_key_value().map(|(_, (oldest, _))| *oldest)
        } else {
            None
        }
    }

    /// Ends the watch over a connection, if there is one.
    pub fn unwatch(&mut self, conn: Conn) {
        let watch = self
            .by_name
            .get_mut(&conn)
            .and_then(|connection| connection.watch.take());
        if let Some((watch, order)) = watch
            && let Some((_, task)) = self.list(watch).remove(&order)
        {
            task.abort();
        }
    }

    /// The connections watched for a reason, oldest first.
    #[must_use]
    pub fn all_watched(&self, watch: Watch) -> Vec<Conn> {
        let list = if watch == Watch::Silent {
            &self.silent
        } else {
            &self.parked
        };
        list.values().map(|(conn, _)| *conn).collect()
    }

    /// The one that is watched longest without ever having had a request, or else of the parked.
    #[must_use]
    pub fn least_needed(&self) -> Option<Conn> {
        self.silent
            .first_key_value()
            .or_else(|| self.parked.first_key_value())
            .map(|(_, (conn, _))| *conn)
    }

    fn list(&mut self, watch: Watch) -> &mut BTreeMap<u64, (Conn, AbortHandle)> {
        match watch {
            Watch::Silent => &mut self.silent,
            Watch::Parked => &mut self.parked,
        }
    }

    /// Answers, unless the request has been sent something already, and closes. Whether it answered.
    /// Nobody else may be able to write any more.
    ///
    /// # Panics
    /// Outside of a `LocalSet`.
    pub fn answer(&mut self, conn: Conn, response: &[u8]) -> bool {
        self.unwatch(conn);
        let Some(connection) = self.by_name.remove(&conn) else {
            return false;
        };
        let free = match (connection.mark, Position::of(&connection.socket)) {
            (None, _) => true,
            (Some(Ok(mark)), Ok(now)) => !now.answered_since(&mark),
            // What cannot be measured may have been answered.
            _ => false,
        };
        if free {
            send_whole(&connection.socket, response);
        }
        self.linger(connection.socket);
        free
    }

    /// Closes.
    ///
    /// # Panics
    /// Outside of a `LocalSet`.
    pub fn close(&mut self, conn: Conn) {
        self.unwatch(conn);
        if let Some(connection) = self.by_name.remove(&conn) {
            self.linger(connection.socket);
        }
    }

    /// Closes without a reset where the client's bytes allow it.
    fn linger(&self, socket: Rc<OwnedFd>) {
        // A leaf could have asked for a close that waits, or for one that resets.
        let _ = set_socket_linger(&socket, None);
        if shutdown(&socket, Shutdown::Write).is_err() {
            return;
        }
        let mut left = LINGER.1;
        if drain(&socket, &mut left) != Peeked::Nothing
            || Rc::strong_count(&self.lingering) > MOST_LINGERING
        {
            return;
        }
        let count = Rc::clone(&self.lingering);
        tokio::task::spawn_local(async move {
            let until = Instant::now() + LINGER.0;
            while let Ok(Peeked::Bytes) = readable(Rc::clone(&socket), until).await {
                if drain(&socket, &mut left) != Peeked::Nothing {
                    break;
                }
            }
            drop(count);
        });
    }
}

/// Reads and forgets. [`Peeked::Bytes`] when `left` is used up.
fn drain(socket: &OwnedFd, left: &mut usize) -> Peeked {
    let mut buffer = [0u8; 4096];
    while *left > 0 {
        match recv(socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Peeked::End,
            Ok((_, n)) => *left = left.saturating_sub(n),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Peeked::Nothing,
            Err(_) => return Peeked::End,
        }
    }
    Peeked::Bytes
}
