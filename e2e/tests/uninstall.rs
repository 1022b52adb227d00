//! Removing the whole of sock, as manifests/README.md says. Runs last: there is no sock afterwards.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::Security;
use sock_e2e::{MINUTE, Node, get, in_namespace_of, kubectl, manifest, until, workers};

/// What sock has put on a node, and what it has changed there.
const TRACES: &str = r#"
find /opt/sock /var/lib/sock /run/sock /etc/containerd -name '*sock*' 2>/dev/null | sed 's/^/file /'
grep -lE 'runtimes\.sock|containerd\.sock\.v1|shim-sock|/opt/sock|sock\.toml' /etc/containerd/*.toml /etc/containerd/*/*.toml 2>/dev/null | sed 's/^/config /'
crictl info 2>/dev/null | grep -o 'containerd-shim-sock-v1\|io.containerd.sock[^"]*' | sort -u | sed 's/^/runtime /'
awk '$2 ~ "sock" && $2 !~ "kubelet" { print "mount", $2 }' /proc/mounts
for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    /opt/sock/* | */containerd-shim-sock-v1\ * | holder* | */sock-node\ *) echo "process $name" ;;
  esac
done
true
"#;

fn traces(nodes: &[Node]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in nodes {
        let found = node.shell(TRACES, &[])?;
        all.extend(found.lines().map(|line| format!("{}: {line}", node.name)));
    }
    Ok(all)
}

/// Prints a line every tenth of a second: a gap or a new start would be seen.
const TICKS: &str = "n=0; while true; do n=$((n+1)); echo tick $n; sleep 0.1; done";

fn identity(pod: &Value) -> Value {
    json!([
        pod["metadata"]["uid"],
        pod["status"]["containerStatuses"][0]["containerID"],
        pod["status"]["containerStatuses"][0]["restartCount"]
    ])
}

#[test]
fn nothing_of_sock_is_left_and_other_pods_run_on() {
    in_namespace_of(Security::Restricted, "others", |namespace| {
        let nodes = workers()?;
        ensure!(!traces(&nodes)?.is_empty(), "the account is blind");
        let mut pods = Vec::new();
        for node in &nodes {
            let mut pod = manifest::busybox(&format!("other-{}", node.name), &[("main", TICKS)]);
            if let Some(spec) = pod["spec"].as_object_mut() {
                spec.remove("runtimeClassName");
                spec.insert("nodeName".into(), json!(node.name));
            }
            pods.push(pod);
        }
        namespace.apply(&pods)?;
        let selector = [
            "wait",
            "pod",
            "--all",
            "--for=condition=Ready",
            "--timeout=60s",
        ];
        namespace.kubectl(&selector)?;
        let others = || -> Result<Vec<Value>> {
            let list = namespace.get(&["pods"])?;
            Ok(list["items"]
                .as_array()
                .context("pods")?
                .iter()
                .map(identity)
                .collect())
        };
        let before = others()?;

        kubectl(&[
            "delete",
            "functions,packagesets",
            "--all",
            "--all-namespaces",
            "--timeout=120s",
        ])?;
        until(
            "the pods of Functions and pools are gone",
            2 * MINUTE,
            || {
                let pods = get(&[
                    "pods",
                    "--all-namespaces",
                    "--selector=app.kubernetes.io/managed-by=sock-operator",
                ])?;
                Ok(pods["items"]
                    .as_array()
                    .is_some_and(Vec::is_empty)
                    .then_some(()))
            },
        )?;
        kubectl(&[
            "-n",
            "sock-system",
            "delete",
            "deployment",
            "sock-operator",
            "--timeout=60s",
        ])?;
        until("the operator is gone", MINUTE, || {
            let pods = get(&[
                "-n",
                "sock-system",
                "pods",
                "--selector=app.kubernetes.io/name=sock-operator",
            ])?;
            Ok(pods["items"]
                .as_array()
                .is_some_and(Vec::is_empty)
                .then_some(()))
        })?;
        let patch = r#"[{"op":"replace","path":"/spec/template/spec/containers/0/args","value":["uninstall"]}]"#;
        kubectl(&[
            "-n",
            "sock-system",
            "patch",
            "daemonset",
            "sock-node",
            "--type=json",
            "-p",
            patch,
        ])?;
        kubectl(&[
            "-n",
            "sock-system",
            "rollout",
            "status",
            "daemonset",
            "sock-node",
            "--timeout=180s",
        ])?;
        let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");
        kubectl(&[
            "delete",
            "-k",
            manifests,
            "--ignore-not-found",
            "--timeout=120s",
        ])?;

        let mut last = Vec::new();
        until("the nodes hold nothing of sock", MINUTE, || {
            last = traces(&nodes)?;
            Ok(last.is_empty().then_some(()))
        })
        .with_context(|| format!("{last:#?}"))?;
        for node in &nodes {
            let object = get(&["node", &node.name])?;
            let labels = object["metadata"]["labels"].as_object().context("labels")?;
            ensure!(
                !labels.keys().any(|key| key.starts_with("sock.dev/")),
                "{labels:?}"
            );
        }
        ensure!(
            others()? == before,
            "other pods are the same: {:?}",
            others()?
        );
        for pod in &pods {
            let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
            let log = namespace.kubectl(&["logs", name])?;
            let ticks: Vec<u64> = log
                .lines()
                .filter_map(|line| line.strip_prefix("tick ")?.parse().ok())
                .collect();
            let count = u64::try_from(ticks.len())?;
            ensure!(
                ticks.iter().copied().eq(1..=count) && count > 10,
                "no line of another pod was lost: {count} lines"
            );
        }
        Ok(())
    });
}
