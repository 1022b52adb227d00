//! Verbs that ask, and `Update`.

use std::rc::Rc;

use containerd_shim::api::{
    CheckpointTaskRequest, ConnectRequest, ConnectResponse, Empty, PidsRequest, PidsResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim::protos::types::task::ProcessInfo;

use super::{Failure, timestamp};
use crate::pod::Pod;
use crate::process::Phase;
use crate::statistics;

pub(super) async fn state(pod: Rc<Pod>, request: StateRequest) -> Result<StateResponse, Failure> {
    let container = pod.container(&request.id)?;
    let process = pod.process(&request.id, &request.exec_id)?;
    let mut response = StateResponse::new();
    response.set_id(container.id.clone());
    response.set_bundle(container.bundle.to_string_lossy().into_owned());
    response.set_pid(process.pid().unsigned_abs());
    response.set_status(match process.phase() {
        Phase::Added | Phase::Created => Status::CREATED,
        Phase::Running if container.paused.get() => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped => Status::STOPPED,
    });
    response.set_stdin(process.paths.stdin.clone());
    response.set_stdout(process.paths.stdout.clone());
    response.set_stderr(process.paths.stderr.clone());
    response.set_terminal(process.paths.terminal);
    response.set_exec_id(process.exec_id.clone());
    if let Some(exit) = process.exited() {
        response.set_exit_status(exit.status);
        response.set_exited_at(timestamp(exit.at));
    }
    Ok(response)
}

pub(super) async fn pids(pod: Rc<Pod>, request: PidsRequest) -> Result<PidsResponse, Failure> {
    let container = pod.container(&request.id)?;
    let processes = container
        .cgroup
        .borrow()
        .as_ref()
        .map(sock_sandbox::cgroup::Cgroup::processes)
        .transpose()?
        .unwrap_or_default();
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut response = PidsResponse::new();
    response.set_processes(
        processes
            .into_iter()
            .filter(|p| *p != own)
            .map(|p| {
                let mut info = ProcessInfo::new();
                info.set_pid(p.unsigned_abs());
                info
            })
            .collect(),
    );
    Ok(response)
}

pub(super) async fn checkpoint(_: Rc<Pod>, _: CheckpointTaskRequest) -> Result<Empty, Failure> {
    Err(Failure::unimplemented("checkpoints are not supported"))
}

pub(super) async fn update(pod: Rc<Pod>, request: UpdateTaskRequest) -> Result<Empty, Failure> {
    let container = pod.container(&request.id)?;
    let resources: oci_spec::runtime::LinuxResources =
        serde_json::from_slice(&request.resources.value)
            .map_err(|e| Failure::invalid(format!("resources: {e}")))?;
    if let Some(cgroup) = container.cgroup.borrow().as_ref() {
        cgroup.update(&resources)?;
    }
    Ok(Empty::new())
}

pub(super) async fn wait(pod: Rc<Pod>, request: WaitRequest) -> Result<WaitResponse, Failure> {
    let process = pod.process(&request.id, &request.exec_id)?;
    let exit = process.wait().await;
    let mut response = WaitResponse::new();
    response.set_exit_status(exit.status);
    response.set_exited_at(timestamp(exit.at));
    Ok(response)
}

pub(super) async fn stats(pod: Rc<Pod>, request: StatsRequest) -> Result<StatsResponse, Failure> {
    let container = pod.container(&request.id)?;
    let process = &container.init;
    if process.pid() == 0 || process.exited().is_some() {
        return Err(Failure::not_found(format!(
            "container {} is not running",
            request.id
        )));
    }
    let ended = || Failure::not_found(format!("container {} has ended", request.id));
    let cgroup = container.cgroup.borrow().clone().ok_or_else(ended)?;
    let statistics = statistics::of(&cgroup).map_err(|error| {
        Failure::unknown(format!("statistics of container {}: {error}", request.id))
    })?;
    // All files of one that systemd has removed meanwhile count as zeros.
    if cgroup.is_removed() {
        return Err(ended());
    }
    let mut response = StatsResponse::new();
    response.set_stats(statistics);
    Ok(response)
}

pub(super) async fn connect(
    pod: Rc<Pod>,
    request: ConnectRequest,
) -> Result<ConnectResponse, Failure> {
    // A containerd that comes back asks so whether the shim lives, with a container that it may not have asked for yet.
    let pid = pod
        .container(&request.id)
        .map_or(0, |container| container.init.pid());
    let mut response = ConnectResponse::new();
    response.set_shim_pid(std::process::id());
    response.set_task_pid(pid.unsigned_abs());
    response.set_version(env!("CARGO_PKG_VERSION").to_string());
    Ok(response)
}
