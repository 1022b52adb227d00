//! The zygote itself: a child of the shim, or a zygote's child that has come into the container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::holder::signal;
use crate::activation::{End, Shortage};
use crate::children::Claim;
use crate::container::Container;
use crate::process::Process;
use crate::stdio::Paths;
use crate::task::Failure;

/// A zygote in its container, whose first process is a holder.
pub struct ZygoteProcess {
    /// Its number.
    pub pid: i32,
    kind: Kind,
}

enum Kind {
    Child(Rc<Process>),
    /// Forked from another zygote, so no child of the shim.
    Stranger(AsyncFd<OwnedFd>),
}

impl ZygoteProcess {
    /// Runs the container's own command, with `control` as descriptor 3.
    ///
    /// # Errors
    /// It cannot be executed, in the child's words.
    pub async fn run(
        container: &Container,
        control: OwnedFd,
        (stdout, stderr): (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<ZygoteProcess, Failure> {
        let entrances = container.own_cgroup()?.entrances()?;
        let launched = container.launch_command(control, stdout, stderr)?;
        let claim = Claim::new(launched.pid);
        let process = Rc::new(Process::new(String::new(), Paths::default()));
        let pid = launched.pid;
        process.adopt(launched)?;
        let started = async {
            process.create(entrances, async { Ok(()) }).await?;
            process.start().await
        };
        let started = started.await;
        if started.is_err() {
            // It may wait for a word of ours.
            let _ = process.signal(libc::SIGKILL);
        }
        let reaped = Rc::clone(&process);
        tokio::task::spawn_local(async move {
            let exit = reaped.reap().await;
            reaped.finish(exit);
            drop(claim);
        });
        started?;
        Ok(ZygoteProcess {
            pid,
            kind: Kind::Child(process),
        })
    }

    /// That of a zygote that has come from another.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn stranger(pid: i32, pidfd: OwnedFd) -> std::io::Result<ZygoteProcess> {
        let pidfd = crate::async_fd::watch(pidfd, Interest::READABLE)?;
        Ok(ZygoteProcess {
            pid,
            kind: Kind::Stranger(pidfd),
        })
    }

    /// Waits until it has.
    pub async fn ended(&self) {
        match &self.kind {
            Kind::Child(process) => {
                process.wait().await;
            }
            // That it cannot be watched any more is an end too.
            Kind::Stranger(pidfd) => drop(pidfd.readable().await),
        }
    }

    /// How, once it has.
    #[must_use]
    pub fn end(&self, container: &Container) -> End {
        let shortage = shortage(container);
        match &self.kind {
            Kind::Child(process) => match process.exited() {
                Some(exit) => End::of_status(exit.status, shortage),
                None => End::Unknown,
            },
            Kind::Stranger(pidfd) => End::of(Some(pidfd.get_ref()), shortage),
        }
    }

    /// Ends it.
    pub fn kill(&self) {
        match &self.kind {
            // Gone is as good.
            Kind::Child(process) => drop(process.signal(libc::SIGKILL)),
            Kind::Stranger(pidfd) => signal(pidfd.as_fd(), libc::SIGKILL),
        }
    }
}

fn shortage(container: &Container) -> Option<Shortage> {
    let cgroup = container.cgroup.borrow().clone();
    cgroup
        .filter(|cgroup| container.out_of_memory.get() || cgroup.oom_kills() > 0)
        .map(|cgroup| Shortage::in_cgroup(&cgroup))
}
