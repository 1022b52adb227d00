//! Faults in mid-traffic: what they may cost, and that nothing is left. They hit whole nodes, so nothing else
//! may run beside them. `sock-bench faults` injects and measures; `docs/reliability.md` has many rounds of it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Node, built, in_namespace, inventory_of_quiet, manifest, program, until,
    until_as_much, workers,
};

/// Takes the API server away for as long as a test may wait.
const AWAY: &str = "20";
/// May cost no request at all.
const FREE: [&str; 7] = [
    "zygote",
    "pool-shim",
    "containerd",
    "kubelet",
    "operator",
    "apiserver",
    "memory",
];
/// Hits what is on one node, or in one pod.
const LOCAL: [&str; 3] = ["shim", "disk", "node"];

fn bench(arguments: &[&str]) -> Result<()> {
    let path = built("sock-bench", "sock-bench")?;
    let mut command: Command = program(&path, arguments)?;
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| path.clone())?;
    // By way of this process, they are shown with the failure they explain.
    for line in BufReader::new(child.stderr.take().context("a pipe")?).lines() {
        eprintln!("{}", line?);
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "sock-bench {}: {status}",
        arguments.join(" ")
    );
    Ok(())
}

fn count(round: &Value, name: &str) -> Result<u64> {
    round[name]
        .as_u64()
        .with_context(|| format!("{name} of {round}"))
}

fn check(fault: &str, round: &Value) -> Result<()> {
    let answered = round["answered"].as_object().context("answered")?;
    let errors: u64 = answered.values().filter_map(Value::as_u64).sum();
    let of = |name| count(round, name);
    ensure!(of("wrong")? == 0, "an answer is another request's: {round}");
    ensure!(
        of("requests")? > 0,
        "no request was sent meanwhile: {round}"
    );
    match fault {
        "leaf" => ensure!(
            of("lost")? + of("lost_served")? + of("unsent")? == 0
                && errors == 1
                && answered
                    .keys()
                    .all(|answer| answer.starts_with("502 the function's process")),
            "only the request of the killed leaf fails, with 502: {round}"
        ),
        "shim" | "disk" => ensure!(
            of("lost")? + errors == 0,
            "only requests that the killed shim was serving are lost, and none is answered by an error: {round}"
        ),
        // All pods of it were serving. Pods of a node that has restarted get addresses anew, and one that was a
        // Function's may be the operator's next, who answers what still comes to it.
        "node" => ensure!(
            answered
                .keys()
                .all(|answer| answer.starts_with("404 there are /healthz")),
            "no request is answered by an error: {round}"
        ),
        free if FREE.contains(&free) => ensure!(
            of("lost")? + of("lost_served")? + of("unsent")? + errors == 0,
            "no request fails: {round}"
        ),
        other => bail!("nothing is promised for {other}"),
    }
    Ok(())
}

#[test]
fn every_fault_costs_what_is_promised_and_leaves_nothing() -> Result<()> {
    let nodes = workers()?;
    let before = inventory_of_quiet(&nodes)?;
    let out = std::env::temp_dir().join(format!("sock-faults-{}.json", std::process::id()));
    let path = out.to_string_lossy().into_owned();
    let faults = format!("leaf,{},{}", LOCAL.join(","), FREE.join(","));
    bench(&[
        "faults", "--rounds", "1", "--away", AWAY, "--only", &faults, "--out", &path,
    ])?;
    let reports: Vec<Value> = serde_json::from_slice(&std::fs::read(&out)?)?;
    std::fs::remove_file(&out)?;
    ensure!(reports.len() == FREE.len() + LOCAL.len() + 1, "{reports:?}");
    for report in &reports {
        let fault = report["fault"].as_str().context("fault")?;
        let rounds = report["rounds"].as_array().context("rounds")?;
        ensure!(rounds.len() == 1, "{report}");
        for round in rounds {
            check(fault, round).with_context(|| fault.to_owned())?;
        }
        ensure!(
            report["left"] == json!({}),
            "{fault} leaves {} {}",
            report["left"],
            report["new"]
        );
    }
    until_as_much(&nodes, &before)
}

/// While it lives, the disk that packages are installed on is a small one in memory, without what is there.
struct SmallDisk(Node);

impl SmallDisk {
    fn on(node: Node) -> Result<SmallDisk> {
        // A node that has had no PackageSet yet has no such directory.
        let mount =
            "mkdir -p /var/lib/sock && mount -t tmpfs -o size=2m,mode=755 tmpfs /var/lib/sock";
        node.shell(mount, &[])?;
        Ok(SmallDisk(node))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = self.0.shell("umount --lazy /var/lib/sock", &[]);
        if !std::thread::panicking() {
            unmounted.expect("the disk as before");
        }
    }
}

#[test]
fn a_full_disk_is_told_where_packages_are_kept_and_heals() -> Result<()> {
    let disk = SmallDisk::on(workers()?.into_iter().next().context("a node")?)?;
    let node = &disk.0;
    in_namespace("full-disk", |namespace| {
        let set = manifest::only_on(&node.name, manifest::numpy("science"));
        let code =
            "def handler(event, context):\n    return int(__import__('numpy').ones(3).sum())\n";
        namespace.apply(&[set, manifest::function("sum", "science", code)])?;
        until(
            "the PackageSet says that the disk is full",
            2 * MINUTE,
            || {
                let set = namespace.get(&["packageset", "science"])?;
                let said = set["status"]["conditions"].to_string();
                Ok(said
                    .contains("no space is left on the disk of the node")
                    .then_some(()))
            },
        )?;
        node.shell("mount -o remount,size=1g /var/lib/sock", &[])?;
        namespace.wait_for("packageset/science", "Ready", 3 * MINUTE)?;
        namespace.wait_for("function/sum", "Ready", 2 * MINUTE)
    });
    Ok(())
}

/// systemd asks what is left in the scope of a zygote's container to end, kills it after 90 s, and keeps the
/// pod's slice until then; leaves of Functions must not be among it.
#[test]
fn a_pool_that_goes_takes_no_leaf_along_and_is_not_kept_by_one() {
    in_namespace("pool-goes", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let code = "
import time

def handler(event, context):
    time.sleep(float(event['query'].get('seconds', 0)))
    return 'done'
";
        let fields = json!({"timeoutSeconds": 120});
        let function = manifest::with(manifest::function("slow", "plain", code), &fields);
        namespace.serve("slow", &[set, function])?;
        let pod = namespace.pod_of("slow")?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let mut client = Client::on(&other)?;
        client.open("slow", address, 8080)?;
        client.send("slow", "/?seconds=28")?;
        until("the leaf serves", MINUTE, || {
            Ok((!node.interpreters_of(&pod)?.is_empty()).then_some(()))
        })?;
        let pools = namespace.pods("sock.dev/pool=plain")?;
        let pool = pools.first().context("a pool")?;
        let name = pool["metadata"]["name"].as_str().context("metadata.name")?;
        let uid = pool["metadata"]["uid"]
            .as_str()
            .context("metadata.uid")?
            .to_owned();
        namespace.kubectl(&["delete", "pod", name, "--wait=true"])?;
        let leaf = node.interpreters_of(&pod)?;
        ensure!(!leaf.is_empty(), "the leaf serves on");
        until("the pool's cgroups are gone", MINUTE / 3, || {
            let script = r#"find /sys/fs/cgroup -type d -name "*$(echo "$1" | tr - _)*" -o -type d -name "*$1*""#;
            Ok(node.shell(script, &[&uid])?.is_empty().then_some(()))
        })?;
        ensure!(
            !node.interpreters_of(&pod)?.is_empty(),
            "the leaf serves on"
        );
        let answer = client.receive("slow")?;
        ensure!(answer.text()? == "done", "{answer:?}");
        let failed = node.shell(
            "systemctl list-units --state=failed --plain --no-legend 'cri-containerd-*'",
            &[],
        )?;
        ensure!(failed.is_empty(), "units failed: {failed}");
        Ok(())
    });
}
