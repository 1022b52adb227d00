//! The whole operator against an API server in memory, with time that passes only while everybody waits.

mod election;
mod races;
mod refusals;
mod rounds;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::Error;
use crate::api_server::{Call, NAMESPACE, Server};
use crate::cluster::Context;
use sock_lock::Lock;

use crate::contract::{Version, sha256};
use crate::metrics::Metrics;

/// Code of [`function`].
pub const CODE: &str = "def handler(event, context):\n    return 'hello'\n";

/// The requirement of [`set`].
pub const LINE: &str =
    "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274";

/// An operator that runs.
pub struct Operator {
    metrics: Arc<Metrics>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), Error>>,
}

impl Operator {
    /// Starts one, whose name is that of its client.
    pub fn start(server: &Server, name: &str) -> Self {
        let (stop, stopped) = oneshot::channel();
        let metrics = Arc::new(Metrics::new());
        let (client, name, own) = (server.client(name), name.to_owned(), Arc::clone(&metrics));
        let task = tokio::spawn(async move {
            let stop = async { stopped.await.unwrap() };
            crate::lead(client, NAMESPACE, name, own, stop).await
        });
        Self {
            metrics,
            stop: Some(stop),
            task,
        }
    }

    /// Whether it says of itself that it leads.
    pub fn leads(&self) -> bool {
        let text = self.metrics.text().unwrap();
        text.contains("\nsock_operator_leader 1\n") && !self.task.is_finished()
    }

    /// Asks it to end, as SIGTERM does, and waits for that.
    pub async fn stop(mut self) -> Result<(), Error> {
        self.stop.take().unwrap().send(()).unwrap();
        (&mut self.task).await.unwrap()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // As a crash does: nothing is given up.
        self.task.abort();
    }
}

/// How often this was applied.
pub fn applied(calls: &[Call], what: &str) -> usize {
    let applies = |call: &&Call| call.verb == "apply" && call.what == what;
    calls.iter().filter(applies).count()
}

/// What reconciling needs, without watches and election.
pub fn context(server: &Server) -> Context {
    Context::new(server.client("test"), "test", Arc::new(Metrics::new()))
}

/// Lets so many seconds pass.
pub async fn pass(seconds: u64) {
    sleep(Duration::from_secs(seconds)).await;
}

/// A Function with its code.
pub fn function(name: &str) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "Function",
        "metadata": { "name": name, "uid": format!("f-{name}") },
        "spec": { "packageSet": "plain", "handler": "app.handler", "source": { "inline": CODE } },
    })
}

/// Name of the ConfigMap that the operator makes of [`CODE`].
pub fn code_name(function: &str) -> String {
    format!("{function}-code-{}", &sha256(&["app.py", CODE])[..10])
}

/// The version of [`ready_set`].
pub fn version() -> Version {
    let lock = Lock {
        image: "python:3.11".into(),
        requirements: String::new(),
    };
    Version::new(&lock, &["json".to_owned()], "", Vec::new())
}

/// The PackageSet `plain`, which [`function`] runs on, with a status that only the real operator would change.
pub fn ready_set(ready: &str) -> Value {
    let version = version();
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "plain", "uid": "p-plain" },
        "spec": {
            "image": "python:3.11", "imports": ["json"],
            "nodeSelector": { "disk": "ssd" }, "tolerations": [{ "key": "gpu" }],
        },
        "status": {
            "digest": version.digest, "readyDigest": version.digest, "readyLock": version.lock,
            "readyImage": version.image,
            "conditions": [{ "type": "Ready", "status": ready, "reason": "x", "message": "warm on 2 nodes",
                             "lastTransitionTime": "2024-01-01T00:00:00Z" }],
        },
    })
}

/// The PackageSet `science`.
pub fn set(requirements: &Value) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "science", "uid": "p-1" },
        "spec": {
            "image": "python:3.11", "requirements": requirements, "imports": ["six"],
            "index": { "url": "http://wheels/simple" },
            "resources": { "requests": { "cpu": 1 }, "limits": { "memory": "1Gi" } },
        },
    })
}

/// Name of the ConfigMap that the operator makes of [`LINE`].
pub fn requirements_name() -> String {
    let digest = sha256(&[format!("{LINE}\n")]);
    format!("science-requirements-{}", &digest[..10])
}

/// Name of the DaemonSet that the operator makes for [`set`] with [`LINE`].
pub fn pool_name() -> String {
    let lock = Lock {
        image: "python:3.11".into(),
        requirements: format!("{LINE}\n"),
    };
    let version = Version::new(&lock, &["six".to_owned()], "", Vec::new());
    format!("science-{}", &version.digest[..10])
}

/// Status, reason and message of a condition.
pub fn condition(object: &Value, type_: &str) -> (String, String, String) {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions
        .and_then(|all| all.iter().find(|one| one["type"] == type_))
        .unwrap_or_else(|| panic!("no condition {type_} in {object}"));
    let text = |key: &str| found[key].as_str().unwrap().to_owned();
    (text("status"), text("reason"), text("message"))
}

/// Reason of the condition `Ready`.
pub fn ready(server: &Server, plural: &str, name: &str) -> String {
    condition(&server.get(plural, name).unwrap(), "Ready").1
}

/// What the events about an object say: reason and message.
pub fn events(server: &Server, name: &str) -> Vec<(String, String)> {
    let events = server.names("events").into_iter();
    events
        .map(|event| server.get("events", &event).unwrap())
        .filter(|event| event["regarding"]["name"] == name)
        .map(|event| {
            let text = |key: &str| event[key].as_str().unwrap().to_owned();
            (text("reason"), text("note"))
        })
        .collect()
}

/// A Function and a PackageSet, that nobody has looked at yet.
pub fn cluster() -> Server {
    let server = Server::new();
    server.put(ready_set("True"));
    server.put(set(&json!({ "lines": [LINE] })));
    server.put(function("hello"));
    server
}

/// The objects that the operator makes for [`cluster`], as plural and name.
pub fn children() -> [(&'static str, String); 5] {
    [
        ("services", "hello".to_owned()),
        ("configmaps", code_name("hello")),
        ("deployments", "hello".to_owned()),
        ("configmaps", requirements_name()),
        ("daemonsets", pool_name()),
    ]
}

/// What the Deployment's controller does when all pods serve.
pub fn roll_out(server: &Server, name: &str) {
    server.edit("deployments", name, |deployment| {
        let replicas = deployment["spec"]["replicas"].clone();
        deployment["status"] = json!({
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": replicas, "readyReplicas": replicas, "updatedReplicas": replicas,
        });
    });
}
