//! Docker with the shim as a runtime of its own (`docker run --runtime io.containerd.sock.v1`), on a node's containerd: what it
//! is told and what its containers see are as with runc. It looks at a whole node, so nothing else may run beside it.

use anyhow::{Context as _, Result, ensure};
use sock_e2e::{inventory_of_quiet, until_as_before, workers};

/// `$1`: where the programs are and everything else is to be, `$2`: the runtime, `$3`: the driver of cgroups. Leaves nothing.
const SCRIPT: &str = r#"
set -u
at=$1
runtime=$2
driver=$3
image=docker.io/library/busybox:1.36
export PATH=$at/programs:$PATH DOCKER_HOST=unix://$at/docker.sock
mkdir -p $at/volume
# The firewall is the node's.
start() {
  dockerd --data-root $at/root --exec-root $at/run --pidfile $at/pid --host $DOCKER_HOST \
    --containerd /run/containerd/containerd.sock --iptables=false --ip6tables=false --bip 172.31.250.1/24 --live-restore \
    --exec-opt native.cgroupdriver=$driver $(test $driver = systemd || echo --cgroup-parent /sock-docker) >>$at/log 2>&1 </dev/null &
  daemon=$!
  for try in $(seq 100); do on version >/dev/null 2>&1 && return; sleep 0.1; done
  tail -n 20 $at/log
  exit 1
}
stop() { kill $daemon; wait $daemon 2>/dev/null; }
on() { timeout 60 docker "$@" </dev/null; }
run() { on run --runtime $runtime "$@"; }
# until WHAT FORMAT NAME: the container is so.
until_is() {
  for try in $(seq 100); do [ "$(on inspect --format "$2" $3)" = "$1" ] && break; sleep 0.1; done
  on inspect --format "$2" $3
}
clean() {
  all=$(on ps --all --quiet)
  [ -z "$all" ] || on rm --force $all >/dev/null
  stop
  ip link delete docker0
  for namespace in moby plugins.moby; do
    ctr namespaces remove $namespace >/dev/null 2>&1
    # containerd keeps a namespace's directories when it removes the namespace. What is in them stays, and is seen.
    rmdir /run/containerd/io.containerd.runtime.v2.task/$namespace /var/lib/containerd/io.containerd.runtime.v2.task/$namespace \
      2>/dev/null
  done
  find /sys/fs/cgroup -depth -type d -path '*/sock-docker*' -exec rmdir {} \; 2>/dev/null
  rm -rf $at/root $at/run $at/docker.sock $at/volume $at/file $at/log $at/image.tar
}
trap clean EXIT
start
ctr -n k8s.io images export --local $at/image.tar $image 2>/dev/null
on load --quiet --input $at/image.tar

echo '== output and exit codes'
run --rm $image sh -c 'echo out; exit 3'; echo "ended with $?"
run --rm $image sh -c 'echo err >&2' 2>&1 >/dev/null
run --rm $image nothing 2>&1 | grep -o 'exec: "nothing".*'
run --rm $image nothing >/dev/null 2>&1; echo "ended with $?"
echo given | timeout 20 docker run --rm --interactive --runtime $runtime $image cat; echo "ended with $?"
run --rm --tty $image sh -c 'tty; test -t 0; echo $?'

echo '== what a container sees'
run --rm --env HOME=/ $image sh -c '
grep -E "^(Cap|NoNewPrivs|Seccomp|Umask|Groups|Uid)" /proc/self/status
ls /dev; cut -d" " -f2,3 /proc/mounts | sort; cat /proc/self/limits /proc/self/oom_score_adj
env | grep -v HOSTNAME | sort; ip route'
run --rm --privileged $image sh -c '
grep -E "^(Cap|NoNewPrivs|Seccomp)" /proc/self/status
ls /dev | wc -l; cut -d" " -f2,3 /proc/mounts | sort'

echo '== what it is given'
run --rm --cap-drop ALL --cap-add NET_RAW --security-opt no-new-privileges --user 1000:2000 --group-add 3000 --read-only \
  --tmpfs /tmp:size=1m --volume $at/volume:/volume:ro --ulimit nofile=99:100 --sysctl 'net.ipv4.ip_local_port_range=2000 3000' \
  --hostname named --env A=B --workdir /tmp --shm-size 3m --pids-limit 20 --memory 32m --memory-swap 32m --cpus 0.5 \
  --cpu-shares 300 --oom-score-adj 300 $image sh -c 'exec 2>&1
id; pwd; hostname; echo $A; grep -E "^(Cap|NoNewPrivs|Seccomp)" /proc/self/status; ulimit -n; ulimit -Hn
cat /proc/sys/net/ipv4/ip_local_port_range /proc/self/oom_score_adj
touch /a /tmp/b /volume/c; df /dev/shm /tmp | sed 1d
cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us cpu/cpu.shares'

echo '== one that goes on'
run --detach --name one --init --ipc shareable $image sleep 600 >/dev/null
run --rm --pid container:one --network container:one --ipc container:one $image sh -c '
ps -o comm | grep -E "docker-init|sleep"; ip addr show eth0 | grep -c inet'
on exec one sh -c 'echo executed; exit 4'; echo "ended with $?"
on exec --user 5:6 --workdir /tmp --env C=D one sh -c 'id; pwd; echo $C'
on exec --tty one sh -c 'tty; exit 6'; echo "ended with $?"
on top one -o pid,comm | sed 1d | awk '{ print $2 }'
on pause one; on ps --format '{{.Status}}' | grep -o Paused; on unpause one
on update --memory 64m --memory-swap 64m one; on exec one cat /sys/fs/cgroup/memory/memory.limit_in_bytes
on stats --no-stream --format '{{.Name}} {{.PIDs}} {{.MemUsage}}' one | sed 's, [0-9.]*[KM]iB /, used of,'
echo there >$at/file; on cp $at/file one:/tmp/file 2>/dev/null; on exec one cat /tmp/file
stop; start
on ps --format '{{.Names}} {{.State}}'
on exec one echo executed after a restart of the daemon
on kill --signal TERM one; on wait one; on rm one

echo '== one that has not enough memory'
run --name two --memory 16m --memory-swap 16m $image tail /dev/zero; echo "ended with $?"
on inspect --format 'for want of memory: {{.State.OOMKilled}}' two; on rm two

echo '== one that is started again'
run --detach --name three --restart on-failure:2 $image sh -c 'echo again; exit 7' >/dev/null
until_is 'exited 2 7' '{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}' three
on logs three; on rm three

echo '== one whose health is asked for'
run --detach --name four --health-cmd 'test -e /tmp/well' --health-interval 200ms $image \
  sh -c 'sleep 0.5; touch /tmp/well; sleep 600' >/dev/null
until_is healthy '{{.State.Health.Status}}' four
on stop --time 1 four; on inspect --format '{{.State.ExitCode}}' four
on start four; on restart --time 1 four; on rm --force four

echo '== one that others reach'
run --detach --name five --publish 127.0.0.1:31250:80 $image sh -c 'echo found >/index.html; httpd -f -h /' >/dev/null
for try in $(seq 50); do curl -sf http://127.0.0.1:31250/ && break; sleep 0.1; done
on exec five sed -n 's/^[0-9]*:memory:.*\(docker\).*/\1/p' /proc/1/cgroup
on rm --force five
exit 0
"#;

fn is_as_with_runc(driver: &str) -> Result<()> {
    let node = workers()?.into_iter().next().context("a node")?;
    let nodes = std::slice::from_ref(&node);
    let before = inventory_of_quiet(nodes)?;
    let at = format!("/var/lib/sock-docker-{driver}");
    for name in ["dockerd", "docker", "docker-proxy", "docker-init"] {
        node.put(
            &format!("../target/archives/docker/{name}"),
            &format!("{at}/programs/{name}"),
        )?;
    }
    let said = ["runc", "io.containerd.sock.v1"]
        .map(|runtime| node.shell(SCRIPT, &[&at, runtime, driver]));
    let left = "rm -rf \"$1\"; ip -brief link show docker0 2>/dev/null; ctr namespaces list 2>/dev/null | grep moby; \
        pgrep -a dockerd; find /sys/fs/cgroup -path '*sock-docker*'; true";
    let left = node.shell(left, &[&at])?;
    ensure!(left.is_empty(), "left on the node: {left}");
    let [runc, sock] = said;
    let (runc, sock) = (runc?, sock?);
    for part in [
        "exec: \"nothing\"",
        "Seccomp:\t2\n",
        "Seccomp:\t0\n",
        "CapBnd:\t0000000000002000\n",
        "/proc/acpi tmpfs\n",
        "one 2 used of 64MiB\n",
        "for want of memory: true\n",
        "healthy\n",
        "found\n",
    ] {
        ensure!(sock.contains(part), "{part:?} is not in\n{sock}");
    }
    // runc looks at a scope's counter of these when systemd may have removed the scope.
    let runc = runc.replace("for want of memory: false\n", "for want of memory: true\n");
    ensure!(runc == sock, "=== runc\n{runc}\n=== sock\n{sock}");
    until_as_before(nodes, &before)
}

#[test]
fn docker_runs_containers_as_with_runc() -> Result<()> {
    is_as_with_runc("cgroupfs")
}

#[test]
fn docker_runs_containers_in_scopes_of_systemd_as_with_runc() -> Result<()> {
    is_as_with_runc("systemd")
}
