//! Wrong input: each has its answer where its author looks first. The API server refuses what can be seen to be wrong;
//! conditions and events tell the rest; clients are answered over HTTP.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{Client, MINUTE, Namespace, has_event, in_namespace, manifest, until, workers};

const PASS: &str = "def handler(event, context): pass\n";
const HASH: &str = "--hash=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn function(fields: &Value) -> Value {
    manifest::with(manifest::function("wrong", "set", PASS), fields)
}

fn set(fields: &Value) -> Value {
    manifest::with(manifest::package_set("wrong", &["json"]), fields)
}

fn named(mut object: Value, name: &str) -> Value {
    object["metadata"]["name"] = json!(name);
    object
}

fn lines(lines: &[String]) -> Value {
    set(&json!({"requirements": {"lines": lines}}))
}

#[test]
fn the_api_server_refuses_what_cannot_work_with_field_value_and_remedy() {
    in_namespace("refused", |namespace| {
        let pinned = |name: &str| format!("{name}==1.0 {HASH}");
        let env = |variables: Value| function(&json!({"env": variables}));
        let memory = |requests: &str, limits: &str| {
            function(
                &json!({"resources": {"requests": {"memory": requests}, "limits": {"memory": limits}}}),
            )
        };
        let cases: Vec<(Value, &[&str])> = vec![
            (
                lines(&["idna".into()]),
                &[
                    "requirements.lines[0]",
                    "idna",
                    "must be pinned, as NAME==VERSION",
                ],
            ),
            (
                lines(&[pinned("a"), "idna==3.20".into()]),
                &[
                    "requirements.lines[1]",
                    "must carry the hashes",
                    "uv pip compile",
                ],
            ),
            (
                lines(&[format!("idna==3.20 {HASH} --index-url http://x/")]),
                &["requirements.lines[0]", "should match"],
            ),
            (
                lines(&[pinned("my_pkg"), pinned("six"), pinned("My.Pkg")]),
                &["requirements.lines", "my-pkg is listed more than once"],
            ),
            (
                function(&json!({"timeoutSeconds": 0})),
                &["timeoutSeconds", "0", "greater than or equal to 1"],
            ),
            (
                function(&json!({"timeoutSeconds": 901})),
                &["timeoutSeconds", "901", "less than or equal to 900"],
            ),
            (
                function(&json!({"handler": "handler"})),
                &["handler: \"handler\" is not of the form module.function"],
            ),
            (
                function(&json!({"handler": "app handler"})),
                &["handler: \"app handler\" is not of the form module.function"],
            ),
            (
                function(&json!({"handler": "app.sub.handler"})),
                &["handler: app.sub.handler names a module in a package"],
            ),
            (
                function(&json!({"source": {"inline": "x".repeat(131_073)}})),
                &["source", "more than 131072 characters", "ConfigMap"],
            ),
            (
                function(&json!({"source": {}})),
                &["source", "exactly one of inline and configMap"],
            ),
            (
                function(&json!({"packageSet": "My Set"})),
                &["packageSet: \"My Set\" is no name of a PackageSet"],
            ),
            (
                env(
                    json!([{"name": "A", "value": "1"}, {"name": "B"}, {"name": "A", "value": "2"}]),
                ),
                &["spec.env[2]", "Duplicate value", "\"A\""],
            ),
            (
                env(json!([{"name": "A=B", "value": "1"}])),
                &["env[0].name", "A=B"],
            ),
            (
                env(
                    json!([{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]),
                ),
                &["env[0]", "set value or valueFrom, not both"],
            ),
            (
                memory("2Gi", "1Gi"),
                &["resources", "requests.memory is more than limits.memory"],
            ),
            (memory("1", "512m"), &["resources", "at least 16Mi"]),
            (
                memory("-1Gi", "1Gi"),
                &["resources.requests.memory", "-1Gi"],
            ),
            (
                function(&json!({"resources": {"limits": {"cpus": 1}}})),
                &["resources.limits", "is not cpu, memory, ephemeral-storage"],
            ),
            (function(&json!({"replicas": -1})), &["replicas", "-1"]),
            (
                function(&json!({"instances": 257})),
                &["instances", "257", "less than or equal to 256"],
            ),
            (
                function(&json!({"reuse": "Sometimes"})),
                &["reuse", "Sometimes", "Always", "Never"],
            ),
            (
                function(&json!({"idle": {"freezeAfterMs": 5000, "endAfterMs": 100}})),
                &["idle.freezeAfterMs", "idle.endAfterMs"],
            ),
            (
                function(&json!({"reuse": "Never", "idle": {"policy": "Learned"}})),
                &["idle.policy: Learned", "reuse: Never", "leave it out"],
            ),
            (
                function(&json!({"idle": {"policy": "Learnt"}})),
                &["idle.policy", "Learnt", "Fixed", "Learned"],
            ),
            (
                named(function(&json!({})), "1st"),
                &["metadata.name: 1st must begin with a letter"],
            ),
            (
                named(function(&json!({})), &"n".repeat(51)),
                &["metadata.name: nnn", "at most 50 characters"],
            ),
            (
                named(set(&json!({})), "a.b"),
                &["metadata.name: a.b must begin with a letter, consist of a-z"],
            ),
            (
                set(&json!({"imports": ["json", "scipy stats"]})),
                &["imports[1]", "\"scipy stats\" is no name of a module"],
            ),
            (set(&json!({"image": ""})), &["image", "at least 1"]),
            (
                named(set(&json!({"extends": {"name": "itself"}})), "itself"),
                &["extends.name: itself is this PackageSet"],
            ),
            (
                set(&json!({"spares": 65})),
                &["spares", "65", "less than or equal to 64"],
            ),
            (
                set(&json!({"index": {"url": "ftp://x/"}})),
                &["index.url: \"ftp://x/\" must begin with http"],
            ),
            (
                set(&json!({"index": {"url": "https://me:secret@x/"}})),
                &["index.url", "index.secretRef"],
            ),
            (
                set(&json!({"warmUp": "x".repeat(8193)})),
                &["warmUp", "8192"],
            ),
        ];
        for (object, words) in cases {
            let shown = object["spec"].to_string();
            let shown: String = shown.chars().take(200).collect();
            let refused = namespace.apply(&[object]).err();
            let message = format!(
                "{:#}",
                refused.with_context(|| format!("is taken: {shown}"))?
            );
            for word in words {
                ensure!(message.contains(word), "{shown}: no {word:?} in: {message}");
            }
        }
        Ok(())
    });
}

/// Waits until a condition that is not true has all these words in its message, and if it is `Ready` an event of the object too.
fn told(namespace: &Namespace, object: &str, condition: &str, words: &[&str]) -> Result<()> {
    let mut last = String::new();
    until(&format!("{object} says {words:?}"), 4 * MINUTE, || {
        last = namespace.message_of(object, condition, "False", MINUTE)?;
        Ok(words.iter().all(|word| last.contains(word)).then_some(()))
    })
    .with_context(|| format!("{object} says: {last}"))?;
    if condition != "Ready" {
        return Ok(());
    }
    until(
        &format!("an event of {object} says {words:?}"),
        MINUTE,
        || Ok(has_event(&namespace.name, object, words)?.then_some(())),
    )
}

fn config_map(name: &str, key: &str, text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {key: text}})
}

/// The requirement that the index of the tests has, with its hash.
fn requirement() -> Result<String> {
    let mut lines = include_str!("../images/requirements-small.txt").lines();
    let line = lines.find(|line| !line.starts_with('#'));
    line.map(str::to_owned).context("a requirement")
}

#[test]
fn what_is_missing_is_named_and_heals_when_it_appears() {
    in_namespace("missing", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let by_key = |name: &str| {
            let reference = json!({"requirements": {"configMapKeyRef": {"name": "lock", "key": "lock.txt"}}, "index": {"url": manifest::INDEX}});
            named(set(&reference), name)
        };
        let from_map = manifest::with(
            manifest::function("coded", "locked", ""),
            &json!({"source": {"configMap": {"name": "code"}}}),
        );
        namespace.apply(&[manifest::only_on(&node.name, by_key("locked")), from_map])?;
        told(
            namespace,
            "packageset/locked",
            "Ready",
            &["ConfigMap lock does not exist", "lock.txt"],
        )?;
        told(
            namespace,
            "function/coded",
            "SourceFound",
            &["ConfigMap code does not exist", "app.py"],
        )?;

        namespace.apply(&[
            config_map("lock", "other", ""),
            config_map("code", "other.py", PASS),
        ])?;
        told(
            namespace,
            "packageset/locked",
            "Ready",
            &["ConfigMap lock has no key lock.txt"],
        )?;
        told(
            namespace,
            "function/coded",
            "SourceFound",
            &["ConfigMap code has no key app.py"],
        )?;

        namespace.apply(&[
            config_map("lock", "lock.txt", "# mine\nidna==3.20\n"),
            config_map("code", "app.py", PASS),
        ])?;
        told(
            namespace,
            "packageset/locked",
            "Ready",
            &[
                "ConfigMap lock, key lock.txt, line 2",
                "idna==3.20 has no hash",
            ],
        )?;
        told(
            namespace,
            "function/coded",
            "PackageSetReady",
            &["PackageSet locked", "line 2"],
        )?;

        namespace.apply(&[config_map("lock", "lock.txt", &requirement()?)])?;
        namespace.wait_for("packageset/locked", "Ready", 3 * MINUTE)?;
        namespace.wait_for("function/coded", "Ready", 3 * MINUTE)?;

        namespace.apply(&[manifest::function("early", "late", PASS)])?;
        told(
            namespace,
            "function/early",
            "Ready",
            &["PackageSet late does not exist in this namespace: create it"],
        )?;
        namespace.apply(&[manifest::only_on(
            &node.name,
            manifest::package_set("late", &["json"]),
        )])?;
        namespace.wait_for("function/early", "Ready", 3 * MINUTE)
    });
}

/// An index that wants credentials below `/private/`, and has below `/foreign/` a wheel for another platform only.
const GUARDED: &str = r#"
import base64, http.server, sys, urllib.request

GOOD = 'Basic ' + base64.b64encode(b'reader:p w@:/').decode()
FOREIGN = b'<a href="idna-3.20-cp39-cp39-win_amd64.whl#sha256=' + b'0' * 64 + b'">idna-3.20-cp39-cp39-win_amd64.whl</a>'

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        root, _, rest = self.path[1:].partition('/')
        given = self.headers.get('Authorization')
        if root == 'private' and given != GOOD:
            return self.say(401 if given is None else 403, b'')
        if root == 'foreign':
            return self.say(200, FOREIGN)
        try:
            self.say(200, urllib.request.urlopen(sys.argv[1] + rest).read())
        except urllib.error.HTTPError as error:
            self.say(error.code, b'')

    def say(self, status, body):
        self.send_response(status)
        self.send_header('WWW-Authenticate', 'Basic realm="wheels"')
        self.send_header('Content-Type', 'text/html')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_HEAD = do_GET

http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever()
"#;

#[test]
fn what_an_index_does_not_give_is_told_with_the_requirement() {
    in_namespace("index", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let [mut index, service] = manifest::echo("guarded");
        index["spec"]["containers"][0]["command"] =
            json!(["python3", "-u", "-c", GUARDED, manifest::INDEX]);
        index["spec"]["containers"][0]["readinessProbe"] =
            json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
        // Nothing is behind the other Service: connections are refused.
        namespace.apply(&[index, service, manifest::service("down", 8080)])?;
        namespace.kubectl(&[
            "wait",
            "pod/guarded",
            "--for=condition=Ready",
            "--timeout=60s",
        ])?;

        let requirement = requirement()?;
        let of = |name: &str, line: &str, index: Value| {
            let fields = json!({"requirements": {"lines": [line]}, "index": index});
            manifest::only_on(&node.name, named(set(&fields), name))
        };
        let url = |path: &str| {
            format!(
                "http://guarded.{}.svc.cluster.local/{path}/",
                namespace.name
            )
        };
        let secret = |name: &str, password: &str| {
            json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/basic-auth",
                "stringData": {"username": "reader", "password": password},
            })
        };
        let with_secret = |name: &str| json!({"url": url("private"), "secretRef": {"name": name}});
        namespace.apply(&[
            secret("wrong", "guess"),
            secret("right", "p w@:/"),
            of(
                "unknown",
                &format!("no-such-package==1.0 {HASH}"),
                json!({"url": manifest::INDEX}),
            ),
            of("foreign", &requirement, json!({"url": url("foreign")})),
            of(
                "down",
                &requirement,
                json!({"url": format!("http://down.{}.svc.cluster.local/", namespace.name)}),
            ),
            of("anonymous", &requirement, json!({"url": url("private")})),
            of("refused", &requirement, with_secret("wrong")),
            of("nosecret", &requirement, with_secret("absent")),
        ])?;
        for (set, words) in [
            (
                "unknown",
                &["requirement no-such-package: not found in", manifest::INDEX][..],
            ),
            (
                "foreign",
                &[
                    "requirement idna==3.20",
                    "no wheel for this Python and platform",
                ],
            ),
            ("down", &["http://down.", "cannot be reached"]),
            (
                "anonymous",
                &[
                    "wants credentials (401 Unauthorized)",
                    "spec.index.secretRef",
                ],
            ),
            (
                "refused",
                &["refuses access (403 Forbidden)", "spec.index.secretRef"],
            ),
            ("nosecret", &["secret \"absent\" not found"]),
        ] {
            told(namespace, &format!("packageset/{set}"), "Ready", words)?;
        }
        // Only now: what one set of a namespace has installed, the others with the same packages need not ask for.
        namespace.apply(&[of("served", &requirement, with_secret("right"))])?;
        namespace.wait_for("packageset/served", "Ready", 3 * MINUTE)?;
        namespace.wait_for("packageset/refused", "Ready", 4 * MINUTE)?;

        // The pods' own events say it too, for who looks there first.
        let events =
            namespace.kubectl(&["get", "events", "--output=jsonpath={.items[*].message}"])?;
        ensure!(events.contains("secret \"absent\" not found"), "{events}");

        // Whoever mends the Secret need not touch the PackageSet.
        namespace.apply(&[secret("absent", "p w@:/")])?;
        namespace.wait_for("packageset/nosecret", "Ready", 4 * MINUTE)?;

        // The credentials are the installer's alone.
        for pod in namespace.pods("sock.dev/pool=served")? {
            let containers = pod["spec"]["containers"].to_string();
            ensure!(!containers.contains("SOCK_INDEX"), "{containers}");
        }
        Ok(())
    });
}

#[test]
fn a_zygote_that_cannot_be_is_explained() {
    in_namespace("zygote", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let of =
            |name: &str, fields: Value| manifest::only_on(&node.name, named(set(&fields), name));
        let warm = |name: &str, code: &str| of(name, json!({"warmUp": code}));
        let small = json!({"limits": {"memory": "96Mi"}});
        namespace.apply(&[
            warm("raises", "import json\njson.loads('{')\n"),
            warm("syntax", "import json\n\ndef f(:\n"),
            warm("threads", "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), name='mine', daemon=True).start()\n"),
            warm("crashes", "import os\nos.abort()\n"),
            warm("exits", "import os\nos._exit(7)\n"),
            warm("hangs", "import time\ntime.sleep(1000)\n"),
            of("greedy", json!({"warmUp": "b'x' * (256 << 20)", "resources": small})),
            of("pythonless", json!({"image": manifest::BUSYBOX})),
            of("old", json!({"image": manifest::OLD_PYTHON})),
            of("imageless", json!({"image": "docker.io/library/no-such-image:1"})),
            manifest::only_on("no-such-node", named(set(&json!({})), "nodeless")),
            manifest::function("onnone", "nodeless", PASS),
        ])?;
        for (set, words) in [
            ("raises", &["JSONDecodeError", "warmUp", "line 2"][..]),
            ("syntax", &["SyntaxError", "warmUp", "line 3"]),
            (
                "threads",
                &[
                    "warmUp",
                    "it started 1 thread ",
                    "mine (time)",
                    "accepted threads",
                ],
            ),
            ("crashes", &["killed by signal 6 (SIGABRT)"]),
            ("exits", &["exited with status 7"]),
            ("greedy", &["memory limit"]),
            ("pythonless", &["python3"]),
            ("old", &["Python 3.10 or newer", "this image has 3.9"]),
            ("imageless", &["docker.io/library/no-such-image:1"]),
            (
                "nodeless",
                &["no node has the label sock.dev/node=ready, fits spec.nodeSelector"],
            ),
            ("hangs", &["took more than 90 s"]),
        ] {
            told(namespace, &format!("packageset/{set}"), "Ready", words)?;
        }
        told(
            namespace,
            "function/onnone",
            "PackageSetReady",
            &["PackageSet nodeless: no node has"],
        )
    });
}

#[test]
fn a_handler_that_cannot_be_is_explained() {
    in_namespace("handler", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let of = |name: &str, code: &str| manifest::function(name, "plain", code);
        let small = json!({"resources": {"limits": {"memory": "64Mi"}}});
        namespace.apply(&[
            manifest::only_on(&node.name, manifest::package_set("plain", &["json"])),
            of(
                "syntax",
                "import json\n\ndef handler(event, context)\n    pass\n",
            ),
            of("attribute", "def handle(event, context): pass\n"),
            manifest::with(of("module", PASS), &json!({"handler": "app.Handler"})),
            of("value", "handler = 3\n"),
            of("coroutine", "async def handler(event, context): pass\n"),
            of("raises", "def deep():\n    return {}['key']\n\ndeep()\n"),
            of("exits", "import os\nos._exit(5)\n"),
            of("crashes", "import ctypes\nctypes.string_at(0)\n"),
            of("hangs", "import time\ntime.sleep(1000)\n"),
            manifest::with(of("greedy", "b'x' * (256 << 20)\n"), &small),
        ])?;
        for (function, words) in [
            ("syntax", &["SyntaxError", "app.py", "line 3"][..]),
            ("attribute", &["app.handler", "app.py defines no 'handler'"]),
            ("module", &["app.Handler", "defines no 'Handler'"]),
            (
                "value",
                &["'handler' in", "app.py is a int, not a function"],
            ),
            ("coroutine", &["is async; it must be a plain function"]),
            ("raises", &["KeyError: 'key'", "app.py", "line 2"]),
            (
                "exits",
                &["exited with status 5", "before its handler was imported"],
            ),
            (
                "crashes",
                &[
                    "killed by signal 11 (SIGSEGV)",
                    "before its handler was imported",
                ],
            ),
            ("greedy", &["memory limit"]),
            ("hangs", &["not imported", "30 s"]),
        ] {
            let object = format!("function/{function}");
            told(namespace, &object, "HandlerImported", words)?;
            told(namespace, &object, "Ready", words)?;
        }
        Ok(())
    });
}

const WRONG: &str = r#"
import ctypes
import os
import sys
import time

def handler(event, context):
    what = event['query'].get('what', '')
    if what == 'raise':
        raise ValueError('of the handler')
    if what == 'object':
        return object()
    if what == 'nan':
        return float('nan')
    if what == 'status':
        return {'statusCode': 99}
    if what == 'header':
        return {'statusCode': 200, 'headers': {'X-A': 'a\r\nX-B: b'}}
    if what == 'exit':
        sys.exit(3)
    if what == '_exit':
        os._exit(4)
    if what == 'segfault':
        ctypes.string_at(0)
    if what == 'memory':
        return str(len(b'x' * (512 << 20)))
    if what == 'sleep':
        time.sleep(1000)
    return 'fine'
"#;

#[test]
fn what_a_pod_was_made_of_does_not_change_below_it() {
    in_namespace("immutable", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let lines =
            json!({"requirements": {"lines": [requirement()?]}, "index": {"url": manifest::INDEX}});
        let set = manifest::only_on(&node.name, named(set(&lines), "locked"));
        namespace.serve("fixed", &[set, manifest::function("fixed", "locked", PASS)])?;
        let list = namespace.get(&["configmaps"])?;
        let mut made = 0;
        for map in list["items"].as_array().context("ConfigMaps")? {
            let name = map["metadata"]["name"].as_str().context("metadata.name")?;
            if !map["metadata"]["ownerReferences"].is_array() {
                continue;
            }
            made += 1;
            let patch = r#"--patch={"data":{"app.py":"def handler(event, context): return 'other'","requirements.txt":""}}"#;
            let error = namespace.kubectl(&["patch", "configmap", name, "--type=merge", patch]);
            let error = error.err().with_context(|| format!("{name} was changed"))?;
            ensure!(
                format!("{error:#}").contains("immutable"),
                "{name}: {error:#}"
            );
        }
        ensure!(made == 2, "code and requirements: {list}");
        Ok(())
    });
}

#[test]
fn a_client_is_answered_whatever_happens_to_its_request() {
    in_namespace("client", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let fields = json!({"timeoutSeconds": 2, "resources": {"limits": {"memory": "128Mi"}}});
        let function = manifest::with(manifest::function("wrong", "plain", WRONG), &fields);
        namespace.serve("wrong", &[set, function])?;
        let pod = namespace.pod_of("wrong")?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let mut client = Client::on(&other)?;
        let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
        let logged = |id: &str, status: u64, words: &str| {
            until(&format!("the log tells of {words}"), MINUTE, || {
                let log = namespace.kubectl(&["logs", name])?;
                let line = log
                    .lines()
                    .find(|line| line.contains(&format!("request {id}: ")));
                let told = line.is_some_and(|line| {
                    line.contains(words) && line.ends_with(&format!("answered with {status}"))
                });
                Ok(told.then_some(()))
            })
        };
        for (what, status, words) in [
            ("raise", 500, "ValueError"),
            ("object", 500, "not JSON serializable"),
            ("nan", 500, "not JSON compliant"),
            (
                "status",
                500,
                "statusCode must be an integer from 200 to 599",
            ),
            ("header", 500, "line break"),
            ("exit", 502, "exited with status 3 before it answered"),
            ("_exit", 502, "exited with status 4 before it answered"),
            (
                "segfault",
                502,
                "killed by signal 11 (SIGSEGV) before it answered",
            ),
            ("memory", 502, "memory limit"),
            ("sleep", 504, "did not answer in time"),
        ] {
            let answer = client.get(address, 8080, &format!("/?what={what}"))?;
            let body: Value = serde_json::from_str(&answer.body)
                .with_context(|| format!("{what}: {answer:?}"))?;
            ensure!(
                answer.status == status && answer.body.contains(words),
                "{what}: {answer:?}"
            );
            let id = body["requestId"].as_str().unwrap_or_default();
            ensure!(
                id.len() == 32 && body["error"].is_string() && body["type"].is_string(),
                "{what}: {answer:?}"
            );
            let header = answer.headers.as_object().and_then(|headers| {
                headers
                    .iter()
                    .find(|(name, _)| name.eq_ignore_ascii_case("x-request-id"))
                    .map(|(_, id)| id.clone())
            });
            ensure!(header == Some(json!(id)), "{what}: {answer:?}");
            ensure!(
                client.get(address, 8080, "/")?.text()? == "fine",
                "the next request after {what}"
            );
            logged(id, status, words)?;
        }
        let answer = client.get(address, 8080, "/?what=raise")?;
        let answer: Value = serde_json::from_str(&answer.body)?;
        let id = answer["requestId"].as_str().context("requestId")?;
        until(
            "the log has the traceback below the request",
            MINUTE,
            || {
                let log = namespace.kubectl(&["logs", name])?;
                let mut lines = log.lines().skip_while(|line| !line.contains(id)).skip(1);
                let first = lines
                    .next()
                    .is_some_and(|line| line.starts_with("Traceback "));
                Ok((first && lines.any(|line| line.contains("app.py"))).then_some(()))
            },
        )?;
        let head = "GET / HTTP/1.1\r\nHost: x\r\n";
        for (what, text, status, words) in [
            ("no HTTP", "hello\r\n\r\n".to_owned(), 400, "malformed"),
            (
                "a bad header",
                format!("{head}a b: c\r\n\r\n"),
                400,
                "malformed",
            ),
            (
                "a bad length",
                format!("{head}Content-Length: x\r\n\r\n"),
                400,
                "malformed",
            ),
            (
                "a bad chunk",
                format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
                400,
                "malformed",
            ),
            (
                "a long header",
                format!("{head}X: {}\r\n\r\n", "x".repeat(100_000)),
                431,
                "large",
            ),
            (
                "many headers",
                format!("{head}{}\r\n", "X: y\r\n".repeat(1000)),
                431,
                "large",
            ),
            (
                "a large body",
                format!("{head}Content-Length: 40000000\r\n\r\n"),
                413,
                "larger than 33554432 bytes",
            ),
        ] {
            let answer = client
                .raw(address, 8080, &text)
                .with_context(|| what.to_owned())?;
            let body: Value = serde_json::from_str(&answer.body)
                .with_context(|| format!("{what}: {answer:?}"))?;
            ensure!(
                answer.status == status
                    && answer.body.contains(words)
                    && body["requestId"].is_string(),
                "{what}: {answer:?}"
            );
            let id = body["requestId"].as_str().unwrap_or_default();
            logged(id, status, words)?;
            ensure!(
                client.get(address, 8080, "/")?.text()? == "fine",
                "the next request after {what}"
            );
        }
        let restarts =
            &namespace.pod_of("wrong")?["status"]["containerStatuses"][0]["restartCount"];
        ensure!(*restarts == 0, "no request ends the container: {restarts}");
        Ok(())
    });
}

const PRINTS: &str = r#"
import os
import sys
import time

def handler(event, context):
    what = event['query']['what']
    if what == 'line':
        for n in range(50):
            print('neighbour', event['query']['n'], n)
            time.sleep(0.002)
    elif what == 'megabyte':
        print('m' * (1 << 20))
    elif what == 'binary':
        os.write(1, bytes(range(256)) * 64)
    elif what == 'half':
        sys.stdout.write('half of ' + 'a line')
        sys.stdout.flush()
        os._exit(0)
    return what
"#;

#[test]
fn no_line_of_a_leaf_is_lost_beside_one_that_prints_much_or_half() {
    in_namespace("lines", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let set = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let fields = json!({"instances": 8, "reuse": "Never"});
        let function = manifest::with(manifest::function("prints", "plain", PRINTS), &fields);
        namespace.serve("prints", &[set, function])?;
        let pod = namespace.pod_of("prints")?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let mut client = Client::on(&other)?;
        // Not more than kubelet keeps in one file of a log (10 MiB).
        for n in 0..6 {
            for what in ["megabyte", "binary", "half"] {
                client.open(what, address, 8080)?;
                client.send(what, &format!("/?what={what}"))?;
            }
            client
                .get(address, 8080, &format!("/?what=line&n={n}"))?
                .text()?;
            for what in ["megabyte", "binary", "half"] {
                client.receive(what)?;
            }
        }
        let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
        let mut missing = Vec::new();
        until("all lines are in the log", MINUTE, || {
            let log = namespace.kubectl(&["logs", name])?;
            let lines: std::collections::HashSet<&str> = log.lines().collect();
            missing = (0..6)
                .flat_map(|n| (0..50).map(move |line| format!("neighbour {n} {line}")))
                .filter(|line| !lines.contains(line.as_str()))
                .collect();
            Ok(missing.is_empty().then_some(()))
        })
        .with_context(|| format!("{} of 300 lines are missing: {missing:?}", missing.len()))
    });
}
