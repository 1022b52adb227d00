//! `Exec` and what concerns its streams.

use std::rc::Rc;

use containerd_shim::api::{CloseIORequest, Empty, ExecProcessRequest, ResizePtyRequest};
use containerd_shim::protos::events::task::TaskExecAdded;
use oci_spec::runtime::Process as ProcessSpec;
use sock_sandbox::ExecPlan;

use super::Failure;
use crate::children::Claim;
use crate::container::Container;
use crate::pod::Pod;
use crate::process::{Phase, Process};
use crate::stdio::{self, Paths};

pub(super) async fn exec(pod: Rc<Pod>, request: ExecProcessRequest) -> Result<Empty, Failure> {
    let container = pod.container(&request.id)?;
    if container.execs.borrow().contains_key(&request.exec_id) {
        return Err(Failure::exists(format!(
            "process {} is there already",
            request.exec_id
        )));
    }
    // Parsed now, so that a wrong one is told at the call that brought it.
    let spec: ProcessSpec = serde_json::from_slice(&request.spec.value)
        .map_err(|e| Failure::invalid(format!("process of exec {}: {e}", request.exec_id)))?;
    let paths = Paths {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let process = Process::new(request.exec_id.clone(), paths);
    *process.spec.borrow_mut() = Some(spec);
    container
        .execs
        .borrow_mut()
        .insert(request.exec_id.clone(), Rc::new(process));
    let mut event = TaskExecAdded::new();
    event.set_container_id(request.id);
    event.set_exec_id(request.exec_id);
    pod.events.publish(event);
    Ok(Empty::new())
}

pub(super) async fn launch(container: &Container, process: &Process) -> Result<(), Failure> {
    // Before anything is looked at that may change meanwhile.
    let readers = stdio::readers(&process.paths).await;
    if process.phase() != Phase::Added {
        return Err(Failure::precondition(format!(
            "exec {} was started before",
            process.exec_id
        )));
    }
    let is_known = |known: &Rc<Process>| std::ptr::eq(&raw const **known, process);
    if !container
        .execs
        .borrow()
        .get(&process.exec_id)
        .is_some_and(is_known)
    {
        return Err(Failure::precondition(format!(
            "exec {} was deleted before it was started",
            process.exec_id
        )));
    }
    container.running()?;
    let mut spec = process
        .spec
        .borrow()
        .clone()
        .ok_or_else(|| Failure::invalid("exec without a process"))?;
    if !container.devices_guarded {
        crate::devices::forbid_making(&mut spec);
    }
    let uid = stdio::owner(&container.spec, &spec)?;
    let (streams, kept) = stdio::open(&process.paths, uid)?;
    *process.kept.borrow_mut() = kept;
    let entrances = container
        .cgroup
        .borrow()
        .as_ref()
        .map(sock_sandbox::cgroup::Cgroup::entrances)
        .transpose()?
        .unwrap_or_default();
    let seccomp = container
        .spec
        .linux()
        .as_ref()
        .and_then(|l| l.seccomp().as_ref());
    let launched = sock_sandbox::exec(ExecPlan {
        target: container.init.pid(),
        process: &spec,
        linux: container.spec.linux().as_ref(),
        seccomp,
        stdio: streams,
        extra: Vec::new(),
    })?;
    let launched = process.adopt(launched)?;
    let _claim = Claim::new(launched.pid);
    drop(launched);
    process
        .create(entrances, std::future::ready(Ok(())))
        .await?;
    // A terminal's own end of the output is there since then.
    drop(readers);
    process.start().await
}

pub(super) async fn resize(pod: Rc<Pod>, request: ResizePtyRequest) -> Result<Empty, Failure> {
    let size = |n: u32| {
        u16::try_from(n).map_err(|_| Failure::invalid(format!("a terminal of {n} characters")))
    };
    pod.process(&request.id, &request.exec_id)?
        .resize(size(request.height)?, size(request.width)?)?;
    Ok(Empty::new())
}

pub(super) async fn close_io(pod: Rc<Pod>, request: CloseIORequest) -> Result<Empty, Failure> {
    let process = pod.process(&request.id, &request.exec_id)?;
    if request.stdin {
        process.kept.borrow_mut().close_stdin();
    }
    Ok(Empty::new())
}
