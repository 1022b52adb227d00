//! What faults are injected into: two Functions of two pods each on a PackageSet, with a client on the
//! control plane's node, which has none of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::traffic::Traffic;
use crate::cluster::{self, Equipped, Node};
use crate::node::now;
use crate::node::traffic::{Fate, Request, Target};
use crate::objects::{self, PORT};

/// Where all of it is.
pub const NAMESPACE: &str = "sock-bench-faults";
/// The PackageSet.
const SET: &str = "faults";
/// A leaf of it serves many requests.
pub const KEPT: &str = "kept";
/// A leaf of it serves one.
pub const FRESH: &str = "fresh";
/// Has no pod; a change of it shows that the operator works.
const PROBE: &str = "probe";
/// The operator's namespace and label.
pub const OPERATOR: (&str, &str) = ("sock-system", "app.kubernetes.io/name=sock-operator");

const REPLICAS: usize = 2;
const EVERY_MILLIS: u64 = 200;
const END_AFTER_MILLIS: u64 = 1000;
const STEADY_WITHIN: Duration = Duration::from_secs(240);
/// As long as nothing may fail before a fault, and after one.
pub const CLEAN_MICROS: u64 = 1_000_000;

const CODE: &str = include_str!("../../functions/traced.py");
const WARM_UP: &str = include_str!("../../functions/traced_warm_up.py");

/// A pod at this moment.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// The Function that it serves; none for a pool.
    pub function: Option<String>,
    /// Changes when its container is started anew.
    pub container: String,
    ready: bool,
    /// Its IP.
    pub address: Option<IpAddr>,
}

/// What must have changed for the cluster to be whole again.
#[derive(Debug, Clone, Default)]
pub struct Renewal {
    /// Containers that must have been replaced, in pods of these UIDs.
    pub containers: BTreeMap<String, String>,
    /// Zygotes that are gone: leaves come from others.
    pub zygotes: BTreeSet<String>,
    /// Commands that must succeed on nodes.
    pub checks: Vec<(String, &'static str)>,
    /// The operator must do something.
    pub operator: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Stage {
    /// The nodes that have sock.
    pub workers: Vec<Equipped>,
    /// Of the control plane.
    pub control: Equipped,
    /// What is sent.
    pub traffic: Traffic,
    services: Vec<(String, SocketAddr)>,
}

impl Stage {
    /// Makes it all.
    ///
    /// # Errors
    /// If something does not become ready.
    pub fn set() -> Result<Stage> {
        let workers = Node::all()?;
        let control = control_plane(&workers)?.equip()?;
        let workers = workers
            .iter()
            .map(Node::equip)
            .collect::<Result<Vec<_>>>()?;
        cluster::apply(&objects(workers.len()))?;
        cluster::wait_until("Ready", NAMESPACE, &format!("packageset/{SET}"), 300)?;
        let mut services = Vec::new();
        for function in [KEPT, FRESH] {
            cluster::wait_until("Ready", NAMESPACE, &format!("function/{function}"), 180)?;
            let service = cluster::get(&["service", "-n", NAMESPACE, function])?;
            let address = service["spec"]["clusterIP"].as_str().context("clusterIP")?;
            services.push((function.to_owned(), (address.parse::<IpAddr>()?, 80).into()));
        }
        let traffic = Traffic::start(&control)?;
        Ok(Stage {
            workers,
            control,
            traffic,
            services,
        })
    }

    /// A worker by name.
    ///
    /// # Errors
    /// If there is none of it.
    pub fn worker(&self, name: &str) -> Result<&Equipped> {
        let mut workers = self.workers.iter();
        let found = workers.find(|worker| worker.node.name == name);
        found.with_context(|| format!("no worker {name}"))
    }

    /// Waits until all is well, with traffic.
    ///
    /// # Errors
    /// If it does not become so.
    pub fn steady(&mut self) -> Result<Vec<Pod>> {
        let deadline = Instant::now() + STEADY_WITHIN;
        loop {
            let found = self.look(&Renewal::default());
            if let Ok(pods) = &found
                && self.is_clean(pods)
                && operator_is_there()
            {
                return found;
            }
            if Instant::now() > deadline {
                let failed: Vec<_> = self.failures(now().saturating_sub(CLEAN_MICROS)).collect();
                return Err(match found {
                    Err(error) => error.context("not steady in time"),
                    Ok(_) => anyhow::anyhow!("not steady in time: {failed:?}"),
                });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Whether the last second had no failure, and every pod of [`FRESH`] answered by a fork.
    fn is_clean(&self, pods: &[Pod]) -> bool {
        let recent = self.traffic.since(now().saturating_sub(CLEAN_MICROS));
        let forked = |pod: &Pod| recent.iter().any(|request| is_forked(request, &pod.name));
        let mut fresh = pods
            .iter()
            .filter(|pod| pod.function.as_deref() == Some(FRESH));
        let all = self
            .traffic
            .targets()
            .iter()
            .all(|target| recent.iter().any(|request| request.target == target.name));
        all && fresh.all(forked) && recent.iter().all(|request| request.fate.is_good())
    }

    /// What failed and was known at `from` or later.
    pub fn failures(&self, from: u64) -> impl Iterator<Item = Request> {
        let requests = self.traffic.since(from).into_iter();
        requests.filter(|request| !request.fate.is_good())
    }

    /// The zygote that the pods of a node were forked from last.
    #[must_use]
    pub fn zygote_of(&self, node: &str, pods: &[Pod]) -> Option<String> {
        let on_node: BTreeSet<&str> = pods
            .iter()
            .filter(|pod| pod.node == node)
            .map(|pod| pod.name.as_str())
            .collect();
        let recent = self.traffic.since(now().saturating_sub(CLEAN_MICROS));
        recent
            .into_iter()
            .rev()
            .find_map(|request| match request.fate {
                Fate::Served { pod, zygote } if on_node.contains(pod.as_str()) => zygote,
                _ => None,
            })
    }

    /// The pods, if all of them are ready and what had to change has; the traffic follows them.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn look(&mut self, renewal: &Renewal) -> Result<Vec<Pod>> {
        for (node, check) in &renewal.checks {
            let node = Node { name: node.clone() };
            node.shell(check)
                .with_context(|| format!("{}: {check}", node.name))?;
        }
        let mut pods = pods(NAMESPACE, None)?;
        self.traffic.aim(self.targets(&pods))?;
        if renewal.operator {
            pods.extend(self::pods(OPERATOR.0, Some(OPERATOR.1))?);
        }
        for pod in &pods {
            if !pod.ready {
                bail!("pod {} is not ready", pod.name);
            }
            if renewal.containers.get(&pod.uid) == Some(&pod.container) {
                bail!("pod {} has its old container", pod.name);
            }
        }
        for (function, expected) in [
            (Some(KEPT), REPLICAS),
            (Some(FRESH), REPLICAS),
            (None, self.workers.len()),
        ] {
            let there = pods
                .iter()
                .filter(|pod| pod.namespace == NAMESPACE && pod.function.as_deref() == function);
            let there = there.count();
            if there != expected {
                bail!("{there} pods instead of {expected} of {function:?}");
            }
        }
        if renewal.operator {
            operator_works()?;
        }
        Ok(pods)
    }

    fn targets(&self, pods: &[Pod]) -> Vec<Target> {
        let target = |name: String, address, kept| Target {
            name,
            address,
            every_millis: EVERY_MILLIS,
            kept,
        };
        let mut targets: Vec<Target> = self
            .services
            .iter()
            .map(|(name, address)| target(format!("service {name}"), *address, false))
            .collect();
        for pod in pods {
            let (Some(function), Some(address)) = (&pod.function, pod.address) else {
                continue;
            };
            let address: SocketAddr = (address, PORT).into();
            targets.push(target(format!("pod {}", pod.name), address, false));
            if function == KEPT {
                targets.push(target(format!("connection {}", pod.name), address, true));
            }
        }
        targets
    }

    /// Lets all leaves end.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn fall_silent(&mut self) -> Result<()> {
        self.traffic.aim(Vec::new())?;
        std::thread::sleep(Duration::from_millis(END_AFTER_MILLIS * 3));
        Ok(())
    }

    /// Removes it all.
    ///
    /// # Errors
    /// If the API server does not.
    pub fn strike(mut self) -> Result<()> {
        self.traffic.aim(Vec::new())?;
        let arguments = [
            "delete",
            "namespace",
            NAMESPACE,
            "--ignore-not-found",
            "--timeout=180s",
        ];
        cluster::kubectl(&arguments)?;
        Ok(())
    }
}

/// Whether the pod has answered this by a leaf of a zygote.
#[must_use]
fn is_forked(request: &Request, name: &str) -> bool {
    matches!(&request.fate, Fate::Served { pod, zygote: Some(_) } if pod == name)
}

fn control_plane(workers: &[Node]) -> Result<Node> {
    let list = cluster::get(&["nodes", "-l", "node-role.kubernetes.io/control-plane"])?;
    let name = list["items"][0]["metadata"]["name"].as_str();
    let name = name.context("no node of the control plane")?.to_owned();
    if workers.iter().any(|worker| worker.name == name) {
        bail!("{name} has sock: the client needs a node that faults do not hit");
    }
    Ok(Node { name })
}

fn objects(workers: usize) -> Vec<Value> {
    let set = json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": {"namespace": NAMESPACE, "name": SET},
        "spec": {"image": objects::IMAGE, "imports": ["json"], "warmUp": WARM_UP},
    });
    let function = |name: &str, reuse: &str, replicas: usize| {
        let idle = json!({"freezeAfterMs": 500, "endAfterMs": END_AFTER_MILLIS});
        objects::function(
            NAMESPACE,
            name,
            &json!({
                "packageSet": SET, "handler": "app.handler", "source": {"inline": CODE},
                "replicas": replicas, "reuse": reuse, "idle": idle, "timeoutSeconds": 30,
            }),
        )
    };
    debug_assert!(workers > 0);
    vec![
        objects::tenant(NAMESPACE),
        set,
        function(KEPT, "Always", REPLICAS),
        function(FRESH, "Never", REPLICAS),
        function(PROBE, "Always", 0),
    ]
}

fn pods(namespace: &str, selector: Option<&str>) -> Result<Vec<Pod>> {
    let mut arguments = vec!["--request-timeout=5s", "pods", "-n", namespace];
    if let Some(selector) = selector {
        arguments.extend(["-l", selector]);
    }
    let list = cluster::get(&arguments)?;
    let items = list["items"].as_array().context("a list of pods")?;
    Ok(items
        .iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .map(|pod| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            let mut conditions = conditions.filter(|one| one["type"] == "Ready");
            Pod {
                namespace: namespace.to_owned(),
                name: text(&pod["metadata"]["name"]),
                uid: text(&pod["metadata"]["uid"]),
                node: text(&pod["spec"]["nodeName"]),
                function: pod["metadata"]["labels"]["sock.dev/function"]
                    .as_str()
                    .map(str::to_owned),
                container: text(&pod["status"]["containerStatuses"][0]["containerID"]),
                ready: conditions.any(|one| one["status"] == "True"),
                address: pod["status"]["podIP"]
                    .as_str()
                    .and_then(|ip| ip.parse().ok()),
            }
        })
        .collect())
}

/// The pods of the operator.
///
/// # Errors
/// If the API server does not answer.
pub fn operators() -> Result<Vec<Pod>> {
    pods(OPERATOR.0, Some(OPERATOR.1))
}

/// Its pod is made anew between rounds: kubelet would wait longer and longer for a container that is killed again and again.
fn operator_is_there() -> bool {
    operators().is_ok_and(|all| !all.is_empty() && all.iter().all(|pod| pod.ready))
}

/// Whether the operator has seen the last change of [`PROBE`].
fn operator_works() -> Result<()> {
    let probe = cluster::get(&["--request-timeout=5s", "function", "-n", NAMESPACE, PROBE])?;
    if probe["status"]["observedGeneration"] != probe["metadata"]["generation"] {
        bail!("the operator has not seen the last change");
    }
    Ok(())
}

/// Changes [`PROBE`], which the operator must see.
///
/// # Errors
/// If the API server does not take it.
pub fn change_probe(round: usize) -> Result<()> {
    let patch = json!({"spec": {"timeoutSeconds": 20 + round % 800}}).to_string();
    let arguments = [
        "patch",
        "function",
        "-n",
        NAMESPACE,
        PROBE,
        "--type=merge",
        "-p",
        &patch,
    ];
    cluster::kubectl(&arguments)?;
    Ok(())
}
