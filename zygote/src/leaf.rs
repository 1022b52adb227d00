//! A leaf as the shim sees it: one type for each state, so that what may be said to it is decided by
//! the compiler. Its messages are a tenant's word and are checked.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{fcntl_get_seals, fstat};
use sock_zygote_protocol::{FdRole, FromLeaf, Phase, Received, ToLeaf};

use crate::channel::Channel;
use crate::error::{Error, Result};
use crate::patience::bounded;
use crate::peer::Peer;
use crate::setup::SealedSetup;

/// The descriptors of a setup. A plain interpreter needs none of them.
#[derive(Debug, Default)]
pub struct SetupFds<'a> {
    /// From [`crate::FunctionRoot::clone_tree`].
    pub root: Option<BorrowedFd<'a>>,
    /// From [`crate::FunctionRoot::network`].
    pub network: Option<BorrowedFd<'a>>,
    /// The leaf's cgroup in every hierarchy: `cgroup.procs` (version 2) or `tasks` (version 1), opened
    /// for writing. See [`FdRole::Cgroup`] for why not `cgroup.procs` on version 1.
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Becomes standard output.
    pub stdout: Option<BorrowedFd<'a>>,
    /// Becomes standard error.
    pub stderr: Option<BorrowedFd<'a>>,
}

/// A leaf that exists and knows nothing of a Function yet.
#[derive(Debug)]
pub struct Arrived {
    channel: Channel,
    peer: Peer,
}

impl Arrived {
    /// A plain interpreter that the shim has started itself, over its end of the control channel
    /// (which must have had `SO_PASSCRED` before the process started).
    ///
    /// # Errors
    /// [`Error::Wire`] when it ends first; [`Error::Unexpected`].
    pub async fn interpreter(control: OwnedFd) -> Result<Arrived> {
        let control = Channel::new(control, "leaf")?;
        let hello = control.receive(0).await?;
        Arrived::new(control, hello).await
    }

    pub(crate) async fn new(channel: Channel, hello: Received<FromLeaf>) -> Result<Arrived> {
        match hello.message {
            FromLeaf::Hello => {}
            FromLeaf::Failed { message, traceback } => {
                return Err(Error::LeafFailed { message, traceback });
            }
            other => {
                return Err(Error::Unexpected {
                    peer: "leaf",
                    said: name(&other),
                    expected: "Hello",
                });
            }
        }
        match Peer::of(hello.credentials)? {
            Some(peer) => Ok(Arrived { channel, peer }),
            // It may have said why.
            None => Err(farewell(&channel, hello.credentials.map_or(0, |c| c.pid)).await),
        }
    }

    /// Hands over everything that makes it a leaf of a Function.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn setup(self, setup: &SealedSetup, fds: &SetupFds<'_>) -> Result<Confining> {
        let optional = |role, fd: Option<_>| fd.map(|fd| (role, fd));
        let (roles, list): (Vec<FdRole>, Vec<BorrowedFd<'_>>) = [(FdRole::Setup, setup.as_fd())]
            .into_iter()
            .chain(optional(FdRole::Root, fds.root))
            .chain(optional(FdRole::Network, fds.network))
            .chain(fds.cgroups.iter().map(|fd| (FdRole::Cgroup, *fd)))
            .chain(optional(FdRole::Stdout, fds.stdout))
            .chain(optional(FdRole::Stderr, fds.stderr))
            .unzip();
        self.channel.send(&ToLeaf::Setup { fds: roles }, &list)?;
        Ok(Confining(self))
    }
}

async fn farewell(channel: &Channel, pid: i32) -> Error {
    match channel.receive::<FromLeaf>(0).await {
        Ok(Received {
            message: FromLeaf::Failed { message, traceback },
            ..
        }) => Error::LeafFailed { message, traceback },
        Ok(_) => Error::Impostor {
            pid,
            problem: "has ended",
        },
        Err(error) => error,
    }
}

/// A leaf on its way into the pod. A connection can be queued; it is read only when the handler is
/// imported.
#[derive(Debug)]
pub struct Confining(Arrived);

impl Confining {
    /// Queues a connection behind the setup.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn queue(&self, conn: u64, connection: BorrowedFd<'_>) -> Result<()> {
        self.0.channel.send(&ToLeaf::Serve { conn }, &[connection])
    }

    /// Waits until it is confined, and checks that the process which said so is a member of
    /// `cgroup` (a directory with `cgroup.procs`): only then may its pidfd be trusted to be a leaf
    /// of this pod. `None` for a plain interpreter, which the shim has started itself.
    ///
    /// The kernel then takes it for want of memory as readily as `oom_score_adj` says (proc_pid_oom_score_adj(5)), and not as
    /// the zygote, from which it has the value of another pod.
    ///
    /// Yields the time of each step, and the seccomp listener if sockets are intercepted.
    ///
    /// # Errors
    /// [`Error::LeafFailed`], [`Error::Impostor`], [`Error::Wire`].
    pub async fn confined(
        self,
        cgroup: Option<&Path>,
        oom_score_adj: Option<i32>,
    ) -> Result<(Loading, Vec<Phase>, Option<OwnedFd>)> {
        let Received {
            message, mut fds, ..
        } = self.0.channel.receive::<FromLeaf>(1).await?;
        let listener = fds.pop();
        if listener.as_ref().is_some_and(|fd| !is_listener(fd)) {
            bounded(|| drop(listener));
            return Err(Error::Unexpected {
                peer: "leaf",
                said: "Confined with some descriptor",
                expected: "Confined with its seccomp listener",
            });
        }
        match message {
            FromLeaf::Confined { phases } => {
                if let Some(cgroup) = cgroup {
                    self.0.peer.belongs_to(cgroup, oom_score_adj)?;
                }
                Ok((Loading(self.0), phases, listener))
            }
            FromLeaf::Failed { message, traceback } => {
                Err(Error::LeafFailed { message, traceback })
            }
            other => Err(Error::Unexpected {
                peer: "leaf",
                said: name(&other),
                expected: "Confined",
            }),
        }
    }
}

/// Whether it is what seccomp(2) gives out for notifications: anything else would be closed at its sender's pace, and asked
/// for what it is not.
fn is_listener(fd: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|name| name.as_os_str() == "anon_inode:seccomp notify")
}

/// A confined leaf that imports the handler.
#[derive(Debug)]
pub struct Loading(Arrived);

impl Loading {
    /// Queues a connection behind the import.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn queue(&self, conn: u64, connection: BorrowedFd<'_>) -> Result<()> {
        self.0.channel.send(&ToLeaf::Serve { conn }, &[connection])
    }

    /// Waits until the handler is imported; yields the microseconds this took, and the handler's module as it was compiled,
    /// if that was asked for and is there.
    ///
    /// # Errors
    /// [`Error::LeafFailed`] with the line that the Function's author needs; [`Error::Wire`].
    pub async fn ready(self, keep_compiled: bool) -> Result<(Leaf, u64, Option<Vec<u8>>)> {
        let Received {
            message, mut fds, ..
        } = self.0.channel.receive::<FromLeaf>(1).await?;
        let read = |file| keep_compiled.then(|| read_memory_file(file)).flatten();
        let compiled = fds.pop().and_then(|file| bounded(|| read(file)));
        match message {
            FromLeaf::Ready { import_micros } => Ok((Leaf(self.0), import_micros, compiled)),
            FromLeaf::Failed { message, traceback } => {
                Err(Error::LeafFailed { message, traceback })
            }
            other => Err(Error::Unexpected {
                peer: "leaf",
                said: name(&other),
                expected: "Ready",
            }),
        }
    }

    /// The leaf's process.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.0.peer.pidfd()
    }
}

/// More compiled code than this is not kept, in bytes: eight times what the API server takes of source.
const MOST_COMPILED: u64 = 1 << 20;

/// What is in a memory file (memfd_create(2)). `None` for any other file, of which a tenant decides how long a read takes.
fn read_memory_file(file: OwnedFd) -> Option<Vec<u8>> {
    fcntl_get_seals(&file).ok()?;
    let size = u64::try_from(fstat(&file).ok()?.st_size)
        .ok()
        .filter(|size| *size <= MOST_COMPILED)?;
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    File::from(file).read_exact_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

/// What a leaf reports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The head of a request was read.
    Began {
        /// The connection.
        conn: u64,
    },
    /// The answer was written.
    Done {
        /// The connection.
        conn: u64,
        /// HTTP status.
        status: u16,
        /// Microseconds since `Began`, by the leaf's word.
        micros: u64,
    },
    /// The connection is idle and only the shim holds it now.
    Parked {
        /// The connection.
        conn: u64,
    },
    /// The connection has ended.
    Closed {
        /// The connection.
        conn: u64,
    },
}

/// A leaf that serves.
#[derive(Debug)]
pub struct Leaf(Arrived);

impl Leaf {
    /// Hands a connection over.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn serve(&self, conn: u64, connection: BorrowedFd<'_>) -> Result<()> {
        self.0.channel.send(&ToLeaf::Serve { conn }, &[connection])
    }

    /// Asks for an idle connection back: see [`ToLeaf::Park`].
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn park(&self, conn: u64) -> Result<()> {
        self.0.channel.send(&ToLeaf::Park { conn }, &[])
    }

    /// Has every answer from here on end its connection: see [`ToLeaf::DRAIN`].
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn drain(&self) -> Result<()> {
        self.park(ToLeaf::DRAIN)
    }

    /// Asks it to finish what is under way and exit.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn exit(&self) -> Result<()> {
        self.0.channel.send(&ToLeaf::Exit, &[])
    }

    /// The next report. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Wire`]: after its end ([`Error::is_closed`]), and for what is no message, whereupon
    /// the leaf is to be killed.
    pub async fn event(&self) -> Result<Event> {
        match self.0.channel.receive::<FromLeaf>(0).await?.message {
            FromLeaf::Began { conn } => Ok(Event::Began { conn }),
            FromLeaf::Done {
                conn,
                status,
                micros,
            } => Ok(Event::Done {
                conn,
                status,
                micros,
            }),
            FromLeaf::Parked { conn } => Ok(Event::Parked { conn }),
            FromLeaf::Closed { conn } => Ok(Event::Closed { conn }),
            other => Err(Error::Unexpected {
                peer: "leaf",
                said: name(&other),
                expected: "Began, Done, Parked or Closed",
            }),
        }
    }

    /// The leaf's process: readable when it has ended, and the only safe way to signal it.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.0.peer.pidfd()
    }
}

fn name(message: &FromLeaf) -> &'static str {
    match message {
        FromLeaf::Hello => "Hello",
        FromLeaf::Confined { .. } => "Confined",
        FromLeaf::Ready { .. } => "Ready",
        FromLeaf::Failed { .. } => "Failed",
        FromLeaf::Began { .. } => "Began",
        FromLeaf::Done { .. } => "Done",
        FromLeaf::Parked { .. } => "Parked",
        FromLeaf::Closed { .. } => "Closed",
    }
}
