//! A node that gets unfit says why, takes nothing new, lets go on what runs, and heals. It is a whole node, so nothing else may
//! run beside this.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sock_e2e::{
    Client, MINUTE, Node, get, has_event, in_namespace, kubectl, manifest, until, workers,
};

const CONFIG: &str = "/etc/containerd/config.toml";

/// A node whose containerd could not read its configuration any more.
struct Broken<'a>(&'a Node);

impl<'a> Broken<'a> {
    fn new(node: &'a Node) -> Result<Broken<'a>> {
        node.shell(
            r#"cp -a "$1" "$1.whole" && echo "[plugins" >>"$1""#,
            &[CONFIG],
        )?;
        Ok(Broken(node))
    }

    fn mend(&self) -> Result<()> {
        let script = r#"[ ! -e "$1.whole" ] || mv "$1.whole" "$1""#;
        self.0.shell(script, &[CONFIG]).map(drop)
    }
}

impl Drop for Broken<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.mend() {
            eprintln!("{error:#}");
        }
    }
}

/// The installer looks at the node when it starts, and every minute.
fn look_again(node: &Node) -> Result<()> {
    let on_node = format!("--field-selector=spec.nodeName={}", node.name);
    kubectl(&[
        "delete",
        "pod",
        "--namespace=sock-system",
        "--selector=app.kubernetes.io/name=sock-node",
        &on_node,
    ])?;
    Ok(())
}

fn until_labelled(node: &Node, value: &str) -> Result<()> {
    until(&format!("{} is {value}", node.name), 3 * MINUTE, || {
        let node = get(&["node", &node.name])?;
        Ok((node["metadata"]["labels"]["sock.dev/node"] == value).then_some(()))
    })
}

#[test]
fn a_node_that_gets_unfit_says_why_and_heals() {
    in_namespace("unfit", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (other, node) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let code = "def handler(event, context):\n    return 'here'\n";
        namespace.serve("stays", &[set, manifest::function("stays", "plain", code)])?;
        let pod = namespace.pod_of("stays")?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let mut client = Client::on(&other)?;
        ensure!(client.get(address, 8080, "/")?.text()? == "here");

        let broken = Broken::new(&node)?;
        look_again(&node)?;
        until_labelled(&node, "unfit")?;
        until("an event of the node says what to mend", MINUTE, || {
            let words = ["SockRuntimeNotConfigured", CONFIG, "is not TOML"];
            let object = format!("node/{}", node.name);
            Ok(has_event("default", &object, &words)?.then_some(()))
        })?;
        let message = namespace.message_of("packageset/plain", "Ready", "False", MINUTE)?;
        ensure!(message.contains("no node"), "{message}");
        // Its zygote is gone with the pool, and the pod that runs there is served by an interpreter.
        ensure!(client.get(address, 8080, "/")?.text()? == "here");
        let now = namespace.pod_of("stays")?;
        ensure!(now["metadata"]["uid"] == pod["metadata"]["uid"], "{now}");

        broken.mend()?;
        look_again(&node)?;
        until_labelled(&node, "ready")?;
        namespace.wait_for("packageset/plain", "Ready", 2 * MINUTE)?;
        namespace.apply(&[manifest::with(
            manifest::function("new", "plain", code),
            &json!({"reuse": "Never"}),
        )])?;
        namespace.wait_for("function/new", "Ready", 2 * MINUTE)?;
        ensure!(client.get(address, 8080, "/")?.text()? == "here");
        Ok(())
    });
}
