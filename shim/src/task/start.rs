//! `Start`: of a container's first process or of an exec.

use std::rc::Rc;

use containerd_shim::api::{StartRequest, StartResponse};
use containerd_shim::protos::events::task::{TaskExecStarted, TaskStart};

use super::Failure;
use crate::pod::Pod;

pub(super) async fn start(pod: Rc<Pod>, request: StartRequest) -> Result<StartResponse, Failure> {
    let container = pod.container(&request.id)?;
    let process = pod.process(&request.id, &request.exec_id)?;
    let result = if request.exec_id.is_empty() { process.start().await } else { super::exec::launch(&pod, &container, &process).await };
    if let Err(e) = result {
        if process.pid() != 0 {
            // The child has ended; containerd deletes what never ran.
            let _claim = crate::children::Claim::new(process.pid());
            let exit = process.reap().await;
            process.finish(exit);
        }
        return Err(e);
    }
    let pid = process.pid().unsigned_abs();
    if request.exec_id.is_empty() {
        let mut event = TaskStart::new();
        event.set_container_id(request.id);
        event.set_pid(pid);
        pod.events.publish(event);
    } else {
        let mut event = TaskExecStarted::new();
        event.set_container_id(request.id);
        event.set_exec_id(request.exec_id);
        event.set_pid(pid);
        pod.events.publish(event);
    }
    // Only now: its end must not be told before its start.
    pod.watch(container, process);
    let mut response = StartResponse::new();
    response.set_pid(pid);
    Ok(response)
}
