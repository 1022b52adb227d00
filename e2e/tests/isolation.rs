//! What a leaf and a zygote may not do, and what they cannot see.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, in_namespace, is_of_pod, manifest, until, workers,
};

/// Says how the kernel sees the leaf, and what it can do.
const REPORT: &str = r#"
import ctypes
import errno
import os
import socket
import urllib.request

libc = ctypes.CDLL(None, use_errno=True)


def attempt(call, *arguments):
    ctypes.set_errno(0)
    return "allowed" if call(*arguments) >= 0 else errno.errorcode[ctypes.get_errno()]


def status():
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, value in (line.split(":", 1) for line in file)}


def writable(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        return errno.errorcode[error.errno]
    os.unlink(path)
    return "allowed"


def handler(event, context):
    url = event["query"].get("url")
    if url:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    with open("/etc/hosts") as hosts, open("/proc/self/mountinfo") as mounts:
        hosts, mounts = hosts.read(), mounts.read()
    return {
        "status": status(),
        "pid": os.getpid(),
        "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "hostname": socket.gethostname(),
        "hosts": hosts,
        "mounts": mounts,
        "code": sorted(name for name in os.listdir("/srv/function") if not name.startswith(".")),
        "mounted": sorted(os.listdir("/etc/pod")) if os.path.isdir("/etc/pod") else None,
        "environment": dict(os.environ),
        "descriptors": {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                        if os.path.islink(f"/proc/self/fd/{name}")},
        "unshare user": attempt(libc.unshare, 0x10000000),
        "unshare mount": attempt(libc.unshare, 0x00020000),
        "mount": attempt(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
        "chroot": attempt(libc.chroot, b"/tmp"),
        "sethostname": attempt(libc.sethostname, b"other", 5),
        "keyctl": attempt(libc.syscall, 250, 0, -3, 0, 0, 0),
        "bpf": attempt(libc.syscall, 321, 0, 0, 0),
        "write cache": writable("/opt/sock/site-packages/owned.py"),
        "write sock": writable("/opt/sock/owned"),
        "write code": writable("/srv/function/owned.py"),
        "write proc": writable("/proc/sys/kernel/owned"),
        "write tmp": writable("/tmp/mine"),
    }
"#;

/// Tries, from inside of other namespaces and with every capability over them, to make writable what is not.
/// It enters the user namespace (descriptor 3) itself: a program that is executed there afterwards has none.
const ATTACK: &str = r#"
import ctypes
import json
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
user = int(sys.argv[1])
if libc.setns(3, 0x10000000) != 0:
    raise OSError(ctypes.get_errno(), "setns")
os.setresgid(user, user, user)
os.setresuid(user, user, user)
MS_REMOUNT_BIND, MOUNT_ATTR_RDONLY, AT_FDCWD, MOUNT_SETATTR = 32 | 4096, 1, -100, 442


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def read_only():
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return [line[4].encode().decode("unicode_escape") for line in lines if "ro" in line[5].split(",")]


before = read_only()
lifted = []
for path in before:
    name = os.fsencode(path)
    attributes = MountAttributes(clear=MOUNT_ATTR_RDONLY)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, name, 0, ctypes.byref(attributes), ctypes.sizeof(attributes)) == 0:
        lifted.append(["mount_setattr", path])
    if libc.mount(None, name, None, MS_REMOUNT_BIND, None) == 0:
        lifted.append(["remount", path])
    if libc.umount2(name, 2) == 0:
        lifted.append(["umount", path])
written = []
for path in [*before, "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches"]:
    target = os.path.join(path, "owned") if os.path.isdir(path) else path
    try:
        os.close(os.open(target, os.O_WRONLY | (os.O_CREAT if os.path.isdir(path) else 0)))
        written.append(path)
    except OSError:
        pass
# What it may do shows that the refusals above are about the mounts, not about the means.
own = libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0
print(json.dumps({"read_only": before, "lifted": lifted, "written": written, "own": own}))
"#;

struct Served {
    node: Node,
    pod: Value,
    pool: Value,
    address: String,
    client: Client,
}

fn serve(namespace: &Namespace, code: &str, fields: &Value) -> Result<Served> {
    let mut nodes = workers()?.into_iter();
    let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
    let requirement = include_str!("../images/requirements-small.txt")
        .lines()
        .find(|line| !line.starts_with('#'))
        .context("a requirement")?;
    let set = manifest::package_set_of("small", &[requirement], &["idna"]);
    let function = manifest::with(manifest::function("report", "small", code), fields);
    namespace.serve("report", &[manifest::only_on(&node.name, set), function])?;
    let pod = namespace.pod_of("report")?;
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    let pools = namespace.pods("sock.dev/pool=small")?;
    Ok(Served {
        address: address.to_owned(),
        pod,
        pool: pools.into_iter().next().context("a pool")?,
        node,
        client: Client::on(&other)?,
    })
}

#[test]
fn a_leaf_has_no_capability_and_only_its_pods_files_cgroup_and_processes() {
    in_namespace("leaf", |namespace| {
        let fields = json!({"env": [{"name": "OWN", "value": "mine"}]});
        let mut served = serve(namespace, REPORT, &fields)?;
        let report = served.client.get(&served.address, 8080, "/")?.json()?;
        let is = |what: &str, wanted: &str| {
            let found = &report[what];
            (found == wanted)
                .then_some(())
                .with_context(|| format!("{what}: {found}, not {wanted}"))
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(
                report["status"][set] == "0000000000000000",
                "{set}: {}",
                report["status"]
            );
        }
        ensure!(report["status"]["NoNewPrivs"] == "1" && report["status"]["Seccomp"] == "2");

        // Its own PID namespace: nobody else is in its /proc.
        ensure!(
            report["pids"] == json!([report["pid"]]),
            "{}",
            report["pids"]
        );

        let name = served.pod["metadata"]["name"]
            .as_str()
            .context("metadata.name")?;
        is("hostname", name)?;
        ensure!(
            report["environment"]["OWN"] == "mine" && report["environment"]["HOSTNAME"] == name
        );
        ensure!(report["code"] == json!(["app.py"]), "{}", report["code"]);
        let hosts = report["hosts"].as_str().context("hosts")?;
        ensure!(
            hosts.contains(&served.address) && hosts.contains(name),
            "{hosts}"
        );
        let pool = served.pool["metadata"]["name"]
            .as_str()
            .context("metadata.name")?;
        let seen = report.to_string();
        ensure!(
            !seen.contains(pool),
            "something of the zygote's pod {pool} is seen: {seen}"
        );
        let uid = served.pool["metadata"]["uid"]
            .as_str()
            .context("metadata.uid")?;
        ensure!(
            !seen.contains(uid),
            "something of the zygote's pod {uid} is seen: {seen}"
        );

        // By the pod's seccomp profile, or for want of the capability.
        for what in [
            "unshare user",
            "unshare mount",
            "mount",
            "chroot",
            "sethostname",
            "keyctl",
            "bpf",
        ] {
            is(what, "EPERM")?;
        }
        for what in ["write cache", "write sock", "write code"] {
            is(what, "EROFS")?;
        }
        ensure!(
            report["write proc"] != "allowed",
            "{}",
            report["write proc"]
        );
        is("write tmp", "allowed")?;

        // The node agrees.
        let leaves = served.node.interpreters_of(&served.pod)?;
        let zygote = served.node.zygote_of(&served.pool)?;
        let [leaf] = &leaves[..] else {
            bail!("one leaf was expected: {leaves:#?}");
        };
        ensure!(leaf.capabilities()? == 0, "{leaf:#?}");
        // Where version 1 has the controllers, the leaf stays in the zygote's cgroup of the version 2 hierarchy:
        // that one accounts nothing, and a move there takes a lock that the whole machine shares. So `0::` counts
        // only where it is the only line.
        let own = served.pod["metadata"]["uid"]
            .as_str()
            .context("metadata.uid")?;
        let paths = zygote.cgroups.iter();
        let taken: Vec<_> = paths.filter(|(_, path)| is_of_pod(path, uid)).collect();
        ensure!(!taken.is_empty(), "{zygote:#?}");
        for (controllers, path) in taken {
            let path_of_leaf = leaf.cgroups.get(controllers).context("the hierarchy")?;
            ensure!(
                is_of_pod(path_of_leaf, own),
                "{controllers}: the leaf is in {path_of_leaf}, the zygote in {path}"
            );
        }
        ensure!(
            leaf.cgroups.values().all(|path| !is_of_pod(path, uid)),
            "in one hierarchy the leaf is in the cgroup of the zygote's pod: {leaf:#?}"
        );
        ensure!(
            leaf.pid_namespace != zygote.pid_namespace
                && leaf.mount_namespace != zygote.mount_namespace
        );
        ensure!(leaf.network_namespace != zygote.network_namespace);
        let filters: u32 = leaf.status("Seccomp_filters")?.parse()?;
        let below: u32 = zygote.status("Seccomp_filters")?.parse()?;
        ensure!(
            filters >= below + 2,
            "the pod's profile and the socket filter: {filters}, the zygote has {below}"
        );
        Ok(())
    });
}

#[test]
fn a_leaf_reaches_a_service_from_its_pods_address() {
    in_namespace("outbound", |namespace| {
        namespace.apply(&manifest::echo("echo"))?;
        let mut served = serve(namespace, REPORT, &json!({}))?;
        namespace.wait_for("pod/echo", "Ready", sock_e2e::MINUTE)?;
        let address = served.address.clone();
        let service = namespace.routed("echo", &served.node)?;
        for host in ["echo", &service] {
            let answer = served
                .client
                .get(&address, 8080, &format!("/?url=http://{host}/"))?;
            ensure!(
                answer.text()? == address,
                "{host} sees {answer:?}, not {address}"
            );
        }
        Ok(())
    });
}

#[test]
fn a_zygote_has_no_capability_on_the_host() {
    in_namespace("zygote", |namespace| {
        let served = serve(namespace, REPORT, &json!({}))?;
        let zygote = served.node.zygote_of(&served.pool)?;
        let init = served.node.processes(&[1])?;
        let init = init.first().context("process 1 of the node")?;
        ensure!(zygote.user_namespace != init.user_namespace, "{zygote:#?}");
        for user in zygote.status("Uid")?.split_whitespace() {
            let user: u32 = user.parse()?;
            ensure!(user >= 1_000_000_000, "the zygote runs as user {user}");
        }
        let pid = zygote.pid.to_string();
        for map in ["uid_map", "gid_map"] {
            let map = served.node.shell(r#"cat "/proc/$1/$2""#, &[&pid, map])?;
            let fields: Vec<&str> = map.split_whitespace().collect();
            ensure!(
                fields.len() == 3 && fields[2] == "1" && fields[1] != "0",
                "one user is mapped, and not root: {map}"
            );
        }
        ensure!(
            zygote.status("NoNewPrivs")? == "1" && zygote.status("Seccomp")? == "2",
            "{zygote:#?}"
        );
        // CAP_SYS_CHROOT, CAP_SYS_ADMIN: valid in its own user namespace alone.
        let allowed = (1 << 18) | (1 << 21);
        ensure!(zygote.capabilities()? & !allowed == 0, "{zygote:#?}");
        Ok(())
    });
}

#[test]
fn no_read_only_mount_is_lifted_from_inside_the_namespaces_of_zygote_and_leaf() {
    in_namespace("mounts", |namespace| {
        let mut served = serve(namespace, REPORT, &json!({}))?;
        served.client.get(&served.address, 8080, "/")?.text()?;
        let zygote = served.node.zygote_of(&served.pool)?;
        let leaves = served.node.interpreters_of(&served.pod)?;
        let leaf = leaves.first().context("a leaf")?;
        for (who, process) in [("zygote", &zygote), ("leaf", leaf)] {
            let user = process
                .status("Uid")?
                .split_whitespace()
                .next()
                .context("a user")?
                .to_owned();
            let pid = process.pid.to_string();
            // Whoever enters a user namespace from above has all capabilities over it: more than the zygote itself.
            let said = served.node.shell(
                r#"exec nsenter --target "$1" --mount --pid --root python3 -I -c "$3" "$2" 3<"/proc/$1/ns/user""#,
                &[&pid, &user, ATTACK],
            )?;
            let found: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
            ensure!(
                found["own"] == true,
                "{who}: the attack could not even mount a tmpfs: {found}"
            );
            let mounts = found["read_only"].as_array().context("mounts")?;
            ensure!(
                mounts.iter().any(|path| path == "/opt/sock/site-packages"),
                "{who}: the node cache is among the read-only mounts: {found}"
            );
            ensure!(found["written"] == json!([]), "{who}: {found}");
            // Masks over files of the kernel, which a leaf puts there itself: below are the files of a user that is
            // not mapped, and `written` tried them.
            let lifted = found["lifted"].as_array().context("a list")?;
            let of_the_root = lifted.iter().filter(|lifted| {
                let path = lifted[1].as_str().unwrap_or_default();
                !path.starts_with("/proc/") && path != "/sys/firmware"
            });
            ensure!(of_the_root.count() == 0, "{who}: {found}");
        }
        Ok(())
    });
}

#[test]
fn a_secret_of_a_function_is_nowhere_in_the_zygotes_memory() {
    in_namespace("secret", |namespace| {
        // A text that only the API server and the leaf know; the scanner reads it from its standard input.
        let secret = format!("{}-confidential", namespace.name.repeat(2));
        namespace.apply(&[json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secret"},
            "stringData": {"TOKEN": secret},
        })])?;
        let code = "
import os

TOKEN = os.environ['TOKEN']

def handler(event, context):
    return str(len(TOKEN))
";
        let mut served = serve(
            namespace,
            code,
            &json!({"envFrom": [{"secretRef": {"name": "secret"}}]}),
        )?;
        let answer = served.client.get(&served.address, 8080, "/")?;
        ensure!(answer.text()? == secret.len().to_string(), "{answer:?}");

        let scanner = served
            .node
            .install(env!("CARGO_BIN_EXE_sock-e2e-memory").as_ref())?;
        let scan = |pid: u32| -> Result<(u64, u64)> {
            let pid = pid.to_string();
            let said =
                served
                    .node
                    .shell_with(r#"exec "$1" "$2""#, &[&scanner, &pid], Some(&secret))?;
            let (found, read) = said.trim().split_once(' ').context("two numbers")?;
            Ok((found.parse()?, read.parse()?))
        };
        let leaves = served.node.interpreters_of(&served.pod)?;
        let leaf = leaves.first().context("a leaf")?;
        let (found, _) = scan(leaf.pid)?;
        ensure!(found > 0, "the scanner finds the secret where it is");
        // The zygote, and the spares that were forked from it.
        let mut others = served.node.interpreters_of(&served.pool)?;
        others.retain(|process| leaves.iter().all(|leaf| leaf.pid != process.pid));
        ensure!(!others.is_empty(), "no zygote was found");
        for process in others {
            let (found, read) = scan(process.pid)?;
            ensure!(
                read > 1 << 20,
                "only {read} bytes of {process:#?} were read"
            );
            ensure!(found == 0, "{found} times in {process:#?}");
        }
        Ok(())
    });
}

/// The shim of a pod has a score of its own, and a zygote that of its own pod.
#[test]
fn every_process_of_a_pod_is_killed_for_want_of_memory_as_the_pod_says() {
    in_namespace("oom-score", |namespace| {
        let request = |memory: &str| json!({"requests": {"memory": memory}});
        let mut set = manifest::package_set("plain", &["json"]);
        set["spec"]["resources"] = request("64Mi");
        let fields = json!({"resources": request("512Mi"), "idle": {"endAfterMs": 1000}});
        // The shim sets it while the leaf imports its handler.
        let code = "
import time

def handler(event, context):
    time.sleep(0.5)
    return open('/proc/self/oom_score_adj').read()
";
        let function = manifest::with(manifest::function("score", "plain", code), &fields);
        namespace.serve("score", &[set, function])?;
        let pod = namespace.pod_of("score")?;
        let node = Node::of(&pod)?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
        let mut client = Client::on(&node.other()?)?;
        let in_pod = |path: &str| -> Result<i32> {
            let score = namespace.kubectl(&["exec", name, "--", "cat", path])?;
            Ok(score.trim().parse()?)
        };
        // https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#node-out-of-memory-behavior
        let own = in_pod("/proc/1/oom_score_adj")?;
        ensure!(
            (2..1000).contains(&own),
            "a container with a request: {own}"
        );
        ensure!(in_pod("/proc/self/oom_score_adj")? == own, "kubectl exec");
        let warm = client.get(address, 8080, "/")?;
        ensure!(
            warm.text()?.trim() == own.to_string(),
            "a leaf: {warm:?} in place of {own}"
        );

        let pools = namespace.pods("sock.dev/pool=plain")?;
        let pool = pools
            .iter()
            .find(|pool| pool["spec"]["nodeName"] == node.name.as_str());
        let zygote = node.zygote_of(pool.context("a pool on the node")?)?;
        let score = node.shell(
            r#"cat "/proc/$1/oom_score_adj""#,
            &[&zygote.pid.to_string()],
        )?;
        let score: i32 = score.trim().parse()?;
        ensure!(
            own < score && score < 1000,
            "a zygote that requests less than the Function: {score}, {own}"
        );

        // Without a zygote an interpreter is started, in the same pod.
        namespace.kubectl(&["delete", "packageset", "plain", "--wait"])?;
        until("the zygotes are gone", MINUTE, || {
            let pools = namespace.pods("sock.dev/pool=plain")?;
            Ok(pools.is_empty().then_some(()))
        })?;
        until("the leaf of the zygote has ended", MINUTE, || {
            Ok(node.interpreters_of(&pod)?.is_empty().then_some(()))
        })?;
        let cold = client.get(address, 8080, "/")?;
        ensure!(
            cold.text()?.trim() == own.to_string(),
            "an interpreter: {cold:?}"
        );
        Ok(())
    });
}
