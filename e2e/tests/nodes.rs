//! A node that gets unfit says why, takes nothing new, lets go on what runs, and heals. It is a whole node, so nothing else may
//! run beside this.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
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

/// A node whose containerd runs every pod on sock that names no runtime; the pods on it are made anew.
struct DefaultRuntime<'a>(&'a Node);

impl<'a> DefaultRuntime<'a> {
    fn new(node: &'a Node) -> Result<DefaultRuntime<'a>> {
        let whole = DefaultRuntime(node);
        whole.is("runc", "sock")?;
        Ok(whole)
    }

    fn is(&self, from: &str, to: &str) -> Result<()> {
        let script = r#"
sed -i "s/default_runtime_name = \"$2\"/default_runtime_name = \"$3\"/" "$1"
grep -q "default_runtime_name = \"$3\"" "$1"
systemctl restart containerd"#;
        self.0.shell(script, &[CONFIG, from, to])?;
        self.renew()
    }

    /// Has all pods of the node come anew.
    fn renew(&self) -> Result<()> {
        let on_node = format!("spec.nodeName={}", self.0.name);
        let pods = ["pods", "--all-namespaces", "--field-selector", &on_node];
        for pod in get(&pods)?["items"].as_array().context("pods")? {
            let name = pod["metadata"]["name"].as_str().context("a name")?;
            let namespace = pod["metadata"]["namespace"]
                .as_str()
                .context("a namespace")?;
            kubectl(&[
                "delete",
                "pod",
                name,
                "--namespace",
                namespace,
                "--ignore-not-found",
            ])?;
        }
        until("all pods of the node are ready", 3 * MINUTE, || {
            let found = get(&pods)?;
            let found = found["items"].as_array().context("pods")?;
            let ready = found.iter().filter(|pod| {
                let conditions = pod["status"]["conditions"].as_array();
                conditions
                    .into_iter()
                    .flatten()
                    .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
            });
            // kube-proxy, the network's and the installer are on every node.
            Ok((found.len() >= 3 && ready.count() == found.len()).then_some(()))
        })
    }

    fn shims(&self, name: &str) -> Result<usize> {
        let script = r#"pgrep -c -f "^[^ ]*/containerd-shim-$1 " || true"#;
        Ok(self.0.shell(script, &[name])?.trim().parse()?)
    }
}

impl Drop for DefaultRuntime<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.is("sock", "runc") {
            eprintln!("{error:#}");
        }
    }
}

/// The cluster's DNS, on one node alone.
struct DnsOn;

const COREDNS: [&str; 4] = ["--namespace", "kube-system", "deployment", "coredns"];

impl DnsOn {
    fn new(node: &Node) -> Result<DnsOn> {
        let dns = DnsOn;
        let selector = json!({"kubernetes.io/hostname": node.name});
        Self::select(&selector)?;
        Ok(dns)
    }

    fn select(selector: &Value) -> Result<()> {
        let patch = json!({"spec": {"template": {"spec": {"nodeSelector": selector}}}}).to_string();
        let patch = ["--type", "merge", "--patch", &patch];
        kubectl(&[&["patch"], &COREDNS[..], &patch[..]].concat())?;
        let status = ["rollout", "status", "--timeout=120s"];
        kubectl(&[&status[..], &COREDNS[..]].concat())?;
        Ok(())
    }
}

impl Drop for DnsOn {
    fn drop(&mut self) {
        if let Err(error) = Self::select(&json!({"kubernetes.io/hostname": null})) {
            eprintln!("{error:#}");
        }
    }
}

#[test]
fn sock_may_be_the_default_runtime_of_a_node() {
    in_namespace("default", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let runtime = DefaultRuntime::new(&node)?;
        let dns = DnsOn::new(&node)?;
        ensure!(runtime.shims("runc-v2")? == 0, "a pod is not on sock");
        ensure!(runtime.shims("sock-v1")? >= 4);

        // A pod that names no runtime, by kube-proxy and the DNS that are on sock too.
        let mut server = manifest::echo("server");
        server[0]["spec"]["nodeName"] = json!(node.name);
        namespace.apply(&server)?;
        namespace.wait_for("pod/server", "Ready", 2 * MINUTE)?;
        let host = format!("server.{}.svc.cluster.local", namespace.name);
        let address = namespace.get(&["pod/server"])?["status"]["podIP"].clone();
        for from in [&node, &other] {
            let mut client = Client::on(from)?;
            let answer = until("DNS and kube-proxy know the Service", MINUTE, || {
                Ok(client.get(&host, 80, "/").ok())
            })?;
            ensure!(answer.status == 200 && address.is_string(), "{answer:?}");
        }
        let said = namespace.kubectl(&["exec", "server", "--", "cat", "/proc/1/comm"])?;
        ensure!(said.trim() == "python3", "{said}");

        // What is sock's own runs there as well.
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let code = "def handler(event, context):\n    return 'here'\n";
        namespace.serve("here", &[set, manifest::function("here", "plain", code)])?;
        let service = namespace.routed("here", &other)?;
        ensure!(Client::on(&other)?.get(&service, 80, "/")?.text()? == "here");
        drop(dns);
        ensure!(runtime.shims("runc-v2")? == 0, "a pod is not on sock");
        Ok(())
    });
}
