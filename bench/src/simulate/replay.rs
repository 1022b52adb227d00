//! One Function's requests under a policy.

use std::time::Duration;

use sock_policy::{Ghosts, Idle, Plan, Seen};

use super::trace::Function;

/// What became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Replayed {
    /// All of them.
    pub requests: usize,
    /// Those that no leaf was there for.
    pub cold: usize,
    /// Time that leaves worked, in seconds.
    pub busy: f64,
    /// Time that they were there and did not.
    pub idle: f64,
}

/// A leaf without a request.
struct Resting {
    since: f64,
    plan: Plan,
}

impl Resting {
    fn for_how_long(&self, now: f64) -> Duration {
        Duration::from_secs_f64((now - self.since).max(0.0))
    }
}

/// A leaf serves one request at a time; the one that was used last is used next. Only one of those that rest is made ahead of
/// the next request. Ends after `seconds`.
pub fn replay(function: &Function, seconds: f64, policy: &mut dyn Idle) -> Replayed {
    let mut result = Replayed::default();
    // Ends of requests that are under way, latest first.
    let mut working: Vec<f64> = Vec::new();
    let mut resting: Vec<Resting> = Vec::new();
    let mut last_end: Option<f64> = None;
    let mut ghosts = Ghosts::default();
    for request in &function.arrivals {
        let now = request.at;
        while working.last().is_some_and(|end| *end <= now) {
            let end = working.pop().unwrap_or(now);
            rest(&mut resting, end, policy.plan(), &mut result);
            ghosts.rest(Duration::from_secs_f64(end));
            last_end = Some(end);
        }
        if let Some(end) = last_end.filter(|_| working.is_empty()) {
            let idle = Duration::from_secs_f64((now - end).max(0.0));
            policy.observe(Seen::Function(idle));
        }
        for idle in ghosts.wake(Duration::from_secs_f64(now)) {
            policy.observe(Seen::Leaf(idle));
        }
        result.requests += 1;
        let warm = resting
            .iter()
            .rposition(|leaf| leaf.plan.is_warm_after(leaf.for_how_long(now)));
        match warm {
            Some(place) => {
                let leaf = resting.remove(place);
                result.idle += leaf.plan.kept(leaf.for_how_long(now)).as_secs_f64();
            }
            None => result.cold += 1,
        }
        // Those whose time is over.
        resting.retain(|leaf| {
            let idle = leaf.for_how_long(now);
            let is_over = idle >= leaf.plan.end;
            if is_over {
                result.idle += leaf.plan.kept(idle).as_secs_f64();
            }
            !is_over
        });
        result.busy += request.seconds;
        let end = now + request.seconds;
        let place = working.partition_point(|other| *other > end);
        working.insert(place, end);
    }
    while let Some(end) = working.pop() {
        rest(&mut resting, end, policy.plan(), &mut result);
    }
    for leaf in resting {
        result.idle += leaf.plan.kept(leaf.for_how_long(seconds)).as_secs_f64();
    }
    result
}

fn rest(resting: &mut Vec<Resting>, since: f64, plan: Plan, result: &mut Replayed) {
    resting.retain(|leaf| {
        let keeps = leaf.plan.prewarm.is_none();
        if !keeps {
            result.idle += leaf.plan.kept(leaf.for_how_long(since)).as_secs_f64();
        }
        keeps
    });
    resting.push(Resting { since, plan });
}

#[cfg(test)]
mod tests {
    use super::super::trace::Request;
    use super::*;
    use sock_policy::Fixed;

    fn function(requests: &[(f64, f64)]) -> Function {
        Function {
            arrivals: requests
                .iter()
                .map(|(at, seconds)| Request {
                    at: *at,
                    seconds: *seconds,
                })
                .collect(),
        }
    }

    fn kept(seconds: u64, requests: &[(f64, f64)]) -> Replayed {
        let mut policy = Fixed(Duration::from_secs(seconds));
        replay(&function(requests), 1000.0, &mut policy)
    }

    #[test]
    fn a_leaf_is_used_again_as_long_as_it_is_kept() {
        let two = [(0.0, 1.0), (5.0, 1.0)];
        let short = kept(3, &two);
        assert_eq!((short.requests, short.cold), (2, 2));
        assert!((short.idle - 6.0).abs() < 1e-9 && (short.busy - 2.0).abs() < 1e-9);
        let long = kept(10, &two);
        assert_eq!(long.cold, 1);
        assert!((long.idle - 14.0).abs() < 1e-9, "{long:?}");
        assert_eq!(kept(0, &two).idle, 0.0);
    }

    #[test]
    fn requests_at_once_need_a_leaf_each() {
        let three = [(0.0, 10.0), (1.0, 10.0), (2.0, 1.0), (3.5, 1.0)];
        let all = kept(100, &three);
        // The fourth comes when the third is done and the others are not.
        assert_eq!((all.requests, all.cold), (4, 3));
    }

    /// Asks for a leaf that is made ahead.
    #[derive(Debug)]
    struct Ahead;

    impl Idle for Ahead {
        fn observe(&mut self, _: Seen) {}

        fn plan(&self) -> Plan {
            Plan {
                prewarm: Some(Duration::from_secs(50)),
                end: Duration::from_secs(70),
            }
        }
    }

    #[test]
    fn what_is_made_ahead_costs_only_from_then_on() {
        let timer = function(&[(0.0, 1.0), (61.0, 1.0), (122.0, 1.0)]);
        let result = replay(&timer, 1000.0, &mut Ahead);
        assert_eq!(result.cold, 1);
        // Twice ten seconds before a request, and once for nothing.
        assert!((result.idle - 40.0).abs() < 1e-9, "{result:?}");
        let early = function(&[(0.0, 1.0), (31.0, 1.0)]);
        assert_eq!(replay(&early, 1000.0, &mut Ahead).cold, 2);
    }
}
