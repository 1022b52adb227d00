//! The installer's life: make the node right, say so, look again every minute; and keep its cache clean.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cgroup_moves;
use crate::check::{self, Unfit};
use crate::containerd::{self, Configurator, Process};
use crate::host::Host;
use crate::payload::{self, PAYLOAD};
use crate::readiness::Readiness;
use crate::registration::{self, Registration};
use crate::sweep::Sweeper;
use crate::zygote_memory::{self, Limit};

const AGAIN: Duration = Duration::from_secs(60);

/// What no container uses is looked for so often.
const SWEEP: Duration = Duration::from_secs(15);

/// kubelet reports its runtimes with its status every ten seconds.
const REPORT: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    Payload(#[from] payload::Error),
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
    #[error(transparent)]
    Registration(#[from] registration::Error),
    #[error(transparent)]
    ZygoteMemory(#[from] zygote_memory::Error),
    #[error(
        "containerd runs with the runtime sock, but after {} s kubelet does not report it in node.status.runtimeHandlers; \
         kubelet 1.30 or later does", REPORT.as_secs()
    )]
    NotReported,
    #[error("{step}: {source}")]
    System {
        step: &'static str,
        source: std::io::Error,
    },
}

impl Error {
    /// Whether pods of sock cannot run here. An API server that does not answer, or a file of the installer's own container,
    /// says nothing of that: the label stays as it is.
    fn makes_unfit(&self) -> bool {
        match self {
            Self::Unfit(_) | Self::Payload(_) | Self::Containerd(_) | Self::NotReported => true,
            Self::Registration(_) | Self::ZygoteMemory(_) | Self::System { .. } => false,
        }
    }

    /// The reason that the node's event gives.
    fn reason(&self) -> &'static str {
        match self {
            Self::Unfit(_) => "SockUnfit",
            Self::Payload(_) => "SockFilesNotCopied",
            Self::Containerd(_) => "SockRuntimeNotConfigured",
            Self::NotReported => "SockRuntimeNotReported",
            Self::Registration(_) | Self::ZygoteMemory(_) | Self::System { .. } => "SockNodeError",
        }
    }
}

/// Runs until the process is ended.
pub fn run() -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::System {
            step: "start the event loop",
            source,
        })?;
    runtime.block_on(async {
        let zygote_memory = Limit::from_environment()?;
        let registration = Registration::connect().await?;
        let mut installer = Installer {
            host: Host::from_environment(),
            payload: std::env::var_os("SOCK_PAYLOAD")
                .map_or_else(|| PathBuf::from(PAYLOAD), PathBuf::from),
            favor_moves: std::env::var("SOCK_FAVOR_CGROUP_MOVES")
                .is_ok_and(|value| value == "true"),
            zygote_memory,
            configurator: Configurator::default(),
            registration,
            readiness: Readiness::default(),
        };
        let mut sweeper = Sweeper::new(&installer.host);
        let turns = async {
            let mut interval = every(AGAIN);
            loop {
                interval.tick().await;
                installer.turn().await;
            }
        };
        let sweeps = async {
            let mut interval = every(SWEEP);
            loop {
                interval.tick().await;
                sweeper.sweep(Instant::now());
            }
        };
        tokio::select! {
            () = turns => {}
            () = sweeps => {}
        }
        Ok(())
    })
}

/// Ticks at once, then every `period` at most: a turn that took long does not bring several in a row.
fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

struct Installer {
    host: Host,
    payload: PathBuf,
    favor_moves: bool,
    zygote_memory: Option<Limit>,
    configurator: Configurator,
    registration: Registration,
    readiness: Readiness,
}

impl Installer {
    async fn turn(&mut self) {
        let outcome = match self.install().await {
            Ok(()) => self.announce().await,
            Err(error) => Err(error),
        };
        let Err(error) = outcome else { return };
        tracing::error!("{error}");
        self.readiness.close();
        // Where the API server cannot be reached the log has to do.
        if error.makes_unfit()
            && let Err(error) = self.registration.label(Some("unfit")).await
        {
            tracing::warn!("{error}");
        }
        if let Err(error) = self
            .registration
            .warn(error.reason(), &error.to_string())
            .await
        {
            tracing::warn!("{error}");
        }
    }

    async fn install(&mut self) -> Result<(), Error> {
        check::print(&self.host)?;
        let written = payload::copy(&self.payload, &self.host.path(PAYLOAD))?;
        if written > 0 {
            tracing::info!(files = written, to = PAYLOAD, "copied");
        }
        if payload::link(&self.host)? {
            tracing::info!("containerd finds the runtime by its name");
        }
        let process = Process::find(&self.host)?;
        let shim = payload::shim();
        let features = self.host.run(&shim.to_string_lossy(), &["features"]);
        let features = features.map_err(containerd::Error::Host)?;
        if self
            .configurator
            .configure(&self.host, &process, &features)?
        {
            tracing::info!(config = %process.config.display(), unit = process.unit, "restarting containerd");
            containerd::restart(&self.host, &process)?;
            Configurator::restarted(&self.host)?;
        }
        zygote_memory::tell(&self.host, self.zygote_memory)?;
        if self.favor_moves {
            match cgroup_moves::favor(&self.host, true) {
                Ok(true) => tracing::info!("cgroups are mounted with favordynmods"),
                Ok(false) => {}
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(())
    }

    async fn announce(&mut self) -> Result<(), Error> {
        let begin = Instant::now();
        let node = loop {
            let node = self.registration.node().await?;
            if registration::offers_runtime(&node) {
                break node;
            }
            if begin.elapsed() > REPORT {
                return Err(Error::NotReported);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        self.readiness
            .open()
            .await
            .map_err(|source| Error::System {
                step: "open the port that the readiness probe asks for",
                source,
            })?;
        if registration::labelled(&node) != Some("ready") {
            self.registration.label(Some("ready")).await?;
            tracing::info!(label = registration::LABEL, "node is ready");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_keeps_pods_from_running_makes_a_node_unfit() {
        let readiness = Error::System {
            step: "open a port",
            source: std::io::ErrorKind::AddrInUse.into(),
        };
        assert!(!readiness.makes_unfit());
        assert!(!Error::from(registration::Error::NoName).makes_unfit());
        assert!(Error::NotReported.makes_unfit());
        assert!(Error::from(containerd::Error::NotRunning).makes_unfit());
    }
}
