//! The pod that this shim serves.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::asynchronous::ExitSignal;
use containerd_shim::protos::events::task::{TaskExit, TaskOOM};
use sock_sandbox::cgroup::Hierarchies;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::container::Container;
use crate::events::Events;
use crate::process::{Exit, Process};
use crate::role::Role;
use crate::task::{Failure, timestamp};

/// What is known of the machine's cgroup hierarchies, until the next boot.
pub const HIERARCHIES: &str = "/run/sock/hierarchies";

/// All that the shim knows.
pub struct Pod {
    /// Its containers by ID.
    pub containers: RefCell<HashMap<String, Rc<Container>>>,
    /// To containerd.
    pub events: Events,
    /// How many containers are being made.
    pub creating: Cell<usize>,
    /// Told when a container has gone.
    pub gone: Notify,
    hierarchies: OnceCell<Hierarchies>,
    exit: Arc<ExitSignal>,
}

impl Pod {
    /// An empty one.
    #[must_use]
    pub fn new(events: Events, exit: Arc<ExitSignal>) -> Self {
        Self {
            containers: RefCell::default(),
            events,
            creating: Cell::default(),
            gone: Notify::new(),
            hierarchies: OnceCell::new(),
            exit,
        }
    }

    /// The machine's cgroup hierarchies.
    ///
    /// # Errors
    /// There are none.
    pub fn hierarchies(&self) -> Result<&Hierarchies, Failure> {
        if let Some(found) = self.hierarchies.get() {
            return Ok(found);
        }
        let found = Hierarchies::known(Path::new(HIERARCHIES))?;
        Ok(self.hierarchies.get_or_init(|| found))
    }

    /// A container by ID.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Rc<Container>, Failure> {
        self.containers
            .borrow()
            .get(id)
            .cloned()
            .ok_or_else(|| Failure::not_found(format!("container {id} is not here")))
    }

    /// A process by container and exec ID (empty: the first).
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, id: &str, exec_id: &str) -> Result<Rc<Process>, Failure> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        let found = container.execs.borrow().get(exec_id).cloned();
        found.ok_or_else(|| {
            Failure::not_found(format!("process {exec_id} of container {id} is not here"))
        })
    }

    /// Follows a process that was started to its end.
    pub fn watch(self: &Rc<Self>, container: Rc<Container>, process: Rc<Process>) {
        let pod = self.clone();
        tokio::task::spawn_local(async move {
            let exit = process.reap().await;
            let exit = match process.exec_id.is_empty() {
                true => pod.end_of_container(&container, exit).await,
                false => exit,
            };
            pod.announce(&container, &process, exit);
        });
    }

    /// After the first process: the others, whose ends are to be known before its own. Yields how the container has ended.
    async fn end_of_container(&self, container: &Container, mut exit: Exit) -> Exit {
        if let Role::Function(function) = &container.role {
            function.stop(Duration::ZERO).await;
        }
        if container.ran_out_of_memory(exit).await {
            self.events.publish(TaskOOM {
                container_id: container.id.clone(),
                ..TaskOOM::default()
            });
        }
        if !container.own_processes()
            && !matches!(container.role, Role::Sandbox)
            && let Some(cgroup) = container.cgroup.borrow().as_ref()
            && let Err(e) = cgroup.kill()
        {
            tracing::warn!(container = container.id, error = %e, "processes may be left");
        }
        let execs: Vec<Rc<Process>> = container
            .execs
            .borrow()
            .values()
            .filter(|p| p.pid() != 0)
            .cloned()
            .collect();
        for exec in execs {
            let _ = tokio::time::timeout(Duration::from_secs(2), exec.wait()).await;
        }
        if let Role::Installer(installer) = &container.role
            && installer.settle(exit.status).await.is_err()
        {
            exit.status = 1;
        }
        container.finish_role();
        exit
    }

    fn announce(&self, container: &Container, process: &Process, exit: Exit) {
        let mut event = TaskExit::new();
        event.set_container_id(container.id.clone());
        event.set_id(if process.exec_id.is_empty() {
            container.id.clone()
        } else {
            process.exec_id.clone()
        });
        event.set_pid(process.pid().unsigned_abs());
        event.set_exit_status(exit.status);
        event.set_exited_at(timestamp(exit.at));
        self.events.publish(event);
        process.finish(exit);
    }

    /// Ends the shim if nothing is left to serve.
    pub async fn shutdown(&self) {
        if !self.containers.borrow().is_empty() {
            return;
        }
        self.events.flush(Duration::from_secs(3)).await;
        self.exit.signal();
    }

    /// Ends the shim when it serves nothing and the bundle that it was started in is removed: containerd has forgotten it. So it
    /// does when it cannot note where the server is, as on a full disk (`shimBinary.Start`, core/runtime/v2/binary.go), and when
    /// it was restarted before it asked for a container.
    pub async fn until_abandoned(self: Rc<Self>) {
        const LOOK: Duration = Duration::from_secs(1);
        loop {
            if !self.containers.borrow().is_empty() {
                self.gone.notified().await;
            }
            // The server's working directory.
            let serves = self.creating.get() > 0 || !self.containers.borrow().is_empty();
            if !serves && !Path::new("config.json").exists() {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        tracing::warn!("containerd has given this shim up without telling it");
        self.shutdown().await;
    }

    /// Reaps processes whose parents ended and which the kernel gave to this one, the nearest subreaper.
    pub fn reap_orphans(self: Rc<Self>) {
        let Ok(mut ended) = signal(SignalKind::child()) else {
            return;
        };
        tokio::task::spawn_local(async move {
            while ended.recv().await.is_some() {
                let known: HashSet<i32> = {
                    let containers = self.containers.borrow();
                    containers
                        .values()
                        .flat_map(|c| {
                            c.execs
                                .borrow()
                                .values()
                                .map(|e| e.pid())
                                .chain([c.init.pid()])
                                .collect::<Vec<_>>()
                        })
                        .collect()
                };
                let Ok(children) = std::fs::read_to_string("/proc/thread-self/children") else {
                    continue;
                };
                for pid in children
                    .split_whitespace()
                    .filter_map(|p| p.parse::<i32>().ok())
                {
                    let orphan = !known.contains(&pid) && crate::children::has_ended(pid);
                    if orphan && !crate::children::expected(pid) {
                        // SAFETY: reaps one child; its status interests nobody.
                        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
                    }
                }
            }
        });
    }
}
