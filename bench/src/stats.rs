//! Order statistics of samples, and figures made of them.

use serde::Serialize;

/// Samples of one quantity, in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `None` without a sample.
    #[must_use]
    pub fn new(mut values: Vec<f64>) -> Option<Samples> {
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then_some(Samples(values))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// All together.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.0.iter().sum()
    }

    /// Of all.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "there are far fewer than 2^52")]
    pub fn mean(&self) -> f64 {
        self.sum() / self.0.len() as f64
    }

    /// The smallest sample that at least `percent` of all samples do not exceed (the nearest-rank
    /// percentile: always a value that was measured, never one between two).
    #[must_use]
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent.min(100)).div_ceil(100);
        self.0[rank.max(1) - 1]
    }
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: &'static str,
    /// Of `p50`, `p99` and `peer_p50`.
    pub unit: &'static str,
    /// Number of samples.
    pub n: usize,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// What it is compared with.
    pub peer: &'static str,
    /// The peer's median.
    pub peer_p50: f64,
    /// How many times more the peer needs.
    pub ratio: f64,
}

impl Figure {
    /// Compares `ours` with `peers`.
    #[must_use]
    pub fn new(
        name: &'static str,
        unit: &'static str,
        ours: &Samples,
        peer: &'static str,
        peers: &Samples,
    ) -> Figure {
        let (p50, peer_p50) = (ours.percentile(50), peers.percentile(50));
        Figure {
            name,
            unit,
            n: ours.count(),
            p50: rounded(p50),
            p99: rounded(ours.percentile(99)),
            peer,
            peer_p50: rounded(peer_p50),
            ratio: rounded(peer_p50 / p50),
        }
    }
}

/// Three places: microseconds of a figure in milliseconds, kilobytes of one in megabytes.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_to(last: u32) -> Samples {
        Samples::new((1..=last).rev().map(f64::from).collect()).unwrap()
    }

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        assert_eq!(one_to(300).percentile(50), 150.0);
        assert_eq!(one_to(300).percentile(99), 297.0);
        assert_eq!(one_to(3).percentile(50), 2.0);
        assert_eq!(one_to(3).percentile(99), 3.0);
        assert_eq!(one_to(1).percentile(0), 1.0);
        assert_eq!(one_to(7).percentile(100), 7.0);
    }

    #[test]
    fn a_mean_is_of_all() {
        assert_eq!((one_to(3).sum(), one_to(3).mean()), (6.0, 2.0));
    }

    #[test]
    fn nothing_measured_is_no_samples() {
        assert_eq!(Samples::new(Vec::new()), None);
    }

    #[test]
    fn the_ratio_says_how_much_more_the_peer_needs() {
        let figure = Figure::new("f", "ms", &one_to(4), "peer", &one_to(400));
        assert_eq!((figure.n, figure.p50, figure.p99), (4, 2.0, 4.0));
        assert_eq!((figure.peer_p50, figure.ratio), (200.0, 100.0));
    }
}
