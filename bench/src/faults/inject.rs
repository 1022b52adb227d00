//! The faults.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::stage::{FRESH, KEPT, Pod, Renewal, Stage, operators};
use crate::cluster::{self, Equipped};
use crate::node::kill::{Killed, Victim};
use crate::node::now;
use crate::objects::PORT;

/// A thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a leaf of a Function that keeps its leaves.
    Leaf,
    /// `kill -9` of a zygote.
    Zygote,
    /// `kill -9` of the shim of a Function's pod.
    Shim,
    /// `kill -9` of the shim of a pool's pod.
    PoolShim,
    /// `kill -9` of a node's containerd.
    Containerd,
    /// `kill -9` of a node's kubelet.
    Kubelet,
    /// `kill -9` of the operator.
    Operator,
    /// `kill -9` of the API server, which stays away.
    ApiServer,
    /// The container that is a node is killed and started.
    Node,
    /// A node's `/run` is full for a while, and a pod is to start there.
    Disk,
    /// A leaf of a pod without a limit takes all memory that its node has left.
    Memory,
}

/// All, in the order of the report.
pub const ALL: [Fault; 11] = [
    Fault::Leaf,
    Fault::Zygote,
    Fault::Shim,
    Fault::PoolShim,
    Fault::Containerd,
    Fault::Kubelet,
    Fault::Operator,
    Fault::ApiServer,
    Fault::Node,
    Fault::Disk,
    Fault::Memory,
];

/// What was done.
#[derive(Debug)]
pub struct Injected {
    /// When it began, in microseconds since 1970.
    pub at: u64,
    /// When the killed process was gone: what was sent until then may have reached it.
    pub gone: u64,
    /// When it was over: recovery is counted from here.
    pub over: u64,
    /// What shows that it is repaired.
    pub renewal: Renewal,
    /// The pod whose container was hit: it gets a successor before the next round, since kubelet waits the
    /// longer the more often a container has ended.
    pub worn: Option<Pod>,
    /// The pod whose requests the killed process was serving.
    pub served: Option<String>,
    /// What was seen meanwhile.
    pub seen: Option<String>,
}

impl Fault {
    /// As it is called in the report and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Fault::Leaf => "leaf",
            Fault::Zygote => "zygote",
            Fault::Shim => "shim",
            Fault::PoolShim => "pool-shim",
            Fault::Containerd => "containerd",
            Fault::Kubelet => "kubelet",
            Fault::Operator => "operator",
            Fault::ApiServer => "apiserver",
            Fault::Node => "node",
            Fault::Disk => "disk",
            Fault::Memory => "memory",
        }
    }

    /// Does it. Rounds take turns among pods and nodes. `away`: how long the API server stays away.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn inject(
        self,
        stage: &Stage,
        pods: &[Pod],
        round: usize,
        away: Duration,
    ) -> Result<Injected> {
        let worker = &stage.workers[round % stage.workers.len()];
        let name = worker.node.name.clone();
        let of_function = |function: &str| {
            let all: Vec<&Pod> = pods
                .iter()
                .filter(|pod| pod.function.as_deref() == Some(function))
                .collect();
            all.get(round % all.len().max(1))
                .copied()
                .context("no pod of the Function")
        };
        let on_node = |is: fn(Option<&str>) -> bool| {
            let mut here = pods.iter().filter(|pod| pod.node == name);
            here.find(|pod| is(pod.function.as_deref()))
                .context("no such pod on the node")
        };
        let pool = || on_node(|function| function.is_none());
        let mut renewal = Renewal::default();
        let (killed, worn, served) = match self {
            Fault::Leaf => {
                let pod = of_function(KEPT)?;
                let killed = kill(stage.worker(&pod.node)?, &Victim::Leaf(pod.uid.clone()))?;
                (killed, None, Some(pod.name.clone()))
            }
            Fault::Zygote | Fault::PoolShim => {
                let pool = pool()?;
                let zygote = stage.zygote_of(&name, pods);
                renewal
                    .zygotes
                    .insert(zygote.context("no answer of a zygote")?);
                renew(&mut renewal, pool);
                let victim = if self == Fault::Zygote {
                    Victim::Zygote(pool.uid.clone())
                } else {
                    Victim::Shim(pool.uid.clone())
                };
                (kill(worker, &victim)?, Some(pool.clone()), None)
            }
            Fault::Shim => {
                let pod = of_function(if round.is_multiple_of(2) { KEPT } else { FRESH })?;
                renew(&mut renewal, pod);
                let killed = kill(stage.worker(&pod.node)?, &Victim::Shim(pod.uid.clone()))?;
                (killed, Some(pod.clone()), Some(pod.name.clone()))
            }
            Fault::Containerd => {
                // Away for as long as systemd waits before it starts it again.
                renewal.checks.push((name, "crictl version >/dev/null"));
                (
                    kill(worker, &Victim::Program("containerd".into()))?,
                    None,
                    None,
                )
            }
            Fault::Kubelet => {
                let check = "curl --silent --fail http://127.0.0.1:10248/healthz";
                renewal.checks.push((name, check));
                (
                    kill(worker, &Victim::Program("kubelet".into()))?,
                    None,
                    None,
                )
            }
            Fault::Operator => {
                let operators = operators()?;
                let operator = operators.first().context("no operator")?;
                renewal.operator = true;
                renew(&mut renewal, operator);
                let victim = Victim::Program("sock-operator".into());
                let killed = kill(stage.worker(&operator.node)?, &victim)?;
                (killed, Some(operator.clone()), None)
            }
            Fault::ApiServer => return api_server(stage, away),
            Fault::Node => return restart(worker, pods),
            Fault::Disk => return fill(worker, on_node(|function| function.is_some())?),
            Fault::Memory => {
                return exhaust(stage, worker, on_node(|function| function == Some(FRESH))?);
            }
        };
        Ok(Injected {
            at: killed.at,
            gone: killed.gone,
            over: killed.at,
            renewal,
            worn,
            served,
            seen: None,
        })
    }
}

fn renew(renewal: &mut Renewal, pod: &Pod) {
    renewal
        .containers
        .insert(pod.uid.clone(), pod.container.clone());
}

fn kill(node: &Equipped, victim: &Victim) -> Result<Killed> {
    node.job("kill", victim)
}

/// A static pod stays away as long as its manifest does.
fn api_server(stage: &Stage, away: Duration) -> Result<Injected> {
    const MANIFEST: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";
    const ASIDE: &str = "/etc/kubernetes/kube-apiserver.yaml.aside";
    let control = &stage.control;
    control.node.shell(&format!("mv {MANIFEST} {ASIDE}"))?;
    let killed = kill(control, &Victim::Program("kube-apiserver".into()));
    std::thread::sleep(away);
    let back = control.node.shell(&format!("mv {ASIDE} {MANIFEST}"));
    let killed = killed?;
    back?;
    Ok(Injected {
        at: killed.at,
        gone: killed.gone,
        over: now(),
        renewal: Renewal {
            operator: true,
            ..Renewal::default()
        },
        worn: None,
        served: None,
        seen: None,
    })
}

/// As if its power had failed.
fn restart(worker: &Equipped, pods: &[Pod]) -> Result<Injected> {
    let mut renewal = Renewal::default();
    for pod in pods.iter().filter(|pod| pod.node == worker.node.name) {
        renew(&mut renewal, pod);
    }
    let at = now();
    cluster::docker(&["kill", &worker.node.name])?;
    cluster::docker(&["start", &worker.node.name])?;
    Ok(Injected {
        at,
        gone: at,
        over: now(),
        renewal,
        worn: None,
        served: None,
        seen: None,
    })
}

/// Leaves no room in `/run`, which is in memory, and has a pod start there. The file system is made smaller first,
/// so that little fills it.
fn fill(worker: &Equipped, pod: &Pod) -> Result<Injected> {
    // What the pod that ends there gives back is taken again at once.
    const FILL: &str = "used=$(df --output=used -k /run | tail -1); \
        mount -o remount,size=$((used + 256))k /run; touch /run/filling; \
        while [ -e /run/filling ]; do \
            dd if=/dev/zero of=/run/full oflag=append conv=notrunc bs=1k 2>/dev/null; sleep 0.02; \
        done >/dev/null 2>&1 & \
        sleep 0.2";
    const EMPTY: &str = "rm /run/filling; sleep 0.2; rm /run/full; mount -o remount,size=50% /run";
    worker.node.shell(FILL)?;
    let outcome =
        kill(worker, &Victim::Shim(pod.uid.clone())).and_then(|killed| Ok((killed, told(pod)?)));
    worker.node.shell(EMPTY)?;
    let (killed, seen) = outcome?;
    let mut renewal = Renewal::default();
    renew(&mut renewal, pod);
    Ok(Injected {
        at: killed.at,
        gone: killed.gone,
        over: now(),
        renewal,
        worn: Some(pod.clone()),
        served: Some(pod.name.clone()),
        seen: Some(seen),
    })
}

/// The pods of a node get a limit of memory a little above what they use, as kubelet gives them one
/// (`enforceNodeAllocatable`), and a request takes all of that. What is not a pod does not compete: with a limit for
/// the whole node the kernel takes pages of kubelet and containerd, which read them again, and kills nobody as long as
/// there are such.
fn exhaust(stage: &Stage, worker: &Equipped, pod: &Pod) -> Result<Injected> {
    const ROOM: u64 = 128 << 20;
    // Of either cgroup version, and with either driver.
    const PODS: &str = "cd /sys/fs/cgroup; [ ! -d memory ] || cd memory; \
        cd \"$(find . -maxdepth 2 -type d '(' -name '*kubepods.slice' -o -name kubepods ')' | head -n 1)\"; \
        if [ -e memory.max ]; then used=memory.current limit=memory.max; \
        else used=memory.usage_in_bytes limit=memory.limit_in_bytes; fi";
    let node = &worker.node;
    let state = node.shell(&format!("{PODS}; cat $used $limit"))?;
    let (used, before) = state
        .trim()
        .split_once('\n')
        .with_context(|| state.clone())?;
    let most = used.parse::<u64>().with_context(|| state.clone())? + ROOM;
    let limit = |bytes: &str| node.shell(&format!("{PODS}; echo {bytes} >$limit"));
    let address = pod.address.context("the pod has no address")?;
    let request = format!(
        "curl --silent --max-time 60 'http://{address}:{PORT}/?request=greedy&megabytes={}'",
        most >> 20
    );
    let at = now();
    limit(&most.to_string())?;
    let answer = stage.control.node.shell(&request);
    limit(before)?;
    let answer = answer?;
    if !answer.contains("ran out of memory") {
        bail!("a leaf that takes all memory is answered for by {answer:?}");
    }
    Ok(Injected {
        at,
        gone: at,
        over: now(),
        renewal: Renewal::default(),
        worn: None,
        served: None,
        seen: Some(answer),
    })
}

/// The event of a pod that says what is full.
fn told(pod: &Pod) -> Result<String> {
    let field = format!("involvedObject.name={}", pod.name);
    let mut said = BTreeSet::new();
    for _ in 0..60 {
        let events = cluster::get(&["events", "-n", &pod.namespace, "--field-selector", &field])?;
        for event in events["items"].as_array().into_iter().flatten() {
            let message = event["message"].as_str().unwrap_or_default();
            if message.contains("no space left on device") {
                return Ok(message.to_owned());
            }
            said.insert(message.to_owned());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    bail!(
        "no event of pod {} says that the disk is full: {said:?}",
        pod.name
    )
}
