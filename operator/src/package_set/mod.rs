//! Reconciles a PackageSet: a DaemonSet whose pods install the packages and keep them imported, and those of former
//! versions as long as they are needed.

mod apply;
mod build;
mod dereference;
mod former;
mod status_port;
mod update_status;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::ResourceExt as _;
use sock_crds::{Condition, PackageSet, PackageSetStatus};

use crate::cluster::{Context, Error};
use crate::contract::{FIELD_MANAGER, POOL_LABEL};
use crate::controller::{Meta, Reconciled, Watches};

/// Runs the controller until it is dropped.
pub async fn run(context: Arc<Context>) {
    Watches::<PackageSet>::new(context)
        .owns::<Meta<DaemonSet>>()
        .owns::<Meta<Pod>>()
        // Who runs on a former version is either a pod of a Function or of another PackageSet.
        .goes::<Meta<Pod>>(FIELD_MANAGER, former::has_former)
        .names::<Meta<ConfigMap>>(|set, name| dereference::config_map(&set.spec) == Some(name))
        .names_its_kind(|set| dereference::parent(&set.spec))
        .run()
        .await;
}

impl Reconciled for PackageSet {
    const LABEL: &'static str = POOL_LABEL;
    const AGAIN: Duration = Duration::from_secs(300);

    fn conditions(status: &PackageSetStatus) -> &Vec<Condition> {
        &status.conditions
    }

    fn conditions_mut(status: &mut PackageSetStatus) -> &mut Vec<Condition> {
        &mut status.conditions
    }

    /// Fetches what is referenced, checks it, builds and applies what belongs to it, and reports.
    async fn steps(&self, context: &Context) -> Result<Option<Error>, Error> {
        let Some(found) = dereference::dereference(self, context).await? else {
            return Ok(None);
        };
        let wanted = validate::validate(self, &found);
        let applied = match &wanted {
            Ok(wanted) => {
                let children = build::build(self, &found.tenant, wanted);
                apply::apply(self, &children, &found, context).await
            }
            Err(_) => Ok(None),
        };
        let (pool, failed) = match applied {
            Ok(pool) => (pool, None),
            Err(error) if context.tells_of(self, &error) => (None, Some(error)),
            Err(error) => return Err(error),
        };
        let (pool, users) = match &wanted {
            Ok(wanted) => {
                let present = build::pool_name(self, &wanted.version);
                let there = found.pools.iter().find(|it| it.name_any() == present);
                let users = former::users(self, &found, wanted, context).await?;
                (pool.or_else(|| there.cloned()), users)
            }
            Err(_) => (None, former::Users::new()),
        };
        let observed = update_status::Observed {
            pool,
            pools: found.pools,
            users,
            pods: found.pods,
            failed: failed.as_ref(),
        };
        let (status, former) = update_status::status(self, &wanted, &observed).await;
        // Functions learn of the new version before the former goes.
        context.report(self, status).await?;
        former::retire(self, &former, context).await?;
        Ok(failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
