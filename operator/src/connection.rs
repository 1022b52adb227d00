//! The way to the API server that the controllers take: it writes only while this process leads, waits for no answer
//! for ever, and says when the API server wants to be left alone for a while.

use std::time::Duration;

use hyper::header::RETRY_AFTER;
use hyper::{Method, Request, Response};
use kube::client::Body;
use kube::{Client, Config};
use tokio::time::timeout;
use tower::BoxError;

use crate::leader::Leadership;

/// How long the head of an answer may take. A webhook may take 30 s of it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long the API server may be silent within an answer. A watch is silent for 295 s at most: kube ends it then.
const SILENCE: Duration = Duration::from_secs(320);

/// Why a call was not made, or has no answer that is of use, if it is not kube that says so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process may lead by now.
    #[error("the Lease may be lost: nothing is written any more")]
    NotLeading,
    /// The API server does not answer.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    NoAnswer,
    /// The API server has too much to do.
    #[error("the API server asks to try again in {} s", after.as_secs())]
    Busy {
        /// How long it wants to be left alone.
        after: Duration,
    },
}

/// A client for the candidate, and for [`guarded`].
///
/// # Errors
///
/// If there is no configuration, or one that no connection can be made of.
pub async fn connect() -> Result<Client, kube::Error> {
    let mut config = Config::infer().await.map_err(kube::Error::InferConfig)?;
    // By default kube tries again up to 15 times within one call, minutes later at the last: a write could come after
    // the Lease is lost. Reconciling is tried again as a whole.
    config.default_retry = false;
    config.read_timeout = Some(SILENCE);
    Client::try_from(config)
}

/// A client that writes only as long as this process leads.
pub fn guarded(client: Client, leadership: Leadership) -> Client {
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request| {
        let (client, leadership) = (client.clone(), leadership.clone());
        async move { send(&client, &leadership, request).await }
    });
    Client::new(service, namespace)
}

async fn send(
    client: &Client,
    leadership: &Leadership,
    request: Request<Body>,
) -> Result<Response<Body>, BoxError> {
    if request.method() != Method::GET && !leadership.holds() {
        return Err(Error::NotLeading.into());
    }
    let response = timeout(PATIENCE, client.send(request))
        .await
        .map_err(|_| Error::NoAnswer)??;
    let after = response.headers().get(RETRY_AFTER);
    let after = after.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
    match after {
        Some(seconds) if !response.status().is_success() => Err(Error::Busy {
            after: Duration::from_secs(seconds),
        }
        .into()),
        _ => Ok(response),
    }
}
