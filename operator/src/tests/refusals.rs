//! What the API server refuses is said once, in its words, and tried again with patience.

use super::*;

const REFUSALS: [(u16, &str, &str); 5] = [
    (
        403,
        "Forbidden",
        "exceeded quota: apps, requested: count/deployments.apps=1, used: 5, limited: 5",
    ),
    (
        403,
        "Forbidden",
        "violates PodSecurity \"restricted:latest\": runAsNonRoot != true",
    ),
    (
        403,
        "Forbidden",
        "maximum memory usage per Container is 256Mi, but limit is 1Gi",
    ),
    (
        400,
        "ApiServerError",
        "admission webhook \"images.example.com\" denied the request: no tag",
    ),
    (
        422,
        "Refused",
        "spec.template.spec.containers[0].image: Required value",
    ),
];

#[tokio::test(start_paused = true)]
async fn a_refused_child_is_said_once_in_the_servers_words() {
    for ((plural, name), (code, reason, words)) in children().into_iter().zip(REFUSALS) {
        let server = cluster();
        let write = format!("{plural}/{name}");
        server.refuse("apply", &write, usize::MAX, code, words);
        let _operator = Operator::start(&server, "one");
        let (kind, owner) = if write.contains("science") {
            ("packagesets", "science")
        } else {
            ("functions", "hello")
        };
        pass(5).await;
        let object = server.get(kind, owner).unwrap();
        let (holds, said, message) = condition(&object, "Ready");
        assert_eq!(
            (holds.as_str(), said.as_str()),
            ("False", reason),
            "{write}"
        );
        assert!(
            message.contains(words) && message.contains(&name),
            "{message}"
        );
        // The words of the API server, and not the form in which they came.
        assert!(!message.contains("Status {"), "{message}");

        pass(595).await;
        let about = events(&server, owner);
        let about: Vec<_> = about.iter().filter(|(said, _)| said == reason).collect();
        assert_eq!(about.len(), 1, "{about:?}");
        assert!(about[0].1.contains(words));
        let calls = server.calls();
        let times = applied(&calls, &write);
        assert!(
            (8..=25).contains(&times),
            "{write}: {times} times in 10 min"
        );
        let reports = format!("{kind}/{owner}/status");
        let reports = calls.iter().filter(|call| call.what == reports).count();
        assert!(reports <= 2, "{write}: {reports} reports");

        server.relent();
        pass(61).await;
        assert!(
            ready(&server, kind, owner).starts_with("Waiting"),
            "{write}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn words_that_differ_each_time_make_no_hot_loop() {
    let server = cluster();
    for attempt in 0..1000 {
        let words = format!("webhook denied the request {attempt}");
        server.refuse("apply", "deployments/hello", 1, 403, &words);
    }
    let _operator = Operator::start(&server, "one");
    pass(600).await;
    assert!(applied(&server.calls(), "deployments/hello") <= 25);
}

#[tokio::test(start_paused = true)]
async fn a_webhook_that_is_away_is_said_when_it_stays_away() {
    let server = cluster();
    let words = "Internal error occurred: failed calling webhook \"images.example.com\": connection refused";
    server.refuse("apply", "deployments/hello", usize::MAX, 500, words);
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    let (_, reason, message) = condition(&server.get("functions", "hello").unwrap(), "Ready");
    assert_eq!(reason, "ApiServerError");
    assert!(message.contains(words), "{message}");
}

#[tokio::test(start_paused = true)]
async fn what_is_served_goes_on_being_reported_when_a_change_is_refused() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(5).await;
    roll_out(&server, "hello");
    pass(5).await;
    assert_eq!(ready(&server, "functions", "hello"), "Serving");
    server.refuse(
        "apply",
        "deployments/hello",
        usize::MAX,
        403,
        "exceeded quota",
    );
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    pass(5).await;
    let function = server.get("functions", "hello").unwrap();
    assert_eq!(condition(&function, "Ready").1, "Forbidden");
    assert_eq!(function["status"]["readyReplicas"], 1);
    assert_eq!(function["status"]["observedGeneration"], 2);
}

#[tokio::test(start_paused = true)]
async fn a_right_that_is_missing_is_said() {
    for (verb, what, kind, owner) in [
        ("get", "packagesets/plain", "functions", "hello"),
        ("get", "namespaces/shop", "functions", "hello"),
        ("list", "configmaps", "functions", "hello"),
        ("list", "daemonsets", "packagesets", "science"),
    ] {
        let server = cluster();
        let _operator = Operator::start(&server, "one");
        pass(5).await;
        let before = server.get(kind, owner).unwrap()["status"].clone();
        let told = events(&server, owner).len();
        let words = "is forbidden: User \"system:serviceaccount:sock-system:sock-operator\" cannot";
        server.refuse(verb, what, usize::MAX, 403, words);
        server.edit(kind, owner, |it| it["metadata"]["generation"] = json!(0));
        server.edit(kind, owner, |it| it["spec"]["extra"] = json!(1));
        pass(600).await;
        let object = server.get(kind, owner).unwrap();
        let (_, reason, message) = condition(&object, "Ready");
        assert_eq!(reason, "Forbidden", "{verb} {what}");
        assert!(message.contains(words), "{message}");
        // What else was known is still said.
        let others = |status: &Value| {
            let all = status["conditions"].as_array().unwrap().iter();
            let all = all.filter(|one| one["type"] != "Ready");
            all.map(|one| one["type"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(others(&object["status"]), others(&before));
        assert_eq!(
            events(&server, owner).len(),
            told + 1,
            "{:?}",
            events(&server, owner)
        );
        let calls = server.calls();
        let times = calls
            .iter()
            .filter(|call| call.verb == verb && call.what == what);
        let times = times.count();
        assert!(times <= 60, "{verb} {what}: {times} times in 10 min");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_wants_to_be_left_alone_is() {
    let server = cluster();
    server.throttle("apply", "deployments/hello", 1, 30);
    let _operator = Operator::start(&server, "one");
    let times = |server: &Server| applied(&server.calls(), "deployments/hello");
    pass(29).await;
    assert_eq!(times(&server), 1);
    assert_eq!(
        server.get("functions", "hello").unwrap().get("status"),
        None
    );
    pass(3).await;
    assert_eq!(times(&server), 1);
    assert_eq!(ready(&server, "functions", "hello"), "WaitingForPods");
    assert_eq!(events(&server, "hello").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn pods_that_are_refused_are_said_in_the_servers_words() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(5).await;
    let words =
        "pods \"hello-5d4f\" is forbidden: exceeded quota: memory, requested: limits.memory=1Gi";
    server.edit("deployments", "hello", |it| {
        it["status"] = json!({
            "observedGeneration": it["metadata"]["generation"], "unavailableReplicas": 1,
            "conditions": [{ "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words }],
        });
    });
    pass(5).await;
    let (holds, _, message) = condition(&server.get("functions", "hello").unwrap(), "Ready");
    assert_eq!((holds.as_str(), message.as_str()), ("False", words));
    let told = events(&server, "hello");
    assert_eq!(told.iter().filter(|(_, note)| note == words).count(), 1);
}
