//! Fields that both resources have.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EnvVar, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// What a container asks for and may use at most.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.requests) || !has(self.limits) || !('cpu' in self.requests) || !('cpu' in self.limits) || quantity(string(self.requests['cpu'])).compareTo(quantity(string(self.limits['cpu']))) <= 0")
        .message("requests.cpu is more than limits.cpu: lower the request or raise the limit"),
    validation = Rule::new("!has(self.requests) || !has(self.limits) || !('memory' in self.requests) || !('memory' in self.limits) || quantity(string(self.requests['memory'])).compareTo(quantity(string(self.limits['memory']))) <= 0")
        .message("requests.memory is more than limits.memory: lower the request or raise the limit"),
    validation = Rule::new("!has(self.requests) || !has(self.limits) || !('ephemeral-storage' in self.requests) || !('ephemeral-storage' in self.limits) || quantity(string(self.requests['ephemeral-storage'])).compareTo(quantity(string(self.limits['ephemeral-storage']))) <= 0")
        .message("requests.ephemeral-storage is more than limits.ephemeral-storage: lower the request or raise the limit"),
    validation = Rule::new("!has(self.limits) || !('memory' in self.limits) || quantity(string(self.limits['memory'])).compareTo(quantity('16Mi')) >= 0")
        .message("limits.memory is less than an interpreter needs: give at least 16Mi (m means thousandths of a byte, M and Mi mean megabytes)")
)]
pub struct Resources {
    /// What the scheduler sets aside, by name: cpu, memory, ephemeral-storage.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub requests: BTreeMap<String, IntOrString>,
    /// What is never exceeded, by name: cpu, memory, ephemeral-storage.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub limits: BTreeMap<String, IntOrString>,
}

impl Resources {
    /// The same in the form that a container has it.
    pub fn requirements(&self) -> ResourceRequirements {
        let quantities = |of: &BTreeMap<String, IntOrString>| {
            (!of.is_empty()).then(|| {
                of.iter()
                    .map(|(name, amount)| {
                        let amount = match amount {
                            IntOrString::Int(number) => number.to_string(),
                            IntOrString::String(text) => text.clone(),
                        };
                        (name.clone(), Quantity(amount))
                    })
                    .collect()
            })
        };
        ResourceRequirements {
            requests: quantities(&self.requests),
            limits: quantities(&self.limits),
            ..ResourceRequirements::default()
        }
    }
}

/// A map of quantities: `cpu: 1` is as good as `cpu: "1"`. Kubernetes itself says so in its own schemas by this extension.
fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 8,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "maxLength": 32,
            "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
        },
        "x-kubernetes-validations": [{
            "rule": "self.all(name, name in ['cpu', 'memory', 'ephemeral-storage'] || name.contains('/'))",
    "message": "a name is not cpu, memory, ephemeral-storage or a device of the form vendor.example/name",
        }],
    })
}

/// Environment variables, keyed by name: the API server refuses two of one name, and names the field.
pub(crate) fn variables(generator: &mut SchemaGenerator) -> Schema {
    let mut item = <EnvVar as JsonSchema>::json_schema(generator).to_value();
    item["properties"]["name"]["minLength"] = json!(1);
    item["properties"]["name"]["maxLength"] = json!(256);
    item["properties"]["name"]["pattern"] = json!("^[^=\\s]+$");
    item["x-kubernetes-validations"] = json!([{
        "rule": "!has(self.value) || size(self.value) == 0 || !has(self.valueFrom)",
        "messageExpression": "'env ' + self.name + ': set value or valueFrom, not both'",
    }]);
    json_schema!({
        "type": "array",
        "description": "Environment variables, each name once.",
        "maxItems": 256,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
        "items": item,
    })
}

/// Schema of `metav1.Condition` with its list keyed by type, so that several writers may each own theirs.
pub(crate) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": { "type": "string", "maxLength": 316 },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "reason": { "type": "string", "minLength": 1, "maxLength": 1024 },
                "message": { "type": "string", "maxLength": 32768 },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
            },
        },
    })
}

/// A module's dotted name.
const MODULE: &str = "^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*$";

/// A list of modules.
pub(crate) fn modules(description: &str, items: u32) -> Schema {
    json_schema!({
        "type": "array",
        "description": description,
        "maxItems": items,
        "items": {
            "type": "string",
            "maxLength": 256,
            "x-kubernetes-validations": [{
                "rule": format!("self.matches('{MODULE}')"),
                "messageExpression": "'\"' + self + '\" is no name of a module: give names as import statements have them, like json or scipy.stats'",
            }],
        },
    })
}
