//! The cluster from outside: kubectl for what Kubernetes knows, docker for what only a node can do.
//! Both are found by the variables that `e2e/cluster/env` prints.

use std::io::Write;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Where this program lies on a node while it measures there.
const PROGRAM: &str = "/usr/local/bin/sock-bench";

/// Runs kubectl and returns what it prints.
///
/// # Errors
/// With its last line of standard error.
pub fn kubectl(arguments: &[&str]) -> Result<String> {
    run("kubectl", arguments, None)
}

/// Runs docker, which a node of kind is a container of.
///
/// # Errors
/// With what it says.
pub fn docker(arguments: &[&str]) -> Result<String> {
    run("docker", arguments, None)
}

/// Makes the objects be as stated.
///
/// # Errors
/// If the API server refuses one.
pub fn apply(objects: &[Value]) -> Result<()> {
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    run("kubectl", &arguments, Some(&serde_json::to_vec(&list)?))?;
    Ok(())
}

/// Objects that are written as YAML.
///
/// # Errors
/// If something else is.
pub fn as_json(yaml: &[u8]) -> Result<Vec<Value>> {
    let arguments = ["create", "--dry-run=client", "-o", "json", "-f", "-"];
    let text = run("kubectl", &arguments, Some(yaml))?;
    let objects = serde_json::Deserializer::from_str(&text).into_iter();
    let objects: serde_json::Result<Vec<Value>> = objects.collect();
    objects.context("what kubectl makes of YAML")
}

/// An object, or a list, as the API server has it.
///
/// # Errors
/// If it is not there.
pub fn get(arguments: &[&str]) -> Result<Value> {
    let text = kubectl(&[&["get", "-o", "json"], arguments].concat())?;
    serde_json::from_str(&text).context("the answer of kubectl get")
}

/// Waits until a Function, PackageSet or Deployment can be used.
///
/// # Errors
/// If that takes too long, with the conditions as they are then.
pub fn wait_until(condition: &str, namespace: &str, object: &str, seconds: u32) -> Result<()> {
    let (condition, timeout) = (
        format!("--for=condition={condition}"),
        format!("--timeout={seconds}s"),
    );
    let waited = kubectl(&["wait", "-n", namespace, &condition, &timeout, object]);
    let Err(error) = waited else { return Ok(()) };
    let state = get(&["-n", namespace, object])?;
    bail!("{error:#}; its status: {}", state["status"]);
}

/// A pod that serves.
#[derive(Debug, Clone)]
pub struct Pod {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Of the pod.
    pub address: std::net::IpAddr,
    /// Name of the node that it is on.
    pub node: String,
}

/// The pods with these labels that are ready and stay.
///
/// # Errors
/// If the API server does not answer, or with what makes no sense.
pub fn ready_pods(namespace: &str, selector: &str) -> Result<Vec<Pod>> {
    let list = get(&["pods", "-n", namespace, "-l", selector])?;
    let pods = list["items"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    pods.iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && is_ready(pod))
        .map(|pod| {
            let text = |value: &Value| {
                value
                    .as_str()
                    .map(str::to_owned)
                    .context("a pod without an address")
            };
            Ok(Pod {
                name: text(&pod["metadata"]["name"])?,
                uid: text(&pod["metadata"]["uid"])?,
                address: text(&pod["status"]["podIP"])?.parse()?,
                node: text(&pod["spec"]["nodeName"])?,
            })
        })
        .collect()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|conditions| {
        conditions
            .iter()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    })
}

/// A worker on which sock is installed.
#[derive(Debug, Clone)]
pub struct Node {
    /// Of the node, and of the docker container that it is.
    pub name: String,
}

impl Node {
    /// All, by name.
    ///
    /// # Errors
    /// If there is none.
    pub fn all() -> Result<Vec<Node>> {
        let list = get(&["nodes", "-l", "sock.dev/node=ready"])?;
        let nodes = list["items"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let names = nodes
            .iter()
            .filter_map(|node| node["metadata"]["name"].as_str());
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        if names.is_empty() {
            bail!("sock is installed on no node; `make install` installs it");
        }
        Ok(names
            .into_iter()
            .map(|name| Node {
                name: name.to_owned(),
            })
            .collect())
    }

    /// Runs a shell command there.
    ///
    /// # Errors
    /// If it fails.
    pub fn shell(&self, command: &str) -> Result<String> {
        run("docker", &["exec", &self.name, "sh", "-c", command], None)
    }

    /// Puts this program there, until the value returned is dropped.
    ///
    /// # Errors
    /// If docker does not run in this way: then the node is no node of kind.
    pub fn equip(&self) -> Result<Equipped> {
        let program = std::env::current_exe()?;
        let program = std::fs::read(&program).with_context(|| program.display().to_string())?;
        let command =
            format!("cat >{PROGRAM}.new && chmod 755 {PROGRAM}.new && mv {PROGRAM}.new {PROGRAM}");
        run(
            "docker",
            &["exec", "-i", &self.name, "sh", "-c", &command],
            Some(&program),
        )?;
        Ok(Equipped { node: self.clone() })
    }
}

/// A node that carries out jobs; see [`crate::node`].
#[derive(Debug)]
pub struct Equipped {
    /// Which.
    pub node: Node,
}

impl Equipped {
    /// Starts a job that goes on: its input and its output are the caller's.
    ///
    /// # Errors
    /// If docker does not run.
    pub fn start(&self, job: &str) -> Result<Child> {
        Command::new("docker")
            .args(["exec", "-i", &self.node.name, PROGRAM, "node", job])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("running docker")
    }

    /// # Errors
    /// What the job says.
    pub fn job<R: DeserializeOwned>(&self, job: &str, document: &impl Serialize) -> Result<R> {
        let document = serde_json::to_vec(document)?;
        let arguments = ["exec", "-i", &self.node.name, PROGRAM, "node", job];
        let answer = run("docker", &arguments, Some(&document))?;
        serde_json::from_str(&answer).with_context(|| format!("the answer of job {job}"))
    }
}

impl Drop for Equipped {
    fn drop(&mut self) {
        if let Err(error) = self.node.shell(&format!("rm -f {PROGRAM}")) {
            eprintln!("{PROGRAM} stays on {}: {error:#}", self.node.name);
        }
    }
}

fn run(program: &str, arguments: &[&str], input: Option<&[u8]>) -> Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {program}"))?;
    let written = match (input, child.stdin.take()) {
        (Some(input), Some(mut stdin)) => stdin.write_all(input),
        _ => Ok(()),
    };
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), error.trim());
    }
    written.with_context(|| format!("the input of {program}"))?;
    Ok(String::from_utf8(output.stdout)?)
}
