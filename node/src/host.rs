//! The node's own files and programs, seen from the installer's container.
//!
//! Files are reached through a mount of the host's root directory; programs run in the mount namespace of the
//! host's PID 1, which the container sees because it shares the host's PID namespace.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// First argument of the process that moves into the host's mount namespace.
pub const ENTER: &str = "enter-host";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open {path}: {source}; the pod needs hostPID: true and privileged: true")]
    Namespace {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("enter the host's mount namespace: {0}; the pod needs privileged: true")]
    Enter(rustix::io::Errno),
    #[error("start {program} on the host: {source}")]
    Start {
        program: String,
        source: std::io::Error,
    },
    #[error("{command} on the host ended with {status}: {output}")]
    Failed {
        command: String,
        status: std::process::ExitStatus,
        output: String,
    },
}

/// The host's root directory and process table.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    processes: PathBuf,
}

impl Host {
    /// The host as the installer's pod mounts it: `SOCK_HOST_ROOT`, or `/host`.
    pub fn from_environment() -> Self {
        let root = std::env::var_os("SOCK_HOST_ROOT")
            .map_or_else(|| PathBuf::from("/host"), PathBuf::from);
        Self {
            root,
            processes: PathBuf::from("/proc"),
        }
    }

    /// A host whose files and process table lie in directories of the caller's.
    #[cfg(test)]
    pub fn at(root: &Path, processes: &Path) -> Self {
        Self {
            root: root.to_owned(),
            processes: processes.to_owned(),
        }
    }

    /// Where a file of the host is seen.
    pub fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let absolute = absolute.as_ref();
        self.root
            .join(absolute.strip_prefix("/").unwrap_or(absolute))
    }

    /// Where the host's process table is seen.
    pub fn processes(&self) -> &Path {
        &self.processes
    }

    /// Runs a program of the host among the host's files and returns what it printed.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        let output = Command::new("/proc/self/exe")
            .arg(ENTER)
            .arg(program)
            .args(arguments)
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .output()
            .map_err(|source| Error::Start {
                program: program.to_owned(),
                source,
            })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Failed {
            command: [program]
                .iter()
                .chain(arguments)
                .copied()
                .collect::<Vec<_>>()
                .join(" "),
            status: output.status,
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

/// Becomes `program` in the mount namespace of the host's PID 1; returns only if that fails.
///
/// setns(2) into a mount namespace is refused to a process with several threads, hence a process of its own.
pub fn enter(program: &str, arguments: &[&str]) -> Result<(), Error> {
    let path = PathBuf::from("/proc/1/ns/mnt");
    let namespace = File::open(&path).map_err(|source| Error::Namespace { path, source })?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(Error::Enter)?;
    let source = Command::new(program).args(arguments).exec();
    Err(Error::Start {
        program: program.to_owned(),
        source,
    })
}
