//! The resources that users write, `Function` and `PackageSet`, and the rules that the API server checks on them.
//!
//! Types and schemas only: what the operator makes of a resource is the operator's.

#![forbid(unsafe_code)]

mod fields;
mod function;
mod package_set;

pub use fields::{Condition, Resources};
pub use function::{ConfigMapSource, Function, FunctionSpec, FunctionStatus, Idle, Reuse, Source};
pub use package_set::{
    ConfigMapKeyRef, Index, NodeFailure, PackageSet, PackageSetSpec, PackageSetStatus, Requirements,
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
