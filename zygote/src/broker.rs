//! How a Function's shim finds a pool's zygote on its node: the pool's shim listens on a path, and
//! gives every shim that connects a channel of its own. Both are root, and nobody else may be.

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use sock_zygote_protocol::{self as protocol, Attached, Counted};
use tokio::io::unix::AsyncFd;

use crate::channel::{Channel, watch};
use crate::error::{Error, Result, errno};
use crate::zygote::{Zygote, ZygoteChannel};

/// A pool's shim answers at once or hangs; then another pool's is tried.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Shims of one node that connect at the same moment.
const BACKLOG: i32 = 128;
/// Extension of a socket that listens.
const READY: &str = "sock";
/// Of one that does not yet, for some microseconds.
const UNREADY: &str = "new";
/// Its maker was killed before it listened.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// Each means that somebody removed the directory in the microseconds since it was made.
const TRIES: usize = 5;

/// The listening end, of a pool's shim. The path is removed when it is dropped.
#[derive(Debug)]
pub struct Broker {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Broker {
    /// Listens at `path`, whose directories are made for root alone.
    ///
    /// # Errors
    /// [`Error::Path`].
    pub fn listen(path: &Path) -> Result<Broker> {
        let mut tries = 0..TRIES;
        let socket = loop {
            match listening(path) {
                // Whoever removes what a pool has left may find the directory empty and take it away.
                Err(Error::Path {
                    errno: Errno::NOENT,
                    ..
                }) if tries.next().is_some() => {}
                other => break other?,
            }
        };
        Ok(Broker {
            socket: watch(socket)?,
            path: path.to_owned(),
        })
    }

    /// Gives everyone who connects a channel to `zygote`, its user namespace, what is said of it, and what leaves are counted with,
    /// until the zygote is gone. Yields the reason for the end.
    pub async fn serve(
        &self,
        zygote: &Zygote,
        user: BorrowedFd<'_>,
        attached: &Attached,
        leaves: &Count,
    ) -> Error {
        loop {
            let peer = match self.accept().await {
                Ok(peer) => peer,
                Err(error) => return error,
            };
            let channel = match zygote.attach() {
                Ok(channel) => channel,
                Err(error) => return error,
            };
            let fds = [channel.as_fd(), user];
            // These packets are the first on a new socket: there is room for them, or the peer is gone.
            let sent = protocol::send(&peer, attached, &fds)
                .and_then(|()| protocol::send(&peer, &Counted::Leaves, &[leaves.0.as_fd()]));
            match sent {
                // Who comes will ask, and one of a release that does not count says so in no other way.
                Ok(()) => leaves.add(),
                Err(error) => tracing::debug!(%error, "a shim left before it was attached"),
            }
        }
    }

    /// While there is no zygote: waits until somebody asks for one, who is told that there is none. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Path`].
    pub async fn refuse(&self) -> Result<()> {
        self.accept().await.map(drop)
    }

    async fn accept(&self) -> Result<OwnedFd> {
        loop {
            let mut ready = self.socket.readable().await.map_err(Error::Watch)?;
            match accept_with(
                self.socket.get_ref(),
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            ) {
                Ok(peer) => {
                    let user = socket_peercred(&peer)
                        .map_err(Error::system("ask who connects (SO_PEERCRED)"))?
                        .uid;
                    if user.is_root() {
                        return Ok(peer);
                    }
                    tracing::warn!(
                        uid = user.as_raw(),
                        "refused a connection that is not root's"
                    );
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    return Err(Error::Path {
                        step: "accept on",
                        path: self.path.clone(),
                        errno,
                    });
                }
            }
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A path that stays is found stale by whoever connects next.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// How many leaves a zygote has given, to all shims together: each adds to it without a word to anybody (eventfd(2)).
#[derive(Debug)]
pub struct Count(OwnedFd);

impl Count {
    /// None yet.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> Result<Count> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Count)
            .map_err(Error::system("make a counter (eventfd)"))
    }

    /// One more.
    pub fn add(&self) {
        // It is full after 2^64 leaves.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Those since this was asked last.
    #[must_use]
    pub fn take(&self) -> u64 {
        let mut number = [0; 8];
        // It cannot be read while it is zero.
        match rustix::io::read(&self.0, &mut number) {
            Ok(_) => u64::from_ne_bytes(number),
            Err(_) => 0,
        }
    }
}

/// What a look for a zygote finds.
#[derive(Debug)]
pub enum Look {
    /// One that lives.
    Found(Box<Attachment>),
    /// Only pools whose zygote is not there at present. They know now that it was asked for.
    Resting,
    /// No pool.
    Nobody,
}

impl Look {
    /// The zygote, if there is one.
    #[must_use]
    pub fn found(self) -> Option<Attachment> {
        match self {
            Look::Found(attachment) => Some(*attachment),
            Look::Resting | Look::Nobody => None,
        }
    }
}

/// What a Function's shim gets from a broker.
#[derive(Debug)]
pub struct Attachment {
    /// To ask for leaves.
    pub zygote: ZygoteChannel,
    /// To add each of them to; `None` from a release that does not count.
    pub leaves: Option<Count>,
    /// The zygote's user namespace.
    pub user_namespace: OwnedFd,
    /// The only user mapped there, as the host numbers it.
    pub uid: u32,
    /// The only group.
    pub gid: u32,
    /// Name of the seccomp profile that the zygote is held to.
    pub profile: String,
    /// Where it was found.
    pub path: PathBuf,
}

/// Attaches to the newest pool that works among the sockets (`*.sock`) in `dir`. Sockets that
/// nobody listens on are removed. No such directory is nobody.
///
/// # Errors
/// [`Error::Path`] when the directory cannot be read. A broker that misbehaves is passed over.
pub async fn attach(dir: &Path) -> Result<Look> {
    let mut look = Look::Nobody;
    for path in newest_first(dir)? {
        let socket = seqpacket()?;
        let (_dir, address) = address(&path)?;
        match connect(&socket, &address) {
            Ok(()) => {}
            Err(Errno::CONNREFUSED) => {
                // Whoever listens anew at this name binds a new file: only the dead one goes.
                let _ = std::fs::remove_file(&path);
                continue;
            }
            Err(errno) => {
                tracing::debug!(path = %path.display(), %errno, "broker passed over");
                continue;
            }
        }
        match tokio::time::timeout(ANSWER_WITHIN, attachment(socket, &path)).await {
            Ok(Ok(attachment)) => return Ok(Look::Found(Box::new(attachment))),
            Ok(Err(error)) if error.is_closed() => look = Look::Resting,
            Ok(Err(error)) => tracing::warn!(path = %path.display(), %error, "broker passed over"),
            Err(_) => tracing::warn!(path = %path.display(), "broker passed over: no answer"),
        }
    }
    Ok(look)
}

async fn attachment(socket: OwnedFd, path: &Path) -> Result<Attachment> {
    let broker = Channel::new(socket, "broker")?;
    let received = broker.receive::<Attached>(2).await?;
    let Attached { uid, gid, profile } = received.message;
    let Ok([channel, user_namespace]) = <[OwnedFd; 2]>::try_from(received.fds) else {
        return Err(Error::Unexpected {
            peer: "broker",
            said: "Attached",
            expected: "Attached with two descriptors",
        });
    };
    let counted = broker.receive::<Counted>(1).await;
    let leaves = counted.ok().and_then(|mut counted| counted.fds.pop());
    Ok(Attachment {
        zygote: ZygoteChannel::new(channel)?,
        leaves: leaves.map(Count),
        user_namespace,
        uid,
        gid,
        profile,
        path: path.to_owned(),
    })
}

fn newest_first(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::path("read the directory", dir)(errno(&e))),
    };
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(modified) = entry.metadata().and_then(|about| about.modified()) else {
            continue;
        };
        match path.extension().and_then(OsStr::to_str) {
            Some(READY) => found.push((modified, path)),
            Some(UNREADY) if modified.elapsed().is_ok_and(|age| age > ABANDONED_AFTER) => {
                let _ = std::fs::remove_file(&path);
            }
            _ => {}
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// A socket that appears at `path` once it listens: one that does not yet refuses connections as if nobody would ever
/// listen, and is removed by those who look for a zygote.
fn listening(path: &Path) -> Result<OwnedFd> {
    if let Some(dir) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Error::path("create the directory", dir)(errno(&e)))?;
    }
    let unready = path.with_extension(UNREADY);
    match std::fs::remove_file(&unready) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::path("remove the stale socket", &unready)(errno(&e)));
        }
        _ => {}
    }
    let socket = seqpacket()?;
    let (_dir, address) = address(&unready)?;
    bind(&socket, &address).map_err(Error::path("bind", &unready))?;
    let appeared = listen(&socket, BACKLOG)
        .map_err(Error::path("listen on", &unready))
        .and_then(|()| {
            std::fs::rename(&unready, path).map_err(|e| Error::path("rename to", path)(errno(&e)))
        });
    if let Err(error) = appeared {
        let _ = std::fs::remove_file(&unready);
        return Err(error);
    }
    Ok(socket)
}

/// The address of a socket at `path`, through a descriptor of its directory that must be kept while the
/// address is used: `sun_path` holds 108 bytes, and a pool's path has more.
fn address(path: &Path) -> Result<(OwnedFd, SocketAddrUnix)> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Path {
            step: "name the socket",
            path: path.to_owned(),
            errno: Errno::INVAL,
        });
    };
    let dir = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(Error::path("open the directory", dir))?;
    let short = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    let address = SocketAddrUnix::new(short).map_err(Error::path("name the socket", path))?;
    Ok((dir, address))
}

fn seqpacket() -> Result<OwnedFd> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(Error::system("make a socket (socket)"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn who_looks_for_a_zygote_while_one_begins_to_listen_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
        };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                runtime().block_on(async {
                    while !over.load(Ordering::Relaxed) {
                        let look = attach(dir.path()).await.unwrap();
                        assert!(!matches!(look, Look::Found(_)));
                    }
                });
            });
            let kept = runtime().block_on(async {
                (0..3000).find(|round| {
                    let path = dir.path().join(format!("{round}.sock"));
                    let _broker = Broker::listen(&path).unwrap();
                    // Whoever came in between has had its look.
                    std::thread::yield_now();
                    !path.exists()
                })
            });
            over.store(true, Ordering::Relaxed);
            assert_eq!(kept, None, "the socket of a living broker is gone");
        });
    }

    #[test]
    fn what_was_never_to_listen_is_removed_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("a.new"), dir.path().join("b.new"));
        for path in [&old, &new] {
            std::fs::write(path, "").unwrap();
        }
        let then = SystemTime::now() - 2 * ABANDONED_AFTER;
        let file = std::fs::File::options().write(true).open(&old).unwrap();
        file.set_modified(then).unwrap();
        assert!(newest_first(dir.path()).unwrap().is_empty());
        assert!(!old.exists() && new.exists());
    }
}
