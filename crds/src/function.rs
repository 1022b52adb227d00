//! `Function`: code and a handler that run on a PackageSet.

use k8s_openapi::api::core::v1::{EnvFromSource, EnvVar};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{Condition, Resources, conditions, variables};
use crate::package_set::NodeFailure;

/// Code with a handler, served over HTTP, that holds no interpreter while nobody calls it.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "sock.dev",
    version = "v1alpha1",
    kind = "Function",
    plural = "functions",
    namespaced,
    shortname = "fn",
    category = "sock",
    status = "FunctionStatus",
    derive = "PartialEq",
    doc = "Code with a handler, served over HTTP, that holds no interpreter while nobody calls it",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 50")
        .message(Message::Expression("'metadata.name: ' + self.metadata.name + ' must begin with a letter, consist of a-z, 0-9 and -, and have at most 50 characters'".into())),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Packages", type_ = "string", json_path = ".spec.packageSet"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Handler", type_ = "string", json_path = ".spec.handler", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(
    validation = Rule::new("self.packageSet.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message(Message::Expression("'packageSet: \"' + self.packageSet + '\" is no name of a PackageSet: those begin with a letter and consist of a-z, 0-9 and -'".into())),
    validation = Rule::new("self.handler.matches('^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)+$')")
        .message(Message::Expression("'handler: \"' + self.handler + '\" is not of the form module.function: app.handler is the function handler in app.py'".into())),
    validation = Rule::new("!has(self.source.inline) || self.handler.matches('^[^.]+[.][^.]+$')")
        .message(Message::Expression("'handler: ' + self.handler + ' names a module in a package, which inline code cannot have: use MODULE.FUNCTION'".into())),
    validation = Rule::new("!has(self.idle) || self.idle.freezeAfterMs <= self.idle.endAfterMs")
        .message("idle.freezeAfterMs: must not be more than idle.endAfterMs"),
    validation = Rule::new("!has(self.idle) || self.idle.policy != 'Learned' || self.reuse != 'Never'")
        .message("idle.policy: Learned has nothing to learn of leaves that serve one request each (reuse: Never): leave it out")
)]
pub struct FunctionSpec {
    /// Name of the PackageSet, in the same namespace, that it runs on.
    #[schemars(length(min = 1, max = 50))]
    pub package_set: String,
    /// Its code.
    pub source: Source,
    /// What is called for a request, as `module.function`: `app.handler` is `handler` in `app.py`.
    #[schemars(length(max = 256))]
    pub handler: String,
    /// Environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "variables")]
    pub env: Vec<EnvVar>,
    /// Secrets and ConfigMaps whose keys all become environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub env_from: Vec<EnvFromSource>,
    /// What a pod asks for and may use at most, all its leaves together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Seconds after which a request is answered with 504 and its leaf ended.
    #[serde(default = "minute")]
    #[schemars(range(min = 1, max = 900))]
    pub timeout_seconds: i32,
    /// Whether a leaf serves one request or many.
    #[serde(default)]
    pub reuse: Reuse,
    /// Pods. An autoscaler sets this field by the scale subresource.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10000))]
    pub replicas: i32,
    /// Leaves that a pod runs at most at the same time, each with one request.
    #[serde(default = "eight")]
    #[schemars(range(min = 1, max = 256))]
    pub instances: i32,
    /// What happens to a leaf that has nothing to do.
    #[serde(default)]
    pub idle: Idle,
}

fn minute() -> i32 {
    60
}

fn one() -> i32 {
    1
}

fn eight() -> i32 {
    8
}

/// Where the code is.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.inline) != has(self.configMap)")
        .message("source: set exactly one of inline and configMap"),
    validation = Rule::new("!has(self.inline) || size(self.inline) <= 131072")
        .message("source.inline: more than 131072 characters: put larger code into a ConfigMap (source.configMap) or into a package")
)]
pub struct Source {
    /// The module that the handler names, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1048576))]
    pub inline: Option<String>,
    /// A ConfigMap of the same namespace whose keys are the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapSource>,
}

/// A ConfigMap whose keys are the files of a Function.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapSource {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Whether a leaf serves one request or many.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Reuse {
    /// A leaf serves requests one after the other, until it has been idle for long.
    #[default]
    Always,
    /// Every request gets a leaf of its own.
    Never,
}

impl Reuse {
    /// The word as users write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::Never => "Never",
        }
    }
}

/// What happens to a leaf that has nothing to do.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Idle {
    /// Milliseconds until it is frozen: it uses no CPU, and goes on at once.
    #[schemars(range(min = 10, max = 86_400_000))]
    pub freeze_after_ms: i32,
    /// Milliseconds until it is ended: it uses no memory, and the next request forks.
    #[schemars(range(min = 10, max = 86_400_000))]
    pub end_after_ms: i32,
    /// Whether `endAfterMs` always holds, or only until enough is known of the times between requests. What is learned can keep a
    /// leaf longer than `endAfterMs`, end it sooner, though not before `freezeAfterMs`, and make one ahead of a request.
    pub policy: IdlePolicy,
}

/// How long a leaf that has nothing to do is kept.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum IdlePolicy {
    /// Always as long.
    #[default]
    Fixed,
    /// As long as the times between requests so far make the next one likely, and made again ahead of it after a longer pause.
    Learned,
}

impl IdlePolicy {
    /// The word as users write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Fixed => "Fixed",
            Self::Learned => "Learned",
        }
    }
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            freeze_after_ms: 1000,
            end_after_ms: 60_000,
            policy: IdlePolicy::default(),
        }
    }
}

/// What became of a Function.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionStatus {
    /// The `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `PackageSetReady`, `SourceFound`, `HandlerImported`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// Address inside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Pods that exist.
    #[serde(default)]
    pub replicas: i32,
    /// Pods that serve.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Label selector of its pods, for autoscalers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Pods that fail, with the line that says why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<NodeFailure>,
}
