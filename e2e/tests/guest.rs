//! A node that is a machine of its own, with systemd as PID 1 and cgroup v2, as in production: everything that a user meets
//! there. It is emulated, so one test does it all.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, Namespace, Node, attempts, get, in_namespace, inventory_of_quiet, kubectl, manifest,
    until, until_as_before, workers,
};

/// Ten to twenty times slower than this machine.
const LONG: Duration = Duration::from_secs(300);

/// The machine, until it is dropped.
struct Guest {
    node: Node,
}

fn guest(arguments: &[&str]) -> Result<()> {
    let done = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/guest/node"))
        .args(arguments)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    ensure!(
        done.status.success(),
        "e2e/guest/node {arguments:?}: {}",
        done.status
    );
    Ok(())
}

impl Guest {
    fn boot() -> Result<Guest> {
        let archives = ["node", "busybox", "python"].map(|name| {
            format!(
                "{}/../target/archives/{name}.tar",
                env!("CARGO_MANIFEST_DIR")
            )
        });
        let cluster = std::env::var("CLUSTER").unwrap_or_else(|_| "sock".to_owned());
        // From here what is made is taken away, also what did not get ready.
        let booted = Guest {
            node: Node {
                name: format!("{cluster}-guest"),
            },
        };
        let mut arguments = vec!["up"];
        arguments.extend(archives.iter().map(String::as_str));
        guest(&arguments)?;
        until("sock is installed on the guest", LONG, || {
            Ok(workers()?.contains(&booted.node).then_some(()))
        })?;
        Ok(booted)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = guest(&["down"]) {
            println!("{error:#}");
        }
    }
}

#[test]
fn a_machine_with_systemd_and_cgroup_v2_runs_pods_and_forks_functions() -> Result<()> {
    let guest = Guest::boot()?;
    let node = &guest.node;
    let said = node.shell(
        "cat /proc/1/comm; stat -f -c %T /sys/fs/cgroup; systemctl is-system-running --wait || systemctl --failed",
        &[],
    )?;
    ensure!(said == "systemd\ncgroup2fs\nrunning\n", "{said}");
    let nodes = std::slice::from_ref(node);
    let before = inventory_of_quiet(nodes)?;
    in_namespace("guest", |namespace| {
        namespace.apply(&[
            manifest::pod_on(&node.name, limited(manifest::busybox("box", &[("main", "echo started; until [ -s /tmp/end ]; do sleep 1; done; exit $(cat /tmp/end)")]))),
            manifest::pod_on(&node.name, limited(manifest::busybox("hungry", &[("main", "tail -c 100000000 /dev/zero; echo $?")]))),
            manifest::only_on(&node.name, manifest::package_set("plain", &["json"])),
            manifest::with(
                manifest::function("who", "plain", "import uuid\nWHO = str(uuid.uuid4())\ndef handler(event, context):\n    return WHO\n"),
                &json!({"idle": {"freezeAfterMs": 2000, "endAfterMs": 60000}}),
            ),
        ])?;
        an_ordinary_pod(node, namespace)?;
        want_of_memory_is_told(namespace)?;
        a_function(node, namespace)?;
        attempts::restricted_pod(namespace, node)?;
        attempts::handler_and_import_time_code(namespace, node)
    });
    until_as_before(nodes, &before)
}

fn limited(mut pod: Value) -> Value {
    pod["spec"]["containers"][0]["resources"] =
        json!({"limits": {"memory": "20Mi", "cpu": "500m"}});
    pod
}

fn an_ordinary_pod(node: &Node, namespace: &Namespace) -> Result<()> {
    namespace.wait_for("pod/box", "Ready", LONG)?;
    ensure!(namespace.kubectl(&["logs", "box"])? == "started\n");
    let pod = namespace.get(&["pod", "box"])?;
    let uid = pod["metadata"]["uid"]
        .as_str()
        .context("metadata.uid")?
        .replace('-', "_");
    // Scopes of systemd's: the holder's has no limits.
    let limits = |resource: &str| {
        node.shell(
            r#"cat /sys/fs/cgroup/kubepods.slice/*pod$1.slice/cri-containerd-*.scope/$2 | grep -v ^max"#,
            &[&uid, resource],
        )
    };
    let found = (limits("memory.max")?, limits("cpu.max")?);
    ensure!(
        found == ("20971520\n".to_owned(), "50000 100000\n".to_owned()),
        "{found:?}"
    );
    // Resized in place.
    let more = json!({"spec": {"containers": [{"name": "main", "resources": {
        "limits": {"memory": "40Mi", "cpu": "700m"}, "requests": {"memory": "40Mi", "cpu": "700m"}}}]}});
    namespace.kubectl(&[
        "patch",
        "pod",
        "box",
        "--subresource=resize",
        "--patch",
        &more.to_string(),
    ])?;
    until("the pod is resized", LONG, || {
        let found = (limits("memory.max")?, limits("cpu.max")?);
        Ok((found == ("41943040\n".to_owned(), "70000 100000\n".to_owned())).then_some(()))
    })?;
    // Kubelet's figures come from the shim.
    until("kubelet knows what the pod uses", LONG, || {
        let summary = kubectl(&[
            "get",
            "--raw",
            &format!("/api/v1/nodes/{}/proxy/stats/summary", node.name),
        ])?;
        let summary: Value = serde_json::from_str(&summary)?;
        let mut pods = summary["pods"].as_array().context("pods")?.iter();
        let found = pods.find(|one| {
            one["podRef"]["namespace"] == namespace.name && one["podRef"]["name"] == "box"
        });
        let used = found.and_then(|one| one["containers"][0]["memory"]["workingSetBytes"].as_u64());
        Ok(used.filter(|used| (1..41_943_040).contains(used)))
    })?;
    namespace.kubectl(&["exec", "box", "--", "sh", "-c", "echo 7 >/tmp/end"])?;
    let state = terminated(namespace, "box")?;
    ensure!(
        state["exitCode"] == 7 && state["reason"] == "Error",
        "{state}"
    );
    Ok(())
}

/// How the container of a pod has ended.
fn terminated(namespace: &Namespace, pod: &str) -> Result<Value> {
    until(&format!("pod {pod} has ended"), LONG, || {
        let pod = namespace.get(&["pod", pod])?;
        let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        Ok((!state.is_null()).then(|| state.clone()))
    })
}

fn want_of_memory_is_told(namespace: &Namespace) -> Result<()> {
    let state = terminated(namespace, "hungry")?;
    ensure!(state["reason"] == "OOMKilled", "{state}");
    Ok(())
}

fn a_function(node: &Node, namespace: &Namespace) -> Result<()> {
    namespace.wait_for("function/who", "Ready", LONG)?;
    let pod = namespace.pod_of("who")?;
    ensure!(Node::of(&pod)? == *node, "{pod}");
    let from = workers()?
        .into_iter()
        .find(|one| one != node)
        .context("another node")?;
    let service = namespace.routed("who", &from)?;
    let mut client = Client::on(&from)?;
    let mut ask = || -> Result<String> {
        let answer = client.get(&service, 80, "/")?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(answer.text()?.to_owned())
    };
    let first = ask()?;
    let leaves = node.interpreters_of(&pod)?;
    let [leaf] = &leaves[..] else {
        bail!("one leaf answered, there are {leaves:#?}");
    };
    let pools = namespace.pools_of("plain")?;
    let zygote = node.zygote_of(pools.first().context("a pool")?)?;
    ensure!(
        leaf.user_namespace == zygote.user_namespace && leaf.pid_namespace != zygote.pid_namespace,
        "the leaf was not forked from the zygote: {leaf:#?} {zygote:#?}"
    );
    ensure!(leaf.capabilities()? == 0, "{leaf:#?}");
    until("the leaf is frozen", LONG, || {
        Ok(node.is_frozen(leaf)?.then_some(()))
    })?;
    ensure!(ask()? == first, "a frozen leaf goes on");
    until("the idle leaf has ended", LONG, || {
        Ok(node.interpreters_of(&pod)?.is_empty().then_some(()))
    })?;
    ask()?;
    let ready = get(&["node", &node.name])?;
    ensure!(
        ready["metadata"]["labels"]["sock.dev/node"] == "ready",
        "{ready}"
    );
    Ok(())
}
