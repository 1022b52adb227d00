//! Decides what a Function's status says.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use sock_crds::{Function, FunctionStatus, NodeFailure};

use super::validate::Verdict;
use crate::cluster::Error;
use crate::condition::{Finding, conditions};
use crate::contract::{FUNCTION_LABEL, annotation};
use crate::pods::failures;

/// What there is of a Function now.
pub struct Observed<'a> {
    /// The Deployment.
    pub deployment: Option<Deployment>,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// Why something could not be applied.
    pub failed: Option<&'a Error>,
}

/// The status that a Function is to have.
pub fn status(
    function: &Function,
    verdict: &Verdict,
    observed: &Observed<'_>,
    now: Timestamp,
) -> FunctionStatus {
    let before = function
        .status
        .as_ref()
        .map_or(&[][..], |status| &status.conditions);
    let name = function.name_any();
    let counts = observed
        .deployment
        .as_ref()
        .and_then(|deployment| deployment.status.clone())
        .unwrap_or_default();
    let current: Vec<&Pod> = observed
        .pods
        .iter()
        .filter(|pod| is_current(pod, observed.deployment.as_ref()))
        .collect();
    let rollout = Rollout {
        wanted: function.spec.replicas,
        ready: counts.ready_replicas.unwrap_or(0),
        updated: counts.updated_replicas.unwrap_or(0),
        seen: observed.deployment.as_ref().is_some_and(|deployment| {
            deployment
                .status
                .as_ref()
                .and_then(|status| status.observed_generation)
                >= deployment.metadata.generation
        }),
        current_ready: current.iter().any(|pod| crate::pods::is_ready(pod)),
    };
    // Of one that has ended for good there is another by then; itself it stays until somebody deletes it.
    let failures = failures(
        current
            .iter()
            .copied()
            .filter(|pod| !(rollout.is_complete() && crate::pods::has_failed(pod))),
    );
    let handler = handler(&rollout, &failures, &function.spec.handler);
    let ready = ready(&rollout, verdict, &failures, observed);
    let findings = [
        ready,
        verdict.packages.clone(),
        verdict.source.clone(),
        handler,
    ];
    FunctionStatus {
        observed_generation: function.metadata.generation,
        conditions: conditions(&findings, before, function.metadata.generation, now),
        url: function
            .namespace()
            .map(|namespace| format!("http://{name}.{namespace}.svc.cluster.local")),
        replicas: counts.replicas.unwrap_or(0),
        ready_replicas: rollout.ready,
        selector: Some(format!("{FUNCTION_LABEL}={name}")),
        failures,
    }
}

/// Whether a pod is of the Deployment's present template: all of sock's annotations are the same. What else a
/// template holds can be told by its mounts.
fn is_current(pod: &Pod, deployment: Option<&Deployment>) -> bool {
    let Some(template) = deployment
        .and_then(|deployment| deployment.spec.as_ref())
        .map(|spec| &spec.template)
    else {
        return false;
    };
    let Some(annotations) = template
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.annotations.as_ref())
    else {
        return false;
    };
    let code = |spec: Option<&k8s_openapi::api::core::v1::PodSpec>| {
        spec.and_then(|spec| {
            spec.volumes
                .iter()
                .flatten()
                .find(|volume| volume.name == "code")?
                .config_map
                .as_ref()
                .map(|it| it.name.clone())
        })
    };
    let same = |key: &&String| pod.annotations().get(*key) == annotations.get(*key);
    annotations
        .keys()
        .filter(|key| key.starts_with("sock.dev/"))
        .all(|key| same(&key))
        && pod.annotations().contains_key(annotation::DIGEST)
        && code(pod.spec.as_ref()) == code(template.spec.as_ref())
}

/// How far the Deployment has come.
#[derive(Clone, Copy, Debug)]
struct Rollout {
    wanted: i32,
    ready: i32,
    updated: i32,
    /// Its controller has seen its present form.
    seen: bool,
    /// A pod of the present template is ready.
    current_ready: bool,
}

impl Rollout {
    /// As many pods as are wanted are ready, and are of the present template.
    fn is_complete(&self) -> bool {
        self.seen && self.ready >= self.wanted && self.updated >= self.wanted
    }
}

fn handler(rollout: &Rollout, failures: &[NodeFailure], handler: &str) -> Finding {
    const TYPE: &str = "HandlerImported";
    if rollout.current_ready {
        Finding::yes(TYPE, "Imported", format!("{handler} was imported"))
    } else if let Some(failure) = failures.first() {
        Finding::no(TYPE, "StartFailed", failure.message.clone())
    } else if rollout.wanted == 0 {
        Finding::unknown(TYPE, "NoReplicas", "spec.replicas is 0: no pod has tried")
    } else {
        Finding::unknown(TYPE, "WaitingForPods", "no pod has started yet")
    }
}

/// Why the API server refuses the Deployment's pods, in its own words: a quota, a range, a policy.
fn refusal(deployment: &Deployment) -> Option<String> {
    let conditions = deployment.status.as_ref()?.conditions.iter().flatten();
    let mut failed = conditions.filter(|it| it.type_ == "ReplicaFailure" && it.status == "True");
    failed.next()?.message.clone()
}

fn ready(
    rollout: &Rollout,
    verdict: &Verdict,
    failures: &[NodeFailure],
    observed: &Observed<'_>,
) -> Finding {
    const TYPE: &str = "Ready";
    if let Some(error) = observed.failed {
        return Finding::no(TYPE, error.reason(), error.to_string());
    }
    let lacking = [
        (&verdict.source, verdict.code.is_none()),
        (&verdict.packages, verdict.placement.is_none()),
    ];
    if let Some((finding, _)) = lacking.into_iter().find(|(_, lacks)| *lacks) {
        return Finding::no(TYPE, finding.reason, finding.message.clone());
    }
    let Rollout {
        wanted,
        ready,
        updated,
        ..
    } = *rollout;
    if rollout.is_complete() && failures.is_empty() {
        let message = if wanted == 0 {
            "spec.replicas is 0: nothing answers".into()
        } else {
            format!("{ready} pods serve")
        };
        return Finding::yes(TYPE, "Serving", message);
    }
    if let Some(failure) = failures.first() {
        return Finding::no(TYPE, "StartFailed", failure.message.clone());
    }
    if let Some(refusal) = observed.deployment.as_ref().and_then(refusal) {
        return Finding::no(TYPE, "PodsRefused", refusal);
    }
    let message = if ready < wanted {
        format!("{ready} of {wanted} pods serve")
    } else {
        format!("{ready} pods serve, {updated} of them in their present form")
    };
    Finding::no(TYPE, "WaitingForPods", message)
}
