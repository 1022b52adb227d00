//! Deleting everything leaves nothing on the nodes. Runs last and alone: it looks at whole nodes.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sock_e2e::{Client, MINUTE, Node, get, in_namespace, kubectl, manifest, until, workers};

/// Lines of what the runtime can leave on a node: one thing a line, named so that it is the same the next time.
const INVENTORY: &str = r#"
for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    */containerd-shim-sock-v1\ *) echo "shim ${name##*-id }" ;;
    holder*) echo "holder ${each#/proc/}" ;;
    python3\ */opt/sock/python/*) echo "python ${each#/proc/}" ;;
  esac
done
awk '$2 ~ "^/(run|var)/" && $2 !~ "^/var/lib/kubelet/pods" { print "mount", $2 }' /proc/mounts | sort -u
awk '$2 ~ "^/var/lib/kubelet/pods" { print "mount", $2 }' /proc/mounts | sort -u
find /sys/fs/cgroup -type d \( -name '*pod*' -o -name 'leaf-*' -o -name 'cri-containerd*' -o -name '*holder*' -o -name '*sock*' \) 2>/dev/null | sed 's/^/cgroup /'
find /run/sock /var/lib/sock -mindepth 2 -maxdepth 4 2>/dev/null | sed 's/^/file /'
find /run/containerd/io.containerd.runtime.v2.task /run/containerd/s -mindepth 1 -maxdepth 2 2>/dev/null | sed 's/^/file /'
ls /var/run/netns 2>/dev/null | sed 's/^/netns /'
ip -o link show type veth | sed 's/^[0-9]*: \([^@:]*\).*/veth \1/'
ls -1 /dev/shm | sed 's/^/shm /'
systemctl list-units --type=scope --plain --no-legend 'cri-containerd-*' | awk '{ print "scope", $1 }'
"#;

type Inventory = BTreeSet<String>;

fn inventory(nodes: &[Node]) -> Result<Inventory> {
    let mut all = Inventory::new();
    for node in nodes {
        for line in node.shell(INVENTORY, &[])?.lines() {
            all.insert(format!("{}: {line}", node.name));
        }
    }
    Ok(all)
}

/// What belongs to tests that ran before is on its way out; the account begins when it is gone.
fn until_other_tests_are_gone() -> Result<()> {
    kubectl(&[
        "delete",
        "namespace",
        "sock-e2e",
        "--ignore-not-found",
        "--timeout=60s",
    ])?;
    until("the namespaces of other tests are gone", 3 * MINUTE, || {
        let list = get(&["namespaces", "--selector=sock-e2e=test"])?;
        let left = list["items"].as_array().context("namespaces")?.len();
        Ok((left == 0).then_some(()))
    })
}

/// Every shim, pool directory and cached lock belongs to something that is there: what earlier tests left would not.
fn strays(nodes: &[Node]) -> Result<Vec<String>> {
    let namespaces = get(&["namespaces"])?;
    let tenants: BTreeSet<&str> = namespaces["items"]
        .as_array()
        .context("namespaces")?
        .iter()
        .filter_map(|one| one["metadata"]["uid"].as_str())
        .collect();
    let mut strays = Vec::new();
    for node in nodes {
        let sandboxes = node.shell("crictl pods --quiet --no-trunc", &[])?;
        let sandboxes: BTreeSet<&str> = sandboxes.lines().collect();
        let found = inventory(std::slice::from_ref(node))?;
        for line in &found {
            let thing = line.split_once(": ").map_or("", |(_, thing)| thing);
            if let Some(arguments) = thing.strip_prefix("shim ") {
                let id = arguments.split(' ').next().unwrap_or_default();
                if !sandboxes.contains(id) {
                    strays.push(line.clone());
                }
            }
            for directory in ["file /run/sock/pools/", "file /var/lib/sock/cache/"] {
                let tenant = thing
                    .strip_prefix(directory)
                    .and_then(|rest| rest.split('/').next());
                if tenant.is_some_and(|tenant| !tenants.contains(tenant)) {
                    strays.push(line.clone());
                }
            }
        }
    }
    Ok(strays)
}

#[test]
fn deleting_everything_leaves_nothing_on_the_nodes() -> Result<()> {
    let nodes = workers()?;
    until_other_tests_are_gone()?;
    until("nothing of earlier tests is left", 3 * MINUTE, || {
        let strays = strays(&nodes)?;
        ensure!(strays.is_empty(), "{strays:#?}");
        Ok(Some(()))
    })?;
    let before = inventory(&nodes)?;

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
    until_other_tests_are_gone()?;
    // Namespaces go when their pods' objects have gone. What is on the nodes follows a little later, node cache
    // and pool directories last: the node installer removes them within about a minute of their last use.
    let mut last: Vec<String> = Vec::new();
    let gone = until("the nodes are as they were", 3 * MINUTE, || {
        last = inventory(&nodes)?.difference(&before).cloned().collect();
        Ok(last.is_empty().then_some(()))
    });
    gone.with_context(|| format!("left behind: {last:#?}"))
}
