//! Many Functions on many PackageSets, asked for as often as they are popular: with zygotes that descend from one another as `kubectl
//! sock plan` proposes, with one zygote for each set, with those on half of the memory that they ask for, with one for all that has imported
//! nothing, and with none.

mod budget;
pub mod draw;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::{self, Equipped, Node, Pod};
use crate::measure::{megabytes, millis, weigh};
use crate::node::mix::{Mix, Outcome};
use crate::objects::{self, PORT};
use crate::progress::Progress;
use crate::run::{Code, counted, requirements};
use crate::stats::Samples;
use crate::table::table;
use budget::{Budget, Zygotes};
use draw::{Set, Shelf};

/// Made by `e2e/images/wheels.py pin`.
pub const REQUIREMENTS: &str = include_str!("../../workload/requirements.txt");
/// Made by `e2e/images/wheels.py needs`.
pub const NEEDS: &str = include_str!("../../workload/needs.json");
const NAMESPACE: &str = "sock-bench-workload";
/// Of the wheels, which are more than the tests have.
const WHEELS: &str = "sock-bench-wheels";
/// A zygote of plain Python with everything installed.
const WHOLE: &str = "whole";
const CLIENTS: usize = 4;
/// So many PackageSets become ready side by side.
const AT_ONCE: usize = 4;

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// How many Functions.
    pub functions: usize,
    /// On how many PackageSets.
    pub sets: usize,
    /// Of requests, to each system.
    pub seconds: usize,
    /// What is drawn.
    pub seed: u64,
    /// What the tree may take of a node, as `kubectl sock plan --memory` has it.
    pub memory: Option<String>,
    /// The program `kubectl-sock`.
    pub plan: PathBuf,
    /// Where the figures are added.
    pub out: PathBuf,
    /// Leave what was made last on the cluster.
    pub keep: bool,
}

/// One way to start Functions.
#[derive(Debug, Serialize)]
struct System {
    system: &'static str,
    /// Those that live after the requests.
    zygotes: usize,
    /// The longest line of descent.
    depth: usize,
    /// MB of all zygotes of the node, their shims included, before the requests: proportional set size. What leaves share with them is counted for
    /// these in part.
    pss: f64,
    /// MB that the zygotes hold beside files, as the kernel has charged it to them, after the requests.
    held: f64,
    /// Requests in a second, the mean without the first one.
    per_second: f64,
    /// Requests.
    n: usize,
    /// Milliseconds of a request.
    p50: f64,
    p99: f64,
    /// In hundredths of the time of the requests, how long nobody on the machine got on for want of memory (PSI).
    stalled: f64,
}

/// Measures, prints, and adds the figure `tree_workload` to those that are there.
///
/// # Errors
/// If something cannot be made or measured, or a request was not answered rightly.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    let node = Node::all()?.swap_remove(0).equip()?;
    let systems = Stage::new(options, &node, &progress).and_then(|stage| stage.systems());
    if !options.keep {
        progress.step("removing what was measured");
        remove(&[NAMESPACE, WHEELS])?;
    }
    let systems = systems?;
    println!("\n{}", shown(&systems));
    add(&options.out, &systems)?;
    eprintln!("written: {}", options.out.display());
    Ok(())
}

fn shown(systems: &[System]) -> String {
    let rows: Vec<Vec<String>> = systems
        .iter()
        .map(|one| {
            vec![
                one.system.to_owned(),
                one.zygotes.to_string(),
                one.depth.to_string(),
                format!("{:.0}", one.pss),
                format!("{:.0}", one.held),
                format!("{:.1}", one.per_second),
                one.n.to_string(),
                format!("{:.2}", one.p50),
                format!("{:.2}", one.p99),
                format!("{:.2}", one.stalled),
            ]
        })
        .collect();
    let head = [
        "system",
        "zygotes",
        "depth",
        "PSS, MB",
        "held, MB",
        "requests/s",
        "n",
        "p50, ms",
        "p99, ms",
        "stalled, %",
    ];
    table(&head, &rows)
}

/// Among other figures, in the place of an earlier one.
fn add(out: &Path, systems: &[System]) -> Result<()> {
    let read = std::fs::read(out).ok();
    let mut figures: Vec<Value> = match read {
        Some(bytes) => serde_json::from_slice(&bytes).with_context(|| out.display().to_string())?,
        None => Vec::new(),
    };
    let [_, plain, .., tree] = systems else {
        bail!("a system is missing");
    };
    figures.retain(|one| one["name"] != "tree_workload");
    figures.push(json!({
        "name": "tree_workload", "unit": "1/s", "n": tree.n, "p50": tree.per_second,
        "peer": plain.system, "peer_p50": plain.per_second, "ratio": tree.per_second / plain.per_second,
        "systems": systems,
    }));
    if let Some(directory) = out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(out, serde_json::to_string_pretty(&figures)? + "\n")
        .with_context(|| out.display().to_string())
}

/// Removes namespaces, and waits until they are gone: their pods take processor time and memory.
fn remove(namespaces: &[&str]) -> Result<()> {
    let delete = [
        "delete",
        "namespace",
        "--ignore-not-found",
        "--timeout=300s",
    ];
    cluster::kubectl(&[&delete[..], namespaces].concat())?;
    Ok(())
}

struct Stage<'a> {
    options: &'a Options,
    node: &'a Equipped,
    progress: &'a Progress,
    whole: Set,
    sets: Vec<Set>,
    /// Of each Function, its set, the most popular Function first.
    functions: Vec<usize>,
}

impl<'a> Stage<'a> {
    fn new(options: &'a Options, node: &'a Equipped, progress: &'a Progress) -> Result<Stage<'a>> {
        ensure!(
            options.plan.exists(),
            "{} is not there: `make plugin` builds it, and --plan says where it is",
            options.plan.display()
        );
        let shelf = Shelf::new(&requirements(REQUIREMENTS), NEEDS)?;
        let mut random = StdRng::seed_from_u64(options.seed);
        let sets = shelf.sets(options.sets, &mut random);
        let functions = draw::functions(options.functions, sets.len(), &mut random);
        remove(&[NAMESPACE])?;
        cluster::apply(&wheels())?;
        cluster::wait_until("Available", WHEELS, "deployment/wheels", 120)?;
        Ok(Stage {
            options,
            node,
            progress,
            whole: shelf.whole(),
            sets,
            functions,
        })
    }

    fn systems(&self) -> Result<Vec<System>> {
        let wheels: std::collections::BTreeSet<_> =
            self.sets.iter().flat_map(|set| &set.lines).collect();
        let say = |what: &str| self.progress.step(what);
        say(&format!(
            "{} Functions on {} PackageSets of {} wheels",
            self.functions.len(),
            self.sets.len(),
            wheels.len()
        ));

        let whole = self.set(WHOLE, &self.whole.lines, &["json"]);
        self.make(&[whole], |_| WHOLE.to_owned())?;
        let one = self.measure("one zygote without packages")?;
        cluster::kubectl(&[
            "delete",
            "packageset",
            "-n",
            NAMESPACE,
            WHOLE,
            "--timeout=60s",
        ])?;
        self.wait_for_no_pools()?;
        let none = self.measure("plain interpreters")?;
        remove(&[NAMESPACE])?;

        let each: Vec<Value> = self
            .sets
            .iter()
            .enumerate()
            .map(|(number, set)| self.set(&set_name(number), &set.lines, &set.imports))
            .collect();
        self.make(&each, set_name)?;
        let alone = self.measure("one zygote for each set")?;
        say("planning");
        let planned = self.planned(&each)?;
        let half = {
            let budget = Budget::of(&self.node.node)?;
            let asked = Zygotes::of(&self.node.node, NAMESPACE)?;
            say(&format!("half of {} MB", asked.bytes / 1_000_000));
            budget.change(asked.bytes / 2)?;
            asked.until_within(asked.bytes / 2)?;
            self.measure("one for each, half the memory")?
        };
        remove(&[NAMESPACE])?;

        self.make(&planned, set_name)?;
        let tree = self.measure("tree")?;
        Ok(vec![none, one, alone, half, tree])
    }

    fn set(&self, name: &str, lines: &[String], imports: &[&str]) -> Value {
        let spec = json!({
            "spares": 0, "requirements": {"lines": lines}, "imports": imports,
            "index": {"url": format!("http://wheels.{WHEELS}/simple/")},
        });
        objects::package_set(NAMESPACE, name, &self.node.node.name, &spec)
    }

    /// Makes the sets, those that others extend first, and the Functions, each on the set that `on` gives for the number of its own.
    fn make(&self, sets: &[Value], on: impl Fn(usize) -> String) -> Result<()> {
        cluster::apply(&[objects::tenant(NAMESPACE)])?;
        let mut sets: Vec<&Value> = sets.iter().collect();
        let all = by_name(&sets);
        sets.sort_by_key(|set| depth(set, &all));
        for (number, few) in sets.chunks(AT_ONCE).enumerate() {
            let done = number * AT_ONCE;
            self.progress
                .step(&format!("PackageSets: {done} of {}", sets.len()));
            let few: Vec<Value> = few.iter().map(|set| (*set).clone()).collect();
            cluster::apply(&few)?;
            for set in &few {
                let name = set["metadata"]["name"].as_str().unwrap_or_default();
                cluster::wait_until("Ready", NAMESPACE, &format!("packageset/{name}"), 300)?;
            }
        }
        self.progress.step("Functions");
        let functions = self.functions.iter().enumerate().map(|(number, set)| {
            let spec = json!({
                "packageSet": on(*set), "source": {"inline": source(&self.sets[*set])}, "handler": "app.handler",
                "reuse": "Never", "timeoutSeconds": 60,
            });
            objects::function(NAMESPACE, &function_name(number), &spec)
        });
        cluster::apply(&functions.collect::<Vec<_>>())?;
        for number in 0..self.functions.len() {
            let function = format!("function/{}", function_name(number));
            cluster::wait_until("Ready", NAMESPACE, &function, 300)?;
        }
        Ok(())
    }

    fn pools(&self) -> Result<Vec<Pod>> {
        cluster::ready_pods(NAMESPACE, "sock.dev/pool")
    }

    fn wait_for_no_pools(&self) -> Result<()> {
        for _ in 0..120 {
            if self.pools()?.is_empty() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        bail!("a pool is still there a minute after its PackageSet was deleted")
    }

    fn measure(&self, system: &'static str) -> Result<System> {
        self.progress.step(system);
        let pools = self.pools()?;
        let weighed = weigh(self.node, &pools)?;
        let pss = megabytes(&weighed, |memory| memory.pss).map_or(0.0, |all| all.sum());
        let mut addresses = Vec::new();
        for number in 0..self.functions.len() {
            let label = format!("sock.dev/function={}", function_name(number));
            let pods = cluster::ready_pods(NAMESPACE, &label)?;
            let pod = pods.first().context("a Function has no pod")?;
            addresses.push((pod.address, PORT).into());
        }
        let mix = Mix {
            addresses,
            request: Code::Hello.request(),
            clients: CLIENTS,
            seconds: self.options.seconds,
        };
        let before = budget::stalled_micros(&self.node.node)?;
        let outcome: Outcome = self.node.job("mix", &mix)?;
        let stalled = budget::stalled_micros(&self.node.node)?.saturating_sub(before);
        let took = Samples::new(outcome.took.into_iter().map(millis).collect());
        let took = took.context("nothing was answered")?;
        let living = Zygotes::of(&self.node.node, NAMESPACE)?;
        let sets = cluster::get(&["packagesets", "-n", NAMESPACE])?;
        let sets: Vec<&Value> = sets["items"].as_array().into_iter().flatten().collect();
        let by_name = by_name(&sets);
        Ok(System {
            system,
            zygotes: living.count,
            depth: sets
                .iter()
                .map(|set| depth(set, &by_name))
                .max()
                .unwrap_or(0),
            pss,
            held: living.bytes as f64 / 1e6,
            per_second: counted(&outcome.counts)?.mean(),
            n: took.count(),
            p50: took.percentile(50),
            p99: took.percentile(99),
            stalled: stalled as f64 / (self.options.seconds as f64 * 1e4),
        })
    }

    /// The sets as they are to be, with those that are there for others.
    fn planned(&self, sets: &[Value]) -> Result<Vec<Value>> {
        let program = &self.options.plan;
        let said = |output: &str| -> Result<Vec<u8>> {
            let mut plan = Command::new(program);
            plan.args(["plan", "--namespace", NAMESPACE, "--output", output]);
            plan.arg("--costs");
            plan.arg(self.options.out.with_file_name("workload-costs.json"));
            if let Some(memory) = &self.options.memory {
                plan.args(["--memory", memory]);
            }
            let done = plan.output();
            let done = done.with_context(|| program.display().to_string())?;
            let error = String::from_utf8_lossy(&done.stderr);
            ensure!(
                done.status.success() && !error.contains("left out: "),
                "{}: {}",
                program.display(),
                error.trim()
            );
            Ok(done.stdout)
        };
        println!("{}", String::from_utf8_lossy(&said("tree")?));
        let mut planned = cluster::as_json(&said("yaml")?)?;
        let unchanged = sets.iter().filter(|set| {
            !planned
                .iter()
                .any(|one| one["metadata"]["name"] == set["metadata"]["name"])
        });
        let unchanged: Vec<Value> = unchanged.cloned().collect();
        planned.extend(unchanged);
        Ok(planned)
    }
}

type ByName<'a> = std::collections::BTreeMap<&'a str, &'a Value>;

fn by_name<'a>(sets: &[&'a Value]) -> ByName<'a> {
    sets.iter()
        .filter_map(|set| Some((set["metadata"]["name"].as_str()?, *set)))
        .collect()
}

/// 1 for a set that extends none.
fn depth(set: &Value, by_name: &ByName) -> usize {
    let mut depth = 1;
    let mut at = set;
    while let Some(above) = at["spec"]["extends"]["name"]
        .as_str()
        .and_then(|name| by_name.get(name))
    {
        (depth, at) = (depth + 1, *above);
        if depth > by_name.len() {
            break;
        }
    }
    depth
}

fn set_name(number: usize) -> String {
    format!("set-{number:02}")
}

fn function_name(number: usize) -> String {
    format!("function-{number:02}")
}

fn source(set: &Set) -> String {
    let imports = set
        .imports
        .iter()
        .map(|module| format!("import {module}\n"));
    imports.collect::<String>() + "\n\n" + Code::Hello.source()
}

/// The index of the packages that can be drawn.
fn wheels() -> [Value; 3] {
    let named = json!({"namespace": WHEELS, "name": "wheels"});
    let labels = json!({"app": "wheels"});
    let container = json!({
        "name": "wheels", "image": "docker.io/sock/workload-wheels:dev", "imagePullPolicy": "Never",
        "readinessProbe": {"httpGet": {"path": "/simple/", "port": 8080}, "periodSeconds": 2},
        "securityContext": {
            "allowPrivilegeEscalation": false, "runAsNonRoot": true, "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    });
    [
        objects::tenant(WHEELS),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": named,
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false, "containers": [container]},
                },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": named,
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_deep_a_set_is_is_counted_from_the_one_that_extends_none() {
        let set = |name: &str, above: Option<&str>| json!({"metadata": {"name": name}, "spec": {"extends": {"name": above}}});
        let sets = [set("a", None), set("b", Some("a")), set("c", Some("b"))];
        let sets: Vec<&Value> = sets.iter().collect();
        let depths: Vec<usize> = sets.iter().map(|set| depth(set, &by_name(&sets))).collect();
        assert_eq!(depths, [1, 2, 3]);
    }

    #[test]
    fn a_figure_takes_the_place_of_the_earlier_one() {
        let folder = std::env::temp_dir().join(format!("sock-bench-{}", std::process::id()));
        let out = folder.join("bench.json");
        let system = |system, per_second| System {
            system,
            zygotes: 1,
            depth: 1,
            pss: 1.0,
            held: 1.0,
            per_second,
            n: 1,
            p50: 1.0,
            p99: 1.0,
            stalled: 0.0,
        };
        for per_second in [1.0, 8.0] {
            let systems = [
                ("none", 1.0),
                ("one", 2.0),
                ("each", 8.0),
                ("half", 7.0),
                ("tree", per_second),
            ];
            add(
                &out,
                &systems.map(|(name, per_second)| system(name, per_second)),
            )
            .unwrap();
        }
        let read: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(read.as_array().unwrap().len(), 1);
        assert_eq!(
            (&read[0]["peer"], &read[0]["ratio"]),
            (&json!("one"), &json!(4.0))
        );
    }
}
