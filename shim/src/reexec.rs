//! The server runs from a read-only mount of its own binary.
//!
//! Children of the shim enter containers before they execute anything, and `/proc/PID/exe` leads whoever is
//! root there to the file they run from (CVE-2019-5736 overwrote runc by it). A copy in memory would cost its size for every
//! pod; a clone of the mount, made read-only and attached nowhere, costs nothing, since the pages stay those of the
//! one file, and nobody in a container has the right to lift the flag.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{OpenTreeFlags, open_tree};

/// Marks a process that went this way, and says where its program lies.
const DONE: &str = "SOCK_REEXEC";

/// Where the program lies on the host.
#[must_use]
pub fn program() -> Option<std::path::PathBuf> {
    std::env::var_os(DONE).map(Into::into)
}

/// This program, on such a mount.
struct Sealed {
    file: OwnedFd,
    /// Where it lies on the host.
    program: PathBuf,
}

impl Sealed {
    fn new() -> io::Result<Sealed> {
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
        Ok(Sealed { file, program })
    }
}

/// Starts another process with this program from such a mount: the command, and what has to be kept until it is started.
///
/// # Errors
/// The kernel refuses one of the steps (`mount_setattr(2)` is there since 5.12).
pub fn command() -> io::Result<(Command, OwnedFd)> {
    let Sealed { file, program } = Sealed::new()?;
    // The path is followed before descriptors are closed.
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.arg0(&program).env(DONE, &program);
    Ok((command, file))
}

/// Starts this program again from such a mount, unless it was: for whoever starts the server by hand.
///
/// # Errors
/// As of [`command`].
pub fn from_read_only_mount() -> io::Result<()> {
    if std::env::var_os(DONE).is_some() {
        return Ok(());
    }
    let Sealed { file, program } = Sealed::new()?;
    let text = |bytes: &[u8]| {
        CString::new(bytes).map_err(|_| io::Error::other("a zero byte in an argument"))
    };
    let arguments = std::env::args_os()
        .map(|a| text(a.as_bytes()))
        .collect::<io::Result<Vec<_>>>()?;
    let mut environment = std::env::vars_os()
        .map(|(n, v)| text(&[n.as_bytes(), b"=", v.as_bytes()].concat()))
        .collect::<io::Result<Vec<_>>>()?;
    environment.push(text(
        &[DONE.as_bytes(), b"=", program.as_os_str().as_bytes()].concat(),
    )?);
    let list = |strings: &[CString]| {
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect::<Vec<_>>()
    };
    let (argv, envp) = (list(&arguments), list(&environment));
    // SAFETY: null-terminated lists of C strings that outlive the call; an empty path names the descriptor itself.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(io::Error::last_os_error())
}
