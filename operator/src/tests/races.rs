//! Somebody else writes or deletes between a read and a write, or the cache is older than what there is.

use kube::Client;
use kube::api::Api;
use sock_crds::{Function, PackageSet};

use super::*;
use crate::controller::Reconciled as _;

/// The calls that write what [`cluster`] needs; each with the resource that it is made for.
fn writes() -> Vec<(String, &'static str)> {
    let owner = |plural: &str, name: &str| match (plural, name) {
        ("daemonsets", _) => "packagesets/science",
        (_, name) if name.starts_with("science") => "packagesets/science",
        _ => "functions/hello",
    };
    let mut writes: Vec<_> = children()
        .into_iter()
        .map(|(plural, name)| (format!("{plural}/{name}"), owner(plural, &name)))
        .collect();
    writes.push(("functions/hello/status".into(), "functions/hello"));
    writes.push(("packagesets/science/status".into(), "packagesets/science"));
    writes
}

fn assert_complete(server: &Server) {
    for (plural, name) in children() {
        assert!(server.get(plural, &name).is_some(), "{plural}/{name}");
    }
    assert_eq!(ready(server, "functions", "hello"), "WaitingForPods");
    assert_eq!(
        ready(server, "packagesets", "science"),
        "WaitingForDaemonSet"
    );
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_repeated_from_a_fresh_read() {
    for (write, owner) in writes() {
        let server = cluster();
        server.refuse("apply", &write, 1, 409, "the object has been modified");
        let _operator = Operator::start(&server, "one");
        pass(10).await;
        assert_complete(&server);
        let calls = server.calls();
        let at: Vec<usize> = (0..calls.len())
            .filter(|at| calls[*at].verb == "apply" && calls[*at].what == write)
            .collect();
        assert!((2..=3).contains(&at.len()), "{write}: {} times", at.len());
        assert!(
            calls[at[0]..at[1]]
                .iter()
                .any(|call| call.verb == "get" && call.what == owner),
            "{write}: repeated without a look"
        );
        let told: Vec<_> = events(&server, "hello");
        assert!(
            told.iter().all(|(reason, _)| reason.starts_with("Waiting")),
            "{write}: {told:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_conflict_that_stays_is_said_and_does_not_make_a_hot_loop() {
    for (write, owner) in writes() {
        if write.ends_with("/status") {
            continue;
        }
        let server = cluster();
        server.refuse(
            "apply",
            &write,
            usize::MAX,
            409,
            "it is modified all the time",
        );
        let _operator = Operator::start(&server, "one");
        pass(600).await;
        let calls = server.calls();
        let times = applied(&calls, &write);
        assert!(
            (8..=20).contains(&times),
            "{write}: {times} times in 10 min"
        );
        let (plural, name) = owner.split_once('/').unwrap();
        let (_, reason, message) = condition(&server.get(plural, name).unwrap(), "Ready");
        assert_eq!(reason, "ApiServerError", "{write}");
        assert!(message.contains("it is modified all the time"), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_that_cannot_be_written_makes_no_hot_loop() {
    let server = cluster();
    server.refuse(
        "apply",
        "functions/hello/status",
        usize::MAX,
        403,
        "no status for you",
    );
    let _operator = Operator::start(&server, "one");
    pass(600).await;
    let calls = server.calls();
    let times = calls
        .iter()
        .filter(|call| call.what == "functions/hello/status")
        .count();
    assert!((8..=40).contains(&times), "{times} times in 10 min");
    assert_eq!(events(&server, "hello"), []);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_somebody_takes_first_is_left_to_him() {
    for (plural, name, owner, foreign) in [
        (
            "services",
            "hello".to_owned(),
            ("functions", "hello"),
            json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "hello" },
                    "spec": { "selector": { "app": "other" } } }),
        ),
        (
            "deployments",
            "hello".to_owned(),
            ("functions", "hello"),
            json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "hello" },
                    "spec": { "replicas": 7, "selector": { "matchLabels": { "app": "other" } } } }),
        ),
        (
            "daemonsets",
            pool_name(),
            ("packagesets", "science"),
            json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": pool_name() },
                    "spec": { "revisionHistoryLimit": 7 } }),
        ),
    ] {
        let server = cluster();
        let theirs = foreign.clone();
        server.before("apply", &format!("{plural}/{name}"), move |server| {
            server.put(theirs)
        });
        let _operator = Operator::start(&server, "one");
        pass(30).await;
        let there = server.get(plural, &name).unwrap();
        assert_eq!(there["spec"], foreign["spec"]);
        assert_eq!(there["metadata"].get("ownerReferences"), None);
        assert_eq!(ready(&server, owner.0, owner.1), "NameTaken");

        server.remove(plural, &name);
        pass(60).await;
        assert_ne!(ready(&server, owner.0, owner.1), "NameTaken");
    }
}

#[tokio::test(start_paused = true)]
async fn a_child_that_is_replaced_by_somebodys_own_is_left_to_him() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    let foreign = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "hello" }, "spec": { "replicas": 7 },
    });
    let theirs = foreign.clone();
    server.before("apply", "deployments/hello", move |server| {
        server.remove("deployments", "hello");
        server.put(theirs);
    });
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(2));
    pass(30).await;
    assert_eq!(
        server.get("deployments", "hello").unwrap()["spec"],
        foreign["spec"]
    );
    assert_eq!(ready(&server, "functions", "hello"), "NameTaken");
    let told = events(&server, "hello");
    assert!(
        told.iter().all(|(reason, _)| reason != "Refused"),
        "{told:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn code_that_is_replaced_while_it_is_cleared_away_is_not_deleted() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    let code = code_name("hello");
    let name = code.clone();
    server.before("delete", &format!("configmaps/{code}"), move |server| {
        server.remove("configmaps", &name);
        server
            .put(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name } }));
    });
    server.edit("functions", "hello", |it| {
        it["spec"]["source"]["inline"] = json!("other")
    });
    pass(10).await;
    assert!(
        server
            .writes()
            .contains(&format!("delete configmaps/{code}"))
    );
    assert!(server.get("configmaps", &code).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_function_that_is_deleted_in_the_middle_leaves_no_noise() {
    for write in [
        "services/hello",
        "deployments/hello",
        "functions/hello/status",
    ] {
        let server = cluster();
        server.before("apply", write, |server| server.remove("functions", "hello"));
        let _operator = Operator::start(&server, "one");
        pass(30).await;
        server.calls();
        pass(700).await;
        let calls = server.calls();
        let calls: Vec<_> = calls
            .iter()
            .filter(|call| call.what.contains("hello"))
            .collect();
        assert!(calls.len() <= 1, "{write}: {calls:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_made_again_under_its_name_gets_no_status_of_the_former() {
    let server = cluster();
    server.before("apply", "functions/hello/status", |server| {
        server.remove("functions", "hello");
        let mut other = function("hello");
        other["metadata"]["uid"] = json!("f-other");
        other["spec"]["packageSet"] = json!("nosuch");
        server.put(other);
    });
    let _operator = Operator::start(&server, "one");
    pass(60).await;
    let function = server.get("functions", "hello").unwrap();
    assert_eq!(
        condition(&function, "PackageSetReady").1,
        "PackageSetMissing"
    );
    // What belonged to the former is somebody else's until it is collected.
    assert_eq!(ready(&server, "functions", "hello"), "NameTaken");
}

#[tokio::test(start_paused = true)]
async fn a_namespace_that_goes_in_the_middle_ends_it() {
    for (write, _) in writes() {
        let server = cluster();
        server.before("apply", &write, |server| {
            server.edit("namespaces", NAMESPACE, |it| {
                it["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
            });
        });
        let _operator = Operator::start(&server, "one");
        pass(30).await;
        server.calls();
        pass(700).await;
        assert_eq!(server.writes(), [""; 0], "{write}");
        for (plural, name) in [("functions", "hello"), ("packagesets", "science")] {
            let object = server.get(plural, name).unwrap();
            let text = object["status"].to_string();
            assert!(!text.contains("Forbidden"), "{write}: {text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_package_set_that_goes_in_the_middle_takes_nothing_with_it() {
    let server = cluster();
    server.before("apply", "deployments/hello", |server| {
        server.remove("packagesets", "plain")
    });
    let _operator = Operator::start(&server, "one");
    pass(30).await;
    let function = server.get("functions", "hello").unwrap();
    assert_eq!(
        condition(&function, "PackageSetReady").1,
        "PackageSetMissing"
    );
    let deployment = server.get("deployments", "hello").unwrap();
    let annotations = &deployment["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["sock.dev/digest"], version().digest);
}

#[tokio::test(start_paused = true)]
async fn a_config_map_that_goes_in_the_middle_is_missed_and_found_again() {
    let server = cluster();
    let source = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "code" },
        "data": { "app.py": CODE, "requirements.txt": LINE },
    });
    server.put(source.clone());
    server.edit("functions", "hello", |it| {
        it["spec"]["source"] = json!({ "configMap": { "name": "code" } });
    });
    server.edit("packagesets", "science", |it| {
        it["spec"]["requirements"] =
            json!({ "configMapKeyRef": { "name": "code", "key": "requirements.txt" } });
    });
    server.before("apply", "services/hello", |server| {
        server.remove("configmaps", "code")
    });
    let _operator = Operator::start(&server, "one");
    pass(30).await;
    assert_eq!(ready(&server, "functions", "hello"), "ConfigMapMissing");
    assert_eq!(ready(&server, "packagesets", "science"), "ConfigMapMissing");
    server.put(source);
    pass(5).await;
    assert_eq!(ready(&server, "functions", "hello"), "WaitingForPods");
    assert_eq!(
        ready(&server, "packagesets", "science"),
        "WaitingForDaemonSet"
    );
}

#[tokio::test(start_paused = true)]
async fn a_child_that_somebody_deletes_is_made_again() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    for (plural, name) in children() {
        server.remove(plural, &name);
        pass(5).await;
        assert!(server.get(plural, &name).is_some(), "{plural}/{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_somebody_changes_of_ours_is_changed_back_and_what_is_his_stays() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    server.edit("deployments", "hello", |it| {
        it["spec"]["replicas"] = json!(5);
        it["metadata"]["annotations"] = json!({ "theirs": "kept" });
    });
    server.edit("daemonsets", &pool_name(), |it| {
        it["metadata"]["labels"]
            .as_object_mut()
            .unwrap()
            .remove("sock.dev/pool");
    });
    pass(5).await;
    let deployment = server.get("deployments", "hello").unwrap();
    assert_eq!(deployment["spec"]["replicas"], 1);
    assert_eq!(deployment["metadata"]["annotations"]["theirs"], "kept");
    let pool = server.get("daemonsets", &pool_name()).unwrap();
    assert_eq!(pool["metadata"]["labels"]["sock.dev/pool"], "science");
    server.writes();

    server.edit("deployments", "hello", |it| {
        it["metadata"]["annotations"]["theirs"] = json!("changed");
    });
    pass(5).await;
    assert_eq!(server.writes(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_field_that_is_wanted_no_longer_goes() {
    let server = cluster();
    server.edit("functions", "hello", |it| {
        it["spec"]["source"] = json!({ "configMap": { "name": "code" } });
    });
    server.put(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "code" }, "data": { "app.py": CODE },
    }));
    let _operator = Operator::start(&server, "one");
    let annotations = || {
        let deployment = server.get("deployments", "hello").unwrap();
        deployment["spec"]["template"]["metadata"]["annotations"].clone()
    };
    pass(10).await;
    assert!(annotations()["sock.dev/source"].is_string());
    server.edit("functions", "hello", |it| {
        it["spec"]["source"] = json!({ "inline": CODE })
    });
    pass(10).await;
    assert_eq!(annotations().get("sock.dev/source"), None);
}

#[tokio::test(start_paused = true)]
async fn a_stale_cache_undoes_nothing() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    server.hold("functions");
    server.edit("functions", "hello", |it| it["spec"]["replicas"] = json!(3));
    pass(5).await;
    // Nothing has told the operator yet.
    assert_eq!(
        server.get("deployments", "hello").unwrap()["spec"]["replicas"],
        1
    );
    let status = server.get("functions", "hello").unwrap()["status"].clone();
    assert_eq!(status["observedGeneration"], 1);

    // A watch of something else makes it look, while its cache still has the former generation.
    roll_out(&server, "hello");
    pass(5).await;
    assert_eq!(
        server.get("deployments", "hello").unwrap()["spec"]["replicas"],
        3
    );
    roll_out(&server, "hello");
    pass(5).await;
    let status = server.get("functions", "hello").unwrap()["status"].clone();
    assert_eq!(status["observedGeneration"], 2);
    assert_eq!(ready(&server, "functions", "hello"), "Serving");
    assert_eq!(status["conditions"][0]["observedGeneration"], 2);
    server.writes();

    server.let_go("functions");
    pass(5).await;
    assert_eq!(server.writes(), [""; 0]);
    assert_eq!(server.get("functions", "hello").unwrap()["status"], status);
}

#[tokio::test(start_paused = true)]
async fn a_stale_cache_does_not_take_back_the_version_that_functions_run_on() {
    let server = cluster();
    let _operator = Operator::start(&server, "one");
    pass(10).await;
    server.hold("packagesets");
    let digest = server.get("packagesets", "science").unwrap()["status"]["digest"].clone();
    let pod = |name: &str, ready: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": { "sock.dev/pool": "science", "sock.dev/version": digest.as_str().unwrap()[..10] },
            },
            "spec": { "nodeName": name, "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": ready }] },
        })
    };
    server.put(pod("one", "True"));
    pass(5).await;
    let status = |server: &Server| server.get("packagesets", "science").unwrap()["status"].clone();
    assert_eq!(status(&server)["readyDigest"], digest);
    let told = events(&server, "science").len();
    server.put(pod("one", "False"));
    pass(5).await;
    assert_eq!(status(&server)["readyDigest"], digest);
    assert_eq!(events(&server, "science").len(), told);
}

#[tokio::test(start_paused = true)]
async fn a_status_that_was_decided_on_something_older_is_not_written() {
    let server = cluster();
    let client = server.client("old");
    let typed = async |client: &Client| {
        let functions: Api<Function> = Api::namespaced(client.clone(), NAMESPACE);
        let sets: Api<PackageSet> = Api::namespaced(client.clone(), NAMESPACE);
        (
            functions.get("hello").await.unwrap(),
            sets.get("science").await.unwrap(),
        )
    };
    let (function, set) = typed(&client).await;
    // Meanwhile another reports.
    for (plural, name) in [("functions", "hello"), ("packagesets", "science")] {
        server.edit(plural, name, |it| {
            it["status"] = json!({ "observedGeneration": 9 })
        });
    }
    let context = context(&server);
    let refusals = [
        function.steps(&context).await.unwrap_err(),
        set.steps(&context).await.unwrap_err(),
    ];
    assert!(refusals.iter().all(crate::cluster::Error::is_passing));
    for (plural, name) in [("functions", "hello"), ("packagesets", "science")] {
        let status = server.get(plural, name).unwrap()["status"].clone();
        assert_eq!(status, json!({ "observedGeneration": 9 }));
    }
}
