//! `Start`: of a container's first process or of an exec.

use std::rc::Rc;

use containerd_shim::api::{StartRequest, StartResponse};
use containerd_shim::protos::events::task::{TaskExecStarted, TaskStart};

use super::Failure;
use super::create::after_start;
use crate::children::Claim;
use crate::container::Container;
use crate::pod::Pod;
use crate::process::Process;
use crate::role::Role;
use sock_sandbox::Timeline;

pub(super) async fn start(pod: Rc<Pod>, request: StartRequest) -> Result<StartResponse, Failure> {
    let container = pod.container(&request.id)?;
    let process = pod.process(&request.id, &request.exec_id)?;
    if request.exec_id.is_empty() {
        first(&pod, container, &process).await?;
    } else {
        further(&pod, container, &process).await?;
    }
    let mut response = StartResponse::new();
    response.set_pid(process.pid().unsigned_abs());
    Ok(response)
}

async fn first(
    pod: &Rc<Pod>,
    container: Rc<Container>,
    process: &Rc<Process>,
) -> Result<(), Failure> {
    let timeline = Timeline::default();
    if let Err(e) = process.start().await {
        bury(process).await;
        return Err(e);
    }
    timeline.passed("the program runs");
    let ready = get_ready(&container, process).await;
    if let Err(e) = ready {
        if process.exited().is_none() {
            bury(process).await;
        }
        if let Some(cgroup) = container.cgroup.borrow().as_ref()
            && let Err(e) = cgroup.kill()
        {
            tracing::warn!(container = container.id, error = %e, "processes may be left");
        }
        container.finish_role();
        return Err(e);
    }
    let mut event = TaskStart::new();
    event.set_container_id(container.id.clone());
    event.set_pid(process.pid().unsigned_abs());
    pod.events.publish(event);
    after_start(&container).await;
    timeline.passed("ready");
    tracing::debug!(
        container = container.id,
        steps = ?timeline.steps(),
        "started (microseconds)"
    );
    // Only now: its end must not be told before its start.
    pod.watch(container, process.clone());
    Ok(())
}

/// What is left to do of a start when the first process runs: until then nobody is told of it. A process that ends
/// meanwhile, because it was killed or by itself, ends the start too.
async fn get_ready(container: &Rc<Container>, process: &Rc<Process>) -> Result<(), Failure> {
    let prepare = async {
        match &container.role {
            Role::Zygote(zygote) => zygote.warm_up(container, process).await,
            Role::Function(function) => function.activate(container).await,
            Role::Sandbox | Role::Plain | Role::Installer(_) => Ok(()),
        }
    };
    if matches!(
        container.role,
        Role::Sandbox | Role::Plain | Role::Installer(_)
    ) {
        return prepare.await;
    }
    let ended = tokio::task::spawn_local({
        let (container, process) = (container.clone(), process.clone());
        async move {
            let exit = process.reap().await;
            container.ran_out_of_memory(exit).await;
            process.finish(exit);
        }
    });
    let ready = tokio::select! {
        biased;
        ready = prepare => ready,
        exit = process.wait() => Err(Failure::unknown(format!("ended with status {} before it was ready", exit.status))),
    };
    ended.abort();
    ready
}

async fn further(
    pod: &Rc<Pod>,
    container: Rc<Container>,
    process: &Rc<Process>,
) -> Result<(), Failure> {
    if let Err(e) = super::exec::launch(&container, process).await {
        if process.pid() != 0 {
            bury(process).await;
        }
        return Err(e);
    }
    let mut event = TaskExecStarted::new();
    event.set_container_id(container.id.clone());
    event.set_exec_id(process.exec_id.clone());
    event.set_pid(process.pid().unsigned_abs());
    pod.events.publish(event);
    pod.watch(container, process.clone());
    Ok(())
}

/// A child that ended on its way: containerd deletes what never ran.
async fn bury(process: &Process) {
    let _claim = Claim::new(process.pid());
    // It may still wait for a word of ours.
    let _ = process.signal(libc::SIGKILL);
    let exit = process.reap().await;
    process.finish(exit);
}
