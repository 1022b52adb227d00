//! The container of a Function: a holder, and [`Activation`].
//!
//! While nobody calls, nothing of an interpreter is in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Duration;

use oci_spec::runtime::{Process as ProcessSpec, Spec};
use sock_sandbox::{Stdio, namespace, seccomp};
use sock_zygote::protocol::{LeafSetup, Rlimit};

use super::{CACHE, POOLS, SITE_PACKAGES, add_payload, packages, profile};
use crate::activation::{
    Activation, BelowContainer, Directory, FunctionConfig, Interpreter, LeafCgroup, Local, Output,
    Pools, Streams, Surroundings, ZygoteName, Zygotes,
};
use crate::children::Claim;
use crate::container::Container;
use crate::locks;
use crate::process::run_program;
use crate::task::Failure;

/// Largest request body that a leaf accepts.
const MAX_BODY: u64 = 32 << 20;
/// Where a Function's code is mounted.
const CODE: &str = "/srv/function";

/// A Function's container.
pub struct FunctionContainer {
    config: FunctionConfig,
    activation: RefCell<Option<Rc<Activation>>>,
    /// What the handler writes goes here.
    output: RefCell<Option<(OwnedFd, OwnedFd)>>,
}

impl FunctionContainer {
    pub(super) fn prepare(
        spec: &mut Spec,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, Failure> {
        let config = FunctionConfig::from_annotations(annotations).map_err(Failure::invalid)?;
        let config =
            config.ok_or_else(|| Failure::invalid("annotation sock.dev/function is missing"))?;
        add_payload(spec, config.zygote.as_ref().and_then(packages))?;
        Ok(Self {
            config,
            activation: RefCell::default(),
            output: RefCell::default(),
        })
    }

    /// Keeps the container's output for its leaves; the holder writes nothing.
    ///
    /// # Errors
    /// `/dev/null` cannot be opened.
    pub fn keep_output(&self, streams: Stdio) -> Result<(), Failure> {
        *self.output.borrow_mut() = Some(super::output(streams)?);
        Ok(())
    }

    /// Listens, and returns when the handler was imported once.
    ///
    /// # Errors
    /// The line that the author of the Function must mend.
    pub async fn activate(&self, container: &Rc<Container>) -> Result<(), Failure> {
        let mut setup = leaf_setup(&container.spec)?;
        self.config.complete(&mut setup);
        let (stdout, stderr) = match &*self.output.borrow() {
            Some((out, err)) => (out.try_clone()?, err.try_clone()?),
            None => return Err(Failure::precondition("the container has no output")),
        };
        let cgroup = container.own_cgroup()?;
        cgroup.delegate(container.init.pid())?;
        let zygotes: Option<Rc<dyn Zygotes>> = match &self.config.zygote {
            Some(name) => {
                let mounts = namespace::of_process(container.init.pid(), "mnt")?;
                let linux = container.spec.linux().as_ref();
                let profile = linux.and_then(|l| l.seccomp().as_ref());
                let profile = profile.map(profile::for_leaves).transpose()?;
                let pools = Pools::new(self.directories(name), mounts, &setup, profile);
                let pools = pools.map_err(Failure::unknown)?;
                Some(Rc::new(
                    pools.staying_in(cgroup.clone(), container.init.pid()),
                ))
            }
            None => None,
        };
        let interpreter = Rc::new(ContainerCommand {
            container: Rc::downgrade(container),
        });
        let output = Output::new(stdout, stderr, setup.uid)?;
        let mut surroundings = Surroundings::new(
            zygotes,
            interpreter,
            Rc::new(BelowContainer::new(cgroup)),
            Rc::new(output),
            setup,
        );
        surroundings.oom_score_adj = container
            .spec
            .process()
            .as_ref()
            .and_then(ProcessSpec::oom_score_adj);
        let activation = Activation::start(&self.config, surroundings)
            .await
            .map_err(Failure::unknown)?;
        *self.activation.borrow_mut() = Some(Rc::new(activation));
        Ok(())
    }

    /// Where zygotes are that this Function may use: its own, and ancestors that hold no package which is not its own.
    fn directories(&self, name: &ZygoteName) -> Vec<Directory> {
        let own = Directory::own(name.pools(Path::new(POOLS)));
        let others = self.config.ancestors.iter().map(|ancestor| {
            let path = ancestor.pools(&name.tenant, Path::new(POOLS));
            let (tenant, lock, ancestor) =
                (name.tenant.clone(), name.lock.clone(), ancestor.clone());
            Directory::of_others(path, move || {
                locks::may_descend(Path::new(CACHE), &tenant, &lock, &ancestor)
            })
        });
        [own].into_iter().chain(others).collect()
    }

    /// See [`Activation::drain`].
    pub fn drain(&self) {
        if let Some(activation) = &*self.activation.borrow() {
            activation.drain();
        }
    }

    /// Stops accepting and lets requests finish. Returns when no leaf is left.
    pub async fn stop(&self, grace: Duration) {
        let activation = self.activation.borrow().clone();
        if let Some(activation) = activation {
            activation.stop(grace).await;
        }
    }

    /// How long a request may take at most.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.config.timeout
    }

    /// After the container's end.
    pub fn finish(&self) {
        self.activation.take();
        self.output.take();
    }
}

/// What leaves are told of the container, from its specification.
///
/// # Errors
/// A specification without a process, or with a seccomp profile that cannot be compiled.
pub fn leaf_setup(spec: &Spec) -> Result<LeafSetup, Failure> {
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Failure::invalid("process is missing"))?;
    let linux = spec.linux().as_ref();
    let annotations = spec.annotations().clone().unwrap_or_default();
    let from_containerd = |key: &str| {
        annotations
            .get(&format!("io.kubernetes.cri.{key}"))
            .cloned()
            .unwrap_or_default()
    };
    let pod = from_containerd("sandbox-name");
    let strings = |list: Option<&Vec<String>>| list.cloned().unwrap_or_default();
    Ok(LeafSetup {
        handler: String::new(),
        path: vec![CODE.into(), SITE_PACKAGES.into()],
        env: process
            .env()
            .iter()
            .flatten()
            .filter_map(|e| {
                e.split_once('=')
                    .map(|(n, v)| (n.to_string(), v.to_string()))
            })
            .collect(),
        cwd: process.cwd().to_string_lossy().into_owned(),
        hostname: pod.chars().take(63).collect(),
        function: String::new(),
        namespace: from_containerd("sandbox-namespace"),
        pod,
        uid: process.user().uid(),
        gid: process.user().gid(),
        masked_paths: strings(linux.and_then(|l| l.masked_paths().as_ref())),
        readonly_paths: strings(linux.and_then(|l| l.readonly_paths().as_ref())),
        rlimits: sock_sandbox::rlimits(process)
            .into_iter()
            .map(|(resource, soft, hard)| Rlimit {
                resource,
                soft,
                hard,
            })
            .collect(),
        seccomp: match linux.and_then(|l| l.seccomp().as_ref()) {
            Some(profile) => seccomp::Program::compile(profile)?.bytes(),
            None => Vec::new(),
        },
        intercept_sockets: true,
        single_request: false,
        park_after_ms: 0,
        max_body: MAX_BODY,
        threads: threads(spec),
        timeout_seconds: 0,
    })
}

/// As many threads as the CPU limit has processors, at least one; without a limit the library decides.
fn threads(spec: &Spec) -> u32 {
    let cpu = spec
        .linux()
        .as_ref()
        .and_then(|l| l.resources().as_ref())
        .and_then(|r| r.cpu().as_ref());
    let limit = cpu.and_then(|c| {
        Some((
            u64::try_from(c.quota()?).ok()?,
            c.period().filter(|p| *p > 0)?,
        ))
    });
    limit
        .filter(|(quota, _)| *quota > 0)
        .map_or(0, |(quota, period)| {
            u32::try_from(quota.div_ceil(period)).unwrap_or(0)
        })
}

/// The container's own command, as a leaf without a zygote.
struct ContainerCommand {
    container: Weak<Container>,
}

impl Interpreter for ContainerCommand {
    fn start<'a>(
        &'a self,
        control: OwnedFd,
        cgroup: &'a dyn LeafCgroup,
        streams: &'a Streams,
    ) -> Local<'a, anyhow::Result<()>> {
        Box::pin(async move {
            let container = self
                .container
                .upgrade()
                .ok_or_else(|| anyhow::anyhow!("the container is gone"))?;
            let entrances = cgroup.entrances()?;
            let (stdout, stderr) = (streams.stdout.as_fd(), streams.stderr.as_fd());
            let launched = container.launch_command(control, stdout, stderr)?;
            let claim = Claim::new(launched.pid);
            let failed = run_program(&launched, &entrances).await?;
            let pidfd =
                crate::async_fd::watch(launched.pidfd.try_clone()?, tokio::io::Interest::READABLE)?;
            tokio::task::spawn_local(async move {
                let _ = pidfd.readable().await;
                // SAFETY: reaps a child that has ended.
                unsafe { libc::waitpid(launched.pid, std::ptr::null_mut(), 0) };
                drop(claim);
            });
            match failed {
                Some(e) => Err(e.into()),
                None => Ok(()),
            }
        })
    }
}
