//! Times between requests, in bins whose width grows with the time.

use std::time::Duration;

/// Lower edge of the first bin.
pub const SHORTEST: Duration = Duration::from_millis(10);
/// Upper edge of the last bin, which is that of "Serverless in the Wild" (ATC '20, section 4.2): four hours.
pub const LONGEST: Duration = Duration::from_secs(4 * 60 * 60);
/// Bins for each doubling. The paper's bins of a minute each would put everything that matters to a fork of milliseconds into
/// the first one.
const FOR_EACH_DOUBLING: f64 = 2.0;
/// log2 of `LONGEST / SHORTEST` is 20.46.
const BINS: usize = 41;

/// Counts of times. Takes 180 bytes, whatever it has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    bins: [u32; BINS],
    /// Longer than [`LONGEST`].
    beyond: u32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            bins: [0; BINS],
            beyond: 0,
        }
    }
}

/// When a bin is so full all are halved: what was long ago counts less.
const FULL: u32 = 1 << 16;

impl Histogram {
    /// Takes a time in.
    pub fn record(&mut self, time: Duration) {
        let bin = match bin(time) {
            Some(bin) => &mut self.bins[bin],
            None => &mut self.beyond,
        };
        *bin += 1;
        if *bin >= FULL {
            self.bins.iter_mut().for_each(|bin| *bin /= 2);
            self.beyond /= 2;
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.within() + self.beyond
    }

    fn within(&self) -> u32 {
        self.bins.iter().sum()
    }

    /// Share of those longer than [`LONGEST`].
    #[must_use]
    pub fn share_beyond(&self) -> f64 {
        f64::from(self.beyond) / f64::from(self.count().max(1))
    }

    /// Coefficient of variation of the counts: 0 if all bins are equally full, large if the times are alike.
    #[must_use]
    pub fn variation(&self) -> f64 {
        let bins = BINS as f64;
        let mean = f64::from(self.within()) / bins;
        if mean == 0.0 {
            return 0.0;
        }
        let square = |count: &u32| (f64::from(*count) - mean).powi(2);
        (self.bins.iter().map(square).sum::<f64>() / bins).sqrt() / mean
    }

    /// The time that a share of those within the bins does not exceed: the upper edge of its bin, or the lower one if it is
    /// to be early. `None` while there is nothing.
    #[must_use]
    pub fn quantile(&self, share: f64, early: bool) -> Option<Duration> {
        let wanted = share * f64::from(self.within());
        let mut below = 0.0;
        let bins = self
            .bins
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        let mut last = None;
        for (bin, count) in bins {
            last = Some(bin);
            below += f64::from(*count);
            if below >= wanted {
                break;
            }
        }
        last.map(|bin| edge(if early { bin } else { bin + 1 }))
    }

    /// Each bin that holds something: its upper edge, and the share of all that it holds.
    pub fn shares(&self) -> impl Iterator<Item = (Duration, f64)> + '_ {
        let all = f64::from(self.count().max(1));
        let bins = self
            .bins
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        bins.map(move |(bin, count)| (edge(bin + 1), f64::from(*count) / all))
    }
}

/// The bin of a time; none beyond the last.
fn bin(time: Duration) -> Option<usize> {
    if time > LONGEST {
        return None;
    }
    let doublings = (time.as_secs_f64() / SHORTEST.as_secs_f64())
        .max(1.0)
        .log2();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bin = (doublings * FOR_EACH_DOUBLING) as usize;
    Some(bin.min(BINS - 1))
}

/// Lower edge of a bin.
fn edge(bin: usize) -> Duration {
    let edge = SHORTEST.mul_f64((bin as f64 / FOR_EACH_DOUBLING).exp2());
    edge.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_quantile_is_an_edge_of_the_bin_that_it_is_in() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5, false), None);
        for seconds in [1, 1, 1, 1, 1, 1, 1, 1, 1, 100] {
            histogram.record(Duration::from_secs(seconds));
        }
        let at = |share, early| {
            let time = histogram.quantile(share, early);
            time.expect("there is something").as_secs_f64()
        };
        assert!(at(0.9, true) <= 1.0 && at(0.9, false) >= 1.0);
        assert!(at(0.9, false) < 1.5);
        assert!(at(0.91, false) >= 100.0 && at(0.91, true) <= 100.0);
    }

    #[test]
    fn what_is_too_long_is_counted_apart() {
        let mut histogram = Histogram::default();
        histogram.record(LONGEST);
        histogram.record(LONGEST + Duration::from_secs(1));
        assert!((histogram.share_beyond() - 0.5).abs() < 1e-9);
        assert_eq!(histogram.quantile(1.0, false), Some(LONGEST));
    }

    #[test]
    fn times_that_are_alike_vary_more_than_those_that_are_not() {
        let (mut alike, mut spread) = (Histogram::default(), Histogram::default());
        for power in 0..40 {
            alike.record(Duration::from_secs(60));
            spread.record(SHORTEST.mul_f64((f64::from(power) / 2.0).exp2()));
        }
        assert!(alike.variation() > 5.0 && spread.variation() < 1.0);
    }

    #[test]
    fn it_forgets_and_never_overflows() {
        let mut histogram = Histogram::default();
        for _ in 0..200_000 {
            histogram.record(Duration::from_secs(1));
        }
        for _ in 0..100_000 {
            histogram.record(Duration::from_secs(1000));
        }
        assert!(histogram.count() < 3 * FULL);
        assert!(histogram.quantile(0.5, false).expect("times") > Duration::from_secs(500));
    }

    proptest! {
        #[test]
        fn every_time_lies_within_the_edges_of_its_bin(micros in 10_000u64..14_400_000_000) {
            let time = Duration::from_micros(micros);
            let bin = bin(time).expect("within");
            let slack = Duration::from_nanos(10);
            prop_assert!(edge(bin) <= time + slack && time <= edge(bin + 1) + slack);
        }

        #[test]
        fn quantiles_rise_with_their_share(times in prop::collection::vec(0u64..20_000_000, 1..60), a in 0.0f64..=1.0, b in 0.0f64..=1.0) {
            let mut histogram = Histogram::default();
            for millis in times {
                histogram.record(Duration::from_millis(millis));
            }
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(histogram.quantile(low, false) <= histogram.quantile(high, false));
            prop_assert!(histogram.quantile(low, true) <= histogram.quantile(low, false));
        }
    }
}
