//! What hostile code tries from each place where a tenant's code runs (`src/attack.py`), and what it is to get there.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::manifest;
use crate::{Client, MINUTE, Namespace, Node, until};

/// Python code that makes every attempt: `attack()` gives their outcomes.
pub const ATTACK: &str = include_str!("attack.py");

/// Where an attempt is made.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A handler in a leaf that was forked.
    Leaf,
    /// Code of a package in the zygote, which has three capabilities in a user namespace of its own.
    Zygote,
    /// A pod that the restricted standard admits.
    Restricted,
    /// A pod of the baseline standard: root with the capabilities that runc gives, and no seccomp profile.
    Root,
    /// As `Zygote`, in one that others extend.
    Extended,
    /// As `Zygote`, in one that was forked from another.
    Child,
}

/// The outcome of each attempt in the first four places, `|` between those that kernels differ in. `got` is what belongs to the
/// sandbox itself: a leaf is process 1 of its namespace, a zygote makes namespaces for leaves, root of a pod is root in it.
pub const EXPECTED: &[(&str, [&str; 4])] = &[
    ("chroot", ["EPERM", "got", "EPERM", "got"]),
    ("out of chroot", ["EPERM", "nothing", "EPERM", "nothing"]),
    ("pivot_root", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("mount tmpfs", ["EPERM", "got", "EPERM", "EPERM"]),
    ("mount proc", ["EPERM", "got", "EPERM", "EPERM"]),
    ("mount sysfs", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("mount cgroup", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("mount cgroup2", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("mount a device", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("remount /opt/sock", ["EPERM", "EPERM", "EPERM", "ENOENT"]),
    ("remount packages", ["EPERM", "EPERM", "EPERM", "ENOENT"]),
    ("lift packages", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("lift /proc/sys", ["EPERM", "EINVAL", "EPERM", "EPERM"]),
    ("unmask", ["EPERM", "EPERM", "EPERM", "EPERM|ENOENT"]),
    ("open_tree", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("fsopen", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("write packages", ["EROFS", "EROFS", "ENOENT", "ENOENT"]),
    (
        "write payload",
        ["EACCES|EROFS", "EACCES|EROFS", "ENOENT", "ENOENT"],
    ),
    ("unshare user", ["EPERM", "EPERM", "EPERM", "got"]),
    ("unshare mnt", ["EPERM", "got", "EPERM", "EPERM"]),
    ("unshare net", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("unshare pid", ["EPERM", "got", "EPERM", "EPERM"]),
    ("unshare cgroup", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("unshare ipc", ["EPERM", "got", "EPERM", "EPERM"]),
    ("unshare uts", ["EPERM", "got", "EPERM", "EPERM"]),
    ("unshare time", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("clone user", ["EPERM", "EPERM", "EPERM", "got"]),
    ("clone3 user", ["ENOSYS", "ENOSYS", "ENOSYS", "got"]),
    ("join mnt", ["EPERM", "EACCES", "EACCES", "EACCES"]),
    ("join user", ["EPERM", "EACCES", "EACCES", "EACCES"]),
    ("join net", ["EPERM", "EACCES", "EACCES", "EACCES"]),
    ("join cgroup", ["EPERM", "EACCES", "EACCES", "EACCES"]),
    // What a profile lets by is refused by the kernel: who is in a user namespace cannot enter it.
    ("join own user", ["EPERM", "EPERM", "EPERM", "EINVAL"]),
    ("join own mnt", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("join own net", ["EPERM", "got", "EPERM", "EPERM"]),
    ("join own pid", ["EPERM", "got", "EPERM", "EPERM"]),
    ("join own cgroup", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("join own ipc", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("join own uts", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("join own time", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    // In a leaf that is the leaf, elsewhere a holder, which nobody traces or looks into.
    ("ptrace 1", ["got", "EPERM", "EPERM", "EPERM"]),
    ("memory of 1", ["got", "EPERM", "EPERM", "EPERM"]),
    ("open memory of 1", ["got", "EACCES", "EACCES", "EACCES"]),
    ("environment of 1", ["got", "EACCES", "EACCES", "EACCES"]),
    ("program of 1", ["got", "EACCES", "EACCES", "EACCES"]),
    (
        "write program of 1",
        ["EACCES|ETXTBSY", "EACCES", "EACCES", "EACCES"],
    ),
    ("root of 1", ["nothing", "EACCES", "EACCES", "EACCES"]),
    ("descriptor of 1", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    // Before a zygote come two holders: that of its namespaces, and its container's first process, whose end is its own.
    (
        "other processes",
        ["nothing", "got [2]", "nothing", "nothing"],
    ),
    ("reach others", ["nothing", "nothing", "nothing", "nothing"]),
    (
        "signal others",
        ["nothing", "got [2]", "nothing", "nothing"],
    ),
    ("descriptors", ["nothing", "nothing", "nothing", "nothing"]),
    ("raw socket", ["EPERM", "EPERM", "EPERM", "got"]),
    ("ping socket", ["EPROTONOSUPPORT", "EACCES", "got", "got"]),
    ("packet socket", ["EPERM", "EPERM", "EPERM", "got"]),
    ("netfilter", ["EPERM", "EPERM", "got", "got"]),
    ("audit", ["EPERM", "EPERM", "got", "got"]),
    ("vsock", ["EPERM", "EPERM", "EPERM", "got|EAFNOSUPPORT"]),
    ("link down", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    (
        "x32 socket",
        ["EPERM|ENOSYS", "EPERM|ENOSYS", "EPERM|ENOSYS", "ENOSYS"],
    ),
    (
        "abstract socket",
        ["ECONNREFUSED", "got", "ECONNREFUSED", "ECONNREFUSED"],
    ),
    ("containerd", ["ENOENT", "ENOENT", "ENOENT", "ENOENT"]),
    ("broker", ["ENOENT", "ENOENT", "ENOENT", "ENOENT"]),
    ("forged credentials", ["EINVAL", "EINVAL", "EPERM", "EPERM"]),
    ("setuid file", ["nothing", "nothing", "nothing", "got"]),
    ("own setuid file", ["EINVAL", "EINVAL", "EPERM", "got"]),
    ("setresuid", ["EINVAL", "EINVAL", "EPERM", "got"]),
    ("setgroups", ["EPERM", "EPERM", "EPERM", "got"]),
    ("capset", ["EPERM", "got", "EPERM", "EPERM"]),
    ("file capability", ["EPERM", "EPERM", "EPERM", "got"]),
    ("mknod", ["EPERM", "EPERM", "EPERM", "EPERM|got"]),
    ("cgroup files", ["nothing", "nothing", "nothing", "nothing"]),
    (
        "mounted cgroup files",
        ["EPERM", "EPERM|nothing", "EPERM", "EPERM"],
    ),
    (
        "sysctl",
        ["EACCES|EROFS", "EACCES", "EACCES|EROFS", "EROFS"],
    ),
    (
        "sysrq",
        [
            "EACCES|EROFS|ENOENT",
            "EACCES|ENOENT",
            "EACCES|EROFS|ENOENT",
            "EROFS|ENOENT",
        ],
    ),
    (
        "kcore",
        [
            "nothing|ENOENT",
            "EACCES|ENOENT",
            "nothing|ENOENT",
            "nothing|ENOENT",
        ],
    ),
    ("keys", ["nothing", "nothing", "nothing", "nothing"]),
    (
        "timers",
        [
            "nothing|ENOENT",
            "EACCES|ENOENT",
            "nothing|ENOENT",
            "nothing|ENOENT",
        ],
    ),
    ("kernel log", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("oom score", ["EACCES", "EACCES", "EACCES", "EACCES"]),
    ("/dev/mem", ["ENOENT", "ENOENT", "ENOENT", "ENOENT"]),
    ("/dev/kmsg", ["ENOENT", "ENOENT", "ENOENT", "ENOENT"]),
    ("/dev/fuse", ["ENOENT", "ENOENT", "ENOENT", "ENOENT"]),
    // What any user of the node may list; a new /proc needs one that nothing covers.
    ("firmware", ["nothing", "got", "nothing", "nothing"]),
    ("debugfs", ["nothing", "nothing", "nothing", "nothing"]),
    ("bpf", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("perf", ["EPERM", "EPERM", "EPERM", "EACCES|EPERM|got"]),
    ("userfaultfd", ["EPERM", "EPERM", "EPERM", "EPERM|got"]),
    ("add_key", ["EPERM", "EPERM", "EPERM", "got"]),
    ("keyctl", ["EPERM", "EPERM", "EPERM", "got"]),
    ("io_uring", ["EPERM", "EPERM", "EPERM", "got"]),
    ("module", ["EPERM", "EPERM", "EPERM", "EPERM|ENOSYS"]),
    ("kexec", ["EPERM", "EPERM", "EPERM", "EPERM|ENOSYS"]),
    (
        "open_by_handle",
        ["EPERM", "EPERM", "EPERM", "EPERM|EINVAL"],
    ),
    ("fanotify", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("reboot", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("clock", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ("host name", ["EPERM", "got", "EPERM", "EPERM"]),
    ("priority", ["EACCES", "EACCES", "EACCES", "EACCES"]),
    ("real time", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    // A zygote that takes the one listener of a chain for itself forks nothing that confines itself: no leaf then.
    ("another listener", ["EBUSY", "got", "got", "got"]),
];

/// Where a zygote that others extend, and then one that was forked from it, get something else than a zygote that is alone.
/// Children enter the namespaces of their container by `setns`, which the profile of the one that they are forked from
/// allows, and which they keep.
const IN_A_TREE: &[(&str, [&str; 2])] = &[
    ("join own user", ["EINVAL", "EINVAL"]),
    ("join own mnt", ["got", "got"]),
    ("join own ipc", ["got", "got"]),
    ("join own uts", ["got", "got"]),
    // The name is the parent's, in the parent's network.
    ("abstract socket", ["got", "ECONNREFUSED"]),
];

/// Where a zygote gets something else with cgroup version 2. A container has a cgroup namespace there, and a zygote's belongs to
/// its users: it can mount what it is in, and all of the files are root's.
const WITH_VERSION_2: &[(&str, &str)] = &[
    ("mount cgroup2", "got"),
    ("mounted cgroup files", "nothing"),
];

/// Whether an outcome is one of those that are expected.
pub fn matches(outcome: &str, expected: &str) -> bool {
    expected.split('|').any(|one| match one {
        "got" => outcome == "got" || outcome.starts_with("got "),
        errno => outcome == errno,
    })
}

/// What `EXPECTED` and `IN_A_TREE` say of an attempt.
fn expected(place: Place, unified: bool, name: &str, columns: &[&'static str; 4]) -> &'static str {
    let of_zygotes = WITH_VERSION_2
        .iter()
        .find(|(one, _)| unified && *one == name);
    if let (Place::Zygote | Place::Extended | Place::Child, Some((_, outcome))) =
        (place, of_zygotes)
    {
        return outcome;
    }
    let in_a_tree = IN_A_TREE.iter().find(|(one, _)| *one == name);
    match (place, in_a_tree) {
        (Place::Extended, Some((_, [extended, _]))) => extended,
        (Place::Child, Some((_, [_, child]))) => child,
        (Place::Extended | Place::Child, None) => columns[Place::Zygote as usize],
        _ => columns[place as usize],
    }
}

/// Compares the outcomes of a place on a node with what is expected there.
///
/// # Errors
/// One is another.
pub fn check(place: Place, node: &Node, found: &Value) -> Result<()> {
    let unified = node.shell("stat -f -c %T /sys/fs/cgroup", &[])? == "cgroup2fs\n";
    let found = found.as_object().context("an object of attempts")?;
    let tried: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    let known: BTreeSet<&str> = EXPECTED.iter().map(|(name, _)| *name).collect();
    ensure!(
        tried == known,
        "{place:?}: not tried or not expected: {:?}",
        tried.symmetric_difference(&known)
    );
    let wrong: Vec<String> = EXPECTED
        .iter()
        .filter_map(|(name, expected)| {
            let outcome = found[*name].as_str().unwrap_or_default();
            let expected = self::expected(place, unified, name, expected);
            (!matches(outcome, expected)).then(|| format!("{name}: {outcome}, not {expected}"))
        })
        .collect();
    ensure!(wrong.is_empty(), "{place:?}: {}", wrong.join("; "));
    Ok(())
}

/// Python code that is small enough for a warm-up and runs the attack.
fn packed(source: &str) -> Result<String> {
    let pack = "import base64,sys,zlib;print(base64.b64encode(zlib.compress(sys.stdin.buffer.read(),9)).decode())";
    let mut python = Command::new("python3");
    python.args(["-I", "-c", pack]);
    python
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    let mut child = python.spawn().context("python3")?;
    std::io::Write::write_all(
        &mut child.stdin.take().context("standard input")?,
        source.as_bytes(),
    )?;
    let text = String::from_utf8(child.wait_with_output()?.stdout)?;
    Ok(format!(
        "import base64, zlib\nexec(zlib.decompress(base64.b64decode('{}')))\n",
        text.trim()
    ))
}

/// A Function's answer from a leaf that was forked.
///
/// # Errors
/// None answers in time.
pub fn forked(client: &mut Client, address: &str, path: &str) -> Result<Value> {
    until("a forked leaf answers", 2 * MINUTE, || {
        let answer = client.get(address, 8080, path)?.json()?;
        // A forked leaf is process 1 of a namespace of its own, a plain interpreter is not.
        Ok((answer["pid"] == 1).then_some(answer))
    })
}

/// The address of a pod.
///
/// # Errors
/// It has none yet.
pub fn address(pod: &Value) -> Result<&str> {
    pod["status"]["podIP"].as_str().context("status.podIP")
}

/// An abstract name of a zygote, so that whoever reaches it is in its network.
pub const LISTEN: &str = "
    sys.hostile = socket.socket(socket.AF_UNIX)
    sys.hostile.bind('\\0sock-hostile')
    sys.hostile.listen()
";

/// A PackageSet whose warm-up attacks, once in each zygote, after what `before` does.
///
/// # Errors
/// python3 is missing.
pub fn hostile_set(name: &str, node: &Node, import: &str, before: &str) -> Result<Value> {
    // A warm-up is run many times, and a child has what its parent has set.
    let warm_up = format!(
        "{}
import json
import sys

if getattr(sys, 'attacked', None) != '{name}':
    sys.attacked = '{name}'{before}
    print('ATTACK', json.dumps(attack()), file=sys.stderr, flush=True)
",
        packed(ATTACK)?
    );
    let mut set = manifest::only_on(&node.name, manifest::package_set(name, &[import]));
    set["spec"]["warmUp"] = json!(warm_up);
    Ok(set)
}

/// A Function whose handler attacks, on the PackageSet of the same name.
pub fn hostile_function(name: &str) -> Value {
    let code = format!(
        "{ATTACK}\n\ndef handler(event, context):\n    return {{'pid': os.getpid(), 'found': attack()}}\n"
    );
    manifest::with(
        manifest::function(name, name, &code),
        &json!({"timeoutSeconds": 120}),
    )
}

/// What a pool's warm-up has found.
///
/// # Errors
/// It has said nothing.
pub fn found_by_warm_up(namespace: &Namespace, pool: &Value) -> Result<Value> {
    let name = pool["metadata"]["name"].as_str();
    let log = namespace.kubectl(&["logs", name.context("metadata.name")?, "--container=zygote"])?;
    let line = log
        .lines()
        .find_map(|line| line.strip_prefix("ATTACK "))
        .with_context(|| format!("what the warm-up found: {log}"))?;
    Ok(serde_json::from_str(line)?)
}

/// What a forked leaf of a Function finds.
///
/// # Errors
/// None answers.
pub fn found_by_handler(
    namespace: &Namespace,
    client: &mut Client,
    function: &str,
) -> Result<Value> {
    let pod = namespace.pod_of(function)?;
    Ok(forked(client, address(&pod)?, "/")?["found"].take())
}

/// A pod that attacks and prints what it found. Process 1 of its namespace is the sandbox's.
pub fn attacker(name: &str, sock: bool, pod_security: &Value, security: &Value) -> Value {
    let mut pod = manifest::busybox(name, &[("attack", "")]);
    let container = &mut pod["spec"]["containers"][0];
    container["image"] = json!(manifest::PYTHON);
    container["command"] = json!([
        "python3",
        "-c",
        format!("{ATTACK}\nimport json\nprint(json.dumps(attack()))\n")
    ]);
    container["securityContext"] = security.clone();
    let spec = &mut pod["spec"];
    spec["securityContext"] = pod_security.clone();
    spec["shareProcessNamespace"] = json!(true);
    if let (false, Some(spec)) = (sock, spec.as_object_mut()) {
        spec.remove("runtimeClassName");
    }
    pod
}

/// What a pod that attacks has found.
///
/// # Errors
/// It does not end.
pub fn findings(namespace: &Namespace, pod: &str) -> Result<Value> {
    until(&format!("pod {pod} has attacked"), 3 * MINUTE, || {
        let phase = namespace.get(&["pod", pod])?["status"]["phase"].clone();
        Ok((phase == "Succeeded" || phase == "Failed").then_some(()))
    })?;
    let log = namespace.kubectl(&["logs", pod])?;
    serde_json::from_str(&log).with_context(|| log.clone())
}

/// Attacks from a handler in a leaf that was forked on the node, and from its zygote.
///
/// # Errors
/// An attempt gets something else than is expected.
pub fn handler_and_import_time_code(namespace: &Namespace, node: &Node) -> Result<()> {
    let set = hostile_set("hostile", node, "socket", LISTEN)?;
    namespace.apply(&[set, hostile_function("hostile")])?;
    namespace.wait_for("function/hostile", "Ready", 5 * MINUTE)?;
    let pool = namespace.pools_of("hostile")?.pop().context("a pool")?;
    check(Place::Zygote, node, &found_by_warm_up(namespace, &pool)?)?;

    let mut client = Client::on(&node.other()?)?;
    let found = found_by_handler(namespace, &mut client, "hostile")?;
    check(Place::Leaf, node, &found)
}

/// Attacks from a pod that the restricted standard admits.
///
/// # Errors
/// An attempt gets something else than is expected.
pub fn restricted_pod(namespace: &Namespace, node: &Node) -> Result<()> {
    let restricted = manifest::busybox("restricted", &[("attack", "")]);
    let spec = &restricted["spec"];
    let container = &spec["containers"][0]["securityContext"];
    let pod = attacker("restricted", true, &spec["securityContext"], container);
    namespace.apply(&[manifest::pod_on(&node.name, pod)])?;
    check(Place::Restricted, node, &findings(namespace, "restricted")?)
}

/// Attacks from a pod of the baseline standard, as root.
///
/// # Errors
/// An attempt gets something else than is expected.
pub fn root_pod(namespace: &Namespace, node: &Node) -> Result<()> {
    let pod = attacker("root", true, &json!({}), &json!({}));
    namespace.apply(&[manifest::pod_on(&node.name, pod)])?;
    check(Place::Root, node, &findings(namespace, "root")?)
}
