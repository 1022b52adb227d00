//! How long a leaf that has nothing to do is kept, and when one is made ahead of the next request.
//!
//! What is learned is of the pod: how long it was without any request. So it decides about the leaf that the next request will
//! get, the one used last; those below it are there for requests that come at once, and are kept as long as is said.

use std::time::{Duration, Instant};

use sock_policy::{HybridHistogram, Idle as _, Plan};

/// How long an idle leaf is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Always as long.
    Fixed,
    /// As the times without requests were so far ([`HybridHistogram`]), and as long as with `Fixed` while they do not say enough.
    Learned,
}

/// What is decided for the leaves of one pod. It is told when requests begin and end, and asked when an idle leaf ends.
#[derive(Debug)]
pub(super) struct Keeping {
    /// No leaf is ended before it would be frozen: one that only waits costs little until then.
    least: Duration,
    policy: Option<HybridHistogram>,
    end_after: Duration,
    plan: Plan,
    rest: Rest,
    ahead: Option<Ahead>,
}

/// Whether requests are under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// There was none so far.
    Unasked,
    Busy,
    Since(Instant),
}

/// A leaf for a request that is expected.
#[derive(Debug, Clone, Copy)]
struct Ahead {
    at: Instant,
    until: Instant,
}

impl Keeping {
    pub(super) fn new(policy: IdlePolicy, freeze_after: Duration, end_after: Duration) -> Self {
        Keeping {
            least: freeze_after.min(end_after),
            policy: match policy {
                IdlePolicy::Fixed => None,
                IdlePolicy::Learned => Some(HybridHistogram::new(end_after)),
            },
            end_after,
            plan: Plan::keep(end_after),
            rest: Rest::Unasked,
            ahead: None,
        }
    }

    /// Whether anything depends on when requests come.
    pub(super) fn learns(&self) -> bool {
        self.policy.is_some()
    }

    /// Takes note of whether requests are under way, or wait. Yields whether that has changed, and with it when leaves end.
    pub(super) fn note(&mut self, now: Instant, busy: bool) -> bool {
        let Some(policy) = &mut self.policy else {
            return false;
        };
        match (self.rest, busy) {
            (Rest::Busy, true) | (Rest::Unasked | Rest::Since(_), false) => return false,
            (Rest::Unasked, true) => {}
            (Rest::Since(since), true) => {
                let idle = now.saturating_duration_since(since);
                policy.observe(sock_policy::Seen::Function(idle));
                self.plan = policy.plan();
                // To end a leaf and make another at once would only cost.
                if self.plan.prewarm.is_some_and(|after| after <= self.least) {
                    self.plan.prewarm = None;
                }
                self.plan.end = self.plan.end.max(self.least);
            }
            (Rest::Busy, false) => {
                self.ahead = self.plan.prewarm.map(|after| Ahead {
                    at: now + after,
                    until: now + self.plan.end,
                });
            }
        }
        self.rest = if busy {
            self.ahead = None;
            Rest::Busy
        } else {
            Rest::Since(now)
        };
        true
    }

    /// When a leaf ends that is idle since then. `next`: it is the one that the next request gets; `until`: it is kept at least
    /// until then for a request that is expected.
    pub(super) fn end(&self, idle_since: Instant, next: bool, until: Option<Instant>) -> Instant {
        let kept = match (self.rest, self.plan.prewarm) {
            (Rest::Since(_), None) if next => self.plan.end,
            (Rest::Since(_), Some(_)) if next => self.least,
            _ => self.end_after,
        };
        let end = idle_since + kept;
        until.map_or(end, |until| until.max(end))
    }

    /// When a leaf is made ahead.
    pub(super) fn next(&self) -> Option<Instant> {
        self.ahead.map(|ahead| ahead.at)
    }

    /// Whether a leaf is to be there now for a request that is expected, and until when. It says so once.
    pub(super) fn due(&mut self, now: Instant) -> Option<Instant> {
        let ahead = self.ahead.take_if(|ahead| ahead.at <= now)?;
        (now < ahead.until).then_some(ahead.until)
    }

    /// No leaf is made ahead this time.
    pub(super) fn forgo(&mut self) {
        self.ahead = None;
    }

    /// No request is expected any more.
    pub(super) fn stop(&mut self) {
        self.policy = None;
        self.ahead = None;
    }
}
