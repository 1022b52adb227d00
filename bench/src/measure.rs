//! The steps of which both the benchmark and the demonstration are made.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cluster::{self, Equipped, Pod};
use crate::http::Request;
use crate::node::load::{Connections, Load, Outcome, Sample};
use crate::node::memory::{self, Memory};
use crate::objects::PORT;
use crate::stats::Samples;

/// Between requests on new connections, so that the end of one leaf, which takes the kernel
/// milliseconds, and the fork of the next spare are not in the next request.
const PAUSE_MILLIS: u64 = 50;
const UNTIL_IDLE: Duration = Duration::from_secs(60);

/// Where a node keeps what a PackageSet has installed.
///
/// # Errors
/// If there is no such PackageSet, or it was never ready.
pub fn packages_directory(namespace: &str, set: &str) -> Result<String> {
    let set = cluster::get(&["packageset", "-n", namespace, set])?;
    let namespace = cluster::get(&["namespace", namespace])?;
    let tenant = namespace["metadata"]["uid"]
        .as_str()
        .context("a namespace without a UID")?;
    let lock = set["status"]["readyLock"]
        .as_str()
        .context("a PackageSet without status.readyLock")?;
    Ok(format!("/var/lib/sock/cache/{tenant}/{lock}/site-packages"))
}

/// Waits until no pod holds an interpreter.
///
/// # Errors
/// If that takes too long.
pub fn when_idle(node: &Equipped, pods: &[Pod]) -> Result<Vec<Memory>> {
    let deadline = Instant::now() + UNTIL_IDLE;
    loop {
        let memory = weigh(node, pods)?;
        if !memory.iter().any(holds_interpreter) {
            return Ok(memory);
        }
        if Instant::now() > deadline {
            bail!(
                "interpreters are left in idle pods after {} s: {memory:?}",
                UNTIL_IDLE.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn holds_interpreter(memory: &Memory) -> bool {
    memory
        .processes
        .keys()
        .any(|name| name.starts_with("python"))
}

/// What pods of the node use.
///
/// # Errors
/// If one of them is not there.
pub fn weigh(node: &Equipped, pods: &[Pod]) -> Result<Vec<Memory>> {
    let pods: Vec<memory::Pod> = pods
        .iter()
        .map(|pod| memory::Pod {
            uid: pod.uid.clone(),
        })
        .collect();
    node.job("memory", &pods)
}

/// A load with the pauses that its kind needs.
#[must_use]
pub fn load(
    pod: &Pod,
    request: Request,
    connections: Connections,
    warm_up: usize,
    requests: usize,
) -> Load {
    let pause_millis = if connections == Connections::New {
        PAUSE_MILLIS
    } else {
        0
    };
    let address = (pod.address, PORT).into();
    Load {
        address,
        request,
        connections,
        warm_up,
        requests,
        pause_millis,
    }
}

/// Sends a load.
///
/// # Errors
/// If a request is not answered rightly.
pub fn answered(node: &Equipped, load: &Load) -> Result<Vec<Sample>> {
    let outcome: Outcome = node.job("load", load)?;
    if let Some(wrong) = outcome.wrong.first() {
        bail!(
            "{} of {} requests were not answered rightly; the first: {wrong}",
            outcome.wrong.len(),
            load.requests
        );
    }
    Ok(outcome.samples)
}

/// Of requests, in milliseconds.
///
/// # Errors
/// If there are none.
pub fn durations(samples: &[Sample]) -> Result<Samples> {
    Samples::new(samples.iter().map(|sample| millis(sample.took)).collect()).context("no samples")
}

/// Microseconds as milliseconds.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of a request are far below 2^52"
)]
pub fn millis(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

/// Of pods.
///
/// # Errors
/// If there are none.
#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of a pod are far below 2^52"
)]
pub fn megabytes(pods: &[Memory], of: impl Fn(&Memory) -> u64) -> Result<Samples> {
    Samples::new(pods.iter().map(|memory| of(memory) as f64 / 1e6).collect()).context("no pods")
}
