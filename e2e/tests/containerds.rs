//! Other releases of containerd than the cluster's, each run beside it on a node: the shim answers every one in its own way.

use anyhow::{Context as _, Result, ensure};
use sock_e2e::{inventory_of_quiet, until_as_before, workers};

/// `$1`: where the programs are and everything else is to be, `$2`: the version of the configuration, `$3` and `$4`: the plugins
/// that configure runtimes and images. Leaves nothing.
const SCRIPT: &str = r#"
set -u
at=$1
socket=$at/run/containerd.sock
mkdir -p $at/run
case $2 in
  2) pause="sandbox_image = \"docker.io/library/busybox:1.36\"" ;;
  *) pause="[plugins.\"$4\".pinned_images]
sandbox = \"docker.io/library/busybox:1.36\"" ;;
esac
cat >$at/config.toml <<TOML
version = $2
root = "$at/root"
state = "$at/run/state"
[grpc]
address = "$socket"
[plugins."$4"]
$pause
[plugins."$3".containerd]
default_runtime_name = "sock"
[plugins."$3".containerd.runtimes.sock]
runtime_type = "io.containerd.sock.v1"
TOML
# containerd makes directories of its own on the way.
export PATH=/opt/sock/bin:$PATH
start() {
  $at/other-containerd --config $at/config.toml >>$at/log 2>&1 </dev/null &
  daemon=$!
  for try in $(seq 100); do on version >/dev/null 2>&1 && return; sleep 0.1; done
  tail -n 20 $at/log
  exit 1
}
on() { timeout 60 $at/ctr --address $socket --namespace other "$@" </dev/null; }
cri() { timeout 60 crictl --runtime-endpoint unix://$socket --image-endpoint unix://$socket "$@" </dev/null; }
stop() { kill $daemon; wait $daemon 2>/dev/null; }
start
trap 'stop; rm -rf $at' EXIT
ctr -n k8s.io images export --local $at/image.tar docker.io/library/busybox:1.36 2>/dev/null
for namespace in other k8s.io; do
  timeout 60 $at/ctr --address $socket --namespace $namespace images import $at/image.tar >/dev/null
done
on run --rm --runtime io.containerd.sock.v1 docker.io/library/busybox:1.36 one sh -c 'echo runs; exit 3'; echo "ended with $?"
on run --detach --runtime io.containerd.sock.v1 docker.io/library/busybox:1.36 two sleep 600
on task exec --exec-id a two echo executed
stop
start
on task ls | awk '$1 == "two" { print $1, $3 }'
on task exec --exec-id b two sh -c 'echo executed again; exit 4'; echo "ended with $?"
on task kill --signal KILL two
for try in $(seq 100); do on task ls | grep -q STOPPED && break; sleep 0.1; done
on task delete two >/dev/null 2>&1
on container delete two

cat >$at/pod.json <<JSON
{"metadata": {"name": "pod", "namespace": "default", "uid": "other", "attempt": 0}, "log_directory": "$at",
 "linux": {"security_context": {"namespace_options": {"network": 2}}}}
JSON
cat >$at/container.json <<JSON
{"metadata": {"name": "container"}, "image": {"image": "docker.io/library/busybox:1.36"}, "log_path": "container.log",
 "command": ["sh", "-c", "echo logged; trap 'exit 5' TERM; sleep 600 & wait"], "linux": {}}
JSON
pod=$(cri runp --runtime sock $at/pod.json)
container=$(cri create $pod $at/container.json $at/pod.json)
cri start $container >/dev/null
cri exec --sync $container echo executed in a pod | grep .
cri stop --timeout 10 $container >/dev/null
cri inspect --output go-template --template '{{.status.state}} {{.status.exitCode}}' $container | grep .
cut -d' ' -f3- $at/container.log
cri rm $container >/dev/null
# Another container of the same pod is the same server's.
container=$(cri create $pod $at/container.json $at/pod.json)
cri start $container >/dev/null
cri exec --sync $container echo executed in the next | grep .
pgrep -fc -- "-address $socket .*-socket"
cri stop --timeout 10 $container >/dev/null
cri stopp $pod >/dev/null; cri rmp $pod >/dev/null
cri pods --quiet
on containers ls -q
"#;

const EXPECTED: &str = "runs
ended with 3
executed
two RUNNING
executed again
ended with 4
executed in a pod
CONTAINER_EXITED 5
F logged
executed in the next
1
";

fn answers(release: &str, version: &str, runtimes: &str, images: &str) -> Result<()> {
    let node = workers()?.into_iter().next().context("a node")?;
    let nodes = std::slice::from_ref(&node);
    let before = inventory_of_quiet(nodes)?;
    let at = format!("/var/lib/other-containerd-{release}");
    let from = format!("../target/archives/containerds/{release}");
    // The node's installer knows its own containerd by its name.
    for (program, name) in [("containerd", "other-containerd"), ("ctr", "ctr")] {
        node.put(&format!("{from}/{program}"), &format!("{at}/{name}"))?;
    }
    let said = node.shell(SCRIPT, &[&at, version, runtimes, images])?;
    ensure!(said == EXPECTED, "containerd {release}:\n{said}");
    until_as_before(nodes, &before)
}

#[test]
fn containerd_1_7_is_answered_in_the_second_version_of_the_task_api() -> Result<()> {
    let cri = "io.containerd.grpc.v1.cri";
    answers("1.7", "2", cri, cri)
}

#[test]
fn containerd_2_3_is_answered_by_its_own_bootstrap_protocol() -> Result<()> {
    answers(
        "2.3",
        "3",
        "io.containerd.cri.v1.runtime",
        "io.containerd.cri.v1.images",
    )
}
