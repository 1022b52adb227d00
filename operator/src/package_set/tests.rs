//! Reconciling a PackageSet against an API server that states the calls it expects.

use serde_json::{Value, json};

use super::*;
use crate::contract::{Version, sha256};
use crate::script::{Call, applied, apply, event, get, list, missing, report, server};

const NAMESPACE: &str = "/api/v1/namespaces/shop";
const STATUS: &str = "/apis/sock.dev/v1alpha1/namespaces/shop/packagesets/science/status";
const POOL: &str = "/apis/apps/v1/namespaces/shop/daemonsets/science";
const PODS: &str = "/api/v1/namespaces/shop/pods";
const CONFIG_MAPS: &str = "/api/v1/namespaces/shop/configmaps";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/shop/events";
const LINE: &str =
    "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274";

fn namespace() -> Call {
    get(
        NAMESPACE,
        json!({ "metadata": { "name": "shop", "uid": "6f0b1f2e-0000-4000-8000-000000000001" } }),
    )
}

fn set(requirements: Value) -> PackageSet {
    serde_json::from_value(json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "science", "namespace": "shop", "uid": "p-1", "generation": 2 },
        "spec": {
            "image": "python:3.11", "requirements": requirements, "imports": ["six"],
            "index": { "url": "http://wheels/simple" },
            "resources": { "requests": { "cpu": 1 }, "limits": { "memory": "1Gi" } },
        },
    }))
    .unwrap()
}

fn condition<'a>(status: &'a Value, type_: &str) -> (&'a str, &'a str, &'a str) {
    let found = status["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["type"] == type_)
        .unwrap();
    (
        found["status"].as_str().unwrap(),
        found["reason"].as_str().unwrap(),
        found["message"].as_str().unwrap(),
    )
}

#[tokio::test]
async fn what_belongs_to_a_package_set_is_applied() {
    let requirements = format!("{LINE}\n");
    let name = format!("science-requirements-{}", &sha256(&[&requirements])[..10]);
    let config_map: &'static str = format!("{CONFIG_MAPS}/{name}").leak();
    let set = &set(json!({ "lines": [LINE] }));
    let (context, calls) = server(vec![
        namespace(),
        missing(POOL),
        list(PODS, &[]),
        missing(config_map),
        apply(config_map),
        missing(POOL),
        apply(POOL),
        list(CONFIG_MAPS, &[]),
        report(STATUS, set),
        event(EVENTS),
    ]);
    steps(set, &context).await.unwrap();
    drop(context);
    let sent = calls.await.unwrap();

    assert_eq!(sent[0]["data"], json!({ "requirements.txt": requirements }));
    let version = Version::new("python:3.11", &requirements, &["six".to_owned()], "");
    let pool = &sent[1]["spec"];
    assert_eq!(
        pool["updateStrategy"]["rollingUpdate"],
        json!({ "maxSurge": 1, "maxUnavailable": 0 })
    );
    assert_eq!(
        pool["template"]["metadata"]["annotations"],
        json!({
            "sock.dev/tenant": "6f0b1f2e-0000-4000-8000-000000000001",
            "sock.dev/package-set": "science",
            "sock.dev/lock": version.lock,
            "sock.dev/digest": version.digest,
            "sock.dev/installer": "install",
            "sock.dev/zygote": "zygote",
            "sock.dev/imports": "[\"six\"]",
            "sock.dev/spares": "1",
            "sock.dev/accepted-threads": "[]",
            "sock.dev/warm-up": "",
            "sock.dev/status-port": "9464",
        })
    );
    let resources = json!({ "requests": { "cpu": "1" }, "limits": { "memory": "1Gi" } });
    let security =
        json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    assert_eq!(
        pool["template"]["spec"],
        json!({
            "runtimeClassName": "sock",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "nodeSelector": { "sock.dev/node": "ready" },
            "terminationGracePeriodSeconds": 10,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 1_805_342_219, "runAsGroup": 1_805_342_219, "fsGroup": 1_805_342_219,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "initContainers": [{
                "name": "install",
                "image": "python:3.11",
                "command": ["python3", "-I", "/opt/sock/python/install.py"],
                "env": [{ "name": "SOCK_INDEX_URL", "value": "http://wheels/simple" }],
                "resources": resources,
                "securityContext": {
                    "runAsUser": 65531, "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [{ "name": "requirements", "mountPath": "/etc/sock", "readOnly": true }],
            }],
            "containers": [{
                "name": "zygote",
                "image": "python:3.11",
                "command": ["python3", "/opt/sock/python/zygote.py"],
                "ports": [{ "name": "status", "containerPort": 9464, "protocol": "TCP" }],
                "resources": resources,
                "securityContext": security,
                "terminationMessagePolicy": "FallbackToLogsOnError",
            }],
            "volumes": [{ "name": "requirements", "configMap": { "name": name } }],
        })
    );
    assert_eq!(sent[2]["status"]["digest"], version.digest);
    assert_eq!(sent[2]["status"]["readyDigest"], Value::Null);
    assert_eq!(condition(&sent[2], "Ready").1, "WaitingForDaemonSet");
}

#[tokio::test]
async fn missing_requirements_are_said() {
    for (answer, reason) in [
        (
            missing("/api/v1/namespaces/shop/configmaps/locked"),
            "ConfigMapMissing",
        ),
        (
            get(
                "/api/v1/namespaces/shop/configmaps/locked",
                json!({ "metadata": {}, "data": { "other.txt": "" } }),
            ),
            "KeyMissing",
        ),
    ] {
        let set =
            &set(json!({ "configMapKeyRef": { "name": "locked", "key": "requirements.txt" } }));
        let (context, calls) = server(vec![
            namespace(),
            answer,
            missing(POOL),
            list(PODS, &[]),
            report(STATUS, set),
            event(EVENTS),
        ]);
        steps(set, &context).await.unwrap();
        drop(context);
        let sent = calls.await.unwrap();
        assert_eq!(condition(&sent[0], "Ready").1, reason);
        assert_eq!(condition(&sent[0], "RequirementsFound").0, "False");
    }
}

/// A pod of a version on a node; `ended` is the exit code of its installer.
fn pod(version: &Version, node: &str, ended: Option<i32>, ready: bool) -> Value {
    let state = ended.map_or_else(
        || json!({ "running": {} }),
        |code| json!({ "terminated": { "exitCode": code, "message": "log\nsix==1.17.0: hash differs" } }),
    );
    json!({
        "metadata": { "name": format!("science-{node}"), "annotations": { "sock.dev/digest": version.digest } },
        "spec": { "nodeName": node, "containers": [] },
        "status": {
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
            "initContainerStatuses": [{ "name": "install", "image": "", "imageID": "", "ready": ended == Some(0), "restartCount": 0, "state": state }],
        },
    })
}

async fn reconciled(set: &PackageSet, desired: i32, pods: &[Value]) -> Value {
    let requirements = format!("{LINE}\n");
    let name = format!("science-requirements-{}", &sha256(&[&requirements])[..10]);
    let config_map: &'static str = format!("{CONFIG_MAPS}/{name}").leak();
    let status = json!({
        "desiredNumberScheduled": desired, "currentNumberScheduled": desired, "numberMisscheduled": 0, "numberReady": 0,
        "observedGeneration": 1,
    });
    let (context, calls) = server(vec![
        namespace(),
        missing(POOL),
        list(PODS, pods),
        missing(config_map),
        apply(config_map),
        missing(POOL),
        applied(POOL, status),
        list(CONFIG_MAPS, &[]),
        report(STATUS, set),
        event(EVENTS),
    ]);
    steps(set, &context).await.unwrap();
    drop(context);
    calls.await.unwrap().swap_remove(2)
}

#[tokio::test]
async fn a_wrong_hash_is_what_the_condition_says() {
    let set = set(json!({ "lines": [LINE] }));
    let version = Version::new("python:3.11", &format!("{LINE}\n"), &["six".to_owned()], "");
    let status = reconciled(
        &set,
        2,
        &[
            pod(&version, "one", Some(1), false),
            pod(&version, "two", None, false),
        ],
    )
    .await;
    assert_eq!(
        condition(&status, "Ready"),
        ("False", "InstallFailed", "one: six==1.17.0: hash differs")
    );
    assert_eq!(status["status"]["failures"][0]["node"], "one");
    assert_eq!(status["status"]["readyDigest"], Value::Null);
}

#[tokio::test]
async fn functions_stay_on_the_old_version_until_the_new_one_is_warm_everywhere() {
    let mut set = set(json!({ "lines": [LINE] }));
    set.status = Some(sock_crds::PackageSetStatus {
        ready_digest: Some("old".into()),
        ready_lock: Some("old".into()),
        ready_image: Some("python:3.10".into()),
        ..sock_crds::PackageSetStatus::default()
    });
    let version = Version::new("python:3.11", &format!("{LINE}\n"), &["six".to_owned()], "");
    let old = Version {
        digest: "old".into(),
        ..version.clone()
    };
    let (one, two) = (
        pod(&version, "one", Some(0), true),
        pod(&version, "two", Some(0), false),
    );
    let status = reconciled(
        &set,
        2,
        &[one.clone(), two, pod(&old, "two", Some(0), true)],
    )
    .await;
    assert_eq!(status["status"]["readyNodes"], 1);
    assert_eq!(status["status"]["readyDigest"], "old");

    let status = reconciled(&set, 2, &[one, pod(&version, "two", Some(0), true)]).await;
    assert_eq!(status["status"]["readyDigest"], version.digest);
    assert_eq!(status["status"]["readyImage"], "python:3.11");
    assert_eq!(condition(&status, "Ready").1, "Warm");
}
