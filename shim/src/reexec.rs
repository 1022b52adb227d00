//! The server runs from a read-only mount of its own binary.
//!
//! Children of the shim enter containers before they execute anything, and `/proc/PID/exe` leads whoever is
//! root there to the file they run from (CVE-2019-5736 overwrote runc by it). A copy in memory would cost its size for every
//! pod; a clone of the mount, made read-only and attached nowhere, costs nothing, since the pages stay those of the
//! one file, and nobody in a container has the right to lift the flag.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{OpenTreeFlags, open_tree};

/// Marks a process that went this way, and says where its program lies.
const DONE: &str = "SOCK_REEXEC";

/// Where the program lies on the host.
#[must_use]
pub fn program() -> Option<PathBuf> {
    std::env::var_os(DONE).map(Into::into)
}

/// Starts another process with this program from such a mount: the command, and what has to be kept until it is started.
///
/// # Errors
/// The kernel refuses one of the steps (`mount_setattr(2)` is there since 5.12).
pub fn command() -> io::Result<(Command, OwnedFd)> {
    let program = std::env::current_exe()?;
    let (Some(directory), Some(name)) = (program.parent(), program.file_name()) else {
        return Err(io::Error::other("the program has no directory"));
    };
    let mount = open_tree(
        CWD,
        directory,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    /// `struct mount_attr` (linux/mount.h).
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns_fd: u64,
    }
    // MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    let attr = MountAttr {
        set: 0x7,
        clear: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an empty C string, and a whole mount_attr whose size is given.
    if unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    } != 0
    {
        return Err(io::Error::last_os_error());
    }
    let file = openat(&mount, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    // The path is followed before descriptors are closed.
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.arg0(&program).env(DONE, &program);
    Ok((command, file))
}
