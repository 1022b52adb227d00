//! Deleting everything leaves nothing on the nodes. Runs last and alone: it looks at whole nodes.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sock_e2e::{
    Client, Inventory, MINUTE, in_namespace, inventory, inventory_of_quiet, manifest,
    until_as_before, workers,
};

#[test]
fn deleting_everything_leaves_nothing_on_the_nodes() -> Result<()> {
    let nodes = workers()?;
    let before = inventory_of_quiet(&nodes)?;

    in_namespace("everything", |namespace| {
        let requirement = include_str!("../images/requirements-small.txt")
            .lines()
            .find(|line| !line.starts_with('#'))
            .context("a requirement")?;
        let code = "
import os
import subprocess

def handler(event, context):
    # A process that outlives the request, and a file beside the code's.
    subprocess.Popen(['sleep', '1000'])
    with open('/tmp/left', 'w') as file:
        file.write('behind')
    return 'done'
";
        let scaled = json!({"replicas": 2, "reuse": "Always"});
        let fresh = json!({"reuse": "Never"});
        namespace.apply(&[
            manifest::package_set_of("small", &[requirement], &["idna"]),
            manifest::with(manifest::function("scaled", "small", code), &scaled),
            manifest::with(manifest::function("fresh", "small", code), &fresh),
            manifest::busybox(
                "box",
                &[("one", "exec sleep 1000"), ("two", "exec sleep 1000")],
            ),
            manifest::busybox("ended", &[("main", "exit 3")]),
        ])?;
        namespace.wait_for("pod/box", "Ready", MINUTE)?;
        for function in ["scaled", "fresh"] {
            namespace.wait_for(&format!("function/{function}"), "Ready", 3 * MINUTE)?;
        }
        let mut pods = namespace.pods("sock.dev/function=scaled")?;
        pods.extend(namespace.pods("sock.dev/function=fresh")?);
        let mut client = Client::on(nodes.first().context("a node")?)?;
        for pod in &pods {
            let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
            for answer in client.burst(address, 8080, "/", 4)? {
                ensure!(answer.text()? == "done", "{answer:?}");
            }
        }
        let during = inventory(&nodes)?;
        for kind in [
            "shim", "holder", "python", "mount", "cgroup", "file", "netns", "veth",
        ] {
            let of = |all: &Inventory| {
                all.iter()
                    .filter(|line| line.contains(&format!(": {kind} ")))
                    .count()
            };
            ensure!(
                of(&during) > of(&before),
                "nothing new of the kind {kind} was seen: the account is blind"
            );
        }
        Ok(())
    });
    until_as_before(&nodes, &before)
}
