//! Ends work when the user wants no more, so that nothing is left of it.

use std::future::Future;

use anyhow::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The user wants no more.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// SIGINT and SIGTERM, from when it is made.
#[derive(Debug)]
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    /// From now on neither signal ends the process.
    ///
    /// # Errors
    /// They cannot be caught.
    pub fn listen() -> std::io::Result<Stop> {
        Ok(Stop {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Does this until it is done, or a signal comes: then it is dropped.
    ///
    /// # Errors
    /// Its own, or [`Interrupted`].
    pub async fn unless<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            _ = self.interrupt.recv() => Err(Interrupted.into()),
            _ = self.terminate.recv() => Err(Interrupted.into()),
        }
    }
}
