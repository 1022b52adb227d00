//! Removing the whole of sock, as manifests/README.md says. Runs last: there is no sock afterwards.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, Inventory, MINUTE, Namespace, Node, Security, get, in_namespace_of, inventory, kubectl,
    manifest, until, workers,
};

/// What sock has put on a node, and what it has changed there.
const TRACES: &str = r#"
find /opt/sock /var/lib/sock /run/sock /etc/containerd -name '*sock*' 2>/dev/null | sed 's/^/file /'
grep -lE 'runtimes\.sock|containerd\.sock\.v1|shim-sock|/opt/sock|sock\.toml' /etc/containerd/*.toml /etc/containerd/*/*.toml 2>/dev/null | sed 's/^/config /'
crictl info 2>/dev/null | grep -o 'containerd-shim-sock-v1\|io.containerd.sock[^"]*' | sort -u | sed 's/^/runtime /'
awk '$2 ~ "sock" && $2 !~ "kubelet" { print "mount", $2 }' /proc/mounts
for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    /opt/sock/* | */containerd-shim-sock-v1\ * | holder* | */sock-node\ *) echo "process $name" ;;
  esac
done
true
"#;

/// All of a node that an installation may touch, changed or not: files with mode, owner and content, directories, cgroups and how
/// they are mounted, settings of the kernel, units, containerd's configuration and containers. The settings that are left out
/// count what the kernel does, or are random; to look at binfmt_misc would mount it.
const STATE: &str = r#"
set -eu
{
  find /etc /opt /usr/local /root /srv -xdev ! -type f -printf '%p %y %M %U:%G %l\n'
  find /etc /opt /usr/local /root /srv -xdev -type f -printf '%p %y %M %U:%G\n' -exec sha256sum {} +
  find /var/lib -mindepth 1 -maxdepth 1 -printf '%p %y %M %U:%G\n'
  find /run /var -mindepth 1 -maxdepth 2 -printf '%p %y\n'
} | sort -u | sed 's/^/file /'
grep cgroup /proc/mounts | sort -u | sed 's/^/mounted /'
find /sys/fs/cgroup -maxdepth 2 -type d | sed 's/^/cgroup /'
find /sys/fs/cgroup -maxdepth 2 -name cgroup.subtree_control -exec grep -H '' {} + | sed 's/^/controllers /'
find /proc/sys -name binfmt_misc -prune -o -type f -perm /444 -exec grep -Hs '' {} + |
  grep -vE '^/proc/sys/(fs/(dentry-state|file-nr|inode-nr|inode-state|quota/)|kernel/(ns_last_pid|random/)|net/netfilter/nf_conntrack_count)' |
  sed 's/^/setting /'
systemctl list-unit-files --no-legend --plain | awk '{ print "unit", $1, $2 }'
containerd config dump 2>/dev/null | sed 's/^/containerd /'
ctr --namespace k8s.io containers ls -q | sed 's/^/container /'
"#;

/// What a node and its object say of an installation: one thing a line.
fn state(node: &Node) -> Result<BTreeSet<String>> {
    let mut all: BTreeSet<String> = node.shell(STATE, &[])?.lines().map(str::to_owned).collect();
    let object = get(&["node", &node.name])?;
    for pointer in [
        "/metadata/labels",
        "/metadata/annotations",
        "/spec/taints",
        "/status/runtimeHandlers",
    ] {
        let value = object.pointer(pointer).unwrap_or(&Value::Null);
        all.insert(format!("{pointer} {value}"));
    }
    Ok(all)
}

fn traces(nodes: &[Node]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in nodes {
        let found = node.shell(TRACES, &[])?;
        all.extend(found.lines().map(|line| format!("{}: {line}", node.name)));
    }
    Ok(all)
}

/// The node that sock keeps away from has never had it. Without the label that says what it is, it becomes a node like others.
struct Untouched {
    node: Node,
}

const ROLE: &str = "node-role.kubernetes.io/control-plane";

impl Untouched {
    fn find() -> Result<Untouched> {
        let list = get(&["nodes", "--selector", ROLE])?;
        let name = list["items"][0]["metadata"]["name"].as_str();
        let name = name.context("a node of the control plane")?.to_owned();
        Ok(Untouched {
            node: Node { name },
        })
    }

    fn become_a_worker(&self) -> Result<()> {
        kubectl(&["label", "node", &self.node.name, &format!("{ROLE}-")])?;
        Ok(())
    }

    fn as_before(&self) -> Result<()> {
        let label = format!("{ROLE}=");
        kubectl(&["label", "node", &self.node.name, "--overwrite", &label])?;
        Ok(())
    }
}

impl Drop for Untouched {
    fn drop(&mut self) {
        // Also of a test that failed; otherwise it is there already.
        let _ = self.as_before();
    }
}

/// Prints a line every tenth of a second: a gap or a new start would be seen.
const TICKS: &str = "n=0; while true; do n=$((n+1)); echo tick $n; sleep 0.1; done";

fn identity(pod: &Value) -> Value {
    json!([
        pod["metadata"]["uid"],
        pod["status"]["containerStatuses"][0]["containerID"],
        pod["status"]["containerStatuses"][0]["restartCount"]
    ])
}

/// A pod on each node, named after it.
fn everywhere(name: &str, nodes: &[Node], script: &str, runtime: Option<&str>) -> Vec<Value> {
    let pod = |node: &Node| {
        let mut pod = manifest::busybox(&format!("{name}-{}", node.name), &[("main", script)]);
        pod["metadata"]["labels"]["app"] = json!(name);
        if let Some(spec) = pod["spec"].as_object_mut() {
            spec.remove("runtimeClassName");
            if let Some(runtime) = runtime {
                spec.insert("runtimeClassName".into(), json!(runtime));
            }
            spec.insert("nodeName".into(), json!(node.name));
        }
        pod
    };
    nodes.iter().map(pod).collect()
}

fn identities(namespace: &Namespace, name: &str) -> Result<Vec<Value>> {
    let pods = namespace.pods(&format!("app={name}"))?;
    Ok(pods.iter().map(identity).collect())
}

fn until_ready(namespace: &Namespace, name: &str) -> Result<()> {
    let selector = format!("--selector=app={name}");
    namespace.kubectl(&[
        "wait",
        "pod",
        &selector,
        "--for=condition=Ready",
        "--timeout=60s",
    ])?;
    Ok(())
}

/// Waits until no pod of a selector is there.
fn until_gone(what: &str, selector: &str) -> Result<()> {
    until(what, 2 * MINUTE, || {
        let pods = get(&["pods", "--all-namespaces", "--selector", selector])?;
        let is_empty = pods["items"].as_array().is_some_and(Vec::is_empty);
        Ok(is_empty.then_some(()))
    })
}

/// Installs sock on a node that has never had it, and uses it there.
fn use_on(untouched: &Untouched, namespace: &Namespace, from: &Node) -> Result<()> {
    untouched.become_a_worker()?;
    let object = format!("node/{}", untouched.node.name);
    kubectl(&[
        "wait",
        &object,
        "--for=jsonpath={.metadata.labels.sock\\.dev/node}=ready",
        "--timeout=120s",
    ])?;
    let mut set = manifest::only_on(
        &untouched.node.name,
        manifest::package_set("plain", &["json"]),
    );
    set["spec"]["tolerations"] = json!([{"key": ROLE, "operator": "Exists"}]);
    let code = "def handler(event, context):\n    return 'here'\n";
    namespace.serve("here", &[set, manifest::function("here", "plain", code)])?;
    let pod = namespace.pod_of("here")?;
    ensure!(Node::of(&pod)? == untouched.node, "{pod}");
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    let answer = Client::on(from)?.get(address, 8080, "/")?;
    ensure!(answer.text()? == "here", "{answer:?}");
    Ok(())
}

/// Deletes what runs, and the operator.
fn delete_what_runs() -> Result<()> {
    kubectl(&[
        "delete",
        "functions,packagesets",
        "--all",
        "--all-namespaces",
        "--timeout=120s",
    ])?;
    until_gone(
        "the pods of Functions and pools are gone",
        "app.kubernetes.io/managed-by=sock-operator",
    )?;
    kubectl(&[
        "-n",
        "sock-system",
        "delete",
        "deployment",
        "sock-operator",
        "--timeout=60s",
    ])?;
    until_gone(
        "the operator is gone",
        "app.kubernetes.io/name=sock-operator",
    )
}

/// Has the node installers take everything away, which they refuse while a pod of sock is left.
fn uninstall(namespace: &Namespace, nodes: &[Node]) -> Result<()> {
    let boxes = identities(namespace, "box")?;
    let patch = r#"[{"op":"replace","path":"/spec/template/spec/containers/0/args","value":["uninstall"]}]"#;
    kubectl(&[
        "-n",
        "sock-system",
        "patch",
        "daemonset",
        "sock-node",
        "--type=json",
        "-p",
        patch,
    ])?;
    let (refused, message) = until("an installer refuses", 2 * MINUTE, || {
        let pods = get(&[
            "-n",
            "sock-system",
            "pods",
            "--selector=app.kubernetes.io/name=sock-node",
        ])?;
        let pods = pods["items"].as_array().context("pods")?;
        Ok(pods.iter().find_map(|pod| {
            let container = &pod["status"]["containerStatuses"][0];
            // What an installer that was replaced has said stands there too.
            let message = ["state", "lastState"]
                .iter()
                .filter_map(|one| container[one]["terminated"]["message"].as_str())
                .find(|message| message.contains("still run on this node"))?;
            let node = pod["spec"]["nodeName"].as_str()?;
            Some((node.to_owned(), message.to_owned()))
        }))
    })?;
    ensure!(
        message.contains("1 sandboxes of sock still run on this node")
            && message.contains("delete the pods with runtimeClassName sock first"),
        "{message}"
    );
    // Nothing was taken away, there or where the turn has not come yet.
    for node in nodes {
        let found = traces(std::slice::from_ref(node))?;
        for kind in ["file /opt/sock/bin/", "config ", "runtime "] {
            ensure!(
                found
                    .iter()
                    .any(|line| line.starts_with(&format!("{}: {kind}", node.name))),
                "{refused} has refused, and {} has no {kind}: {found:#?}",
                node.name
            );
        }
    }
    ensure!(
        identities(namespace, "box")? == boxes,
        "pods of sock run on"
    );
    for node in nodes {
        let name = format!("box-{}", node.name);
        let said = namespace.kubectl(&["exec", &name, "--", "echo", "alive"])?;
        ensure!(said.trim() == "alive", "{said}");
    }

    namespace.kubectl(&["delete", "pods", "--selector=app=box", "--timeout=60s"])?;
    // What was refused is tried again by kubelet, which waits longer each time.
    kubectl(&[
        "-n",
        "sock-system",
        "rollout",
        "status",
        "daemonset",
        "sock-node",
        "--timeout=300s",
    ])?;
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");
    kubectl(&[
        "delete",
        "-k",
        manifests,
        "--ignore-not-found",
        "--timeout=120s",
    ])?;
    Ok(())
}

fn nothing_is_left(nodes: &[Node]) -> Result<()> {
    let mut last = Vec::new();
    until("the nodes hold nothing of sock", MINUTE, || {
        last = traces(nodes)?;
        Ok(last.is_empty().then_some(()))
    })
    .with_context(|| format!("{last:#?}"))?;
    for node in nodes {
        let object = get(&["node", &node.name])?;
        let labels = object["metadata"]["labels"].as_object().context("labels")?;
        ensure!(
            !labels.keys().any(|key| key.starts_with("sock.dev/")),
            "{labels:?}"
        );
    }
    Ok(())
}

/// The directory of drop-ins may have been there before, and others may use it by now: it stays, empty.
const STAYS: &str = "file /etc/containerd/conf.d d ";

/// Waits until a node is as it was before sock came to it: nothing is there that was not, and of what lasts nothing is missing.
fn until_as_before(
    node: &Node,
    state_before: &BTreeSet<String>,
    inventory_before: &Inventory,
) -> Result<()> {
    let mut differs = Vec::new();
    until("the node is as before the installation", 2 * MINUTE, || {
        let now = state(node)?;
        let here = inventory(std::slice::from_ref(node))?;
        let left = here.difference(inventory_before);
        differs = left.map(|line| format!("+ {line}")).collect();
        let new = now.difference(state_before);
        let new = new.filter(|line| !line.starts_with(STAYS));
        differs.extend(new.map(|line| format!("+ {line}")));
        differs.extend(
            state_before
                .difference(&now)
                .map(|line| format!("- {line}")),
        );
        Ok(differs.is_empty().then_some(()))
    })
    .with_context(|| format!("{differs:#?}"))
}

#[test]
fn a_node_is_as_it_was_before_and_other_pods_run_on() {
    in_namespace_of(Security::Restricted, "others", |namespace| {
        let mut nodes = workers()?;
        let from = nodes.first().context("a node")?.clone();
        ensure!(!traces(&nodes)?.is_empty(), "the account is blind");
        let untouched = Untouched::find()?;
        ensure!(
            traces(std::slice::from_ref(&untouched.node))?.is_empty(),
            "{} has sock already",
            untouched.node.name
        );
        nodes.push(untouched.node.clone());

        let others = everywhere("other", &nodes, TICKS, None);
        namespace.apply(&others)?;
        until_ready(namespace, "other")?;
        let before = identities(namespace, "other")?;
        let state_before = state(&untouched.node)?;
        let inventory_before = inventory(std::slice::from_ref(&untouched.node))?;

        use_on(&untouched, namespace, &from)?;
        namespace.apply(&everywhere("box", &nodes, "exec sleep 1000", Some("sock")))?;
        until_ready(namespace, "box")?;
        let state_during = state(&untouched.node)?;
        for kind in [
            "file /etc/containerd/",
            "file /opt/sock/",
            "file /var/lib/sock",
            "file /run/sock",
            "containerd ",
            "container ",
            "/metadata/labels ",
            "/status/runtimeHandlers ",
        ] {
            ensure!(
                state_during
                    .difference(&state_before)
                    .any(|line| line.starts_with(kind)),
                "nothing new of {kind} was seen: the account is blind"
            );
        }

        delete_what_runs()?;
        uninstall(namespace, &nodes)?;
        untouched.as_before()?;
        nothing_is_left(&nodes)?;
        until_as_before(&untouched.node, &state_before, &inventory_before)?;

        let after = identities(namespace, "other")?;
        ensure!(after == before, "other pods are the same: {after:?}");
        for pod in &others {
            let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
            let log = namespace.kubectl(&["logs", name])?;
            let ticks: Vec<u64> = log
                .lines()
                .filter_map(|line| line.strip_prefix("tick ")?.parse().ok())
                .collect();
            let count = u64::try_from(ticks.len())?;
            ensure!(
                ticks.iter().copied().eq(1..=count) && count > 10,
                "no line of another pod was lost: {count} lines"
            );
        }
        Ok(())
    });
}
