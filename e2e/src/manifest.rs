//! Objects that tests apply.

use serde_json::{Value, json};

/// The Python image of the tests.
pub const PYTHON: &str = "docker.io/library/python:3.13-slim-trixie";
/// An image whose Python is too old for sock.
pub const OLD_PYTHON: &str = "docker.io/library/python:3.9-slim-bullseye";
/// An image with a Python newer than most tests use.
pub const NEW_PYTHON: &str = "docker.io/library/python:3.14-slim-forky";
/// An image whose C library is musl.
pub const MUSL_PYTHON: &str = "docker.io/library/python:3.13-alpine";
/// The busybox image of the tests.
pub const BUSYBOX: &str = "docker.io/library/busybox:1.36";
/// The index that `make install` starts in the cluster.
pub const INDEX: &str = "http://wheels.sock-wheels.svc.cluster.local/simple/";

/// A pod of busybox containers on sock that the restricted standard admits: `(name, shell script)` each.
pub fn busybox(name: &str, containers: &[(&str, &str)]) -> Value {
    let containers: Vec<Value> = containers
        .iter()
        .map(|(name, script)| {
            json!({
                "name": name, "image": BUSYBOX, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                },
            })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "runtimeClassName": "sock",
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 2,
            "automountServiceAccountToken": false,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 1000, "runAsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": containers,
        },
    })
}

/// A server that says where its client comes from, on the nodes' default runtime, with a Service.
pub fn echo(name: &str) -> [Value; 2] {
    let script = "
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.client_address[0].encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever()
";
    let mut pod = busybox(name, &[("echo", "")]);
    let container = &mut pod["spec"]["containers"][0];
    container["image"] = json!(PYTHON);
    container["command"] = json!(["python3", "-u", "-c", script]);
    container["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
    if let Some(spec) = pod["spec"].as_object_mut() {
        spec.remove("runtimeClassName");
    }
    [pod, service(name, 8080)]
}

/// A Service in front of the pods with the label `app`.
pub fn service(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]},
    })
}

/// A PackageSet of the image alone.
pub fn package_set(name: &str, imports: &[&str]) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "PackageSet", "metadata": {"name": name},
        "spec": {"image": PYTHON, "imports": imports},
    })
}

/// A PackageSet with requirements, from the index of the tests.
pub fn package_set_of(name: &str, requirements: &[&str], imports: &[&str]) -> Value {
    let mut set = package_set(name, imports);
    set["spec"]["requirements"] = json!({"lines": requirements});
    set["spec"]["index"] = json!({"url": INDEX});
    set
}

/// Lines of the tests' requirements, those of these packages.
pub fn requirements(packages: &[&str]) -> Vec<&'static str> {
    let lines = include_str!("../images/requirements-science.txt").lines();
    let is_wanted = |line: &&str| {
        let name = line.split_once("==").map(|(name, _)| name);
        name.is_some_and(|name| packages.contains(&name))
    };
    lines.filter(is_wanted).collect()
}

/// A PackageSet with numpy on another image than most tests use, and the line that pins numpy for it.
pub fn numpy_on(image: &str, lines: &str) -> Value {
    let lines: Vec<&str> = lines.lines().filter(|line| line.contains("==")).collect();
    let mut set = package_set_of("numbers", &lines, &["numpy"]);
    set["spec"]["image"] = json!(image);
    set
}

/// A PackageSet with numpy.
pub fn numpy(name: &str) -> Value {
    package_set_of(name, &requirements(&["numpy"]), &["numpy"])
}

/// A Function whose module is `app` and whose handler is `handler`.
pub fn function(name: &str, package_set: &str, code: &str) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": "Function", "metadata": {"name": name},
        "spec": {"packageSet": package_set, "handler": "app.handler", "source": {"inline": code}},
    })
}

/// Keeps a PackageSet, and with it its Functions, to one node.
pub fn only_on(node: &str, mut package_set: Value) -> Value {
    package_set["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    package_set
}

/// Keeps a pod to one node.
pub fn pod_on(node: &str, mut pod: Value) -> Value {
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    pod
}

/// The same Function with fields of its spec set.
pub fn with(mut function: Value, fields: &Value) -> Value {
    if let (Some(spec), Some(fields)) = (function["spec"].as_object_mut(), fields.as_object()) {
        spec.extend(fields.clone());
    }
    function
}
