//! Reconciles a PackageSet: one DaemonSet whose pods install the packages and keep them imported.

mod apply;
mod build;
mod dereference;
mod status_port;
mod update_status;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Client, ResourceExt as _};
use sock_crds::PackageSet;

use crate::cluster::{Context, Error};
use crate::contract::POOL_LABEL;

/// A look at what no watch tells of.
const AGAIN: Duration = Duration::from_secs(300);

/// Runs the controller; it ends only if all of its watches end.
pub async fn run(client: Client, context: Arc<Context>) {
    let controller = Controller::new(
        Api::<PackageSet>::all(client.clone()),
        watcher::Config::default(),
    );
    let sets = controller.store();
    controller
        .owns(
            Api::<DaemonSet>::all(client.clone()),
            watcher::Config::default().labels(POOL_LABEL),
        )
        .watches(
            Api::<PartialObjectMeta<Pod>>::all(client.clone()),
            watcher::Config::default().labels(POOL_LABEL),
            |pod| {
                let name = pod.labels().get(POOL_LABEL).cloned()?;
                Some(ObjectRef::new(&name).within(&pod.namespace()?))
            },
        )
        .watches(
            Api::<PartialObjectMeta<ConfigMap>>::all(client),
            watcher::Config::default(),
            move |config_map| {
                let (namespace, name) = (config_map.namespace(), config_map.name_any());
                let uses = |set: &Arc<PackageSet>| {
                    set.namespace() == namespace
                        && dereference::config_map(&set.spec) == Some(name.as_str())
                };
                sets.state()
                    .iter()
                    .filter(|set| uses(set))
                    .map(|set| ObjectRef::from_obj(&**set))
                    .collect::<Vec<_>>()
            },
        )
        .run(reconcile, retry, context)
        .for_each(|outcome| async move {
            if let Err(error) = outcome {
                tracing::debug!(%error, "package sets");
            }
        })
        .await;
}

fn retry(set: Arc<PackageSet>, error: &Error, _: Arc<Context>) -> Action {
    tracing::warn!(package_set = %set.name_any(), namespace = set.namespace(), "{error}");
    Action::requeue(Duration::from_secs(15))
}

async fn reconcile(set: Arc<PackageSet>, context: Arc<Context>) -> Result<Action, Error> {
    let measure = context.metrics.reconciling("PackageSet");
    let outcome = steps(&set, &context).await;
    measure.done(outcome.is_ok());
    outcome
}

/// Fetches what is referenced, checks it, builds and applies what belongs to it, and reports.
async fn steps(set: &PackageSet, context: &Context) -> Result<Action, Error> {
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let Some(found) = dereference::dereference(set, context).await? else {
        return Ok(Action::await_change());
    };
    let wanted = validate::validate(set, &found);
    let applied = match &wanted {
        Ok(wanted) => apply::apply(
            set,
            &build::build(set, &found.tenant, wanted),
            &found,
            context,
        )
        .await
        .map(Some),
        Err(_) => Ok(None),
    };
    let (pool, failed) = match applied {
        Ok(pool) => (pool.or(found.pool), None),
        Err(error) => (found.pool, Some(error)),
    };
    let observed = update_status::Observed {
        pool,
        pods: found.pods,
        failed: failed.as_ref(),
    };
    update_status::update_status(set, wanted, observed, context).await?;
    match failed {
        // Somebody else's object: nothing tells when it goes.
        Some(Error::Taken { .. }) => Ok(Action::requeue(Duration::from_secs(30))),
        Some(error) => Err(error),
        None => Ok(Action::requeue(AGAIN)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
