//! Watches end, expire, hang and fail: nothing is lost, and nobody is asked too often.

use super::*;

fn replicas(server: &Server) -> Value {
    server.get("deployments", "hello").unwrap()["spec"]["replicas"].clone()
}

fn count(server: &Server, verb: &str, what: &str) -> usize {
    let calls = server.calls().into_iter();
    calls
        .filter(|call| call.verb == verb && call.what == what)
        .count()
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_closed_goes_on_where_it_was() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    server.calls();
    for wanted in 2..12 {
        server.hold("functions");
        server.edit("functions", "hello", |it| {
            it["spec"]["replicas"] = json!(wanted)
        });
        server.close_watches();
        server.let_go("functions");
        pass(3).await;
        assert_eq!(replicas(&server), wanted);
    }
    assert_eq!(count(&server, "list", "functions"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_happened_before_a_watch_expired_is_found() {
    let server = cluster();
    server.put(function("gone"));
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    let plurals = [
        "functions",
        "packagesets",
        "deployments",
        "daemonsets",
        "services",
        "configmaps",
        "pods",
    ];
    for plural in plurals {
        server.hold(plural);
    }
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    server.put(function("new"));
    server.remove("functions", "gone");
    server.compact();
    server.close_watches();
    for plural in plurals {
        server.let_go(plural);
    }
    pass(10).await;
    assert_eq!(replicas(&server), 2);
    assert!(server.get("deployments", "new").is_some());

    // The list of those that are there says nothing of one that is not.
    for plural in plurals {
        server.hold(plural);
    }
    for (plural, name) in children() {
        server.remove(plural, &name);
    }
    server.compact();
    server.close_watches();
    for plural in plurals {
        server.let_go(plural);
    }
    pass(10).await;
    for (plural, name) in children() {
        assert!(server.get(plural, &name).is_some(), "{plural}/{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_spares_a_list() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    for named in [true, false] {
        server.calls();
        if named {
            server.bookmark();
            pass(1).await;
        } else {
            server.hold("functions");
            server.put(function("more"));
        }
        server.compact();
        server.close_watches();
        server.let_go("functions");
        pass(10).await;
        let lists = count(&server, "list", "functions");
        // Functions are watched once.
        assert_eq!(lists, usize::from(!named));
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_gets_no_answer_is_tried_again() {
    let server = cluster();
    server.lose("watch", "functions", 1);
    server.lose("list", "packagesets", 2);
    let _operator = Operator::start(&server, "one");
    pass(90).await;
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    pass(10).await;
    assert_eq!(replicas(&server), 2);
    assert!(server.get("daemonsets", &pool_name()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_is_asked_less_and_less_often() {
    let server = cluster();
    for plural in ["functions", "services", "pods"] {
        server.refuse("list", plural, usize::MAX, 500, "etcdserver: no leader");
    }
    let _operator = Operator::start(&server, "one");
    pass(600).await;
    let times = count(&server, "list", "functions");
    assert!((15..=50).contains(&times), "{times} times in 10 min");
    assert_eq!(server.get("deployments", "hello"), None);
    server.relent();
    pass(90).await;
    assert!(server.get("deployments", "hello").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_does_not_delay_the_others() {
    let server = cluster();
    server.refuse(
        "list",
        "services",
        usize::MAX,
        403,
        "services is forbidden: User \"system:serviceaccount:sock-system:sock-operator\" cannot list resource",
    );
    let _operator = Operator::start(&server, "one");
    pass(300).await;
    for wanted in 2..12 {
        server.edit("functions", "hello", |it| {
            it["spec"]["replicas"] = json!(wanted)
        });
        pass(1).await;
        assert_eq!(replicas(&server), wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_for_a_while_leaves_no_trace_in_a_status() {
    for (verb, what) in [
        ("get", "namespaces/shop"),
        ("get", "functions/hello"),
        ("list", "pods"),
        ("apply", "deployments/hello"),
        ("apply", "functions/hello/status"),
    ] {
        for code in [500, 503, 504] {
            let server = cluster();
            server.refuse(verb, what, 2, code, "etcdserver: request timed out");
            let _operator = Operator::start(&server, "one");
            pass(20).await;
            assert_eq!(ready(&server, "functions", "hello"), "WaitingForPods");
            let told = events(&server, "hello");
            assert_eq!(told.len(), 1, "{verb} {what}: {told:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_without_an_answer_is_given_up() {
    let server = cluster();
    server.lose("apply", "deployments/hello", 1);
    let _operator = Operator::start(&server, "one");
    pass(90).await;
    assert!(server.get("deployments", "hello").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_former_pool_goes_with_the_last_pod_that_runs_on_it() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    let former = pool_name();
    let digest = |server: &Server| {
        let set = server.get("packagesets", "science").unwrap();
        set["status"]["digest"].as_str().unwrap().to_owned()
    };
    let warm = |server: &Server| {
        let digest = digest(server);
        let name = format!("science-{}", &digest[..10]);
        server.edit("daemonsets", &name, |pool| {
            pool["status"] = json!({
                "desiredNumberScheduled": 1, "currentNumberScheduled": 1, "numberMisscheduled": 0,
                "numberReady": 1, "observedGeneration": pool["metadata"]["generation"],
            });
        });
        server.put(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "annotations": { "sock.dev/digest": digest },
                "labels": {
                    "sock.dev/pool": "science", "sock.dev/version": digest[..10],
                    "app.kubernetes.io/managed-by": "sock-operator",
                },
            },
            "spec": { "nodeName": "one", "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
        }));
    };
    warm(&server);
    let function = |name: &str, digest: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "annotations": { "sock.dev/digest": digest },
                "labels": { "sock.dev/function": name, "app.kubernetes.io/managed-by": "sock-operator" },
            },
            "spec": { "containers": [] },
        })
    };
    for name in ["a", "b"] {
        server.put(function(name, &digest(&server)));
    }
    // It was evicted, and stays until somebody deletes it.
    let mut evicted = function("evicted", &digest(&server));
    evicted["status"] = json!({ "phase": "Failed", "reason": "Evicted" });
    server.put(evicted);
    pass(10).await;
    server.edit("packagesets", "science", |set| {
        set["spec"]["imports"] = json!(["six", "json"]);
    });
    pass(10).await;
    let is_there = |server: &Server| server.get("daemonsets", &former).is_some();
    warm(&server);
    pass(10).await;
    assert!(is_there(&server));
    server.remove("pods", "a");
    pass(10).await;
    assert!(is_there(&server));
    server.remove("pods", "b");
    pass(1).await;
    assert!(!is_there(&server));
    let pools = server.names("daemonsets").into_iter();
    assert_eq!(pools.filter(|name| name.starts_with("science-")).count(), 1);
}
