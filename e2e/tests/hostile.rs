//! Code that tries to leave its sandbox, from each place where a tenant's code runs.
//!
//! `src/attack.py` tries; what is expected of each attempt stands in `src/attempts.rs`. That an attempt fails for want of a right, and
//! not because it is wrong, is shown where nothing forbids it.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::attempts::{
    ATTACK, EXPECTED, LISTEN, Place, address, attacker, check, findings, forked, found_by_handler,
    found_by_warm_up, handler_and_import_time_code, hostile_function, hostile_set, matches,
    restricted_pod, root_pod,
};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, Security, apply, get, in_namespace, in_namespace_of, kubectl,
    kubectl_with, manifest, until, workers,
};

/// Attempts that get nothing even with all rights on the node, and how far they come there.
const OUT_OF_REACH: &[(&str, &str)] = &[
    // Nothing there is above the root directory of a pod, whose root is no chroot.
    ("out of chroot", "nothing"),
    // Past the check of rights: the directory is no mount point.
    ("pivot_root", "EBUSY|EINVAL"),
    // Named hierarchies are made in the first cgroup namespace only.
    ("mount cgroup", "EPERM|EBUSY|got"),
    // Past the check of rights: there is no such disk, or no such file system on it.
    ("mount a device", "ENOENT|EINVAL|EBUSY|EACCES|got"),
    // No mount of its own there in a privileged pod.
    ("lift /proc/sys", "EINVAL"),
    ("unmask", "EINVAL|ENOENT"),
    // The control mounts it read-only; it is lifted by the attempts that are about that.
    ("write packages", "EROFS|got"),
    ("write payload", "EROFS"),
    // A process may not join the user namespace that it is in.
    ("join user", "EINVAL"),
    ("join own user", "EINVAL"),
    // The root directory of a pause image.
    ("root of 1", "nothing"),
    // A program that runs.
    ("write program of 1", "ETXTBSY"),
    ("descriptors", "nothing"),
    ("x32 socket", "ENOSYS|got"),
    // What not every kernel, or node in a container, has.
    ("sysrq", "ENOENT|got|EACCES"),
    ("kcore", "ENOENT|EPERM|got"),
    ("keys", "nothing|got"),
    ("timers", "ENOENT|got"),
    ("kernel log", "EPERM|got"),
    ("oom score", "EACCES|got"),
    ("/dev/mem", "ENOENT|EPERM|got"),
    ("/dev/kmsg", "ENOENT|EPERM|got"),
    ("/dev/fuse", "ENOENT|EPERM|got"),
    ("firmware", "nothing|ENOENT|got"),
    ("debugfs", "nothing|got"),
    ("vsock", "EAFNOSUPPORT|got"),
    ("perf", "EACCES|ENOENT|got"),
    // Past the check of rights, as their arguments are nonsense.
    ("module", "EBADF|ENOSYS|EPERM"),
    ("kexec", "EBADF|ENOSYS|EINVAL|EPERM"),
    ("open_by_handle", "EINVAL|ESTALE|EPERM"),
    ("reboot", "EINVAL"),
    // Groups of processes without a budget of real time.
    ("real time", "EPERM|got"),
];

#[test]
fn neither_a_handler_nor_import_time_code_leaves_its_sandbox() {
    in_namespace("hostile", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        handler_and_import_time_code(namespace, &node)
    });
}

#[test]
fn neither_an_extended_zygote_nor_its_child_leaves_its_sandbox() {
    in_namespace("extended", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let parent = hostile_set("parent", &node, "socket", LISTEN)?;
        let mut child = hostile_set("child", &node, "decimal", "")?;
        child["spec"]["extends"] = json!({"name": "parent"});
        let functions = ["parent", "child"].map(hostile_function);
        namespace.apply(&[parent, child])?;
        namespace.apply(&functions)?;
        for function in ["function/child", "function/parent"] {
            namespace.wait_for(function, "Ready", 4 * MINUTE)?;
        }

        // The first child has the pool of its parent made anew.
        let pool = |set: &str| -> Result<Value> {
            until(&format!("one pool of {set}"), MINUTE, || {
                let mut pools = namespace.pods(&format!("sock.dev/pool={set}"))?;
                Ok(pools.pop().filter(|_| pools.is_empty()))
            })
        };
        let (extended, child) = (pool("parent")?, pool("child")?);
        ensure!(annotation(&extended, "extended")? == "true");
        ensure!(annotation(&child, "extended").is_err());
        let depth = |pool: &Value| -> Result<usize> {
            let zygote = node.zygote_of(pool)?;
            Ok(zygote.status("NSpid")?.split_whitespace().count())
        };
        ensure!(
            depth(&child)? == depth(&extended)? + 1,
            "the child was not forked from its parent"
        );
        check(
            Place::Extended,
            &node,
            &found_by_warm_up(namespace, &extended)?,
        )?;
        check(Place::Child, &node, &found_by_warm_up(namespace, &child)?)?;

        let mut client = Client::on(&node.other()?)?;
        for function in ["parent", "child"] {
            let found = found_by_handler(namespace, &mut client, function)?;
            check(Place::Leaf, &node, &found).with_context(|| format!("Function {function}"))?;
        }
        Ok(())
    });
}

#[test]
fn a_pod_does_not_leave_its_sandbox() {
    in_namespace("attacker", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        restricted_pod(namespace, &node)
    });
    in_namespace_of(Security::Privileged, "root", |namespace| {
        // The namespace has no standard, so that the label below is what admits the pod, or not.
        kubectl(&[
            "label",
            "namespace",
            &namespace.name,
            "pod-security.kubernetes.io/enforce=baseline",
            "--overwrite",
        ])?;
        let node = workers()?.into_iter().next().context("a node")?;
        root_pod(namespace, &node)
    });
}

#[test]
fn the_attempts_get_what_they_ask_for_where_nothing_forbids_it() {
    in_namespace_of(Security::Privileged, "unconfined", |namespace| {
        let mut pod = attacker("control", false, &json!({}), &json!({"privileged": true}));
        // It has somebody to reach: a listener and another process.
        let source = format!(
            "{ATTACK}
import json
s = socket.socket(socket.AF_UNIX)
s.bind('\\0sock-hostile')
s.listen(8)
other = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL)
print(json.dumps(attack()))
other.kill()
"
        );
        let container = &mut pod["spec"]["containers"][0];
        container["command"] = json!(["python3", "-c", source]);
        container["volumeMounts"] = json!([
            {"name": "payload", "mountPath": "/opt/sock", "readOnly": true},
            {"name": "packages", "mountPath": "/opt/sock/site-packages", "readOnly": true},
            {"name": "containerd", "mountPath": "/run/containerd"},
            {"name": "run", "mountPath": "/run/sock"},
        ]);
        pod["spec"]["volumes"] = json!([
            {"name": "payload", "hostPath": {"path": "/opt/sock"}},
            {"name": "packages", "emptyDir": {}},
            {"name": "containerd", "hostPath": {"path": "/run/containerd"}},
            {"name": "run", "hostPath": {"path": "/run/sock"}},
        ]);
        pod["spec"]["nodeName"] = json!(workers()?.first().context("a node")?.name);
        // A user that is not root, and may become it.
        let climber = attacker(
            "climber",
            false,
            &json!({"runAsUser": 1000}),
            &json!({"allowPrivilegeEscalation": true}),
        );
        namespace.apply(&[pod, climber])?;

        let found = findings(namespace, "control")?;
        let wrong: Vec<String> = EXPECTED
            .iter()
            .filter_map(|(name, _)| {
                let outcome = found[*name].as_str().unwrap_or_default();
                let known = OUT_OF_REACH.iter().find(|(known, _)| known == name);
                let expected = known.map_or("got", |(_, expected)| expected);
                (!matches(outcome, expected)).then(|| format!("{name}: {outcome}, not {expected}"))
            })
            .collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        let found = findings(namespace, "climber")?;
        let root = found["setuid file"].as_str().unwrap_or_default();
        ensure!(
            root.starts_with("got root by "),
            "a setuid file makes nobody root: {root}"
        );
        Ok(())
    });
}

const SAY: &str = "
import os
import socket


def handler(event, context):
    to = event['query'].get('to')
    if to:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(int(event['query']['count'])):
                sender.sendto(b'x' * 100, (to, 9))
    connect = event['query'].get('connect')
    if connect:
        try:
            socket.create_connection((connect, 8080), timeout=2).close()
        except OSError as error:
            return {'pid': os.getpid(), 'connected': type(error).__name__}
    with open('/proc/self/mountinfo') as mounts:
        mounts = mounts.read()
    return {'pid': os.getpid(), 'connected': True, 'mounts': mounts, 'packages': os.listdir('/opt/sock/site-packages')}
";

/// A Function with packages, on one node.
fn tenant(node: &Node) -> Result<[Value; 2]> {
    let requirement = include_str!("../images/requirements-small.txt")
        .lines()
        .find(|line| !line.starts_with('#'))
        .context("a requirement")?;
    let set = manifest::package_set_of("equal", &[requirement], &["idna"]);
    let function = manifest::function("equal", "equal", SAY);
    Ok([manifest::only_on(&node.name, set), function])
}

/// What a tenant has on a node.
struct Seen {
    uid: String,
    pool: Value,
    pod: Value,
}

fn seen(namespace: &str) -> Result<Seen> {
    let list = |selector: &str| -> Result<Value> {
        let found = get(&["pods", "--namespace", namespace, "--selector", selector])?;
        let items = found["items"].as_array().context("a list")?;
        let live = items
            .iter()
            .find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        live.cloned()
            .with_context(|| format!("a pod of {selector}"))
    };
    let object = get(&["namespace", namespace])?;
    Ok(Seen {
        uid: object["metadata"]["uid"]
            .as_str()
            .context("uid")?
            .to_owned(),
        pool: list("sock.dev/pool=equal")?,
        pod: list("sock.dev/function=equal")?,
    })
}

fn annotation<'a>(pod: &'a Value, name: &str) -> Result<&'a str> {
    let value = pod["metadata"]["annotations"][format!("sock.dev/{name}")].as_str();
    value.with_context(|| format!("annotation {name}"))
}

#[test]
fn two_tenants_with_equal_package_sets_share_nothing() {
    in_namespace("tenant-a", |first| {
        in_namespace("tenant-b", |second| {
            let node = workers()?.into_iter().next().context("a node")?;
            let mut client = Client::on(&node.other()?)?;
            for namespace in [first, second] {
                namespace.apply(&tenant(&node)?)?;
            }
            for namespace in [first, second] {
                namespace.wait_for("function/equal", "Ready", 3 * MINUTE)?;
            }
            let (a, b) = (seen(&first.name)?, seen(&second.name)?);
            for name in ["lock", "digest"] {
                ensure!(
                    annotation(&a.pool, name)? == annotation(&b.pool, name)?,
                    "the sets are not equal"
                );
            }
            let [zygote_a, zygote_b] = [&a, &b].map(|tenant| node.zygote_of(&tenant.pool));
            let (zygote_a, zygote_b) = (zygote_a?, zygote_b?);
            ensure!(zygote_a.user_namespace != zygote_b.user_namespace);
            ensure!(zygote_a.pid_namespace != zygote_b.pid_namespace);
            ensure!(zygote_a.network_namespace != zygote_b.network_namespace);
            ensure!(zygote_a.status("Uid")? != zygote_b.status("Uid")?);
            ensure!(zygote_a.status("PPid")? != zygote_b.status("PPid")?);

            // Directories of one lock: each has its own, with files of its own.
            let file = |tenant: &Seen| -> Result<String> {
                let lock = annotation(&tenant.pool, "lock")?;
                let script = r#"cd "/var/lib/sock/cache/$1/$2/site-packages/idna" && stat -c '%d:%i %u %a' __init__.py core.py"#;
                let names = r#"cd /var/lib/sock/cache && find . -samefile "$1/$2/site-packages/idna/core.py" ! -path "./$1/*""#;
                let elsewhere = node.shell(names, &[&tenant.uid, lock])?;
                ensure!(elsewhere.is_empty(), "another tenant's too: {elsewhere}");
                node.shell(script, &[&tenant.uid, lock])
            };
            let (file_a, file_b) = (file(&a)?, file(&b)?);
            for (line_a, line_b) in file_a.lines().zip(file_b.lines()) {
                ensure!(line_a != line_b, "one file: {line_a}");
                ensure!(line_a.contains(" 65531 "), "owner: {line_a}");
            }
            let socket = |tenant: &Seen| -> Result<String> {
                let digest = annotation(&tenant.pool, "digest")?;
                let script = r#"stat -c '%i %u %a' "/run/sock/pools/$1/$2" "/run/sock/pools/$1/$2/"*.sock; stat -c %a "/run/sock/pools/$1""#;
                node.shell(script, &[&tenant.uid, digest])
            };
            let (socket_a, socket_b) = (socket(&a)?, socket(&b)?);
            ensure!(socket_a.lines().count() == 3, "one socket: {socket_a}");
            ensure!(
                socket_a != socket_b && socket_a.contains(" 0 700"),
                "{socket_a}"
            );

            // Memory: a leaf shares with its own zygote, and with no other.
            let mut leaves = Vec::new();
            for tenant in [&a, &b] {
                let answer = forked(&mut client, address(&tenant.pod)?, "/")?;
                let packages = answer["packages"].to_string();
                ensure!(packages.contains("idna"), "{packages}");
                let found = node.interpreters_of(&tenant.pod)?;
                leaves.push(found.into_iter().next().context("a leaf")?.pid);
            }
            let scanner = node.install(env!("CARGO_BIN_EXE_sock-e2e-memory").as_ref())?;
            let shared = |one: u32, other: u32| -> Result<u64> {
                let script = r#"exec "$1" frames "$2" "$3""#;
                let said = node.shell(script, &[&scanner, &one.to_string(), &other.to_string()])?;
                Ok(said.trim().parse()?)
            };
            for (zygote, leaf) in [(&zygote_a, leaves[0]), (&zygote_b, leaves[1])] {
                let frames = shared(zygote.pid, leaf)?;
                ensure!(
                    frames > 100,
                    "a leaf shares {frames} frames with its zygote"
                );
            }
            for (zygote, leaf) in [(&zygote_a, leaves[1]), (&zygote_b, leaves[0])] {
                let frames = shared(zygote.pid, leaf)?;
                ensure!(
                    frames == 0,
                    "a leaf shares {frames} frames with another tenant's zygote"
                );
            }
            ensure!(
                shared(zygote_a.pid, zygote_b.pid)? == 0,
                "zygotes share frames"
            );

            another_tenant_is_not_named(second, &a)
        });
        Ok(())
    });
}

/// Annotations that name a tenant, written by hand in another namespace.
fn another_tenant_is_not_named(namespace: &Namespace, other: &Seen) -> Result<()> {
    let mut pod = other.pod.clone();
    pod["metadata"] = json!({
        "name": "forged", "namespace": namespace.name, "annotations": other.pod["metadata"]["annotations"],
    });
    let spec = pod["spec"].as_object_mut().context("spec")?;
    for name in ["nodeName", "serviceAccountName", "serviceAccount"] {
        spec.remove(name);
    }
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": other.pod["spec"]["nodeName"]});
    pod["status"] = json!({});
    let refused = kubectl_with(&["create", "-f", "-"], &pod.to_string());
    let said = format!("{:#}", refused.err().context("the pod was admitted")?);
    ensure!(said.contains(POD_POLICY), "{said}");

    // Nor after its creation, by any of the ways to change a pod.
    let mut plain = manifest::busybox("plain", &[("main", "exec sleep 1000")]);
    plain["spec"]["terminationGracePeriodSeconds"] = json!(0);
    namespace.apply(&[plain])?;
    let patch = json!({"metadata": {"annotations": {"sock.dev/function": "main"}}}).to_string();
    for subresource in ["", "--subresource=status"] {
        let mut arguments = vec!["patch", "pod", "plain", "--type=merge", "--patch", &patch];
        arguments.extend(Some(subresource).filter(|s| !s.is_empty()));
        let said = format!(
            "{:#}",
            namespace.kubectl(&arguments).err().context("patched")?
        );
        ensure!(said.contains(POD_POLICY), "{subresource}: {said}");
    }
    for subresource in ["--subresource=resize", "--subresource=ephemeralcontainers"] {
        // These take nothing of a pod but what they are for.
        let _ = namespace.kubectl(&[
            "patch",
            "pod",
            "plain",
            "--type=merge",
            "--patch",
            &patch,
            subresource,
        ]);
    }
    let plain = namespace.get(&["pod", "plain"])?;
    ensure!(
        annotation(&plain, "function").is_err(),
        "{}",
        plain["metadata"]
    );

    // Past admission, as the controller of ReplicaSets is let past it, the shim refuses a tenant of another namespace.
    kubectl_with(
        &[
            "create",
            "--as=system:serviceaccount:kube-system:replicaset-controller",
            "-f",
            "-",
        ],
        &pod.to_string(),
    )?;
    until("the shim has refused the forged pod", 2 * MINUTE, || {
        let pod = namespace.get(&["pod", "forged"])?;
        let state = pod["status"]["containerStatuses"].to_string();
        ensure!(!state.contains("\"running\""), "it runs: {state}");
        Ok(state.contains("is the tenant of namespace").then_some(()))
    })
}

/// Annotations by hand: those of a tenant, and one that has a pod mounted what a Function's has.
fn forged() -> Result<Value> {
    let other = get(&["namespace", "kube-system"])?;
    Ok(json!({
        "sock.dev/tenant": other["metadata"]["uid"], "sock.dev/function": "main",
    }))
}

/// A workload whose pods the restricted standard admits, each an idle busybox with these annotations.
fn workload(api: &str, kind: &str, name: &str, annotations: &Value) -> Value {
    let labels = json!({"app": name});
    let pod = manifest::busybox(name, &[("main", "exec sleep 1000")]);
    let mut template = json!({
        "metadata": {"labels": labels, "annotations": annotations}, "spec": pod["spec"],
    });
    let runs_to_its_end = api == "batch/v1";
    template["spec"]["restartPolicy"] = json!(if runs_to_its_end { "Never" } else { "Always" });
    template["spec"]["terminationGracePeriodSeconds"] = json!(0);
    let selector = json!({"matchLabels": labels});
    let mut object = json!({"apiVersion": api, "kind": kind, "metadata": {"name": name}});
    object["spec"] = match kind {
        "ReplicationController" => json!({"selector": labels, "template": template}),
        "Job" => json!({"template": template}),
        "CronJob" => {
            json!({"schedule": "* * * * *", "jobTemplate": {"spec": {"template": template}}})
        }
        "StatefulSet" => json!({"serviceName": name, "selector": selector, "template": template}),
        _ => json!({"selector": selector, "template": template}),
    };
    if kind == "PodTemplate" {
        object["template"] = template;
        if let Some(object) = object.as_object_mut() {
            object.remove("spec");
        }
    }
    object
}

/// That an attempt failed, and in these words.
fn refused(attempt: Result<String>, words: &str, what: &str) -> Result<()> {
    let said = match attempt {
        Ok(_) => anyhow::bail!("{what} was admitted"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(said.contains(words), "{what}: {said}");
    Ok(())
}

const POD_POLICY: &str = "may not set or change the annotations of sock.dev";
const TEMPLATE_POLICY: &str = "may not make or change a template with annotations of sock.dev";

/// Kinds whose pods come from the controllers that the policy on pods lets by.
const TRUSTED: [&str; 3] = ["Deployment", "ReplicaSet", "DaemonSet"];

/// The other kinds with a template, and whose pods they would be: the policy on pods refuses these.
const OTHERS: [(&str, &str, &str); 4] = [
    ("v1", "ReplicationController", "replication-controller"),
    ("apps/v1", "StatefulSet", "statefulset-controller"),
    ("batch/v1", "Job", "job-controller"),
    ("batch/v1", "CronJob", "job-controller"),
];

/// All of it is tried by the administrator of the cluster, whom nothing refuses but the policies.
#[test]
fn no_kind_of_workload_carries_annotations_into_a_pod() {
    in_namespace("templates", |namespace| {
        let forged = forged()?;
        let create = |object: &Value| {
            kubectl_with(
                &["create", "--namespace", &namespace.name, "-f", "-"],
                &object.to_string(),
            )
        };
        for (api, kind, _) in OTHERS {
            create(&workload(api, kind, &kind.to_lowercase(), &forged))?;
        }
        // Nobody makes pods from these.
        create(&workload("v1", "PodTemplate", "stored", &forged))?;

        for kind in TRUSTED {
            let name = kind.to_lowercase();
            let attempt = create(&workload("apps/v1", kind, &name, &forged));
            refused(
                attempt,
                TEMPLATE_POLICY,
                &format!("{kind} with annotations"),
            )?;

            create(&workload("apps/v1", kind, &name, &json!({})))?;
            let template = json!({"metadata": {"annotations": forged}});
            let patch = json!({"spec": {"template": template}}).to_string();
            for way in ["merge", "strategic"] {
                let attempt =
                    namespace.kubectl(&["patch", kind, &name, "--type", way, "--patch", &patch]);
                refused(attempt, TEMPLATE_POLICY, &format!("{kind}: {way} patch"))?;
            }
            // These take nothing of a workload but what they are for.
            for subresource in ["--subresource=status", "--subresource=scale"] {
                let _ = namespace.kubectl(&[
                    "patch",
                    kind,
                    &name,
                    "--type=merge",
                    "--patch",
                    &patch,
                    subresource,
                ]);
            }
            let found = namespace.get(&[kind, &name])?;
            let template = &found["spec"]["template"]["metadata"];
            ensure!(template["annotations"].is_null(), "{kind}: {template}");
        }

        for (_, kind, controller) in OTHERS {
            // A CronJob waits for the next minute to make a Job, whose event it is then.
            let name = kind.to_lowercase();
            let what = format!("{controller} is refused a pod of a {kind}");
            let message = until(&what, 2 * MINUTE, || {
                let events = namespace.get(&["events", "--field-selector=reason=FailedCreate"])?;
                let events = events["items"].as_array().cloned().unwrap_or_default();
                let event = events.into_iter().find(|event| {
                    let named = event["involvedObject"]["name"].as_str();
                    named.is_some_and(|one| one == name || one.starts_with(&format!("{name}-")))
                });
                Ok(event.map(|event| event["message"].to_string()))
            })?;
            ensure!(
                message.contains(&format!("{controller} {POD_POLICY}")),
                "{message}"
            );
        }
        for pod in namespace.pods("")? {
            let metadata = &pod["metadata"];
            ensure!(!metadata.to_string().contains("sock.dev/"), "{metadata}");
        }
        Ok(())
    });
}

#[test]
fn a_template_of_the_operator_is_changed_by_nobody_else() {
    in_namespace("owned", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        namespace.serve("equal", &tenant(&node)?)?;
        let forged = forged()?;
        for kind in TRUSTED {
            let list = namespace.get(&[kind])?;
            let [object] = list["items"].as_array().context("a list")?.as_slice() else {
                anyhow::bail!("one {kind}: {list}");
            };
            let name = object["metadata"]["name"].as_str().context("a name")?;
            let template = |found: &Value| found["spec"]["template"].clone();
            ensure!(template(object).to_string().contains("sock.dev/tenant"));
            let change = |annotations: Value| -> (&str, Value) {
                (
                    "merge",
                    json!({"spec": {"template": {"metadata": {"annotations": annotations}}}}),
                )
            };
            let changes = [
                change(forged.clone()),
                change(json!({"sock.dev/extended": "true"})),
                change(json!({"sock.dev/tenant": null})),
                change(Value::Null),
                // What other annotations bring with them is not told by their names.
                change(json!({"example.org/other": "annotation"})),
                // The annotations as they are, for another program.
                (
                    "json",
                    json!([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": manifest::BUSYBOX}]),
                ),
            ];
            for (way, patch) in &changes {
                let patch = patch.to_string();
                let attempt =
                    namespace.kubectl(&["patch", kind, name, "--type", way, "--patch", &patch]);
                refused(attempt, TEMPLATE_POLICY, &format!("{kind}: {patch}"))?;
            }
            // What is not of the template is.
            namespace.kubectl(&["annotate", kind, name, "example.org/note=1"])?;
            let found = namespace.get(&[kind, name])?;
            ensure!(template(&found) == template(object), "{kind}: {found}");
        }
        Ok(())
    });
}

#[test]
fn a_binding_gives_a_pod_no_annotations() {
    in_namespace("binding", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let mut pod = manifest::busybox("unbound", &[("main", "exec sleep 1000")]);
        pod["spec"]["schedulerName"] = json!("nobody");
        pod["spec"]["terminationGracePeriodSeconds"] = json!(0);
        namespace.apply(&[pod])?;
        let bind = |annotations: &Value, path: &str| {
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding",
                "metadata": {"name": "unbound", "annotations": annotations},
                "target": {"apiVersion": "v1", "kind": "Node", "name": node.name},
            });
            let path = format!("/api/v1/namespaces/{}/{path}", namespace.name);
            kubectl_with(&["create", "--raw", &path, "-f", "-"], &binding.to_string())
        };
        for path in ["pods/unbound/binding", "bindings"] {
            refused(bind(&forged()?, path), POD_POLICY, path)?;
        }
        // The annotations of a binding do become the pod's.
        bind(
            &json!({"example.org/note": "bound"}),
            "pods/unbound/binding",
        )?;
        let bound = namespace.get(&["pod", "unbound"])?;
        ensure!(bound["spec"]["nodeName"] == json!(node.name));
        let annotations = &bound["metadata"]["annotations"];
        ensure!(annotations["example.org/note"] == "bound", "{annotations}");
        ensure!(
            !annotations.to_string().contains("sock.dev/"),
            "{annotations}"
        );
        Ok(())
    });
}

/// The node's end of a pod's interface.
fn interface(node: &Node, pod: &Value) -> Result<String> {
    // Zygotes and leaves have empty networks of their own; the shim and the holder are in the pod's.
    let mut found = node.processes_of(pod)?;
    found.retain(|process| !process.is_interpreter());
    let holder = found.first().context("a process of the pod")?;
    let pid = holder.pid.to_string();
    let script = r#"link=$(nsenter --target "$1" --net ip -o link show eth0 | sed 's/.*@if\([0-9]*\):.*/\1/')
        ip -o link | awk -F': ' -v n="$link" '$1 == n { sub(/@.*/, "", $2); print $2 }'"#;
    let name = node.shell(script, &[&pid])?.trim().to_owned();
    ensure!(
        !name.is_empty(),
        "no interface of {}",
        pod["metadata"]["name"]
    );
    Ok(name)
}

/// A rule on a node that is gone with this value.
struct Refusal<'a>(&'a Node, [String; 7]);

impl<'a> Refusal<'a> {
    fn new(node: &'a Node, interface: &str, to: &str) -> Result<Self> {
        let rule = [
            "FORWARD",
            "--in-interface",
            interface,
            "--destination",
            to,
            "--jump",
            "DROP",
        ];
        let rule = rule.map(str::to_owned);
        let arguments: Vec<&str> = rule.iter().map(String::as_str).collect();
        node.shell(r#"exec iptables --wait --insert "$@""#, &arguments)?;
        Ok(Self(node, rule))
    }
}

impl Drop for Refusal<'_> {
    fn drop(&mut self) {
        let arguments: Vec<&str> = self.1.iter().map(String::as_str).collect();
        let _ = self
            .0
            .shell(r#"exec iptables --wait --delete "$@""#, &arguments);
    }
}

#[test]
fn packets_of_a_leaf_leave_by_its_pods_interface_and_a_rule_there_stops_them() {
    in_namespace("packets", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let mut echo = manifest::echo("echo");
        echo[0]["spec"]["nodeName"] = json!(node.other()?.name);
        namespace.apply(&echo)?;
        namespace.serve("equal", &tenant(&node)?)?;
        namespace.wait_for("pod/echo", "Ready", MINUTE)?;
        let echo = namespace.get(&["pod", "echo"])?;
        let to = address(&echo)?.to_owned();
        let tenant = seen(&namespace.name)?;
        let own = address(&tenant.pod)?.to_owned();
        let mut client = Client::on(&node.other()?)?;
        forked(&mut client, &own, "/")?;

        let interfaces = [
            interface(&node, &tenant.pod)?,
            interface(&node, &tenant.pool)?,
        ];
        ensure!(interfaces[0] != interfaces[1], "{interfaces:?}");
        let received = || -> Result<[u64; 2]> {
            let script = r#"for i in "$@"; do cat "/sys/class/net/$i/statistics/rx_packets"; done"#;
            let said = node.shell(script, &[&interfaces[0], &interfaces[1]])?;
            let mut numbers = said.lines().map(str::parse);
            Ok([
                numbers.next().context("a number")??,
                numbers.next().context("a number")??,
            ])
        };
        let before = received()?;
        let path = format!("/?to={to}&count=500");
        forked(&mut client, &own, &path)?;
        let after = received()?;
        let (pod, pool) = (after[0] - before[0], after[1] - before[1]);
        ensure!(pod >= 500, "{pod} packets came by the pod's interface");
        ensure!(
            pool < 100,
            "{pool} packets came by the interface of the pool"
        );

        // What a network policy is made of.
        let connect = format!("/?connect={to}");
        let connected = |client: &mut Client| -> Result<Value> {
            Ok(forked(client, &own, &connect)?["connected"].take())
        };
        ensure!(connected(&mut client)? == true);
        let rule = Refusal::new(&node, &interfaces[1], &to)?;
        ensure!(
            connected(&mut client)? == true,
            "a rule for the pool's pod stops the leaf"
        );
        drop(rule);
        let rule = Refusal::new(&node, &interfaces[0], &to)?;
        let refused = connected(&mut client)?;
        ensure!(refused == "TimeoutError", "{refused}");
        drop(rule);
        ensure!(connected(&mut client)? == true);
        Ok(())
    });
}

#[test]
fn a_namespace_made_again_finds_nothing_of_the_old_one() {
    in_namespace("again", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let name = &namespace.name;
        namespace.serve("equal", &tenant(&node)?)?;
        let old = seen(name)?;
        let lock = annotation(&old.pool, "lock")?.to_owned();
        let zygote = node.zygote_of(&old.pool)?;
        // Something that only the old one has.
        let entry = format!("/var/lib/sock/cache/{}/{lock}/site-packages", old.uid);
        node.shell(r#"touch "$1/of_the_old_one.py""#, &[&entry])?;

        kubectl(&["delete", "namespace", name, "--wait=true", "--timeout=120s"])?;
        apply(&[json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {
                "sock-e2e": "test", "pod-security.kubernetes.io/enforce": "restricted",
            }},
        })])?;
        namespace.serve("equal", &tenant(&node)?)?;
        let new = seen(name)?;
        ensure!(new.uid != old.uid);
        ensure!(annotation(&new.pool, "lock")? == lock);
        ensure!(annotation(&new.pod, "tenant")? == new.uid);
        let made_again = node.zygote_of(&new.pool)?;
        ensure!(made_again.pid != zygote.pid);
        ensure!(
            made_again.user_namespace != zygote.user_namespace
                || node.processes(&[zygote.pid])?.is_empty()
        );
        ensure!(made_again.status("Uid")? != zygote.status("Uid")?);
        let mut client = Client::on(&node.other()?)?;
        let answer = forked(&mut client, address(&new.pod)?, "/")?;
        let found = format!("{} {}", answer["mounts"], answer["packages"]);
        ensure!(
            found.contains(&new.uid),
            "its own cache is mounted: {found}"
        );
        ensure!(
            !found.contains(&old.uid) && !found.contains("of_the_old_one"),
            "{found}"
        );
        until("the old one's sockets are gone", MINUTE, || {
            let path = format!("/run/sock/pools/{}", old.uid);
            Ok(node.shell(r#"test ! -e "$1""#, &[&path]).ok())
        })?;
        until("the old one's packages are gone", 3 * MINUTE, || {
            Ok(node.shell(r#"test ! -e "$1""#, &[&entry]).ok())
        })?;
        Ok(())
    });
}
