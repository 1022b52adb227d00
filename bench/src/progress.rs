//! Tells on standard error what is going on.

use std::time::Instant;

/// Prints lines with the seconds since it was made.
#[derive(Debug)]
pub struct Progress(Instant);

impl Progress {
    /// Counts from now.
    #[must_use]
    pub fn start() -> Progress {
        Progress(Instant::now())
    }

    /// Says which step begins.
    pub fn step(&self, what: &str) {
        eprintln!("{:4}s  {what}", self.0.elapsed().as_secs());
    }
}
