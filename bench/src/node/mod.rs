//! What runs on a node: sent there as one static program, told what to do by a JSON document on
//! standard input, answering with one on standard output. Measured next to the pods, so that neither
//! kubectl nor docker is in the figures.

pub mod containers;
pub mod first_answer;
pub mod kill;
pub mod load;
pub mod memory;
pub mod mix;
mod ports;
mod processes;
pub mod rate;
pub mod traffic;

use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Carries out `job` with the document on standard input.
///
/// # Errors
/// If there is no such job, the document is not the job's, or the job fails.
pub fn run(job: &str) -> Result<()> {
    match job {
        "call" => answer(|asked| load::call(&asked)),
        "load" => answer(|asked| load::run(&asked)),
        "rate" => answer(|asked| rate::run(&asked)),
        "mix" => answer(|asked| mix::run(&asked)),
        "forks" => answer(|asked| rate::forks(&asked)),
        "fork-loop" => answer(|asked| rate::fork_loop(&asked)),
        "first-answer" => answer(|asked| first_answer::run(&asked)),
        "memory" => answer(|asked: Vec<memory::Pod>| memory::run(&asked)),
        "kill" => answer(|asked| kill::run(&asked)),
        "runs" => answer(|asked| containers::runs(&asked)),
        "starts" => answer(|asked| containers::starts(&asked)),
        "lives" => answer(|asked| containers::lives(&asked)),
        "profiles" => answer(|asked| containers::profiles(&asked)),
        "traffic" => traffic::run(),
        _ => bail!("no job is called {job}"),
    }
}

fn answer<A: DeserializeOwned, R: Serialize>(job: impl FnOnce(A) -> Result<R>) -> Result<()> {
    let asked = serde_json::from_reader(std::io::stdin()).context("the document on stdin")?;
    serde_json::to_writer(std::io::stdout(), &job(asked)?)?;
    Ok(())
}

/// Output of a program of the node.
fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds since 1970, as the journal counts.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, micros)
}
