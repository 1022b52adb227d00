//! Reconciles a Function: a Deployment of pods that hold a listening socket, and a Service before it.

mod apply;
mod build;
mod dereference;
mod update_status;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Client, ResourceExt as _};
use sock_crds::{Function, PackageSet};

use crate::cluster::{Context, Error};
use crate::contract::FUNCTION_LABEL;

/// A look at what no watch tells of.
const AGAIN: Duration = Duration::from_secs(600);

/// Runs the controller; it ends only if all of its watches end.
pub async fn run(client: Client, context: Arc<Context>) {
    let ours = || watcher::Config::default().labels(FUNCTION_LABEL);
    let controller = Controller::new(
        Api::<Function>::all(client.clone()),
        watcher::Config::default(),
    );
    let (by_set, by_source) = (controller.store(), controller.store());
    controller
        .owns(Api::<Deployment>::all(client.clone()), ours())
        .owns(
            Api::<PartialObjectMeta<Service>>::all(client.clone()),
            ours(),
        )
        .watches(
            Api::<PartialObjectMeta<Pod>>::all(client.clone()),
            ours(),
            |pod| {
                let name = pod.labels().get(FUNCTION_LABEL).cloned()?;
                Some(ObjectRef::new(&name).within(&pod.namespace()?))
            },
        )
        .watches(
            Api::<PackageSet>::all(client.clone()),
            watcher::Config::default(),
            move |set| {
                let (namespace, name) = (set.namespace(), set.name_any());
                let uses = |function: &Arc<Function>| {
                    function.namespace() == namespace && function.spec.package_set == name
                };
                by_set
                    .state()
                    .iter()
                    .filter(|one| uses(one))
                    .map(|one| ObjectRef::from_obj(&**one))
                    .collect::<Vec<_>>()
            },
        )
        .watches(
            Api::<PartialObjectMeta<ConfigMap>>::all(client),
            watcher::Config::default(),
            move |config_map| {
                let (namespace, name) = (config_map.namespace(), config_map.name_any());
                let uses = |function: &Arc<Function>| {
                    function.namespace() == namespace
                        && function
                            .spec
                            .source
                            .config_map
                            .as_ref()
                            .is_some_and(|source| source.name == name)
                };
                by_source
                    .state()
                    .iter()
                    .filter(|one| uses(one))
                    .map(|one| ObjectRef::from_obj(&**one))
                    .collect::<Vec<_>>()
            },
        )
        .run(reconcile, retry, context)
        .for_each(|outcome| async move {
            if let Err(error) = outcome {
                tracing::debug!(%error, "functions");
            }
        })
        .await;
}

fn retry(function: Arc<Function>, error: &Error, _: Arc<Context>) -> Action {
    tracing::warn!(function = %function.name_any(), namespace = function.namespace(), "{error}");
    Action::requeue(Duration::from_secs(15))
}

async fn reconcile(function: Arc<Function>, context: Arc<Context>) -> Result<Action, Error> {
    let measure = context.metrics.reconciling("Function");
    let outcome = steps(&function, &context).await;
    measure.done(outcome.is_ok());
    outcome
}

/// Fetches what is referenced, checks it, builds and applies what belongs to it, and reports.
async fn steps(function: &Function, context: &Context) -> Result<Action, Error> {
    if function.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let Some(found) = dereference::dereference(function, context).await? else {
        return Ok(Action::await_change());
    };
    let verdict = validate::validate(function, &found);
    let children = build::build(function, &found.tenant, &verdict);
    let applied = apply::apply(function, &children, &found, context).await;
    let (deployment, failed) = match applied {
        Ok(deployment) => (deployment.or(found.deployment), None),
        Err(error) => (found.deployment, Some(error)),
    };
    let observed = update_status::Observed {
        deployment,
        pods: found.pods,
        failed: failed.as_ref(),
    };
    update_status::update_status(function, &verdict, &observed, context).await?;
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
