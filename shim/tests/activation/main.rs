//! Activation with real sockets and real processes: the leaf is a process that speaks the leaf's side
//! of the protocol and does what the path of a request tells it to.

mod leaf;
mod pod;

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use pod::{Script, get, in_pod};
use sock_shim::activation::StartError;
use sock_shim::activation::decide::Reuse;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

const MILLI: Duration = Duration::from_millis(1);

#[test]
fn an_idle_connection_outlives_its_leaf() {
    in_pod(|mut pod| async move {
        pod.config.freeze_after = 100 * MILLI;
        pod.config.end_after = 1_500 * MILLI;
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let first = get(&mut client, "/hello").await;
        assert_eq!(first.status, 200);
        pod.until("the leaf is frozen", || activation.stats().frozen == 1)
            .await;
        let second = get(&mut client, "/hello").await;
        assert_eq!(
            (second.status, second.leaf),
            (200, first.leaf),
            "a frozen leaf serves on"
        );
        pod.until("the leaf is gone", || activation.stats().leaves == 0)
            .await;
        assert_eq!(activation.stats().connections, 1);
        let third = get(&mut client, "/hello").await;
        assert_eq!(third.status, 200);
        assert_ne!(third.leaf, first.leaf);
        drop(client);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

fn is_stopped(process: Pid) -> bool {
    let path = format!("/proc/{}/status", process.as_raw_nonzero());
    std::fs::read_to_string(path).is_ok_and(|status| status.contains("State:\tT"))
}

/// A client that sends its next request at the moment at which the leaf ends has done nothing wrong.
#[test]
fn a_request_that_a_killed_leaf_has_not_read_is_served_by_another() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let first = get(&mut client, "/hello").await;
        pod.until("the first request is counted", || {
            activation.stats().requests.get(&200) == Some(&1)
        })
        .await;
        let leaf = i32::try_from(first.leaf).ok().and_then(Pid::from_raw);
        let leaf = leaf.expect("a process number");
        kill_process(leaf, Signal::STOP).expect("stop");
        // It runs on until it has seen the signal.
        pod.until("it has stopped", || is_stopped(leaf)).await;
        pod::send(&mut client, "/hello").await;
        kill_process(leaf, Signal::KILL).expect("kill");
        let second = pod::answer(&mut client).await;
        assert_eq!(second.status, 200, "{second:?}");
        assert_ne!(second.leaf, first.leaf);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn requests_on_one_connection_in_quick_succession_stay_with_their_leaf() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let first = get(&mut client, "/hello").await;
        for _ in 0..100 {
            assert_eq!(get(&mut client, "/hello").await.leaf, first.leaf);
        }
        pod.until("all are counted", || {
            activation.stats().requests.get(&200) == Some(&101)
        })
        .await;
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_burst_is_answered_by_no_more_leaves_than_allowed() {
    in_pod(|mut pod| async move {
        pod.config.instances = 8;
        let activation = pod.start().await;
        let clients: Vec<_> = (0..100)
            .map(|_| {
                let port = activation.port();
                tokio::task::spawn_local(async move {
                    let mut client = pod::connect(port).await;
                    get(&mut client, "/slow").await.status
                })
            })
            .collect();
        let mut most = 0;
        for client in clients {
            assert_eq!(client.await.expect("a client"), 200);
            most = most.max(activation.stats().leaves);
        }
        assert!((2..=8).contains(&most), "{most} leaves");
        assert!(
            pod.most_processes() <= 8,
            "{} processes",
            pod.most_processes()
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn connections_take_turns_when_there_are_fewer_leaves() {
    in_pod(|mut pod| async move {
        pod.config.instances = 1;
        let activation = pod.start().await;
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(pod.connect(&activation).await);
        }
        let begin = Instant::now();
        for _ in 0..5 {
            for client in &mut clients {
                assert_eq!(get(client, "/hello").await.status, 200);
            }
        }
        // An idle connection is given back when asked for, long before it parks by itself.
        assert!(begin.elapsed() < 20 * 200 * MILLI, "{:?}", begin.elapsed());
        assert_eq!(activation.stats().leaves, 1);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_leaf_that_does_not_go_on_is_replaced() {
    in_pod(|mut pod| async move {
        pod.config.freeze_after = 50 * MILLI;
        let activation = pod.start().await;
        pod.until("the leaf is frozen", || activation.stats().frozen == 1)
            .await;
        pod.stuck(true);
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        pod.stuck(false);
        pod.until("the former leaf is gone", || activation.stats().leaves == 1)
            .await;
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn idle_leaves_end_while_memory_is_short() {
    in_pod(|mut pod| async move {
        pod.config.freeze_after = 50 * MILLI;
        let activation = pod.start().await;
        pod.available(50_000);
        pod.until("the leaf is frozen", || activation.stats().frozen == 1)
            .await;
        // There is enough at the first looks.
        tokio::time::sleep(3_500 * MILLI).await;
        assert_eq!(activation.stats().frozen, 1);
        pod.available(49_999);
        pod.until("its memory is given back", || {
            activation.stats().leaves == 0
        })
        .await;
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn silent_connections_occupy_no_leaf_and_are_bounded() {
    in_pod(|mut pod| async move {
        pod.config.end_after = 200 * MILLI;
        let activation = pod.start().await;
        let mut oldest = pod.connect(&activation).await;
        let mut silent = Vec::new();
        for _ in 0..999 {
            silent.push(pod.connect(&activation).await);
        }
        pod.until("all are taken in", || {
            activation.stats().connections == 1_000
        })
        .await;
        pod.until("no leaf is left", || activation.stats().leaves == 0)
            .await;
        let mut client = pod.connect(&activation).await;
        let end = timeout(Duration::from_secs(5), oldest.read(&mut [0; 1])).await;
        assert_eq!(
            end.expect("in time").expect("no reset"),
            0,
            "the oldest makes room"
        );
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        assert_eq!(
            get(&mut silent[500], "/hello").await.status,
            200,
            "the others stay"
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_request_that_takes_too_long_is_answered_504_and_its_leaf_killed() {
    in_pod(|mut pod| async move {
        pod.config.timeout = 1_000 * MILLI;
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let begin = Instant::now();
        let answer = get(&mut client, "/hang").await;
        assert_eq!(answer.status, 504);
        assert!(begin.elapsed() >= 1_000 * MILLI);
        assert!(answer.body.contains("\"requestId\""), "{}", answer.body);
        assert!(answer.head.contains("Connection: close"), "{}", answer.head);
        assert_eq!(client.read(&mut [0; 1]).await.expect("no reset"), 0);
        assert_eq!(activation.stats().leaves, 0);
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        assert_eq!(activation.stats().requests[&504], 1);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn each_request_of_a_connection_has_its_own_time() {
    in_pod(|mut pod| async move {
        pod.config.timeout = 1_000 * MILLI;
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        for _ in 0..8 {
            assert_eq!(get(&mut client, "/slow").await.status, 200);
            sleep(120 * MILLI).await;
        }
        assert_eq!(
            get(&mut client, "/hang").await.status,
            504,
            "after answers on the same connection"
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_leaf_that_dies_before_it_answers_is_answered_for() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        let answer = get(&mut client, "/crash").await;
        assert_eq!(answer.status, 502);
        assert_eq!(client.read(&mut [0; 1]).await.expect("no reset"), 0);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_leaf_that_dies_within_its_answer_only_loses_the_connection() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        pod::send(&mut client, "/partial").await;
        let mut all = String::new();
        client.read_to_string(&mut all).await.expect("no reset");
        assert!(
            all.starts_with("HTTP/1.1 200") && !all.contains("502"),
            "{all}"
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_connection_given_back_unanswered_costs_the_leaf_its_life() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/giveback").await.status, 502);
        let mut client = pod.connect(&activation).await;
        assert_eq!(
            get(&mut client, "/nonsense").await.status,
            502,
            "a packet that is no message"
        );
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_child_that_keeps_the_connection_is_killed_with_its_leaf() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        // The child has the control channel as well, so that its end does not tell of the leaf's. Were
        // it left alive, the shim could not know that nobody writes after its own answer.
        assert_eq!(get(&mut client, "/heir").await.status, 502);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_full_queue_is_answered_429() {
    in_pod(|mut pod| async move {
        pod.config.instances = 1;
        pod.config.timeout = 60_000 * MILLI;
        let activation = pod.start().await;
        let mut clients = Vec::new();
        for _ in 0..101 {
            let mut client = pod.connect(&activation).await;
            pod::send(&mut client, "/held").await;
            clients.push(client);
        }
        pod.until("the queue is full", || activation.stats().queued == 100)
            .await;
        let mut client = pod.connect(&activation).await;
        let answer = get(&mut client, "/hello").await;
        assert_eq!(answer.status, 429);
        assert!(answer.head.contains("Retry-After: 1"), "{}", answer.head);
        pod.release();
        for client in &mut clients {
            assert_eq!(
                pod::answer(client).await.status,
                200,
                "nobody in the queue is forgotten"
            );
        }
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_large_request_that_is_refused_reads_the_answer_all_the_same() {
    in_pod(|mut pod| async move {
        pod.config.instances = 1;
        pod.config.timeout = 300 * MILLI;
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let body = vec![b'x'; 600_000];
        pod::send_with_body(&mut client, "/hang", &body).await;
        assert_eq!(pod::answer(&mut client).await.status, 504);
        assert_eq!(client.read(&mut [0; 1]).await.expect("no reset"), 0);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn without_reuse_each_request_has_its_own_process() {
    in_pod(|mut pod| async move {
        pod.config.reuse = Reuse::Never;
        pod.config.instances = 2;
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..6 {
            let answer = get(&mut client, "/hello").await;
            assert_eq!(answer.status, 200);
            assert!(seen.insert(answer.leaf), "a process served twice");
        }
        assert!(pod.most_processes() <= 2);
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_stop_lets_requests_finish_and_then_refuses() {
    in_pod(|mut pod| async move {
        pod.config.instances = 1;
        let activation = pod.start().await;
        let mut under_way = pod.connect(&activation).await;
        let mut waiting = pod.connect(&activation).await;
        let mut silent = pod.connect(&activation).await;
        let mut late = pod.connect(&activation).await;
        let mut idle = pod.connect(&activation).await;
        assert_eq!(get(&mut idle, "/hello").await.status, 200);
        pod::send(&mut under_way, "/slow").await;
        pod::send(&mut waiting, "/slow").await;
        sleep(20 * MILLI).await;
        let port = activation.port();
        let clients = async {
            sleep(20 * MILLI).await;
            pod::send(&mut late, "/hello").await;
            assert_eq!(pod::answer(&mut under_way).await.status, 200);
            assert_eq!(pod::answer(&mut waiting).await.status, 200);
            assert_eq!(pod::answer(&mut late).await.status, 200);
            assert_eq!(silent.read(&mut [0; 1]).await.expect("no reset"), 0);
            assert_eq!(idle.read(&mut [0; 1]).await.expect("no reset"), 0);
        };
        let begin = Instant::now();
        tokio::join!(activation.stop(Duration::from_secs(20)), clients);
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "{:?}",
            begin.elapsed()
        );
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
        pod.nothing_is_left();
    });
}

/// A client that keeps its connection learns from an answer that it ends, and not from a request that nobody reads.
#[test]
fn a_stop_is_announced_on_connections_that_are_kept() {
    in_pod(|pod| async move {
        let activation = pod.start().await;
        let mut with_leaf = pod.connect(&activation).await;
        let mut with_shim = pod.connect(&activation).await;
        let mut new = pod.connect(&activation).await;
        let mut under_way = pod.connect(&activation).await;
        assert!(!get(&mut with_shim, "/hello").await.is_last());
        sleep(150 * MILLI).await;
        pod::send(&mut under_way, "/slow").await;
        assert!(!get(&mut with_leaf, "/hello").await.is_last());
        let mut drained = pod.connect(&activation).await;
        assert!(!get(&mut drained, "/hello").await.is_last());
        activation.drain();
        let mut later = pod.connect(&activation).await;
        for client in [&mut drained, &mut later] {
            let last = get(client, "/hello").await;
            assert_eq!((last.status, last.is_last()), (200, true), "{last:?}");
        }
        let clients = async {
            assert!(pod::answer(&mut under_way).await.is_last());
            for client in [&mut with_leaf, &mut with_shim, &mut new] {
                sleep(20 * MILLI).await;
                let last = get(client, "/hello").await;
                assert_eq!((last.status, last.is_last()), (200, true), "{last:?}");
                assert_eq!(client.read(&mut [0; 1]).await.expect("no reset"), 0);
            }
        };
        tokio::join!(activation.stop(Duration::from_secs(20)), clients);
        pod.nothing_is_left();
    });
}

#[test]
fn a_stop_does_not_wait_beyond_its_grace() {
    in_pod(|mut pod| async move {
        pod.config.instances = 1;
        let activation = pod.start().await;
        let mut under_way = pod.connect(&activation).await;
        let mut waiting = pod.connect(&activation).await;
        pod::send(&mut under_way, "/hang").await;
        pod.until("it is under way", || activation.stats().idle == 0)
            .await;
        pod::send(&mut waiting, "/hello").await;
        pod.until("one waits", || activation.stats().queued == 1)
            .await;
        let begin = Instant::now();
        activation.stop(300 * MILLI).await;
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{:?}",
            begin.elapsed()
        );
        assert_eq!(pod::answer(&mut under_way).await.status, 502);
        assert_eq!(pod::answer(&mut waiting).await.status, 502);
        pod.nothing_is_left();
    });
}

#[test]
fn a_handler_that_cannot_be_imported_fails_the_start_with_its_line() {
    in_pod(|mut pod| async move {
        pod.script(Script::FailImport);
        let Err(StartError::Handler { handler, message }) = pod.try_start().await else {
            panic!("it must not start")
        };
        assert_eq!(handler, "app.handler");
        assert_eq!(
            message,
            "app.py:3: ModuleNotFoundError: No module named 'pandsa'"
        );
        pod.nothing_is_left();
        pod.script(Script::DieOnImport);
        let Err(error) = pod.try_start().await else {
            panic!("it must not start")
        };
        assert!(
            error
                .to_string()
                .contains("before its handler was imported"),
            "{error}"
        );
        pod.nothing_is_left();
    });
}

#[test]
fn a_port_in_use_is_named() {
    in_pod(|mut pod| async move {
        let taken = std::net::TcpListener::bind("0.0.0.0:0").expect("bind");
        pod.config.port = taken.local_addr().expect("address").port();
        let Err(error) = pod.try_start().await else {
            panic!("it must not start")
        };
        assert!(
            error
                .to_string()
                .contains(&format!("port {}", pod.config.port)),
            "{error}"
        );
    });
}

#[test]
fn leaves_come_from_the_zygote_while_it_lives_and_from_an_interpreter_after() {
    in_pod(|mut pod| async move {
        pod.config.reuse = Reuse::Never;
        pod.with_zygote();
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        pod.until("both are counted", || activation.stats().forks == 2)
            .await;
        assert_eq!(activation.stats().cold_starts, 0);
        let mut under_way = pod.connect(&activation).await;
        pod::send(&mut under_way, "/held").await;
        pod.until("it is under way", || activation.stats().forks == 3)
            .await;
        pod.end_zygote();
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        pod.until("it is counted", || activation.stats().cold_starts == 1)
            .await;
        pod.release();
        assert_eq!(
            pod::answer(&mut under_way).await.status,
            200,
            "the end of a zygote ends no leaf"
        );
        pod.with_zygote();
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        assert_eq!(activation.stats().cold_starts, 1, "its successor is found");
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn what_the_first_leaf_has_compiled_is_told_to_those_that_come_later() {
    in_pod(|mut pod| async move {
        pod.config.reuse = Reuse::Never;
        pod.with_zygote();
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        let mut compiled = Vec::new();
        for origin in ["the first leaf", "a fork", "an interpreter"] {
            if origin == "an interpreter" {
                pod.end_zygote();
            }
            compiled.push(get(&mut client, "/compiled").await.body);
        }
        assert_eq!(
            compiled,
            ["", "compiled by the first", "compiled by the first"]
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn a_fork_that_fails_is_made_good_by_an_interpreter() {
    in_pod(|mut pod| async move {
        pod.script(Script::FailConfinement);
        pod.with_zygote();
        let activation = pod.start().await;
        let mut client = pod.connect(&activation).await;
        assert_eq!(get(&mut client, "/hello").await.status, 200);
        assert_eq!(
            (activation.stats().forks, activation.stats().cold_starts),
            (0, 1)
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}

#[test]
fn the_start_waits_for_a_pool_that_is_expected() {
    in_pod(|mut pod| async move {
        pod.expect_zygote();
        let later = pod.zygote_after(300 * MILLI);
        let begin = Instant::now();
        let activation = pod.start().await;
        assert!(begin.elapsed() >= 300 * MILLI);
        later.await.expect("the pool");
        assert_eq!(
            (activation.stats().forks, activation.stats().cold_starts),
            (1, 0)
        );
        activation.stop(Duration::from_secs(5)).await;
        pod.end_zygote();
        pod.pool_within = 200 * MILLI;
        let activation = pod.start().await;
        assert_eq!(activation.stats().cold_starts, 1, "none came");
        activation.stop(Duration::from_secs(5)).await;
        pod.nothing_is_left();
    });
}
