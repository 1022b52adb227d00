//! The demonstration: Functions that are on the cluster, called, and measured beside the same code in
//! an ordinary pod on runc.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cluster::{self, Equipped, Node, Pod};
use crate::http::Request;
use crate::measure::{
    answered, durations, load, megabytes, millis, packages_directory, weigh, when_idle,
};
use crate::node::load::{Connections, Sample};
use crate::objects::{self, Peer};
use crate::peers;
use crate::progress::Progress;
use crate::stats::Samples;
use crate::table::table;
use crate::trace::{Start, Tracing};

const PEERS: &str = "sock-demo-peers";
const WARM_UP: usize = 10;
const REQUESTS: usize = 100;
/// Each takes seconds.
const FIRST_ANSWERS: usize = 3;
/// Characters of an answer that are shown.
const SHOWN: usize = 96;

/// How a Function is called.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Call {
    function: String,
    method: String,
    path: String,
    #[serde(default)]
    body: String,
    /// A file beside the document, in place of `body`.
    body_file: Option<String>,
}

/// A row of the table.
struct Row {
    function: String,
    first: Samples,
    forked: Samples,
    warm: Samples,
    /// The pod that forks for each request.
    idle: Pod,
    peers: f64,
    trace: Option<(Sample, Start)>,
}

/// Calls and measures, and prints.
///
/// # Errors
/// If a Function does not answer, or not as the same code does on runc.
pub fn run(namespace: &str, requests: &Path) -> Result<()> {
    let progress = Progress::start();
    let calls = calls(requests).with_context(|| requests.display().to_string())?;
    let nodes: Vec<Equipped> = Node::all()?
        .iter()
        .map(Node::equip)
        .collect::<Result<_>>()?;
    let tracing: Vec<Tracing> = nodes
        .iter()
        .map(|node| Tracing::start(&node.node))
        .collect::<Result<_>>()?;
    let result = measure(namespace, &calls, &nodes, &tracing, &progress);
    for call in &calls {
        remove(namespace, &fresh_name(&call.function))?;
    }
    cluster::kubectl(&[
        "delete",
        "namespace",
        PEERS,
        "--ignore-not-found",
        "--wait=false",
    ])?;
    let (rows, idle) = result?;
    println!("\n{}", rows_table(&rows, &idle));
    println!("{}", pools(namespace, &nodes)?);
    if let Some((row, sample, start)) = slowest(&rows) {
        println!(
            "Where the time of one forked request to {} went:\n",
            row.function
        );
        println!("{}", start.table(sample));
    }
    Ok(())
}

fn calls(file: &Path) -> Result<Vec<Call>> {
    let mut calls: Vec<Call> = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let directory = file.parent().unwrap_or(Path::new(""));
    for call in &mut calls {
        if let Some(body) = &call.body_file {
            let body = directory.join(body);
            call.body =
                std::fs::read_to_string(&body).with_context(|| body.display().to_string())?;
        }
    }
    Ok(calls)
}

fn measure(
    namespace: &str,
    calls: &[Call],
    nodes: &[Equipped],
    tracing: &[Tracing],
    progress: &Progress,
) -> Result<(Vec<Row>, Vec<f64>)> {
    cluster::apply(&[objects::unrestricted(PEERS)])?;
    let rows = calls.iter().map(|call| {
        one(namespace, call, nodes, tracing, progress)
            .with_context(|| format!("Function {}", call.function))
    });
    let rows = rows.collect::<Result<Vec<Row>>>()?;
    // Together: pods share the pages of the shim's program, and the first one alone would have them all.
    progress.step("memory of the idle pods");
    let idle = rows.iter().map(|row| {
        let memory = when_idle(on(nodes, &row.idle)?, std::slice::from_ref(&row.idle))?;
        Ok(megabytes(&memory, |memory| memory.pss)?.percentile(50))
    });
    let idle = idle.collect::<Result<Vec<f64>>>()?;
    Ok((rows, idle))
}

fn one(
    namespace: &str,
    call: &Call,
    nodes: &[Equipped],
    tracing: &[Tracing],
    progress: &Progress,
) -> Result<Row> {
    let name = &*call.function;
    progress.step(&format!("{name}: {} {}", call.method, call.path));
    let function = cluster::get(&["function", "-n", namespace, name])?;
    cluster::wait_until("Ready", namespace, &format!("function/{name}"), 120)?;
    let pod = any_pod(namespace, name)?;
    let node = on(nodes, &pod)?;
    let request = right_answer(node, &pod, call)?;
    let shown: String = request.expect.trim_end().chars().take(SHOWN).collect();
    progress.step(&format!("{name}: {shown}"));
    let kept = load(&pod, request.clone(), Connections::Kept, WARM_UP, REQUESTS);
    let warm = answered(node, &kept)?;

    progress.step(&format!("{name}: {REQUESTS} requests, a fork for each"));
    let fresh = fresh_name(name);
    // The Function itself goes on with the leaf that it has; this copy of it forks for each request, and is idle soon.
    remove(namespace, &fresh)?;
    let mut spec = function["spec"].clone();
    spec["reuse"] = "Never".into();
    spec["replicas"] = 1.into();
    spec["idle"] = json!({"freezeAfterMs": 1000, "endAfterMs": 2000});
    cluster::apply(&[objects::function(namespace, &fresh, &spec)])?;
    cluster::wait_until("Ready", namespace, &format!("function/{fresh}"), 120)?;
    let pod = any_pod(namespace, &fresh)?;
    let node = on(nodes, &pod)?;
    let new = load(&pod, request.clone(), Connections::New, WARM_UP, REQUESTS);
    let forked = answered(node, &new)?;
    let trace = tracing
        .iter()
        .find(|tracing| tracing.is_on(&node.node))
        .map(|tracing| tracing.starts(&forked))
        .transpose()?
        .and_then(median);

    progress.step(&format!("{name}: the same code on runc"));
    let set = text(&function["spec"]["packageSet"])?;
    let packages = packages_directory(namespace, set)?;
    let set = cluster::get(&["packageset", "-n", namespace, set])?;
    if !function["spec"]["envFrom"].is_null() {
        bail!("envFrom: its ConfigMaps and Secrets are not in the peer's namespace");
    }
    let peer = Peer {
        namespace: PEERS,
        name,
        node: &node.node.name,
        image: text(&set["spec"]["image"])?,
        handler: text(&function["spec"]["handler"])?,
        packages: Some(&packages),
        install: None,
        env: &function["spec"]["env"],
        resources: &function["spec"]["resources"],
    };
    cluster::apply(&peer.config_maps(&code(namespace, &function["spec"])?))?;
    let first = (0..FIRST_ANSWERS)
        .map(|_| peers::first_answer(node, &peer, &request).map(millis))
        .collect::<Result<Vec<f64>>>()?;
    cluster::apply(&[peer.deployment(1)])?;
    cluster::wait_until("Available", PEERS, &format!("deployment/{name}"), 120)?;
    let peers_pods = cluster::ready_pods(PEERS, &format!("peer={name}"))?;
    let plain = weigh(node, &peers_pods)?;
    cluster::kubectl(&["delete", "deployment", "-n", PEERS, name, "--wait=false"])?;

    Ok(Row {
        function: name.to_owned(),
        first: Samples::new(first).context("no first answers")?,
        forked: durations(&forked)?,
        warm: durations(&warm)?,
        idle: pod,
        peers: megabytes(&plain, |memory| memory.pss)?.percentile(50),
        trace,
    })
}

/// The answer to a first call is the one that all later ones have to give, on runc as well.
fn right_answer(node: &Equipped, pod: &Pod, call: &Call) -> Result<Request> {
    let request = Request {
        method: call.method.clone(),
        path: call.path.clone(),
        body: call.body.clone(),
        expect: String::new(),
        part: String::new(),
    };
    let expect = node.job("call", &load(pod, request.clone(), Connections::New, 0, 1))?;
    Ok(Request { expect, ..request })
}

fn fresh_name(function: &str) -> String {
    format!("{function}-forked")
}

fn remove(namespace: &str, function: &str) -> Result<()> {
    let arguments = ["delete", "function", "-n", namespace, function];
    cluster::kubectl(&[&arguments[..], &["--ignore-not-found", "--wait=true"]].concat()).map(drop)
}

fn any_pod(namespace: &str, function: &str) -> Result<Pod> {
    let pods = cluster::ready_pods(namespace, &format!("sock.dev/function={function}"))?;
    pods.into_iter()
        .next()
        .with_context(|| format!("{function} has no pod that is ready"))
}

fn on<'a>(nodes: &'a [Equipped], pod: &Pod) -> Result<&'a Equipped> {
    let node = nodes.iter().find(|node| node.node.name == pod.node);
    node.with_context(|| format!("pod {} is on {}, a node without sock", pod.name, pod.node))
}

/// A Function's files, as a ConfigMap has them.
fn code(namespace: &str, spec: &Value) -> Result<Value> {
    if let Some(inline) = spec["source"]["inline"].as_str() {
        let module = text(&spec["handler"])?
            .split('.')
            .next()
            .unwrap_or_default();
        return Ok(json!({"data": {format!("{module}.py"): inline}}));
    }
    let name = text(&spec["source"]["configMap"]["name"])?;
    cluster::get(&["configmap", "-n", namespace, name])
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().context("a name is missing")
}

fn median(mut starts: Vec<(Sample, Start)>) -> Option<(Sample, Start)> {
    starts.sort_by_key(|(sample, _)| sample.took);
    (!starts.is_empty()).then(|| starts.swap_remove(starts.len() / 2))
}

fn slowest(rows: &[Row]) -> Option<(&Row, &Sample, &Start)> {
    let traced = rows.iter().filter_map(|row| {
        let (sample, start) = row.trace.as_ref()?;
        Some((row, sample, start))
    });
    traced.max_by_key(|(_, sample, _)| sample.took)
}

fn rows_table(rows: &[Row], idle: &[f64]) -> String {
    let head = [
        "function",
        "first answer on runc",
        "forked p50",
        "p99",
        "warm p50",
        "p99",
        "idle pod",
        "on runc",
    ];
    let ms = |value: f64| format!("{value:.2} ms");
    let rows: Vec<Vec<String>> = rows
        .iter()
        .zip(idle)
        .map(|(row, idle)| {
            vec![
                row.function.clone(),
                format!("{:.0} ms", row.first.percentile(50)),
                ms(row.forked.percentile(50)),
                ms(row.forked.percentile(99)),
                ms(row.warm.percentile(50)),
                ms(row.warm.percentile(99)),
                format!("{idle:.1} MB"),
                format!("{:.1} MB", row.peers),
            ]
        })
        .collect();
    table(&head, &rows)
}

/// What the zygotes weigh, once a node for all Functions of a PackageSet.
fn pools(namespace: &str, nodes: &[Equipped]) -> Result<String> {
    let mut rows = Vec::new();
    let sets = cluster::get(&["packagesets", "-n", namespace])?;
    for set in sets["items"].as_array().into_iter().flatten() {
        let name = text(&set["metadata"]["name"])?;
        for pod in cluster::ready_pods(namespace, &format!("sock.dev/pool={name}"))? {
            let memory = weigh(on(nodes, &pod)?, std::slice::from_ref(&pod))?;
            let pss = megabytes(&memory, |memory| memory.pss)?.percentile(50);
            rows.push(vec![name.to_owned(), pod.node, format!("{pss:.1} MB")]);
        }
    }
    Ok(table(&["zygotes of", "node", "memory"], &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_code_is_the_module_that_the_handler_names() {
        let spec = json!({"source": {"inline": "x = 1"}, "handler": "main.handle"});
        assert_eq!(
            code("n", &spec).unwrap(),
            json!({"data": {"main.py": "x = 1"}})
        );
    }

    #[test]
    fn every_example_of_the_demonstration_can_be_read() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/demo.json");
        let calls = calls(&file).unwrap();
        assert!(!calls.is_empty());
        assert!(
            calls
                .iter()
                .all(|call| call.method == "GET" || !call.body.is_empty())
        );
    }
}
