//! Ordinary pods on runc: how long they need until their first answer, and what they weigh.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use crate::cluster::{self, Equipped};
use crate::http::Request;
use crate::node::first_answer::{Answered, FirstAnswer};
use crate::objects::{PORT, Peer};

/// How often a pod is made anew when it was there before the client was.
const ATTEMPTS: usize = 5;

/// Makes a pod, times its first answer in microseconds, and removes it.
///
/// # Errors
/// If the answer is wrong or does not come.
pub fn first_answer(node: &Equipped, peer: &Peer, request: &Request) -> Result<u64> {
    for attempt in 0..ATTEMPTS {
        let mut pod = peer.name.to_owned();
        write!(pod, "-cold-{}-{attempt}", std::process::id())?;
        let namespace = peer.namespace.to_owned();
        let asked = FirstAnswer {
            namespace,
            pod,
            port: PORT,
            request: request.clone(),
        };
        let made = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| node.job::<Answered>("first-answer", &asked));
            let applied = cluster::apply(&[peer.pod(&asked.pod)]);
            let answered = waiting
                .join()
                .unwrap_or_else(|_| bail!("the thread that waits for the answer panicked"));
            applied.and(answered)
        });
        let removed = cluster::kubectl(&[
            "delete",
            "pod",
            "-n",
            peer.namespace,
            &asked.pod,
            "--now",
            "--wait=true",
        ]);
        let Answered { took } = made?;
        removed?;
        if let Some(took) = took {
            return Ok(took);
        }
    }
    bail!("the node's client found the pod serving already, {ATTEMPTS} times")
}
