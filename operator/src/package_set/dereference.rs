//! Fetches what a PackageSet names and what there is of it already.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::ResourceExt as _;
use sock_crds::{PackageSet, PackageSetSpec};

use crate::cluster::{Context, Error};
use crate::contract::{POOL_LABEL, is_child};

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// UID of the namespace.
    pub tenant: String,
    /// The ConfigMap with the requirements, if one is named and there.
    pub config_map: Option<ConfigMap>,
    /// What it extends, nearest first: as far as each is there, at most one more than may be.
    pub ancestors: Vec<PackageSet>,
    /// The ConfigMap with the requirements of the nearest.
    pub parent_config_map: Option<ConfigMap>,
    /// Whether others extend it.
    pub is_extended: bool,
    /// Its DaemonSets: one for each version that is needed.
    pub pools: Vec<DaemonSet>,
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

/// The PackageSet that it extends.
pub fn parent(spec: &PackageSetSpec) -> Option<&str> {
    Some(&spec.extends.as_ref()?.name)
}

/// Most PackageSets that one may extend, directly and by way of others.
pub const MOST_ANCESTORS: usize = 7;

async fn ancestors(
    set: &PackageSet,
    namespace: &str,
    context: &Context,
) -> Result<Vec<PackageSet>, Error> {
    let mut found: Vec<PackageSet> = Vec::new();
    while found.len() <= MOST_ANCESTORS {
        let last = found.last().unwrap_or(set);
        let Some(name) = parent(&last.spec) else {
            break;
        };
        match context.get::<PackageSet>(namespace, name).await? {
            Some(next) => found.push(next),
            None => break,
        }
    }
    Ok(found)
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
    let ancestors = ancestors(set, &namespace, context).await?;
    let named = ancestors
        .first()
        .and_then(|one| self::config_map(&one.spec));
    let parent_config_map = match named {
        Some(name) => context.get(&namespace, name).await?,
        None => None,
    };
    let all = context.all::<PackageSet>(&namespace).await?;
    let is_extended = all.iter().any(|one| parent(&one.spec) == Some(&name));
    let mut pools: Vec<DaemonSet> = context.list(&namespace, POOL_LABEL, &name).await?;
    pools.retain(|pool| is_child(&pool.metadata, set.uid().as_deref()));
    let pods = context.list(&namespace, POOL_LABEL, &name).await?;
    Ok(Some(Found {
        tenant,
        config_map,
        ancestors,
        parent_config_map,
        is_extended,
        pools,
        pods,
    }))
}
