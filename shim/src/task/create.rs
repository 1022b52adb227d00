//! `Create`: everything of a container but its program.

use std::path::Path;
use std::rc::Rc;

use containerd_shim::api::{CreateTaskRequest, CreateTaskResponse};
use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use sock_sandbox::cgroup::{Cgroup, Location, OomWatch};
use sock_sandbox::hook::{self, Identity, Kind};
use sock_sandbox::root::{Root, RootMount};
use sock_sandbox::{HolderKind, Plan, Program, Timed, Timeline, namespace};

use super::Failure;
use crate::children::Claim;
use crate::container::Container;
use crate::crash::{self, Trace};
use crate::devices::{all_allowed, are_guarded, forbid_making};
use crate::pod::Pod;
use crate::process::{self, Process};
use crate::role::Role;
use crate::service::{SANDBOX_ID, load_spec};
use crate::stdio::{self, Paths};

pub(super) async fn create(
    pod: Rc<Pod>,
    request: CreateTaskRequest,
) -> Result<CreateTaskResponse, Failure> {
    pod.creating.update(|count| count + 1);
    let outcome = make(&pod, request).await;
    pod.creating.update(|count| count - 1);
    outcome
}

async fn make(pod: &Rc<Pod>, request: CreateTaskRequest) -> Result<CreateTaskResponse, Failure> {
    let timeline = Timeline::default();
    if pod.containers.borrow().contains_key(&request.id) {
        return Err(Failure::exists(format!(
            "container {} is there already",
            request.id
        )));
    }
    if !request.checkpoint.is_empty() {
        return Err(Failure::unimplemented(
            "restoring a checkpoint is not supported",
        ));
    }
    let bundle = Path::new(&request.bundle).to_path_buf();
    let mut spec = load_spec(&bundle).map_err(|e| Failure::invalid(e.to_string()))?;
    trace(&bundle, &request.id, &spec)?;
    let (role, used) = Role::of(&request.id, &mut spec)?;
    let devices_guarded = all_allowed(&spec) || are_guarded(pod.hierarchies()?.unified(), &spec);
    if !devices_guarded && let Some(process) = spec.process_mut() {
        forbid_making(process);
    }
    let prepared = match &role {
        Role::Zygote(zygote) => zygote.isolate(&mut spec, &request.id).await,
        Role::Installer(installer) => installer.stage(&mut spec, used.as_ref()).await,
        Role::Sandbox | Role::Plain | Role::Function(_) => Ok(()),
    };
    if let Err(e) = prepared {
        role.finish();
        if let Some(used) = &used {
            used.end();
        }
        return Err(e);
    }
    let sandbox = spec
        .annotations()
        .as_ref()
        .and_then(|a| a.get(SANDBOX_ID).cloned())
        .unwrap_or_else(|| request.id.clone());
    let paths = Paths {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let init = Rc::new(Process::new(String::new(), paths.clone()));
    let container = Rc::new(Container {
        id: request.id.clone(),
        bundle: bundle.clone(),
        init: init.clone(),
        execs: std::cell::RefCell::default(),
        cgroup: std::cell::RefCell::default(),
        oom: std::cell::RefCell::default(),
        out_of_memory: std::cell::Cell::default(),
        paused: std::cell::Cell::new(false),
        devices_guarded,
        used,
        role,
        spec,
        sandbox,
    });
    if matches!(container.role, Role::Sandbox)
        && let Some(path) = network(&container.spec)
    {
        // From here on every socket that the shim opens is the pod's.
        namespace::join(namespace::open(&path)?, LinuxNamespaceType::Network)?;
    }
    timeline.passed("specification");
    let result = build(pod, &container, &request, &paths, &timeline).await;
    let child = match result {
        Ok(steps) => steps,
        Err(e) => {
            abandon(&container).await;
            return Err(e);
        }
    };
    pod.containers
        .borrow_mut()
        .insert(request.id.clone(), container.clone());
    let mut io = TaskIO::new();
    (io.stdin, io.stdout, io.stderr, io.terminal) =
        (paths.stdin, paths.stdout, paths.stderr, paths.terminal);
    let mut event = TaskCreate::new();
    event.set_container_id(request.id.clone());
    event.set_bundle(request.bundle);
    event.set_rootfs(request.rootfs);
    event.set_io(io);
    event.set_pid(init.pid().unsigned_abs());
    pod.events.publish(event);
    timeline.passed("bookkeeping");
    tracing::debug!(
        container = request.id,
        steps = ?timeline.steps(),
        ?child,
        "created (microseconds)"
    );
    let mut response = CreateTaskResponse::new();
    response.set_pid(init.pid().unsigned_abs());
    Ok(response)
}

async fn build(
    pod: &Pod,
    container: &Container,
    request: &CreateTaskRequest,
    paths: &Paths,
    timeline: &Timeline,
) -> Result<Vec<Timed>, Failure> {
    let spec = &container.spec;
    let uid = match spec.process() {
        Some(process) => stdio::owner(spec, process)?,
        None => 0,
    };
    let readers = stdio::readers(paths).await;
    let (mut streams, kept) = stdio::open(paths, uid)?;
    *container.init.kept.borrow_mut() = kept;
    let program = match &container.role {
        Role::Function(function) => {
            function.keep_output(std::mem::take(&mut streams))?;
            Program::Holder(HolderKind::Pod)
        }
        Role::Zygote(zygote) => {
            zygote.keep_output(std::mem::take(&mut streams))?;
            Program::Holder(HolderKind::Pod)
        }
        Role::Sandbox => Program::Holder(HolderKind::Pod),
        Role::Installer(installer) => {
            installer.keep_log(streams.stderr.as_ref())?;
            Program::Specified
        }
        Role::Plain => Program::Specified,
    };
    let hierarchies = pod.hierarchies()?;
    let location = spec
        .linux()
        .as_ref()
        .and_then(|l| l.cgroups_path().as_ref())
        .map(|p| Location::parse(&p.to_string_lossy()))
        .transpose()?
        .unwrap_or_else(|| Location::Path(Path::new("sock").join(&container.id)));
    let future = Cgroup::at(hierarchies, &location);
    timeline.passed("streams");
    let launched = sock_sandbox::launch(Plan {
        spec,
        root: if matches!(container.role, Role::Sandbox) {
            Root::Empty
        } else {
            root(container, request)
        },
        program,
        stdio: streams,
        extra: Vec::new(),
        mapping: None,
        outer: None,
        nodev_root: !container.devices_guarded,
        identity: Some(identity(container)),
        cgroups: future.version_1_directories(),
    })?;
    let launched = container.init.adopt(launched)?;
    let _claim = Claim::new(launched.pid);
    timeline.passed("clone");
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let (cgroup, entrances) =
        Cgroup::create(hierarchies, &location, launched.pid, resources).await?;
    if matches!(container.role, Role::Sandbox) {
        crate::home::enter(hierarchies, &cgroup);
    }
    let cgroup_guards = all_allowed(spec) || cgroup.guards_devices();
    match OomWatch::new(&cgroup) {
        Ok(watch) => *container.oom.borrow_mut() = Some(watch),
        Err(error) => {
            tracing::warn!(container = container.id, %error, "nobody will be told if it runs out of memory")
        }
    }
    *container.cgroup.borrow_mut() = Some(cgroup);
    if container.devices_guarded && !cgroup_guards {
        return Err(Failure::unknown(
            "linux.resources.devices: the kernel has taken no program for them, and did a moment before",
        ));
    }
    drop(launched);
    timeline.passed("cgroup");
    let mounted = hooks(container, &[Kind::Prestart, Kind::CreateRuntime]);
    let created = container.init.create(entrances, mounted).await;
    // A terminal's own end of the output is there since then.
    drop(readers);
    timeline.passed("the child");
    created
}

fn identity(container: &Container) -> Identity {
    Identity {
        id: container.id.clone(),
        bundle: container.bundle.clone(),
    }
}

/// Runs the hooks for after the start. One of what has happened already that fails is only told of, as the specification has it.
pub(super) async fn after_start(container: &Container) {
    if let Err(error) = hooks(container, &[Kind::Poststart]).await {
        told(container, &error);
    }
}

/// Runs the hooks for after the end, unless they were run.
pub(super) async fn after_stop(container: &Container) {
    if let Err(error) = process::after_stop(&container.spec, &identity(container)).await {
        told(container, &error);
    }
}

fn told(container: &Container, error: &Failure) {
    tracing::warn!(container = container.id, %error, "a hook failed");
}

/// Runs hooks of a container on the host.
async fn hooks(container: &Container, kinds: &[Kind]) -> Result<(), Failure> {
    if !hook::has(&container.spec, kinds) {
        return Ok(());
    }
    let helper = hook::launch(
        &container.spec,
        kinds,
        &identity(container),
        container.init.pid(),
    )?;
    process::done(helper).await
}

fn network(spec: &Spec) -> Option<std::path::PathBuf> {
    spec.linux()
        .as_ref()?
        .namespaces()
        .as_ref()?
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::Network)?
        .path()
        .clone()
        .filter(|p| !p.as_os_str().is_empty())
}

/// Where containerd has nothing to mount, the specification says where the files are.
fn root(container: &Container, request: &CreateTaskRequest) -> Root {
    let named = container.spec.root().as_ref();
    let named = named.filter(|_| request.rootfs.is_empty());
    let place = named.map_or(Path::new("rootfs"), |root| root.path());
    Root::Mounts {
        target: container.bundle.join(place),
        mounts: request
            .rootfs
            .iter()
            .map(|m| RootMount {
                kind: m.type_.clone(),
                source: m.source.clone(),
                options: m.options.clone(),
            })
            .collect(),
    }
}

/// Writes down what finds the container again: containerd after a restart of its own, and `delete` after a crash of the shim.
fn trace(bundle: &Path, id: &str, spec: &Spec) -> Result<(), Failure> {
    if let Some(program) = crate::reexec::program() {
        // containerd writes this for the sandbox only, and looks for the shim on its PATH where it is missing.
        let file = bundle.join("shim-binary-path");
        if !file.exists() {
            std::fs::write(file, program.as_os_str().as_encoded_bytes())?;
        }
    }
    let cgroup = spec
        .linux()
        .as_ref()
        .and_then(|l| l.cgroups_path().as_ref());
    let cgroup = cgroup
        .map(|p| p.to_string_lossy().into_owned())
        .unwrap_or_default();
    crash::record(
        Path::new("."),
        &Trace {
            id: id.to_string(),
            cgroup,
            bundle: bundle.into(),
        },
    )?;
    Ok(())
}

/// Takes back what a failed creation has made.
async fn abandon(container: &Container) {
    if matches!(container.role, Role::Sandbox) {
        crate::home::leave();
    }
    if container.init.pid() != 0 {
        let _claim = Claim::new(container.init.pid());
        let _ = container.init.signal(libc::SIGKILL);
        let exit = container.init.reap().await;
        container.init.finish(exit);
    }
    let cgroup = container.cgroup.borrow().clone();
    if let Some(cgroup) = cgroup {
        super::delete::remove_cgroup(&cgroup).await;
    }
    container.finish_role();
    after_stop(container).await;
    if let Some(used) = &container.used {
        used.end();
    }
}
