//! The operator: makes of Functions and PackageSets what Kubernetes runs.

#![forbid(unsafe_code)]

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod api_server;
mod cluster;
mod condition;
mod connection;
mod contract;
mod controller;
mod function;
mod leader;
mod metrics;
mod package_set;
mod pods;
mod serve;

use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use futures::FutureExt as _;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::cluster::Context;
use crate::leader::{Candidate, Leadership};
use crate::metrics::Metrics;

/// How the operator came to its end.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("start the event loop: {0}")]
    EventLoop(std::io::Error),
    #[error("no connection to the API server can be made: {0}")]
    Client(#[from] Box<kube::Error>),
    #[error("wait for signals: {0}")]
    Signals(std::io::Error),
    #[error("serve probes and metrics on {0}: {1}")]
    Serve(SocketAddr, std::io::Error),
    #[error("the controllers ended by themselves")]
    ControllersEnded,
    #[error("SOCK_OPERATOR_ADDRESS is {0}, which is no address with a port, as in [::]:8080")]
    Address(String),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube=warn")),
        )
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::EventLoop)
        .and_then(|runtime| runtime.block_on(operate()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn operate() -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };

    let address = match std::env::var("SOCK_OPERATOR_ADDRESS") {
        Ok(text) => text.parse().map_err(|_| Error::Address(text))?,
        Err(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8080)),
    };
    let metrics = Arc::new(Metrics::new());
    let serving = serve::serve(address, Arc::clone(&metrics)).map(|outcome| match outcome {
        Ok(()) => Error::ControllersEnded,
        Err(error) => Error::Serve(address, error),
    });

    let client = connection::connect().await.map_err(Box::new)?;
    let namespace = std::env::var("POD_NAMESPACE").unwrap_or_else(|_| "sock-system".into());
    tokio::select! {
        error = serving => Err(error),
        outcome = lead(client, &namespace, identity(), metrics, stop) => outcome,
    }
}

/// Who this process is, and no other: its pod, or something random where it does not run in one.
fn identity() -> String {
    std::env::var("POD_NAME").unwrap_or_else(|_| {
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ());
        format!("process-{}-{random:016x}", std::process::id())
    })
}

/// Waits for the Lease, reconciles as long as it holds, and gives it up when it is told to stop. One that loses the Lease
/// waits for it again: a process that ended instead would be started with longer and longer pauses.
async fn lead(
    client: Client,
    namespace: &str,
    identity: String,
    metrics: Arc<Metrics>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let leadership = Leadership::default();
    let mut candidate = Candidate::new(
        client.clone(),
        namespace,
        identity.clone(),
        leadership.clone(),
    );
    let leading = async {
        loop {
            candidate.acquire().await;
            metrics.leads(true);
            tracing::info!(identity, "leading");
            let client = connection::guarded(client.clone(), leadership.clone());
            let context = Arc::new(Context::new(client, &identity, Arc::clone(&metrics)));
            // The Lease comes first: after a pause of the process it is looked at before anything is written.
            tokio::select! {
                biased;
                () = candidate.hold() => {}
                () = function::run(Arc::clone(&context)) => return Error::ControllersEnded,
                () = package_set::run(context) => return Error::ControllersEnded,
            }
            metrics.leads(false);
            tracing::warn!("the Lease is lost: nothing is reconciled until it is ours again");
        }
    };
    tokio::select! {
        () = stop => {}
        error = leading => {
            metrics.leads(false);
            return Err(error);
        }
    }
    metrics.leads(false);
    if let Err(error) = candidate.release().await {
        tracing::warn!(%error, "give up the Lease");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
