//! The container of a pool: a zygote without any privilege on the host.
//!
//! Its namespaces, the user namespace first of all, belong to a holder of their own, which outlives the pod while leaves
//! forked from the zygote live: they are below its PID namespace. The holder therefore stays out of the pod's cgroup.
//!
//! The container's first process is a holder too. The zygote is a process that comes into the container: the container's own command, or the child of
//! another zygote. So it can end while the container stays, when the node needs its memory for others ([`crate::import_tier`]), and begin again
//! when it is asked for.

mod holder;
mod process;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::{
    Capability, LinuxCapabilitiesBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, Spec,
};
use serde_json::{Value, json};
use sock_sandbox::{Stdio, UserMapping};
use sock_zygote::protocol::Attached;
use sock_zygote::{Broker, Channel, Warm, Zygote};
use tokio::time::Instant;

use super::descent::{self, Descent, Parent};
use super::profile;
use super::{POOLS, PoolConfig, add_env, add_payload, packages};
use crate::container::Container;
use crate::import_tier::{Membership, Subject};
use crate::process::Process;
use crate::status::StatusServer;
use crate::task::Failure;
use holder::{NamespaceHolder, signal};
pub use holder::{recorded, release, started};
use process::ZygoteProcess;

/// From the start of the interpreter to the last import.
const WARM_WITHIN: Duration = Duration::from_secs(90);
/// The same from the container's creation. kubelet gives up after 120 s.
const READY_WITHIN: Duration = Duration::from_secs(110);
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
    /// How the zygote comes to be.
    origin: RefCell<Option<Origin>>,
    /// What the zygote writes goes here.
    output: RefCell<Option<(OwnedFd, OwnedFd)>>,
    /// The zygote, if it was ever started.
    zygote: RefCell<Option<Rc<ZygoteProcess>>>,
    tending: RefCell<Option<tokio::task::AbortHandle>>,
    /// What the status says.
    document: Rc<RefCell<Value>>,
    status: RefCell<Option<StatusServer>>,
    membership: RefCell<Option<Rc<Membership>>>,
}

/// How a zygote comes to be.
enum Origin {
    /// The container's own command becomes one.
    Program,
    /// Another's child does.
    Descent(Box<Descent>),
}

impl Origin {
    fn descends(&self) -> bool {
        matches!(self, Origin::Descent(_))
    }
}

/// A zygote that is warm.
struct Living {
    zygote: Zygote,
    process: Rc<ZygoteProcess>,
    warm: Warm,
    /// Where it was forked from.
    parent: Option<Parent>,
}

/// What becomes of a zygote.
enum Next {
    /// It has ended.
    Gone,
    /// It could descend from another, or from another than it does.
    Replaced,
    /// The node needs its memory.
    Rests,
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
            zygote: RefCell::default(),
            tending: RefCell::default(),
            document: Rc::default(),
            status: RefCell::default(),
            membership: RefCell::default(),
        })
    }

    /// Keeps the container's output for its zygotes; the holder writes nothing.
    ///
    /// # Errors
    /// `/dev/null` cannot be opened.
    pub fn keep_output(&self, streams: Stdio) -> Result<(), Failure> {
        *self.output.borrow_mut() = Some(super::output(streams)?);
        Ok(())
    }

    /// Makes the namespaces and puts the specification into them.
    ///
    /// # Errors
    /// The kernel refuses, for instance user namespaces.
    pub async fn isolate(&self, spec: &mut Spec, id: &str) -> Result<(), Failure> {
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
            match NamespaceHolder::make(&own, id, self.user, Some(outer)).await {
                Ok(holder) => nested = Some((child, holder)),
                Err(error) => {
                    tracing::warn!(%error, "no namespaces within those of what it extends: imports everything by itself");
                    child.give_up();
                }
            }
        }
        let (origin, holder) = match nested {
            Some((child, holder)) => (Origin::Descent(Box::new(child)), holder),
            None => {
                let holder = NamespaceHolder::make(&own, id, self.user, None).await?;
                (Origin::Program, holder)
            }
        };
        let pid = holder.process.pid;
        *self.holder.borrow_mut() = Some(holder);
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
        Ok(())
    }

    /// Once the container is there: has a zygote in it, then lets Functions' shims find it.
    ///
    /// # Errors
    /// The line that the author of the PackageSet must mend.
    pub async fn warm_up(
        &self,
        container: &Rc<Container>,
        init: &Rc<Process>,
    ) -> Result<(), Failure> {
        let origin = self
            .origin
            .take()
            .ok_or_else(|| Failure::precondition("the zygote was started before"))?;
        let until = self.begun + READY_WITHIN;
        let name = &self.config.name;
        let membership = Membership::new(&container.sandbox, &name.tenant, &name.digest);
        let membership = Rc::new(membership.map_err(Failure::unknown)?);
        *self.membership.borrow_mut() = Some(Rc::clone(&membership));
        membership.starts(self.parent(origin.descends()));
        let living = self.begin(container, origin, until).await?;
        let path = name.pools(Path::new(POOLS));
        let path = path.join(format!("{}.sock", container.sandbox));
        let broker = Broker::listen(&path).map_err(Failure::unknown)?;
        self.tell(&living);
        let document = Rc::clone(&self.document);
        match StatusServer::start(self.config.status_port, move || document.borrow().clone()) {
            Ok(server) => *self.status.borrow_mut() = Some(server),
            // Figures are missing then; Functions are served.
            Err(e) => {
                tracing::warn!(port = self.config.status_port, error = %e, "no status of the pool")
            }
        }
        let tend = tend(
            Rc::clone(container),
            Rc::clone(init),
            broker,
            membership,
            living,
        );
        *self.tending.borrow_mut() = Some(tokio::task::spawn_local(tend).abort_handle());
        Ok(())
    }

    /// Starts a zygote and waits until it has imported everything.
    async fn begin(
        &self,
        container: &Container,
        origin: Origin,
        until: Instant,
    ) -> Result<Living, Failure> {
        let set = &self.config.name.package_set;
        let setup = &self.config.setup;
        let refused =
            |e: &dyn std::fmt::Display| Failure::unknown(format!("PackageSet {set}: {e}"));
        let (stdout, stderr) = match &*self.output.borrow() {
            Some((out, err)) => (out.try_clone()?, err.try_clone()?),
            None => return Err(Failure::precondition("the container has no output")),
        };
        let streams: (BorrowedFd<'_>, BorrowedFd<'_>) = (stdout.as_fd(), stderr.as_fd());
        let begun = Instant::now();
        let (process, control, parent) = match origin {
            Origin::Program => {
                let (ours, theirs) = sock_zygote::protocol::pair().map_err(Failure::unknown)?;
                let process = ZygoteProcess::run(container, theirs, streams).await?;
                let control = Channel::new(ours, "zygote").map_err(Failure::unknown)?;
                (process, control, None)
            }
            Origin::Descent(descent) => {
                let (control, pidfd, pid, parent) = descent
                    .enter(container, streams)
                    .await
                    .map_err(|e| refused(&e))?;
                let process = ZygoteProcess::stranger(pid, pidfd)?;
                (process, control, Some(parent))
            }
        };
        let process = Rc::new(process);
        *self.zygote.borrow_mut() = Some(Rc::clone(&process));
        let configured = Zygote::configure_over(control, setup);
        let configured = self
            .configured(container, configured, &process, until)
            .await;
        let (zygote, mut warm) = configured.map_err(|e| refused(&e))?;
        // A tenant's word: more than has passed it cannot be.
        let passed = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        warm.import_micros = warm.import_micros.min(passed);
        tracing::info!(
            package_set = set,
            micros = warm.import_micros,
            "zygote is warm"
        );
        Ok(Living {
            zygote,
            process,
            warm,
            parent,
        })
    }

    /// DIGEST of the zygote that one is forked from, if it is.
    fn parent(&self, descends: bool) -> Option<String> {
        let parent = self.config.parent.as_ref().filter(|_| descends);
        parent.map(|parent| parent.digest.clone())
    }

    /// How another comes to be after one has ended for others, where that one was. `None`: there is nobody to descend from now.
    ///
    /// # Errors
    /// It has to be somewhere else.
    async fn origin_again(&self) -> Result<Option<Origin>, Failure> {
        let is_nested = match &*self.holder.borrow() {
            Some(holder) => holder.is_nested(),
            None => return Err(Failure::precondition("the zygote has no namespaces")),
        };
        if !is_nested {
            return Ok(Some(Origin::Program));
        }
        let Some((descent, outer)) = Descent::begin(&self.config, self.user).await else {
            return Ok(None);
        };
        let holder = self.holder.borrow();
        if !holder.as_ref().is_some_and(|h| h.is_within(&outer)) {
            return Err(Failure::unknown("another is there to descend from"));
        }
        Ok(Some(Origin::Descent(Box::new(descent))))
    }

    /// What those who attach are told of a zygote.
    fn attached(&self, living: &Living) -> Attached {
        Attached {
            uid: self.user.uid,
            gid: self.user.gid,
            // One that was forked from another has that one's filter.
            profile: match &living.parent {
                Some(parent) => parent.profile().to_owned(),
                None => self.profile.borrow().clone(),
            },
        }
    }

    /// Says in the status and to the node what a zygote has become.
    fn tell(&self, living: &Living) {
        let Living { warm, parent, .. } = living;
        let parent = self.parent(parent.is_some());
        let modules: Vec<_> = warm
            .modules
            .iter()
            .map(|m| json!({"name": m.name, "micros": m.micros}))
            .collect();
        *self.document.borrow_mut() = json!({"ready": true, "resting": false, "importMicros": warm.import_micros, "modules": modules, "parent": parent});
        if let Some(membership) = &*self.membership.borrow() {
            membership.begins(warm.import_micros);
        }
    }

    /// A line in the container's log.
    fn log(&self, line: &str) {
        if let Some((_, stderr)) = &*self.output.borrow() {
            crate::stdio::say(stderr, line);
        }
    }

    /// Waits for a zygote that was told what to be, or its end, or the end of all patience.
    async fn configured(
        &self,
        container: &Container,
        configured: impl Future<Output = sock_zygote::Result<(Zygote, Warm)>>,
        process: &ZygoteProcess,
        until: Instant,
    ) -> Result<(Zygote, Warm), String> {
        let ended = async {
            process.ended().await;
            let end = process.end(container);
            format!(
                "its interpreter {end} while it imported and warmed up: see the log of container zygote"
            )
        };
        tokio::pin!(ended);
        let setup = &self.config.setup;
        let begun = Instant::now();
        let until = (begun + WARM_WITHIN).min(until);
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

    /// After the end of the container. What it made for its leaves ends with the last of them.
    pub fn finish(&self) {
        self.status.take();
        self.origin.take();
        self.output.take();
        let is_member = self.membership.take().is_some();
        if let Some(task) = self.tending.take() {
            task.abort();
        }
        if is_member {
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

/// Serves a pool for as long as its container is there, with the zygote that it has and those that come after.
async fn tend(
    container: Rc<Container>,
    init: Rc<Process>,
    broker: Broker,
    membership: Rc<Membership>,
    mut living: Living,
) {
    let super::Role::Zygote(pool) = &container.role else {
        return;
    };
    loop {
        match serve(pool, &container, &broker, &membership, &living).await {
            Next::Gone => {
                let how = living.process.end(&container);
                tracing::warn!(%how, "the zygote is gone");
                return end(&init, how.status());
            }
            Next::Replaced => {
                tracing::info!("ends, to descend from the zygote of what it extends");
                return end(&init, 0);
            }
            Next::Rests => {}
        }
        if !rest(pool, &container, living).await {
            tracing::warn!("what the zygote has started does not end: the container does");
            return end(&init, 0);
        }
        membership.rests();
        let again = tokio::select! {
            again = until_back(pool, &container, &broker, &membership) => again,
            _ = init.wait() => return,
        };
        living = match again {
            Ok(living) => living,
            Err(reason) => {
                // It is made anew, and tells kubelet if it cannot be.
                tracing::warn!(%reason, "the zygote did not come back");
                return end(&init, 0);
            }
        };
        pool.log("the zygote is there again");
        pool.tell(&living);
    }
}

/// Gives leaves' shims channels to a zygote as long as it is to be.
async fn serve(
    pool: &ZygoteContainer,
    container: &Container,
    broker: &Broker,
    membership: &Membership,
    living: &Living,
) -> Next {
    let serve = async {
        let user = match &*pool.holder.borrow() {
            Some(holder) => holder.user.try_clone().ok(),
            None => None,
        };
        if let Some(user) = user {
            let attached = pool.attached(living);
            let reason = broker
                .serve(&living.zygote, user.as_fd(), &attached, membership.leaves())
                .await;
            tracing::info!(error = %reason, "zygote is gone");
        }
        std::future::pending().await
    };
    let replaced = async {
        match &living.parent {
            Some(parent) => parent.replaced().await,
            None => descent::until_it_could(&pool.config, pool.user).await,
        }
    };
    let cgroup = container.cgroup.borrow().clone();
    let too_many = async {
        match &cgroup {
            Some(cgroup) => {
                let pid = living.process.pid;
                membership.is_to_end(Subject { cgroup, pid }).await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = living.process.ended() => Next::Gone,
        () = replaced => Next::Replaced,
        () = too_many => Next::Rests,
        never = serve => never,
    }
}

/// Ends a zygote whose container stays. False if something is left of it.
async fn rest(pool: &ZygoteContainer, container: &Container, living: Living) -> bool {
    let Living {
        zygote, process, ..
    } = living;
    tracing::info!(
        package_set = pool.config.name.package_set,
        "the zygote rests"
    );
    pool.log("the zygote has ended, so that the node has memory for others: it comes back when a Function asks for it");
    if let Some(document) = pool.document.borrow_mut().as_object_mut() {
        document.insert("resting".into(), true.into());
    }
    drop(zygote);
    process.kill();
    let ended = tokio::time::timeout(REAPED_WITHIN, process.ended()).await;
    // Its spares, and what packages have started, which may go on starting.
    for pause in 1..=20 {
        if end_others(container) == 0 {
            return ended.is_ok();
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    false
}

/// Ends what a zygote has left in its container. Yields how many processes that were.
fn end_others(container: &Container) -> usize {
    let Some(cgroup) = container.cgroup.borrow().clone() else {
        return 0;
    };
    let execs = container.execs.borrow();
    let is_other =
        |pid: &i32| *pid != container.init.pid() && execs.values().all(|exec| exec.pid() != *pid);
    let others = cgroup.processes().into_iter().flatten().filter(is_other);
    let open = |pid: i32| {
        let number = rustix::process::Pid::from_raw(pid)?;
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty());
        Some((pid, pidfd.ok()?))
    };
    let others: Vec<_> = others.filter_map(open).collect();
    // A number may have become another's before it was opened, who is not in the cgroup.
    let there = cgroup.processes().unwrap_or_default();
    let there = others.iter().filter(|(pid, _)| there.contains(pid));
    there.map(|(_, pidfd)| signal(pidfd, libc::SIGKILL)).count()
}

/// While there is no zygote: waits until one is asked for and may be, and starts it. Whoever asks meanwhile is told that there is none.
async fn until_back(
    pool: &ZygoteContainer,
    container: &Container,
    broker: &Broker,
    membership: &Membership,
) -> Result<Living, Failure> {
    let mut asked = None;
    loop {
        broker.refuse().await.map_err(Failure::unknown)?;
        if !membership.may_begin(&mut asked) {
            continue;
        }
        let refuse = async {
            loop {
                if let Err(error) = broker.refuse().await {
                    return error;
                }
            }
        };
        let back = async {
            let Some(origin) = pool.origin_again().await? else {
                return Ok(None);
            };
            membership.starts(pool.parent(origin.descends()));
            let until = Instant::now() + READY_WITHIN;
            pool.begin(container, origin, until).await.map(Some)
        };
        let back = tokio::select! {
            back = back => back,
            error = refuse => Err(Failure::unknown(error)),
        };
        match back {
            Ok(Some(living)) => return Ok(living),
            // What it extends rests, too, and may not come back: the nearest ancestor that lives serves its Functions.
            Ok(None) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Ends a container's first process, and says that it ended so.
fn end(first: &Process, status: u32) {
    first.end_as(status);
    if let Err(error) = first.signal(libc::SIGKILL) {
        tracing::warn!(%error, "the container of a zygote that is gone is left");
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
