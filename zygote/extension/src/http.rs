//! A leaf's requests: HTTP/1.1 by hyper, on connections that the shim hands over and may get back.
//!
//! There is no asynchronous runtime. A handler is an ordinary blocking function, so while it runs
//! nothing else can; between handlers everything waits in one poll(2). That costs nothing to start,
//! which matters in a process that is forked for one request.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, Response, StatusCode};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use sock_zygote_protocol::{self as protocol, FromLeaf, LeafSetup, Received, ToLeaf};

use crate::leaf::exit;
use crate::python::{Answer, Runtime};
use crate::stream::{Shared, Stage, Stream};

/// A head that is not complete after this long will not be (hyper's own default with a timer).
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// Largest request head, in bytes.
const MOST_HEAD: usize = 64 * 1024;
/// Longest `X-Request-Id` that is taken over from a client.
const MOST_REQUEST_ID: usize = 128;

/// What serves: the handler and what it may know.
pub struct Server {
    handler: Py<PyAny>,
    setup: LeafSetup,
}

impl Server {
    pub fn new(handler: Py<PyAny>, mut setup: LeafSetup) -> Server {
        // Used up; they need not stand in memory twice.
        setup.env = Vec::new();
        setup.seccomp = Vec::new();
        Server { handler, setup }
    }
}

/// Serves until the shim has no more to say, or the only request is answered. Yields the exit status.
pub fn serve(py: Python<'_>, runtime: &Runtime, control: &OwnedFd, server: Server) -> i32 {
    let Ok(control) = control.as_fd().try_clone_to_owned() else {
        return 1;
    };
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let shop = Rc::new(Shop {
        single: server.setup.single_request,
        park_after: Duration::from_millis(server.setup.park_after_ms),
        server,
        runtime: runtime.clone_ref(py),
        lost: Cell::new(false),
        draining: Cell::new(false),
        heard: RefCell::default(),
        control,
    });
    let mut leaf = Loop {
        shop,
        connections: Vec::new(),
        leaving: false,
        waker: Waker::from(woken.clone()),
        woken,
    };
    loop {
        if let Some(status) = leaf.turn(py) {
            return status;
        }
    }
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What all connections share.
struct Shop {
    server: Server,
    runtime: Runtime,
    single: bool,
    park_after: Duration,
    control: OwnedFd,
    /// The shim is gone.
    lost: Cell<bool>,
    /// The pod stops: see [`ToLeaf::DRAIN`].
    draining: Cell<bool>,
    /// Messages of the shim that came while a request was under way.
    heard: RefCell<VecDeque<Message>>,
}

type Message = Result<Received<ToLeaf>, protocol::Error>;

impl Shop {
    fn tell(&self, message: &FromLeaf) {
        if protocol::send(&self.control, message, &[]).is_err() {
            self.lost.set(true);
        }
    }

    /// Takes what the shim has said by now, and keeps what is not for this moment.
    fn listen(&self) {
        loop {
            let mut control = [PollFd::new(&self.control, PollFlags::IN)];
            if !matches!(poll(&mut control, Some(&Timespec::default())), Ok(1)) {
                return;
            }
            let drain = ToLeaf::Park {
                conn: ToLeaf::DRAIN,
            };
            match protocol::receive::<ToLeaf>(&self.control) {
                Ok(Received { message, .. }) if message == drain => self.draining.set(true),
                Ok(message) => self.heard.borrow_mut().push_back(Ok(message)),
                Err(error) if error.would_block() => return,
                Err(error) => return self.heard.borrow_mut().push_back(Err(error)),
            }
        }
    }
}

type Http = http1::Connection<Stream, Requests>;

struct Connection {
    id: u64,
    shared: Rc<Shared>,
    http: Box<Http>,
    idle_since: Instant,
    /// hyper has not seen all there is to see, whatever the socket says.
    runnable: bool,
    /// The shim wants it back as soon as it is idle.
    wanted_back: bool,
}

/// What became of a connection.
#[derive(PartialEq, Eq)]
enum Fate {
    Open,
    Parked,
    Closed,
}

struct Loop {
    shop: Rc<Shop>,
    connections: Vec<Connection>,
    /// Finish what is under way, begin nothing.
    leaving: bool,
    waker: Waker,
    woken: Arc<Woken>,
}

impl Loop {
    /// Waits once and does what there is to do. `Some` is the end.
    fn turn(&mut self, py: Python<'_>) -> Option<i32> {
        let heard = !self.shop.heard.borrow().is_empty();
        let deadline = if heard {
            Some(Instant::now())
        } else {
            self.deadline()
        };
        let wait = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let ready = match wait_for(py, &self.shop.control, &self.connections, wait) {
            Ok(ready) => ready,
            Err(errno) => {
                eprintln!("sock: wait for requests (poll): {errno}");
                return Some(1);
            }
        };
        if let Err(error) = py.check_signals() {
            // What Python's own interpreter does with an unhandled KeyboardInterrupt.
            eprintln!("{error}");
            return Some(130);
        }
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            self.shop.listen();
        }
        let heard = self.shop.heard.take();
        if !heard.into_iter().all(|message| self.hear(message)) {
            return Some(0);
        }
        let now = Instant::now();
        let mut ready = ready.chain(std::iter::repeat(false));
        let mut kept = Vec::with_capacity(self.connections.len());
        let mut served = false;
        for mut connection in std::mem::take(&mut self.connections) {
            let runnable = std::mem::take(&mut connection.runnable);
            let is_ready = ready.next() == Some(true) || runnable;
            let fate = self.attend(&mut connection, is_ready, now);
            served |= connection.shared.requests.get() > 0 || fate != Fate::Open;
            match fate {
                Fate::Open => kept.push(connection),
                Fate::Parked => self.give_up(connection, |conn| FromLeaf::Parked { conn }),
                Fate::Closed => {
                    connection.shared.shutdown();
                    self.give_up(connection, |conn| FromLeaf::Closed { conn });
                }
            }
        }
        self.connections = kept;
        if self.shop.lost.get() {
            return Some(0);
        }
        let over = self.leaving || (self.shop.single && served);
        (over && self.connections.is_empty()).then_some(0)
    }

    /// The descriptor is closed before the shim hears of it.
    fn give_up(&self, connection: Connection, message: impl FnOnce(u64) -> FromLeaf) {
        let id = connection.id;
        drop(connection);
        self.shop.tell(&message(id));
    }

    fn deadline(&self) -> Option<Instant> {
        let of = |connection: &Connection| match connection.shared.stage.get() {
            Stage::Idle(Some(since)) => Some(since + HEAD_WITHIN),
            Stage::Idle(None) if connection.shared.requests.get() > 0 => {
                Some(connection.idle_since + self.shop.park_after)
            }
            Stage::Idle(None) => Some(connection.idle_since + HEAD_WITHIN),
            Stage::Serving(_) | Stage::Answered { .. } => None,
        };
        self.connections.iter().filter_map(of).min()
    }

    /// A message of the shim. `false` when the leaf is to end at once.
    fn hear(&mut self, message: Message) -> bool {
        match message {
            Ok(Received {
                message: ToLeaf::Serve { conn },
                mut fds,
                ..
            }) => match (fds.pop(), fds.is_empty()) {
                (Some(fd), true)
                    if !self.leaving && !self.connections.iter().any(|c| c.id == conn) =>
                {
                    self.connections.push(self.open(conn, fd));
                }
                // The shim has kept its duplicate and sees that nothing was read.
                _ => self.shop.tell(&FromLeaf::Parked { conn }),
            },
            Ok(Received {
                message: ToLeaf::Park { conn },
                ..
            }) => {
                self.connections
                    .iter_mut()
                    .filter(|c| c.id == conn)
                    .for_each(|c| c.wanted_back = true);
            }
            Ok(Received {
                message: ToLeaf::Exit,
                ..
            }) => self.leaving = true,
            Ok(Received {
                message: ToLeaf::Setup { .. },
                ..
            }) => return false,
            Err(_) => return false,
        }
        true
    }

    fn open(&self, id: u64, fd: OwnedFd) -> Connection {
        let shared = Shared::new(fd);
        let http = self.http(id, &shared, Bytes::new());
        Connection {
            id,
            shared,
            http,
            idle_since: Instant::now(),
            runnable: true,
            wanted_back: false,
        }
    }

    fn http(&self, conn: u64, shared: &Rc<Shared>, prefix: Bytes) -> Box<Http> {
        let requests = Requests {
            conn,
            shared: shared.clone(),
            shop: self.shop.clone(),
        };
        let stream = Stream::new(shared.clone(), prefix);
        Box::new(
            http1::Builder::new()
                // A client may end its side after the request and still read the answer.
                .half_close(true)
                .header_read_timeout(None)
                .max_buf_size(MOST_HEAD)
                .serve_connection(stream, requests),
        )
    }

    fn attend(&self, connection: &mut Connection, is_ready: bool, now: Instant) -> Fate {
        if is_ready && self.advance(connection) == Fate::Closed {
            return Fate::Closed;
        }
        let began = connection.shared.requests.get() > 0;
        match connection.shared.stage.get() {
            Stage::Idle(Some(since)) if now > since + HEAD_WITHIN => Fate::Closed,
            Stage::Idle(None) if !began && now > connection.idle_since + HEAD_WITHIN => {
                Fate::Closed
            }
            Stage::Idle(None) if began => {
                let due = connection.wanted_back
                    || self.leaving
                    || now >= connection.idle_since + self.shop.park_after;
                match (self.shop.single, due) {
                    // A pipelined request was read already and cannot be handed back: the client
                    // has to repeat what was not answered (RFC 9112, 9.3.2).
                    (true, _) if self.park(connection) => Fate::Parked,
                    (true, _) => Fate::Closed,
                    (false, true) if self.park(connection) => Fate::Parked,
                    (false, _) => Fate::Open,
                }
            }
            _ => Fate::Open,
        }
    }

    /// Lets hyper go on until it waits for the socket.
    fn advance(&self, connection: &mut Connection) -> Fate {
        loop {
            self.woken.0.store(false, Ordering::Relaxed);
            let result =
                Pin::new(&mut *connection.http).poll(&mut Context::from_waker(&self.waker));
            if let Some((began, status)) = connection.shared.written() {
                connection.idle_since = Instant::now();
                let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.shop.tell(&FromLeaf::Done {
                    conn: connection.id,
                    status,
                    micros,
                });
            }
            match result {
                Poll::Ready(Ok(())) => return Fate::Closed,
                Poll::Ready(Err(error)) => {
                    if connection.shared.take_unasked() {
                        connection.shared.send_now(&malformed(&error));
                    }
                    return Fate::Closed;
                }
                Poll::Pending if self.woken.0.load(Ordering::Relaxed) => {}
                Poll::Pending => return Fate::Open,
            }
        }
    }

    /// Ends hyper's part of an idle connection. `false` if it has read bytes of another request, which
    /// then goes on here: they are no longer in the socket for anyone else.
    fn park(&self, connection: &mut Connection) -> bool {
        let shared = &connection.shared;
        shared.mute(true);
        Pin::new(&mut *connection.http).graceful_shutdown();
        let ended = connection
            .http
            .poll_without_shutdown(&mut Context::from_waker(&self.waker));
        shared.mute(false);
        if !matches!(ended, Poll::Ready(Ok(()))) {
            return false;
        }
        let fresh = self.http(connection.id, shared, Bytes::new());
        let rest = std::mem::replace(&mut *connection.http, *fresh)
            .into_parts()
            .read_buf;
        if rest.is_empty() {
            return true;
        }
        shared.stage.set(Stage::Idle(Some(Instant::now())));
        connection.http = self.http(connection.id, shared, rest);
        // These bytes may be a whole request, and then the socket has no more.
        connection.runnable = true;
        false
    }
}

/// Which descriptors have something, the control channel first.
fn wait_for(
    py: Python<'_>,
    control: &OwnedFd,
    connections: &[Connection],
    wait: Option<Duration>,
) -> Result<Vec<bool>, Errno> {
    let mut fds = Vec::with_capacity(1 + connections.len());
    fds.push(PollFd::new(control, PollFlags::IN));
    fds.extend(
        connections
            .iter()
            .map(|c| PollFd::from_borrowed_fd(c.shared.as_fd(), c.shared.interest())),
    );
    let wait = wait.and_then(|w| Timespec::try_from(w).ok());
    // Threads that the handler has started run while the leaf waits.
    match py.detach(|| poll(&mut fds, wait.as_ref())) {
        Ok(_) | Err(Errno::INTR) => Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect()),
        Err(errno) => Err(errno),
    }
}

/// hyper's service: one request after the other to the handler.
struct Requests {
    conn: u64,
    shared: Rc<Shared>,
    shop: Rc<Shop>,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<Full<Bytes>>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let Requests {
            conn,
            ref shared,
            ref shop,
        } = *self;
        let (shared, shop) = (shared.clone(), shop.clone());
        Box::pin(async move {
            if let Some((began, status)) = shared.written() {
                let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                shop.tell(&FromLeaf::Done {
                    conn,
                    status,
                    micros,
                });
            }
            std::future::poll_fn(|cx| shared.poll_idle(cx)).await;
            if shop.single && shared.requests.get() > 0 {
                // Not for this leaf: it ends when the first answer is written.
                return std::future::pending().await;
            }
            let began = Instant::now();
            shared.stage.set(Stage::Serving(began));
            shared.requests.set(shared.requests.get() + 1);
            shop.tell(&FromLeaf::Began { conn });
            let mut response = shop.answer(request, &shared).await?;
            shop.listen();
            if shop.draining.get() {
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
            shared.stage.set(Stage::Answered {
                began,
                status: response.status().as_u16(),
            });
            Ok(response)
        })
    }
}

impl Shop {
    async fn answer(
        &self,
        request: Request<Incoming>,
        shared: &Shared,
    ) -> Result<Response<Full<Bytes>>, hyper::Error> {
        let (head, body) = request.into_parts();
        // What a client sends once it has its answer is for the next leaf. hyper would look for it before it says that
        // the answer is written, and nothing that it has read can go back into the socket.
        let whole = || shared.mute(self.single);
        if body.is_end_stream() {
            whole();
        }
        let id = request_id(&head.headers);
        // hyper's own limit counts only while the head is not whole, and one read may bring more.
        if size(&head) > MOST_HEAD {
            return Ok(refuse(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                &format!("the head of the request is larger than {MOST_HEAD} bytes"),
                &id,
            ));
        }
        let limit = self.server.setup.max_body;
        let too_large = || {
            refuse(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("the body is larger than {limit} bytes"),
                &id,
            )
        };
        if body.size_hint().lower() > limit {
            return Ok(too_large());
        }
        let body = match Limited::new(body, usize::try_from(limit).unwrap_or(usize::MAX))
            .collect()
            .await
        {
            Ok(body) => {
                whole();
                body.to_bytes()
            }
            Err(error) if error.is::<LengthLimitError>() => return Ok(too_large()),
            Err(error) => match error.downcast::<hyper::Error>() {
                // The client left before it had sent everything: there is nobody to answer.
                Ok(error) if error.is_incomplete_message() || error.is_closed() => {
                    return Err(*error);
                }
                _ => {
                    return Ok(refuse(
                        StatusCode::BAD_REQUEST,
                        "the body is malformed",
                        &id,
                    ));
                }
            },
        };
        let outcome = Python::attach(|py| match self.call(py, &head, &body, &id) {
            Ok(answer) => Ok(answer),
            Err(error) => {
                if let Some(status) = Runtime::exit_status(py, &error) {
                    exit(py, &self.runtime, status);
                }
                let explained = self.runtime.explain(py, &error);
                Err((explained.line, explained.traceback))
            }
        });
        let told = |error| (error, String::new());
        Ok(
            match outcome.and_then(|answer| respond(answer, &id).map_err(told)) {
                Ok(response) => response,
                Err((message, traceback)) => {
                    let status = StatusCode::INTERNAL_SERVER_ERROR;
                    refuse_with(status, &message, &traceback, &id)
                }
            },
        )
    }

    fn call(
        &self,
        py: Python<'_>,
        head: &hyper::http::request::Parts,
        body: &[u8],
        id: &str,
    ) -> PyResult<Answer> {
        let setup = &self.server.setup;
        let event = PyDict::new(py);
        event.set_item("method", head.method.as_str())?;
        event.set_item("path", head.uri.path())?;
        let query = PyDict::new(py);
        for (name, value) in form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes())
        {
            query.set_item(name, value)?;
        }
        event.set_item("query", query)?;
        let headers = PyDict::new(py);
        for name in head.headers.keys() {
            headers.set_item(name.as_str(), joined(&head.headers, name))?;
        }
        event.set_item("headers", headers)?;
        event.set_item("body", PyBytes::new(py, body))?;
        let about = (
            setup.function.as_str(),
            setup.namespace.as_str(),
            setup.pod.as_str(),
        );
        let context = self.runtime.context(py, id, about, setup.timeout_seconds)?;
        self.runtime.call(py, &self.server.handler, event, context)
    }
}

/// Bytes of a request's head, as they came but for the spaces.
fn size(head: &hyper::http::request::Parts) -> usize {
    let target = head.uri.path_and_query().map_or(1, |it| it.as_str().len());
    let headers = head.headers.iter();
    target
        + headers
            .map(|(name, value)| name.as_str().len() + value.len() + 4)
            .sum::<usize>()
}

/// All values of a header. HTTP's bytes are taken as Latin-1, as WSGI does: nothing is lost.
fn joined(headers: &HeaderMap, name: &HeaderName) -> String {
    // Cookies are the one list whose members a semicolon parts (RFC 6265, 5.4).
    let separator = if name == hyper::header::COOKIE {
        "; "
    } else {
        ", "
    };
    let text = |value: &HeaderValue| {
        value
            .as_bytes()
            .iter()
            .copied()
            .map(char::from)
            .collect::<String>()
    };
    headers
        .get_all(name)
        .iter()
        .map(text)
        .collect::<Vec<_>>()
        .join(separator)
}

fn respond(answer: Answer, id: &str) -> Result<Response<Full<Bytes>>, String> {
    let status = StatusCode::from_u16(answer.status).map_err(|e| e.to_string())?;
    let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let body = if bodiless {
        Bytes::new()
    } else {
        Bytes::from(answer.body)
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in answer.headers {
        let parsed = HeaderName::try_from(&name)
            .map_err(|_| format!("the handler's header {name:?} is no header name"))?;
        // These belong to the connection, which is not the handler's.
        if [
            hyper::header::CONTENT_LENGTH,
            hyper::header::TRANSFER_ENCODING,
            hyper::header::CONNECTION,
        ]
        .contains(&parsed)
        {
            continue;
        }
        let value = HeaderValue::try_from(value).map_err(|_| format!("the value of the handler's header {name:?} holds a line break or another control character"))?;
        headers.append(parsed, value);
    }
    tag(headers, id);
    Ok(response)
}

/// Into the container's log, with the name under which the client knows the request.
fn log(status: StatusCode, message: &str, traceback: &str, id: &str) {
    let traceback = traceback.trim_end();
    let gap = if traceback.is_empty() { "" } else { "\n" };
    let code = status.as_u16();
    let text = format!("sock: request {id}: {message}: answered with {code}{gap}{traceback}\n");
    // One write, so that no other thread's line comes between. A handler may have closed standard error: its loss.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn refuse(status: StatusCode, message: &str, id: &str) -> Response<Full<Bytes>> {
    refuse_with(status, message, "", id)
}

fn refuse_with(
    status: StatusCode,
    message: &str,
    traceback: &str,
    id: &str,
) -> Response<Full<Bytes>> {
    log(status, message, traceback, id);
    let mut response = Response::new(Full::new(Bytes::from(error_body(status, message, id))));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    tag(response.headers_mut(), id);
    response
}

fn tag(headers: &mut HeaderMap, id: &str) {
    if let Ok(value) = HeaderValue::from_str(id) {
        headers.insert("x-request-id", value);
    }
}

fn error_body(status: StatusCode, message: &str, id: &str) -> String {
    let kind = status
        .canonical_reason()
        .unwrap_or_default()
        .replace(' ', "");
    format!(
        r#"{{"error": {}, "type": "{kind}", "requestId": {}}}"#,
        quoted(message),
        quoted(id)
    )
}

/// A JSON string (RFC 8259, 7).
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The answer to a head that hyper refuses.
fn malformed(error: &hyper::Error) -> Vec<u8> {
    let (status, message) = if error.is_parse_too_large() {
        (
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "the head of the request is too large",
        )
    } else {
        (
            StatusCode::BAD_REQUEST,
            "the head of the request is malformed",
        )
    };
    let id = new_request_id();
    log(status, message, "", &id);
    let body = error_body(status, message, &id);
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nx-request-id: {id}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The client's own, if it is fit for logs and headers, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok())
        .filter(|id| {
            !id.is_empty()
                && id.len() <= MOST_REQUEST_ID
                && id.bytes().all(|b| b.is_ascii_graphic())
        })
        .map_or_else(new_request_id, str::to_owned)
}

fn new_request_id() -> String {
    let mut bytes = [0u8; 16];
    // SAFETY: writes that many bytes. It fails on no kernel that can run this.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
