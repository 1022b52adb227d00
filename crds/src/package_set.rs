//! `PackageSet`: an image with Python, the packages to install beside it, and the modules to import ahead.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::fields::{Condition, Resources, conditions, modules};

/// One pinned and hashed requirement, as pip and uv read it: `name[extras]==version ; marker --hash=sha256:…`.
/// The marker has no `-`, so that no option can hide in it.
const REQUIREMENT: &str = r#"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(\[[A-Za-z0-9._, -]+\])?==[0-9A-Za-z.!+_]+( *; *[A-Za-z0-9_.<>=!~'"(), ]+)?( +--hash=sha256:[0-9a-f]{64})+$"#;

/// Python packages that are installed on every node that should serve them, imported, and kept warm.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "sock.dev",
    version = "v1alpha1",
    kind = "PackageSet",
    plural = "packagesets",
    namespaced,
    shortname = "pkgs",
    category = "sock",
    status = "PackageSetStatus",
    derive = "PartialEq",
    doc = "Python packages that are installed on every node that should serve them, imported, and kept warm",
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 50")
        .message(Message::Expression("'metadata.name: ' + self.metadata.name + ' must begin with a letter, consist of a-z, 0-9 and -, and have at most 50 characters'".into())),
    validation = Rule::new("!has(self.spec.extends) || self.spec.extends.name != self.metadata.name")
        .message(Message::Expression("'extends.name: ' + self.metadata.name + ' is this PackageSet: name another one'".into())),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.readyNodes"),
    printcolumn(name = "Wanted", type_ = "integer", json_path = ".status.desiredNodes"),
    printcolumn(name = "Import ms", type_ = "integer", json_path = ".status.importMillis"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Extends", type_ = "string", json_path = ".spec.extends.name", priority = 1),
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.image", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct PackageSetSpec {
    /// Image with Python 3.10 or later, in which the Functions run.
    #[schemars(length(min = 1, max = 512))]
    pub image: String,
    /// A PackageSet with the same image whose packages are all among these, in the same versions: the zygote is forked from
    /// that one's, shares its memory, and imports what is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extends: Option<Extends>,
    /// Packages to install beside those of the image; none if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requirements: Option<Requirements>,
    /// Where packages come from; the Python Package Index if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Index>,
    /// Modules that the zygote imports, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "imports")]
    pub imports: Vec<String>,
    /// Python code that the zygote runs repeatedly after the imports, and each spare once, so that what packages do at
    /// their first use is done before a request comes: a small example of what Functions do with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 8192))]
    pub warm_up: Option<String>,
    /// Nodes that keep it warm; all that sock is installed on if left out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that it tolerates, and with it its Functions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// What the installer and the zygote ask for and may use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Leaves that are kept ahead on each node.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub spares: i32,
    /// Modules whose threads are accepted in the zygote, though a fork leaves them behind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "accepted_threads")]
    pub accepted_threads: Vec<String>,
}

fn one() -> i32 {
    1
}

fn imports(_: &mut SchemaGenerator) -> Schema {
    modules("Modules that the zygote imports, in this order.", 256)
}

fn accepted_threads(_: &mut SchemaGenerator) -> Schema {
    modules(
        "Modules whose threads are accepted in the zygote, though a fork leaves them behind.",
        64,
    )
}

/// A PackageSet of the same namespace.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Extends {
    /// Its name.
    #[schemars(length(min = 1, max = 50))]
    pub name: String,
}

/// Packages, each pinned to a version and to the hashes of its files.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.lines) != has(self.configMapKeyRef)")
    .message("requirements: set exactly one of lines and configMapKeyRef"))]
pub struct Requirements {
    /// Lines of a requirements file: `name==version --hash=sha256:…`, all dependencies included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "lines")]
    pub lines: Option<Vec<String>>,
    /// A requirements file in a ConfigMap of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<ConfigMapKeyRef>,
}

fn lines(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "description": "Lines of a requirements file: `name==version --hash=sha256:…`, all dependencies included.",
        "maxItems": 500,
        "items": {
            "type": "string",
            "maxLength": 16384,
            "pattern": REQUIREMENT,
            // The pattern decides; these say in words what it asks for.
            "x-kubernetes-validations": [
                {
                    "rule": "self.contains('==')",
                    "message": "a requirement must be pinned, as NAME==VERSION: `uv pip compile --generate-hashes` writes such lines",
                },
                {
                    "rule": "self.contains('--hash=sha256:')",
                    "message": "a requirement must carry the hashes of its files, as NAME==VERSION --hash=sha256:...: `uv pip compile --generate-hashes` writes such lines",
                },
            ],
        },
    })
}

/// A key of a ConfigMap of the same namespace.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKeyRef {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// A package index.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.url.matches('^https?://[^@ ]+$')")
    .message(Message::Expression("'index.url: \"' + self.url + '\" must begin with http:// or https:// and hold no user or password: those go into a Secret, which index.secretRef names'".into())))]
pub struct Index {
    /// Address of the index in the simple form (PEP 503).
    #[schemars(length(max = 2048))]
    pub url: String,
    /// A Secret of the same namespace with keys `username` and `password` (`kubernetes.io/basic-auth`): the index's
    /// credentials. Only the installer gets them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// A Secret of the same namespace.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What became of a PackageSet.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PackageSetStatus {
    /// The `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Installed`, `RequirementsFound`, `RolledOut`, and `ParentReady` where it extends another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// Nodes that should keep it warm.
    #[serde(default)]
    pub desired_nodes: i32,
    /// Nodes that keep its present version warm.
    #[serde(default)]
    pub ready_nodes: i32,
    /// Longest time that a node took to import the modules, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_millis: Option<i64>,
    /// Digest of the version that the spec asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Digest of the version that Functions run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_digest: Option<String>,
    /// Lock (image and requirements) of the version that Functions run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_lock: Option<String>,
    /// Image of the version that Functions run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_image: Option<String>,
    /// What that version extends, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ready_ancestors: Vec<Ancestor>,
    /// Nodes where it fails, with the line that says why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<NodeFailure>,
}

/// A version of a PackageSet that another extends, itself or by way of others.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ancestor {
    /// Digest of the version.
    pub digest: String,
    /// Its lock (image and requirements).
    pub lock: String,
}

/// Why a pod of a resource does not run.
#[derive(
    Clone, Debug, Default, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "camelCase")]
pub struct NodeFailure {
    /// Name of the node.
    pub node: String,
    /// Name of the pod.
    pub pod: String,
    /// The line to act on.
    pub message: String,
}
