//! A process that a tenant's word names.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sock_zygote_protocol::Credentials;

use crate::error::{Error, Result, errno};

/// Whoever sent a packet, by the credentials that the kernel added.
#[derive(Debug)]
pub(crate) struct Peer {
    pid: i32,
    pidfd: OwnedFd,
}

impl Peer {
    /// `None` if it has ended already.
    ///
    /// # Errors
    /// [`Error::Impostor`] for one that cannot be seen from here.
    pub(crate) fn of(credentials: Option<Credentials>) -> Result<Option<Peer>> {
        let number = credentials.map_or(0, |c| c.pid);
        let pid = Pid::from_raw(number).ok_or(Error::Impostor {
            pid: number,
            problem: "cannot be seen from this process namespace",
        })?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => Ok(None),
            other => {
                let pidfd = other.map_err(Error::system("open the peer's pidfd (pidfd_open)"))?;
                Ok(Some(Peer { pid: number, pidfd }))
            }
        }
    }

    /// One that has not ended.
    ///
    /// # Errors
    /// [`Error::Impostor`], also for one that has.
    pub(crate) fn living(credentials: Option<Credentials>) -> Result<Peer> {
        Peer::of(credentials)?.ok_or(Error::Impostor {
            pid: credentials.map_or(0, |c| c.pid),
            problem: "has ended",
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(crate) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// Whether it has ended: what was read of its number until now was its own if not.
    ///
    /// # Errors
    /// [`Error::System`].
    pub(crate) fn has_ended(&self) -> Result<bool> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now))
            .map(|ended| ended > 0)
            .map_err(Error::system("look if the process lives (poll)"))
    }

    /// A zygote can name any process that it sees in its credentials, and process numbers come back.
    /// If the number is in the cgroup while the pidfd's process lives, they are the same process. The
    /// pidfd of a process that has ended does no harm, whosever it was, and a leaf that lives for one
    /// request may have answered it by now.
    pub(crate) fn belongs_to(&self, cgroup: &Path, oom_score_adj: Option<i32>) -> Result<()> {
        // Opened before it is known whose it is, so that it is that process's and no later one's.
        let score = oom_score_adj.and_then(|score| {
            let path = format!("/proc/{}/oom_score_adj", self.pid);
            Some((File::options().write(true).open(path).ok()?, score))
        });
        let path = cgroup.join("cgroup.procs");
        let members = std::fs::read_to_string(&path)
            .map_err(|e| Error::path("read the members of", path.clone())(errno(&e)))?;
        if self.has_ended()? {
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
