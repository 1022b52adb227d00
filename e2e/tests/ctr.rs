//! containerd without Kubernetes: what `ctr` starts with `io.containerd.sock.v1` is as with runc, and a node that has made and
//! ended many containers is as before. It looks at a whole node, so nothing else may run beside it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use sock_e2e::{Node, inventory_of_quiet, until_as_before, workers};

const SOCK: &str = "io.containerd.sock.v1";
const RUNC: &str = "io.containerd.runc.v2";

/// `$1`: the runtime. Each line that a container writes, and how `ctr` ended.
const CASES: &str = r#"
set -u
runtime=$1
image=docker.io/library/busybox:1.36
on() { timeout 30 ctr -n k8s.io "$@" </dev/null 2>/dev/null; }
run() {
  echo "== $*"
  options=$1; shift
  on run --rm --runtime "$runtime" $options "$image" sock-ctr-case "$@"
  echo "ended with $?"
}
run '' echo hello
run '' sh -c 'exit 7'
run '' sh -c 'kill -9 $$'
run '--env NAME=value --cwd /tmp' sh -c 'echo $NAME; pwd'
run '--user 1000:1000' sh -c 'id; grep Cap /proc/self/status'
run '--read-only' sh -c 'touch /file 2>&1'
run '--read-only --mount type=tmpfs,dst=/scratch,options=size=64k' sh -c 'head -c 100000 /dev/zero >/scratch/file; ls -l /scratch | tail -1 | tr -s " " | cut -d" " -f5'
run '--mount type=bind,src=/etc/os-release,dst=/file,options=rbind:ro' sh -c 'wc -l </file; echo x >>/file'
run '--net-host' sh -c 'readlink /proc/self/ns/net; cat /proc/sys/kernel/hostname'
run '--user 1000:1000' sh -c 'echo out >/dev/stdout; echo error >/dev/stderr; ls /proc/self/fd | wc -l'
run '' sh -c 'ls /dev; cut -d" " -f5 /proc/self/mountinfo | sort'
run '--privileged' sh -c 'grep Cap /proc/self/status; mount | grep -c ro,'
run '--cap-add CAP_SYS_TIME --cap-drop CAP_CHOWN' sh -c 'grep Cap /proc/self/status'
run '--allow-new-privs' grep NoNewPrivs /proc/self/status
run '--seccomp' sh -c 'grep Seccomp: /proc/self/status; unshare -U true 2>&1'
run '--memory-limit 33554432' sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null'
run '--rlimit-nofile 100' sh -c 'ulimit -n'
run '--pid-file /run/sock-ctr-pid' true
run '' /no/such/program

id=sock-ctr-long
on run --detach --runtime "$runtime" "$image" "$id" sleep 600; echo "detached $?"
on task ls | awk -v id=$id '$1 == id { print $3 }'
on task exec --exec-id one $id sh -c 'echo in; exit 3'; echo "exec $?"
on task pause $id; on task ls | awk -v id=$id '$1 == id { print $3 }'
on task resume $id; on task ls | awk -v id=$id '$1 == id { print $3 }'
on task metrics $id | grep -c .
on task ps $id | wc -l
on task kill --signal TERM $id; echo "kill $?"
on task kill --signal KILL $id; echo "kill $?"
for try in $(seq 50); do on task ls | grep -q "$id.*STOPPED" && break; sleep 0.1; done
on task delete $id; echo "delete $?"
on container delete $id; echo "delete $?"
rm -f /run/sock-ctr-pid
"#;

/// `$1`: the runtime. What hooks see at their points, and how a container ends where one fails.
const HOOKS: &str = r#"
set -eu
# containerd remembers for a while what was mounted where.
at=/run/sock-ctr-hooks-$$
mkdir -p $at/root
ctr -n k8s.io images mount docker.io/library/busybox:1.36 $at/root >/dev/null 2>&1
trap 'ctr -n k8s.io images unmount --rm $at/root >/dev/null 2>&1; rm -rf $at' EXIT
spec() { # KIND SCRIPT
  ctr oci spec 2>/dev/null | jq --arg at $at --arg kind "$1" --arg script "$2" '
    def hook($name; $script): [{path: "/bin/sh", args: ["sh", "-c", $script, $name], env: ["PATH=/usr/bin:/bin"]}];
    def note($name): "jq -c \"[.status, (.pid > 1), .id]\" >\($at)/state; test -e \($at)/root/proc/self && mounted=mounted; "
      + "echo \($name) $(cat \($at)/state) ${mounted-} $(readlink /proc/self/ns/net | grep -cF $(readlink /proc/1/ns/net)) >>\($at)/seen";
    .process.args = ["/bin/echo", "program"] | .process.env = ["PATH=/bin"] | .root = {path: "\($at)/root", readonly: true}
    | .hooks = {
        prestart: hook("prestart"; note("prestart")), createRuntime: hook("createRuntime"; note("createRuntime")),
        createContainer: hook("createContainer"; "jq -c .status >>\($at)/seen; test -e \($at)/root/proc/self && echo mounted >>\($at)/seen"),
        startContainer: hook("startContainer"; "echo startContainer $(ls /root | wc -l)"),
        poststart: hook("poststart"; "echo poststart >>\($at)/seen"), poststop: hook("poststop"; "jq -c [.status,.id] >>\($at)/seen"),
      }
    | if $kind != "" then .hooks[$kind] = hook($kind; $script) else . end' >$at/config.json
}
run() {
  rm -f $at/seen
  timeout 30 ctr -n k8s.io run --rm --runtime "$1" --config $at/config.json sock-ctr-hooks </dev/null 2>$at/error && echo "ended with 0" || echo "failed"
  cat $at/seen
  left=$(ctr -n k8s.io containers ls -q 2>/dev/null)
  printf '%s\n' "$left" | sed -n 's/^sock-ctr-hooks$/a container is left/p'
}
spec "" ""; run "$1"
spec createRuntime 'echo no device >&2; exit 3'; run "$1"; grep -o "no device" $at/error | head -1
spec startContainer 'exit 3'; run "$1" | head -2
# The end of its shim is the end of a container, and of that it is told too.
spec "" ""
jq '.process.args = ["/bin/sleep", "600"]' $at/config.json >$at/sleeps && mv $at/sleeps $at/config.json
on() { timeout 30 ctr -n k8s.io "$@" </dev/null 2>$at/error; }
on run --detach --runtime "$1" --config $at/config.json sock-ctr-hooks
rm -f $at/seen
kill -9 "$(awk '$1 == "PPid:" { print $2 }' "/proc/$(on task ls | awk '$1 == "sock-ctr-hooks" { print $2 }')/status")"
for try in $(seq 100); do [ ! -s $at/seen ] || break; sleep 0.1; done
cat $at/seen
on containers delete sock-ctr-hooks
"#;

/// `$1`: the runtime. What is counted of a container that has computed, waited for its share of a processor, and read a file: the
/// name of each value that is not zero, and those that are limits with their values. The kernel alone decides about some: what
/// is not yet written back, which list a page is on, who is charged for a page of a shared program.
const STATISTICS: &str = r#"
set -u
id=sock-ctr-statistics
on() { timeout 30 ctr -n k8s.io "$@" </dev/null 2>/dev/null; }
clean() {
  on task kill --signal KILL $id
  for try in $(seq 50); do on task ls | grep -q "$id.*STOPPED" && break; sleep 0.1; done
  on task delete $id >/dev/null
  on container delete $id
}
trap clean EXIT
on run --detach --runtime "$1" --memory-limit 50000000 --cpu-quota 50000 --cpu-period 100000 docker.io/library/busybox:1.36 $id sh -c '
(while :; do :; done) & busy=$!
head -c 8000000 /dev/zero >/file
for try in $(seq 60); do cat /file /file /file >/dev/null; sleep 0.01; done
kill $busy
touch /tmp/ready; sleep 600'
for try in $(seq 300); do on task exec --exec-id ready$try $id test -e /tmp/ready && break; sleep 0.1; done
on task metrics --format json $id | jq -r '
  paths(scalars) as $path
  | ($path | map(if type == "number" then "each" else . end) | join(".")) as $name
  | select($name | test("blkio|dirty|writeback|mapped_file|maj_fault|active_|unevictable|huge|failcnt") | not)
  | if ($name | test("limit")) then "\($name) \(getpath($path))" else $name end' | sort -u
"#;

/// Create, start, kill and delete, `$1` times, `$2` at once. What a command says is told only of one that fails.
const CYCLES: &str = r#"
set -eu
cycle='
set -e
id=sock-cycle-$1
on() { timeout 60 ctr -n k8s.io "$@" </dev/null 2>&1; }
on run --detach --runtime io.containerd.sock.v1 docker.io/library/busybox:1.36 $id sleep 600
on task kill --signal KILL $id
for try in $(seq 100); do
  # It may not have ended yet.
  on task delete $id >/dev/null && break
  [ $try -lt 100 ]
done
on container delete $id'
export cycle
seq "$1" | xargs -P "$2" -I{} sh -c 'said=$(sh -c "$cycle" cycle {}) || echo "cycle {}: $said"' | head -20
left=$(ctr -n k8s.io containers ls -q 2>/dev/null)
printf '%s\n' "$left" | sed -n '/^sock-cycle-/p'
"#;

/// What a node's containerd holds: descriptors and KiB of its own.
fn containerd(node: &Node) -> Result<(u64, u64)> {
    let script = r#"
pid=$(pidof containerd)
ls /proc/$pid/fd | wc -l
awk '$1 == "Private_Dirty:" { print $2 }' /proc/$pid/smaps_rollup
"#;
    let text = node.shell(script, &[])?;
    let mut numbers = text.lines().map(str::parse);
    let mut next = || numbers.next().context("a number")?.context("a number");
    Ok((next()?, next()?))
}

fn cases(text: &str) -> BTreeMap<&str, &str> {
    text.split("== ")
        .map(|case| case.split_once('\n').unwrap_or((case, "")))
        .collect()
}

fn worker() -> Result<Node> {
    workers()?.into_iter().next().context("a node")
}

#[test]
fn what_ctr_starts_is_as_with_runc() -> Result<()> {
    let node = worker()?;
    let said = [RUNC, SOCK].map(|runtime| node.shell(CASES, &[runtime]));
    let [runc, sock] = said;
    let (runc, sock) = (runc?, sock?);
    ensure!(runc.contains("ended with 7"), "{runc}");
    let (runc, sock) = (cases(&runc), cases(&sock));
    for (case, expected) in &runc {
        let got = sock.get(case).copied().unwrap_or_default();
        ensure!(
            got == *expected,
            "{case}\n=== runc\n{expected}\n=== sock\n{got}"
        );
    }
    Ok(())
}

#[test]
fn what_is_counted_of_a_container_is_as_with_runc() -> Result<()> {
    let node = worker()?;
    let [runc, sock] = [RUNC, SOCK].map(|runtime| node.shell(STATISTICS, &[runtime]));
    let (runc, sock) = (runc?, sock?);
    for part in [
        "cpu.usage.user\n",
        "cpu.throttling.throttled_time\n",
        "memory.usage.limit 49999872\n",
    ] {
        ensure!(runc.contains(part), "{part} is not in {runc}");
    }
    ensure!(runc == sock, "=== runc\n{runc}\n=== sock\n{sock}");
    Ok(())
}

#[test]
fn hooks_run_where_and_when_runc_runs_them() -> Result<()> {
    let node = worker()?;
    let [runc, sock] = [RUNC, SOCK].map(|runtime| node.shell(HOOKS, &[runtime]));
    let (runc, sock) = (runc?, sock?);
    ensure!(
        runc.contains("no device") && runc.ends_with("[\"stopped\",\"sock-ctr-hooks\"]\n"),
        "{runc}"
    );
    ensure!(runc == sock, "=== runc\n{runc}\n=== sock\n{sock}");
    Ok(())
}

/// `$1`: an ID. How many servers there are after a start that fails, one that does not, and when its bundle is gone.
const ALONE: &str = r#"
at=/run/$1
mkdir -p "$at/address" && cd "$at" || exit 1
ctr oci spec >config.json
mkfifo log
export TTRPC_ADDRESS=/run/containerd/containerd.sock.ttrpc GRPC_ADDRESS=/run/containerd/containerd.sock NAMESPACE=default
start() {
  timeout 30 /opt/sock/bin/containerd-shim-sock-v1 -namespace default -id "$1" -address /run/containerd/containerd.sock \
    -publish-binary /usr/local/bin/containerd -bundle "$at" start </dev/null 2>&1 | grep -c "$2"
}
servers() { pgrep -fc -- "-id $1 .*-socket"; }
start "$1" 'write address'; servers "$1"
rmdir address
start "$1" unix:///; servers "$1"
cd / && rm -r "$at"
for try in $(seq 300); do [ "$(servers "$1")" -eq 0 ] && break; sleep 0.1; done
servers "$1"
exit 0
"#;

#[test]
fn of_a_start_that_containerd_gives_up_no_server_is_left() -> Result<()> {
    let node = worker()?;
    let nodes = std::slice::from_ref(&node);
    let before = inventory_of_quiet(nodes)?;
    let said = node.shell(ALONE, &["sock-ctr-alone"])?;
    ensure!(said == "1\n0\n1\n1\n0\n", "{said}");
    until_as_before(nodes, &before)
}

#[test]
fn many_containers_that_come_and_go_leave_a_node_as_it_was() -> Result<()> {
    let cycles = std::env::var("CYCLES").unwrap_or_else(|_| "200".to_owned());
    let node = worker()?;
    let nodes = std::slice::from_ref(&node);
    // The first ones make what stays: directories of containerd's, the kernel's pools.
    let failed = node.shell(CYCLES, &["8", "8"])?;
    ensure!(failed.is_empty(), "{failed}");
    let before = (inventory_of_quiet(nodes)?, containerd(&node)?);
    let begun = std::time::Instant::now();
    let failed = node.shell(CYCLES, &[&cycles, "8"])?;
    ensure!(failed.is_empty(), "{failed}");
    println!("{cycles} cycles in {:.0} s", begun.elapsed().as_secs_f64());
    until_as_before(nodes, &before.0)?;
    let after = containerd(&node)?;
    println!(
        "descriptors and KiB of containerd: {:?}, then {after:?}",
        before.1
    );
    // It keeps connections to clients that have just gone for a moment.
    ensure!(
        after.0 <= before.1.0 + 8,
        "containerd holds descriptors: {:?}, then {after:?}",
        before.1
    );
    Ok(())
}
