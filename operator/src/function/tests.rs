//! Reconciling a Function against an API server that states the calls it expects.

use http::Method;
use serde_json::{Value, json};

use super::*;
use crate::contract::{Version, sha256};
use crate::script::{
    Call, applied, apply, delete, event, get, list, missing, refused, report, server,
};

const NAMESPACE: &str = "/api/v1/namespaces/shop";
const SET: &str = "/apis/sock.dev/v1alpha1/namespaces/shop/packagesets/plain";
const STATUS: &str = "/apis/sock.dev/v1alpha1/namespaces/shop/functions/hello/status";
const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/shop/deployments/hello";
const SERVICE: &str = "/api/v1/namespaces/shop/services/hello";
const PODS: &str = "/api/v1/namespaces/shop/pods";
const CONFIG_MAPS: &str = "/api/v1/namespaces/shop/configmaps";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/shop/events";
const CODE: &str = "def handler(event, context):\n    return 'hello'\n";

fn namespace() -> Call {
    get(
        NAMESPACE,
        json!({ "metadata": { "name": "shop", "uid": "6f0b1f2e-0000-4000-8000-000000000001" } }),
    )
}

fn function(source: Value) -> Function {
    serde_json::from_value(json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "Function",
        "metadata": { "name": "hello", "namespace": "shop", "uid": "f-1", "generation": 3 },
        "spec": { "packageSet": "plain", "handler": "app.handler", "source": source },
    }))
    .unwrap()
}

fn inline() -> Function {
    function(json!({ "inline": CODE }))
}

fn version() -> Version {
    Version::new("python:3.11", "", &["json".to_owned()], "")
}

fn set(ready: &str) -> Value {
    let version = version();
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet",
        "metadata": { "name": "plain", "namespace": "shop" },
        "spec": { "image": "python:3.11", "nodeSelector": { "disk": "ssd" }, "tolerations": [{ "key": "gpu" }] },
        "status": {
            "digest": version.digest, "readyDigest": version.digest, "readyLock": version.lock,
            "readyImage": version.image,
            "conditions": [{ "type": "Ready", "status": ready, "reason": "x", "message": "warm on 2 nodes",
                             "lastTransitionTime": "2024-01-01T00:00:00Z" }],
        },
    })
}

fn ours(kind: &str, name: &str) -> Value {
    json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {
        "name": name, "namespace": "shop",
        "ownerReferences": [{ "apiVersion": "sock.dev/v1alpha1", "kind": "Function", "name": "hello", "uid": "f-1", "controller": true }],
        "labels": { "kind": kind },
    } })
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

fn code_name() -> String {
    format!("hello-code-{}", &sha256(&["app.py", CODE])[..10])
}

fn path(text: String) -> &'static str {
    text.leak()
}

#[tokio::test]
async fn what_belongs_to_a_function_is_applied() {
    let code = path(format!("{CONFIG_MAPS}/{}", code_name()));
    let (context, calls) = server(vec![
        namespace(),
        get(SET, set("True")),
        missing(DEPLOYMENT),
        list(PODS, &[]),
        missing(SERVICE),
        apply(SERVICE),
        missing(code),
        apply(code),
        missing(DEPLOYMENT),
        applied(
            DEPLOYMENT,
            json!({ "observedGeneration": 1, "replicas": 1 }),
        ),
        list(
            CONFIG_MAPS,
            &[
                ours("ConfigMap", &code_name()),
                ours("ConfigMap", "hello-code-old"),
            ],
        ),
        delete("/api/v1/namespaces/shop/configmaps/hello-code-old?"),
        report(STATUS, &inline()),
        event(EVENTS),
    ]);
    steps(&inline(), &context).await.unwrap();
    drop(context);
    let sent = calls.await.unwrap();

    let deployment = &sent[2];
    assert_eq!(deployment["metadata"]["ownerReferences"][0]["uid"], "f-1");
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
            "volumes": [{ "name": "code", "configMap": { "name": code_name() } }],
        })
    );
    assert_eq!(sent[1]["data"], json!({ "app.py": CODE }));
    assert_eq!(sent[1]["immutable"], true);

    let status = &sent[4];
    assert_eq!(status["metadata"]["uid"], "f-1");
    assert_eq!(
        status["status"]["url"],
        "http://hello.shop.svc.cluster.local"
    );
    assert_eq!(status["status"]["selector"], "sock.dev/function=hello");
    assert_eq!(status["status"]["observedGeneration"], 3);
    assert_eq!(condition(status, "PackageSetReady").0, "True");
    assert_eq!(
        condition(status, "Ready"),
        ("False", "WaitingForPods", "0 of 1 pods serve")
    );
    assert_eq!(sent[5]["reason"], "WaitingForPods");
}

#[tokio::test]
async fn a_missing_package_set_is_said_and_nothing_is_started() {
    let code = path(format!("{CONFIG_MAPS}/{}", code_name()));
    let (context, calls) = server(vec![
        namespace(),
        missing(SET),
        missing(DEPLOYMENT),
        list(PODS, &[]),
        get(SERVICE, ours("Service", "hello")),
        apply(SERVICE),
        get(code, ours("ConfigMap", &code_name())),
        apply(code),
        report(STATUS, &inline()),
        event(EVENTS),
    ]);
    steps(&inline(), &context).await.unwrap();
    drop(context);
    let sent = calls.await.unwrap();
    let (holds, reason, message) = condition(&sent[2], "Ready");
    assert_eq!((holds, reason), ("False", "PackageSetMissing"));
    assert!(
        message.contains("plain") && message.contains("create it"),
        "{message}"
    );
}

#[tokio::test]
async fn a_deployment_outlives_its_package_set() {
    let code = path(format!("{CONFIG_MAPS}/{}", code_name()));
    let (function, verdict) = (inline(), {
        let found = dereference::Found {
            package_set: Some(serde_json::from_value(set("True")).unwrap()),
            ..dereference::Found::default()
        };
        validate::validate(&inline(), &found)
    });
    let deployment = build::build(&function, "t", &verdict).deployment.unwrap();
    let mut deployment = serde_json::to_value(&deployment).unwrap();
    deployment["metadata"]["generation"] = json!(1);
    deployment["status"] =
        json!({ "observedGeneration": 1, "replicas": 1, "readyReplicas": 1, "updatedReplicas": 1 });

    let (context, calls) = server(vec![
        namespace(),
        missing(SET),
        get(DEPLOYMENT, deployment.clone()),
        list(PODS, &[]),
        get(SERVICE, ours("Service", "hello")),
        apply(SERVICE),
        get(code, ours("ConfigMap", &code_name())),
        apply(code),
        get(DEPLOYMENT, ours("Deployment", "hello")),
        applied(DEPLOYMENT, deployment["status"].clone()),
        list(CONFIG_MAPS, &[ours("ConfigMap", &code_name())]),
        report(STATUS, &inline()),
        event(EVENTS),
    ]);
    steps(&function, &context).await.unwrap();
    drop(context);
    let sent = calls.await.unwrap();
    let annotations = &sent[2]["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["sock.dev/digest"], version().digest);
    assert_eq!(
        sent[2]["spec"]["template"]["spec"]["nodeSelector"],
        json!({ "disk": "ssd" })
    );
    assert_eq!(
        condition(&sent[3], "PackageSetReady").1,
        "PackageSetMissing"
    );
    assert_eq!(condition(&sent[3], "Ready").1, "Serving");
}

#[tokio::test]
async fn a_service_of_somebody_else_is_left_alone() {
    let (context, calls) = server(vec![
        namespace(),
        get(SET, set("True")),
        missing(DEPLOYMENT),
        list(PODS, &[]),
        get(
            SERVICE,
            json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": { "name": "hello" } }),
        ),
        report(STATUS, &inline()),
        event(EVENTS),
    ]);
    steps(&inline(), &context).await.unwrap();
    drop(context);
    let sent = calls.await.unwrap();
    assert_eq!(
        condition(&sent[0], "Ready"),
        (
            "False",
            "NameTaken",
            "Service hello exists and does not belong to this resource: delete it, or choose another name"
        )
    );
}

#[tokio::test]
async fn a_conflict_is_reported_and_tried_again() {
    let (context, calls) = server(vec![
        namespace(),
        get(SET, set("True")),
        missing(DEPLOYMENT),
        list(PODS, &[]),
        missing(SERVICE),
        refused(Method::PATCH, SERVICE, 409, "Conflict"),
        report(STATUS, &inline()),
        event(EVENTS),
    ]);
    let error = steps(&inline(), &context).await.unwrap_err();
    drop(context);
    assert!(
        error.to_string().starts_with("apply Service hello"),
        "{error}"
    );
    let sent = calls.await.unwrap();
    assert_eq!(condition(&sent[1], "Ready").1, "ApiServerError");
}

#[tokio::test]
async fn a_namespace_that_goes_away_is_left_alone() {
    let (context, calls) = server(vec![get(
        NAMESPACE,
        json!({ "metadata": { "name": "shop", "uid": "n", "deletionTimestamp": "2024-01-01T00:00:00Z" } }),
    )]);
    steps(&inline(), &context).await.unwrap();
    drop(context);
    calls.await.unwrap();
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
        let verdict = judged(&function, Some(config_map), Some(set("True")));
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
    let mut set = set("False");
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
    let verdict = judged(&function, None, Some(set("True")));
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
    let status = update_status::status(
        &function,
        &verdict,
        &observed,
        k8s_openapi::jiff::Timestamp::now(),
    );
    for (type_, reason) in [("Ready", "StartFailed"), ("HandlerImported", "StartFailed")] {
        let condition = crate::condition::find(&status.conditions, type_).unwrap();
        assert_eq!(condition.reason, reason);
        assert_eq!(
            condition.message,
            "NameError: name 'x' is not defined (app.py:3)"
        );
    }
}
