//! The operator: makes of Functions and PackageSets what Kubernetes runs.

#![forbid(unsafe_code)]

mod cluster;
mod condition;
mod contract;
mod function;
mod leader;
mod metrics;
mod package_set;
mod pods;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod script;
mod serve;

use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use futures::FutureExt as _;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::cluster::Context;
use crate::leader::Candidate;
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
    #[error("the Lease is lost: another operator goes on")]
    LeaseLost,
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

    let client = Client::try_default().await.map_err(Box::new)?;
    let namespace = std::env::var("POD_NAMESPACE").unwrap_or_else(|_| "sock-system".into());
    let identity =
        std::env::var("POD_NAME").unwrap_or_else(|_| format!("process-{}", std::process::id()));
    let mut candidate = Candidate::new(client.clone(), &namespace, identity.clone());

    let leading = async {
        candidate.acquire().await;
        metrics.leads(true);
        tracing::info!(identity, "leading");
        let context = Arc::new(Context {
            client: client.clone(),
            recorder: Recorder::new(
                client.clone(),
                Reporter {
                    controller: "sock.dev/operator".into(),
                    instance: Some(identity.clone()),
                },
            ),
            metrics: Arc::clone(&metrics),
        });
        let functions = function::run(client.clone(), Arc::clone(&context));
        let package_sets = package_set::run(client.clone(), context);
        tokio::select! {
            () = candidate.hold() => Error::LeaseLost,
            () = functions => Error::ControllersEnded,
            () = package_sets => Error::ControllersEnded,
        }
    };

    tokio::select! {
        () = stop => {}
        error = serving => return Err(error),
        error = leading => return Err(error),
    }
    if let Err(error) = candidate.release().await {
        tracing::warn!(%error, "give up the Lease");
    }
    Ok(())
}
