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
    Capability, LinuxCapabilitiesBuilder, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator,
    LinuxSyscall, LinuxSyscallBuilder, Spec,
};
use serde_json::json;
use sock_sandbox::root::Root;
use sock_sandbox::{HolderKind, Launched, Plan, Program, Stdio, UserMapping, namespace};
use sock_zygote::{Broker, Warm, Zygote};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::descent::{Descent, Parent};
use super::{POOLS, PoolConfig, add_env, add_payload, packages};
use crate::activation::{End, Shortage};
use crate::children::Claim;
use crate::container::Container;
use crate::process::{Process, run_program};
use crate::status::StatusServer;
use crate::task::Failure;

/// From the start of the interpreter to the last import. kubelet gives up after 120 s.
const WARM_WITHIN: Duration = Duration::from_secs(90);
/// Between the end of a process's channel and its own.
const REAPED_WITHIN: Duration = Duration::from_secs(2);

/// System calls that a zygote needs to make leaves, and that default profiles keep for those with privileges on the host.
const FORKING: [&str; 5] = [
    "mount",
    "move_mount",
    "mount_setattr",
    "chroot",
    "sethostname",
];
/// Namespaces that a leaf gets of its own. No user namespace: in one it would hold every capability anew.
const OWN: libc::c_int =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
/// Namespaces that are joined: the zygote's own after a fork, the pod's empty network.
const JOINED: [libc::c_int; 7] = [
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    // By a child that becomes a zygote: only namespaces that are nested in its parent's let it in.
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];
/// To whom user namespaces nested in a zygote's belong; nobody runs as this user. Above those of tenants
/// (`docs/design.md`, "Annotations").
const OWNER: u32 = 2_000_000_000;

/// A pool's container.
pub struct ZygoteContainer {
    config: PoolConfig,
    user: UserMapping,
    holder: RefCell<Option<NamespaceHolder>>,
    origin: RefCell<Option<Origin>>,
    /// What a zygote that descends from another writes goes here.
    output: RefCell<Option<(OwnedFd, OwnedFd)>>,
    following: RefCell<Option<tokio::task::AbortHandle>>,
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
            owner: Some(OWNER),
        });
        let user = user.ok_or_else(|| Failure::invalid("process is missing"))?;
        Ok(Self {
            config,
            user,
            holder: RefCell::default(),
            origin: RefCell::default(),
            output: RefCell::default(),
            following: RefCell::default(),
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
        let (descent, outer) = Descent::begin(&self.config, self.user).await.unzip();
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
        let launched = sock_sandbox::launch(Plan {
            spec: &own,
            root: Root::Empty,
            program: Program::Holder(HolderKind::Descendants),
            stdio: Stdio::default(),
            extra: Vec::new(),
            mapping: Some(self.user),
            outer,
            nodev_root: false,
            cgroups: Vec::new(),
        })?;
        let _claim = Claim::new(launched.pid);
        crate::home::keep_out(launched.pid);
        record(id, launched.pid)?;
        let made = async {
            if let Some(e) = run_program(&launched).await? {
                return Err(Failure::unknown(format!(
                    "namespaces of the zygote: {e}: this node may forbid user namespaces"
                )));
            }
            Ok(namespace::of_process(launched.pid, "user")?)
        };
        let made: Result<OwnedFd, Failure> = made.await;
        let user = match made {
            Ok(user) => user,
            Err(e) => {
                // SAFETY: ends a child that is not reaped before this function returns.
                unsafe { libc::kill(launched.pid, libc::SIGKILL) };
                return Err(e);
            }
        };
        let pid = launched.pid;
        *self.holder.borrow_mut() = Some(NamespaceHolder {
            process: launched,
            user,
        });

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
            let mut seccomp = seccomp;
            let mut calls = seccomp.syscalls().clone().unwrap_or_default();
            calls.extend(forking()?);
            seccomp.set_syscalls(Some(calls));
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
        let (uid, gid) = (self.user.uid, self.user.gid);
        let serve = tokio::task::spawn_local(async move {
            let reason = broker.serve(&zygote, user.as_fd(), uid, gid).await;
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
        if let Some((follower, parent)) = descended {
            let follow = follow(follower, parent, Rc::clone(container), Rc::clone(process));
            let task = tokio::task::spawn_local(follow);
            *self.following.borrow_mut() = Some(task.abort_handle());
        }
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
        tokio::select! {
            configured = configured => match configured {
                // Its channel closes a moment before it can be reaped.
                Err(e) if e.is_closed() => Err(tokio::time::timeout(REAPED_WITHIN, ended).await.unwrap_or_else(|_| e.to_string())),
                other => other.map_err(|e| e.to_string()),
            },
            end = &mut ended => Err(end),
            () = tokio::time::sleep(WARM_WITHIN) => {
                let what: Vec<&str> = setup.imports.iter().map(String::as_str).chain((!setup.warm_up.is_empty()).then_some("warmUp")).collect();
                Err(format!("{} took more than {} s", what.join(", "), WARM_WITHIN.as_secs()))
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
        self.holder.take();
    }
}

fn shortage(container: &Container) -> Option<Shortage> {
    let cgroup = container.cgroup.borrow().clone();
    cgroup
        .filter(|cgroup| cgroup.oom_kills() > 0)
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
    holder.end_as(status);
    if let Err(error) = holder.signal(libc::SIGKILL) {
        tracing::warn!(%error, "the container of a zygote that is gone is left");
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        let process = std::os::fd::AsRawFd::as_raw_fd(&self.process.pidfd);
        // SAFETY: sends a signal to a child by descriptor.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                process,
                libc::SIGTERM,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
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

/// What a zygote's profile allows beyond its pod's.
fn forking() -> Result<Vec<LinuxSyscall>, Failure> {
    let allow = |names: &[&str], argument: Option<LinuxSeccompArg>| {
        let call = LinuxSyscallBuilder::default()
            .names(names.iter().map(ToString::to_string).collect::<Vec<_>>())
            .action(LinuxSeccompAction::ScmpActAllow);
        match argument {
            Some(argument) => call.args(vec![argument]).build(),
            None => call.build(),
        }
        .map_err(Failure::unknown)
    };
    let argument = LinuxSeccompArgBuilder::default;
    let only_own = argument()
        .index(0usize)
        .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
        .value(!u64::from(OWN.unsigned_abs()))
        .value_two(0u64);
    let mut calls = vec![
        allow(&FORKING, None)?,
        allow(
            &["unshare"],
            Some(only_own.build().map_err(Failure::unknown)?),
        )?,
    ];
    for kind in JOINED {
        let this = argument()
            .index(1usize)
            .op(LinuxSeccompOperator::ScmpCmpEq)
            .value(u64::from(kind.unsigned_abs()));
        calls.push(allow(
            &["setns"],
            Some(this.build().map_err(Failure::unknown)?),
        )?);
    }
    Ok(calls)
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
