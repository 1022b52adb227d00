//! Applies what was built, and deletes code that no pod has any more.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use sock_crds::Function;

use super::build::Children;
use super::dereference::Found;
use crate::cluster::{Context, Error};
use crate::contract::FUNCTION_LABEL;
use crate::pods::mounted;

/// Applies it all and returns the Deployment, if that is another now.
///
/// A Deployment that is there is never deleted for want of anything: its pods go on as they are.
pub async fn apply(
    function: &Function,
    children: &Children,
    found: &Found,
    context: &Context,
) -> Result<Option<Deployment>, Error> {
    let owner = function.uid().unwrap_or_default();
    context.apply(&owner, &children.service).await?;
    if let Some(code) = &children.code {
        context.apply(&owner, code).await?;
    }
    let Some(deployment) = &children.deployment else {
        return Ok(None);
    };
    let deployment = context.apply(&owner, deployment).await?;

    let mut needed = mounted(&found.pods);
    needed.extend(children.code.iter().map(ResourceExt::name_any));
    let namespace = function.namespace().unwrap_or_default();
    let label = (FUNCTION_LABEL, function.name_any());
    context
        .prune::<ConfigMap>(&owner, &namespace, (label.0, &label.1), |name| {
            needed.contains(name)
        })
        .await?;
    Ok(deployment)
}
