//! Many resources, and many rounds in which nothing changes.

use super::*;
use crate::controller::AT_ONCE;

#[tokio::test(start_paused = true)]
async fn rounds_without_a_change_write_nothing() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    roll_out(&server, "hello");
    pass(10).await;
    assert_eq!(ready(&server, "functions", "hello"), "Serving");
    assert!(!server.writes().is_empty());
    pass(3600).await;
    let calls = server.calls();
    let rounds = |what: &str| {
        let gets = calls
            .iter()
            .filter(|call| call.verb == "get" && call.what == what);
        gets.count()
    };
    // Each round is a read of the resource.
    assert!((5..=8).contains(&rounds("functions/hello")));
    assert!((11..=14).contains(&rounds("packagesets/science")));
    let writes: Vec<_> = calls.iter().filter(|call| call.writes()).collect();
    assert!(writes.is_empty(), "{writes:?}");
}

#[tokio::test(start_paused = true)]
async fn an_operator_that_begins_anew_changes_nothing() {
    let server = cluster();
    let operator = Operator::start(&server, "one");
    pass(10).await;
    operator.stop().await.unwrap();
    let versions = || {
        children().map(|(plural, name)| {
            server.get(plural, &name).unwrap()["metadata"]["resourceVersion"].clone()
        })
    };
    let before = versions();
    server.writes();
    let _operator = Operator::start(&server, "two");
    pass(10).await;
    assert_eq!(versions(), before);
    // It cannot know that nobody has changed them; once it has applied them it does.
    let applied = server.writes();
    assert!(
        applied.iter().all(|write| write.starts_with("apply ")),
        "{applied:?}"
    );
    assert!(
        applied.iter().all(|write| !write.ends_with("/status")),
        "{applied:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_storm_is_taken_in_turns_and_each_gets_its_own_once() {
    const MANY: usize = 200;
    let server = Server::new();
    server.put(ready_set("True"));
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    server.writes();
    let begin = tokio::time::Instant::now();
    for number in 0..MANY {
        server.put(function(&format!("f{number}")));
    }
    pass(60).await;
    let mut writes = server.writes();
    for number in 0..MANY {
        let name = format!("f{number}");
        assert_eq!(ready(&server, "functions", &name), "WaitingForPods");
        assert_eq!(events(&server, &name).len(), 1);
    }
    assert_eq!(server.names("deployments").len(), MANY);
    let code = server
        .names("configmaps")
        .into_iter()
        .filter(|name| name.contains("-code-"));
    assert_eq!(code.count(), MANY);
    writes.retain(|write| !write.starts_with("create events"));
    // Service, code, Deployment, status.
    assert_eq!(writes.len(), 4 * MANY);
    writes.sort();
    writes.dedup();
    assert_eq!(writes.len(), 4 * MANY, "something was written twice");
    // One call at a time for each, and one for the Lease.
    assert!(
        server.most_busy() <= usize::from(AT_ONCE) + 1,
        "{}",
        server.most_busy()
    );
    assert!(begin.elapsed() < Duration::from_secs(61));
}
