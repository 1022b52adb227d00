//! Applies what was built, and deletes requirements that no pod has any more.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use sock_crds::PackageSet;

use super::build::Children;
use super::dereference::Found;
use crate::cluster::{Context, Error};
use crate::contract::POOL_LABEL;
use crate::pods::{config_maps, mounted};

/// Applies it all and returns the DaemonSet, if that is another now.
pub async fn apply(
    set: &PackageSet,
    children: &Children,
    found: &Found,
    context: &Context,
) -> Result<Option<DaemonSet>, Error> {
    let owner = set.uid().unwrap_or_default();
    context.apply(&owner, &children.requirements).await?;
    let pool = context.apply(&owner, &children.pool).await?;

    let mut needed = mounted(&found.pods);
    let templates = found.pools.iter().filter_map(|pool| pool.spec.as_ref());
    needed.extend(
        templates
            .filter_map(|spec| spec.template.spec.as_ref())
            .flat_map(config_maps),
    );
    needed.insert(children.requirements.name_any());
    let namespace = set.namespace().unwrap_or_default();
    context
        .prune::<ConfigMap>(&owner, &namespace, (POOL_LABEL, &set.name_any()), |name| {
            needed.contains(name)
        })
        .await?;
    Ok(pool)
}
