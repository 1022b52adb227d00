//! Fetches what a Function names and what there is of it already.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::ResourceExt as _;
use sock_crds::{Function, PackageSet};

use crate::cluster::{Context, Error};
use crate::contract::FUNCTION_LABEL;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// UID of the namespace.
    pub tenant: String,
    /// The PackageSet, if it is there.
    pub package_set: Option<PackageSet>,
    /// The ConfigMap with the code, if one is named and there.
    pub source: Option<ConfigMap>,
    /// The Deployment.
    pub deployment: Option<Deployment>,
    /// Its pods, those of former versions among them.
    pub pods: Vec<Pod>,
}

/// Fetches it all; none if the namespace is going away.
pub async fn dereference(function: &Function, context: &Context) -> Result<Option<Found>, Error> {
    let name = function.name_any();
    let namespace = function
        .namespace()
        .ok_or_else(|| Error::NoNamespace(name.clone()))?;
    let Some(tenant) = context.namespace_uid(&namespace).await? else {
        return Ok(None);
    };
    let package_set = context
        .get::<PackageSet>(&namespace, &function.spec.package_set)
        .await?
        // One that is being deleted takes its pool with it.
        .filter(|set| set.metadata.deletion_timestamp.is_none());
    let source = match &function.spec.source.config_map {
        Some(source) => context.get(&namespace, &source.name).await?,
        None => None,
    };
    let deployment = context.get(&namespace, &name).await?;
    let pods = context.list(&namespace, FUNCTION_LABEL, &name).await?;
    Ok(Some(Found {
        tenant,
        package_set,
        source,
        deployment,
        pods,
    }))
}
