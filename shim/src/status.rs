//! `GET /status`: a JSON document that anybody in the cluster may read, over the smallest HTTP server
//! that is right. Whoever asks is a stranger: connections, bytes and time are bounded, and each
//! connection gets one answer.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::activation::listener::{Accepted, Listener};

/// Connections at once; beyond it they wait in the kernel.
const MOST_CONNECTIONS: usize = 16;
/// From the connection to its end.
const TIME: Duration = Duration::from_secs(5);
/// Of a request's head.
const MOST_BYTES: usize = 8 * 1024;
const MOST_HEADERS: usize = 64;
/// Pause when descriptors have run out.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct StatusServer {
    port: u16,
    task: JoinHandle<()>,
}

impl StatusServer {
    /// Listens on `port` in the network namespace of the calling thread, and answers with what
    /// `document` yields at that time.
    ///
    /// # Errors
    /// What `bind(2)` says.
    ///
    /// # Panics
    /// Outside of a `LocalSet` on a runtime with I/O and time.
    pub fn start(port: u16, document: impl Fn() -> Value + 'static) -> io::Result<StatusServer> {
        let listener = Listener::bind(port)?;
        let port = listener.port()?;
        let task = tokio::task::spawn_local(serve(listener, Rc::new(document)));
        Ok(StatusServer { port, task })
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for StatusServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Counts a connection for as long as it lives.
struct Open(Rc<Cell<usize>>);

impl Open {
    fn new(count: &Rc<Cell<usize>>) -> Open {
        count.set(count.get() + 1);
        Open(Rc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn serve(listener: Listener, document: Rc<dyn Fn() -> Value>) {
    let open = Rc::new(Cell::new(0));
    let freed = Rc::new(tokio::sync::Notify::new());
    loop {
        while open.get() >= MOST_CONNECTIONS {
            freed.notified().await;
        }
        match listener.accept().await {
            Ok(Accepted::Connection(socket)) => {
                let (count, freed, document) =
                    (Open::new(&open), Rc::clone(&freed), Rc::clone(&document));
                tokio::task::spawn_local(async move {
                    // A client that is too slow, or goes away, has itself to blame.
                    let _ = timeout(TIME, answer(socket, &*document)).await;
                    drop(count);
                    freed.notify_one();
                });
            }
            Ok(Accepted::Nothing) => {}
            Ok(Accepted::Failed(errno)) => {
                tracing::warn!(%errno, "status: cannot accept");
                tokio::time::sleep(EXHAUSTED).await;
            }
            Err(error) => {
                tracing::error!(%error, "status: the socket cannot be watched");
                return;
            }
        }
    }
}

async fn answer(socket: OwnedFd, document: &dyn Fn() -> Value) -> io::Result<()> {
    let mut stream = TcpStream::from_std(socket.into())?;
    let mut head = Vec::with_capacity(512);
    let response = loop {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
        if let Some(response) = respond(&head, document, SystemTime::now()) {
            break response;
        }
    };
    stream.write_all(&response).await?;
    stream.shutdown().await?;
    // What is unread when the socket closes would turn the answer into a reset.
    let mut left = MOST_BYTES;
    let mut rest = [0; 1024];
    while left > 0 {
        match stream.read(&mut rest).await? {
            0 => break,
            n => left = left.saturating_sub(n),
        }
    }
    Ok(())
}

/// The whole response to a request whose head has come as far as `head`. `None` while more of it must come. However the bytes
/// come in pieces, the response is the same.
pub fn respond(head: &[u8], document: &dyn Fn() -> Value, now: SystemTime) -> Option<Vec<u8>> {
    let head = &head[..head.len().min(MOST_BYTES)];
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let (status, body) = match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => decide(request.method, request.path, document),
        Ok(httparse::Status::Partial) if head.len() < MOST_BYTES => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => (
            "431 Request Header Fields Too Large",
            json!({ "error": "the request's head is too large" }),
        ),
        Err(_) => ("400 Bad Request", json!({ "error": "this is not HTTP/1" })),
    };
    let body = body.to_string();
    let allow = if status.starts_with("405") {
        "Allow: GET, HEAD\r\n"
    } else {
        ""
    };
    let mut response = format!(
        "HTTP/1.1 {status}\r\nDate: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        httpdate::fmt_http_date(now),
        body.len(),
    );
    if request.method != Some("HEAD") {
        response.push_str(&body);
    }
    Some(response.into_bytes())
}

fn decide(
    method: Option<&str>,
    target: Option<&str>,
    document: &dyn Fn() -> Value,
) -> (&'static str, Value) {
    let path = target.and_then(|target| target.split('?').next());
    match (path, method) {
        (Some("/status"), Some("GET" | "HEAD")) => ("200 OK", document()),
        (Some("/status"), _) => (
            "405 Method Not Allowed",
            json!({ "error": "only GET and HEAD" }),
        ),
        _ => ("404 Not Found", json!({ "error": "only /status is here" })),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Something like a request, and anything else.
    fn heads() -> impl Strategy<Value = Vec<u8>> {
        let text = r"(GET|HEAD|POST|[A-Z]{0,3}) (/status|/|\PC{0,8})(\?[a-z]{0,4})? HTTP/1\.[01]\r?\n([A-Za-z-]{0,8}:[ -~]{0,20}\r?\n){0,80}(\r\n)?\PC{0,4}";
        prop_oneof![
            4 => text.prop_map(String::into_bytes),
            1 => prop::collection::vec(any::<u8>(), 0..300),
            1 => (text, 0..20_000usize).prop_map(|(text, length)| {
                let mut bytes = text.replace("\r\n\r\n", "\r\nx: ").into_bytes();
                bytes.resize(length, b'x');
                bytes
            }),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_get_one_whole_response_however_they_are_cut(bytes in heads(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4)) {
            let document = || json!({ "ready": true });
            let whole = respond(&bytes, &document, SystemTime::UNIX_EPOCH);
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([bytes.len()]).collect();
            ends.sort_unstable();
            let first = ends.iter().find_map(|end| respond(&bytes[..*end], &document, SystemTime::UNIX_EPOCH));
            prop_assert_eq!(&whole, &first);
            match whole {
                None => prop_assert!(bytes.len() < MOST_BYTES),
                Some(response) => {
                    let mut headers = [httparse::EMPTY_HEADER; 8];
                    let mut parsed = httparse::Response::new(&mut headers);
                    let Ok(httparse::Status::Complete(end)) = parsed.parse(&response) else {
                        return Err(TestCaseError::fail(format!("{response:?}")));
                    };
                    prop_assert!(matches!(parsed.code, Some(200 | 400 | 404 | 405 | 431)));
                    let length = parsed.headers.iter().find(|h| h.name == "Content-Length").expect("a length");
                    let length: usize = std::str::from_utf8(length.value).expect("digits").parse().expect("a number");
                    let body = response.len() - end;
                    prop_assert!(body == length || (body == 0 && bytes.windows(5).any(|w| w == b"HEAD ")));
                }
            }
        }
    }

    fn in_local<F: Future<Output = ()>>(test: impl FnOnce(u16) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let server = StatusServer::start(0, || json!({ "ready": true })).expect("a server");
            test(server.port()).await;
        });
    }

    async fn ask(port: u16, request: &[u8]) -> String {
        let mut client = TcpStream::connect(("127.0.0.1", port))
            .await
            .expect("a connection");
        client.write_all(request).await.expect("send");
        let mut answer = String::new();
        timeout(TIME, client.read_to_string(&mut answer))
            .await
            .expect("in time")
            .expect("no reset");
        answer
    }

    #[test]
    fn it_answers_with_the_document() {
        in_local(|port| async move {
            let answer = ask(port, b"GET /status HTTP/1.1\r\nHost: pool\r\n\r\n").await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("\r\nContent-Length: 14\r\n"), "{answer}");
            assert!(answer.ends_with("\r\n\r\n{\"ready\":true}"), "{answer}");
            let head = ask(port, b"HEAD /status?x HTTP/1.1\r\nHost: pool\r\n\r\n").await;
            assert!(
                head.contains("\r\nContent-Length: 14\r\n") && head.ends_with("\r\n\r\n"),
                "{head}"
            );
        });
    }

    #[test]
    fn what_it_does_not_serve_it_says() {
        in_local(|port| async move {
            let mut large = b"GET /status HTTP/1.1\r\nX: ".to_vec();
            large.resize(MOST_BYTES + 1000, b'x');
            for (request, status) in [
                (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
                (
                    b"POST /status HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
                    "405",
                ),
                (b"\x16\x03\x01 hello\r\n\r\n", "400"),
                (&large, "431"),
            ] {
                let answer = ask(port, request).await;
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status} ")),
                    "{answer}"
                );
            }
        });
    }

    #[test]
    fn silent_clients_do_not_keep_others_out_for_longer_than_their_time() {
        in_local(|port| async move {
            let mut silent = Vec::new();
            for _ in 0..MOST_CONNECTIONS {
                silent.push(
                    TcpStream::connect(("127.0.0.1", port))
                        .await
                        .expect("a connection"),
                );
            }
            let mut client = TcpStream::connect(("127.0.0.1", port))
                .await
                .expect("a connection");
            client
                .write_all(b"GET /status HTTP/1.1\r\n\r\n")
                .await
                .expect("send");
            let mut answer = String::new();
            let read = timeout(2 * TIME, client.read_to_string(&mut answer)).await;
            read.expect("in time").expect("no reset");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        });
    }
}
