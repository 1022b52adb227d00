//! How often something happens.

use std::time::{Duration, Instant};

/// Events for each second, of which those of a half-life ago count half.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    half_life: Duration,
    weight: f64,
    at: Instant,
}

impl Rate {
    /// Nothing has happened until `now`.
    #[must_use]
    pub fn new(half_life: Duration, now: Instant) -> Rate {
        Rate {
            half_life,
            weight: 0.0,
            at: now,
        }
    }

    fn decayed(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at);
        decayed(self.weight, passed, self.half_life)
    }

    /// It happens.
    pub fn happened(&mut self, now: Instant) {
        self.happened_times(1, now);
    }

    /// It has happened so many times, just now or not long ago.
    pub fn happened_times(&mut self, times: u64, now: Instant) {
        self.weight = self.decayed(now) + times as f64;
        self.at = self.at.max(now);
    }

    /// For each second.
    #[must_use]
    pub fn per_second(&self, now: Instant) -> f64 {
        // The weight of events at an even rate is that rate times this.
        let seconds = self.half_life.as_secs_f64() / std::f64::consts::LN_2;
        self.decayed(now) / seconds
    }
}

/// What is left of a rate, or of any weight, after a time without events.
#[must_use]
pub fn decayed(weight: f64, passed: Duration, half_life: Duration) -> f64 {
    weight * (-passed.as_secs_f64() / half_life.as_secs_f64()).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_rate_is_found_and_forgotten() {
        let start = Instant::now();
        let mut rate = Rate::new(Duration::from_secs(10), start);
        for n in 0..2000 {
            rate.happened(start + Duration::from_millis(50 * n));
        }
        let end = start + Duration::from_secs(100);
        assert!((rate.per_second(end) - 20.0).abs() < 1.0);
        let later = end + Duration::from_secs(10);
        assert!((rate.per_second(later) - 10.0).abs() < 0.5);
        // A clock that stands still, or is asked about the past, does no harm.
        assert!(rate.per_second(start).is_finite());
    }
}
