//! How long a pod that is just being created needs until its first answer, counted from the moment
//! that containerd calls its container started. What comes before, the work of runc among it, is left
//! out: it can only make the pod look faster than it is.

use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{now, output};
use crate::http::{Connection, Request};

const UNTIL_ANSWER: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(1);
/// Of the answer to one attempt: the pod may drop what comes too early.
const CONTAINERS: Duration = Duration::from_millis(50);

/// Which pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FirstAnswer {
    /// Of the pod.
    pub namespace: String,
    /// Of the pod, which need not be there yet.
    pub pod: String,
    /// That it will listen on.
    pub port: u16,
    /// To ask; its number is 0.
    pub request: Request,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answered {
    /// Microseconds from the start of the container; `None` where the pod was found serving
    /// already, so that nobody knows for how long.
    pub took: Option<u64>,
}

/// Waits for the pod and for its answer.
///
/// # Errors
/// If the answer is wrong or does not come, or `crictl` does not say when the container started.
pub fn run(asked: &FirstAnswer) -> Result<Answered> {
    let deadline = Instant::now() + UNTIL_ANSWER;
    let sandbox = loop {
        if let Some(found) = sandbox(asked)? {
            break found;
        }
        late(deadline, "its sandbox")?;
    };
    let address = SocketAddr::new(sandbox.address, asked.port);
    let request = asked.request.number(0);
    let mut refused = false;
    let answer = loop {
        match Connection::open(address) {
            Ok(mut connection) => break connection.ask(&request)?,
            Err(_) => refused = true,
        }
        late(deadline, "its answer")?;
        sleep(PAUSE);
    };
    let answered = now();
    request.check(&answer)?;
    let started = started(&sandbox.id, deadline)?;
    Ok(Answered {
        took: refused.then(|| answered.saturating_sub(started)),
    })
}

fn late(deadline: Instant, what: &str) -> Result<()> {
    if Instant::now() > deadline {
        bail!("{what} did not come within {} s", UNTIL_ANSWER.as_secs());
    }
    Ok(())
}

struct Sandbox {
    id: String,
    address: IpAddr,
}

fn sandbox(asked: &FirstAnswer) -> Result<Option<Sandbox>> {
    let (name, namespace) = (format!("^{}$", asked.pod), format!("^{}$", asked.namespace));
    let arguments = ["pods", "-q", "--state", "ready", "--name", &name];
    let found = output(
        "crictl",
        &[&arguments[..], &["--namespace", &namespace]].concat(),
    )?;
    let Some(id) = found.lines().next() else {
        return Ok(None);
    };
    let status = json(&output("crictl", &["inspectp", id])?)?;
    let address = status["status"]["network"]["ip"].as_str();
    let address = address.context("a sandbox without an address")?.parse()?;
    let id = id.to_owned();
    Ok(Some(Sandbox { id, address }))
}

/// Microseconds since 1970.
fn started(sandbox: &str, deadline: Instant) -> Result<u64> {
    loop {
        let found = output("crictl", &["ps", "-q", "--pod", sandbox])?;
        if let Some(container) = found.lines().next() {
            let status = json(&output("crictl", &["inspect", container])?)?;
            let started = status["status"]["startedAt"].as_str();
            return microseconds(started.context("a container without a start")?);
        }
        late(deadline, "the start of its container")?;
        sleep(CONTAINERS);
    }
}

fn microseconds(timestamp: &str) -> Result<u64> {
    let timestamp: jiff::Timestamp = timestamp.parse()?;
    Ok(u64::try_from(timestamp.as_microsecond())?)
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).context("the answer of crictl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_read_to_the_microsecond() {
        let time = "2026-11-23T14:50:17.707801369Z";
        assert_eq!(microseconds(time).unwrap(), 1_795_445_417_707_801);
        assert!(microseconds("0").is_err());
    }
}
