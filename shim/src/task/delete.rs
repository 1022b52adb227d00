//! `Delete` of what has ended, and `Shutdown`.

use std::rc::Rc;
use std::time::Duration;

use containerd_shim::api::{DeleteRequest, DeleteResponse, Empty, ShutdownRequest};
use containerd_shim::protos::events::task::TaskDelete;
use sock_sandbox::cgroup::Cgroup;

use super::create::after_stop;
use super::{Failure, timestamp};
use crate::children::Claim;
use crate::container::Container;
use crate::pod::Pod;
use crate::process::{Exit, Phase, Process};
use crate::role::Role;

pub(super) async fn delete(
    pod: Rc<Pod>,
    request: DeleteRequest,
) -> Result<DeleteResponse, Failure> {
    let container = pod.container(&request.id)?;
    let process = pod.process(&request.id, &request.exec_id)?;
    let exit = match process.phase() {
        Phase::Stopped => process.wait().await,
        // Announced and never started.
        Phase::Added => Exit {
            status: 0,
            at: std::time::SystemTime::now(),
        },
        Phase::Created => {
            let exit = end_created(&process).await;
            if request.exec_id.is_empty() {
                container.finish_role();
            }
            exit
        }
        Phase::Running => {
            return Err(Failure::precondition(format!(
                "container {} runs: kill it first",
                request.id
            )));
        }
    };
    if request.exec_id.is_empty() {
        clean(&container).await;
        after_stop(&container).await;
        pod.containers.borrow_mut().remove(&request.id);
        pod.gone.notify_one();
        let mut event = TaskDelete::new();
        event.set_container_id(request.id);
        event.set_pid(process.pid().unsigned_abs());
        event.set_exit_status(exit.status);
        event.set_exited_at(timestamp(exit.at));
        pod.events.publish(event);
    } else {
        container.execs.borrow_mut().remove(&request.exec_id);
    }
    let mut response = DeleteResponse::new();
    response.set_pid(process.pid().unsigned_abs());
    response.set_exit_status(exit.status);
    response.set_exited_at(timestamp(exit.at));
    Ok(response)
}

async fn end_created(process: &Process) -> Exit {
    let _claim = Claim::new(process.pid());
    let _ = process.signal(libc::SIGKILL);
    let exit = process.reap().await;
    process.finish(exit);
    exit
}

async fn clean(container: &Container) {
    let cgroup = container.cgroup.borrow_mut().take();
    if let Some(cgroup) = cgroup {
        if matches!(container.role, Role::Sandbox) {
            crate::home::leave();
        }
        remove_cgroup(&cgroup).await;
    }
    if let Some(used) = &container.used {
        used.end();
    }
}

/// Ends what is left in a cgroup and removes it. A process that was killed is gone a moment later, so this waits.
pub(super) async fn remove_cgroup(cgroup: &Cgroup) {
    let mut pause = Duration::from_millis(1);
    for _ in 0..12 {
        if !cgroup.processes().is_ok_and(|p| p.is_empty())
            && let Err(e) = cgroup.kill()
        {
            tracing::warn!(error = %e, "processes may be left");
        }
        match cgroup.remove() {
            Ok(()) => return,
            Err(e) if e.errno() == Some(libc::EBUSY) => {}
            Err(e) => return tracing::warn!(error = %e, "cgroup is left"),
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    tracing::warn!("cgroup is left: it stays busy");
}

pub(super) async fn shutdown(pod: Rc<Pod>, _: ShutdownRequest) -> Result<Empty, Failure> {
    // Answered first: containerd waits for the answer, and then for the connection's end.
    tokio::task::spawn_local(async move {
        tokio::time::sleep(Duration::from_millis(5)).await;
        pod.shutdown().await;
    });
    Ok(Empty::new())
}
