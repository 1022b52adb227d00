//! What zygotes cost that descend from one another, beside zygotes that do not.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::json;

use crate::cluster::{self, Equipped, Node, Pod};
use crate::measure::weigh;
use crate::objects;
use crate::progress::Progress;
use crate::run::requirements;
use crate::table::table;

const NAMESPACE: &str = "sock-bench-tree";
const SCIENCE: &str = include_str!("../../e2e/images/requirements-science.txt");
/// Of the parent, and of all others with one module more.
const IMPORTS: [&str; 4] = ["numpy", "pandas", "scipy.stats", "sklearn.linear_model"];
/// One for each child, of Python's own library.
const MORE: [&str; 9] = [
    "sqlite3", "decimal", "csv", "ctypes", "unittest", "email", "html", "xml.dom", "bz2",
];
/// So many of all zygotes descend from one parent when they are weighed: the second zygote, the third and the tenth.
const STEPS: [usize; 3] = [1, 2, 9];

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// Where the figures go.
    pub out: PathBuf,
    /// Leave what was made on the cluster.
    pub keep: bool,
}

/// One line of the report: of a pool's pod, in MB.
#[derive(Debug, Serialize)]
struct Weight {
    zygote: String,
    /// Proportional set size of all its processes, its shim included.
    pss: f64,
    /// What its cgroup is charged with: what it has touched first, and shares with no other pod's.
    charged: f64,
}

/// Makes a parent, its children one after the other, and one that imports the same by itself.
///
/// # Errors
/// If something cannot be made or weighed.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    let node = Node::all()?.swap_remove(0).equip()?;
    let weights = measure(&node, &progress);
    if !options.keep {
        progress.step("removing what was weighed");
        cluster::kubectl(&[
            "delete",
            "namespace",
            NAMESPACE,
            "--ignore-not-found",
            "--wait=false",
        ])?;
    }
    let weights = weights?;
    let rows: Vec<Vec<String>> = weights
        .iter()
        .map(|one| {
            let megabytes = |value: f64| format!("{value:.1}");
            vec![
                one.zygote.clone(),
                megabytes(one.pss),
                megabytes(one.charged),
            ]
        })
        .collect();
    println!("\n{}", table(&["zygote", "PSS, MB", "charged, MB"], &rows));
    std::fs::write(&options.out, serde_json::to_string_pretty(&weights)? + "\n")
        .with_context(|| options.out.display().to_string())
}

fn measure(node: &Equipped, progress: &Progress) -> Result<Vec<Weight>> {
    let lines = requirements(SCIENCE);
    let set = |name: &str, more: Option<&str>, parent: Option<&str>| {
        let imports: Vec<&str> = IMPORTS.into_iter().chain(more).collect();
        let mut spec = json!({
            "imports": imports, "spares": 0, "requirements": {"lines": lines},
            "index": {"url": "http://wheels.sock-wheels/simple/"},
        });
        if let Some(parent) = parent {
            spec["extends"] = json!({"name": parent});
        }
        objects::package_set(NAMESPACE, name, &node.node.name, &spec)
    };
    let ready =
        |name: &str| cluster::wait_until("Ready", NAMESPACE, &format!("packageset/{name}"), 180);
    progress.step("a zygote, and one that imports the same and a module more by itself");
    cluster::apply(&[
        objects::tenant(NAMESPACE),
        set("parent", None, None),
        set("alone", Some(MORE[0]), None),
    ])?;
    ready("parent")?;
    ready("alone")?;
    let mut weights = vec![
        weight(node, "parent", "the first, before it has children".into())?,
        weight(node, "alone", "one by itself".into())?,
    ];
    for (child, more) in MORE.iter().enumerate() {
        let name = format!("child-{child}");
        progress.step(&format!("child {} of {}", child + 1, MORE.len()));
        cluster::apply(&[set(&name, Some(more), Some("parent"))])?;
        ready(&name)?;
        if STEPS.contains(&(child + 1)) {
            let which = format!("zygote {}, that descends from the first", child + 2);
            weights.push(weight(node, &name, which)?);
        }
    }
    weights.push(weight(
        node,
        "parent",
        format!("the first, with {} children", MORE.len()),
    )?);
    Ok(weights)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of a pod are far below 2^52"
)]
fn weight(node: &Equipped, set: &str, zygote: String) -> Result<Weight> {
    let pods: Vec<Pod> = cluster::ready_pods(NAMESPACE, &format!("sock.dev/pool={set}"))?;
    let weighed = weigh(node, &pods)?;
    let memory = weighed.last().context("a pool has no pod")?;
    Ok(Weight {
        zygote,
        pss: memory.pss as f64 / 1e6,
        charged: memory.cgroup as f64 / 1e6,
    })
}
