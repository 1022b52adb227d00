//! Ordinary pods with `runtimeClassName: sock`: what kubelet and users do with any pod.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    MINUTE, Node, Security, get, in_namespace, in_namespace_of, manifest, program, until,
};

/// Ends with the code in `/tmp/end`, when there is one.
const UNTIL_TOLD: &str =
    "echo hello from $HOSTNAME; until [ -s /tmp/end ]; do sleep 0.1; done; exit $(cat /tmp/end)";

fn terminated(pod: &Value) -> Option<&Value> {
    let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    (!state.is_null()).then_some(state)
}

#[test]
fn a_busybox_pod_has_logs_and_exec_and_its_exit_code() {
    in_namespace("busybox", |namespace| {
        namespace.apply(&[manifest::busybox("box", &[("main", UNTIL_TOLD)])])?;
        namespace.wait_for("pod/box", "Ready", MINUTE)?;
        let logs = namespace.kubectl(&["logs", "box"])?;
        ensure!(logs == "hello from box\n", "logs: {logs:?}");

        let shell = |script: &str| namespace.kubectl(&["exec", "box", "--", "sh", "-c", script]);
        let said = shell("echo $((6 * 7)); id -u; cat /proc/1/comm")?;
        ensure!(said == "42\n1000\nsh\n", "exec: {said:?}");
        let failed = shell("echo gone >&2; exit 3");
        let failed = format!("{:#}", failed.err().context("exit 3 is an error")?);
        ensure!(
            failed.contains("exit code 3") && failed.contains("gone"),
            "{failed}"
        );
        let input = sock_e2e::kubectl_with(
            &["-n", &namespace.name, "exec", "-i", "box", "--", "wc", "-c"],
            "twelve bytes",
        )?;
        ensure!(input.trim() == "12", "standard input of exec: {input:?}");

        shell("echo 7 >/tmp/end")?;
        let ended = until("the pod has ended", MINUTE, || {
            let pod = namespace.get(&["pod", "box"])?;
            Ok((pod["status"]["phase"] == "Failed").then_some(pod))
        })?;
        let state = terminated(&ended).context("state.terminated")?;
        ensure!(
            state["exitCode"] == 7 && state["reason"] == "Error",
            "{state}"
        );
        ensure!(ended["status"]["containerStatuses"][0]["restartCount"] == 0);
        Ok(())
    });
}

#[test]
fn a_pod_may_have_users_of_its_own_that_are_nobody_on_the_node() {
    in_namespace_of(Security::Privileged, "hostusers", |namespace| {
        let script = "
            touch /written /volume/new /dev/shm/new && chown 7:8 /volume/new && hostname && id -u
            stat -c %u:%g / /bin/busybox /volume /volume/new /config/key /etc/hosts /etc/resolv.conf /dev /dev/null /run
            while nc -l -p 80 -e echo reached; do :; done";
        let pod = |name: &str| {
            json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
                "spec": {
                    "runtimeClassName": "sock", "hostUsers": false, "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "box", "image": manifest::BUSYBOX, "imagePullPolicy": "IfNotPresent",
                        "command": ["sh", "-c", script],
                        "volumeMounts": [
                            {"name": "volume", "mountPath": "/volume"}, {"name": "config", "mountPath": "/config"},
                            {"name": "memory", "mountPath": "/run"},
                        ],
                    }],
                    "volumes": [
                        {"name": "volume", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}},
                        {"name": "config", "configMap": {"name": "config"}},
                    ],
                },
            })
        };
        let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config"}, "data": {"key": "value"}});
        let mut other = pod("other");
        other["spec"]["shareProcessNamespace"] = json!(true);
        namespace.apply(&[config, pod("one"), other])?;
        let mut firsts = Vec::new();
        for name in ["one", "other"] {
            let expected = format!("{name}\n0\n{}7:8\n{}", "0:0\n".repeat(3), "0:0\n".repeat(6));
            let mut logs = String::new();
            until("the pod has looked around", MINUTE, || {
                logs = namespace.kubectl(&["logs", name]).unwrap_or_default();
                Ok((logs.lines().count() == expected.lines().count()).then_some(()))
            })
            .with_context(|| {
                format!(
                    "{logs}\n{:?}",
                    namespace.kubectl(&["describe", "pod", name])
                )
            })?;
            ensure!(logs == expected, "{logs}");
            let map = namespace.kubectl(&["exec", name, "--", "cat", "/proc/self/uid_map"])?;
            let map: Vec<u32> = map
                .split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect();
            let [0, first, 65536] = map[..] else {
                bail!("{map:?}");
            };
            ensure!(first >= 65536, "{map:?}");
            firsts.push(first);

            let pod = namespace.get(&["pod", name])?;
            let node = Node::of(&pod)?;
            let mut found = node.processes_of(&pod)?;
            found.retain(|process| !process.exe.contains("containerd-shim"));
            let uids = found.iter().map(|process| {
                let uids = process.status("Uid")?.split_whitespace();
                uids.map(|uid| Ok(uid.parse()?))
                    .collect::<Result<Vec<u32>>>()
            });
            let uids = uids.collect::<Result<Vec<_>>>()?.concat();
            ensure!(
                found.len() >= 2 && uids.iter().all(|uid| (first..first + 65536).contains(uid)),
                "{found:?}"
            );
            let ip = pod["status"]["podIP"].as_str().context("status.podIP")?;
            let said = namespace.kubectl(&["exec", "other", "--", "nc", ip, "80"])?;
            ensure!(said == "reached\n", "{said:?}");
        }
        ensure!(firsts[0] != firsts[1], "both are {firsts:?}");
        Ok(())
    });
}

#[test]
fn a_root_pod_of_no_special_form_runs() {
    in_namespace_of(Security::Privileged, "root", |namespace| {
        namespace.apply(&[json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "box"},
            "spec": {
                "runtimeClassName": "sock", "restartPolicy": "Never",
                "containers": [{
                    "name": "box", "image": manifest::BUSYBOX, "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", "id -u; hostname; touch /written && echo wrote"],
                }],
            },
        })])?;
        until("the pod has succeeded", MINUTE, || {
            Ok((namespace.get(&["pod", "box"])?["status"]["phase"] == "Succeeded").then_some(()))
        })?;
        let logs = namespace.kubectl(&["logs", "box"])?;
        ensure!(logs == "0\nbox\nwrote\n", "{logs:?}");
        Ok(())
    });
}

#[test]
fn a_terminal_shows_what_is_written_to_it() {
    in_namespace("terminal", |namespace| {
        let told = "test -t 1 && echo a terminal; until [ -s /tmp/end ]; do sleep 0.1; done";
        let mut pod = manifest::busybox("box", &[("main", told)]);
        pod["spec"]["containers"][0]["tty"] = json!(true);
        namespace.apply(&[pod])?;
        namespace.wait_for("pod/box", "Ready", MINUTE)?;
        let logs = until("it has said so", MINUTE, || {
            let logs = namespace.kubectl(&["logs", "box"])?;
            Ok((!logs.is_empty()).then_some(logs))
        })?;
        ensure!(logs.trim() == "a terminal", "{logs:?}");
        // kubectl asks for a terminal only where it has one.
        let exec = format!(
            "kubectl -n {} exec -it box -- sh -c 'test -t 1 && echo another'",
            namespace.name
        );
        let said = program("script", &["-qec", &exec, "/dev/null"])?
            .stdin(std::process::Stdio::null())
            .output()
            .context("script(1)")?;
        let said = String::from_utf8_lossy(&said.stdout);
        ensure!(said.contains("another"), "{said:?}");
        Ok(())
    });
}

#[test]
fn two_containers_share_the_network_and_nothing_else() {
    in_namespace("pair", |namespace| {
        let server = "echo served >/tmp/index.html; exec httpd -f -p 8080 -h /tmp";
        let client =
            "until wget -qO- http://127.0.0.1:8080/; do sleep 0.2; done; ls /tmp; exec sleep 1000";
        namespace.apply(&[manifest::busybox(
            "pair",
            &[("server", server), ("client", client)],
        )])?;
        namespace.wait_for("pod/pair", "Ready", MINUTE)?;
        until("the client was served", MINUTE, || {
            let logs = namespace.kubectl(&["logs", "pair", "-c", "client"])?;
            // Nothing after it: the server's file is not in the client's /tmp.
            Ok(logs.ends_with("served\n").then_some(()))
        })?;
        let processes =
            namespace.kubectl(&["exec", "pair", "-c", "client", "--", "ps", "-o", "args"])?;
        ensure!(!processes.contains("httpd"), "{processes}");
        let addresses = |container| {
            namespace.kubectl(&["exec", "pair", "-c", container, "--", "hostname", "-i"])
        };
        let address = namespace.get(&["pod", "pair"])?["status"]["podIP"].clone();
        for container in ["server", "client"] {
            let found = addresses(container)?;
            ensure!(
                address == found.trim(),
                "{container}: {found} is not {address}"
            );
        }
        Ok(())
    });
}

#[test]
fn containers_are_started_again_as_the_policy_says() {
    in_namespace("restart", |namespace| {
        let once_more =
            "if [ -e /state/tried ]; then echo second; exit 0; fi; touch /state/tried; exit 1";
        let mut pod = manifest::busybox("again", &[("main", once_more)]);
        pod["spec"]["restartPolicy"] = json!("OnFailure");
        pod["spec"]["volumes"] = json!([{"name": "state", "emptyDir": {}}]);
        pod["spec"]["securityContext"]["fsGroup"] = json!(1000);
        pod["spec"]["containers"][0]["volumeMounts"] =
            json!([{"name": "state", "mountPath": "/state"}]);
        let never = manifest::busybox("never", &[("main", "exit 1")]);
        namespace.apply(&[pod, never])?;
        let again = until("the second try has succeeded", 2 * MINUTE, || {
            let pod = namespace.get(&["pod", "again"])?;
            Ok((pod["status"]["phase"] == "Succeeded").then_some(pod))
        })?;
        ensure!(again["status"]["containerStatuses"][0]["restartCount"] == 1);
        ensure!(namespace.kubectl(&["logs", "again"])? == "second\n");
        let never = namespace.get(&["pod", "never"])?;
        ensure!(
            never["status"]["phase"] == "Failed",
            "{}",
            never["status"]["phase"]
        );
        ensure!(never["status"]["containerStatuses"][0]["restartCount"] == 0);
        Ok(())
    });
}

#[test]
fn a_deleted_pod_is_told_to_end_and_leaves_no_process() {
    in_namespace("deleted", |namespace| {
        // A process that does not listen to SIGTERM is killed when its time is over.
        let polite = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let deaf = "trap '' TERM; while :; do sleep 0.1; done";
        namespace.apply(&[
            manifest::busybox("polite", &[("main", polite)]),
            manifest::busybox("deaf", &[("main", deaf)]),
        ])?;
        for name in ["polite", "deaf"] {
            namespace.wait_for(&format!("pod/{name}"), "Ready", MINUTE)?;
            let pod = namespace.get(&["pod", name])?;
            let node = Node::of(&pod)?;
            let before = node.processes_of(&pod)?;
            ensure!(!before.is_empty(), "no process of {name} was found");
            namespace.kubectl(&["delete", "pod", name, "--timeout=30s"])?;
            let left = until("no process is left", MINUTE, || {
                let left = node.processes_of(&pod)?;
                Ok(left.is_empty().then_some(()))
            });
            left.with_context(|| format!("{name}: {before:#?}"))?;
        }
        Ok(())
    });
}

#[test]
fn a_pod_finds_names_and_reaches_services() {
    in_namespace("service", |namespace| {
        namespace.apply(&manifest::echo("echo"))?;
        namespace.wait_for("pod/echo", "Ready", MINUTE)?;
        let server = namespace.get(&["pod", "echo"])?;
        let other = Node::of(&server)?.other()?;
        let mut pod = manifest::busybox("box", &[("main", "exec sleep 1000")]);
        pod["spec"]["nodeName"] = json!(other.name);
        // A pod that names its node passes by the scheduler, and so by the label of nodes that have sock.
        namespace.apply(&[pod])?;
        namespace.wait_for("pod/box", "Ready", MINUTE)?;
        let address = namespace.get(&["pod", "box"])?["status"]["podIP"].clone();
        let url = format!("http://{}/", namespace.routed("echo", &other)?);
        for url in ["http://echo/", &url] {
            let said =
                namespace.kubectl(&["exec", "box", "--", "timeout", "10", "wget", "-qO-", url])?;
            ensure!(address == said.trim(), "{url} sees {said}, not {address}");
        }
        Ok(())
    });
}

#[test]
fn the_operator_runs_on_sock() -> Result<()> {
    let pods = || -> Result<Vec<Value>> {
        let selector = "--selector=app.kubernetes.io/name=sock-operator";
        let list = get(&["pods", "--namespace=sock-system", selector])?;
        Ok(list["items"].as_array().context("pods")?.clone())
    };
    let pod = pods()?
        .into_iter()
        .find(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .context("a pod of the operator")?;
    ensure!(pod["spec"]["runtimeClassName"] == "sock");
    let node = Node::of(&pod)?;
    let processes = node.processes_of(&pod)?;
    let programs: Vec<&str> = processes.iter().map(|one| one.exe.as_str()).collect();
    ensure!(
        programs.contains(&"/sock-operator")
            && programs.iter().any(|one| one.contains("sock-holder")),
        "{programs:?}"
    );
    ensure!(
        !programs.iter().any(|one| one.ends_with("/pause")),
        "{programs:?}"
    );
    let name = pod["metadata"]["name"].as_str().context("metadata.name")?;
    let logs = sock_e2e::kubectl(&["logs", "--namespace=sock-system", name])?;
    ensure!(!logs.is_empty(), "the operator has logged nothing");
    Ok(())
}
