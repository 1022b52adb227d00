//! The resources that users write, `Function` and `PackageSet`, and the rules that the API server checks on them.
//!
//! Types and schemas only: what the operator makes of a resource is the operator's.

#![forbid(unsafe_code)]

mod fields;
mod function;
mod package_set;

pub use fields::{Condition, Resources};
pub use function::{
    ConfigMapSource, Function, FunctionSpec, FunctionStatus, Idle, IdlePolicy, Reuse, Source,
};
pub use package_set::{
    Ancestor, ConfigMapKeyRef, Extends, Index, NodeFailure, PackageSet, PackageSetSpec,
    PackageSetStatus, Requirements, SecretRef,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// The API group of all resources.
pub const GROUP: &str = "sock.dev";

/// The definitions of all resources, as they are installed into a cluster.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![Function::crd(), PackageSet::crd()]
}

/// [`definitions`] as a stream of YAML documents.
pub fn yaml() -> Result<String, serde_yaml_ng::Error> {
    let mut out = String::new();
    for definition in definitions() {
        out.push_str("---\n");
        out.push_str(&serde_yaml_ng::to_string(&definition)?);
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_installed_definitions_are_these() {
        let installed = include_str!("../../manifests/crds.yaml");
        assert!(
            installed == yaml().unwrap(),
            "run: cargo run -p sock-crds > manifests/crds.yaml"
        );
    }

    #[test]
    fn a_function_needs_little_and_gets_the_rest() {
        let function: FunctionSpec = serde_json::from_str(
            r#"{"packageSet":"plain","handler":"app.handler","source":{"inline":"x"}}"#,
        )
        .unwrap();
        assert_eq!(
            (
                function.timeout_seconds,
                function.replicas,
                function.instances
            ),
            (60, 1, 8)
        );
        assert_eq!(
            (function.reuse, function.idle.end_after_ms),
            (Reuse::Always, 60_000)
        );
    }

    #[test]
    fn quantities_may_be_numbers() {
        let resources: Resources =
            serde_json::from_str(r#"{"limits":{"cpu":2,"memory":"1Gi"}}"#).unwrap();
        let limits = resources.requirements().limits.unwrap();
        assert_eq!(
            (limits["cpu"].0.as_str(), limits["memory"].0.as_str()),
            ("2", "1Gi")
        );
    }
}
