//! Reconciling a PackageSet once, against an API server in memory.

use std::collections::BTreeSet;

use kube::api::Api;
use serde_json::{Value, json};

use super::*;
use crate::api_server::{NAMESPACE, Server};
use sock_lock::Lock;

use crate::contract::{Version, short};
use crate::tests::{LINE, condition, context, requirements_name};

/// A server with the PackageSet of the other tests.
fn server() -> Server {
    let server = Server::new();
    server.put(crate::tests::set(&json!({ "lines": [LINE] })));
    server
}

fn wanted() -> Version {
    let lock = Lock {
        image: "python:3.11".into(),
        requirements: format!("{LINE}\n"),
    };
    Version::new(&lock, &["six".to_owned()], "", Vec::new())
}

/// Reconciles once and returns the PackageSet as it is then.
async fn reconciled(server: &Server) -> Value {
    let sets: Api<PackageSet> = Api::namespaced(server.client("test"), NAMESPACE);
    let set = sets.get("science").await.unwrap();
    set.steps(&context(server)).await.unwrap();
    server.get("packagesets", "science").unwrap()
}

/// Name of the DaemonSet of a version.
fn pool_name(digest: &str) -> String {
    format!("science-{}", &digest[..10])
}

/// The DaemonSet of the version that science has now, if there is one.
fn pool(server: &Server) -> Option<Value> {
    let set = server.get("packagesets", "science")?;
    server.get("daemonsets", &pool_name(set["status"]["digest"].as_str()?))
}

/// What the DaemonSet's controller says of so many nodes.
fn schedule(server: &Server, nodes: i32) {
    let set = server.get("packagesets", "science").unwrap();
    let name = pool_name(set["status"]["digest"].as_str().unwrap());
    server.edit("daemonsets", &name, |pool| {
        pool["status"] = json!({
            "desiredNumberScheduled": nodes, "currentNumberScheduled": nodes, "numberMisscheduled": 0,
            "numberReady": 0, "observedGeneration": pool["metadata"]["generation"],
        });
    });
}

#[tokio::test]
async fn what_belongs_to_a_package_set_is_applied() {
    let server = server();
    let set = reconciled(&server).await;
    let (name, version) = (requirements_name(), wanted());
    let requirements = server.get("configmaps", &name).unwrap();
    assert_eq!(
        requirements["data"],
        json!({ "requirements.txt": format!("{LINE}\n") })
    );
    let pool = &pool(&server).unwrap()["spec"];
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
            "sock.dev/image": "python:3.11",
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
    assert_eq!(set["status"]["digest"], version.digest);
    assert_eq!(set["status"].get("readyDigest"), None);
    assert_eq!(condition(&set, "Ready").1, "WaitingForDaemonSet");
}

#[tokio::test]
async fn missing_requirements_are_said() {
    let server = Server::new();
    let reference = json!({ "configMapKeyRef": { "name": "locked", "key": "requirements.txt" } });
    server.put(crate::tests::set(&reference));
    for reason in ["ConfigMapMissing", "KeyMissing"] {
        let set = reconciled(&server).await;
        assert_eq!(condition(&set, "Ready").1, reason);
        assert_eq!(condition(&set, "RequirementsFound").0, "False");
        assert_eq!(pool(&server), None);
        server.put(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "locked" },
            "data": { "other.txt": "" },
        }));
    }
}

/// A pod of a version on a node; `ended` is the exit code of its installer.
fn pod(version: &Version, node: &str, ended: Option<i32>, ready: bool) -> Value {
    let state = ended.map_or_else(
        || json!({ "running": {} }),
        |code| json!({ "terminated": { "exitCode": code, "message": "log\nsix==1.17.0: hash differs" } }),
    );
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("science-{node}-{}", &version.digest[..3]),
            "labels": { "sock.dev/pool": "science", "sock.dev/version": short(&version.digest) },
            "annotations": { "sock.dev/digest": version.digest },
        },
        "spec": { "nodeName": node, "containers": [] },
        "status": {
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
            "initContainerStatuses": [{ "name": "install", "image": "", "imageID": "", "ready": ended == Some(0), "restartCount": 0, "state": state }],
        },
    })
}

#[tokio::test]
async fn a_wrong_hash_is_what_the_condition_says() {
    let server = server();
    reconciled(&server).await;
    schedule(&server, 2);
    server.put(pod(&wanted(), "one", Some(1), false));
    server.put(pod(&wanted(), "two", None, false));
    let set = reconciled(&server).await;
    let (holds, reason, message) = condition(&set, "Ready");
    assert_eq!(
        (holds.as_str(), reason.as_str(), message.as_str()),
        ("False", "InstallFailed", "one: six==1.17.0: hash differs")
    );
    assert_eq!(set["status"]["failures"][0]["node"], "one");
    assert_eq!(set["status"].get("readyDigest"), None);
}

#[tokio::test]
async fn functions_stay_on_the_old_version_until_the_new_one_is_warm_everywhere() {
    let server = server();
    server.edit("packagesets", "science", |set| {
        set["status"] =
            json!({ "readyDigest": "old", "readyLock": "old", "readyImage": "python:3.10" });
    });
    reconciled(&server).await;
    schedule(&server, 2);
    let version = wanted();
    let old = Version {
        digest: "old".into(),
        ..version.clone()
    };
    server.put(pod(&version, "one", Some(0), true));
    server.put(pod(&version, "two", Some(0), false));
    server.put(pod(&old, "two", Some(0), true));
    let set = reconciled(&server).await;
    assert_eq!(set["status"]["readyNodes"], 1);
    assert_eq!(set["status"]["readyDigest"], "old");

    server.put(pod(&version, "two", Some(0), true));
    let set = reconciled(&server).await;
    assert_eq!(set["status"]["readyDigest"], version.digest);
    assert_eq!(set["status"]["readyImage"], "python:3.11");
    assert_eq!(condition(&set, "Ready").1, "Warm");
}

/// A PackageSet of one line of requirements that extends another.
fn extending(name: &str, parent: &str, line: &str) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": name, "uid": format!("p-{name}") },
        "spec": {
            "image": "python:3.11", "requirements": { "lines": [line] }, "extends": { "name": parent },
        },
    })
}

/// Reason and message of `ParentReady` once science extends what there is.
async fn parent_ready(server: &Server) -> (String, String, String) {
    condition(&reconciled(server).await, "ParentReady")
}

#[tokio::test]
async fn what_cannot_be_extended_is_said_with_what_to_do() {
    let server = Server::new();
    server.put(extending("science", "base", LINE));
    let (holds, reason, message) = parent_ready(&server).await;
    assert_eq!(
        (holds.as_str(), reason.as_str()),
        ("False", "PackageSetMissing")
    );
    assert_eq!(
        message,
        "spec.extends: PackageSet base does not exist in this namespace: create it"
    );
    assert!(pool(&server).is_none());

    server.put(extending("base", "science", LINE));
    let (_, reason, message) = parent_ready(&server).await;
    assert_eq!(reason, "Cycle");
    assert!(
        message.contains("science extends base comes back to science"),
        "{message}"
    );
    server.put(extending("base", "other", LINE));
    server.put(extending("other", "base", LINE));
    let (_, reason, message) = parent_ready(&server).await;
    assert_eq!(reason, "Cycle");
    assert!(
        message.contains("science extends base extends other comes back to base"),
        "{message}"
    );

    for depth in 0..8 {
        let (name, parent) = match depth {
            0 => ("base".to_owned(), "base1".to_owned()),
            _ => (format!("base{depth}"), format!("base{}", depth + 1)),
        };
        server.put(extending(&name, &parent, LINE));
    }
    assert_eq!(parent_ready(&server).await.1, "TooDeep");

    let base = json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "base", "uid": "p-base" },
        "spec": { "image": "python:3.11", "requirements": { "lines": [LINE.replace("1.17.0", "1.16.0")] } },
    });
    server.put(base.clone());
    let (_, reason, message) = parent_ready(&server).await;
    assert_eq!(reason, "WaitingForParent");
    assert!(message.contains("has not been looked at yet"), "{message}");

    let lock = |base: &Value| Lock {
        image: "python:3.11".into(),
        requirements: format!(
            "{}\n",
            base["spec"]["requirements"]["lines"][0].as_str().unwrap()
        ),
    };
    let ready = json!({ "readyDigest": "0a", "readyLock": lock(&base).digest(), "readyImage": "python:3.11" });
    server.edit("packagesets", "base", |base| base["status"] = ready.clone());
    let (_, reason, message) = parent_ready(&server).await;
    assert_eq!(reason, "NotContained");
    assert!(
        message.contains("its package six==1.16.0 is among the requirements as six==1.17.0"),
        "{message}"
    );
}

#[tokio::test]
async fn only_zygotes_that_others_extend_may_have_children() {
    let server = server();
    let extended = |server: &Server| {
        let pool = pool(server).unwrap();
        pool["spec"]["template"]["metadata"]["annotations"]["sock.dev/extended"].clone()
    };
    reconciled(&server).await;
    assert_eq!(extended(&server), Value::Null);
    server.put(extending("child", "science", LINE));
    reconciled(&server).await;
    assert_eq!(extended(&server), json!("true"));
    // To take it back would be to make the zygote anew for nothing.
    server.remove("packagesets", "child");
    reconciled(&server).await;
    assert_eq!(extended(&server), json!("true"));
    server.edit("packagesets", "science", |set| {
        set["spec"]["imports"] = json!(["six", "json"])
    });
    reconciled(&server).await;
    assert_eq!(extended(&server), Value::Null);
}

#[tokio::test]
async fn a_package_set_descends_from_the_version_of_its_parent_that_is_ready() {
    let server = Server::new();
    server.put(extending("science", "base", LINE));
    server.put(json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "base", "uid": "p-base" },
        "spec": { "image": "python:3.11" },
        "status": {
            "readyDigest": "0a", "readyLock": "1b", "readyImage": "python:3.11",
            "readyAncestors": [{ "digest": "2c", "lock": "3d" }],
        },
    }));
    let set = reconciled(&server).await;
    assert_eq!(condition(&set, "ParentReady").0, "True");
    let annotations = |server: &Server| {
        let pool = pool(server).unwrap();
        pool["spec"]["template"]["metadata"]["annotations"].clone()
    };
    let first = annotations(&server);
    let ancestors: Value =
        serde_json::from_str(first["sock.dev/ancestors"].as_str().unwrap()).unwrap();
    assert_eq!(
        ancestors,
        json!([{ "digest": "0a", "lock": "1b" }, { "digest": "2c", "lock": "3d" }])
    );

    // Functions learn of them with the version that has them.
    schedule(&server, 1);
    let digest = first["sock.dev/digest"].as_str().unwrap().to_owned();
    let version = Version {
        digest: digest.clone(),
        ..wanted()
    };
    server.put(pod(&version, "one", Some(0), true));
    let set = reconciled(&server).await;
    assert_eq!(set["status"]["readyDigest"], digest);
    assert_eq!(set["status"]["readyAncestors"], ancestors);

    // A new version of the parent makes a new one of the child; its end does not.
    server.edit("packagesets", "base", |base| {
        base["status"]["readyDigest"] = json!("0b")
    });
    reconciled(&server).await;
    let second = annotations(&server);
    assert_ne!(second["sock.dev/digest"], first["sock.dev/digest"]);
    assert_eq!(second["sock.dev/lock"], first["sock.dev/lock"]);
    server.remove("packagesets", "base");
    let set = reconciled(&server).await;
    assert_eq!(condition(&set, "ParentReady").1, "PackageSetMissing");
    assert_eq!(annotations(&server), second);
    assert_eq!(set["status"]["readyDigest"], digest);
}

/// A pod of a Function, or of another PackageSet, that runs on a version.
fn user(label: &str, name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{name}-1"), "annotations": annotations,
            "labels": { label: name, "app.kubernetes.io/managed-by": "sock-operator" },
        },
        "spec": { "containers": [] },
    })
}

#[tokio::test]
async fn a_former_pool_stays_as_long_as_somebody_runs_on_it() {
    let server = server();
    reconciled(&server).await;
    schedule(&server, 1);
    let first = wanted();
    server.put(pod(&first, "one", Some(0), true));
    let set = reconciled(&server).await;
    assert_eq!(condition(&set, "RolledOut").0, "True");
    let digest = |digest: &str| json!({ "sock.dev/digest": digest });
    let own = digest(&first.digest);
    server.put(user("sock.dev/function", "shop", &own));
    let ancestors = json!([{ "digest": first.digest, "lock": first.lock }]).to_string();
    let child = json!({ "sock.dev/digest": "00", "sock.dev/ancestors": ancestors });
    server.put(user("sock.dev/pool", "child", &child));

    let change = |imports: Value| {
        server.edit("packagesets", "science", |set| {
            set["spec"]["imports"] = imports
        });
    };
    let pools = || server.names("daemonsets");
    // It serves until the new one is warm, and a version between them that nobody has run on goes.
    change(json!(["six", "nothing"]));
    let set = reconciled(&server).await;
    assert_eq!(condition(&set, "RolledOut").1, "Warming");
    let between = pool_name(set["status"]["digest"].as_str().unwrap());
    assert!(pools().contains(&between));
    change(json!(["six", "json"]));
    let set = reconciled(&server).await;
    let present = pool_name(set["status"]["digest"].as_str().unwrap());
    let former = pool_name(&first.digest);
    assert_eq!(
        pools().into_iter().collect::<BTreeSet<_>>(),
        BTreeSet::from([former.clone(), present.clone()])
    );
    schedule(&server, 1);
    let second = Version {
        digest: set["status"]["digest"].as_str().unwrap().to_owned(),
        ..first.clone()
    };

    // Functions are given the new one, and as long as pods of them run on the former it stays; so it does for zygotes
    // that were forked from it.
    server.put(pod(&second, "one", Some(0), true));
    let set = reconciled(&server).await;
    assert_eq!(set["status"]["readyDigest"], second.digest);
    let (holds, reason, message) = condition(&set, "RolledOut");
    assert_eq!(
        (holds.as_str(), reason.as_str()),
        ("False", "FormerVersionInUse")
    );
    assert_eq!(
        message,
        format!(
            "the pool of the former version {} stays until no pod runs on it any more: those of Function shop, PackageSet child do",
            &first.digest[..10]
        )
    );
    server.remove("pods", "shop-1");
    let set = reconciled(&server).await;
    let (_, _, message) = condition(&set, "RolledOut");
    assert!(
        message.ends_with("those of PackageSet child do"),
        "{message}"
    );
    assert!(pools().contains(&former));
    server.put(user("sock.dev/pool", "child", &digest("00")));
    let set = reconciled(&server).await;
    assert_eq!(condition(&set, "RolledOut").0, "True");
    assert_eq!(pools(), [present]);

    // The way back is to a version like any other.
    change(json!(["six"]));
    let set = reconciled(&server).await;
    assert_eq!(set["status"]["readyDigest"], second.digest);
    assert_eq!(condition(&set, "RolledOut").1, "Warming");
    assert_eq!(pools().len(), 2);
}
