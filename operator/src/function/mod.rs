//! Reconciles a Function: a Deployment of pods that hold a listening socket, and a Service before it.

mod apply;
mod build;
mod dereference;
mod update_status;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::jiff::Timestamp;
use sock_crds::{Condition, Function, FunctionStatus, PackageSet};

use crate::cluster::{Context, Error};
use crate::contract::FUNCTION_LABEL;
use crate::controller::{Meta, Reconciled, Watches};

/// Runs the controller until it is dropped.
pub async fn run(context: Arc<Context>) {
    Watches::<Function>::new(context)
        .owns::<Meta<Deployment>>()
        .owns::<Meta<Service>>()
        .owns::<Meta<Pod>>()
        .names::<PackageSet>(|function, name| function.spec.package_set == name)
        .names::<Meta<ConfigMap>>(|function, name| {
            let source = &function.spec.source.config_map;
            source.as_ref().is_some_and(|source| source.name == name)
        })
        .run()
        .await;
}

impl Reconciled for Function {
    const LABEL: &'static str = FUNCTION_LABEL;
    const AGAIN: Duration = Duration::from_secs(600);

    fn conditions(status: &FunctionStatus) -> &Vec<Condition> {
        &status.conditions
    }

    fn conditions_mut(status: &mut FunctionStatus) -> &mut Vec<Condition> {
        &mut status.conditions
    }

    /// Fetches what is referenced, checks it, builds and applies what belongs to it, and reports.
    async fn steps(&self, context: &Context) -> Result<Option<Error>, Error> {
        let Some(found) = dereference::dereference(self, context).await? else {
            return Ok(None);
        };
        let verdict = validate::validate(self, &found);
        let children = build::build(self, &found.tenant, &verdict);
        let (deployment, failed) = match apply::apply(self, &children, &found, context).await {
            Ok(deployment) => (deployment.or(found.deployment), None),
            Err(error) if context.tells_of(self, &error) => (found.deployment, Some(error)),
            Err(error) => return Err(error),
        };
        let observed = update_status::Observed {
            deployment,
            pods: found.pods,
            failed: failed.as_ref(),
        };
        let status = update_status::status(self, &verdict, &observed, Timestamp::now());
        context.report(self, status).await?;
        Ok(failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
