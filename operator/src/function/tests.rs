//! Reconciling a Function once, against an API server in memory.

use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use serde_json::{Value, json};

use super::*;
use crate::api_server::{NAMESPACE, Server};
use crate::tests::{CODE, code_name, condition, context, ready_set, version};

fn function(source: Value) -> Function {
    let mut function = crate::tests::function("hello");
    function["spec"]["source"] = source;
    serde_json::from_value(function).unwrap()
}

fn inline() -> Function {
    function(json!({ "inline": CODE }))
}

/// A server with the PackageSet and the Function of the other tests.
fn server() -> Server {
    let server = Server::new();
    server.put(ready_set("True"));
    server.put(crate::tests::function("hello"));
    server
}

/// Reconciles once and returns the Function as it is then.
async fn reconciled(server: &Server) -> Value {
    let functions: Api<Function> = Api::namespaced(server.client("test"), NAMESPACE);
    let function = functions.get("hello").await.unwrap();
    function.steps(&context(server)).await.unwrap();
    server.get("functions", "hello").unwrap()
}

#[tokio::test]
async fn what_belongs_to_a_function_is_applied() {
    let server = server();
    server.put(json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "hello-code-old", "labels": { "sock.dev/function": "hello" }, "ownerReferences": [{
            "apiVersion": "sock.dev/v1alpha1", "kind": "Function", "name": "hello", "uid": "f-hello", "controller": true,
        }] },
    }));
    server.put(json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "theirs", "labels": { "sock.dev/function": "hello" } },
    }));
    let function = reconciled(&server).await;

    let deployment = server.get("deployments", "hello").unwrap();
    assert_eq!(
        deployment["metadata"]["ownerReferences"][0]["uid"],
        "f-hello"
    );
    assert_eq!(deployment["spec"]["replicas"], 1);
    let template = &deployment["spec"]["template"];
    assert_eq!(
        template["metadata"]["annotations"],
        json!({
            "sock.dev/tenant": "6f0b1f2e-0000-4000-8000-000000000001",
            "sock.dev/package-set": "plain",
            "sock.dev/lock": version().lock,
            "sock.dev/digest": version().digest,
            "sock.dev/function": "function",
            "sock.dev/function-name": "hello",
            "sock.dev/handler": "app.handler",
            "sock.dev/port": "8080",
            "sock.dev/timeout-seconds": "60",
            "sock.dev/reuse": "Always",
            "sock.dev/instances": "8",
            "sock.dev/freeze-after-ms": "1000",
            "sock.dev/end-after-ms": "60000",
        })
    );
    assert_eq!(
        template["spec"],
        json!({
            "runtimeClassName": "sock",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "nodeSelector": { "disk": "ssd" },
            "tolerations": [{ "key": "gpu" }],
            "terminationGracePeriodSeconds": 65,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 1_805_342_219, "runAsGroup": 1_805_342_219, "fsGroup": 1_805_342_219,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "function",
                "image": "python:3.11",
                "command": ["python3", "/opt/sock/python/interpreter.py"],
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [{ "name": "code", "mountPath": "/srv/function", "readOnly": true }],
            }],
            "volumes": [{ "name": "code", "configMap": { "name": code_name("hello") } }],
        })
    );
    let code = server.get("configmaps", &code_name("hello")).unwrap();
    assert_eq!(code["data"], json!({ "app.py": CODE }));
    assert_eq!(code["immutable"], true);
    assert_eq!(server.get("configmaps", "hello-code-old"), None);
    assert!(server.get("configmaps", "theirs").is_some());

    let status = &function["status"];
    assert_eq!(status["url"], "http://hello.shop.svc.cluster.local");
    assert_eq!(status["selector"], "sock.dev/function=hello");
    assert_eq!(status["observedGeneration"], 1);
    assert_eq!(condition(&function, "PackageSetReady").0, "True");
    let (holds, reason, message) = condition(&function, "Ready");
    assert_eq!(
        (holds.as_str(), reason.as_str(), message.as_str()),
        ("False", "WaitingForPods", "0 of 1 pods serve")
    );
    assert_eq!(
        crate::tests::events(&server, "hello")[0].0,
        "WaitingForPods"
    );
}

/// Pods of Functions that leave it as it is must not be replaced by an operator that is the first to know of it.
#[tokio::test]
async fn an_idle_policy_is_told_to_the_shim_where_it_is_not_the_usual() {
    let server = server();
    for (policy, told) in [("Fixed", Value::Null), ("Learned", json!("Learned"))] {
        let mut function = crate::tests::function("hello");
        function["spec"]["idle"] = json!({ "policy": policy });
        server.put(function);
        reconciled(&server).await;
        let template = server.get("deployments", "hello").unwrap()["spec"]["template"].clone();
        assert_eq!(
            template["metadata"]["annotations"]["sock.dev/idle-policy"],
            told
        );
    }
}

#[tokio::test]
async fn a_missing_package_set_is_said_and_nothing_is_started() {
    let server = server();
    server.remove("packagesets", "plain");
    let (holds, reason, message) = condition(&reconciled(&server).await, "Ready");
    assert_eq!(
        (holds.as_str(), reason.as_str()),
        ("False", "PackageSetMissing")
    );
    assert!(
        message.contains("plain") && message.contains("create it"),
        "{message}"
    );
    assert_eq!(server.get("deployments", "hello"), None);
}

#[tokio::test]
async fn a_deployment_outlives_its_package_set() {
    let server = server();
    reconciled(&server).await;
    crate::tests::roll_out(&server, "hello");
    server.remove("packagesets", "plain");
    let function = reconciled(&server).await;
    let template = server.get("deployments", "hello").unwrap()["spec"]["template"].clone();
    assert_eq!(
        template["metadata"]["annotations"]["sock.dev/digest"],
        version().digest
    );
    assert_eq!(template["spec"]["nodeSelector"], json!({ "disk": "ssd" }));
    assert_eq!(
        condition(&function, "PackageSetReady").1,
        "PackageSetMissing"
    );
    assert_eq!(condition(&function, "Ready").1, "Serving");
}

#[tokio::test]
async fn a_service_of_somebody_else_is_left_alone() {
    let server = server();
    server.put(json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "hello" } }));
    let (holds, reason, message) = condition(&reconciled(&server).await, "Ready");
    assert_eq!(
        (holds.as_str(), reason.as_str(), message.as_str()),
        (
            "False",
            "NameTaken",
            "Service hello exists and does not belong to this resource: delete it, or choose another name"
        )
    );
    assert_eq!(server.get("services", "hello").unwrap().get("spec"), None);
}

#[tokio::test]
async fn a_namespace_that_goes_away_is_left_alone() {
    let server = server();
    server.edit("namespaces", NAMESPACE, |it| {
        it["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
    });
    reconciled(&server).await;
    assert_eq!(server.writes(), [""; 0]);
}

fn judged(
    function: &Function,
    source: Option<Value>,
    package_set: Option<Value>,
) -> validate::Verdict {
    let found = dereference::Found {
        source: source.map(|source| serde_json::from_value(source).unwrap()),
        package_set: package_set.map(|set| serde_json::from_value(set).unwrap()),
        ..dereference::Found::default()
    };
    validate::validate(function, &found)
}

#[test]
fn a_config_map_must_have_the_handlers_module() {
    let function = function(json!({ "configMap": { "name": "code" } }));
    let absent = judged(&function, None, None);
    assert_eq!(
        (absent.code, absent.source.reason),
        (None, "ConfigMapMissing")
    );

    let other = judged(&function, Some(json!({ "data": { "main.py": "" } })), None);
    assert_eq!(other.source.reason, "KeyMissing");
    assert!(
        other.source.message.contains("app.py"),
        "{}",
        other.source.message
    );

    let right = judged(
        &function,
        Some(json!({ "data": { "app.py": "a" }, "binaryData": { "model": "AAEC" } })),
        None,
    );
    assert_eq!(right.source.reason, "Found");
}

#[test]
fn a_changed_file_changes_the_pods_and_a_changed_label_does_not() {
    let function = function(json!({ "configMap": { "name": "code" } }));
    let template = |config_map: Value| {
        let verdict = judged(&function, Some(config_map), Some(ready_set("True")));
        build::build(&function, "t", &verdict)
            .deployment
            .unwrap()
            .spec
            .unwrap()
            .template
    };
    let first = template(json!({ "data": { "app.py": "a", "b": "c" } }));
    assert_eq!(
        first,
        template(
            json!({ "data": { "app.py": "a", "b": "c" }, "metadata": { "labels": { "x": "y" } } })
        )
    );
    assert_ne!(
        first,
        template(json!({ "data": { "app.py": "a", "b": "d" } }))
    );
    assert_ne!(
        first,
        template(json!({ "data": { "app.py": "a" }, "binaryData": { "b": "Yw==" , "e": "" } }))
    );
}

#[test]
fn the_former_version_serves_while_a_new_one_is_made() {
    let mut set = ready_set("False");
    set["spec"]["image"] = json!("python:3.12");
    set["status"]["digest"] = json!("new");
    let verdict = judged(&inline(), None, Some(set));
    assert_eq!(verdict.placement.unwrap().version, version());
    assert_eq!(
        (verdict.packages.holds, verdict.packages.reason),
        (Some(true), "FormerVersion")
    );
}

#[test]
fn an_import_that_fails_is_what_the_conditions_say() {
    let function = inline();
    let verdict = judged(&function, None, Some(ready_set("True")));
    let deployment = build::build(&function, "t", &verdict).deployment.unwrap();
    let template = deployment.spec.as_ref().unwrap().template.clone();
    let pod = serde_json::from_value(json!({
        "metadata": { "name": "hello-1", "annotations": template.metadata.unwrap().annotations },
        "spec": template.spec,
        "status": { "containerStatuses": [{
            "name": "function", "image": "", "imageID": "", "ready": false, "restartCount": 2,
            "state": { "waiting": { "reason": "CrashLoopBackOff" } },
            "lastState": { "terminated": { "exitCode": 128, "reason": "StartError", "message": "NameError: name 'x' is not defined (app.py:3)" } },
        }] },
    }))
    .unwrap();
    let observed = update_status::Observed {
        deployment: Some(deployment),
        pods: vec![pod],
        failed: None,
    };
    let status = update_status::status(&function, &verdict, &observed, Timestamp::now());
    for (type_, reason) in [("Ready", "StartFailed"), ("HandlerImported", "StartFailed")] {
        let condition = crate::condition::find(&status.conditions, type_).unwrap();
        assert_eq!(condition.reason, reason);
        assert_eq!(
            condition.message,
            "NameError: name 'x' is not defined (app.py:3)"
        );
    }
}

/// What a node that was away, or was short of something, leaves of a pod: whoever looks at it sees why, and a ReplicaSet has made
/// another one. It stays until somebody deletes it.
#[test]
fn a_pod_that_was_replaced_is_no_failure_of_the_function() {
    let function = inline();
    let verdict = judged(&function, None, Some(ready_set("True")));
    let mut deployment = build::build(&function, "t", &verdict).deployment.unwrap();
    let template = deployment.spec.as_ref().unwrap().template.clone();
    let pod = |name: &str, status: Value| -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": name, "annotations": template.metadata.as_ref().unwrap().annotations },
            "spec": template.spec, "status": status,
        }))
        .unwrap()
    };
    let ended = [
        json!({ "phase": "Failed", "reason": "NodeAffinity", "message": "Pod was rejected" }),
        json!({
            "phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory.",
            "containerStatuses": [{
                "name": "function", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "terminated": { "exitCode": 137, "reason": "Error" } },
            }],
        }),
    ];
    let ready =
        json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] });
    for (status, count, reason) in [
        (ready, 1, "Serving"),
        (json!({ "phase": "Pending" }), 0, "StartFailed"),
    ] {
        deployment.status = serde_json::from_value(json!({
            "replicas": 1, "updatedReplicas": 1, "readyReplicas": count, "observedGeneration": 1,
        }))
        .unwrap();
        for ended in &ended {
            let observed = update_status::Observed {
                deployment: Some(deployment.clone()),
                pods: vec![
                    pod("hello-1", ended.clone()),
                    pod("hello-2", status.clone()),
                ],
                failed: None,
            };
            let status = update_status::status(&function, &verdict, &observed, Timestamp::now());
            let found = crate::condition::find(&status.conditions, "Ready").unwrap();
            assert_eq!(found.reason, reason, "{}", found.message);
            assert_eq!(status.failures.is_empty(), count == 1);
        }
    }
}
