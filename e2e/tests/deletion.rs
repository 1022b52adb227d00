//! Deleting leaves nothing on the nodes, be it one Function, a PackageSet in use, or everything, and disturbs nobody else.
//! Runs late and alone: it looks at whole nodes.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, Inventory, MINUTE, Namespace, Node, in_namespace, inventory, inventory_of_quiet,
    manifest, until, until_as_before, workers,
};

/// Every kind of thing that the inventory names. A file in the node's shared memory is made by no pod of a test, and by hand.
const KINDS: [&str; 13] = [
    "shim",
    "holder",
    "python",
    "process",
    "namespace",
    "socket",
    "mount",
    "cgroup",
    "file",
    "netns",
    "veth",
    "scope",
    "shm",
];
const MAKE_SHARED: &str = "touch /dev/shm/sock-e2e";
const REMOVE_SHARED: &str = "rm /dev/shm/sock-e2e";

/// A leaf that a zygote has forked is the first process of its namespace; a plain interpreter is not.
const CODE: &str = "
import os
import time

def handler(event, context):
    time.sleep(float(event['query'].get('seconds', 0)))
    return str(os.getpid())
";
const FORKED: &str = "1";

fn kind(line: &str) -> &str {
    let thing = line.split_once(": ").map_or("", |(_, thing)| thing);
    thing.split(' ').next().unwrap_or_default()
}

fn small() -> Result<&'static str> {
    include_str!("../images/requirements-small.txt")
        .lines()
        .find(|line| !line.starts_with('#'))
        .context("a requirement")
}

fn identity(pod: &Value) -> Value {
    let container = &pod["status"]["containerStatuses"][0];
    json!([
        pod["metadata"]["uid"],
        container["containerID"],
        container["restartCount"]
    ])
}

fn address(pod: &Value) -> Result<String> {
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    Ok(address.to_owned())
}

/// A Function that stays, with the PackageSet that it runs on: it is under load while its neighbours are deleted.
struct Staying<'a> {
    namespace: &'a Namespace,
    nodes: &'a [Node],
    client: Client,
    pods: Vec<Value>,
    before: Inventory,
}

impl<'a> Staying<'a> {
    fn new(namespace: &'a Namespace, nodes: &'a [Node]) -> Result<Staying<'a>> {
        let (node, other) = nodes.first().zip(nodes.get(1)).context("two nodes")?;
        let set = manifest::only_on(
            &node.name,
            manifest::package_set_of("plain", &[small()?], &["idna"]),
        );
        // One leaf that is always the same: what comes and goes is then the neighbours'.
        let one = json!({"instances": 1});
        let function = manifest::with(manifest::function("stays", "plain", CODE), &one);
        namespace.serve("stays", &[set, function])?;
        let mut client = Client::on(other)?;
        let address = address(&namespace.pod_of("stays")?)?;
        client.load("steady", &address, 8080, "/")?;
        let mut staying = Staying {
            namespace,
            nodes,
            client,
            pods: Vec::new(),
            before: Inventory::new(),
        };
        staying.goes_on()?;
        staying.pods = staying.all()?;
        let mut last = Inventory::new();
        staying.before = until("the nodes are quiet", MINUTE, || {
            let now = inventory(nodes)?;
            let is_quiet = now == last;
            last.clone_from(&now);
            Ok(is_quiet.then_some(now))
        })?;
        Ok(staying)
    }

    /// Its pod, and that of its PackageSet.
    fn all(&self) -> Result<Vec<Value>> {
        let pods = [
            self.namespace.pod_of("stays")?,
            self.namespace
                .pods("sock.dev/pool=plain")?
                .pop()
                .context("a pool")?,
        ];
        Ok(pods.iter().map(identity).collect())
    }

    /// Waits until it has had many more answers.
    fn goes_on(&mut self) -> Result<()> {
        let before: u64 = self.client.count("steady")?.values().sum();
        until("requests go on", MINUTE, || {
            let now: u64 = self.client.count("steady")?.values().sum();
            Ok((now >= before + 50).then_some(()))
        })
    }

    /// Has one leaf of the Function `goes` answer a long request, on the connection `held`, and another frozen.
    fn use_goes(&mut self) -> Result<()> {
        let pod = self.namespace.pod_of("goes")?;
        let address = address(&pod)?;
        self.client.open("held", &address, 8080)?;
        self.client.send("held", "/?seconds=20")?;
        let node = Node::of(&pod)?;
        until("a leaf serves and another is frozen", MINUTE, || {
            let text = self.client.get(&address, 8080, "/")?.text()?.to_owned();
            ensure!(text == FORKED, "it was not forked: {text}");
            let mut frozen = Vec::new();
            for leaf in node.interpreters_of(&pod)? {
                frozen.push(node.is_frozen(&leaf)?);
            }
            Ok((frozen.contains(&true) && frozen.contains(&false)).then_some(()))
        })?;
        let during = inventory(self.nodes)?;
        for kind_of_leaf in ["python", "shim", "cgroup", "socket", "namespace"] {
            ensure!(
                during
                    .difference(&self.before)
                    .any(|line| kind(line) == kind_of_leaf),
                "nothing new of the kind {kind_of_leaf} was seen"
            );
        }
        Ok(())
    }

    /// Waits until nothing is on the nodes that was not before; meanwhile it was served, by the same pods.
    fn until_as_before(mut self) -> Result<()> {
        let mut left: Vec<String> = Vec::new();
        until("the nodes are as they were", 3 * MINUTE, || {
            let now = inventory(self.nodes)?;
            left = now.difference(&self.before).cloned().collect();
            Ok(left.is_empty().then_some(()))
        })
        .with_context(|| format!("left behind: {left:#?}"))?;
        self.goes_on()?;
        let counts = self.client.stop("steady")?;
        ensure!(
            counts.len() == 1 && counts.contains_key("200"),
            "requests of a neighbour were lost: {counts:?}"
        );
        ensure!(
            self.all()? == self.pods,
            "a neighbour's pod is another: {:?}",
            self.all()?
        );
        Ok(())
    }
}

/// Its leaves are frozen soon, and end soon enough to be followed by others.
fn goes(set: &str) -> Value {
    let idle = json!({"idle": {"freezeAfterMs": 100, "endAfterMs": 5000}});
    manifest::with(manifest::function("goes", set, CODE), &idle)
}

#[test]
fn deleting_one_function_leaves_nothing_of_it_and_its_neighbours_serve_on() -> Result<()> {
    let nodes = workers()?;
    let empty = inventory_of_quiet(&nodes)?;
    in_namespace("neighbour", |namespace| {
        let mut staying = Staying::new(namespace, &nodes)?;
        namespace.serve("goes", &[goes("plain")])?;
        staying.use_goes()?;
        namespace.kubectl(&["delete", "function/goes", "--timeout=60s"])?;
        let held = staying.client.receive("held")?;
        ensure!(held.text()? == FORKED, "{held:?}");
        staying.until_as_before()
    });
    until_as_before(&nodes, &empty)
}

#[test]
fn deleting_a_package_set_in_use_leaves_its_function_and_nothing_else() -> Result<()> {
    let nodes = workers()?;
    let empty = inventory_of_quiet(&nodes)?;
    in_namespace("in-use", |namespace| {
        let mut staying = Staying::new(namespace, &nodes)?;
        let node = nodes.first().context("a node")?;
        let set = manifest::package_set_of("gone", &[small()?], &["idna", "json"]);
        let set = manifest::only_on(&node.name, set);
        namespace.serve("goes", &[set, goes("gone")])?;
        let pod = namespace.pod_of("goes")?;
        staying.use_goes()?;

        namespace.kubectl(&["delete", "packageset/gone", "--timeout=60s"])?;
        let message = namespace.message_of("function/goes", "PackageSetReady", "False", MINUTE)?;
        ensure!(
            message.contains("PackageSet gone is gone") && message.contains("plain interpreters"),
            "{message}"
        );
        namespace.wait_for("function/goes", "Ready", MINUTE)?;
        let held = staying.client.receive("held")?;
        ensure!(held.text()? == FORKED, "{held:?}");
        until("the pool is gone", 2 * MINUTE, || {
            let pools = namespace.get(&["pods", "--selector=sock.dev/pool=gone"])?;
            let is_empty = pools["items"].as_array().is_some_and(Vec::is_empty);
            Ok(is_empty.then_some(()))
        })?;
        // Whoever asks keeps the leaves that the zygote has forked.
        until("the leaves have ended", MINUTE, || {
            Ok(node.interpreters_of(&pod)?.is_empty().then_some(()))
        })?;
        let answer = staying.client.get(&address(&pod)?, 8080, "/")?;
        ensure!(
            answer.text()? != FORKED,
            "a plain interpreter serves: {answer:?}"
        );
        ensure!(
            identity(&namespace.pod_of("goes")?) == identity(&pod),
            "the pod of the Function is the same"
        );

        namespace.kubectl(&["delete", "function/goes", "--timeout=60s"])?;
        staying.until_as_before()
    });
    until_as_before(&nodes, &empty)
}

#[test]
fn deleting_everything_leaves_nothing_on_the_nodes() -> Result<()> {
    let nodes = workers()?;
    let before = inventory_of_quiet(&nodes)?;

    in_namespace("everything", |namespace| {
        let requirement = small()?;
        let code = "
import os
import socket
import subprocess

def handler(event, context):
    # A socket that is no file, and that the leaf keeps.
    global left
    left = socket.socket(socket.AF_UNIX)
    left.bind('\\0left-' + os.urandom(8).hex())
    left.listen()
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
        for node in &nodes {
            node.shell(MAKE_SHARED, &[])?;
        }
        let during = inventory(&nodes);
        for node in &nodes {
            node.shell(REMOVE_SHARED, &[])?;
        }
        let during = during?;
        let new: Vec<&String> = during.difference(&before).collect();
        for expected in KINDS {
            ensure!(
                new.iter().any(|line| kind(line) == expected),
                "nothing new of the kind {expected} was seen: the account is blind"
            );
        }
        for socket in ["unix @left-", "tcp6 8080"] {
            ensure!(
                new.iter()
                    .any(|line| kind(line) == "socket" && line.contains(socket)),
                "no socket {socket} was seen: the account is blind"
            );
        }
        let kinds: BTreeSet<&str> = during.iter().map(|line| kind(line)).collect();
        ensure!(
            kinds == KINDS.into_iter().collect(),
            "kinds that nobody looks for: {kinds:?}"
        );
        Ok(())
    });
    until_as_before(&nodes, &before)
}
