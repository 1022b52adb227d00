//! A namespace for one test, and what is in it when the test fails.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{apply, get, kubectl};
use crate::node::Node;
use crate::wait::{MINUTE, until};

/// Which pods a namespace admits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Security {
    /// Those of the restricted Pod Security Standard, as where Functions live.
    Restricted,
    /// Any.
    Privileged,
}

/// A namespace of one test.
#[derive(Debug)]
pub struct Namespace {
    /// Its name.
    pub name: String,
}

/// Runs a test in a restricted namespace of its own. A test that fails shows what is in it.
///
/// # Panics
/// The test fails.
pub fn in_namespace(name: &str, test: impl FnOnce(&Namespace) -> Result<()>) {
    in_namespace_of(Security::Restricted, name, test);
}

/// The same with another kind of namespace.
///
/// # Panics
/// The test fails.
pub fn in_namespace_of(
    security: Security,
    name: &str,
    test: impl FnOnce(&Namespace) -> Result<()>,
) {
    let namespace = match Namespace::new(security, name) {
        Ok(namespace) => namespace,
        Err(error) => panic!("no namespace for {name}: {error:#}"),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&namespace)));
    match &outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            // First: what follows is long, and whoever keeps only a part of the output keeps its head.
            println!("{name}: {error:#}");
            println!("{}", namespace.diagnosis());
        }
        Err(_) => println!("{}", namespace.diagnosis()),
    }
    // Nobody waits for the end of it here; the tests of deletion do.
    let deleted = kubectl(&[
        "delete",
        "namespace",
        &namespace.name,
        "--wait=false",
        "--ignore-not-found",
    ]);
    match outcome {
        Err(panic) => resume_unwind(panic),
        Ok(Err(error)) => panic!("{name}: {error:#}"),
        Ok(Ok(())) => {
            if let Err(error) = deleted {
                panic!("{name}: {error:#}");
            }
        }
    }
}

impl Namespace {
    fn new(security: Security, name: &str) -> Result<Namespace> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() & 0xff_ffff;
        let name = format!("e2e-{name}-{now:06x}");
        let level = match security {
            Security::Restricted => "restricted",
            Security::Privileged => "privileged",
        };
        apply(&[json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {
                "sock-e2e": "test", "pod-security.kubernetes.io/enforce": level,
            }},
        })])?;
        Ok(Namespace { name })
    }

    /// `kubectl` in this namespace.
    ///
    /// # Errors
    /// It fails; what it said is in the error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["--namespace", &self.name];
        all.extend(arguments);
        kubectl(&all)
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["--namespace", &self.name];
        all.extend(arguments);
        get(&all)
    }

    /// Applies objects in this namespace.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let objects: Vec<Value> = objects
            .iter()
            .cloned()
            .map(|mut object| {
                object["metadata"]["namespace"] = json!(self.name);
                object
            })
            .collect();
        apply(&objects)
    }

    /// Waits until a condition of an object is true, by `kubectl wait`.
    ///
    /// # Errors
    /// It does not become true in time.
    pub fn wait_for(&self, object: &str, condition: &str, within: Duration) -> Result<()> {
        let condition = format!("--for=condition={condition}");
        let within = format!("--timeout={}s", within.as_secs());
        self.kubectl(&["wait", object, &condition, &within])?;
        Ok(())
    }

    /// Applies a Function (and whatever else it needs) and waits until it serves.
    ///
    /// # Errors
    /// It does not serve in time.
    pub fn serve(&self, function: &str, objects: &[Value]) -> Result<()> {
        self.apply(objects)?;
        self.wait_for(&format!("function/{function}"), "Ready", 3 * MINUTE)
    }

    /// Waits until a node routes what it sends to a Service, and gives the Service's name in DNS.
    ///
    /// A pod that is ready becomes known to the kube-proxy of each node up to a second later, and until then its
    /// Service refuses connections there: Kubernetes promises no more, and nothing in a pod can.
    ///
    /// # Errors
    /// It does not in time.
    pub fn routed(&self, service: &str, from: &Node) -> Result<String> {
        const SCRIPT: &str = r#"iptables-save -t nat | grep -cE -- "--comment \"?$1(:[^ ]*)?\"? .*--to-destination" || true"#;
        let name = format!("{}/{service}", self.name);
        until(&format!("{} routes to {name}", from.name), MINUTE, || {
            Ok((from.shell(SCRIPT, &[&name])?.trim() != "0").then_some(()))
        })?;
        Ok(format!("{service}.{}.svc.cluster.local", self.name))
    }

    /// The pods of a selector that are not being deleted.
    ///
    /// # Errors
    /// `kubectl` fails.
    pub fn pods(&self, selector: &str) -> Result<Vec<Value>> {
        let list = self.get(&["pods", "--selector", selector])?;
        let items = list["items"].as_array().context("a list of pods")?;
        Ok(items
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .cloned()
            .collect())
    }

    /// The pods of the zygote pool that a PackageSet's Functions are forked from: of its newest version that
    /// was ready everywhere, not of one before that serves pods to their end.
    ///
    /// # Errors
    /// There is no such PackageSet, or no version of it was ever ready.
    pub fn pools_of(&self, set: &str) -> Result<Vec<Value>> {
        let status = &self.get(&["packageset", set])?["status"];
        let digest = status["readyDigest"].as_str();
        let version = digest.and_then(|digest| digest.get(..10));
        let version =
            version.with_context(|| format!("PackageSet {set} was never ready: {status}"))?;
        self.pods(&format!("sock.dev/pool={set},sock.dev/version={version}"))
    }

    /// The only pod of that pool.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn pool_of(&self, set: &str) -> Result<Value> {
        let mut pools = self.pools_of(set)?;
        match (pools.pop(), pools.len()) {
            (Some(pool), 0) => Ok(pool),
            (_, others) => bail!("PackageSet {set} has {others} more pools than one, or none"),
        }
    }

    /// The only pod of a Function.
    ///
    /// # Errors
    /// It has none, or several.
    pub fn pod_of(&self, function: &str) -> Result<Value> {
        let mut pods = self.pods(&format!("sock.dev/function={function}"))?;
        match (pods.pop(), pods.len()) {
            (Some(pod), 0) => Ok(pod),
            (_, others) => bail!("Function {function} has {others} more pods than one, or none"),
        }
    }

    /// Waits until a condition in an object's status has this reason, and returns its message.
    ///
    /// # Errors
    /// It has not in time.
    pub fn message_of(
        &self,
        object: &str,
        condition: &str,
        status: &str,
        within: Duration,
    ) -> Result<String> {
        until(
            &format!("condition {condition} of {object} is {status}"),
            within,
            || {
                let found = self.get(&[object])?;
                let conditions = found["status"]["conditions"].as_array().cloned();
                Ok(conditions.unwrap_or_default().into_iter().find_map(|one| {
                    (one["type"] == condition
                        && one["status"] == status
                        && one["reason"] != "Progressing")
                        .then(|| one["message"].as_str().unwrap_or_default().to_owned())
                }))
            },
        )
    }

    /// All that helps to understand a failure.
    fn diagnosis(&self) -> String {
        let mut text = format!("=== what is in {}\n", self.name);
        let mut show = |arguments: &[&str]| {
            let found = self
                .kubectl(arguments)
                .unwrap_or_else(|error| format!("{error:#}\n"));
            text.push_str(&format!("--- kubectl {}\n{found}", arguments.join(" ")));
        };
        show(&[
            "get",
            "functions,packagesets,pods,services",
            "--output=wide",
        ]);
        show(&[
            "get",
            "functions,packagesets",
            "--output=jsonpath={range .items[*]}{.kind} {.metadata.name} {.status}{\"\\n\"}{end}",
        ]);
        show(&["get", "events", "--sort-by=.lastTimestamp"]);
        let pods = self
            .kubectl(&["get", "pods", "--output=name"])
            .unwrap_or_default();
        for pod in pods.lines() {
            show(&["describe", pod]);
            show(&["logs", pod, "--all-containers", "--prefix", "--tail=40"]);
        }
        text
    }
}
