//! `Kill`, `Pause`, `Resume`.

use std::rc::Rc;

use containerd_shim::api::{Empty, KillRequest, PauseRequest, ResumeRequest};
use containerd_shim::protos::events::task::{TaskPaused, TaskResumed};

use super::Failure;
use crate::container::Container;
use crate::pod::Pod;
use crate::process::Phase;
use crate::role::Role;

pub(super) async fn kill(pod: Rc<Pod>, request: KillRequest) -> Result<Empty, Failure> {
    let container = pod.container(&request.id)?;
    let process = pod.process(&request.id, &request.exec_id)?;
    let signal = i32::try_from(request.signal)
        .ok()
        .filter(|s| (0..=64).contains(s))
        .ok_or_else(|| Failure::invalid(format!("signal {} does not exist", request.signal)))?;
    if request.all && request.exec_id.is_empty() {
        let processes = container
            .cgroup
            .borrow()
            .as_ref()
            .map(sock_sandbox::cgroup::Cgroup::processes)
            .transpose()?
            .unwrap_or_default();
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        for pid in processes.into_iter().filter(|p| *p != own) {
            // SAFETY: sends a signal; the number was read from the container's cgroup just now.
            unsafe { libc::kill(pid, signal) };
        }
        return Ok(Empty::new());
    }
    if process.phase() == Phase::Added {
        return Err(Failure::precondition(format!(
            "process {} was not started",
            request.exec_id
        )));
    }
    if request.exec_id.is_empty()
        && process.exited().is_none()
        && matches!(container.role, Role::Function(_))
    {
        return stop_function(container, signal);
    }
    let waits_for_start = process.phase() == Phase::Created;
    process.signal(signal)?;
    if waits_for_start && signal == libc::SIGKILL {
        // Nobody follows it yet; who waits for its end is to learn of it.
        pod.watch(container, process);
    }
    Ok(Empty::new())
}

/// How long a Function's pod goes on accepting after it was asked to end. kube-proxy writes its rules once a second, after the
/// endpoints have come to it by two controllers; the grace period of a Function's pod is its timeout and five seconds more.
const ENDPOINTS_LINGER: std::time::Duration = std::time::Duration::from_secs(4);

/// The holder of a Function's container ends with the last request: a polite signal closes the door and lets those inside finish.
/// kubelet sends SIGKILL when the grace period is over.
fn stop_function(container: Rc<Container>, signal: i32) -> Result<Empty, Failure> {
    if signal == libc::SIGKILL {
        container.init.signal(libc::SIGKILL)?;
    } else if matches!(signal, libc::SIGTERM | libc::SIGINT | libc::SIGQUIT) {
        tokio::task::spawn_local(async move {
            if let Role::Function(function) = &container.role {
                // The pod leaves the endpoints of its Service at the same time as it is told to end, and every node learns of
                // it a moment later: until then connections still come. Clients that keep theirs hear of it at once.
                function.drain();
                tokio::time::sleep(ENDPOINTS_LINGER).await;
                function.stop(function.timeout()).await;
            }
            // It may have ended by itself meanwhile.
            let _ = container.init.signal(libc::SIGTERM);
        });
    }
    Ok(Empty::new())
}

pub(super) async fn pause(pod: Rc<Pod>, request: PauseRequest) -> Result<Empty, Failure> {
    let container = pod.container(&request.id)?;
    if let Some(cgroup) = container.cgroup.borrow().as_ref() {
        cgroup.freeze()?;
    }
    container.paused.set(true);
    pod.events.publish(TaskPaused {
        container_id: request.id,
        ..TaskPaused::default()
    });
    Ok(Empty::new())
}

pub(super) async fn resume(pod: Rc<Pod>, request: ResumeRequest) -> Result<Empty, Failure> {
    let container = pod.container(&request.id)?;
    if let Some(cgroup) = container.cgroup.borrow().as_ref() {
        cgroup.thaw()?;
    }
    container.paused.set(false);
    pod.events.publish(TaskResumed {
        container_id: request.id,
        ..TaskResumed::default()
    });
    Ok(Empty::new())
}
