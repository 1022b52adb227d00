//! The benchmark: sock and its peers on one node, alternately, in one run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{self, Equipped, Node, Pod};
use crate::containers;
use crate::http::Request;
use crate::measure::{
    answered, durations, load, megabytes, millis, packages_directory, weigh, when_idle,
};
use crate::node::load::{Connections, Sample};
use crate::node::memory::{self, Memory};
use crate::node::rate::{Forks, Rate};
use crate::objects::{self, IMAGE, Peer};
use crate::peers;
use crate::progress::Progress;
use crate::stats::{Figure, Samples};
use crate::table::table;
use crate::trace::{Start, Tracing};

const NAMESPACE: &str = "sock-bench";
const PEERS: &str = "sock-bench-peers";
const HELLO: &str = include_str!("../functions/hello.py");
const PREDICT: &str = include_str!("../functions/predict.py");
pub const SCIENCE: &str = include_str!("../../e2e/images/requirements-science.txt");

/// What the science sets do ahead of all leaves, in the words of the handler: it is their users' to write.
pub const SCIENCE_WARM_UP: &str = include_str!("../functions/warm_up.py");

const WARM_UP: usize = 20;
const IDLE_PODS: usize = 10;
const BURST: usize = 100;
const BURSTS: usize = 3;
const TRACED: usize = 30;
/// Seconds of requests as fast as they are answered.
const SUSTAINED: usize = 10;
/// A Function here is idle soon.
const END_AFTER_MILLIS: u64 = 2000;

const FIRST: &str = "the same container on runc, from its start to its first answer";
const KEPT: &str = "Python's http.server on runc, kept connection";
const POD: &str = "an idle pod with the same handler on runc";
const BARE: &str = "fork, exit and wait of a process with the same memory, one for each processor";
const RUNNING: &str = "a running pod with the same handler on runc";

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// Measured requests of each kind.
    pub requests: usize,
    /// Alternations between sock and its peers. Each has one first answer of every peer, which takes seconds.
    pub rounds: usize,
    /// Where the figures go.
    pub out: PathBuf,
    /// Show where the time goes, at the price of restarts of the node's containerd.
    pub trace: bool,
    /// Leave what was made on the cluster, for the next run.
    pub keep: bool,
}

/// Measures, prints, and writes the figures.
///
/// # Errors
/// If something cannot be made or measured, or a request was not answered rightly.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    let node = Node::all()?.swap_remove(0).equip()?;
    let result = report(options, &node, &progress);
    if !options.keep {
        progress.step("removing what was measured");
        let namespaces = [
            "delete",
            "namespace",
            NAMESPACE,
            PEERS,
            "--ignore-not-found",
            "--wait=false",
        ];
        cluster::kubectl(&namespaces)?;
    }
    result
}

fn report(options: &Options, node: &Equipped, progress: &Progress) -> Result<()> {
    let mut figures = measure(options, node, progress)?;
    figures.extend(containers::figures(node, progress)?);
    tell(&figures, &options.out)?;
    if options.trace {
        for (name, sample, start) in traces(node, progress)? {
            println!(
                "\nWhere the time of the median {name} went (origin: {}):\n",
                start.origin
            );
            println!("{}", start.table(&sample));
        }
        containers::tell_start(node, progress, &options.out)?;
    }
    Ok(())
}

/// Prints figures, and writes them.
///
/// # Errors
/// If the file cannot be written.
pub fn tell(figures: &[Figure], out: &Path) -> Result<()> {
    println!("\n{}", figures_table(figures));
    if let Some(directory) = out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(out, serde_json::to_string_pretty(figures)? + "\n")
        .with_context(|| out.display().to_string())?;
    eprintln!("written: {}", out.display());
    Ok(())
}

fn figures_table(figures: &[Figure]) -> String {
    let rows: Vec<Vec<String>> = figures
        .iter()
        .map(|figure| {
            vec![
                figure.name.to_owned(),
                figure.unit.to_owned(),
                figure.n.to_string(),
                format!("{:.2}", figure.p50),
                format!("{:.2}", figure.p99),
                format!("{:.2}", figure.peer_p50),
                format!("{:.1}", figure.ratio),
                figure.peer.to_owned(),
            ]
        })
        .collect();
    table(
        &[
            "name", "unit", "n", "p50", "p99", "peer p50", "ratio", "peer",
        ],
        &rows,
    )
}

/// A Function, measured by requests on new connections.
struct Forked {
    figure: &'static str,
    function: &'static str,
    code: Code,
    samples: Vec<Sample>,
}

/// What a handler does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Hello,
    Predict,
}

impl Code {
    pub fn source(self) -> &'static str {
        match self {
            Code::Hello => HELLO,
            Code::Predict => PREDICT,
        }
    }

    pub fn request(self) -> Request {
        match self {
            Code::Hello => Request {
                method: "GET".to_owned(),
                path: "/?request={n}".to_owned(),
                body: String::new(),
                expect: r#"{"hello": "{n}"}"#.to_owned(),
                part: String::new(),
            },
            Code::Predict => Request {
                method: "POST".to_owned(),
                path: "/".to_owned(),
                body: r#"{"request": {n}, "lengths": [1.4, 4.7, 6.0]}"#.to_owned(),
                expect: r#"{"request": {n}, "widths": [0.219, 1.591, 2.131]}"#.to_owned(),
                part: String::new(),
            },
        }
    }
}

fn measure(options: &Options, node: &Equipped, progress: &Progress) -> Result<Vec<Figure>> {
    let name = &*node.node.name;
    progress.step("PackageSets and Functions");
    cluster::apply(&[objects::tenant(NAMESPACE), objects::unrestricted(PEERS)])?;
    cluster::apply(&package_sets(name))?;
    for set in SETS {
        cluster::wait_until("Ready", NAMESPACE, &format!("packageset/{}", set.0), 300)?;
    }
    cluster::apply(&functions())?;
    let packages = packages_directory(NAMESPACE, "science")?;
    let hello_peer = peer("hello", name, None);
    let predict_peer = peer("predict", name, Some(&packages));
    for (peer, code) in [(&hello_peer, HELLO), (&predict_peer, PREDICT)] {
        cluster::apply(&peer.config_maps(&json!({"data": {"app.py": code}})))?;
    }
    cluster::apply(&[hello_peer.deployment(IDLE_PODS)])?;
    cluster::wait_until("Available", PEERS, "deployment/hello", 180)?;
    for function in FUNCTIONS {
        cluster::wait_until(
            "Ready",
            NAMESPACE,
            &format!("function/{}", function.name),
            180,
        )?;
    }

    progress.step(&format!("memory of {IDLE_PODS} idle pods"));
    let mut figures = Vec::new();
    let idle = when_idle(node, &pods_of(node, "idle", IDLE_PODS)?)?;
    let peers_pods = cluster::ready_pods(PEERS, "peer=hello")?;
    let plain = weigh(node, &peers_pods)?;
    let pss = |memory: &Memory| memory.pss;
    let own = |memory: &Memory| memory.cgroup;
    figures.push(Figure::new(
        "idle_pod_pss",
        "MB",
        &megabytes(&idle, pss)?,
        POD,
        &megabytes(&plain, pss)?,
    ));
    figures.push(Figure::new(
        "idle_pod_cgroup",
        "MB",
        &megabytes(&idle, own)?,
        POD,
        &megabytes(&plain, own)?,
    ));
    if let (Some(idle), Some(plain)) = (idle.first(), plain.first()) {
        progress.step(&format!(
            "processes of an idle pod: {:?}; of its peer: {:?}",
            idle.processes, plain.processes
        ));
    }

    let mut forked = forked();
    let pod = |function| Ok::<_, anyhow::Error>(pods_of(node, function, 1)?.remove(0));
    let warm_pod = pod("warm")?;
    let peer_pod = peers_pods.first().context("no peer")?;
    progress.step("warm-up");
    for each in &forked {
        let pod = pod(each.function)?;
        answered(
            node,
            &load(&pod, each.code.request(), Connections::New, 0, WARM_UP),
        )?;
    }
    let (mut warm, mut warm_peer) = (Vec::new(), Vec::new());
    let (mut cold_hello, mut cold_predict) = (Vec::new(), Vec::new());
    for round in 0..options.rounds {
        let count = share(options, round);
        progress.step(&format!("round {} of {}", round + 1, options.rounds));
        for each in &mut forked {
            let pod = pod(each.function)?;
            let load = load(&pod, each.code.request(), Connections::New, 0, count);
            each.samples.extend(answered(node, &load)?);
        }
        let kept = |pod| {
            load(
                pod,
                Code::Hello.request(),
                Connections::Kept,
                WARM_UP,
                count,
            )
        };
        warm.extend(answered(node, &kept(&warm_pod))?);
        warm_peer.extend(answered(node, &kept(peer_pod))?);
        cold_hello.push(peers::first_answer(
            node,
            &hello_peer,
            &Code::Hello.request(),
        )?);
        cold_predict.push(peers::first_answer(
            node,
            &predict_peer,
            &Code::Predict.request(),
        )?);
    }
    for each in &forked {
        let peers = if each.code == Code::Hello {
            &cold_hello
        } else {
            &cold_predict
        };
        let peers = Samples::new(peers.iter().copied().map(millis).collect())
            .context("no first answers")?;
        figures.push(Figure::new(
            each.figure,
            "ms",
            &durations(&each.samples)?,
            FIRST,
            &peers,
        ));
    }
    figures.push(Figure::new(
        "warm_hello",
        "ms",
        &durations(&warm)?,
        KEPT,
        &durations(&warm_peer)?,
    ));

    progress.step(&format!("{BURST} requests at once"));
    let burst_pod = pod("burst")?;
    let (mut burst, mut burst_peer) = (Vec::new(), Vec::new());
    for _ in 0..BURSTS {
        when_idle(node, std::slice::from_ref(&burst_pod))?;
        let at_once = |pod| load(pod, Code::Hello.request(), Connections::AtOnce, 0, BURST);
        burst.extend(answered(node, &at_once(&burst_pod))?);
        burst_peer.extend(answered(node, &at_once(peer_pod))?);
    }
    figures.push(Figure::new(
        "burst_100",
        "ms",
        &durations(&burst)?,
        RUNNING,
        &durations(&burst_peer)?,
    ));

    for (figure, function, set, code) in [
        ("forks_per_second", "predict", "science", Code::Predict),
        ("forks_per_second_plain", "hello", "plain", Code::Hello),
    ] {
        progress.step(&format!(
            "{figure}: {SUSTAINED} s of requests, and of the kernel's own forks"
        ));
        let pools = cluster::ready_pods(NAMESPACE, &format!("sock.dev/pool={set}"))?;
        let like = pools.first().with_context(|| format!("no pool of {set}"))?;
        let like = memory::Pod {
            uid: like.uid.clone(),
        };
        let processes = std::thread::available_parallelism()?.get();
        let forks = Forks {
            like,
            processes,
            seconds: SUSTAINED,
        };
        let rate = Rate {
            address: (pod(function)?.address, objects::PORT).into(),
            request: code.request(),
            clients: 2 * processes,
            seconds: SUSTAINED,
        };
        let ours: Vec<u64> = node.job("rate", &rate)?;
        let kernels: Vec<u64> = node.job("forks", &forks)?;
        figures.push(Figure::new(
            figure,
            "1/s",
            &counted(&ours)?,
            BARE,
            &counted(&kernels)?,
        ));
    }
    Ok(figures)
}

/// By the second, without the first, in which caches get warm.
///
/// # Errors
/// If there is no second.
pub fn counted(counts: &[u64]) -> Result<Samples> {
    let counts = counts.iter().skip(1).map(|count| {
        let count = u32::try_from(*count)?;
        Ok(f64::from(count))
    });
    Samples::new(counts.collect::<Result<_>>()?).context("no seconds")
}

/// Separate from the figures: the shim writes a line for every leaf.
fn traces(node: &Equipped, progress: &Progress) -> Result<Vec<(&'static str, Sample, Start)>> {
    progress.step("where the time goes");
    let tracing = Tracing::start(&node.node)?;
    let mut traces = Vec::new();
    for each in forked() {
        let pod = renewed(node, each.function)?;
        let samples = answered(
            node,
            &load(&pod, each.code.request(), Connections::New, WARM_UP, TRACED),
        )?;
        let mut starts = tracing.starts(&samples)?;
        starts.sort_by_key(|(sample, _)| sample.took);
        if starts.is_empty() {
            bail!(
                "the shim of {} wrote no line about its leaves into the journal of {}",
                pod.name,
                node.node.name
            );
        }
        let (sample, start) = starts.swap_remove(starts.len() / 2);
        traces.push((each.figure, sample, start));
    }
    Ok(traces)
}

/// The pod that comes in the place of the Function's only one.
fn renewed(node: &Equipped, function: &str) -> Result<Pod> {
    let old = pods_of(node, function, 1)?.remove(0);
    cluster::kubectl(&["delete", "pod", "-n", NAMESPACE, &old.name, "--wait=true"])?;
    let deployment = format!("deployment/{function}");
    cluster::kubectl(&[
        "rollout",
        "status",
        "-n",
        NAMESPACE,
        &deployment,
        "--timeout=120s",
    ])?;
    Ok(pods_of(node, function, 1)?.remove(0))
}

/// Name, modules and spares. Sets of the same packages and modules would share their zygotes, spares
/// included; so the sets with spares import one module more, of which Python's own library is full.
const SETS: [(&str, &[&str], u32); 4] = [
    ("plain", &["json"], 0),
    ("plain-spares", &["json", "decimal"], 4),
    (
        "science",
        &["numpy", "pandas", "scipy.stats", "sklearn.linear_model"],
        0,
    ),
    (
        "science-spares",
        &[
            "numpy",
            "pandas",
            "scipy.stats",
            "sklearn.linear_model",
            "decimal",
        ],
        4,
    ),
];

fn package_sets(node: &str) -> Vec<Value> {
    SETS.iter()
        .map(|(name, imports, spares)| {
            let mut spec = json!({"imports": imports, "spares": spares});
            if name.starts_with("science") {
                spec["requirements"] = json!({"lines": requirements(SCIENCE)});
                spec["warmUp"] = SCIENCE_WARM_UP.into();
                spec["index"] = json!({"url": "http://wheels.sock-wheels/simple/"});
            }
            objects::package_set(NAMESPACE, name, node, &spec)
        })
        .collect()
}

/// The lines of a lock file that name packages.
pub fn requirements(file: &str) -> Vec<&str> {
    file.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

struct Function {
    name: &'static str,
    set: &'static str,
    code: Code,
    reuse: &'static str,
    replicas: usize,
    instances: usize,
}

const FUNCTIONS: [Function; 7] = {
    const fn fresh(name: &'static str, set: &'static str, code: Code) -> Function {
        Function {
            name,
            set,
            code,
            reuse: "Never",
            replicas: 1,
            instances: 8,
        }
    }
    const fn reused(name: &'static str, replicas: usize, instances: usize) -> Function {
        Function {
            name,
            set: "plain",
            code: Code::Hello,
            reuse: "Always",
            replicas,
            instances,
        }
    }
    [
        fresh("hello", "plain", Code::Hello),
        fresh("hello-spare", "plain-spares", Code::Hello),
        fresh("predict", "science", Code::Predict),
        fresh("predict-spare", "science-spares", Code::Predict),
        reused("warm", 1, 8),
        reused("idle", IDLE_PODS, 8),
        reused("burst", 1, 32),
    ]
};

fn functions() -> Vec<Value> {
    FUNCTIONS
        .iter()
        .map(|function| {
            let spec = json!({
                "packageSet": function.set,
                "source": {"inline": function.code.source()},
                "handler": "app.handler",
                "reuse": function.reuse,
                "replicas": function.replicas,
                "instances": function.instances,
                "idle": {"freezeAfterMs": 1000, "endAfterMs": END_AFTER_MILLIS},
            });
            objects::function(NAMESPACE, function.name, &spec)
        })
        .collect()
}

fn forked() -> [Forked; 4] {
    let forked = |figure, function, code| Forked {
        figure,
        function,
        code,
        samples: Vec::new(),
    };
    [
        forked("forked_predict", "predict", Code::Predict),
        forked("forked_predict_spare", "predict-spare", Code::Predict),
        forked("forked_hello", "hello", Code::Hello),
        forked("forked_hello_spare", "hello-spare", Code::Hello),
    ]
}

fn peer<'a>(name: &'a str, node: &'a str, packages: Option<&'a str>) -> Peer<'a> {
    Peer {
        namespace: PEERS,
        name,
        node,
        image: IMAGE,
        handler: "app.handler",
        packages,
        install: None,
        env: &Value::Null,
        resources: &Value::Null,
    }
}

fn pods_of(node: &Equipped, function: &str, count: usize) -> Result<Vec<Pod>> {
    let pods = cluster::ready_pods(NAMESPACE, &format!("sock.dev/function={function}"))?;
    if pods.len() != count || pods.iter().any(|pod| pod.node != node.node.name) {
        bail!(
            "Function {function} has the pods {pods:?} instead of {count} on {}",
            node.node.name
        );
    }
    Ok(pods)
}

/// The requests of one round, so that all rounds together have all.
fn share(options: &Options, round: usize) -> usize {
    let until = |round| options.requests * round / options.rounds;
    until(round + 1) - until(round)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rounds_together_have_all_requests() {
        for requests in [300, 17, 1] {
            let options = Options {
                requests,
                rounds: 15,
                out: PathBuf::new(),
                trace: false,
                keep: false,
            };
            let shares = (0..options.rounds).map(|round| share(&options, round));
            assert_eq!(shares.sum::<usize>(), requests);
        }
    }

    #[test]
    fn every_requirement_is_pinned_and_hashed() {
        let lines = requirements(SCIENCE);
        assert!(lines.len() > 3);
        assert!(
            lines
                .iter()
                .all(|line| line.contains("==") && line.contains(" --hash=sha256:"))
        );
    }

    #[test]
    fn every_forked_figure_has_its_function() {
        for each in forked() {
            let function = FUNCTIONS
                .iter()
                .find(|function| function.name == each.function)
                .unwrap();
            assert_eq!(function.reuse, "Never");
            assert!(function.code == each.code);
            assert_eq!(
                function.set.ends_with("-spares"),
                each.figure.ends_with("_spare")
            );
        }
    }
}
