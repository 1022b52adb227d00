//! Fields that both resources have.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// What a container asks for and may use at most.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
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
        "maxProperties": 16,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
        },
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

/// The text of a schema's `pattern`, kept as a type so that a list's items can carry it.
pub(crate) fn strings(description: &str, pattern: &'static str, length: u32, items: u32) -> Schema {
    let description: Cow<'_, str> = description.into();
    json_schema!({
        "type": "array",
        "description": description,
        "maxItems": items,
        "items": { "type": "string", "maxLength": length, "pattern": pattern },
    })
}
