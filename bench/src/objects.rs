//! The Kubernetes objects that are measured, and their peers.

use serde_json::{Value, json};

/// What the harness calls the image that both sides run; the published one of this name is as good.
pub const IMAGE: &str = "docker.io/library/python:3.13-slim-trixie";
/// Of Function pods and of their peers.
pub const PORT: u16 = 8080;

const SERVER: &str = include_str!("../peer/server.py");

/// A namespace of sock's tenants.
#[must_use]
pub fn tenant(name: &str) -> Value {
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A namespace whose pods may mount the node's directories, as the peers do.
#[must_use]
pub fn unrestricted(name: &str) -> Value {
    let labels = json!({"pod-security.kubernetes.io/enforce": "privileged"});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A PackageSet with its pool on one node.
#[must_use]
pub fn package_set(namespace: &str, name: &str, node: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["image"] = IMAGE.into();
    spec["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    object("PackageSet", namespace, name, &spec)
}

/// A Function.
#[must_use]
pub fn function(namespace: &str, name: &str, spec: &Value) -> Value {
    object("Function", namespace, name, spec)
}

fn object(kind: &str, namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "sock.dev/v1alpha1", "kind": kind,
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}

/// The same code in an ordinary container on runc, with the packages from the directory of the node
/// in which sock has installed them: the same files, in the same page cache.
#[derive(Debug, Clone)]
pub struct Peer<'a> {
    /// Of an [`unrestricted`] namespace.
    pub namespace: &'a str,
    /// Of the ConfigMaps and the pods.
    pub name: &'a str,
    /// To run on.
    pub node: &'a str,
    /// Same as the Function's.
    pub image: &'a str,
    /// Same as the Function's.
    pub handler: &'a str,
    /// Directory of the installed packages on the node.
    pub packages: Option<&'a str>,
    /// Or it installs them itself.
    pub install: Option<Install<'a>>,
    /// `env` of a container: same as the Function's, or null.
    pub env: &'a Value,
    /// `resources` of a container: same as the Function's, or null.
    pub resources: &'a Value,
}

/// Packages that a container installs when it starts, with the installer of the node's own cache and nothing kept.
#[derive(Debug, Clone, Copy)]
pub struct Install<'a> {
    /// Where from.
    pub index: &'a str,
    /// Pinned and hashed.
    pub requirements: &'a str,
}

impl Install<'_> {
    /// What a shell does before it becomes the server.
    fn script(self) -> String {
        format!(
            "/opt/sock/bin/uv pip install --quiet --no-cache --no-config --require-hashes --only-binary :all: \
             --python \"$(command -v python3)\" --target /tmp/packages --default-index {} \
             --requirement /srv/peer/requirements.txt && exec \"$@\"",
            self.index
        )
    }
}

impl Peer<'_> {
    /// The ConfigMap of the server; the one of the code, which must be called `NAME-code`, has the
    /// content `data` (and `binaryData`) of `code`.
    #[must_use]
    pub fn config_maps(&self, code: &Value) -> [Value; 2] {
        let metadata = |suffix: &str| json!({"namespace": self.namespace, "name": format!("{}-{suffix}", self.name)});
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap"});
        let (mut server, mut function) = (map.clone(), map);
        server["metadata"] = metadata("server");
        server["data"] = json!({"server.py": SERVER});
        if let Some(install) = self.install {
            server["data"]["requirements.txt"] = install.requirements.into();
        }
        function["metadata"] = metadata("code");
        for part in ["data", "binaryData"] {
            if !code[part].is_null() {
                function[part] = code[part].clone();
            }
        }
        [server, function]
    }

    /// A pod, none of the deployment's.
    #[must_use]
    pub fn pod(&self, name: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": self.namespace, "name": name},
            "spec": self.spec(),
        })
    }

    /// Pods that stay, with the label `peer=NAME`.
    #[must_use]
    pub fn deployment(&self, replicas: usize) -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"peer": self.name}},
                "template": {"metadata": {"labels": {"peer": self.name}}, "spec": self.spec()},
            },
        })
    }

    fn spec(&self) -> Value {
        let mut volumes = vec![
            json!({"name": "server", "configMap": {"name": format!("{}-server", self.name)}}),
            json!({"name": "code", "configMap": {"name": format!("{}-code", self.name)}}),
        ];
        let mut mounts = vec![
            json!({"name": "server", "mountPath": "/srv/peer"}),
            json!({"name": "code", "mountPath": "/srv/function"}),
        ];
        let mut env = vec![json!({"name": "SOCK_PEER_SOURCE", "value": "/srv/function"})];
        env.extend(self.env.as_array().into_iter().flatten().cloned());
        if let Some(packages) = self.packages {
            volumes.push(
                json!({"name": "packages", "hostPath": {"path": packages, "type": "Directory"}}),
            );
            mounts
                .push(json!({"name": "packages", "mountPath": "/opt/packages", "readOnly": true}));
            env.push(json!({"name": "PYTHONPATH", "value": "/opt/packages"}));
        }
        let mut command: Vec<String> = [
            "python3",
            "/srv/peer/server.py",
            self.handler,
            &PORT.to_string(),
        ]
        .map(str::to_owned)
        .into();
        if let Some(install) = self.install {
            volumes.push(
                json!({"name": "programs", "hostPath": {"path": "/opt/sock/bin", "type": "Directory"}}),
            );
            mounts
                .push(json!({"name": "programs", "mountPath": "/opt/sock/bin", "readOnly": true}));
            env.push(json!({"name": "PYTHONPATH", "value": "/tmp/packages"}));
            let shell = [
                "sh".to_owned(),
                "-c".to_owned(),
                install.script(),
                "sh".to_owned(),
            ];
            command.splice(0..0, shell);
        }
        json!({
            "nodeSelector": {"kubernetes.io/hostname": self.node},
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 0,
            "volumes": volumes,
            "containers": [{
                "name": "peer", "image": self.image, "imagePullPolicy": "IfNotPresent",
                "command": command,
                "env": env, "volumeMounts": mounts, "resources": self.resources,
                "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 5},
                "securityContext": {"allowPrivilegeEscalation": false, "seccompProfile": {"type": "RuntimeDefault"}},
            }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_reads_the_packages_that_the_node_has() {
        let peer = Peer {
            namespace: "n",
            name: "p",
            node: "worker",
            image: IMAGE,
            handler: "app.handler",
            packages: Some("/var/lib/sock/cache/t/l/site-packages"),
            install: None,
            env: &Value::Null,
            resources: &Value::Null,
        };
        let pod = peer.pod("p-1");
        let volume = &pod["spec"]["volumes"][2];
        assert_eq!(
            volume["hostPath"]["path"],
            "/var/lib/sock/cache/t/l/site-packages"
        );
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["env"][1]["name"], "PYTHONPATH");
        assert_eq!(container["volumeMounts"][2]["readOnly"], true);
        let plain = Peer {
            packages: None,
            ..peer
        }
        .pod("p-1");
        assert_eq!(plain["spec"]["volumes"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_peer_may_install_what_it_needs() {
        let peer = Peer {
            namespace: "n",
            name: "p",
            node: "w",
            image: IMAGE,
            handler: "a.b",
            packages: None,
            install: Some(Install {
                index: "http://wheels/simple/",
                requirements: "one==1 --hash=sha256:00",
            }),
            env: &Value::Null,
            resources: &Value::Null,
        };
        let [server, _] = peer.config_maps(&json!({"data": {}}));
        assert_eq!(
            server["data"]["requirements.txt"],
            "one==1 --hash=sha256:00"
        );
        let pod = peer.pod("p-1");
        let command = pod["spec"]["containers"][0]["command"].as_array().unwrap();
        assert_eq!(command[..2], ["sh", "-c"]);
        assert!(command[2].as_str().unwrap().ends_with("&& exec \"$@\""));
        assert_eq!(command[3..6], ["sh", "python3", "/srv/peer/server.py"]);
    }

    #[test]
    fn a_peer_gets_the_functions_files() {
        let peer = Peer {
            namespace: "n",
            name: "p",
            node: "w",
            image: IMAGE,
            handler: "a.b",
            packages: None,
            install: None,
            env: &Value::Null,
            resources: &Value::Null,
        };
        let [server, code] =
            peer.config_maps(&json!({"data": {"a.py": ""}, "binaryData": {"m": "AA=="}}));
        assert!(
            server["data"]["server.py"]
                .as_str()
                .unwrap()
                .contains("serve_forever")
        );
        assert_eq!(code["metadata"]["name"], "p-code");
        assert_eq!(code["binaryData"]["m"], "AA==");
    }
}
