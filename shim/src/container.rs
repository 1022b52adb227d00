//! A container: its specification, its cgroup, its processes.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use sock_sandbox::cgroup::Cgroup;

use crate::process::Process;
use crate::role::Role;
use crate::uses::Use;

/// A container of the pod.
pub struct Container {
    /// Its ID.
    pub id: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
    /// As containerd wrote it, with what its role changed.
    pub spec: Spec,
    /// ID of the pod's sandbox, its own where there is none.
    pub sandbox: String,
    /// Its first process.
    pub init: Rc<Process>,
    /// Further ones by exec ID.
    pub execs: RefCell<HashMap<String, Rc<Process>>>,
    /// Where its processes are.
    pub cgroup: RefCell<Option<Cgroup>>,
    /// Whether it is paused.
    pub paused: Cell<bool>,
    /// Whether its cgroup says which devices it may open.
    pub devices_guarded: bool,
    /// The entry of the node cache that it uses.
    pub used: Option<Use>,
    /// What it is for.
    pub role: Role,
}

impl Container {
    /// Whether the end of its first process is, by the kernel, the end of all.
    #[must_use]
    pub fn own_processes(&self) -> bool {
        self.spec
            .linux()
            .as_ref()
            .and_then(|l| l.namespaces().as_ref())
            .is_some_and(|list| {
                list.iter().any(|n| {
                    n.typ() == LinuxNamespaceType::Pid
                        && n.path().as_ref().is_none_or(|p| p.as_os_str().is_empty())
                })
            })
    }

    /// What the role does after the end of the first process, before anybody is told.
    pub fn finish_role(&self, status: u32) {
        match &self.role {
            Role::Installer(installer) => installer.finish(status),
            Role::Zygote(zygote) => zygote.finish(),
            Role::Function(function) => function.finish(),
            Role::Sandbox | Role::Plain => {}
        }
    }
}
