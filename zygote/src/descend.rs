//! A zygote that is forked from another, as the shim of its pool sees it: one type for each state, as for a leaf.
//!
//! ```text
//! shim                         parent zygote      child
//!   ForkZygote ─────────────────▶  fork ────────▶
//!        ◀───────────────────────────────────────  Hello, in the parent's namespaces
//!   makes namespaces nested in those
//!   Enter ──────────────────────────────────────▶  forks into the PID namespace, enters the others
//!        ◀───────────────────────────────────────  Entered
//!   Configure ──────────────────────────────────▶  imports what is missing
//! ```
//!
//! The parent runs a tenant's code, and so does the child: what they say is checked by what the kernel says.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::fstat;
use sock_zygote_protocol::{FromZygote, Received, ToZygote, ZygoteFd};

use crate::channel::Channel;
use crate::error::{Error, Result, errno};
use crate::peer::Peer;
use crate::setup::SealedSetup;
use crate::zygote::name;

/// A child of a zygote that waits in its parent's namespaces.
#[derive(Debug)]
pub struct Newborn {
    channel: Channel,
    peer: Peer,
}

/// Where it is to go: namespaces nested in those of its parent, and what its container has.
#[derive(Debug)]
pub struct EntryFds<'a> {
    /// Namespaces with what each is.
    pub namespaces: Vec<(ZygoteFd, BorrowedFd<'a>)>,
    /// As in [`crate::SetupFds`].
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Becomes standard output.
    pub stdout: BorrowedFd<'a>,
    /// Becomes standard error.
    pub stderr: BorrowedFd<'a>,
}

impl Newborn {
    pub(crate) fn new(channel: Channel, hello: Received<FromZygote>) -> Result<Newborn> {
        expect(&hello.message, "Hello")?;
        let peer = Peer::living(hello.credentials)?;
        Ok(Newborn { channel, peer })
    }

    /// The user and the PID namespace in which those of the child are to be nested. `user` is the parent's user namespace,
    /// as its broker says.
    ///
    /// # Errors
    /// [`Error::Impostor`] if the process is not of that user namespace, or gone.
    pub fn namespaces(&self, user: BorrowedFd<'_>) -> Result<(OwnedFd, OwnedFd)> {
        let impostor = |problem| Error::Impostor {
            pid: self.peer.pid(),
            problem,
        };
        let open = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", self.peer.pid());
            File::open(&path)
                .map(OwnedFd::from)
                .map_err(|e| Error::path("open the namespace", path)(errno(&e)))
        };
        let (own, pids) = (open("user")?, open("pid")?);
        if self.peer.has_ended()? {
            return Err(impostor("has ended"));
        }
        let inode = |fd: BorrowedFd<'_>| {
            let file = fstat(fd).map_err(Error::system("look at a namespace (fstat)"))?;
            Ok((file.st_dev, file.st_ino))
        };
        if inode(own.as_fd())? != inode(user)? {
            return Err(impostor("is not in its parent's user namespace"));
        }
        Ok((own, pids))
    }

    /// Sends it on its way into its container.
    ///
    /// # Errors
    /// [`Error::Wire`].
    pub fn enter(self, entry: &SealedSetup, fds: &EntryFds<'_>) -> Result<Entering> {
        let cgroups = fds.cgroups.iter().map(|fd| (ZygoteFd::Cgroup, *fd));
        let (kinds, list): (Vec<ZygoteFd>, Vec<BorrowedFd<'_>>) =
            [(ZygoteFd::Entry, entry.as_fd())]
                .into_iter()
                .chain(fds.namespaces.iter().copied())
                .chain(cgroups)
                .chain([
                    (ZygoteFd::Stdout, fds.stdout),
                    (ZygoteFd::Stderr, fds.stderr),
                ])
                .unzip();
        self.channel.send(&ToZygote::Enter { fds: kinds }, &list)?;
        Ok(Entering {
            channel: self.channel,
        })
    }
}

/// A zygote on its way into its container.
#[derive(Debug)]
pub struct Entering {
    channel: Channel,
}

impl Entering {
    /// Waits until it is there, and checks that whoever said so is a member of `cgroup`: only then may its pidfd be trusted
    /// to be a process of this pool. The kernel then takes it for want of memory as `oom_score_adj` says.
    ///
    /// Yields the channel for [`crate::Zygote::configure_over`], the pidfd, and the process's number as of now.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Impostor`], [`Error::Wire`].
    pub async fn entered(
        self,
        cgroup: &Path,
        oom_score_adj: Option<i32>,
    ) -> Result<(Channel, OwnedFd, i32)> {
        let Received {
            message,
            credentials,
            ..
        } = self.channel.receive::<FromZygote>(0).await?;
        expect(&message, "Entered")?;
        let peer = Peer::living(credentials)?;
        peer.belongs_to(cgroup, oom_score_adj)?;
        let pid = peer.pid();
        Ok((self.channel, peer.into_pidfd(), pid))
    }
}

/// Whether it says what is due.
fn expect(message: &FromZygote, due: &'static str) -> Result<()> {
    match message {
        FromZygote::Refused { module, message } => Err(Error::Refused {
            module: module.clone(),
            message: message.clone(),
        }),
        said if name(said) == due => Ok(()),
        said => Err(Error::Unexpected {
            peer: "zygote",
            said: name(said),
            expected: due,
        }),
    }
}
