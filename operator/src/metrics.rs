//! Counts and times of what the operator does.

use std::sync::Mutex;
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Outcome {
    kind: &'static str,
    outcome: &'static str,
}

/// Upper bounds of the times, in seconds: a reconciliation is a handful of calls of a few milliseconds each.
const BOUNDS: [f64; 8] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 10.0];

/// All of the operator's metrics.
pub struct Metrics {
    registry: Mutex<Registry>,
    reconciliations: Family<Outcome, Counter>,
    seconds: Family<Kind, Histogram>,
    leader: Gauge,
}

impl Metrics {
    /// Metrics that nothing has been counted in.
    pub fn new() -> Self {
        let reconciliations = Family::<Outcome, Counter>::default();
        let seconds = Family::<Kind, Histogram>::new_with_constructor(|| Histogram::new(BOUNDS));
        let leader = Gauge::default();
        let mut registry = Registry::with_prefix("sock_operator");
        registry.register(
            "reconciliations",
            "Reconciliations, by kind and outcome",
            reconciliations.clone(),
        );
        registry.register(
            "reconcile_seconds",
            "Time that a reconciliation takes",
            seconds.clone(),
        );
        registry.register(
            "leader",
            "1 while this process holds the Lease",
            leader.clone(),
        );
        Self {
            registry: Mutex::new(registry),
            reconciliations,
            seconds,
            leader,
        }
    }

    /// Begins to measure one reconciliation.
    pub fn reconciling(&self, kind: &'static str) -> Measure<'_> {
        Measure {
            metrics: self,
            kind,
            begin: Instant::now(),
        }
    }

    /// Says whether this process holds the Lease.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Everything in the text form of OpenMetrics.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        let registry = self
            .registry
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// One reconciliation that is being measured.
pub struct Measure<'a> {
    metrics: &'a Metrics,
    kind: &'static str,
    begin: Instant,
}

impl Measure<'_> {
    /// It ended.
    pub fn done(self, well: bool) {
        let outcome = if well { "ok" } else { "error" };
        self.metrics
            .reconciliations
            .get_or_create(&Outcome {
                kind: self.kind,
                outcome,
            })
            .inc();
        self.metrics
            .seconds
            .get_or_create(&Kind { kind: self.kind })
            .observe(self.begin.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_in_the_text() {
        let metrics = Metrics::new();
        metrics.reconciling("Function").done(false);
        metrics.leads(true);
        let text = metrics.text().unwrap();
        assert!(
            text.contains(
                "sock_operator_reconciliations_total{kind=\"Function\",outcome=\"error\"} 1"
            ),
            "{text}"
        );
        assert!(text.contains("sock_operator_leader 1"), "{text}");
    }
}
