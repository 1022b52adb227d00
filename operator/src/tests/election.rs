//! One leads, whatever happens to network, processes and clocks.

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::*;
use crate::connection::guarded;
use crate::leader::{Candidate, EVERY, LASTS, LEASE, Leadership, STOPS};

const LEASE_PATH: &str = "leases/sock-operator";

fn holder(server: &Server) -> Value {
    server.get("leases", LEASE).unwrap()["spec"]["holderIdentity"].clone()
}

fn writers(server: &Server) -> Vec<String> {
    let calls = server.calls().into_iter();
    let mut writers: Vec<String> = calls
        .filter(|call| call.writes())
        .map(|call| call.from)
        .collect();
    writers.sort();
    writers.dedup();
    writers
}

/// Waits for this operator to lead and returns how long that took; never two lead meanwhile.
async fn until_leads(operator: &Operator, other: &Operator) -> Duration {
    let begin = Instant::now();
    while !operator.leads() {
        assert!(
            begin.elapsed() < Duration::from_secs(120),
            "nobody takes over"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!(operator.leads() && other.leads()), "two lead");
    }
    begin.elapsed()
}

#[tokio::test(start_paused = true)]
async fn the_second_waits_and_takes_over_when_the_first_crashes() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    let two = Operator::start(&server, "two");
    pass(120).await;
    assert!(one.leads() && !two.leads());
    assert_eq!(writers(&server), ["one"]);

    drop(one);
    let begin = Instant::now();
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    while !two.leads() {
        pass(1).await;
    }
    assert!(
        begin.elapsed() <= LASTS + EVERY * 2,
        "{:?}",
        begin.elapsed()
    );
    pass(5).await;
    let deployment = server.get("deployments", "hello").unwrap();
    assert_eq!(deployment["spec"]["replicas"], 2);
    assert_eq!(writers(&server), ["two"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_cut_off_stops_before_another_begins() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    let two = Operator::start(&server, "two");
    pass(30).await;
    server.cut("one");
    let begin = Instant::now();
    until_leads(&two, &one).await;
    assert!(begin.elapsed() > STOPS, "{:?}", begin.elapsed());
    assert!(!one.leads());
    server.calls();
    // What it had sent arrives now, late.
    server.mend("one");
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    pass(60).await;
    assert_eq!(writers(&server), ["two"]);
    assert_eq!(holder(&server), "two");

    // It stands by again, in the same process.
    drop(two);
    let begin = Instant::now();
    while !one.leads() {
        assert!(
            begin.elapsed() < LASTS + EVERY * 2,
            "nobody takes over again"
        );
        pass(1).await;
    }
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(3));
    pass(5).await;
    let deployment = server.get("deployments", "hello").unwrap();
    assert_eq!(deployment["spec"]["replicas"], 3);
    assert_eq!(writers(&server), ["one"]);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_counts_from_when_it_was_sent() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    let two = Operator::start(&server, "two");
    pass(30).await;
    // The renewal is written; its answer is under way for seconds, and then the network is gone.
    server.before("update", LEASE_PATH, |server| server.cut("one"));
    while !server.is_cut("one") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(4900)).await;
    server.mend("one");
    tokio::time::sleep(Duration::from_millis(5)).await;
    server.cut("one");
    until_leads(&two, &one).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_when_the_time_is_over() {
    let server = Server::new();
    let leadership = Leadership::default();
    let client = server.client("one");
    let mut candidate = Candidate::new(client.clone(), NAMESPACE, "one".into(), leadership.clone());
    let api: Api<ConfigMap> = Api::namespaced(guarded(client, leadership), NAMESPACE);
    let config_map: ConfigMap =
        serde_json::from_value(json!({ "metadata": { "name": "a" } })).unwrap();

    let early = api.create(&PostParams::default(), &config_map).await;
    assert!(early.unwrap_err().to_string().contains("Lease"));
    candidate.acquire().await;
    api.create(&PostParams::default(), &config_map)
        .await
        .unwrap();

    // As after a pause of the whole process: no timer has had its turn yet.
    tokio::time::advance(STOPS).await;
    server.calls();
    let late = api.delete("a", &kube::api::DeleteParams::default()).await;
    assert!(late.unwrap_err().to_string().contains("Lease"));
    assert!(api.get_opt("a").await.unwrap().is_some());
    assert_eq!(server.writes(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_told_to_stop_hands_over_at_once() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    let two = Operator::start(&server, "two");
    pass(10).await;
    one.stop().await.unwrap();
    assert_eq!(holder(&server), Value::Null);
    pass(EVERY.as_secs() + 1).await;
    assert!(two.leads());
}

#[tokio::test(start_paused = true)]
async fn one_that_is_told_to_stop_does_not_wait_for_a_server_that_is_away() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    server.cut("one");
    let begin = Instant::now();
    one.stop().await.unwrap();
    // Kubelet kills after 30 s.
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn one_that_only_waited_leaves_the_lease_alone_when_it_stops() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    let two = Operator::start(&server, "two");
    pass(10).await;
    two.stop().await.unwrap();
    assert!(one.leads());
    assert_eq!(holder(&server), "one");
}

#[tokio::test(start_paused = true)]
async fn of_two_that_begin_at_once_one_wins() {
    for exists in [false, true] {
        let server = cluster();
        if exists {
            server.put(json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": LEASE }, "spec": {},
            }));
        }
        let (one, two) = (
            Operator::start(&server, "one"),
            Operator::start(&server, "two"),
        );
        pass(60).await;
        assert!(one.leads() != two.leads());
        let calls = server.calls();
        let tried = calls.iter().filter(|call| {
            call.what.starts_with("leases") && call.verb == if exists { "update" } else { "create" }
        });
        let mut tried: Vec<&str> = tried.map(|call| call.from.as_str()).collect();
        tried.truncate(2);
        tried.sort_unstable();
        assert_eq!(tried, ["one", "two"], "both must have tried");
        let writers: Vec<_> = calls.iter().filter(|call| call.writes()).collect();
        let first = &writers[0].from;
        assert!(writers.iter().all(|call| call.from == *first));
    }
}

#[tokio::test(start_paused = true)]
async fn somebody_who_touches_the_lease_does_not_end_the_leader() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    server.before("update", LEASE_PATH, |server| {
        server.edit("leases", LEASE, |lease| {
            lease["metadata"]["annotations"] = json!({ "note": "hello" });
        });
    });
    pass(60).await;
    assert!(one.leads());

    server.remove("leases", LEASE);
    pass(60).await;
    assert!(one.leads());
    assert_eq!(holder(&server), "one");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_for_a_while_does_not_end_the_leader() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    server.refuse("update", LEASE_PATH, 2, 500, "etcd leader changed");
    pass(60).await;
    assert!(one.leads());
    server.lose("get", LEASE_PATH, 1);
    pass(60).await;
    assert!(one.leads());
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_is_not_stopped_by_a_call_without_an_answer() {
    let server = cluster();
    server.lose("get", LEASE_PATH, 1);
    let one = Operator::start(&server, "one");
    pass(20).await;
    assert!(one.leads());
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_started_again_in_its_pod_leads_at_once() {
    let server = cluster();
    let one = Operator::start(&server, "one");
    pass(5).await;
    drop(one);
    let again = Operator::start(&server, "one");
    pass(1).await;
    assert!(again.leads());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_goes_wrong_makes_neither_two_leaders_nor_none() {
    for minutes in [-60, -5, 5, 60] {
        let server = cluster();
        let renew = |server: &Server| {
            let time = Timestamp::now() + SignedDuration::from_mins(minutes);
            server.put(json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": LEASE },
                "spec": { "holderIdentity": "other", "leaseDurationSeconds": LASTS.as_secs(),
                          "renewTime": format!("{time:.6}") },
            }));
        };
        renew(&server);
        let one = Operator::start(&server, "one");
        for _ in 0..40 {
            pass(EVERY.as_secs()).await;
            assert!(!one.leads(), "{minutes}: taken from one that renews");
            renew(&server);
        }
        let begin = Instant::now();
        while !one.leads() {
            pass(1).await;
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{minutes}: never taken"
            );
        }
        assert!(begin.elapsed() >= LASTS, "{minutes}: {:?}", begin.elapsed());
    }
}
