//! The traffic that a fault is injected into: a client on a node that no fault hits, and all that became
//! of its requests until now.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::cluster::Equipped;
use crate::node::traffic::{Request, Target};

/// See the module. Ends when it is dropped.
#[derive(Debug)]
pub struct Traffic {
    child: Child,
    targets: ChildStdin,
    current: Vec<Target>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Traffic {
    /// A client without targets.
    ///
    /// # Errors
    /// If docker does not run.
    pub fn start(node: &Equipped) -> Result<Traffic> {
        let mut child = node.start("traffic")?;
        let targets = child.stdin.take().context("standard input")?;
        let output = child.stdout.take().context("standard output")?;
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(request) => lock(&seen).push(request),
                    Err(error) => eprintln!("the client said {line:?}: {error}"),
                }
            }
        });
        Ok(Traffic {
            child,
            targets,
            current: Vec::new(),
            requests,
        })
    }

    /// Sends to these from now on.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn aim(&mut self, targets: Vec<Target>) -> Result<()> {
        if targets != self.current {
            let mut line = serde_json::to_vec(&targets)?;
            line.push(b'\n');
            self.targets
                .write_all(&line)
                .context("the client's input")?;
            self.current = targets;
        }
        Ok(())
    }

    /// Its targets.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.current
    }

    /// The requests that began at `from` (microseconds since 1970) or later, or ended then.
    #[must_use]
    pub fn since(&self, from: u64) -> Vec<Request> {
        let requests = lock(&self.requests);
        let late = requests.iter().filter(|request| request.ended >= from);
        late.cloned().collect()
    }

    /// Forgets what ended before.
    pub fn forget(&self, before: u64) {
        lock(&self.requests).retain(|request| request.ended >= before);
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
