//! A Function's root directory, made fit for a zygote's user namespace.
//!
//! A mount that is cloned while a more privileged user namespace owns the mount namespace carries no
//! locked flags, and whoever holds `CAP_SYS_ADMIN` in the zygote's user namespace could lift its
//! read-only, nosuid and nodev again. The kernel locks flags when a mount namespace is copied for
//! a less privileged user namespace (`copy_mnt_ns`, mount_namespaces(7)), so a helper process makes
//! such a copy once, and each leaf's tree is cloned from that.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{Pid, Signal, WaitOptions, fchdir, getpid, kill_process, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Error, Result, errno};

/// The root and the empty network of one Function pod for leaves of one zygote.
#[derive(Debug)]
pub struct FunctionRoot {
    /// Copy of the container's mounts, owned by the zygote's user namespace.
    tree: OwnedFd,
    /// Without any interface that is up.
    network: OwnedFd,
    /// The caller's own mount namespace, to return to.
    home: OwnedFd,
}

impl FunctionRoot {
    /// Makes both by a short-lived child process that enters `mounts` (the container's mount
    /// namespace) and `user` (the zygote's user namespace).
    ///
    /// # Errors
    /// [`Error::System`] with the step that failed, in this process or the child.
    pub fn prepare(mounts: BorrowedFd<'_>, user: BorrowedFd<'_>) -> Result<FunctionRoot> {
        let home = File::open("/proc/thread-self/ns/mnt").map_err(|e| {
            Error::path("open the mount namespace", "/proc/thread-self/ns/mnt")(errno(&e))
        })?;
        let (told, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(Error::system("connect to the helper (pipe2)"))?;
        let fds = [mounts.as_raw_fd(), user.as_raw_fd(), tell.as_raw_fd()];
        let parent = getpid();

        // SAFETY: the child runs nothing but `helper`, which makes system calls on its own stack and
        // leaves by _exit: sound whatever other threads did at the time of the fork.
        let pid = match unsafe { libc::fork() } {
            -1 => {
                return Err(Error::System {
                    step: "start the helper (fork)",
                    errno: last(),
                });
            }
            0 => helper(fds, parent),
            pid => Pid::from_raw(pid).ok_or(Error::System {
                step: "start the helper (fork)",
                errno: Errno::CHILD,
            })?,
        };
        drop(tell);
        let outcome = namespaces(pid, &told);
        // By a signal and not by the end of a pipe, which a helper that another thread has started meanwhile may hold too.
        // Fails if it has ended, and then its number is still ours: it is ours alone to reap.
        let _ = kill_process(pid, Signal::KILL);
        while matches!(waitpid(Some(pid), WaitOptions::empty()), Err(Errno::INTR)) {}
        let (tree, network) = outcome?;
        Ok(FunctionRoot {
            tree,
            network,
            home: home.into(),
        })
    }

    /// The empty network namespace.
    #[must_use]
    pub fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// The mount namespace from which trees are cloned.
    #[must_use]
    pub fn tree(&self) -> BorrowedFd<'_> {
        self.tree.as_fd()
    }

    /// A detached copy of the whole tree, for one leaf.
    ///
    /// The calling thread enters the copy's mount namespace and returns, so it must share its working
    /// directory with no other thread (be alone in the process, or have called
    /// `unshare(CLONE_FS)`), else `EINVAL`. Its root directory is that of its mount namespace after.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn clone_tree(&self) -> Result<OwnedFd> {
        let here = rustix::fs::open(
            ".",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(Error::system("remember the working directory (open)"))?;
        move_into_link_name_space(self.tree.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(Error::system("enter the copy of the root (setns)"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, "/", flags).map_err(Error::system("clone the root (open_tree)"));
        if let Err(errno) =
            move_into_link_name_space(self.home.as_fd(), Some(LinkNameSpaceType::Mount))
        {
            // Going on would mean to take a tenant's files for the host's.
            tracing::error!(%errno, "cannot return to the own mount namespace");
            std::process::abort();
        }
        fchdir(&here).map_err(Error::system("return to the working directory (fchdir)"))?;
        tree
    }
}

/// Opens the helper's namespaces once it says that they are made.
fn namespaces(pid: Pid, told: &OwnedFd) -> Result<(OwnedFd, OwnedFd)> {
    let mut word = [0u8; 5];
    let got = loop {
        match rustix::io::read(told, &mut word) {
            Err(Errno::INTR) => {}
            other => break other.map_err(Error::system("hear from the helper (read)"))?,
        }
    };
    let step = match word[0] {
        0 if got == word.len() => "",
        1 => "helper enters the container's mount namespace (setns)",
        2 => "helper enters the zygote's user namespace (setns)",
        3 => "helper copies the root and makes an empty network (unshare)",
        _ => {
            return Err(Error::System {
                step: "hear from the helper (it ended)",
                errno: Errno::CHILD,
            });
        }
    };
    if !step.is_empty() {
        let code = i32::from_ne_bytes([word[1], word[2], word[3], word[4]]);
        return Err(Error::System {
            step,
            errno: Errno::from_raw_os_error(code),
        });
    }
    let open = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", pid.as_raw_nonzero());
        File::open(&path)
            .map(OwnedFd::from)
            .map_err(|e| Error::path("open the helper's namespace", path)(errno(&e)))
    };
    Ok((open("mnt")?, open("net")?))
}

fn helper([mounts, user, tell]: [RawFd; 3], parent: Pid) -> ! {
    // SAFETY: plain system calls on descriptors inherited from the parent and on local memory; nothing
    // here allocates or locks, as a child of a process that may have threads must not.
    unsafe {
        let step = if libc::setns(mounts, libc::CLONE_NEWNS) != 0 {
            1
        } else if libc::setns(user, libc::CLONE_NEWUSER) != 0 {
            2
        } else if libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET) != 0 {
            3
        } else {
            0
        };
        let mut word = [step, 0, 0, 0, 0];
        if step != 0 {
            word[1..].copy_from_slice(&last().raw_os_error().to_ne_bytes());
        }
        // Only now: another user namespace takes it back (commit_creds, kernel/cred.c).
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent.as_raw_nonzero().get() {
            libc::_exit(0);
        }
        libc::write(tell, word.as_ptr().cast(), word.len());
        // Its namespaces live until the parent has opened them and kills it.
        loop {
            libc::pause();
        }
    }
}

fn last() -> Errno {
    errno(&std::io::Error::last_os_error())
}
