//! Where the time of a start goes.

use std::cell::{Cell, RefCell};
use std::time::Instant;

/// A step and how long it took, in microseconds.
pub type Timed = (String, u64);

/// The steps of something, one after the other without a gap.
#[derive(Debug)]
pub struct Timeline {
    last: Cell<Instant>,
    steps: RefCell<Vec<(&'static str, u64)>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            last: Cell::new(Instant::now()),
            steps: RefCell::default(),
        }
    }
}

impl Timeline {
    /// Ends a step here; the next one begins.
    pub fn passed(&self, step: &'static str) {
        let now = Instant::now();
        let took = now.duration_since(self.last.replace(now)).as_micros();
        let took = u64::try_from(took).unwrap_or(u64::MAX);
        self.steps.borrow_mut().push((step, took));
    }

    /// The steps so far.
    #[must_use]
    pub fn steps(&self) -> Vec<Timed> {
        let steps = self.steps.borrow();
        steps
            .iter()
            .map(|(step, took)| ((*step).to_owned(), *took))
            .collect()
    }

    /// `STEP=MICROSECONDS`, each on a line of its own.
    pub(crate) fn text(&self) -> String {
        let steps = self.steps.borrow();
        let lines: Vec<String> = steps
            .iter()
            .map(|(step, took)| format!("{step}={took}"))
            .collect();
        lines.join("\n")
    }
}

/// What [`Timeline::text`] says.
pub(crate) fn parse(text: &str) -> Vec<Timed> {
    let parts = text.lines().filter_map(|line| line.split_once('='));
    parts
        .filter_map(|(step, took)| Some((step.to_owned(), took.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_as_they_were_timed() {
        let timeline = Timeline::default();
        std::thread::sleep(std::time::Duration::from_millis(2));
        timeline.passed("slept a while");
        timeline.passed("nothing");
        let steps = timeline.steps();
        assert_eq!(parse(&timeline.text()), steps);
        assert_eq!(steps.len(), 2);
        assert!(
            steps
                .first()
                .is_some_and(|(step, took)| step == "slept a while" && *took >= 2000)
        );
        assert_eq!(parse(""), []);
        assert_eq!(parse("no time\na=b\nc=3"), [("c".to_owned(), 3)]);
    }
}
