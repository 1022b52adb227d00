//! A leaf as the shim sees it: one type for each state, so that what may be said to it is decided by
//! the compiler. Its messages are a tenant's word and are checked.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{fcntl_get_seals, fstat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sock_zygote_protocol::{FdRole, FromLeaf, Phase, Received, ToLeaf};

use crate::channel::Channel;
use crate::error::{Error, Result, errno};
use crate::patience::bounded;
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
    pid: i32,
    pidfd: OwnedFd,
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
        let number = hello.credentials.map_or(0, |c| c.pid);
        let pid = Pid::from_raw(number).ok_or(Error::Impostor {
            pid: number,
            problem: "cannot be seen from this process namespace",
        })?;
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            // It has ended already, and may have said why.
            Err(Errno::SRCH) => return Err(farewell(&channel, number).await),
            other => other.map_err(Error::system("open the leaf's pidfd (pidfd_open)"))?,
        };
        Ok(Arrived {
            channel,
            pid: number,
            pidfd,
        })
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
                    self.0.belongs_to(cgroup, oom_score_adj)?;
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

impl Arrived {
    /// A zygote can name any process that it sees in its credentials, and process numbers come back.
    /// If the number is in the cgroup while the pidfd's process lives, they are the same process. The
    /// pidfd of a process that has ended does no harm, whosever it was, and a leaf that lives for one
    /// request may have answered it by now.
    fn belongs_to(&self, cgroup: &Path, oom_score_adj: Option<i32>) -> Result<()> {
        // Opened before it is known whose it is, so that it is that process's and no later one's.
        let score = oom_score_adj.and_then(|score| {
            let path = format!("/proc/{}/oom_score_adj", self.pid);
            Some((File::options().write(true).open(path).ok()?, score))
        });
        let path = cgroup.join("cgroup.procs");
        let members = std::fs::read_to_string(&path)
            .map_err(|e| Error::path("read the members of", path.clone())(errno(&e)))?;
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now))
            .map_err(Error::system("look if the leaf lives (poll)"))?;
        if ended > 0 {
            return Ok(());
        }
        if members.lines().any(|line| line.parse() == Ok(self.pid)) {
            if let Some((mut file, score)) = score {
                // It may end now; and without `CAP_SYS_RESOURCE` the value stays.
                let _ = file.write_all(score.to_string().as_bytes());
            }
            return Ok(());
        }
        Err(Error::Impostor {
            pid: self.pid,
            problem: "is not in the cgroup that was made for it",
        })
    }
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
        self.0.pidfd.as_fd()
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
        self.0.pidfd.as_fd()
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
