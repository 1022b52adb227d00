//! Conditions: what is so, since when, and what to do about it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use sock_crds::Condition;

/// A condition before it is known since when it holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Its type.
    pub type_: &'static str,
    /// Whether it holds; none if that cannot be known now.
    pub holds: Option<bool>,
    /// One word for it.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl Finding {
    /// It holds.
    pub fn yes(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            type_,
            holds: Some(true),
            reason,
            message: message.into(),
        }
    }

    /// It does not hold.
    pub fn no(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            type_,
            holds: Some(false),
            reason,
            message: message.into(),
        }
    }

    /// It cannot be known now.
    pub fn unknown(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            type_,
            holds: None,
            reason,
            message: message.into(),
        }
    }

    fn status(&self) -> &'static str {
        match self.holds {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        }
    }
}

/// The conditions for a status: each keeps its time as long as its status does not change.
pub fn conditions(
    findings: &[Finding],
    before: &[Condition],
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    findings
        .iter()
        .map(|finding| {
            let same = before.iter().find(|condition| {
                condition.type_ == finding.type_ && condition.status == finding.status()
            });
            Condition {
                type_: finding.type_.to_owned(),
                status: finding.status().to_owned(),
                reason: finding.reason.to_owned(),
                message: finding.message.clone(),
                last_transition_time: same.map_or_else(
                    || Time(now),
                    |condition| condition.last_transition_time.clone(),
                ),
                observed_generation: generation,
            }
        })
        .collect()
}

/// A condition of a status.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_time_stays_until_the_status_changes() {
        let (early, late) = (
            Timestamp::from_second(1).unwrap(),
            Timestamp::from_second(2).unwrap(),
        );
        let first = conditions(&[Finding::no("Ready", "Waiting", "a")], &[], Some(1), early);
        let second = conditions(
            &[Finding::no("Ready", "Failing", "b")],
            &first,
            Some(2),
            late,
        );
        assert_eq!(second[0].last_transition_time, Time(early));
        assert_eq!(
            (second[0].reason.as_str(), second[0].observed_generation),
            ("Failing", Some(2))
        );
        let third = conditions(
            &[Finding::yes("Ready", "Serving", "")],
            &second,
            Some(2),
            late,
        );
        assert_eq!(third[0].last_transition_time, Time(late));
    }
}
