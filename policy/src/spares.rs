//! How many leaves a zygote keeps ahead.

use std::time::Duration;

/// As many as it takes for at most a share `missed` of the requests to find none, if they come at random at this rate and a spare
/// is replaced `refill` after it was taken; at least `least`, at most `most`.
///
/// Requests that come within the time of one replacement are Poisson distributed.
#[must_use]
pub fn wanted(per_second: f64, refill: Duration, missed: f64, least: u32, most: u32) -> u32 {
    let mean = per_second.max(0.0) * refill.as_secs_f64();
    // The chance of exactly so many, and of so many or fewer.
    let mut exactly = (-mean).exp();
    let mut at_most = exactly;
    let mut spares = 1;
    // Beyond some hundreds the first chance is no number any more, and most is reached long before.
    while at_most < 1.0 - missed && spares < most {
        exactly *= mean / f64::from(spares);
        at_most += exactly;
        spares += 1;
    }
    spares.clamp(least.min(most), most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REFILL: Duration = Duration::from_millis(10);

    #[test]
    fn one_is_enough_for_what_is_rare_and_more_for_what_is_not() {
        assert_eq!(wanted(0.0, REFILL, 0.01, 0, 8), 1);
        assert_eq!(wanted(0.5, REFILL, 0.01, 0, 8), 1);
        assert_eq!(wanted(20.0, REFILL, 0.01, 0, 8), 3);
        assert_eq!(wanted(100.0, REFILL, 0.01, 0, 8), 5);
        assert_eq!(wanted(1e9, REFILL, 0.01, 0, 8), 8);
        assert_eq!(wanted(0.5, REFILL, 0.01, 2, 8), 2);
        assert_eq!(wanted(0.5, REFILL, 0.01, 2, 0), 0);
    }

    proptest! {
        #[test]
        fn more_requests_never_want_fewer(a in 0.0f64..1e4, b in 0.0f64..1e4, most in 0u32..64) {
            let of = |rate| wanted(rate, REFILL, 0.01, 1, most);
            prop_assert!(of(a.min(b)) <= of(a.max(b)));
            prop_assert!(of(a) <= most);
        }

        /// The chance that more requests come within a replacement than there are spares, added up by itself.
        #[test]
        fn no_more_are_missed_than_may_be(rate in 0.0f64..500.0) {
            let spares = wanted(rate, REFILL, 0.01, 0, 64);
            let mean = rate * REFILL.as_secs_f64();
            let mut term = (-mean).exp();
            let mut fewer = 0.0;
            for n in 0..spares {
                fewer += term;
                term *= mean / f64::from(n + 1);
            }
            prop_assert!(1.0 - fewer <= 0.01 + 1e-9 || spares == 64);
        }
    }
}
