//! The fork itself: a child that is PID 1 of a process namespace of its own, with an interpreter that
//! knows it has been forked.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use pyo3::ffi::{PyOS_AfterFork_Child, PyOS_AfterFork_Parent, PyOS_BeforeFork};
use pyo3::prelude::*;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::confine::last_errno;
use crate::python::Runtime;

/// Number of a leaf's control channel, the same as in a plain interpreter.
const CONTROL: i32 = 3;

/// Which of the two returned.
pub enum Side {
    /// The zygote.
    Parent,
    /// The leaf, with the only descriptor it keeps besides `/dev/null` at 0, 1 and 2.
    Child(OwnedFd),
}

/// Why there is no leaf.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing has changed; the next may succeed.
    #[error("{0}: {1}")]
    Refused(&'static str, Errno),
    /// Children would be born into the wrong process namespace: no more can be forked.
    #[error("return to the own process namespace (setns): {0}")]
    Stranded(Errno),
}

/// What forking needs and is opened once.
pub struct Forker {
    own_pids: OwnedFd,
    null: OwnedFd,
    /// Whether threads were accepted, which run between two forks.
    pub threads: bool,
}

impl Forker {
    pub fn new(threads: bool) -> std::io::Result<Forker> {
        Ok(Forker {
            own_pids: File::open("/proc/self/ns/pid")?.into(),
            null: File::options()
                .read(true)
                .write(true)
                .open("/dev/null")?
                .into(),
            threads,
        })
    }

    /// Forks a child that keeps `channel`.
    pub fn fork(
        &self,
        py: Python<'_>,
        runtime: &Runtime,
        channel: &OwnedFd,
    ) -> Result<Side, Error> {
        self.prepare(py, runtime);
        match self.fork_into_own_pids() {
            Ok(0) => {
                tell_python(self.threads);
                Ok(Side::Child(self.keep_only_or_end(channel)))
            }
            other => self.go_on(other),
        }
    }

    /// Forks a child that is to become a zygote: in the zygote's own namespaces, and Python does not know of it yet
    /// ([`tell_python`]).
    pub fn fork_zygote(
        &self,
        py: Python<'_>,
        runtime: &Runtime,
        channel: &OwnedFd,
    ) -> Result<Side, Error> {
        self.prepare(py, runtime);
        // SAFETY: libc's own fork, so that its locks and those of pthread_atfork are in order in the child.
        match unsafe { libc::fork() } {
            0 => Ok(Side::Child(self.keep_only_or_end(channel))),
            pid if pid > 0 => self.go_on(Ok(pid)),
            _ => self.go_on(Err(Error::Refused("fork", last_errno()))),
        }
    }

    /// What is due before a fork where threads were accepted; elsewhere the child does it ([`tell_python`]).
    fn prepare(&self, py: Python<'_>, runtime: &Runtime) {
        if self.threads {
            // What they have buffered would appear twice.
            runtime.flush(py);
            // SAFETY: the GIL is held; the three calls stand where os.fork() makes them.
            unsafe { PyOS_BeforeFork() };
        }
    }

    fn go_on(&self, outcome: Result<libc::pid_t, Error>) -> Result<Side, Error> {
        if self.threads {
            // SAFETY: the GIL is held; in the parent, also when there is no child.
            unsafe { PyOS_AfterFork_Parent() };
        }
        outcome.map(|_| Side::Parent)
    }

    fn keep_only_or_end(&self, channel: &OwnedFd) -> OwnedFd {
        match self.keep_only(channel) {
            Ok(channel) => channel,
            Err(error) => {
                eprintln!("sock: a child ended at once: {error}");
                // SAFETY: the child must not go on as a second zygote.
                unsafe { libc::_exit(1) }
            }
        }
    }

    fn fork_into_own_pids(&self) -> Result<libc::pid_t, Error> {
        // SAFETY: a process namespace for future children changes nothing for this process.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
            .map_err(|errno| Error::Refused("make a process namespace (unshare)", errno))?;
        // SAFETY: libc's own fork, so that its locks and those of pthread_atfork are in order in the child.
        let pid = unsafe { libc::fork() };
        let failed = (pid < 0).then(last_errno);
        if pid != 0 {
            // Else the next unshare would nest in the namespace just made.
            move_into_link_name_space(self.own_pids.as_fd(), Some(LinkNameSpaceType::ProcessID))
                .map_err(Error::Stranded)?;
        }
        match failed {
            Some(errno) => Err(Error::Refused("fork", errno)),
            None => Ok(pid),
        }
    }

    /// Leaves the child with its channel and `/dev/null`: it holds nothing of the zygote, so the
    /// zygote's end is seen by its peers, and nothing of another Function.
    fn keep_only(&self, channel: &OwnedFd) -> Result<OwnedFd, Error> {
        // The child never uses the objects that own these numbers: it does not return to the zygote's loop, nor does it
        // drop what it inherited.
        let put = |fd: &OwnedFd, number| {
            dup_to(fd, number).map_err(|e| Error::Refused("arrange descriptors (dup2)", e))
        };
        // SAFETY: a duplicate above all numbers that are about to be replaced.
        let spare = unsafe { libc::fcntl(channel.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
        // SAFETY: likewise.
        let null = unsafe { libc::fcntl(self.null.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
        if spare < 0 || null < 0 {
            return Err(Error::Refused("arrange descriptors (fcntl)", last_errno()));
        }
        // SAFETY: both are new.
        let (spare, null) = unsafe { (owned(spare), owned(null)) };
        (0..3).try_for_each(|number| put(&null, number))?;
        put(&spare, CONTROL)?;
        std::mem::forget((spare, null));
        // SAFETY: closes all above the control channel, whose owners are never used again in the child.
        if unsafe { libc::syscall(libc::SYS_close_range, CONTROL + 1, u32::MAX, 0) } != 0 {
            return Err(Error::Refused(
                "close the zygote's descriptors (close_range)",
                last_errno(),
            ));
        }
        // SAFETY: CONTROL was put there above and has no other owner in the child.
        let control = unsafe { owned(CONTROL) };
        // SAFETY: sets a flag of that descriptor, and the default action of a signal.
        unsafe {
            libc::fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC);
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        }
        Ok(control)
    }
}

/// In the child: what has to be done around a fork, and was not done before if no thread was `accepted`.
///
/// Whatever a zygote writes to is copied once more for it after each fork, and one byte breaks up a huge page: it runs no
/// Python. With a single thread, what has to be done before a fork (locks, hooks) can as well be done in the child, which is
/// the same at this point.
pub fn tell_python(accepted: bool) {
    if !accepted {
        // SAFETY: the GIL is held, and no other thread is there to have any lock.
        unsafe { PyOS_BeforeFork() };
    }
    // SAFETY: as in `Forker::prepare`, in the child.
    unsafe { PyOS_AfterFork_Child() };
}

/// Puts descriptors at numbers that no Rust object owns.
pub fn replace(streams: &[(i32, OwnedFd)]) -> Result<(), Errno> {
    streams
        .iter()
        .try_for_each(|(number, fd)| dup_to(fd, *number))
}

fn dup_to(fd: &OwnedFd, number: i32) -> Result<(), Errno> {
    // SAFETY: by the callers, whatever has that number is not used any more.
    match unsafe { libc::dup2(fd.as_raw_fd(), number) } {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}

/// # Safety
/// `fd` is open and has no other owner.
unsafe fn owned(fd: i32) -> OwnedFd {
    // SAFETY: by the caller.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}
