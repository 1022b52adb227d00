//! A container: its specification, its cgroup, its processes.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use sock_sandbox::cgroup::{Cgroup, OomWatch};
use sock_sandbox::{ExecPlan, Launched, Stdio};

use crate::process::{Exit, Phase, Process};
use crate::role::Role;
use crate::task::Failure;
use crate::uses::Use;

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
/// A cgroup that is removed tells those who follow it from a queue of the kernel's work.
const OOM_TOLD_WITHIN: Duration = Duration::from_secs(1);

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
    /// Says if the kernel has killed in it for want of memory.
    pub oom: RefCell<Option<OomWatch>>,
    /// Whether it has, as far as was asked.
    pub out_of_memory: Cell<bool>,
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

    /// Number of its first process, which is that process's as long as nothing is waited for.
    ///
    /// # Errors
    /// It does not run.
    pub fn running(&self) -> Result<i32, Failure> {
        if self.init.phase() == Phase::Running {
            return Ok(self.init.pid());
        }
        Err(Failure::precondition(format!(
            "container {} is not running",
            self.id
        )))
    }

    /// Where its processes are, once it is created.
    ///
    /// # Errors
    /// It is not, or not any more.
    pub fn own_cgroup(&self) -> Result<Cgroup, Failure> {
        let cgroup = self.cgroup.borrow().clone();
        cgroup.ok_or_else(|| Failure::precondition("the container has no cgroup"))
    }

    /// Launches its own command as a further process, where the first one is a holder: with `control` as descriptor 3.
    ///
    /// # Errors
    /// It does not run, or the kernel refuses.
    pub fn launch_command(
        &self,
        control: OwnedFd,
        stdout: BorrowedFd<'_>,
        stderr: BorrowedFd<'_>,
    ) -> Result<Launched, Failure> {
        const NAME: &str = "SOCK_CONTROL_FD";
        let specified = self.spec.process().as_ref();
        let mut process = specified
            .cloned()
            .ok_or_else(|| Failure::invalid("process is missing"))?;
        let mut env = process.env().clone().unwrap_or_default();
        env.retain(|one| one.split('=').next() != Some(NAME));
        env.push(format!("{NAME}=3"));
        process.set_env(Some(env)).set_terminal(Some(false));
        let linux = self.spec.linux().as_ref();
        Ok(sock_sandbox::exec(ExecPlan {
            target: self.running()?,
            process: &process,
            linux,
            seccomp: linux.and_then(|l| l.seccomp().as_ref()),
            stdio: Stdio {
                stdin: None,
                stdout: Some(stdout.try_clone_to_owned()?),
                stderr: Some(stderr.try_clone_to_owned()?),
            },
            extra: vec![(3, control)],
        })?)
    }

    /// At the end of its first process: whether the kernel has killed in it for want of memory.
    pub async fn ran_out_of_memory(&self, exit: Exit) -> bool {
        let Some(oom) = self.oom.take() else {
            return false;
        };
        let killed_by_nobody_here = exit.status == 128 + SIGKILL && !self.init.was_told_to_die();
        // A leaf that was killed is no end of its Function's container.
        if matches!(self.role, Role::Function(_)) && !killed_by_nobody_here {
            return false;
        }
        let end = Instant::now() + OOM_TOLD_WITHIN;
        let ask = || match killed_by_nobody_here {
            true => oom.killed(),
            false => Some(oom.counted().unwrap_or(false)),
        };
        let mut killed = ask();
        while killed.is_none() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(1)).await;
            killed = ask();
        }
        self.out_of_memory.set(killed.unwrap_or(false));
        self.out_of_memory.get()
    }

    /// What the role does after the end of the first process, before anybody is told.
    pub fn finish_role(&self) {
        self.role.finish();
    }
}
