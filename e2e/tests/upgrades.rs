//! New versions of everything under load, and packages that are taken away: no request is lost.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{Client, MINUTE, Namespace, Node, in_namespace, kubectl, manifest, until, workers};

const CODE: &str = "
import os

def handler(event, context):
    return str(os.getpid())
";

/// A Function under load by its Service.
struct Loaded<'a> {
    namespace: &'a Namespace,
    node: Node,
    client: Client,
    service: String,
}

impl Loaded<'_> {
    fn new<'a>(namespace: &'a Namespace) -> Result<Loaded<'a>> {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let idle = json!({"idle": {"freezeAfterMs": 100, "endAfterMs": 300}});
        let function = manifest::with(manifest::function("busy", "plain", CODE), &idle);
        namespace.serve("busy", &[set(&node, &["json"]), function])?;
        let mut client = Client::on(&other)?;
        let service = namespace.routed("busy", &other)?;
        for load in ["one", "two"] {
            client.load(load, &service, 80, "/")?;
        }
        Ok(Loaded {
            namespace,
            node,
            client,
            service,
        })
    }

    /// Waits until both loads have had many more answers.
    fn go_on(&mut self) -> Result<()> {
        for load in ["one", "two"] {
            let answers =
                |client: &mut Client| -> Result<u64> { Ok(client.count(load)?.values().sum()) };
            let before = answers(&mut self.client)?;
            until("requests go on", MINUTE, || {
                Ok((answers(&mut self.client)? >= before + 50).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Ends the load; every request of it was answered well.
    fn nothing_lost(mut self) -> Result<()> {
        self.go_on()?;
        for load in ["one", "two"] {
            let counts = self.client.stop(load)?;
            ensure!(
                counts.len() == 1 && counts.contains_key("200"),
                "requests were lost: {counts:?}"
            );
        }
        Ok(())
    }

    fn pool(&self) -> Result<Value> {
        let mut pools = self.namespace.pods("sock.dev/pool=plain")?;
        let pool = pools.pop().context("a pool")?;
        ensure!(pools.is_empty(), "one pool is left");
        Ok(pool)
    }

    /// Waits until the Function has one pod, and its leaves are forked from the zygote that is there now.
    fn until_forked(&mut self) -> Result<()> {
        until("leaves are forked from the zygote", 2 * MINUTE, || {
            let zygote = self.node.zygote_of(&self.pool()?)?;
            let pod = self.namespace.pod_of("busy")?;
            self.client.get(&self.service, 80, "/")?.text()?;
            let leaves = self.node.interpreters_of(&pod)?;
            Ok(leaves
                .iter()
                .any(|leaf| leaf.user_namespace == zygote.user_namespace)
                .then_some(()))
        })
    }

    fn condition(&self, reason: &str) -> Result<bool> {
        let found = self.namespace.get(&["function/busy"])?;
        let conditions = found["status"]["conditions"].as_array().cloned();
        Ok(conditions
            .unwrap_or_default()
            .iter()
            .any(|one| one["type"] == "PackageSetReady" && one["reason"] == reason))
    }
}

fn set(node: &Node, imports: &[&str]) -> Value {
    manifest::only_on(&node.name, manifest::package_set("plain", imports))
}

#[test]
fn new_packages_take_over_when_they_are_warm_and_not_before() {
    in_namespace("packages", |namespace| {
        let mut loaded = Loaded::new(namespace)?;
        let before = namespace.pod_of("busy")?;
        // A version that never gets warm changes nothing.
        namespace.apply(&[set(&loaded.node, &["json", "nothing_of_this_name"])])?;
        until("the Function says that it waits", MINUTE, || {
            Ok(loaded.condition("FormerVersion")?.then_some(()))
        })?;
        namespace.message_of("packageset/plain", "Ready", "False", MINUTE)?;
        loaded.go_on()?;
        let still = namespace.pod_of("busy")?;
        ensure!(
            still["metadata"]["uid"] == before["metadata"]["uid"],
            "the pod is the same as long as the new version is not warm"
        );
        let pool = namespace.pods("sock.dev/pool=plain")?;
        ensure!(
            pool.iter().any(|pod| loaded.node.zygote_of(pod).is_ok()),
            "the former zygote serves on"
        );

        // One that does takes over.
        namespace.apply(&[set(&loaded.node, &["json", "decimal"])])?;
        until("another pod serves", 3 * MINUTE, || {
            let pod = namespace.pod_of("busy")?;
            Ok((pod["metadata"]["uid"] != before["metadata"]["uid"]).then_some(()))
        })?;
        let set = namespace.get(&["packageset/plain"])?;
        ensure!(
            set["status"]["digest"] == set["status"]["readyDigest"],
            "Functions follow when it is warm: {}",
            set["status"]
        );
        loaded.until_forked()?;
        loaded.nothing_lost()
    });
}

#[test]
fn a_function_outlives_its_packages_and_says_so() {
    in_namespace("orphan", |namespace| {
        let mut loaded = Loaded::new(namespace)?;
        namespace.kubectl(&["delete", "packageset/plain", "--timeout=60s"])?;
        until("the Function says so", MINUTE, || {
            Ok(loaded.condition("PackageSetMissing")?.then_some(()))
        })?;
        let message = namespace.message_of("function/busy", "PackageSetReady", "False", MINUTE)?;
        ensure!(
            message.contains("PackageSet plain is gone") && message.contains("plain interpreters"),
            "{message}"
        );
        until("the pool is gone", 2 * MINUTE, || {
            let pools = namespace.get(&["pods", "--selector=sock.dev/pool=plain"])?;
            Ok(pools["items"]
                .as_array()
                .is_some_and(Vec::is_empty)
                .then_some(()))
        })?;
        // Some time without load, so that further requests need a leaf that no zygote has made.
        loaded.go_on()?;
        let pod = namespace.pod_of("busy")?;
        until("plain interpreters serve", MINUTE, || {
            loaded.client.get(&loaded.service, 80, "/")?.text()?;
            let leaves = loaded.node.interpreters_of(&pod)?;
            let own = leaves.iter().any(|leaf| {
                leaf.status("NSpid")
                    .is_ok_and(|numbers| numbers.split_whitespace().count() == 2)
            });
            Ok(own.then_some(()))
        })?;

        let again = set(&loaded.node, &["json"]);
        namespace.apply(&[again])?;
        namespace.wait_for("packageset/plain", "Ready", 2 * MINUTE)?;
        until("the Function says that it is warm", MINUTE, || {
            Ok(loaded.condition("Warm")?.then_some(()))
        })?;
        loaded.nothing_lost()
    });
}

#[test]
fn a_new_operator_takes_over_and_costs_no_request() {
    in_namespace("operator", |namespace| {
        let loaded = Loaded::new(namespace)?;
        let operator = "deployment/sock-operator";
        kubectl(&["-n", "sock-system", "rollout", "restart", operator])?;
        // What is applied meanwhile is done by one of the two.
        namespace.apply(&[manifest::function("meanwhile", "plain", CODE)])?;
        kubectl(&[
            "-n",
            "sock-system",
            "rollout",
            "status",
            operator,
            "--timeout=120s",
        ])?;
        namespace.wait_for("function/meanwhile", "Ready", 2 * MINUTE)?;
        namespace.apply(&[manifest::function("after", "plain", CODE)])?;
        namespace.wait_for("function/after", "Ready", 2 * MINUTE)?;
        loaded.nothing_lost()
    });
}

/// Puts another file in the shim's place as the node installer does, by rename; the same program, longer by a byte.
const REPLACE: &str = r#"
set -e
cd /opt/sock/bin
stat -c %i containerd-shim-sock-v1
cp containerd-shim-sock-v1 .new
printf x >>.new
mv .new containerd-shim-sock-v1
stat -c %i containerd-shim-sock-v1
"#;

#[test]
fn old_shims_serve_their_pods_to_the_end_beside_new_ones() {
    in_namespace("shim", |namespace| {
        let mut loaded = Loaded::new(namespace)?;
        let old = namespace.pod_of("busy")?;
        let inodes = loaded.node.shell(REPLACE, &[])?;
        let (before, after) = inodes.trim().split_once('\n').context("two files")?;
        ensure!(before != after, "another file stands there");
        loaded.go_on()?;

        // A pod of the new shim beside one of the old.
        namespace.kubectl(&["scale", "function/busy", "--replicas=2"])?;
        until("two pods serve", 2 * MINUTE, || {
            let pods = namespace.pods("sock.dev/function=busy")?;
            let ready = pods.iter().filter(|pod| {
                pod["status"]["conditions"].as_array().is_some_and(|all| {
                    all.iter()
                        .any(|one| one["type"] == "Ready" && one["status"] == "True")
                })
            });
            Ok((ready.count() == 2).then_some(()))
        })?;
        for pod in namespace.pods("sock.dev/function=busy")? {
            let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
            loaded.client.get(address, 8080, "/")?.text()?;
            let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
            namespace.kubectl(&["exec", name, "--", "true"])?;
        }
        loaded.go_on()?;

        // The old one ends as it should.
        let name = old["metadata"]["name"].as_str().context("metadata.name")?;
        namespace.kubectl(&["delete", "pod", name, "--timeout=60s"])?;
        let sandbox = format!("crictl pods --quiet --name {name}");
        until("its sandbox is gone", MINUTE, || {
            Ok(loaded
                .node
                .shell(&sandbox, &[])?
                .trim()
                .is_empty()
                .then_some(()))
        })?;
        loaded.nothing_lost()
    });
}
