//! What happens when something fails: the user is told what to mend, and what can go on goes on.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{Client, MINUTE, Namespace, Node, in_namespace, manifest, until, workers};

const SLOW: &str = "
import os
import signal
import time

def handler(event, context):
    time.sleep(float(event['query'].get('seconds', 0)))
    if 'die' in event['query']:
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(9)
    if 'raise' in event['query']:
        raise ValueError('of the handler')
    return 'done'
";

struct Served {
    node: Node,
    pod: Value,
    pool: Value,
    address: String,
    client: Client,
}

fn serve(namespace: &Namespace, fields: &Value) -> Result<Served> {
    let mut nodes = workers()?.into_iter();
    let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
    let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
    let function = manifest::with(manifest::function("slow", "plain", SLOW), fields);
    namespace.serve("slow", &[set, function])?;
    let pod = namespace.pod_of("slow")?;
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    let pools = namespace.pods("sock.dev/pool=plain")?;
    Ok(Served {
        address: address.to_owned(),
        pod,
        pool: pools.into_iter().next().context("a pool")?,
        node,
        client: Client::on(&other)?,
    })
}

#[test]
fn a_zygote_killed_in_mid_traffic_costs_no_request() {
    in_namespace("killed", |namespace| {
        let fields = json!({"idle": {"freezeAfterMs": 300, "endAfterMs": 2000}});
        let Served {
            node,
            pod,
            pool,
            address,
            mut client,
        } = serve(namespace, &fields)?;
        let before = node.zygote_of(&pool)?;
        client.open("slow", &address, 8080)?;
        client.send("slow", "/?seconds=8")?;
        for load in ["one", "two", "three"] {
            client.load(load, &address, 8080, "/?seconds=0.02")?;
        }
        until("requests are served", MINUTE, || {
            Ok((client.count("one")?.contains_key("200")).then_some(()))
        })?;
        node.shell(r#"kill -KILL "$1""#, &[&before.pid.to_string()])?;

        // Its leaf finishes what it has begun.
        let answer = client.receive("slow")?;
        ensure!(answer.text()? == "done", "{answer:?}");
        for load in ["one", "two", "three"] {
            let counts = client.stop(load)?;
            ensure!(
                counts.len() == 1 && counts.contains_key("200"),
                "load {load}: {counts:?}"
            );
        }
        // A successor takes over, and new leaves come from it.
        let after = until("another zygote is there", 2 * MINUTE, || {
            Ok(Some(node.zygote_of(&pool)?)
                .filter(|zygote| zygote.user_namespace != before.user_namespace))
        })?;
        until("a leaf is forked from the successor", 2 * MINUTE, || {
            until("the pod is idle", MINUTE, || {
                Ok((node.interpreters_of(&pod)?.is_empty()).then_some(()))
            })?;
            client.get(&address, 8080, "/")?.text()?;
            let leaves = node.interpreters_of(&pod)?;
            Ok(leaves
                .iter()
                .any(|leaf| leaf.user_namespace == after.user_namespace)
                .then_some(()))
        })
    });
}

#[test]
fn a_leaf_that_dies_is_answered_for_and_the_next_request_gets_another() {
    in_namespace("crash", |namespace| {
        let Served {
            address,
            mut client,
            ..
        } = serve(namespace, &json!({"timeoutSeconds": 2}))?;
        let answer = client.get(&address, 8080, "/?die=1")?;
        ensure!(
            answer.status == 502 && answer.body.contains("requestId"),
            "{answer:?}"
        );
        let answer = client.get(&address, 8080, "/?raise=1")?;
        ensure!(
            answer.status == 500 && answer.body.contains("ValueError"),
            "{answer:?}"
        );
        let answer = client.get(&address, 8080, "/?seconds=60")?;
        ensure!(answer.status == 504, "{answer:?}");
        ensure!(client.get(&address, 8080, "/")?.text()? == "done");
        let pod = namespace.pod_of("slow")?;
        ensure!(
            pod["status"]["containerStatuses"][0]["restartCount"] == 0,
            "a request ends no container"
        );
        let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
        let logs = namespace.kubectl(&["logs", name])?;
        ensure!(
            logs.contains("ValueError: of the handler"),
            "the traceback is in the logs: {logs}"
        );
        Ok(())
    });
}

#[test]
fn more_requests_than_may_wait_are_told_to_come_back() {
    in_namespace("queue", |namespace| {
        let Served {
            address,
            mut client,
            ..
        } = serve(namespace, &json!({"instances": 1}))?;
        let answers = client.burst(&address, 8080, "/?seconds=0.1", 130)?;
        let of = |status| {
            answers
                .iter()
                .filter(|answer| answer.status == status)
                .count()
        };
        ensure!(
            of(200) >= 100 && of(429) >= 1 && of(200) + of(429) == 130,
            "{} times 200, {} times 429, of 130: {:?}",
            of(200),
            of(429),
            answers
                .iter()
                .find(|answer| ![200, 429].contains(&answer.status))
        );
        let mut ids = Vec::new();
        for refused in answers.iter().filter(|answer| answer.status == 429) {
            let body: Value =
                serde_json::from_str(&refused.body).with_context(|| format!("{refused:?}"))?;
            let id = body["requestId"].as_str().context("requestId")?;
            ensure!(
                refused.headers["Retry-After"] == "1"
                    && refused.headers["X-Request-Id"] == id
                    && body["type"] == "TooManyRequests"
                    && body["error"].is_string(),
                "{refused:?}"
            );
            ids.push(id.to_owned());
        }
        let pod = namespace.pod_of("slow")?;
        let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
        until("the log names one of them", MINUTE, || {
            let log = namespace.kubectl(&["logs", name])?;
            let named = |line: &str| {
                line.contains("answered with 429") && ids.iter().any(|id| line.contains(&**id))
            };
            Ok(log.lines().any(named).then_some(()))
        })?;
        Ok(())
    });
}

#[test]
fn a_wrong_hash_is_named_in_the_condition_with_its_requirement() {
    in_namespace("hash", |namespace| {
        let requirement = format!("idna==3.20 --hash=sha256:{}", "0".repeat(64));
        let set = manifest::package_set_of("wrong", &[&requirement], &["idna"]);
        let function = manifest::function("waits", "wrong", "def handler(event, context): pass\n");
        namespace.apply(&[set, function])?;
        let message = until("the PackageSet says what is wrong", 2 * MINUTE, || {
            let message = namespace.message_of("packageset/wrong", "Ready", "False", MINUTE)?;
            Ok(message.contains("idna").then_some(message))
        })?;
        ensure!(
            message.contains("idna==3.20")
                && message.contains("hash")
                && message.contains("ab7ae7122974"),
            "the requirement, and the hash that it has: {message}"
        );
        let waits = namespace.message_of("function/waits", "Ready", "False", MINUTE)?;
        ensure!(
            waits.contains("wrong"),
            "the Function names its PackageSet: {waits}"
        );

        // Mended, it serves.
        let requirement = include_str!("../images/requirements-small.txt")
            .lines()
            .find(|line| !line.starts_with('#'))
            .context("a requirement")?;
        namespace.apply(&[manifest::package_set_of("wrong", &[requirement], &["idna"])])?;
        namespace.wait_for("function/waits", "Ready", 3 * MINUTE)
    });
}

#[test]
fn a_handler_that_fails_at_import_is_shown_with_the_line_to_mend() {
    in_namespace("import", |namespace| {
        let mut nodes = workers()?.into_iter();
        let node = nodes.next().context("a node")?;
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let broken =
            "import json\n\nimport nothing_of_this_name\n\ndef handler(event, context): pass\n";
        namespace.apply(&[set, manifest::function("broken", "plain", broken)])?;
        let message = until("the Function says what is wrong", 3 * MINUTE, || {
            let message =
                namespace.message_of("function/broken", "HandlerImported", "False", MINUTE)?;
            Ok(message.contains("nothing_of_this_name").then_some(message))
        })?;
        ensure!(
            message.contains("ModuleNotFoundError")
                && message.contains("app.py")
                && message.contains("line 3"),
            "the error and where it is: {message}"
        );
        let ready = namespace.message_of("function/broken", "Ready", "False", MINUTE)?;
        ensure!(ready.contains("nothing_of_this_name"), "{ready}");

        let mended = manifest::function("broken", "plain", "def handler(event, context): pass\n");
        namespace.apply(&[mended])?;
        namespace.wait_for("function/broken", "Ready", 3 * MINUTE)
    });
}

#[test]
fn a_module_that_cannot_be_imported_by_the_zygote_is_named() {
    in_namespace("module", |namespace| {
        let mut nodes = workers()?.into_iter();
        let node = nodes.next().context("a node")?;
        let set = manifest::package_set("absent", &["json", "nothing_of_this_name"]);
        namespace.apply(&[manifest::only_on(&node.name, set)])?;
        until("the PackageSet says what is wrong", 3 * MINUTE, || {
            let message = namespace.message_of("packageset/absent", "Ready", "False", MINUTE)?;
            Ok(message.contains("nothing_of_this_name").then_some(()))
        })
    });
}

#[test]
fn the_api_server_refuses_what_cannot_work_and_says_why() {
    in_namespace("schema", |namespace| {
        let refused = |object: Value| -> Result<String> {
            let error = namespace
                .apply(&[object])
                .err()
                .context("this is refused")?;
            Ok(format!("{error:#}"))
        };
        let message = refused(manifest::package_set_of("set", &["idna==3.20"], &[]))?;
        ensure!(message.contains("requirements.lines[0]"), "{message}");
        let both = json!({"inline": "pass", "configMap": {"name": "code"}});
        let message = refused(manifest::with(
            manifest::function("both", "set", ""),
            &json!({"source": both}),
        ))?;
        ensure!(
            message.contains("exactly one of inline and configMap"),
            "{message}"
        );

        // sock's annotations are the operator's alone.
        let mut pod = manifest::busybox("forged", &[("main", "exec sleep 1000")]);
        pod["metadata"]["annotations"] = json!({"sock.dev/function": "main"});
        let message = refused(pod)?;
        ensure!(
            message.contains("sock.dev/function") && message.contains("create a Function"),
            "{message}"
        );
        Ok(())
    });
}
