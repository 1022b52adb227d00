//! The three ways containerd runs this binary: `start`, the server itself, and `delete` after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim::asynchronous::publisher::RemotePublisher;
use containerd_shim::asynchronous::{ExitSignal, Shim};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::types::introspection::RuntimeInfo;
use containerd_shim::{Config, DeleteResponse, Error, Flags, StartOpts};
use sock_sandbox::cgroup::{Cgroup, Hierarchies, Location};
use sock_sandbox::hook::{self, Identity, Kind};

use crate::crash::{self, Trace};
use crate::events::Events;
use crate::log;
use crate::pod::{HIERARCHIES, Pod};
use crate::serve;
use crate::task::{Jobs, TaskService, timestamp};

/// Entry of the shim.
pub struct Service {
    exit: Arc<ExitSignal>,
    id: String,
    namespace: String,
    bundle: PathBuf,
    debug: bool,
}

/// Annotation that names the sandbox of a container (containerd, `pkg/cri/annotations`).
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Reads a bundle's specification.
///
/// # Errors
/// No file, or not a specification.
pub fn load_spec(bundle: &Path) -> Result<oci_spec::runtime::Spec, Error> {
    read(bundle)
}

fn read<T: serde::de::DeserializeOwned>(bundle: &Path) -> Result<T, Error> {
    let file = bundle.join("config.json");
    let wrong =
        |error: &dyn std::fmt::Display| Error::Other(format!("{}: {error}", file.display()));
    // A reader would be asked for each byte.
    let text = std::fs::read(&file).map_err(|error| wrong(&error))?;
    serde_json::from_slice(&text).map_err(|error| wrong(&error))
}

/// The sandbox that a bundle's specification names. The rest of it is for the server.
fn sandbox(bundle: &Path) -> Result<Option<String>, Error> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        annotations: Option<BTreeMap<String, String>>,
    }
    let mut found: Annotated = read(bundle)?;
    Ok(found
        .annotations
        .as_mut()
        .and_then(|all| all.remove(SANDBOX_ID)))
}

/// Ends and removes all that is left of a container.
async fn clean(sandbox: &Path, trace: &Trace) {
    let mut killed = BTreeSet::new();
    if let (Ok(location), Ok(hierarchies)) = (
        Location::parse(&trace.cgroup),
        Hierarchies::known(Path::new(HIERARCHIES)),
    ) {
        let cgroup = Cgroup::at(&hierarchies, &location);
        for _ in 0..100 {
            killed.extend(cgroup.processes().into_iter().flatten());
            let _ = cgroup.kill();
            if cgroup.processes().is_ok_and(|p| p.is_empty()) && cgroup.remove().is_ok() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    // Leaves are a zygote's children until its end, and its holder's only then: told to end earlier, the holder would see no
    // descendant, end, and take all leaves of the PID namespace along.
    for _ in 0..100 {
        if killed.iter().all(|pid| crate::children::has_ended(*pid)) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    crate::role::zygote::release(sandbox, &trace.id);
    crate::role::installer::discard_staging(&trace.id);
    crate::uses::end_all(&trace.id);
    crate::import_tier::forget(&trace.id);
}

/// containerd ends `delete` after five seconds.
const HOOKS_WITHIN: Duration = Duration::from_secs(3);

/// Runs the hooks that containers have for after their end, once all of them are gone.
async fn after_stop(ended: &[Trace]) {
    let end = Instant::now() + HOOKS_WITHIN;
    for trace in ended {
        let left = end.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, hooks_after_stop(trace)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(container = trace.id, %error, "a hook failed"),
            Err(_) => tracing::warn!(container = trace.id, "hooks take too long"),
        }
    }
}

async fn hooks_after_stop(trace: &Trace) -> Result<(), crate::task::Failure> {
    let Ok(spec) = load_spec(&trace.bundle) else {
        return Ok(());
    };
    if !hook::has(&spec, &[Kind::Poststop]) {
        return Ok(());
    }
    let container = Identity {
        id: trace.id.clone(),
        bundle: trace.bundle.clone(),
    };
    alone().await;
    crate::process::after_stop(&spec, &container).await
}

#[async_trait]
impl Shim for Service {
    type T = TaskService;

    async fn new(_runtime_id: &str, args: &Flags, _config: &mut Config) -> Self {
        Self::of(args)
    }

    async fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let group = sandbox(&self.bundle)?.unwrap_or_else(|| opts.id.clone());
        let address = opts.socket_address(&group);
        // Lets `delete` remove the socket of a server that was killed. Before there is one: of a start that fails nothing is left.
        std::fs::write(self.bundle.join("address"), &address).map_err(|e| Error::IoError {
            context: "write address".into(),
            err: e,
        })?;
        serve::spawn(&opts, &address)?;
        Ok(address)
    }

    async fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        // The server is gone. Whatever it left of the pod is found by what it wrote down.
        let mut left = crash::traces(&self.bundle);
        if !left.iter().any(|t| t.id == self.id) {
            let cgroup = load_spec(&self.bundle)
                .ok()
                .and_then(|s| s.linux().as_ref().and_then(|l| l.cgroups_path().clone()));
            let cgroup = cgroup
                .map(|p| p.to_string_lossy().into_owned())
                .unwrap_or_default();
            left.push(Trace {
                id: self.id.clone(),
                cgroup,
                bundle: self.bundle.clone(),
            });
        }
        // Containers before their sandbox, whose process numbers theirs may be in.
        for trace in left.iter().rev() {
            clean(&self.bundle, trace).await;
        }
        // containerd 1.7 runs this for each container that is deleted, and their server lives.
        if let Ok(address) = std::fs::read_to_string(self.bundle.join("address"))
            && let socket = address.trim_start_matches("unix://")
            && std::os::unix::net::UnixStream::connect(socket).is_err()
        {
            let _ = std::fs::remove_file(socket);
        }
        after_stop(&left).await;
        let mut response = DeleteResponse::new();
        response.set_exit_status(128 + 9);
        response.set_exited_at(timestamp(std::time::SystemTime::now()));
        Ok(response)
    }

    async fn wait(&mut self) {
        self.exit.wait().await;
    }

    fn runtime_info(runtime_id: &str, _options: Option<&Any>) -> Result<RuntimeInfo, Error> {
        crate::features::runtime_info(runtime_id).map_err(|e| Error::Other(e.to_string()))
    }

    async fn create_task_service(&self, _publisher: RemotePublisher) -> TaskService {
        self.tasks()
    }
}

impl Service {
    /// The one that these arguments are for.
    #[must_use]
    pub fn of(flags: &Flags) -> Service {
        let bundle = if flags.bundle.is_empty() {
            std::env::current_dir().unwrap_or_else(|_| "/".into())
        } else {
            (&flags.bundle).into()
        };
        Self {
            exit: Arc::new(ExitSignal::default()),
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            bundle,
            debug: flags.debug,
        }
    }

    /// What answers containerd's calls. Everything of the pod lives on the calling thread.
    #[must_use]
    pub fn tasks(&self) -> TaskService {
        log::init(&self.bundle, &self.id, self.debug);
        let address = std::env::var(serve::TTRPC_ADDRESS).unwrap_or_default();
        let (jobs, mut queue) = tokio::sync::mpsc::unbounded_channel();
        let (exit, namespace) = (self.exit.clone(), self.namespace.clone());
        // Everything of the pod lives on this one thread; the service that ttrpc calls only sends jobs to it.
        tokio::task::spawn_local(async move {
            let pod = Rc::new(Pod::new(Events::new(address, namespace), exit));
            pod.clone().reap_orphans();
            tokio::task::spawn_local(pod.clone().until_abandoned());
            // The first call is still on its way, and would read them.
            let _ = pod.hierarchies();
            let mut first = true;
            while let Some(job) = queue.recv().await {
                let job: crate::task::Job = job;
                if std::mem::take(&mut first) {
                    alone().await;
                }
                tokio::task::spawn_local(job(pod.clone()));
            }
        });
        TaskService::new(Jobs::new(jobs))
    }
}

/// Waits until the process has one thread. A library has used another during the start of the server, and on a busy node it
/// may not be gone when the first call comes. A child that is forked meanwhile would wait forever for a lock that this thread
/// held, as it has no such thread.
async fn alone() {
    const PATIENCE: Duration = Duration::from_secs(10);
    let end = Instant::now() + PATIENCE;
    // A link for each thread besides the directory's own two (`proc_task_getattr`, fs/proc/base.c).
    while std::fs::metadata("/proc/self/task").is_ok_and(|task| task.nlink() > 3) {
        if Instant::now() > end {
            tracing::warn!("a thread of the shim does not end");
            return;
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    static ENDED: AtomicBool = AtomicBool::new(false);

    /// Whether `alone` returns at once with one thread, and after the end of another.
    fn waits() -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else { return false };
        let begin = Instant::now();
        runtime.block_on(alone());
        if begin.elapsed() > Duration::from_secs(5) {
            return false;
        }
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            ENDED.store(true, Ordering::SeqCst);
        });
        runtime.block_on(alone());
        ENDED.load(Ordering::SeqCst) && begin.elapsed() < Duration::from_secs(5)
    }

    #[test]
    fn a_thread_that_is_about_to_end_is_waited_for() {
        // SAFETY: libc's own fork keeps its allocator whole, and the child, which has the one thread that a shim has and a
        // test has not, ends without returning.
        match unsafe { libc::fork() } {
            0 => {
                let status = i32::from(!waits());
                // SAFETY: ends the process.
                unsafe { libc::_exit(status) }
            }
            child => {
                let mut status = -1;
                // SAFETY: reaps it.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                assert_eq!(status, 0);
            }
        }
    }
}
