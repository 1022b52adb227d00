//! Leader election by a Lease: of several operators one reconciles.
//!
//! The holder renews the Lease; another takes it when it has not seen it change for as long as it lasts. Both count by
//! their own clocks, from what they saw or sent themselves: the times in the Lease are for people. The API server
//! refuses an update of an older version, so that of two that try one gets it.
//!
//! A holder counts from before it sent the renewal, and others from after they have seen it, so the holder knows
//! first that its time is over. From then on it writes nothing ([`Leadership`]).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

/// Name of the Lease.
pub const LEASE: &str = "sock-operator";

/// How long a Lease lasts that is not renewed.
pub const LASTS: Duration = Duration::from_secs(15);

/// How often it is renewed, or looked at.
pub const EVERY: Duration = Duration::from_secs(3);

/// A holder that could not renew for so long stops. The rest of [`LASTS`] is for its writes that are under way.
pub const STOPS: Duration = Duration::from_secs(10);

/// How soon it is tried again after a failure.
const SOON: Duration = Duration::from_secs(1);

/// How long a call about the Lease may take: two without an answer are no reason to stop.
const PATIENCE: Duration = Duration::from_secs(2);

/// Until when this process may act as the leader; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<Mutex<Option<Instant>>>);

impl Leadership {
    /// Whether it may act now.
    pub fn holds(&self) -> bool {
        self.until().is_some_and(|until| Instant::now() < until)
    }

    fn until(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, until: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// What became of one attempt to get or to keep the Lease.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Outcome {
    /// It is ours.
    Ours,
    /// Somebody else holds it.
    Theirs,
    /// Somebody else wrote it at the same time.
    Raced,
}

/// What one look at the Lease says to do.
#[derive(Debug, PartialEq)]
enum Step {
    /// Write this Lease; it is ours then.
    Write(Box<LeaseSpec>),
    /// Somebody else holds it.
    Wait,
}

/// The Lease as it was last seen, and since when it has not changed.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    spec: LeaseSpec,
    since: Instant,
}

/// Decides by what is seen, at the instant `now` and the time of day `time`.
fn decide(
    spec: &LeaseSpec,
    seen: &mut Option<Seen>,
    identity: &str,
    now: Instant,
    time: Timestamp,
) -> Step {
    let holder = spec.holder_identity.as_deref().unwrap_or_default();
    let since = match seen {
        Some(seen) if seen.spec == *spec => seen.since,
        _ => {
            *seen = Some(Seen {
                spec: spec.clone(),
                since: now,
            });
            now
        }
    };
    let lasts = spec
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(LASTS, Duration::from_secs);
    let is_ours = holder == identity;
    if !holder.is_empty() && !is_ours && now.duration_since(since) < lasts {
        return Step::Wait;
    }
    Step::Write(Box::new(LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: i32::try_from(LASTS.as_secs()).ok(),
        acquire_time: if is_ours {
            spec.acquire_time.clone()
        } else {
            Some(MicroTime(time))
        },
        renew_time: Some(MicroTime(time)),
        lease_transitions: Some(spec.lease_transitions.unwrap_or(0) + i32::from(!is_ours)),
        ..LeaseSpec::default()
    }))
}

/// One operator's part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    seen: Option<Seen>,
    leadership: Leadership,
}

impl Candidate {
    /// A candidate for the Lease in this namespace, whose identity nobody else has; it says in `leadership` how long
    /// the Lease is surely its own.
    pub fn new(client: Client, namespace: &str, identity: String, leadership: Leadership) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            identity,
            seen: None,
            leadership,
        }
    }

    /// Tries once to get or to keep the Lease.
    async fn attempt(&mut self) -> Result<Outcome, kube::Error> {
        let begin = Instant::now();
        let lease = match self.leases.get_opt(LEASE).await? {
            Some(lease) => lease,
            None => Lease {
                metadata: ObjectMeta {
                    name: Some(LEASE.into()),
                    ..ObjectMeta::default()
                },
                spec: None,
            },
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let Step::Write(spec) = decide(
            &spec,
            &mut self.seen,
            &self.identity,
            Instant::now(),
            Timestamp::now(),
        ) else {
            return Ok(Outcome::Theirs);
        };
        let exists = lease.metadata.resource_version.is_some();
        let lease = Lease {
            spec: Some(*spec),
            ..lease
        };
        let parameters = PostParams::default();
        let written = if exists {
            self.leases.replace(LEASE, &parameters, &lease).await
        } else {
            self.leases.create(&parameters, &lease).await
        };
        match written {
            Ok(_) => {
                self.leadership.set(Some(begin + STOPS));
                Ok(Outcome::Ours)
            }
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
                Ok(Outcome::Raced)
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until the Lease is ours.
    pub async fn acquire(&mut self) {
        loop {
            match timeout(PATIENCE, self.attempt()).await {
                Ok(Ok(Outcome::Ours)) => return,
                Ok(Ok(Outcome::Theirs | Outcome::Raced)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "look at the Lease"),
                Err(_) => tracing::warn!("look at the Lease: no answer"),
            }
            sleep(EVERY).await;
        }
    }

    /// Renews the Lease; returns when it is lost, or when it could not be renewed for so long that it may be.
    pub async fn hold(&mut self) {
        let mut wait = EVERY;
        while let Some(until) = self.leadership.until().filter(|_| self.leadership.holds()) {
            sleep_until(until.min(Instant::now() + wait)).await;
            wait = SOON;
            match timeout_at(until, timeout(PATIENCE, self.attempt())).await {
                Ok(Ok(Ok(Outcome::Ours))) => wait = EVERY,
                Ok(Ok(Ok(Outcome::Raced))) => {}
                Ok(Ok(Ok(Outcome::Theirs))) => break,
                Ok(Ok(Err(error))) => tracing::warn!(%error, "renew the Lease"),
                Ok(Err(_)) => tracing::warn!("renew the Lease: no answer"),
                Err(_) => break,
            }
        }
        self.leadership.set(None);
    }

    /// Gives the Lease up, so that another need not wait; does nothing if it is not ours.
    ///
    /// # Errors
    ///
    /// If the API server refuses. One that does not answer is not waited for: the Lease expires.
    pub async fn release(&mut self) -> Result<(), kube::Error> {
        self.leadership.set(None);
        timeout(PATIENCE, self.give_up()).await.unwrap_or(Ok(()))
    }

    async fn give_up(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.leases.get_opt(LEASE).await? else {
            return Ok(());
        };
        match &mut lease.spec {
            Some(spec) if spec.holder_identity.as_deref() == Some(&self.identity) => {
                spec.holder_identity = None;
            }
            _ => return Ok(()),
        }
        self.leases
            .replace(LEASE, &PostParams::default(), &lease)
            .await
            .map(|_| ())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn held(by: &str, at: i64) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(by.into()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(Timestamp::from_second(at).unwrap())),
            lease_transitions: Some(4),
            ..LeaseSpec::default()
        }
    }

    fn writes(step: Step) -> Option<LeaseSpec> {
        match step {
            Step::Write(spec) => Some(*spec),
            Step::Wait => None,
        }
    }

    #[test]
    fn a_new_lease_is_taken() {
        let spec = writes(decide(
            &LeaseSpec::default(),
            &mut None,
            "a",
            Instant::now(),
            Timestamp::now(),
        ))
        .unwrap();
        assert_eq!(
            (spec.holder_identity.as_deref(), spec.lease_transitions),
            (Some("a"), Some(1))
        );
    }

    #[test]
    fn ours_is_renewed_without_a_transition() {
        let spec = writes(decide(
            &held("a", 1),
            &mut None,
            "a",
            Instant::now(),
            Timestamp::now(),
        ))
        .unwrap();
        assert_eq!(spec.lease_transitions, Some(4));
    }

    #[test]
    fn that_of_another_is_left_until_it_has_not_changed_for_as_long_as_it_lasts() {
        let (mut seen, begin, time) = (None, Instant::now(), Timestamp::now());
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(
            decide(&held("b", 1), &mut seen, "a", begin, time),
            Step::Wait
        );
        assert_eq!(
            decide(&held("b", 1), &mut seen, "a", after(14), time),
            Step::Wait
        );
        assert_eq!(
            decide(&held("b", 2), &mut seen, "a", after(16), time),
            Step::Wait
        );
        assert_eq!(
            decide(&held("b", 2), &mut seen, "a", after(30), time),
            Step::Wait
        );
        let spec = writes(decide(&held("b", 2), &mut seen, "a", after(31), time)).unwrap();
        assert_eq!(
            (spec.holder_identity.as_deref(), spec.lease_transitions),
            (Some("a"), Some(5))
        );
    }

    #[test]
    fn one_that_was_given_up_is_taken_at_once() {
        let mut spec = held("b", 1);
        spec.holder_identity = None;
        assert!(
            writes(decide(
                &spec,
                &mut None,
                "a",
                Instant::now(),
                Timestamp::now()
            ))
            .is_some()
        );
    }
}
