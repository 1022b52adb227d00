//! What each tier of caches is worth: one request to an idle Function that uses pandas and scikit-learn, with all of them, and then
//! without one more of them each time.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::{self, Equipped, Node};
use crate::measure::{answered, durations, load, millis, packages_directory};
use crate::node::load::Connections;
use crate::objects::{self, Install, Peer};
use crate::peers;
use crate::progress::Progress;
use crate::run::{Code, SCIENCE, SCIENCE_WARM_UP, requirements};
use crate::stats::Samples;
use crate::table::table;

const NAMESPACE: &str = "sock-bench-tiers";
const PEERS: &str = "sock-bench-tiers-peers";
const INDEX: &str = "http://wheels.sock-wheels/simple/";
const WARM_UP: usize = 5;

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// Of each kind that takes milliseconds; of those that take a second a twentieth.
    pub requests: usize,
    /// Where the figures go.
    pub out: PathBuf,
    /// Leave what was made on the cluster.
    pub keep: bool,
}

/// One line of the report, in milliseconds.
#[derive(Debug, Serialize)]
struct Worth {
    /// Tiers that are there.
    tiers: &'static str,
    /// What a request meets.
    means: &'static str,
    n: usize,
    p50: f64,
    p99: f64,
}

impl Worth {
    fn new(tiers: &'static str, means: &'static str, samples: &Samples) -> Worth {
        Worth {
            tiers,
            means,
            n: samples.count(),
            p50: samples.percentile(50),
            p99: samples.percentile(99),
        }
    }
}

/// Name, modules of its set that a zygote imports, and whether a leaf is kept.
const FUNCTIONS: [(&str, &str, &str); 3] = [
    ("kept", "science", "Always"),
    ("forked", "science", "Never"),
    ("importing", "installed", "Never"),
];

/// Measures, prints, and writes the figures.
///
/// # Errors
/// If something cannot be made or measured, or a request was not answered rightly.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    let node = Node::all()?.swap_remove(0).equip()?;
    let worth = measure(options, &node, &progress);
    if !options.keep {
        progress.step("removing what was measured");
        let namespaces = [NAMESPACE, PEERS];
        let delete = ["delete", "namespace", "--ignore-not-found", "--wait=false"];
        cluster::kubectl(&[&delete[..], &namespaces].concat())?;
    }
    let worth = worth?;
    let rows: Vec<Vec<String>> = worth
        .iter()
        .map(|one| {
            let (p50, p99) = (format!("{:.2}", one.p50), format!("{:.2}", one.p99));
            vec![
                one.tiers.to_owned(),
                one.means.to_owned(),
                one.n.to_string(),
                p50,
                p99,
            ]
        })
        .collect();
    println!(
        "\n{}",
        table(
            &["tiers", "a request meets", "n", "p50, ms", "p99, ms"],
            &rows
        )
    );
    std::fs::write(&options.out, serde_json::to_string_pretty(&worth)? + "\n")
        .with_context(|| options.out.display().to_string())?;
    eprintln!("written: {}", options.out.display());
    Ok(())
}

fn measure(options: &Options, node: &Equipped, progress: &Progress) -> Result<Vec<Worth>> {
    let name = &*node.node.name;
    progress.step("PackageSets and Functions");
    cluster::apply(&[objects::tenant(NAMESPACE), objects::unrestricted(PEERS)])?;
    let lines = requirements(SCIENCE);
    let set = |set: &str, more: &Value| {
        let mut spec = json!({
            "spares": 0, "requirements": {"lines": lines}, "index": {"url": INDEX},
            "imports": more["imports"],
        });
        if !more["warmUp"].is_null() {
            spec["warmUp"] = more["warmUp"].clone();
        }
        objects::package_set(NAMESPACE, set, name, &spec)
    };
    let imports = ["numpy", "pandas", "scipy.stats", "sklearn.linear_model"];
    cluster::apply(&[
        set(
            "science",
            &json!({"imports": imports, "warmUp": SCIENCE_WARM_UP}),
        ),
        set("installed", &json!({"imports": ["json"]})),
    ])?;
    for set in ["science", "installed"] {
        cluster::wait_until("Ready", NAMESPACE, &format!("packageset/{set}"), 300)?;
    }
    let functions = FUNCTIONS.map(|(name, set, reuse)| {
        let spec = json!({
            "packageSet": set, "source": {"inline": Code::Predict.source()}, "handler": "app.handler",
            // Between two requests a leaf that is kept has long been frozen.
            "reuse": reuse, "idle": {"freezeAfterMs": 10, "endAfterMs": 60_000},
        });
        objects::function(NAMESPACE, name, &spec)
    });
    cluster::apply(&functions)?;
    let few = (options.requests / 20).max(1);
    let mut samples = Vec::new();
    for (name, _, _) in FUNCTIONS {
        cluster::wait_until("Ready", NAMESPACE, &format!("function/{name}"), 180)?;
        let count = if name == "importing" {
            few
        } else {
            options.requests
        };
        progress.step(&format!("{name}: {count} requests"));
        let pods = cluster::ready_pods(NAMESPACE, &format!("sock.dev/function={name}"))?;
        let pod = pods.first().context("a Function has no pod")?;
        let load = load(
            pod,
            Code::Predict.request(),
            Connections::New,
            WARM_UP,
            count,
        );
        samples.push(durations(&answered(node, &load)?)?);
    }
    let packages = packages_directory(NAMESPACE, "science")?;
    let installed = peer("installed", name);
    let installed = Peer {
        packages: Some(&packages),
        ..installed
    };
    let install = Install {
        index: INDEX,
        requirements: SCIENCE,
    };
    let installing = Peer {
        install: Some(install),
        ..peer("installing", name)
    };
    for peer in [&installed, &installing] {
        progress.step(&format!("{}: {few} containers on runc", peer.name));
        let code = json!({"data": {"app.py": Code::Predict.source()}});
        cluster::apply(&peer.config_maps(&code))?;
        let times: Result<Vec<u64>> = (0..few)
            .map(|_| peers::first_answer(node, peer, &Code::Predict.request()))
            .collect();
        let times = times?.into_iter().map(millis).collect();
        samples.push(Samples::new(times).context("no first answers")?);
    }
    let tiers = [
        ("all", "a frozen leaf"),
        ("install, import", "a fork of a zygote that has imported"),
        (
            "install",
            "a fork of a zygote of plain Python, which imports",
        ),
        (
            "packages on the node",
            "a new container on runc, which imports",
        ),
        (
            "none",
            "a new container on runc, which installs and imports",
        ),
    ];
    let worth = tiers.iter().zip(&samples);
    Ok(worth
        .map(|((tiers, means), samples)| Worth::new(tiers, means, samples))
        .collect())
}

fn peer<'a>(name: &'a str, node: &'a str) -> Peer<'a> {
    Peer {
        namespace: PEERS,
        name,
        node,
        image: objects::IMAGE,
        handler: "app.handler",
        packages: None,
        install: None,
        env: &Value::Null,
        resources: &Value::Null,
    }
}
