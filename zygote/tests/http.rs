//! HTTP as a leaf speaks it, and connections that go back and forth between leaf and shim.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::{Strategy, any};
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use sock_zygote::Event;
use support::{
    Container, Function, Pool, Reply, Running, connection, reply, shim, until, zygote_setup,
};

const APP: &str = r#"
import os, sys, time
served = 0

def echo(event, context):
    global served
    served += 1
    return {"method": event["method"], "path": event["path"], "query": event["query"], "headers": event["headers"],
            "body": event["body"].decode("latin-1"), "served": served, "pid": os.getpid(), "id": context.request_id,
            "about": [context.function, context.namespace, context.pod, context.timeout_seconds],
            "remaining": context.remaining_ms()}

def results(event, context):
    kind = event["query"]["kind"]
    if kind == "fail":
        raise ValueError("no \"good\"")
    if kind == "exit":
        sys.exit(7)
    if kind == "interrupt":
        raise KeyboardInterrupt
    return {
        "bytes": b"\x00\xff", "text": "grüß", "none": None, "list": [1, 2.5, None],
        "full": {"statusCode": 201, "headers": {"X-Thing": "a", "Set-Cookie": ["a=1", "b=2"]}, "body": {"ok": True}},
        "plain": {"statusCode": 404, "headers": {"content-type": "text/html"}, "body": "<p>"},
        "nan": float("nan"), "object": object(), "badstatus": {"statusCode": 99},
        "badheader": {"statusCode": 200, "headers": {"x": "a\r\ninjected: 1"}},
        "large": "x" * 3_000_000,
    }[kind]

def slow(event, context):
    time.sleep(float(event["query"]["s"]))
    return "slept"

def pinned(event, context):
    os.sched_setaffinity(0, {int(event["query"]["cpu"])})
    return "pinned"

def handler(event, context):
    return {"/r": results, "/slow": slow, "/pinned": pinned}.get(event["path"], echo)(event, context)
"#;

struct Served {
    pool: Pool,
    function: Function,
    leaf: Running,
    next: u64,
}

impl Served {
    async fn start() -> Served {
        Served::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Function)) -> Served {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let mut function = Function::new(&pool, APP, &[]);
        change(&mut function);
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        Served {
            pool,
            function,
            leaf,
            next: 0,
        }
    }

    /// Sends `bytes` on a new connection; yields the client's end and the connection's number.
    fn send(&mut self, bytes: impl AsRef<[u8]>) -> (TcpStream, u64) {
        let (client, conn, _) = self.send_and_keep(bytes);
        (client, conn)
    }

    fn send_and_keep(&mut self, bytes: impl AsRef<[u8]>) -> (TcpStream, u64, TcpStream) {
        let (mut client, served) = connection();
        client.write_all(bytes.as_ref()).unwrap();
        self.next += 1;
        self.leaf.leaf.serve(self.next, served.as_fd()).unwrap();
        (client, self.next, served)
    }

    async fn done(&self, conn: u64) -> u16 {
        let events = until(
            &self.leaf.leaf,
            |e| matches!(e, Event::Done { conn: c, .. } if *c == conn),
        )
        .await;
        match events.last() {
            Some(Event::Done { status, .. }) => *status,
            _ => unreachable!("until ends with Done"),
        }
    }

    async fn closed(&self, conn: u64) {
        until(&self.leaf.leaf, |e| *e == Event::Closed { conn }).await;
    }

    async fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Reply {
        let (mut client, conn) = self.send(bytes);
        self.done(conn).await;
        reply(&mut client)
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")
}

fn body(reply: &Reply) -> Value {
    serde_json::from_slice(&reply.body).unwrap_or_else(|e| panic!("{e}: {reply:?}"))
}

fn ended(client: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    rest
}

#[test]
fn a_handler_gets_the_request_and_its_context() {
    shim(async {
        let mut leaf = Served::start().await;
        let answer = leaf
            .ask("POST /a/b?x=1&y=a%20b&x=2 HTTP/1.1\r\nHost: h\r\nX-Two: 1\r\nX-Two: 2\r\nX-Request-Id: me-1\r\nContent-Length: 3\r\n\r\n\x00hi")
            .await;
        assert_eq!(answer.status, 200);
        assert!(
            answer.head.contains("x-request-id: me-1\r\n"),
            "{}",
            answer.head
        );
        let mut seen = body(&answer);
        let remaining = seen
            .as_object_mut()
            .unwrap()
            .remove("remaining")
            .unwrap()
            .as_u64()
            .unwrap();
        assert!((29_000..=30_000).contains(&remaining));
        assert_eq!(
            seen,
            json!({"method": "POST", "path": "/a/b", "query": {"x": "2", "y": "a b"}, "body": "\u{0}hi", "served": 1, "pid": 1,
                "headers": {"host": "h", "x-two": "1, 2", "x-request-id": "me-1", "content-length": "3"},
                "id": "me-1", "about": ["fun", "team", "pod-7", 30]})
        );
    });
}

#[test]
fn every_kind_of_result_becomes_its_answer() {
    shim(async {
        let mut leaf = Served::start().await;
        let mut kind = async |kind: &str| leaf.ask(get(&format!("/r?kind={kind}"))).await;
        let answer = kind("bytes").await;
        assert_eq!((answer.status, &answer.body[..]), (200, &b"\x00\xff"[..]));
        assert!(
            answer
                .head
                .contains("content-type: application/octet-stream")
        );
        let answer = kind("text").await;
        assert_eq!(answer.text(), "grüß");
        assert!(answer.head.contains("content-type: text/plain"));
        let answer = kind("none").await;
        assert_eq!((answer.status, answer.body.len()), (204, 0));
        assert_eq!(body(&kind("list").await), json!([1, 2.5, null]));
        let answer = kind("full").await;
        assert_eq!((answer.status, body(&answer)), (201, json!({"ok": true})));
        assert!(
            answer.head.contains("x-thing: a") && answer.head.contains("set-cookie: b=2"),
            "{}",
            answer.head
        );
        let answer = kind("plain").await;
        assert_eq!((answer.status, answer.text()), (404, "<p>"));
        assert!(
            answer.head.contains("content-type: text/html") && !answer.head.contains("text/plain")
        );
        for bad in [
            "nan",
            "object",
            "badstatus",
            "badheader",
            "fail",
            "interrupt",
        ] {
            let answer = kind(bad).await;
            assert_eq!(answer.status, 500, "{bad}");
            assert!(body(&answer)["requestId"].is_string(), "{bad}");
            assert!(!answer.head.contains("injected"), "{bad}");
        }
        let answer = kind("fail").await;
        assert_eq!(
            (&body(&answer)["error"], &body(&answer)["type"]),
            (&json!("no \"good\""), &json!("ValueError"))
        );
        assert_eq!(kind("large").await.body.len(), 3_000_000);
    });
}

#[test]
fn bodies_come_in_every_framing() {
    shim(async {
        let mut leaf = Served::start().await;
        let answer = leaf.ask("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n3;x=y\r\ncde\r\n0\r\n\r\n").await;
        assert_eq!(body(&answer)["body"], "abcde");
        let (mut client, conn) = leaf.send(
            "POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n",
        );
        let mut interim = [0u8; 25];
        until(&leaf.leaf.leaf, |e| matches!(e, Event::Began { .. })).await;
        client.read_exact(&mut interim).unwrap();
        assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"ok").unwrap();
        assert_eq!(leaf.done(conn).await, 200);
        assert_eq!(body(&reply(&mut client))["body"], "ok");
        let (mut client, conn) =
            leaf.send("HEAD / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        leaf.closed(conn).await;
        let all = String::from_utf8(ended(&mut client)).unwrap();
        assert!(
            all.starts_with("HTTP/1.1 200")
                && all.contains("content-length: ")
                && all.ends_with("\r\n\r\n"),
            "{all}"
        );
        let (mut client, conn) = leaf.send("GET / HTTP/1.0\r\n\r\n");
        leaf.closed(conn).await;
        let all = String::from_utf8(ended(&mut client)).unwrap();
        assert!(
            all.starts_with("HTTP/1.0 200") && all.contains("\"served\""),
            "{all}"
        );
        let large = "z".repeat(900_000);
        let answer = leaf
            .ask(format!(
                "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n{large}"
            ))
            .await;
        assert_eq!(body(&answer)["body"], large);
    });
}

#[test]
fn what_is_wrong_with_a_request_is_said_as_json() {
    shim(async {
        let mut leaf = Served::start().await;
        for (bytes, status) in [
            ("GARBAGE\r\n\r\n".to_owned(), 400),
            ("GET / HTTP/1.1\r\nbad header\r\n\r\n".to_owned(), 400),
            (
                format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(400_000)),
                431,
            ),
            (
                format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200)),
                431,
            ),
        ] {
            // A head that fills the socket's buffers is written while it is read; the duplicate is the shim's.
            let (mut client, conn, _kept) = leaf.send_and_keep(&bytes[..10]);
            let mut writer = client.try_clone().unwrap();
            let rest = bytes[10..].to_owned();
            let writer = std::thread::spawn(move || drop(writer.write_all(rest.as_bytes())));
            leaf.closed(conn).await;
            let answer = reply(&mut client);
            client.shutdown(Shutdown::Both).unwrap();
            writer.join().unwrap();
            assert_eq!(answer.status, status, "{answer:?}");
            assert!(body(&answer)["requestId"].is_string());
        }
        for framing in ["content-length: 2000000", "transfer-encoding: chunked"] {
            let (mut client, conn, kept) =
                leaf.send_and_keep(format!("POST / HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n"));
            if framing.starts_with('t') {
                let mut writer = client.try_clone().unwrap();
                std::thread::spawn(move || {
                    for _ in 0..40 {
                        let _ = writer
                            .write_all(format!("8000\r\n{}\r\n", "q".repeat(0x8000)).as_bytes());
                    }
                });
            }
            assert_eq!(leaf.done(conn).await, 413);
            leaf.closed(conn).await;
            let answer = reply(&mut client);
            assert_eq!(answer.status, 413);
            assert!(body(&answer)["error"].as_str().unwrap().contains("1048576"));
            drop(kept);
        }
        let (mut client, conn) =
            leaf.send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n");
        assert_eq!(leaf.done(conn).await, 400);
        assert_eq!(reply(&mut client).status, 400);
        assert_eq!(leaf.ask(get("/")).await.status, 200);
    });
}

/// Requests of every framing, each changed in a few places.
fn spoiled() -> impl Strategy<Value = Vec<u8>> {
    const WHOLE: [&str; 6] = [
        "GET /?name=a%20b&x=1 HTTP/1.1\r\nhost: x\r\naccept: */*\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nhost: y\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nt: 1\r\n\r\n",
        "PUT / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nok",
        "HEAD / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ];
    let piece = proptest::prop_oneof![
        select(vec![
            &b"\r\n"[..],
            b"\n",
            b"\0",
            b":",
            b" ",
            b"-1",
            b"ffffffffffffffff",
            b"content-length: 7\r\n",
            b"transfer-encoding: chunked\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ])
        .prop_map(<[u8]>::to_vec),
        vec(any::<u8>(), 0..12),
    ];
    let change = (any::<Index>(), 0..12_usize, piece);
    (select(WHOLE.to_vec()), vec(change, 1..5)).prop_map(|(whole, changes)| {
        let mut bytes = whole.as_bytes().to_vec();
        for (at, cut, piece) in changes {
            let from = at.index(bytes.len() + 1);
            let to = (from + cut).min(bytes.len());
            bytes.splice(from..to, piece);
        }
        bytes
    })
}

#[test]
fn whatever_bytes_come_the_connection_ends_and_the_leaf_serves_on() {
    shim(async {
        let mut served = Served::start().await;
        let first = body(&served.ask(get("/")).await);
        let mut runner = TestRunner::new(Config::default());
        for _ in 0..4000 {
            let bytes = spoiled().new_tree(&mut runner).unwrap().current();
            let shown = String::from_utf8_lossy(&bytes).into_owned();
            let (mut client, conn) = served.send(&bytes);
            client.shutdown(Shutdown::Write).unwrap();
            let closed = tokio::time::timeout(Duration::from_secs(10), served.closed(conn)).await;
            assert!(closed.is_ok(), "the connection goes on after {shown:?}");
            let answer = ended(&mut client);
            assert!(
                answer.is_empty() || answer.starts_with(b"HTTP/1."),
                "{:?} answers {shown:?}",
                String::from_utf8_lossy(&answer)
            );
        }
        let last = body(&served.ask(get("/")).await);
        assert_eq!(first["pid"], last["pid"]);
        assert!(last["served"].as_u64() > first["served"].as_u64());
    });
}

#[test]
fn pipelined_requests_are_answered_in_order_and_each_is_reported() {
    shim(async {
        let mut leaf = Served::start().await;
        let (mut client, conn) = leaf.send([get("/1"), get("/2"), get("/3")].concat());
        let events = until(&leaf.leaf.leaf, |e| *e == Event::Parked { conn }).await;
        let names: Vec<&str> = events
            .iter()
            .map(|e| match e {
                Event::Began { .. } => "began",
                Event::Done { .. } => "done",
                Event::Parked { .. } => "parked",
                Event::Closed { .. } => "closed",
            })
            .collect();
        assert_eq!(
            names,
            ["began", "done", "began", "done", "began", "done", "parked"]
        );
        for path in ["/1", "/2", "/3"] {
            assert_eq!(body(&reply(&mut client))["path"], path);
        }
    });
}

#[test]
fn an_idle_connection_is_parked_and_another_leaf_goes_on_with_it() {
    shim(async {
        let mut leaf = Served::start().await;
        // Before the answer: when this test hears of that says nothing of when it was.
        let start = Instant::now();
        let (mut client, conn, kept) = leaf.send_and_keep(get("/first"));
        leaf.done(conn).await;
        until(&leaf.leaf.leaf, |e| *e == Event::Parked { conn }).await;
        assert!(
            start.elapsed() >= Duration::from_millis(leaf.function.setup.park_after_ms),
            "parked too early"
        );
        assert_eq!(body(&reply(&mut client))["served"], 1);
        // Half a request, then the rest: the second leaf must see every byte.
        client.write_all(b"GET /second HT").unwrap();
        let second = leaf
            .function
            .leaf(&leaf.pool.channel, true, Some((9, kept.as_fd())))
            .await
            .unwrap();
        client.write_all(b"TP/1.1\r\nhost: x\r\n\r\n").unwrap();
        until(&second.leaf, |e| matches!(e, Event::Done { conn: 9, .. })).await;
        let answer = body(&reply(&mut client));
        assert_eq!(
            (&answer["path"], &answer["served"]),
            (&json!("/second"), &json!(1))
        );
    });
}

#[test]
fn the_shim_can_ask_for_a_connection_back() {
    shim(async {
        let mut leaf = Served::with(|f| f.setup.park_after_ms = 60_000).await;
        let (mut client, conn) = leaf.send(get("/slow?s=0.2"));
        until(&leaf.leaf.leaf, |e| matches!(e, Event::Began { .. })).await;
        leaf.leaf.leaf.park(conn).unwrap();
        let events = until(&leaf.leaf.leaf, |e| *e == Event::Parked { conn }).await;
        assert!(matches!(events[0], Event::Done { .. }), "{events:?}");
        assert_eq!(reply(&mut client).text(), "slept");
        let (mut client, conn) = leaf.send(get("/"));
        leaf.done(conn).await;
        reply(&mut client);
        leaf.leaf.leaf.park(conn).unwrap();
        until(&leaf.leaf.leaf, |e| *e == Event::Parked { conn }).await;
        leaf.leaf.leaf.exit().unwrap();
        assert!(leaf.leaf.leaf.event().await.unwrap_err().is_closed());
    });
}

#[test]
fn answers_of_a_draining_leaf_are_the_last_on_their_connection() {
    shim(async {
        let mut leaf = Served::with(|f| f.setup.park_after_ms = 60_000).await;
        let (mut client, first) = leaf.send(get("/"));
        leaf.done(first).await;
        assert_eq!(reply(&mut client).header("connection"), None);
        client.write_all(get("/slow?s=0.2").as_bytes()).unwrap();
        until(&leaf.leaf.leaf, |e| matches!(e, Event::Began { .. })).await;
        leaf.leaf.leaf.drain().unwrap();
        leaf.closed(first).await;
        let answer = reply(&mut client);
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(answer.text(), "slept");
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);

        let (mut client, second) = leaf.send(get("/r?kind=fail"));
        leaf.closed(second).await;
        let answer = reply(&mut client);
        assert_eq!(
            (answer.status, answer.header("connection")),
            (500, Some("close"))
        );
        leaf.leaf.leaf.exit().unwrap();
        assert!(leaf.leaf.leaf.event().await.unwrap_err().is_closed());
    });
}

#[test]
fn a_single_request_leaf_serves_one_and_gives_the_connection_back() {
    shim(async {
        let mut leaf = Served::with(|f| f.setup.single_request = true).await;
        let (mut client, conn, kept) = leaf.send_and_keep(get("/one"));
        let events = until(&leaf.leaf.leaf, |e| *e == Event::Parked { conn }).await;
        assert_eq!(events.len(), 3);
        assert!(leaf.leaf.leaf.event().await.unwrap_err().is_closed());
        assert_eq!(body(&reply(&mut client))["served"], 1);
        client.write_all(get("/two").as_bytes()).unwrap();
        let next = leaf
            .function
            .leaf(&leaf.pool.channel, true, Some((5, kept.as_fd())))
            .await
            .unwrap();
        until(&next.leaf, |e| *e == Event::Parked { conn: 5 }).await;
        let answer = body(&reply(&mut client));
        assert_eq!(
            (&answer["path"], &answer["served"]),
            (&json!("/two"), &json!(1))
        );
    });
}

#[test]
fn a_single_request_leaf_never_serves_what_was_pipelined() {
    shim(async {
        let mut leaf = Served::with(|f| f.setup.single_request = true).await;
        let (mut client, conn) = leaf.send([get("/one"), get("/two")].concat());
        let events = until(&leaf.leaf.leaf, |e| *e == Event::Closed { conn }).await;
        assert_eq!(
            events
                .iter()
                .filter(|e| matches!(e, Event::Began { .. }))
                .count(),
            1,
            "{events:?}"
        );
        assert!(leaf.leaf.leaf.event().await.unwrap_err().is_closed());
        assert_eq!(body(&reply(&mut client))["path"], "/one");
        assert_eq!(ended(&mut client), b"");
    });
}

/// The client has its answer, and sends on, before the leaf returns from sending it: it waits on the leaf's
/// processor and goes before everything there.
#[test]
fn what_a_client_sends_right_after_its_answer_is_left_for_the_next_leaf() {
    shim(async {
        let cpu = rustix::thread::sched_getcpu();
        let leaf = Served::with(|f| f.setup.single_request = true).await;
        let (client, served) = connection();
        let (begin, began) = std::sync::mpsc::channel();
        let asking = std::thread::spawn(move || {
            run_first_on(cpu);
            let mut client = client;
            client
                .write_all(get(&format!("/pinned?cpu={cpu}")).as_bytes())
                .unwrap();
            begin.send(()).unwrap();
            let first = reply(&mut client);
            client.write_all(get("/two").as_bytes()).unwrap();
            (first, client)
        });
        began.recv().unwrap();
        leaf.leaf.leaf.serve(7, served.as_fd()).unwrap();
        let events = until(&leaf.leaf.leaf, |e| {
            matches!(e, Event::Parked { .. } | Event::Closed { .. })
        })
        .await;
        let (first, mut client) = asking.join().unwrap();
        assert_eq!(first.text(), "pinned");
        assert_eq!(events.last(), Some(&Event::Parked { conn: 7 }));
        let next = leaf
            .function
            .leaf(&leaf.pool.channel, true, Some((8, served.as_fd())))
            .await
            .unwrap();
        until(&next.leaf, |e| *e == Event::Parked { conn: 8 }).await;
        assert_eq!(body(&reply(&mut client))["path"], "/two");
    });
}

/// The calling thread runs on that processor, as soon as it can.
fn run_first_on(cpu: usize) {
    let mut one = rustix::thread::CpuSet::new();
    one.set(cpu);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let priority: libc::c_int = 1;
    // By number, since musl's function of that name only fails.
    // SAFETY: the kernel reads one integer, the whole of its `struct sched_param`.
    let set = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            libc::SCHED_FIFO,
            &raw const priority,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_client_that_leaves_or_half_closes_harms_nobody() {
    shim(async {
        let mut leaf = Served::start().await;
        let (client, conn) =
            leaf.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc");
        until(&leaf.leaf.leaf, |e| matches!(e, Event::Began { .. })).await;
        drop(client);
        leaf.closed(conn).await;
        let (mut client, conn) = leaf.send(get("/half"));
        client.shutdown(Shutdown::Write).unwrap();
        leaf.closed(conn).await;
        assert_eq!(body(&reply(&mut client))["path"], "/half");
        assert_eq!(ended(&mut client), b"");
        let (client, conn) = leaf.send(get("/r?kind=large"));
        drop(client);
        leaf.closed(conn).await;
        assert_eq!(leaf.ask(get("/")).await.status, 200);
    });
}

#[test]
fn a_handler_that_exits_ends_the_leaf() {
    shim(async {
        let mut leaf = Served::start().await;
        let (_client, _) = leaf.send(get("/r?kind=exit"));
        until(&leaf.leaf.leaf, |e| matches!(e, Event::Began { .. })).await;
        assert!(leaf.leaf.leaf.event().await.unwrap_err().is_closed());
    });
}
