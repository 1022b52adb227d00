//! Namespaces (namespaces(7)): which to join, which to make.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Result;
use crate::error::Step;
use crate::root::Root;

/// `CLONE_NEW*` of a kind.
#[must_use]
pub fn flag(kind: Type) -> libc::c_int {
    match kind {
        Type::Mount => libc::CLONE_NEWNS,
        Type::Cgroup => libc::CLONE_NEWCGROUP,
        Type::Uts => libc::CLONE_NEWUTS,
        Type::Ipc => libc::CLONE_NEWIPC,
        Type::User => libc::CLONE_NEWUSER,
        Type::Pid => libc::CLONE_NEWPID,
        Type::Network => libc::CLONE_NEWNET,
        Type::Time => 0x80,
    }
}

fn link(kind: Type) -> Option<LinkNameSpaceType> {
    Some(match kind {
        Type::Mount => LinkNameSpaceType::Mount,
        Type::Cgroup => LinkNameSpaceType::ControlGroup,
        Type::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        Type::Ipc => LinkNameSpaceType::InterProcessCommunication,
        Type::User => LinkNameSpaceType::User,
        Type::Pid => LinkNameSpaceType::ProcessID,
        Type::Network => LinkNameSpaceType::Network,
        Type::Time => LinkNameSpaceType::Time,
    })
}

/// Opens `/proc/PID/ns/NAME`.
///
/// # Errors
/// The process is gone.
pub fn of_process(pid: i32, name: &str) -> Result<OwnedFd> {
    open(&PathBuf::from(format!("/proc/{pid}/ns/{name}")))
}

/// Opens a namespace by its path.
///
/// # Errors
/// No such file.
pub fn open(path: &Path) -> Result<OwnedFd> {
    File::open(path)
        .at("open namespace", path)
        .map(OwnedFd::from)
}

/// Joins one (setns(2)).
///
/// # Errors
/// It is of another kind, or this process may not.
pub fn join(fd: impl AsFd, kind: Type) -> Result<()> {
    move_into_link_name_space(fd.as_fd(), link(kind)).step("join namespace", kind)
}

/// What a specification wants: namespaces to join by path, and `CLONE_NEW*` of those to make.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub join: Vec<(Type, PathBuf)>,
    pub create: libc::c_int,
}

impl Wanted {
    pub(crate) fn of(list: &[LinuxNamespace]) -> Self {
        let mut wanted = Self::default();
        for namespace in list {
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    wanted.join.push((namespace.typ(), path.clone()))
                }
                _ => wanted.create |= flag(namespace.typ()),
            }
        }
        wanted
    }
    /// What is made after a user namespace that exists was joined, and so belongs to it: of a sandbox, which mounts nothing that
    /// depends on it. containerd 2 makes the user namespace of a pod itself.
    pub(crate) fn late(&self, root: &Root) -> libc::c_int {
        match root {
            Root::Empty if self.joins(Type::User).is_some() => {
                self.create & (libc::CLONE_NEWIPC | libc::CLONE_NEWUTS)
            }
            _ => 0,
        }
    }
    pub(crate) fn creates(&self, kind: Type) -> bool {
        self.create & flag(kind) != 0
    }
    pub(crate) fn joins(&self, kind: Type) -> Option<&Path> {
        self.join
            .iter()
            .find(|(k, _)| *k == kind)
            .map(|(_, p)| p.as_path())
    }
}
