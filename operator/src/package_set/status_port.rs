//! Asks the pods of a pool how long their imports took.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::contract::STATUS_PORT;

/// A pod on the same network answers within milliseconds; one that cannot be reached is left out.
const PATIENCE: Duration = Duration::from_millis(500);

/// The answer is a list of module names at most.
const LONGEST: usize = 64 * 1024;

/// Pods that are asked: enough to see the slowest kind of node.
const SAMPLE: usize = 20;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    import_micros: u64,
}

/// The longest import among the pods, in milliseconds; none if no pod answers.
pub async fn import_millis<'a>(pods: impl Iterator<Item = &'a Pod>) -> Option<i64> {
    let addresses = pods
        .filter_map(|pod| pod.status.as_ref()?.pod_ip.as_ref()?.parse::<IpAddr>().ok())
        .take(SAMPLE);
    let answers = join_all(addresses.map(|address| async move {
        timeout(PATIENCE, ask(SocketAddr::new(address, STATUS_PORT)))
            .await
            .ok()
            .flatten()
    }))
    .await;
    let longest = answers.into_iter().flatten().max()?;
    i64::try_from(longest.div_ceil(1000)).ok()
}

async fn ask(address: SocketAddr) -> Option<u64> {
    let stream = TcpStream::connect(address).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .ok()?;
    let request = hyper::Request::get("/status")
        .header(hyper::header::HOST, address.to_string())
        .body(Empty::<Bytes>::new())
        .ok()?;
    let exchange = async {
        let response = sender.send_request(request).await.ok()?;
        Limited::new(response.into_body(), LONGEST)
            .collect()
            .await
            .ok()
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    let body = tokio::select! {
        body = &mut exchange => body?,
        _ = &mut connection => exchange.await?,
    };
    Some(
        serde_json::from_slice::<Answer>(&body.to_bytes())
            .ok()?
            .import_micros,
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn answer(text: &'static str) -> Option<u64> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.unwrap();
            assert!(head[..read].starts_with(b"GET /status HTTP/1.1\r\n"));
            stream.write_all(text.as_bytes()).await.unwrap();
        };
        tokio::join!(ask(address), server).0
    }

    #[tokio::test]
    async fn an_answer_is_read() {
        let body = r#"{"ready":true,"importMicros":912345,"modules":["pandas"]}"#;
        let text = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        assert_eq!(answer(text.leak()).await, Some(912_345));
    }

    #[tokio::test]
    async fn nonsense_is_no_answer() {
        assert_eq!(
            answer("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]").await,
            None
        );
        assert_eq!(answer("220 mail\r\n").await, None);
    }
}
