//! Ordinary containers and pods on sock, beside the same on runc and crun.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::cluster::{self, Equipped, Node};
use crate::measure::{megabytes, millis, weigh};
use crate::node::containers::{Life, Lives, Profile, Runs, Starts};
use crate::node::memory::Memory;
use crate::objects;
use crate::progress::Progress;
use crate::run::{counted, tell};
use crate::stats::{Figure, Samples};
use crate::table::table;

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// Where the figures go.
    pub out: PathBuf,
}

/// Measures these alone, prints, and writes the figures.
///
/// # Errors
/// If something cannot be made or measured.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    let node = Node::all()?.swap_remove(0).equip()?;
    tell(&figures(&node, &progress)?, &options.out)?;
    tell_start(&node, &progress, &options.out)
}

/// Prints where the time of the start of an ordinary container goes, and writes it beside the figures.
///
/// # Errors
/// If the shim does not say, or the file cannot be written.
pub fn tell_start(node: &Equipped, progress: &Progress, figures: &Path) -> Result<()> {
    progress.step(&format!("the steps of {TIMES} starts"));
    let lives = Lives {
        shims: vec![SOCK.into()],
        image: IMAGE.to_owned(),
        times: TIMES,
    };
    let mut profiles: Vec<Profile> = node.job("profiles", &lives)?;
    profiles.sort_by_key(|profile| profile.last().map(|(_, all)| *all));
    let median = profiles.swap_remove(profiles.len() / 2);
    let rows: Vec<Vec<String>> = median
        .iter()
        .map(|(step, micros)| vec![step.clone(), micros.to_string()])
        .collect();
    println!("\nWhere the time of the median start of an ordinary container went:\n");
    println!("{}", table(&["step", "µs"], &rows));
    let out = figures.with_file_name("start.json");
    std::fs::write(&out, serde_json::to_string_pretty(&median)? + "\n")
        .with_context(|| out.display().to_string())?;
    eprintln!("written: {}", out.display());
    Ok(())
}

const NAMESPACE: &str = "sock-bench-containers";
const IMAGE: &str = "docker.io/library/busybox:1.36";
const TIMES: usize = 40;
const PODS: usize = 10;
const AT_ONCE: usize = 8;
const SECONDS: usize = 8;

const SOCK: &str = "/opt/sock/bin/containerd-shim-sock-v1";
const RUNC: &str = "/usr/local/bin/containerd-shim-runc-v2";

const BY_RUNC: &str = "the same by runc and containerd's shim";
const BY_CRUN: &str = "the same by crun and containerd's shim";
const POD_BY_RUNC: &str = "the same pod on runc, with its pause container";

/// Side by side on one node.
///
/// # Errors
/// If a container or a pod does not come or go.
pub fn figures(node: &Equipped, progress: &Progress) -> Result<Vec<Figure>> {
    let runtime = |name: &str| vec!["--runtime".to_owned(), name.to_owned()];
    let (sock, runc) = (
        runtime("io.containerd.sock.v1"),
        runtime("io.containerd.runc.v2"),
    );
    let mut figures = Vec::new();

    let mut runtimes = vec![sock.clone(), runc.clone()];
    // Where `bench/crun` has put one.
    let try_crun = format!(
        "ctr --namespace k8s.io run --rm --runtime io.containerd.runc.v2 --runc-binary crun {IMAGE} sock-bench-crun true"
    );
    if node.node.shell(&try_crun).is_ok() {
        let crun = ["--runc-binary", "crun"].map(str::to_owned);
        runtimes.push([runc.clone(), crun.to_vec()].concat());
    }
    progress.step(&format!(
        "ctr run: {TIMES} containers of each of {} runtimes",
        runtimes.len()
    ));
    let runs = Runs {
        runtimes,
        image: IMAGE.to_owned(),
        times: TIMES,
    };
    let took: Vec<Vec<u64>> = node.job("runs", &runs)?;
    let took = took
        .into_iter()
        .map(|took| samples(took.into_iter()))
        .collect::<Result<Vec<_>>>()?;
    let ours = took.first().context("no containers")?;
    let peers = [("ctr_run", BY_RUNC), ("ctr_run_crun", BY_CRUN)];
    for ((name, peer), theirs) in peers.into_iter().zip(&took[1..]) {
        figures.push(Figure::new(name, "ms", ours, peer, theirs));
    }

    progress.step(&format!("shims alone: {TIMES} containers of each"));
    let lives = Lives {
        shims: [SOCK, RUNC].map(PathBuf::from).to_vec(),
        image: IMAGE.to_owned(),
        times: TIMES,
    };
    let lives: Vec<Vec<Life>> = node.job("lives", &lives)?;
    let [ours, theirs] = &lives[..] else {
        anyhow::bail!("two shims lived {} times", lives.len());
    };
    let start = |lives: &[Life]| samples(lives.iter().map(|life| life.start));
    let stop = |lives: &[Life]| samples(lives.iter().map(|life| life.stop));
    figures.push(Figure::new(
        "shim_start",
        "ms",
        &start(ours)?,
        BY_RUNC,
        &start(theirs)?,
    ));
    figures.push(Figure::new(
        "shim_stop",
        "ms",
        &stop(ours)?,
        BY_RUNC,
        &stop(theirs)?,
    ));

    progress.step(&format!(
        "starts_per_second: {SECONDS} s of ctr run, {AT_ONCE} at once"
    ));
    let rate = |runtime: &[String]| -> Result<Samples> {
        let starts = Starts {
            runtime: runtime.to_vec(),
            image: IMAGE.to_owned(),
            at_once: AT_ONCE,
            seconds: SECONDS,
        };
        let counts: Vec<u64> = node.job("starts", &starts)?;
        counted(&counts)
    };
    figures.push(Figure::new(
        "starts_per_second",
        "1/s",
        &rate(&sock)?,
        BY_RUNC,
        &rate(&runc)?,
    ));
    figures.extend(pods(node, progress)?);
    Ok(figures)
}

fn samples(micros: impl Iterator<Item = u64>) -> Result<Samples> {
    Samples::new(micros.map(millis).collect()).context("no samples")
}

fn pod(name: &str, node: &str, runtime: Option<&str>) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name, "namespace": NAMESPACE,
            "labels": {"runtime": runtime.unwrap_or("runc")},
        },
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "containers": [{"name": "c", "image": IMAGE, "command": ["sleep", "3600"]}],
        },
    });
    if let Some(runtime) = runtime {
        pod["spec"]["runtimeClassName"] = runtime.into();
    }
    pod
}

/// Pods one after the other, of each runtime in turn: how long until each is ready, and what all of them weigh.
fn pods(node: &Equipped, progress: &Progress) -> Result<Vec<Figure>> {
    let name = &*node.node.name;
    cluster::apply(&[objects::unrestricted(NAMESPACE)])?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    progress.step(&format!("pod_ready: {PODS} pods of each runtime"));
    for number in 0..=PODS {
        for (runtime, took) in [(Some("sock"), &mut ours), (None, &mut theirs)] {
            let pod = pod(
                &format!("{}-{number}", runtime.unwrap_or("runc")),
                name,
                runtime,
            );
            let seconds = until_ready(&pod)?;
            if number > 0 {
                took.push(seconds);
            }
        }
    }
    let figure = |name, unit, ours: &Samples, theirs: &Samples| {
        Figure::new(name, unit, ours, POD_BY_RUNC, theirs)
    };
    let ready = |took| Samples::new(took).context("no pods");
    let mut figures = vec![figure("pod_ready", "ms", &ready(ours)?, &ready(theirs)?)];
    let pss = |memory: &Memory| memory.pss;
    let weight = |runtime: &str| -> Result<Samples> {
        let pods = cluster::ready_pods(NAMESPACE, &format!("runtime={runtime}"))?;
        megabytes(&weigh(node, &pods)?, pss)
    };
    figures.push(figure("pod_pss", "MB", &weight("sock")?, &weight("runc")?));
    cluster::kubectl(&["delete", "namespace", NAMESPACE, "--wait=false"])?;
    Ok(figures)
}

/// Milliseconds from the request that makes a pod to the news that it is ready.
fn until_ready(pod: &Value) -> Result<f64> {
    let name = pod["metadata"]["name"].as_str().context("a name")?;
    let mut watch = Command::new("kubectl")
        .args(["get", "pods", "--namespace", NAMESPACE, "--watch"])
        .arg("--request-timeout=120s")
        .args(["--field-selector", &format!("metadata.name={name}")])
        .arg("--output=jsonpath={.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}")
        .stdout(Stdio::piped())
        .spawn()
        .context("running kubectl")?;
    // It watches once it has listed.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let begin = Instant::now();
    cluster::apply(std::slice::from_ref(pod))?;
    let news = BufReader::new(watch.stdout.take().context("standard output")?);
    let is_ready = news
        .lines()
        .map_while(Result::ok)
        .any(|line| line.trim() == "True");
    let took = begin.elapsed();
    watch.kill()?;
    watch.wait()?;
    anyhow::ensure!(is_ready, "pod {name} does not get ready");
    Ok(took.as_secs_f64() * 1000.0)
}
