//! The container of a pool: a zygote without any privilege on the host.
//!
//! Its namespaces, the user namespace first of all, belong to a holder of their own, which outlives the pod while leaves
//! forked from the zygote live: they are below its PID namespace. The holder therefore stays out of the pod's cgroup.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::{
    Capability, LinuxCapabilitiesBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, Spec,
};
use serde_json::json;
use sock_sandbox::root::Root;
use sock_sandbox::{HolderKind, Launched, Outer, Plan, Program, Stdio, UserMapping, namespace};
use sock_zygote::protocol::Attached;
use sock_zygote::{Broker, Warm, Zygote};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::descent::{self, Descent, Parent};
use super::profile;
use super::{POOLS, PoolConfig, add_env, add_payload, packages};
use crate::activation::{End, Shortage};
use crate::children::Claim;
use crate::container::Container;
use crate::process::{Process, run_program};
use crate::status::StatusServer;
use crate::task::Failure;

/// From the start of the interpreter to the last import.
const WARM_WITHIN: Duration = Duration::from_secs(90);
/// The same from the container's creation. kubelet gives up after 120 s.
const READY_WITHIN: Duration = Duration::from_secs(110);
/// Making namespaces takes milliseconds, unless somebody in those around them interferes.
const MADE_WITHIN: Duration = Duration::from_secs(10);
/// Between the end of a process's channel and its own.
const REAPED_WITHIN: Duration = Duration::from_secs(2);

/// A pool's container.
pub struct ZygoteContainer {
    config: PoolConfig,
    begun: Instant,
    user: UserMapping,
    /// Name of its own profile.
    profile: RefCell<String>,
    holder: RefCell<Option<NamespaceHolder>>,
    origin: RefCell<Option<Origin>>,
    /// What a zygote that descends from another writes goes here.
    output: RefCell<Option<(OwnedFd, OwnedFd)>>,
    following: RefCell<Option<tokio::task::AbortHandle>>,
    /// The zygote, if it is not the container's first process.
    zygote: RefCell<Option<Rc<Follower>>>,
    serving: RefCell<Option<tokio::task::AbortHandle>>,
    status: RefCell<Option<StatusServer>>,
}

/// How a zygote comes to be.
enum Origin {
    /// The container's own program becomes one; this is our end of its control channel.
    Program(OwnedFd),
    /// Another's child does.
    Descent(Box<Descent>),
}

/// The process that keeps a zygote's namespaces.
struct NamespaceHolder {
    process: Launched,
    user: OwnedFd,
}

impl ZygoteContainer {
    pub(super) fn prepare(
        spec: &mut Spec,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, Failure> {
        let config = PoolConfig::from_annotations(annotations)?;
        let packages = packages(&config.name);
        if packages.is_none() {
            return Err(Failure::precondition(format!(
                "PackageSet {}: its packages are not in the node cache: see its install container",
                config.name.package_set
            )));
        }
        add_payload(spec, packages)?;
        add_env(spec, "SOCK_CONTROL_FD", "3");
        let user = spec.process().as_ref().map(|p| UserMapping {
            uid: p.user().uid(),
            gid: p.user().gid(),
            owner: config.is_extended.then_some(descent::OWNER),
        });
        let user = user.ok_or_else(|| Failure::invalid("process is missing"))?;
        Ok(Self {
            config,
            begun: Instant::now(),
            user,
            profile: RefCell::default(),
            holder: RefCell::default(),
            origin: RefCell::default(),
            output: RefCell::default(),
            following: RefCell::default(),
            zygote: RefCell::default(),
            serving: RefCell::default(),
            status: RefCell::default(),
        })
    }

    /// Whether it is forked from another: the container's own program is not run then.
    #[must_use]
    pub fn descends(&self) -> bool {
        matches!(*self.origin.borrow(), Some(Origin::Descent(_)))
    }

    /// Keeps the container's output for a zygote that comes into it.
    ///
    /// # Errors
    /// `/dev/null` cannot be opened.
    pub fn keep_output(&self, streams: Stdio) -> Result<(), Failure> {
        *self.output.borrow_mut() = Some(super::output(streams)?);
        Ok(())
    }

    /// Makes the namespaces and puts the specification into them. Returns the zygote's end of its control channel, if the
    /// container's program is to be it.
    ///
    /// # Errors
    /// The kernel refuses, for instance user namespaces.
    pub async fn isolate(&self, spec: &mut Spec, id: &str) -> Result<Option<OwnedFd>, Failure> {
        let mut own = Spec::default();
        own.set_mounts(None).set_hostname(spec.hostname().clone());
        let mut process = spec.process().clone().unwrap_or_default();
        process
            .set_cwd("/".into())
            .set_rlimits(None)
            .set_terminal(Some(false));
        process.set_capabilities(Some(capabilities(HashSet::new())?));
        own.set_process(Some(process));
        let mut linux = spec.linux().clone().unwrap_or_default();
        let kinds = [
            LinuxNamespaceType::User,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Mount,
        ];
        let fresh = kinds
            .iter()
            .map(|k| LinuxNamespaceBuilder::default().typ(*k).build())
            .collect::<Result<Vec<_>, _>>();
        linux
            .set_namespaces(Some(fresh.map_err(Failure::unknown)?))
            .set_sysctl(None);
        own.set_linux(Some(linux));
        let mut nested = None;
        if let Some((child, outer)) = Descent::begin(&self.config, self.user).await {
            match self.hold(&own, id, Some(outer)).await {
                Ok(holder) => nested = Some((child, holder)),
                Err(error) => {
                    tracing::warn!(%error, "no namespaces within those of what it extends: imports everything by itself");
                    child.give_up();
                }
            }
        }
        let (descent, holder) = match nested {
            Some((child, holder)) => (Some(child), holder),
            None => (None, self.hold(&own, id, None).await?),
        };
        let pid = holder.process.pid;
        *self.holder.borrow_mut() = Some(holder);

        let (origin, theirs) = match descent {
            Some(descent) => (Origin::Descent(Box::new(descent)), None),
            None => {
                let (ours, theirs) = sock_zygote::protocol::pair().map_err(Failure::unknown)?;
                (Origin::Program(ours), Some(theirs))
            }
        };
        *self.origin.borrow_mut() = Some(origin);
        let mut linux = spec.linux().clone().unwrap_or_default();
        let joined = kinds.iter().map(|kind| {
            let namespace = LinuxNamespaceBuilder::default().typ(*kind);
            let file = match kind {
                LinuxNamespaceType::User => "user",
                LinuxNamespaceType::Pid => "pid",
                LinuxNamespaceType::Network => "net",
                LinuxNamespaceType::Ipc => "ipc",
                LinuxNamespaceType::Uts => "uts",
                _ => return namespace.build(),
            };
            namespace.path(format!("/proc/{pid}/ns/{file}")).build()
        });
        let mut joined = joined
            .collect::<Result<Vec<_>, _>>()
            .map_err(Failure::unknown)?;
        // Without a cgroup namespace of its own it would see the whole node's cgroups on version 2.
        let given = linux.namespaces().iter().flatten();
        joined.extend(
            given
                .filter(|n| n.typ() == LinuxNamespaceType::Cgroup)
                .cloned(),
        );
        linux.set_namespaces(Some(joined));
        // A new proc may be mounted for a leaf only while one is fully visible here (mount_too_revealing, fs/namespace.c).
        // What it shows of the host is what any user without privileges may read.
        linux
            .set_masked_paths(None)
            .set_readonly_paths(None)
            .set_sysctl(None);
        if let Some(seccomp) = linux.seccomp().clone() {
            *self.profile.borrow_mut() = profile::name(&seccomp)?;
            let seccomp = profile::of_zygote(&seccomp, self.config.is_extended)?;
            linux.set_seccomp(Some(seccomp));
        }
        spec.set_linux(Some(linux));
        if let Some(process) = spec.process_mut() {
            let needed = HashSet::from([
                Capability::SysAdmin,
                Capability::SysChroot,
                Capability::Setpcap,
            ]);
            process
                .set_capabilities(Some(capabilities(needed)?))
                .set_terminal(Some(false));
        }
        Ok(theirs)
    }

    /// Makes a holder of namespaces, nested in those of another zygote if there is one.
    async fn hold(
        &self,
        spec: &Spec,
        id: &str,
        outer: Option<Outer>,
    ) -> Result<NamespaceHolder, Failure> {
        let is_nested = outer.is_some();
        let process = sock_sandbox::launch(Plan {
            spec,
            root: Root::Empty,
            program: Program::Holder(HolderKind::Descendants),
            stdio: Stdio::default(),
            extra: Vec::new(),
            mapping: Some(self.user),
            outer,
            identity: None,
            nodev_root: false,
            cgroups: Vec::new(),
        })?;
        // A nested one is the child of the holder around it.
        let _claim = (!is_nested).then(|| Claim::new(process.pid));
        let made = async {
            record(id, process.pid)?;
            let ran =
                tokio::time::timeout(MADE_WITHIN, run_program(&process, &crate::home::outside()))
                    .await;
            let problem = match ran {
                Ok(ran) => ran?.map(|e| e.to_string()),
                Err(_) => Some(format!("not made within {} s", MADE_WITHIN.as_secs())),
            };
            if let Some(problem) = problem {
                return Err(Failure::unknown(format!(
                    "namespaces of the zygote: {problem}: this node may forbid user namespaces"
                )));
            }
            Ok(namespace::of_process(process.pid, "user")?)
        };
        match made.await {
            Ok(user) => Ok(NamespaceHolder { process, user }),
            Err(e) => {
                signal(&process.pidfd, libc::SIGKILL);
                Err(e)
            }
        }
    }

    /// After the interpreter runs: waits until it is a zygote, then lets Functions' shims find it.
    ///
    /// # Errors
    /// The line that the author of the PackageSet must mend.
    pub async fn warm_up(
        &self,
        container: &Rc<Container>,
        process: &Rc<Process>,
    ) -> Result<(), Failure> {
        let origin = self
            .origin
            .take()
            .ok_or_else(|| Failure::precondition("the zygote was started before"))?;
        let set = &self.config.name.package_set;
        let setup = &self.config.setup;
        let refused =
            |e: &dyn std::fmt::Display| Failure::unknown(format!("PackageSet {set}: {e}"));
        let (configured, descended) = match origin {
            Origin::Program(control) => {
                let end = async {
                    let exit = process.wait().await;
                    End::of_status(exit.status, shortage(container))
                };
                let configured = Zygote::configure(control, setup);
                (self.configured(configured, end).await, None)
            }
            Origin::Descent(descent) => {
                let output = self.output.take();
                let (stdout, stderr) =
                    output.ok_or_else(|| Failure::precondition("the container has no output"))?;
                let streams = (stdout.as_fd(), stderr.as_fd());
                let (control, pidfd, parent) = descent
                    .enter(container, streams)
                    .await
                    .map_err(|e| refused(&e))?;
                let process = Rc::new(Follower::new(pidfd)?);
                *self.zygote.borrow_mut() = Some(Rc::clone(&process));
                let end = async {
                    process.ended().await;
                    process.end(container)
                };
                let configured = Zygote::configure_over(control, setup);
                let configured = self.configured(configured, end).await;
                (configured, Some((Rc::clone(&process), parent)))
            }
        };
        let (zygote, warm) = configured.map_err(|e| refused(&e))?;
        let user = match &*self.holder.borrow() {
            Some(holder) => holder.user.try_clone()?,
            None => return Err(Failure::precondition("the zygote has no namespaces")),
        };
        let pools = self.config.name.pools(Path::new(POOLS));
        let path = pools.join(format!("{}.sock", container.sandbox));
        let broker = Broker::listen(&path).map_err(Failure::unknown)?;
        tracing::info!(
            package_set = set,
            micros = warm.import_micros,
            "zygote is warm"
        );
        let attached = Attached {
            uid: self.user.uid,
            gid: self.user.gid,
            // One that was forked from another has that one's filter.
            profile: match &descended {
                Some((_, parent)) => parent.profile().to_owned(),
                None => self.profile.borrow().clone(),
            },
        };
        let serve = tokio::task::spawn_local(async move {
            let reason = broker.serve(&zygote, user.as_fd(), &attached).await;
            tracing::info!(error = %reason, "zygote is gone");
        });
        let modules: Vec<_> = warm
            .modules
            .iter()
            .map(|m| json!({"name": m.name, "micros": m.micros}))
            .collect();
        let parent = descended.as_ref().and(self.config.parent.as_ref());
        let parent = parent.map(|parent| &parent.digest);
        let document = json!({"ready": true, "importMicros": warm.import_micros, "modules": modules, "parent": parent});
        match StatusServer::start(self.config.status_port, move || document.clone()) {
            Ok(server) => *self.status.borrow_mut() = Some(server),
            // Figures are missing then; Functions are served.
            Err(e) => {
                tracing::warn!(port = self.config.status_port, error = %e, "no status of the pool")
            }
        }
        *self.serving.borrow_mut() = Some(serve.abort_handle());
        let following = match descended {
            Some((zygote, parent)) => {
                let follow = follow(zygote, parent, Rc::clone(container), Rc::clone(process));
                Some(tokio::task::spawn_local(follow))
            }
            None if self.config.parent.is_some() => {
                let (config, user) = (self.config.clone(), self.user);
                let process = Rc::clone(process);
                Some(tokio::task::spawn_local(async move {
                    descent::until_it_could(&config, user).await;
                    tracing::info!("ends, to descend from the zygote of what it extends");
                    end(&process, 0);
                }))
            }
            None => None,
        };
        *self.following.borrow_mut() = following.map(|task| task.abort_handle());
        Ok(())
    }

    /// Waits for a zygote that was told what to be, or its end, or the end of all patience.
    async fn configured(
        &self,
        configured: impl Future<Output = sock_zygote::Result<(Zygote, Warm)>>,
        end: impl Future<Output = End>,
    ) -> Result<(Zygote, Warm), String> {
        let ended = async {
            let end = end.await;
            format!(
                "its interpreter {end} while it imported and warmed up: see the log of container zygote"
            )
        };
        tokio::pin!(ended);
        let setup = &self.config.setup;
        let begun = Instant::now();
        let until = (begun + WARM_WITHIN).min(self.begun + READY_WITHIN);
        tokio::select! {
            configured = configured => match configured {
                // Its channel closes a moment before it can be reaped.
                Err(e) if e.is_closed() => Err(tokio::time::timeout(REAPED_WITHIN, ended).await.unwrap_or_else(|_| e.to_string())),
                other => other.map_err(|e| e.to_string()),
            },
            end = &mut ended => Err(end),
            () = tokio::time::sleep_until(until) => {
                let what: Vec<&str> = setup.imports.iter().map(String::as_str).chain((!setup.warm_up.is_empty()).then_some("warmUp")).collect();
                Err(format!("{} took more than {} s", what.join(", "), (until - begun).as_secs()))
            }
        }
    }

    /// After the end of the interpreter. What it made for its leaves ends with the last of them.
    pub fn finish(&self) {
        self.status.take();
        self.origin.take();
        if let Some(task) = self.following.take() {
            task.abort();
        }
        if let Some(task) = self.serving.take() {
            task.abort();
            // The socket goes with the task, in a moment; its directories when the last pool of this digest has gone.
            let pools = self.config.name.pools(Path::new(POOLS));
            tokio::task::spawn_local(async move {
                tokio::task::yield_now().await;
                crate::uses::remove_empty(Some(&pools), Path::new(POOLS));
            });
        }
        // It ends with the last leaf. Reaped here if that is while this shim lives, by its next of kin if not.
        let holder = self.holder.take();
        if let Some(zygote) = self.zygote.take() {
            // Leaves are the zygote's children as long as it is there: before it has gone it would be the last.
            tokio::task::spawn_local(async move {
                let _ = tokio::time::timeout(REAPED_WITHIN, zygote.ended()).await;
                drop(holder);
            });
        }
    }
}

fn shortage(container: &Container) -> Option<Shortage> {
    let cgroup = container.cgroup.borrow().clone();
    cgroup
        .filter(|cgroup| container.out_of_memory.get() || cgroup.oom_kills() > 0)
        .map(|cgroup| Shortage::in_cgroup(&cgroup))
}

/// A zygote that is no child of this process.
struct Follower(AsyncFd<OwnedFd>);

impl Follower {
    fn new(pidfd: OwnedFd) -> std::io::Result<Follower> {
        crate::async_fd::watch(pidfd, Interest::READABLE).map(Follower)
    }

    async fn ended(&self) {
        // That it cannot be watched any more is an end too.
        let _ = self.0.readable().await;
    }

    fn end(&self, container: &Container) -> End {
        End::of(Some(self.0.get_ref()), shortage(container))
    }
}

/// Ends the container with its zygote, or to have it made anew when the one that it descends from has been.
async fn follow(
    zygote: Rc<Follower>,
    parent: Parent,
    container: Rc<Container>,
    holder: Rc<Process>,
) {
    let status = tokio::select! {
        () = zygote.ended() => {
            let end = zygote.end(&container);
            tracing::warn!(%end, "the zygote is gone");
            end.status()
        }
        () = parent.replaced() => {
            tracing::info!("ends, to descend from the new zygote of what it extends");
            0
        }
    };
    end(&holder, status);
}

/// Ends a container's first process, and says that it ended so.
fn end(first: &Process, status: u32) {
    first.end_as(status);
    if let Err(error) = first.signal(libc::SIGKILL) {
        tracing::warn!(%error, "the container of a zygote that is gone is left");
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        signal(&self.process.pidfd, libc::SIGTERM);
    }
}

fn signal(process: &OwnedFd, signal: libc::c_int) {
    // SAFETY: sends a signal to a process by descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            std::os::fd::AsRawFd::as_raw_fd(process),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// Begin of the names of the files that name holders, for the `delete` command after a crash of the shim.
const HOLDER: &str = "sock-holder";

/// Process number and start time: together they name one process for ever.
fn record(id: &str, pid: i32) -> Result<(), Failure> {
    let started = start_time(pid).ok_or_else(|| Failure::unknown("the zygote's holder is gone"))?;
    Ok(std::fs::write(
        holder_of(Path::new("."), id),
        format!("{pid} {started}"),
    )?)
}

/// In the sandbox's bundle, the working directory of the shim's server: containerd may have removed the
/// container's own when it runs the `delete` command.
fn holder_of(sandbox: &Path, id: &str) -> PathBuf {
    sandbox.join(format!("{HOLDER}-{id}"))
}

fn start_time(pid: i32) -> Option<u64> {
    // A process names itself as it likes, also in bytes that are no text.
    started(&std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): fields are counted from behind the name, which ends at the last parenthesis.
#[must_use]
pub fn started(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let fields = std::str::from_utf8(&stat[end + 1..]).ok()?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// The process that a bundle's file names, and its start time.
#[must_use]
pub fn recorded(text: &str) -> Option<(i32, u64)> {
    let (pid, started) = text.trim().split_once(' ')?;
    // 0 and negative numbers are groups of processes to kill(2), and 1 is nobody's holder.
    let pid = pid.parse().ok().filter(|pid| *pid > 1)?;
    Some((pid, started.parse().ok()?))
}

/// After a crash: has the holder of a container's zygote end with the last leaf. `sandbox` is the bundle of the pod's sandbox.
pub fn release(sandbox: &Path, id: &str) {
    let Ok(text) = std::fs::read_to_string(holder_of(sandbox, id)) else {
        return;
    };
    if let Some((pid, started)) = recorded(&text)
        && start_time(pid) == Some(started)
    {
        // SAFETY: sends a signal to a process that was just found to be the one recorded.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

fn capabilities(set: HashSet<Capability>) -> Result<oci_spec::runtime::LinuxCapabilities, Failure> {
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .permitted(set.clone())
        .effective(set.clone())
        .inheritable(set.clone())
        .ambient(set)
        .build()
        .map_err(Failure::unknown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_start_time_is_that_of_the_kernel_whatever_the_name() {
        let rest = "S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0";
        for name in [&b"python3"[..], b") S 1", b"\xff\xfe", b"a b\nc"] {
            let stat = [b"17 (", name, b") ", rest.as_bytes()].concat();
            assert_eq!(started(&stat), Some(4242), "{name:?}");
        }
        let own = i32::try_from(std::process::id()).expect("a process number");
        assert!(start_time(own).is_some_and(|t| t > 0));
    }

    #[test]
    fn no_group_of_processes_is_taken_for_a_holder() {
        for text in [
            "-1 5",
            "0 5",
            "1 5",
            "",
            "7",
            "7 x",
            "7 5 9",
            "99999999999 5",
        ] {
            assert_eq!(recorded(text), None, "{text}");
        }
        assert_eq!(recorded("7 5"), Some((7, 5)));
    }

    proptest! {
        #[test]
        fn what_a_bundle_records_is_read_back(pid in 2.., started in any::<u64>()) {
            prop_assert_eq!(recorded(&format!("{pid} {started}")), Some((pid, started)));
        }

        #[test]
        fn no_text_is_a_panic_or_a_group(bytes in prop::collection::vec(any::<u8>(), 0..120), text in "\\PC{0,30}|-?[0-9]{0,12} [0-9]{0,22}") {
            let _ = super::started(&bytes);
            prop_assert!(recorded(&text).is_none_or(|(pid, _)| pid > 1));
        }
    }
}
