//! A pod that calls Functions and Services from inside the cluster, on a node of choice.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{apply, kubectl, program};
use crate::manifest;
use crate::node::Node;

const NAMESPACE: &str = "sock-e2e";
/// No command of a test takes longer.
const LONGEST: Duration = Duration::from_secs(90);

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u64,
    /// The body, as text.
    pub body: String,
    /// The headers.
    pub headers: Value,
}

impl Answer {
    fn from(value: &Value) -> Result<Answer> {
        Ok(Answer {
            status: value["status"].as_u64().context("a status")?,
            body: value["body"].as_str().context("a body")?.to_owned(),
            headers: value["headers"].clone(),
        })
    }

    /// The body of a good answer.
    ///
    /// # Errors
    /// The status is not 200.
    pub fn text(&self) -> Result<&str> {
        if self.status != 200 {
            bail!("{} {}", self.status, self.body);
        }
        Ok(&self.body)
    }

    /// The body of a good answer, parsed.
    ///
    /// # Errors
    /// The status is not 200, or the body not JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(self.text()?).with_context(|| self.body.clone())
    }
}

/// How often a load of requests got which answer: `200`, another status with its body, or an error.
pub type Load = HashMap<String, u64>;

/// A client in a pod. It lives on the nodes' default runtime: what it says must not depend on what is tested.
#[derive(Debug)]
pub struct Client {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
}

impl Client {
    /// A client on this node. The pod stays for the other tests of the run.
    ///
    /// # Errors
    /// Its pod does not start.
    pub fn on(node: &Node) -> Result<Client> {
        let pod = format!("client-{}", node.name);
        apply(&[
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": pod, "namespace": NAMESPACE},
                "spec": {
                    "nodeName": node.name,
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "client", "image": manifest::PYTHON, "imagePullPolicy": "IfNotPresent",
                        "command": ["sleep", "infinity"],
                    }],
                },
            }),
        ])?;
        let pod = format!("pod/{pod}");
        kubectl(&[
            "--namespace",
            NAMESPACE,
            "wait",
            &pod,
            "--for=condition=Ready",
            "--timeout=60s",
        ])?;
        let script = include_str!("client.py");
        let mut child = program(
            "kubectl",
            &[
                "--namespace",
                NAMESPACE,
                "exec",
                "-i",
                &pod,
                "--",
                "python3",
                "-u",
                "-c",
                script,
            ],
        )?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("kubectl exec")?;
        let commands = child.stdin.take().context("standard input")?;
        let output = child.stdout.take().context("standard output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Client {
            child,
            commands,
            answers,
        })
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let described = || format!("client: {command} {arguments}");
        writeln!(self.commands, "{}", json!([command, arguments])).with_context(described)?;
        let line = self.answers.recv_timeout(LONGEST).with_context(described)?;
        let mut answer: Value = serde_json::from_str(&line).with_context(described)?;
        if let Some(error) = answer["error"].as_str() {
            bail!("{}: {error}", described());
        }
        Ok(answer["ok"].take())
    }

    /// A request on a connection of its own.
    ///
    /// # Errors
    /// There is no answer.
    pub fn get(&mut self, host: &str, port: u16, path: &str) -> Result<Answer> {
        Answer::from(&self.ask("once", &json!({"host": host, "port": port, "path": path}))?)
    }

    /// The same with a body.
    ///
    /// # Errors
    /// There is no answer.
    pub fn post(&mut self, host: &str, port: u16, path: &str, body: &str) -> Result<Answer> {
        let arguments =
            json!({"host": host, "port": port, "path": path, "method": "POST", "body": body});
        Answer::from(&self.ask("once", &arguments)?)
    }

    /// Text (of Latin-1) as it is on a connection of its own, and the answer to it.
    ///
    /// # Errors
    /// There is no answer.
    pub fn raw(&mut self, host: &str, port: u16, text: &str) -> Result<Answer> {
        Answer::from(&self.ask("raw", &json!({"host": host, "port": port, "text": text}))?)
    }

    /// Opens a connection and gives it a name.
    ///
    /// # Errors
    /// It is refused.
    pub fn open(&mut self, name: &str, host: &str, port: u16) -> Result<()> {
        self.ask("open", &json!({"name": name, "host": host, "port": port}))?;
        Ok(())
    }

    /// A request on an open connection. A connection that was closed meanwhile is an error.
    ///
    /// # Errors
    /// There is no answer.
    pub fn request(&mut self, name: &str, path: &str) -> Result<Answer> {
        Answer::from(&self.ask("request", &json!({"name": name, "path": path}))?)
    }

    /// Sends a request on an open connection, and does not wait for its answer.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn send(&mut self, name: &str, path: &str) -> Result<()> {
        self.ask("send", &json!({"name": name, "path": path}))?;
        Ok(())
    }

    /// The answer to what was sent.
    ///
    /// # Errors
    /// There is none.
    pub fn receive(&mut self, name: &str) -> Result<Answer> {
        Answer::from(&self.ask("receive", &json!({"name": name}))?)
    }

    /// Opens connections and sends nothing on them.
    ///
    /// # Errors
    /// One is refused.
    pub fn silence(&mut self, host: &str, port: u16, count: usize) -> Result<()> {
        self.ask(
            "silence",
            &json!({"host": host, "port": port, "count": count}),
        )?;
        Ok(())
    }

    /// A request on one of the silent connections.
    ///
    /// # Errors
    /// There is no answer.
    pub fn speak(&mut self, path: &str) -> Result<Answer> {
        Answer::from(&self.ask("speak", &json!({"path": path}))?)
    }

    /// Requests at once, each on a connection of its own.
    ///
    /// # Errors
    /// The client does not answer; what a server does is in the answers.
    pub fn burst(
        &mut self,
        host: &str,
        port: u16,
        path: &str,
        count: usize,
    ) -> Result<Vec<Answer>> {
        let arguments = json!({"host": host, "port": port, "path": path, "count": count});
        let answers = self.ask("burst", &arguments)?;
        let answers = answers.as_array().context("a list of answers")?;
        answers.iter().map(Answer::from).collect()
    }

    /// Begins to send one request after the other.
    ///
    /// # Errors
    /// The client does not answer.
    pub fn load(&mut self, name: &str, host: &str, port: u16, path: &str) -> Result<()> {
        self.ask(
            "load",
            &json!({"name": name, "host": host, "port": port, "path": path}),
        )?;
        Ok(())
    }

    /// Begins to send one request after the other, and checks every answer: a right one counts as `right`.
    ///
    /// `how`: `kept` (connections are used again), `size` (bytes of the body), `fail_every` (each so many-th
    /// request asks for a failure), `pause` (seconds).
    ///
    /// # Errors
    /// The client does not answer.
    pub fn soak(&mut self, name: &str, host: &str, port: u16, how: &Value) -> Result<()> {
        let mut arguments = json!({"name": name, "host": host, "port": port});
        if let (Some(all), Some(how)) = (arguments.as_object_mut(), how.as_object()) {
            all.extend(how.clone());
        }
        self.ask("soak", &arguments)?;
        Ok(())
    }

    /// What a load has got until now.
    ///
    /// # Errors
    /// The client does not answer.
    pub fn count(&mut self, name: &str) -> Result<Load> {
        Ok(serde_json::from_value(
            self.ask("count", &json!({"name": name}))?,
        )?)
    }

    /// Ends a load and says what it got.
    ///
    /// # Errors
    /// The client does not answer.
    pub fn stop(&mut self, name: &str) -> Result<Load> {
        Ok(serde_json::from_value(
            self.ask("stop", &json!({"name": name}))?,
        )?)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
