//! When the last idle leaf of a Function is ended, and when one is made ahead of the next request.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::time::Duration;

use crate::histogram::{Histogram, LONGEST};

/// What becomes of a Function's idle leaf, counted from the end of its last request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// It is ended at once, and another made after this; none if it is kept.
    pub prewarm: Option<Duration>,
    /// Whatever is there then is ended.
    pub end: Duration,
}

impl Plan {
    /// It is kept for so long.
    #[must_use]
    pub fn keep(end: Duration) -> Plan {
        Plan { prewarm: None, end }
    }

    /// Whether a request that comes after `idle` finds a leaf.
    #[must_use]
    pub fn is_warm_after(&self, idle: Duration) -> bool {
        idle < self.end && self.prewarm.is_none_or(|prewarm| prewarm <= idle)
    }

    /// How long there is a leaf when the next request comes after `idle`.
    #[must_use]
    pub fn kept(&self, idle: Duration) -> Duration {
        idle.min(self.end)
            .saturating_sub(self.prewarm.unwrap_or_default())
    }
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The Function was without a request for so long.
    Function(Duration),
    /// One of its leaves would have been without for so long, had it been kept: see [`Ghosts`].
    Leaf(Duration),
}

/// A policy for one Function.
pub trait Idle: Debug {
    /// Takes in what was seen.
    fn observe(&mut self, seen: Seen);
    /// For a leaf whose request ends now.
    fn plan(&self) -> Plan;
}

/// The leaves that a Function would have if none was ever ended, the one used last on top. Where requests come at once, those
/// further down are needed less often, and a policy has to know of these too; and it has to know how long one would have had to be kept
/// that it has ended long ago.
#[derive(Clone, Debug, Default)]
pub struct Ghosts(VecDeque<Duration>);

/// Leaves of one Function at once (`spec.instances`).
const MOST_GHOSTS: usize = 256;

impl Ghosts {
    /// A request ends. Times are since any moment that stays the same.
    pub fn rest(&mut self, now: Duration) {
        if self.0.len() == MOST_GHOSTS {
            self.0.pop_front();
        }
        self.0.push_back(now);
    }

    /// A request begins: yields how long the leaf that it would have got was idle, and first whatever has become too old to matter.
    pub fn wake(&mut self, now: Duration) -> Vec<Duration> {
        let mut seen = Vec::new();
        while let Some(since) = self.0.front()
            && now.saturating_sub(*since) > LONGEST
        {
            seen.push(now.saturating_sub(*since));
            self.0.pop_front();
        }
        seen.extend(self.0.pop_back().map(|since| now.saturating_sub(since)));
        seen
    }
}

/// The same for ever.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(pub Duration);

impl Idle for Fixed {
    fn observe(&mut self, _: Seen) {}

    fn plan(&self) -> Plan {
        Plan::keep(self.0)
    }
}

/// The hybrid histogram of "Serverless in the Wild" (Shahrad et al., ATC '20, section 4.2): between the 5th and the 99th
/// percentile of its idle times a Function is kept warm. Where its times do not say enough it is kept for a standard time, and where
/// most are beyond the histogram the next one is foretold by the last ones.
#[derive(Clone, Debug)]
pub struct HybridHistogram {
    standard: Duration,
    histogram: Histogram,
    /// The last ones that were beyond the histogram.
    beyond: VecDeque<Duration>,
}

/// Percentiles (section 4.2, "Histogram").
const HEAD: f64 = 0.05;
const TAIL: f64 = 0.99;
/// Margin around both ("we use a 10% margin").
const MARGIN: f64 = 0.10;
/// Below this variation of the bins the times are all over them (section 5.2 finds 2 to be best).
const REPRESENTATIVE: f64 = 2.0;
/// With fewer times nothing is known.
const FEW: u32 = 8;
/// A larger share beyond the histogram is too much for it.
const BEYOND: f64 = 0.5;
/// Margin around what is foretold ("15%").
const FORETOLD: f64 = 0.15;
/// Times beyond the histogram that the next is foretold by: the paper fits a series (ARIMA); for the few times that there are, their
/// median does as well, and cannot go astray.
const REMEMBERED: usize = 9;
/// A leaf that is made in milliseconds is not ended only to be made again in less time than this.
const WORTH_ENDING: Duration = Duration::from_secs(1);

impl HybridHistogram {
    /// With a standard time for Functions that are not known enough.
    #[must_use]
    pub fn new(standard: Duration) -> HybridHistogram {
        HybridHistogram {
            standard,
            histogram: Histogram::default(),
            beyond: VecDeque::new(),
        }
    }

    fn foretold(&self) -> Option<Plan> {
        let mut times: Vec<Duration> = self.beyond.iter().copied().collect();
        times.sort();
        let median = *times.get(times.len() / 2)?;
        (times.len() >= 3).then(|| Plan {
            prewarm: Some(median.mul_f64(1.0 - FORETOLD)),
            end: median.mul_f64(1.0 + FORETOLD),
        })
    }
}

impl Idle for HybridHistogram {
    fn observe(&mut self, seen: Seen) {
        let Seen::Function(idle) = seen else { return };
        self.histogram.record(idle);
        if idle > LONGEST {
            if self.beyond.len() == REMEMBERED {
                self.beyond.pop_front();
            }
            self.beyond.push_back(idle);
        }
    }

    fn plan(&self) -> Plan {
        let standard = Plan::keep(self.standard);
        if self.histogram.count() < FEW {
            return standard;
        }
        if self.histogram.share_beyond() > BEYOND {
            return self.foretold().unwrap_or(standard);
        }
        if self.histogram.variation() < REPRESENTATIVE {
            return standard;
        }
        let head = self.histogram.quantile(HEAD, true);
        let tail = self.histogram.quantile(TAIL, false);
        let (Some(head), Some(tail)) = (head, tail) else {
            return standard;
        };
        let prewarm = head.mul_f64(1.0 - MARGIN);
        Plan {
            prewarm: (prewarm >= WORTH_ENDING).then_some(prewarm),
            end: tail.mul_f64(1.0 + MARGIN),
        }
    }
}

/// Keeps a leaf as long as it is expected to cost less than what it spares: the time that makes the expected cost least, by the
/// times seen so far. Keeping costs as time passes, its absence costs once, so that the ratio of both, a time, is all that has to
/// be known. Before anything is known it is that time itself, which never costs more than twice what is best (the
/// ski-rental problem).
#[derive(Clone, Debug)]
pub struct BreakEven {
    worth: Duration,
    histogram: Histogram,
}

impl BreakEven {
    /// `worth`: the time for which keeping a leaf costs as much as making one.
    #[must_use]
    pub fn new(worth: Duration) -> BreakEven {
        BreakEven {
            worth,
            histogram: Histogram::default(),
        }
    }

    /// Expected cost, in seconds of keeping, of ending after `end`.
    #[cfg(test)]
    fn cost(&self, end: Duration) -> f64 {
        let end = end.as_secs_f64();
        let worth = self.worth.as_secs_f64();
        let beyond = self.histogram.share_beyond() * (end + worth);
        let within = self.histogram.shares().map(|(time, share)| {
            let time = time.as_secs_f64();
            share * if time <= end { time } else { end + worth }
        });
        within.sum::<f64>() + beyond
    }

    /// The end that costs least. It is at the edge of a bin that holds something, or at once: between them it only costs.
    fn best(&self) -> Duration {
        let worth = self.worth.as_secs_f64();
        let mut best = (Duration::ZERO, worth);
        // Shares of times up to the edge, weighted with them, and of all later ones.
        let (mut waited, mut later) = (0.0, 1.0);
        for (time, share) in self.histogram.shares() {
            waited += share * time.as_secs_f64();
            later -= share;
            let cost = waited + later * (time.as_secs_f64() + worth);
            if cost < best.1 {
                best = (time, cost);
            }
        }
        best.0
    }
}

impl Idle for BreakEven {
    fn observe(&mut self, seen: Seen) {
        if let Seen::Leaf(idle) = seen {
            self.histogram.record(idle);
        }
    }

    fn plan(&self) -> Plan {
        if self.histogram.count() < FEW {
            return Plan::keep(self.worth);
        }
        // Times are known by their bins only: one at the very edge is not to be missed.
        let best = self.best();
        Plan::keep(best.mul_f64(1.0 + MARGIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn seen(mut policy: impl Idle, times: impl IntoIterator<Item = Duration>) -> Plan {
        for time in times {
            policy.observe(Seen::Function(time));
            policy.observe(Seen::Leaf(time));
        }
        policy.plan()
    }

    #[test]
    fn a_timer_is_warm_when_it_strikes_and_at_no_other_time() {
        let plan = seen(HybridHistogram::new(MINUTE), vec![10 * MINUTE; 20]);
        assert!(plan.is_warm_after(10 * MINUTE));
        assert!(!plan.is_warm_after(5 * MINUTE));
        assert!(plan.kept(10 * MINUTE) < 4 * MINUTE, "{plan:?}");
    }

    #[test]
    fn a_busy_function_is_kept_without_a_gap() {
        let times = (0..1000).map(|n| Duration::from_millis(20 + 7 * (n % 60)));
        let plan = seen(HybridHistogram::new(MINUTE), times);
        assert_eq!(plan.prewarm, None);
        assert!(
            plan.end >= Duration::from_millis(400) && plan.end < Duration::from_secs(1),
            "{plan:?}"
        );
    }

    #[test]
    fn what_is_not_known_enough_is_kept_for_the_standard_time() {
        let standard = Plan::keep(MINUTE);
        assert_eq!(seen(HybridHistogram::new(MINUTE), []), standard);
        assert_eq!(
            seen(HybridHistogram::new(MINUTE), vec![10 * MINUTE; 3]),
            standard
        );
        let all_over =
            (0..40).map(|n| Duration::from_millis(10).mul_f64((f64::from(n) / 2.0).exp2()));
        assert_eq!(seen(HybridHistogram::new(MINUTE), all_over), standard);
    }

    #[test]
    fn what_comes_once_a_day_is_foretold_by_the_last_days() {
        let day = 24 * 60 * MINUTE;
        let plan = seen(HybridHistogram::new(MINUTE), vec![day; 12]);
        assert!(
            plan.is_warm_after(day) && !plan.is_warm_after(day / 2),
            "{plan:?}"
        );
    }

    #[test]
    fn nothing_is_kept_for_what_never_comes_in_time() {
        let worth = Duration::from_secs(30);
        let plan = seen(BreakEven::new(worth), vec![10 * MINUTE; 20]);
        assert!(plan.end < Duration::from_millis(20), "{plan:?}");
        let plan = seen(BreakEven::new(worth), vec![Duration::from_secs(5); 20]);
        assert!(
            plan.is_warm_after(Duration::from_secs(5)) && plan.end < worth,
            "{plan:?}"
        );
        assert_eq!(seen(BreakEven::new(worth), []), Plan::keep(worth));
    }

    #[test]
    fn a_burst_is_waited_for_and_the_pause_after_it_is_not() {
        let times = (0..200).map(|n| Duration::from_secs(if n % 10 == 9 { 3600 } else { 2 }));
        let plan = seen(BreakEven::new(MINUTE), times);
        assert!(
            plan.is_warm_after(Duration::from_secs(2)) && plan.end < Duration::from_secs(5),
            "{plan:?}"
        );
    }

    #[test]
    fn leaves_further_down_are_seen_when_they_are_needed() {
        let at = Duration::from_secs;
        let mut ghosts = Ghosts::default();
        assert_eq!(ghosts.wake(at(0)), []);
        ghosts.rest(at(1));
        ghosts.rest(at(3));
        assert_eq!(ghosts.wake(at(10)), [at(7)]);
        assert_eq!(ghosts.wake(at(11)), [at(10)]);
        ghosts.rest(at(12));
        ghosts.rest(at(20_000));
        let long = at(20_001) - at(12);
        assert_eq!(ghosts.wake(at(20_001)), [long, at(1)]);
        for n in 0..1000 {
            ghosts.rest(at(20_002 + n));
        }
        assert_eq!(ghosts.0.len(), MOST_GHOSTS);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_never_longer_than_the_idle_time(idle in 0u64..100_000, prewarm in prop::option::of(0u64..100_000), end in 0u64..100_000) {
            let plan = Plan { prewarm: prewarm.map(Duration::from_millis), end: Duration::from_millis(end) };
            let idle = Duration::from_millis(idle);
            prop_assert!(plan.kept(idle) <= idle);
            if plan.is_warm_after(idle) && plan.prewarm.is_none() {
                prop_assert_eq!(plan.kept(idle), idle);
            }
        }

        /// By the times that it knows, to the width of a bin, no other time to end would have cost less.
        #[test]
        fn the_break_even_is_the_best_of_all_ends(times in prop::collection::vec(10u64..3_600_000, 8..80), other in 0u64..3_600_000) {
            let mut policy = BreakEven::new(Duration::from_secs(20));
            for millis in times {
                policy.observe(Seen::Leaf(Duration::from_millis(millis)));
            }
            prop_assert!(policy.cost(policy.best()) <= policy.cost(Duration::from_millis(other)) + 1e-6);
        }

        #[test]
        fn no_policy_makes_a_leaf_after_it_has_ended_it(times in prop::collection::vec(0u64..200_000_000, 0..60)) {
            let mut hybrid = HybridHistogram::new(MINUTE);
            for millis in times {
                hybrid.observe(Seen::Function(Duration::from_millis(millis)));
                let plan = hybrid.plan();
                prop_assert!(plan.prewarm.is_none_or(|prewarm| prewarm < plan.end), "{:?}", plan);
            }
        }
    }
}
