//! New versions of everything under load, and packages that are taken away: no request is lost.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, get, in_namespace, kubectl, manifest, program, until, workers,
};

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
    fn new<'a>(namespace: &'a Namespace, code: &str) -> Result<Loaded<'a>> {
        Self::with(namespace, code, &json!({}))
    }

    fn with<'a>(namespace: &'a Namespace, code: &str, spec: &Value) -> Result<Loaded<'a>> {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let idle = json!({"idle": {"freezeAfterMs": 100, "endAfterMs": 300}});
        let function = manifest::with(manifest::function("busy", "plain", code), &idle);
        let function = manifest::with(function, spec);
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

    /// Waits until the Function has so many pods, all ready.
    fn until_ready(&self, count: usize) -> Result<Vec<Value>> {
        until(&format!("{count} pods serve"), 2 * MINUTE, || {
            let pods = self.namespace.pods("sock.dev/function=busy")?;
            let ready = pods.iter().filter(|pod| {
                pod["status"]["conditions"].as_array().is_some_and(|all| {
                    all.iter()
                        .any(|one| one["type"] == "Ready" && one["status"] == "True")
                })
            });
            Ok((ready.count() == count && pods.len() == count).then_some(pods))
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

/// Each leaf says in the log, before it is ready, whether a zygote has forked it (PID 1 is a leaf's own) and whether that had the
/// new package.
const WARM: &str = "
import os
import sys
print('leaf', 'forked' if os.getpid() == 1 else 'plain', 'warm' if 'decimal' in sys.modules else 'cold')
import decimal

def handler(event, context):
    return context.pod
";

/// Has a pod answer, and makes sure that each of its leaves, from the first, was forked from a zygote with the new package.
fn all_are_warm(loaded: &mut Loaded, pod: &Value) -> Result<()> {
    let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    let answer = loaded.client.get(address, 8080, "/")?;
    ensure!(answer.text()? == name, "{answer:?}");
    let log = loaded.namespace.kubectl(&["logs", name])?;
    let mut leaves = log
        .lines()
        .filter(|line| line.starts_with("leaf "))
        .peekable();
    ensure!(
        leaves.peek().is_some() && leaves.all(|line| line == "leaf forked warm"),
        "{name} has leaves that do not come from the new zygote: {log}"
    );
    Ok(())
}

#[test]
fn new_packages_take_over_when_they_are_warm_and_not_before() {
    in_namespace("packages", |namespace| {
        let mut loaded = Loaded::new(namespace, WARM)?;
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
        // Not one pod of the new version answers before it can fork what it answers with.
        all_are_warm(&mut loaded, &namespace.pod_of("busy")?)?;
        namespace.kubectl(&["scale", "function/busy", "--replicas=3"])?;
        for pod in loaded.until_ready(3)? {
            all_are_warm(&mut loaded, &pod)?;
        }
        loaded.nothing_lost()
    });
}

/// Refuses to answer where no zygote has forked it.
const FORKED: &str = "
import os
import sys

def handler(event, context):
    if os.getpid() != 1:
        raise RuntimeError('a plain interpreter')
    return 'new' if 'decimal' in sys.modules else 'former'
";

#[test]
fn a_former_zygote_forks_until_the_last_pod_that_runs_on_it_is_gone() {
    in_namespace("former", |namespace| {
        let fresh = json!({"reuse": "Never", "replicas": 3});
        let mut loaded = Loaded::with(namespace, FORKED, &fresh)?;
        loaded.until_ready(3)?;
        loaded.go_on()?;
        let former = loaded.pool()?;
        namespace.apply(&[set(&loaded.node, &["json", "decimal"])])?;
        // Pods of both versions serve beside each other, and each request is a fork.
        let message = namespace.message_of("packageset/plain", "RolledOut", "False", MINUTE)?;
        ensure!(message.contains("former version"), "{message}");
        until("one pool is left", 3 * MINUTE, || {
            let pools = namespace.pods("sock.dev/pool=plain")?;
            let is_former = pools
                .iter()
                .any(|pod| pod["metadata"]["uid"] == former["metadata"]["uid"]);
            let pods = namespace.pods("sock.dev/function=busy")?;
            let digest = |pod: &Value| pod["metadata"]["annotations"]["sock.dev/digest"].clone();
            let remain = pods.iter().any(|pod| digest(pod) == digest(&former));
            ensure!(
                is_former || !remain,
                "pods still run on a version whose pool has gone"
            );
            Ok((!is_former && pools.len() == 1).then_some(()))
        })?;
        namespace.wait_for("packageset/plain", "RolledOut", MINUTE)?;
        for pod in loaded.until_ready(3)? {
            let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
            let answer = loaded.client.get(address, 8080, "/")?;
            ensure!(answer.text()? == "new", "{answer:?}");
        }
        let pools = namespace.get(&["daemonsets", "--selector=sock.dev/pool=plain"])?;
        ensure!(
            pools["items"].as_array().is_some_and(|all| all.len() == 1),
            "{pools}"
        );
        loaded.nothing_lost()
    });
}

#[test]
fn a_function_outlives_its_packages_and_says_so() {
    in_namespace("orphan", |namespace| {
        let mut loaded = Loaded::new(namespace, CODE)?;
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
        let loaded = Loaded::new(namespace, CODE)?;
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

/// A node image like the one that was built, but for its shim, which is the same program and longer by a byte; every node gets
/// it under a name of its own. `$1`: the project, `$2`: the name.
const NEXT: &str = r#"
set -euo pipefail
archive=$1/target/archives/node.tar
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/root"
blob() { tar -xOf "$archive" "blobs/${1/://}"; }
manifest=$(tar -xOf "$archive" index.json | jq -r '.manifests[0].digest')
layer=$(blob "$manifest" | jq -r '.layers[0].digest')
blob "$layer" | tar -xp -C "$work/root"
printf x >>"$work/root/opt/sock/bin/containerd-shim-sock-v1"
"$1/e2e/cluster/archive.py" "$work/node.tar" "$2" "$work/root" --entrypoint '["/sock-node"]'
"$1/e2e/cluster/load" "$work/node.tar"
"#;
const NEXT_IMAGE: &str = "docker.io/sock/node:e2e-next";

/// The node installers with another image than the one that they had, which they get back.
struct OtherInstallers {
    former: String,
}

impl OtherInstallers {
    fn roll_out() -> Result<OtherInstallers> {
        let project = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let made = program("bash", &["-c", NEXT, "bash", project, NEXT_IMAGE])?.output()?;
        ensure!(
            made.status.success(),
            "no image: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let set = get(&["-n", "sock-system", "daemonset", "sock-node"])?;
        let image = &set["spec"]["template"]["spec"]["containers"][0]["image"];
        let installers = OtherInstallers {
            former: image.as_str().context("an image")?.to_owned(),
        };
        installers.set(NEXT_IMAGE)?;
        installers.until_there()?;
        Ok(installers)
    }

    fn set(&self, image: &str) -> Result<()> {
        let image = format!("node={image}");
        kubectl(&[
            "-n",
            "sock-system",
            "set",
            "image",
            "daemonset/sock-node",
            &image,
        ])?;
        Ok(())
    }

    fn until_there(&self) -> Result<()> {
        kubectl(&[
            "-n",
            "sock-system",
            "rollout",
            "status",
            "daemonset/sock-node",
            "--timeout=180s",
        ])?;
        Ok(())
    }

    fn take_back(self) -> Result<()> {
        self.set(&self.former)?;
        self.until_there()
    }
}

impl Drop for OtherInstallers {
    fn drop(&mut self) {
        // Also of a test that failed; otherwise it is there already.
        let _ = self.set(&self.former);
    }
}

/// Digest of the shim that the next pod of a node gets.
fn installed(node: &Node) -> Result<String> {
    node.shell("sha256sum </opt/sock/bin/containerd-shim-sock-v1", &[])
}

/// Digest of the program that the shim of a pod is, whatever has taken its place since.
fn shim_of(node: &Node, pod: &Value) -> Result<String> {
    let uid = pod["metadata"]["uid"].as_str().context("metadata.uid")?;
    let script = r#"
        sandbox=$(crictl pods --quiet --no-trunc --label "io.kubernetes.pod.uid=$1")
        for each in /proc/[0-9]*; do
          case $(tr '\0' ' ' 2>/dev/null <"$each/cmdline") in
            */containerd-shim-sock-v1\ *"$sandbox"*) sha256sum <"$each/exe"; break ;;
          esac
        done"#;
    let digest = node.shell(script, &[uid])?;
    ensure!(!digest.is_empty(), "the pod has no shim: {pod}");
    Ok(digest)
}

#[test]
fn old_shims_serve_their_pods_to_the_end_beside_those_of_a_new_node_image() {
    in_namespace("shim", |namespace| {
        let mut loaded = Loaded::new(namespace, CODE)?;
        let old = namespace.pod_of("busy")?;
        let name = old["metadata"]["name"].as_str().context("metadata.name")?;
        let former = installed(&loaded.node)?;
        ensure!(shim_of(&loaded.node, &old)? == former);

        let installers = OtherInstallers::roll_out()?;
        let next = installed(&loaded.node)?;
        for node in workers()? {
            ensure!(installed(&node)? == next, "{}", node.name);
        }
        ensure!(next != former, "another shim stands there");
        loaded.go_on()?;
        for pod in [&namespace.pod_of("busy")?, &loaded.pool()?] {
            ensure!(
                shim_of(&loaded.node, pod)? == former
                    && pod["status"]["containerStatuses"][0]["restartCount"] == 0,
                "{pod}"
            );
        }

        // A pod of the new shim beside one of the old.
        namespace.kubectl(&["scale", "function/busy", "--replicas=2"])?;
        for pod in loaded.until_ready(2)? {
            let is_old = pod["metadata"]["uid"] == old["metadata"]["uid"];
            let expected = if is_old { &former } else { &next };
            ensure!(shim_of(&loaded.node, &pod)? == *expected, "{pod}");
            let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
            // Both from the same zygote, whose shim is an old one.
            let answer = loaded.client.get(address, 8080, "/")?;
            ensure!(answer.text()? == "1", "{answer:?}");
            let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
            namespace.kubectl(&["exec", name, "--", "true"])?;
        }
        loaded.go_on()?;

        // The old one ends as it should.
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

        // The way back is the same.
        installers.take_back()?;
        for node in workers()? {
            ensure!(installed(&node)? == former, "{}", node.name);
        }
        for pod in loaded.until_ready(2)? {
            ensure!(shim_of(&loaded.node, &pod)? == next, "{pod}");
        }
        loaded.nothing_lost()
    });
}

/// A connection that is kept, in the client's pod of a node: it asks for each line.
struct Kept {
    child: Child,
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

const KEPT: &str = "
import http.client
import sys

connection = http.client.HTTPConnection(sys.argv[1], 80, timeout=90)
connection.connect()
connection.auto_open = 0
for line in sys.stdin:
    connection.request('GET', '/')
    response = connection.getresponse()
    last = ' and no more' if response.will_close else ''
    print(response.status, response.read().decode() + last, flush=True)
";

impl Kept {
    fn open(from: &Node, service: &str) -> Result<Kept> {
        let pod = format!("client-{}", from.name);
        let mut child = program(
            "kubectl",
            &[
                "-n", "sock-e2e", "exec", "-i", &pod, "--", "python3", "-c", KEPT, service,
            ],
        )?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
        let lines = child.stdin.take().context("standard input")?;
        let answers = BufReader::new(child.stdout.take().context("standard output")?);
        Ok(Kept {
            child,
            lines,
            answers,
        })
    }

    fn ask(&mut self) -> Result<String> {
        writeln!(self.lines)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        Ok(answer.trim().to_owned())
    }

    fn end(mut self) -> Result<()> {
        drop(self.lines);
        ensure!(self.child.wait()?.success());
        Ok(())
    }
}

fn slow(version: &str) -> Value {
    let code = format!(
        "
import time

def handler(event, context):
    time.sleep(float(event['query'].get('seconds', 0)))
    return '{version}'
"
    );
    manifest::function("slow", "plain", &code)
}

/// Has the pod of the Function `slow` end in the midst of a long request, and while a connection is kept: both get what they were
/// promised.
fn outlive(
    namespace: &Namespace,
    client: &mut Client,
    from: &Node,
    version: &str,
    end: impl FnOnce(&str) -> Result<()>,
) -> Result<()> {
    let pod = namespace.pod_of("slow")?;
    let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
    let service = namespace.routed("slow", from)?;
    let expected = format!("200 {version}");
    let mut kept = Kept::open(from, &service)?;
    ensure!(kept.ask()? == expected);
    client.open("long", &service, 80)?;
    client.send("long", "/?seconds=25")?;

    end(name)?;
    let list = || namespace.get(&["pods", "--selector=sock.dev/function=slow"]);
    let is_ending = || -> Result<bool> {
        let pods = list()?;
        let found = pods["items"].as_array().context("pods")?.iter();
        let mut found = found.filter(|one| one["metadata"]["name"] == name);
        let pod = found
            .next()
            .context("the pod is gone before the long request was answered")?;
        Ok(!pod["metadata"]["deletionTimestamp"].is_null())
    };
    // The connection goes on to be used until the pod is told to end, and then an answer says that it is the last.
    until("an answer says that it is the last", MINUTE, || {
        let answer = kept.ask()?;
        let rest = answer
            .strip_prefix(&expected)
            .with_context(|| format!("on the kept connection: {answer}"))?;
        Ok((!rest.is_empty()).then_some(()))
    })?;
    kept.end()?;
    ensure!(
        is_ending()?,
        "the connection was not ended by the end of the pod"
    );
    let answer = client.receive("long")?;
    ensure!(answer.text()? == version, "{answer:?}");
    namespace.kubectl(&[
        "wait",
        &format!("pod/{name}"),
        "--for=delete",
        "--timeout=60s",
    ])?;
    Ok(())
}

#[test]
fn a_long_request_and_a_kept_connection_outlive_new_code_and_the_end_of_their_pod() {
    in_namespace("slow", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        namespace.serve("slow", &[set(&node, &["json"]), slow("first")])?;
        let mut client = Client::on(&other)?;
        let service = namespace.routed("slow", &other)?;
        client.load("steady", &service, 80, "/")?;

        outlive(namespace, &mut client, &other, "first", |_| {
            namespace.apply(&[slow("second")])
        })?;
        let answer = client.get(&service, 80, "/")?;
        ensure!(answer.text()? == "second", "{answer:?}");
        outlive(namespace, &mut client, &other, "second", |pod| {
            namespace.kubectl(&["delete", "pod", pod, "--wait=false"])?;
            Ok(())
        })?;

        let counts = client.stop("steady")?;
        ensure!(
            counts.len() == 1 && counts.contains_key("200"),
            "requests were lost: {counts:?}"
        );
        Ok(())
    });
}
