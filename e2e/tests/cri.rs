//! critest, the tests of the container runtime interface: what passes with runc passes with sock. kubelet is away meanwhile, since
//! it ends sandboxes that it does not know, so nothing else may run beside this.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    MINUTE, Namespace, Node, Security, get, in_namespace_of, program, until,
    until_other_tests_are_gone, workers,
};

/// Where all of it lies on a node.
const PLACE: &str = "/var/lib/sock-cri";
const REGISTRY: &str = include_str!("../src/registry.py");
const PORT: u16 = 5000;
/// Fewer would mean that critest does not run.
const AT_LEAST: usize = 100;

/// A node prepared for critest, until the end.
struct Prepared<'a> {
    node: &'a Node,
    images: BTreeSet<String>,
}

const IMAGES: &str = "crictl images --quiet --no-trunc | sort -u";

impl<'a> Prepared<'a> {
    fn new(node: &'a Node, namespace: &Namespace) -> Result<Prepared<'a>> {
        let images = node.shell(IMAGES, &[])?;
        let prepared = Prepared {
            node,
            images: images.lines().map(str::to_owned).collect(),
        };
        let script = r#"
            mkdir -p "$1/layout" /etc/containerd/certs.d/_default
            printf 'server = "http://127.0.0.1:%s"\n' "$2" >/etc/containerd/certs.d/_default/hosts.toml"#;
        let port = PORT.to_string();
        node.shell(script, &[PLACE, &port])?;
        prepared.send(
            "../target/archives/cri/critest.tar",
            &format!("tar -C {PLACE}/layout -xf -"),
        )?;
        let path = program("sh", &["-c", "command -v critest"])?.output()?;
        let path = String::from_utf8(path.stdout)?;
        ensure!(
            !path.is_empty(),
            "critest is missing: `make cluster` builds it"
        );
        prepared.send(
            path.trim(),
            &format!("cat >{PLACE}/critest && chmod 755 {PLACE}/critest"),
        )?;
        namespace.apply(&[json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": node.name},
            "spec": {
                // With no grace at all its object would be gone before it is, and its port would be taken in the next run.
                "nodeName": node.name, "hostNetwork": true, "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "registry", "image": "docker.io/library/python:3.13-slim-trixie", "imagePullPolicy": "Never",
                    "command": ["python3", "-c", REGISTRY, port, "/layout"],
                    "readinessProbe": {"httpGet": {"host": "127.0.0.1", "port": PORT, "path": "/v2/"}, "periodSeconds": 1},
                    "volumeMounts": [{"name": "layout", "mountPath": "/layout", "readOnly": true}],
                }],
                "volumes": [{"name": "layout", "hostPath": {"path": format!("{PLACE}/layout")}}],
            }
        })])?;
        namespace.kubectl(&[
            "wait",
            &format!("pod/{}", node.name),
            "--for=condition=Ready",
            "--timeout=60s",
        ])?;
        node.shell("systemctl stop kubelet", &[])?;
        Ok(prepared)
    }

    /// A file of this machine into a command on the node.
    fn send(&self, file: &str, command: &str) -> Result<()> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let file = std::fs::File::open(&file)
            .with_context(|| format!("{}: `make test-images` makes it", file.display()))?;
        let arguments = ["exec", "-i", &self.node.name, "sh", "-c", command];
        let status = program("docker", &arguments)?
            .stdin(Stdio::from(file))
            .status()?;
        ensure!(status.success(), "{command}: {status}");
        Ok(())
    }

    /// What became of each spec: its state, and why.
    fn critest(&self, handler: &str) -> Result<BTreeMap<String, (String, String)>> {
        // Specs that fail are in the report.
        let script = r#"
            cd "$1" && rm -f report.json
            ./critest --runtime-endpoint unix:///run/containerd/containerd.sock --runtime-handler="$2" --ginkgo.no-color \
              --ginkgo.seed=1 --ginkgo.json-report=report.json >log 2>&1 </dev/null || true
            cat report.json || { tail -50 log; exit 1; }"#;
        let report = self.node.shell(script, &[PLACE, handler])?;
        let report: Value = serde_json::from_str(&report)?;
        let specs = report[0]["SpecReports"].as_array().context("SpecReports")?;
        let specs = specs.iter().filter(|spec| spec["LeafNodeType"] == "It");
        Ok(specs.map(outcome).collect())
    }

    fn undo(&self) -> Result<()> {
        let kept: Vec<&str> = self.images.iter().map(String::as_str).collect();
        let script = format!(
            r#"systemctl start kubelet
            rm -rf {PLACE} /etc/containerd/certs.d
            for image in $({IMAGES}); do case " $* " in *" $image "*) ;; *) crictl rmi "$image" >/dev/null ;; esac; done"#
        );
        self.node.shell(&script, &kept).map(drop)
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            eprintln!("{} is not as it was: {error:#}", self.node.name);
        }
    }
}

fn outcome(spec: &Value) -> (String, (String, String)) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let containers = spec["ContainerHierarchyTexts"].as_array();
    let names = containers.into_iter().flatten().map(text);
    let names: Vec<String> = names.chain([text(&spec["LeafNodeText"])]).collect();
    let why = text(&spec["Failure"]["Message"]);
    (names.join(" "), (text(&spec["State"]), why))
}

fn until_ready(node: &Node) -> Result<()> {
    until(&format!("{} is ready", node.name), 3 * MINUTE, || {
        let node = get(&["node", &node.name])?;
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|one| one["type"] == "Ready" && one["status"] == "True");
        Ok(ready.then_some(()))
    })
}

#[test]
fn what_passes_with_runc_passes_with_sock() {
    // The registry of a run before would answer on its port.
    if let Err(error) = until_other_tests_are_gone() {
        panic!("{error:#}");
    }
    in_namespace_of(Security::Privileged, "cri", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (one, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let (with_runc, with_sock) = std::thread::scope(|scope| {
            let both = [(&one, ""), (&other, "sock")].map(|(node, handler)| {
                scope.spawn(move || Prepared::new(node, namespace)?.critest(handler))
            });
            let [runc, sock] = both.map(|run| run.join().expect("no panic"));
            anyhow::Ok((runc?, sock?))
        })?;
        for node in [&one, &other] {
            until_ready(node)?;
        }
        let passed = |all: &BTreeMap<String, (String, String)>, name: &str| {
            all.get(name).is_some_and(|(state, _)| state == "passed")
        };
        let due: Vec<&String> = with_runc
            .keys()
            .filter(|name| passed(&with_runc, name))
            .collect();
        let count = with_sock
            .keys()
            .filter(|name| passed(&with_sock, name))
            .count();
        println!(
            "critest: {} specs pass with runc, {count} with sock",
            due.len()
        );
        let failed = with_runc.iter().filter(|(_, (state, _))| state == "failed");
        ensure!(due.len() >= AT_LEAST, "{:#?}", failed.collect::<Vec<_>>());
        let mut wrong = Vec::new();
        for name in due {
            let (state, why) = with_sock.get(name).context("the same specs")?;
            if state != "passed" {
                wrong.push(format!("{name}: {state}: {why}"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    });
}
