//! Activation: what makes the pod of a Function answer.
//!
//! The shim holds the pod's listening socket and every connection; leaves hold a connection while
//! they serve it. [`decide`] says who serves what, the driver carries it out, and [`Activation`] is
//! what the task API sees. Nothing here reads or relays requests.
//!
//! Everything runs on one thread, in a `LocalSet`, inside the pod's network namespace.

pub mod answers;
pub mod cgroups;
pub mod config;
pub mod connections;
pub mod decide;
mod driver;
mod end;
mod keeping;
mod leaf;
pub mod listener;
mod memory;
pub mod output;
pub mod tcp;
pub mod zygotes;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use sock_zygote::protocol::LeafSetup;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use cgroups::{BelowContainer, LeafCgroup, LeafCgroups};
pub use config::{Ancestor, AnnotationError, FunctionConfig, ZygoteName};
pub use end::{End, Shortage};
pub use leaf::{Origin, StartTimes};
pub use output::{Output, Streams};
pub use zygotes::{Directory, Forked, Interpreter, Local, Pools, Profile, Zygote, Zygotes};

use driver::Driver;
use listener::Listener;
use zygotes::Told;

/// kubelet gives up on a start after two minutes. What is left of this after waiting for a zygote is
/// the handler's, so that the error of the start says what was amiss.
const START_WITHIN: Duration = Duration::from_secs(115);
/// A pool that starts at the same time as the pod.
const POOL_WITHIN: Duration = Duration::from_secs(90);
/// A zygote that has ended for others and was asked for.
const BACK_WITHIN: Duration = Duration::from_secs(15);
/// Between two looks for a pool.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What activation needs of its surroundings.
pub struct Surroundings {
    /// Zygotes, if the Function has a PackageSet.
    pub zygotes: Option<Rc<dyn Zygotes>>,
    /// How to start the container's own command.
    pub interpreter: Rc<dyn Interpreter>,
    /// Where leaves live.
    pub cgroups: Rc<dyn LeafCgroups>,
    /// What leaves print goes there.
    pub output: Rc<Output>,
    /// What every leaf is told. An interpreter is told the same without confinement, since the
    /// container's own start has confined it.
    pub setup: LeafSetup,
    /// Of the container, so of its leaves.
    pub oom_score_adj: Option<i32>,
    /// How long to wait for a zygote at the start.
    pub pool_within: Duration,
    /// Where the kernel says how much memory the node has left.
    pub meminfo: PathBuf,
}

impl Surroundings {
    /// With the usual patience.
    #[must_use]
    pub fn new(
        zygotes: Option<Rc<dyn Zygotes>>,
        interpreter: Rc<dyn Interpreter>,
        cgroups: Rc<dyn LeafCgroups>,
        output: Rc<Output>,
        setup: LeafSetup,
    ) -> Surroundings {
        Surroundings {
            zygotes,
            interpreter,
            cgroups,
            output,
            setup,
            oom_score_adj: None,
            pool_within: POOL_WITHIN,
            meminfo: "/proc/meminfo".into(),
        }
    }
}

/// Why a Function's pod does not serve. The text is what `kubectl describe` shows.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port cannot be listened on.
    #[error("cannot listen on port {port}: {source}")]
    Listen {
        /// From the annotation.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// What leaves are told cannot be written down.
    #[error(transparent)]
    Setup(#[from] sock_zygote::Error),
    /// No leaf imported the handler.
    #[error("handler {handler}: {message}")]
    Handler {
        /// `module.attribute`.
        handler: String,
        /// The line that the Function's author must mend.
        message: String,
    },
}

/// Numbers of a pod that serves.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Leaves in any state.
    pub leaves: usize,
    /// Of these, not ready yet.
    pub starting: usize,
    /// Of these, without a connection.
    pub idle: usize,
    /// Of the idle ones, frozen.
    pub frozen: usize,
    /// Connections that wait for a leaf.
    pub queued: usize,
    /// Open connections, whoever has them.
    pub connections: usize,
    /// Requests by status.
    pub requests: BTreeMap<u16, u64>,
    /// Leaves that came from a zygote.
    pub forks: u64,
    /// Of these, forked ahead.
    pub spares: u64,
    /// Leaves that came from a plain interpreter.
    pub cold_starts: u64,
    /// Leaves that did not get ready.
    pub failed_starts: u64,
    /// Where the time of the youngest leaf's start went.
    pub last_start: Option<StartTimes>,
}

/// A Function's pod that serves.
pub struct Activation {
    driver: Rc<Driver>,
    port: u16,
    accept: RefCell<Option<JoinHandle<()>>>,
    timer: JoinHandle<()>,
    memory: JoinHandle<()>,
}

impl Activation {
    /// Listens, has one leaf import the handler, and serves from then on.
    ///
    /// Waits for a zygote if there should be one, and goes on with a plain interpreter if none comes.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running then.
    ///
    /// # Panics
    /// Outside of a `LocalSet` on a runtime with I/O and time.
    pub async fn start(
        config: &FunctionConfig,
        surroundings: Surroundings,
    ) -> Result<Activation, StartError> {
        let begin = Instant::now();
        let listen = |source| StartError::Listen {
            port: config.port,
            source,
        };
        let listener = Listener::bind(config.port).map_err(listen)?;
        let port = listener.port().map_err(listen)?;
        let Surroundings {
            zygotes,
            interpreter,
            cgroups,
            output,
            mut setup,
            oom_score_adj,
            pool_within,
            meminfo,
        } = surroundings;
        config.complete(&mut setup);
        let cold = Told::new(unconfined(setup))?;
        let rules = config.rules();
        let package_set = config
            .zygote
            .as_ref()
            .filter(|_| zygotes.is_some())
            .map(|zygote| &zygote.package_set);
        let ready_within = rules.ready_within;
        let driver = Rc::new(Driver::new(
            rules,
            zygotes,
            interpreter,
            cgroups,
            output,
            cold,
            oom_score_adj,
        ));
        let timer = tokio::task::spawn_local(Rc::clone(&driver).keep_time());
        let memory = tokio::task::spawn_local(memory::watch(Rc::clone(&driver), meminfo));
        let activation = Activation {
            driver,
            port,
            accept: RefCell::new(None),
            timer,
            memory,
        };

        if let Some(package_set) = package_set {
            activation
                .wait_for_zygote(package_set, begin + pool_within)
                .await;
        }
        let until = (Instant::now() + ready_within).min(begin + START_WITHIN);
        let first = tokio::time::timeout_at(until, activation.driver.first_leaf()).await;
        let first = first.unwrap_or_else(|_| {
            Err(format!(
                "not imported within {} s",
                (until - begin).min(ready_within).as_secs()
            ))
        });
        if let Err(message) = first {
            activation.stop(Duration::ZERO).await;
            return Err(StartError::Handler {
                handler: config.handler.clone(),
                message,
            });
        }
        let accept = tokio::task::spawn_local(Rc::clone(&activation.driver).accept(listener));
        activation.accept.replace(Some(accept));
        Ok(activation)
    }

    async fn wait_for_zygote(&self, package_set: &str, until: Instant) {
        let begin = Instant::now();
        while self.driver.zygote().await.is_none() {
            // One that the node has no memory for may not come back for long.
            let rests = self.driver.zygotes_rest() && begin.elapsed() >= BACK_WITHIN;
            if rests || Instant::now() >= until {
                let waited = begin.elapsed().as_secs();
                tracing::warn!(
                    package_set,
                    waited,
                    "no zygote on this node: plain interpreters serve until one is there"
                );
                return;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Goes on serving, and says with every answer that it is the last on its connection: clients that keep theirs go
    /// elsewhere while there is time, and no request meets the end.
    pub fn drain(&self) {
        self.driver.drain();
    }

    /// Closes the listening socket, lets requests that are there finish for at most `grace`, and ends
    /// all leaves. Nothing of them is left when this returns. May be called again with less grace.
    pub async fn stop(&self, grace: Duration) {
        let deadline = Instant::now() + grace;
        self.driver.close();
        let accept = self.accept.take();
        if let Some(accept) = accept {
            let _ = accept.await;
        }
        self.driver.stop(deadline.into_std()).await;
    }

    /// Numbers as of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let census = self.driver.census();
        let counts = self.driver.counts.borrow().clone();
        Stats {
            leaves: census.leaves,
            starting: census.starting,
            idle: census.idle,
            frozen: census.frozen,
            queued: census.queued,
            connections: self.driver.open_connections(),
            requests: counts.requests,
            forks: counts.forks,
            spares: counts.spares,
            cold_starts: counts.cold_starts,
            failed_starts: counts.failed_starts,
            last_start: counts.last_start,
        }
    }
}

impl Drop for Activation {
    fn drop(&mut self) {
        self.timer.abort();
        self.memory.abort();
        if let Some(accept) = self.accept.take() {
            accept.abort();
        }
    }
}

/// For a process that the container's own start has put into its root, cgroup and namespaces.
fn unconfined(setup: LeafSetup) -> LeafSetup {
    LeafSetup {
        intercept_sockets: false,
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        rlimits: Vec::new(),
        seccomp: Vec::new(),
        ..setup
    }
}
