//! Less memory for zygotes than they ask for: those end that are worth least, nobody who calls notices but by the time it takes, and
//! they come back. It is a whole node's memory, so nothing else may run beside this.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, Process, get, in_namespace, kubectl, manifest, until, workers,
};

/// Says which PackageSets' warm-ups were run before, and whether a zygote forked the process: PID 1 is a leaf's own.
const WHAT: &str = "
import builtins
import os

def handler(event, context):
    kept = sorted(name for name in vars(builtins) if name.startswith('KEPT_'))
    return {'kept': kept, 'forked': os.getpid() == 1}
";

const NODE: &str = "daemonset/sock-node";
const VARIABLE: &str = "SOCK_ZYGOTE_MEMORY";
const MIB: u64 = 1 << 20;

/// What the node installer is told zygotes may hold, until dropped.
struct Budget<'a> {
    node: &'a Node,
    before: String,
}

impl<'a> Budget<'a> {
    fn of(node: &'a Node) -> Result<Budget<'a>> {
        let set = get(&[NODE, "--namespace=sock-system"])?;
        let environment = &set["spec"]["template"]["spec"]["containers"][0]["env"];
        let environment = environment.as_array().context("env")?;
        let before = environment.iter().find(|one| one["name"] == VARIABLE);
        let before = before.and_then(|one| one["value"].as_str());
        let before = before.with_context(|| format!("{VARIABLE} of {NODE}"))?;
        Ok(Budget {
            node,
            before: before.to_owned(),
        })
    }

    fn set(value: &str) -> Result<()> {
        let value = format!("{VARIABLE}={value}");
        let namespace = "--namespace=sock-system";
        kubectl(&["set", "env", namespace, NODE, &value])?;
        kubectl(&["rollout", "status", namespace, NODE, "--timeout=120s"])?;
        Ok(())
    }

    fn change(&self, bytes: u64) -> Result<()> {
        let bytes = bytes.to_string();
        Self::set(&bytes)?;
        until("the node's shims are told", MINUTE, || {
            let told = self.node.shell("cat /run/sock/zygote-memory", &[])?;
            Ok((told.trim() == bytes).then_some(()))
        })
    }
}

impl Drop for Budget<'_> {
    fn drop(&mut self) {
        if let Err(error) = Self::set(&self.before) {
            eprintln!("{error:#}");
        }
    }
}

/// A PackageSet whose zygote holds 40 MiB, in a process of about 10.
fn set(node: &Node, name: &str, parent: Option<&str>) -> Value {
    let mut set = manifest::only_on(&node.name, manifest::package_set(name, &["json"]));
    let keep = format!("import builtins\nbuiltins.KEPT_{name} = b'x' * (40 << 20)\n");
    set["spec"]["warmUp"] = keep.into();
    if let Some(parent) = parent {
        set["spec"]["extends"] = json!({"name": parent});
    }
    set
}

/// What a request is answered, by the Function of a PackageSet.
struct Caller<'a> {
    client: Client,
    namespace: &'a Namespace,
}

impl Caller<'_> {
    fn call(&mut self, set: &str) -> Result<(Vec<String>, bool)> {
        let pod = self.namespace.pod_of(set)?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let said = self.client.get(address, 8080, "/")?.json()?;
        let kept = serde_json::from_value(said["kept"].clone())?;
        Ok((kept, said["forked"] == true))
    }

    /// The Function is answered from its own zygote.
    fn is_forked_with(&mut self, set: &str, kept: &[&str]) -> Result<()> {
        let said = self.call(set)?;
        ensure!(said.1 && said.0 == kept, "{set}: {said:?}");
        Ok(())
    }

    fn status(&mut self, set: &str) -> Result<Value> {
        let pool = self.namespace.pool_of(set)?;
        let address = pool["status"]["podIP"].as_str().context("status.podIP")?;
        self.client.get(address, 9464, "/status")?.json()
    }
}

fn zygote(namespace: &Namespace, node: &Node, set: &str) -> Result<Process> {
    node.zygote_of(&namespace.pool_of(set)?)
}

fn never_restarted(namespace: &Namespace, set: &str) -> Result<()> {
    let pool = namespace.pool_of(set)?;
    let container = &pool["status"]["containerStatuses"][0];
    ensure!(
        container["ready"] == true && container["restartCount"] == 0,
        "{set}: {container}"
    );
    Ok(())
}

/// In hundredths, how much of the last ten seconds nobody got on for want of memory.
fn stalled(node: &Node) -> Result<f64> {
    let text = node.shell("cat /proc/pressure/memory 2>/dev/null || true", &[])?;
    let full = text
        .lines()
        .find_map(|line| line.strip_prefix("full avg10="));
    let average = full.and_then(|line| line.split(' ').next());
    Ok(average.map_or(Ok(0.0), str::parse)?)
}

#[test]
fn zygotes_that_are_worth_least_end_and_come_back_and_no_request_is_lost() {
    in_namespace("memory", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (other, node) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let sets = ["base", "leaf", "busy", "idle"];
        let mut objects = vec![
            set(&node, "base", None),
            set(&node, "leaf", Some("base")),
            set(&node, "busy", None),
            set(&node, "idle", None),
        ];
        let never = json!({"reuse": "Never"});
        objects.extend(sets.map(|set| manifest::with(manifest::function(set, set, WHAT), &never)));
        for set in sets {
            namespace.serve(set, &objects)?;
        }
        let mut caller = Caller {
            client: Client::on(&other)?,
            namespace,
        };
        for set in ["base", "busy", "idle"] {
            caller.is_forked_with(set, &[&format!("KEPT_{set}")])?;
        }
        // Its parent has to allow children first, by a pool of its own.
        until("its zygote descends", 2 * MINUTE, || {
            let (kept, forked) = caller.call("leaf")?;
            Ok((forked && kept == ["KEPT_base", "KEPT_leaf"]).then_some(()))
        })?;
        let depth = |set: &str| -> Result<usize> {
            let zygote = zygote(namespace, &node, set)?;
            Ok(zygote.status("NSpid")?.split_whitespace().count())
        };
        let nested = depth("leaf")?;
        ensure!(nested == depth("base")? + 1);
        let busy = ["base", "busy"].map(|set| Ok((set, zygote(namespace, &node, set)?.pid)));
        let busy = busy.into_iter().collect::<Result<Vec<_>>>()?;

        // Room for the two that are called, and half of another.
        let budget = Budget::of(&node)?;
        budget.change(130 * MIB)?;
        let mut answered = 0;
        until("what nobody calls has ended", 5 * MINUTE, || {
            for (set, _) in &busy {
                caller.is_forked_with(set, &[&format!("KEPT_{set}")])?;
                answered += 1;
            }
            let gone = |set| -> Result<bool> {
                Ok(node.interpreters_of(&namespace.pool_of(set)?)?.is_empty())
            };
            Ok((gone("leaf")? && gone("idle")?).then_some(()))
        })?;
        ensure!(answered > 20, "{answered} requests");
        ensure!(stalled(&node)? < 10.0);
        // The nearest ancestor stands in for one, an interpreter for the other.
        ensure!(caller.call("leaf")? == (vec!["KEPT_base".to_owned()], true));
        ensure!(caller.call("idle")? == (Vec::new(), false));
        for set in ["leaf", "idle"] {
            let status = caller.status(set)?;
            ensure!(status["resting"] == true, "{set}: {status}");
            let log = namespace.kubectl(&[
                "logs",
                "--container=zygote",
                &format!(
                    "pod/{}",
                    namespace.pool_of(set)?["metadata"]["name"]
                        .as_str()
                        .context("a name")?
                ),
            ])?;
            ensure!(log.contains("comes back when a Function asks"), "{log}");
        }
        for (set, pid) in &busy {
            caller.is_forked_with(set, &[&format!("KEPT_{set}")])?;
            ensure!(zygote(namespace, &node, set)?.pid == *pid, "{set} ended");
        }

        // A parent that rests comes back with its child, below which the child is made.
        budget.change(MIB)?;
        until("all have ended", 4 * MINUTE, || {
            let gone = sets.map(|set| -> Result<bool> {
                Ok(node.interpreters_of(&namespace.pool_of(set)?)?.is_empty())
            });
            let gone = gone.into_iter().collect::<Result<Vec<_>>>()?;
            Ok(gone.iter().all(|gone| *gone).then_some(()))
        })?;
        drop(budget);
        until("they are there again", 2 * MINUTE, || {
            let leaf = caller.call("leaf")?;
            let idle = caller.call("idle")?;
            let whole = leaf.0 == ["KEPT_base", "KEPT_leaf"] && idle.0 == ["KEPT_idle"];
            Ok((whole && leaf.1 && idle.1).then_some(()))
        })?;
        ensure!(depth("leaf")? == nested, "it descends from nobody");
        for set in sets {
            never_restarted(namespace, set)?;
        }
        for set in ["leaf", "idle"] {
            ensure!(caller.status(set)?["resting"] == false);
        }
        Ok(())
    });
}
