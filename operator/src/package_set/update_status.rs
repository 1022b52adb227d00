//! Decides what a PackageSet's status says.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use sock_crds::{NodeFailure, PackageSet, PackageSetStatus};

use super::build::pool_name;
use super::former::{self, Former, Users};
use super::status_port::import_millis;
use super::validate::Wanted;
use crate::cluster::Error;
use crate::condition::{Finding, conditions};
use crate::contract::{VERSION_LABEL, Version, container, short};
use crate::pods::{failures, is_ready};

/// What there is of a PackageSet now.
pub struct Observed<'a> {
    /// The DaemonSet of the present version.
    pub pool: Option<DaemonSet>,
    /// All of its DaemonSets, as they were before that was applied.
    pub pools: Vec<DaemonSet>,
    /// Who runs on former versions.
    pub users: Users,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// Why it could not be applied.
    pub failed: Option<&'a Error>,
}

/// The status that a PackageSet is to have, and the pools of its former versions.
pub async fn status(
    set: &PackageSet,
    wanted: &Result<Wanted, Finding>,
    observed: &Observed<'_>,
) -> (PackageSetStatus, Vec<Former>) {
    let before = set.status.clone().unwrap_or_default();
    let (mut after, former) = decide(set, wanted, observed, Timestamp::now());
    if let Ok(wanted) = wanted {
        let of_version = observed
            .pods
            .iter()
            .filter(|pod| is_of_version(pod, &wanted.version) && is_ready(pod));
        after.import_millis = import_millis(of_version).await.or_else(|| {
            // Where the pods cannot be reached, what was once measured of this version still holds.
            before
                .import_millis
                .filter(|_| before.digest == after.digest)
        });
    }
    (after, former)
}

/// Whether a pod belongs to the pool of a version.
fn is_of_version(pod: &Pod, version: &Version) -> bool {
    let of = pod.labels().get(VERSION_LABEL).map(String::as_str);
    of == Some(short(&version.digest))
}

/// Whether the packages are installed on the pod's node.
fn is_installed(pod: &Pod) -> bool {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.init_container_statuses.iter().flatten());
    statuses
        .filter(|status| status.name == container::INSTALL)
        .any(|status| {
            status
                .state
                .as_ref()
                .and_then(|state| state.terminated.as_ref())
                .is_some_and(|end| end.exit_code == 0)
        })
}

/// Whether the zygote has ended at least once: it is refused or broken, and Functions have to do without it.
fn has_given_up(pod: &Pod) -> bool {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    statuses
        .filter(|status| status.name == container::ZYGOTE)
        .any(|status| {
            let ended = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
                state
                    .as_ref()
                    .is_some_and(|state| state.terminated.is_some())
            };
            ended(&status.state) || ended(&status.last_state)
        })
}

fn nodes<'a>(pods: impl Iterator<Item = &'a Pod>) -> i32 {
    let names: BTreeSet<&str> = pods
        .filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref())
        .collect();
    i32::try_from(names.len()).unwrap_or(i32::MAX)
}

/// The status, but for what only the pods themselves can tell.
fn decide(
    set: &PackageSet,
    wanted: &Result<Wanted, Finding>,
    observed: &Observed<'_>,
    now: Timestamp,
) -> (PackageSetStatus, Vec<Former>) {
    let before = set.status.clone().unwrap_or_default();
    let generation = set.metadata.generation;
    let mut after = PackageSetStatus {
        observed_generation: generation,
        // What Functions run on stays what it was until something better is ready.
        ready_digest: before.ready_digest.clone(),
        ready_lock: before.ready_lock.clone(),
        ready_image: before.ready_image.clone(),
        ready_ancestors: before.ready_ancestors.clone(),
        ..PackageSetStatus::default()
    };
    let desired = desired_nodes(observed.pool.as_ref());
    after.desired_nodes = desired.unwrap_or(before.desired_nodes);
    let mut former = Vec::new();
    let findings = match wanted {
        Err(finding) => {
            after.digest.clone_from(&before.digest);
            after.ready_nodes = before.ready_nodes;
            vec![
                Finding::no("Ready", finding.reason, finding.message.clone()),
                finding.clone(),
            ]
        }
        Ok(wanted) => {
            let digest = &wanted.version.digest;
            let pods: Vec<&Pod> = observed
                .pods
                .iter()
                .filter(|pod| {
                    is_of_version(pod, &wanted.version) && pod.metadata.deletion_timestamp.is_none()
                })
                .collect();
            let counts = Counts {
                desired,
                ready: nodes(pods.iter().copied().filter(|pod| is_ready(pod))),
                installed: nodes(pods.iter().copied().filter(|pod| is_installed(pod))),
                given_up: nodes(
                    pods.iter()
                        .copied()
                        .filter(|pod| is_installed(pod) && has_given_up(pod)),
                ),
            };
            after.digest = Some(digest.clone());
            after.ready_nodes = counts.ready;
            after.failures = failures(pods.iter().copied());
            if counts.may_be_used(before.ready_digest.is_some()) {
                after.ready_digest = Some(digest.clone());
                after.ready_lock = Some(wanted.version.lock.clone());
                after.ready_image = Some(wanted.version.image.clone());
                after.ready_ancestors.clone_from(&wanted.version.ancestors);
            }
            former = former::former(
                &observed.pools,
                &pool_name(set, &wanted.version),
                &wanted.version,
                &observed.users,
                after.ready_digest.as_deref(),
                counts.is_warm(),
            );
            let mut findings = findings(&counts, &after.failures, observed.failed);
            findings.push(former::finding(&former));
            if let Some(parent) = &set.spec.extends {
                let message = format!("extends PackageSet {}", parent.name);
                findings.push(Finding::yes("ParentReady", "Ready", message));
            }
            findings
        }
    };
    after.conditions = conditions(&findings, &before.conditions, generation, now);
    (after, former)
}

/// The nodes that should have a pod; none until the DaemonSet's controller has seen its present form.
fn desired_nodes(pool: Option<&DaemonSet>) -> Option<i32> {
    let pool = pool?;
    let status = pool.status.as_ref()?;
    (status.observed_generation >= pool.metadata.generation)
        .then_some(status.desired_number_scheduled)
}

/// Nodes, by how far the version that the spec asks for has come on them.
#[derive(Clone, Copy, Debug)]
struct Counts {
    desired: Option<i32>,
    ready: i32,
    installed: i32,
    given_up: i32,
}

impl Counts {
    /// Whether every node that should have it has it.
    fn is_warm(self) -> bool {
        self.desired
            .is_some_and(|desired| desired > 0 && self.ready >= desired)
    }

    /// Whether Functions should run on this version.
    ///
    /// One that replaces another has to be warm on every node first. The first one may be used as soon as a node has
    /// it, also where the zygote is refused: a plain interpreter with the packages is slower, and answers.
    fn may_be_used(self, replaces: bool) -> bool {
        self.is_warm() || (!replaces && (self.ready > 0 || self.given_up > 0))
    }
}

fn findings(counts: &Counts, failures: &[NodeFailure], failed: Option<&Error>) -> Vec<Finding> {
    let Counts {
        ready, installed, ..
    } = *counts;
    let line = failures.first().map(|failure| {
        let node = if failure.node.is_empty() {
            "no node"
        } else {
            &failure.node
        };
        format!("{node}: {}", failure.message)
    });
    let found = Finding::yes("RequirementsFound", "Found", "the requirements are known");
    let Some(desired) = counts.desired else {
        let waiting =
            |type_| Finding::unknown(type_, "WaitingForDaemonSet", "the nodes are being chosen");
        let is_ready = failed.map_or_else(
            || waiting("Ready"),
            |error| Finding::no("Ready", error.reason(), error.to_string()),
        );
        return vec![is_ready, waiting("Installed"), found];
    };
    let is_installed = if desired > 0 && installed >= desired {
        Finding::yes(
            "Installed",
            "Installed",
            format!("the packages are installed on {installed} nodes"),
        )
    } else if let Some(line) = line.as_ref().filter(|_| installed == 0) {
        Finding::no("Installed", "InstallFailed", line)
    } else {
        Finding::no(
            "Installed",
            "WaitingForNodes",
            format!("the packages are installed on {installed} of {desired} nodes"),
        )
    };
    let is_ready = if let Some(error) = failed {
        Finding::no("Ready", error.reason(), error.to_string())
    } else if desired == 0 {
        Finding::no(
            "Ready",
            "NoNodes",
            "no node has the label sock.dev/node=ready, fits spec.nodeSelector and has only taints that are tolerated",
        )
    } else if ready >= desired {
        Finding::yes("Ready", "Warm", format!("warm on {ready} nodes"))
    } else if let Some(line) = line {
        let reason = if installed == 0 {
            "InstallFailed"
        } else {
            "ZygoteFailed"
        };
        Finding::no("Ready", reason, line)
    } else {
        Finding::no(
            "Ready",
            "WaitingForNodes",
            format!("warm on {ready} of {desired} nodes"),
        )
    };
    vec![is_ready, is_installed, found]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn counts(desired: i32, ready: i32, installed: i32, given_up: i32) -> Counts {
        Counts {
            desired: Some(desired),
            ready,
            installed,
            given_up,
        }
    }

    #[test]
    fn a_version_that_replaces_another_is_used_when_it_is_warm_everywhere() {
        assert!(!counts(3, 2, 3, 0).may_be_used(true));
        assert!(!counts(3, 0, 3, 3).may_be_used(true));
        assert!(counts(3, 3, 3, 0).may_be_used(true));
        assert!(!counts(0, 0, 0, 0).may_be_used(true));
    }

    #[test]
    fn the_first_version_is_used_as_soon_as_one_node_has_it() {
        assert!(!counts(3, 0, 3, 0).may_be_used(false));
        assert!(counts(3, 1, 1, 0).may_be_used(false));
        assert!(counts(3, 0, 1, 1).may_be_used(false));
    }

    #[test]
    fn conditions_name_the_line_to_mend() {
        let failures = [NodeFailure {
            node: "worker".into(),
            pod: "p".into(),
            message: "six==1.17.0: hash differs".into(),
        }];
        let found = findings(&counts(2, 0, 0, 0), &failures, None);
        assert_eq!(
            (found[0].reason, found[0].message.as_str()),
            ("InstallFailed", "worker: six==1.17.0: hash differs")
        );
        assert_eq!(found[1].reason, "InstallFailed");
        let found = findings(&counts(2, 0, 2, 2), &failures, None);
        assert_eq!(
            (found[0].reason, found[1].reason),
            ("ZygoteFailed", "Installed")
        );
    }

    #[test]
    fn a_pool_without_nodes_says_what_is_missing() {
        assert_eq!(
            findings(&counts(0, 0, 0, 0), &[], None)[0].reason,
            "NoNodes"
        );
    }
}
