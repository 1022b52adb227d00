//! Fetches what a PackageSet names and what there is of it already.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::ResourceExt as _;
use sock_crds::{PackageSet, PackageSetSpec};

use crate::cluster::{Context, Error};
use crate::contract::POOL_LABEL;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// UID of the namespace.
    pub tenant: String,
    /// The ConfigMap with the requirements, if one is named and there.
    pub config_map: Option<ConfigMap>,
    /// The DaemonSet.
    pub pool: Option<DaemonSet>,
    /// Its pods, those of former versions among them.
    pub pods: Vec<Pod>,
}

/// The ConfigMap that the requirements come from.
pub fn config_map(spec: &PackageSetSpec) -> Option<&str> {
    Some(
        &spec
            .requirements
            .as_ref()?
            .config_map_key_ref
            .as_ref()?
            .name,
    )
}

/// Fetches it all; none if the namespace is going away.
pub async fn dereference(set: &PackageSet, context: &Context) -> Result<Option<Found>, Error> {
    let name = set.name_any();
    let namespace = set
        .namespace()
        .ok_or_else(|| Error::NoNamespace(name.clone()))?;
    let Some(tenant) = context.namespace_uid(&namespace).await? else {
        return Ok(None);
    };
    let config_map = match config_map(&set.spec) {
        Some(name) => context.get(&namespace, name).await?,
        None => None,
    };
    let pool = context.get(&namespace, &name).await?;
    let pods = context.list(&namespace, POOL_LABEL, &name).await?;
    Ok(Some(Found {
        tenant,
        config_map,
        pool,
        pods,
    }))
}
