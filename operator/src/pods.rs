//! What pods tell: whether they are ready, what they mount, and why they do not run, in the one line that their
//! author has to act on.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodSpec};
use kube::ResourceExt as _;
use sock_crds::NodeFailure;

/// How many failures a status lists.
const MOST: usize = 10;

/// Longest line that is kept, in characters.
const LONGEST: usize = 1024;

/// The failures of pods, in an order that does not change from one look to the next.
pub fn failures<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Vec<NodeFailure> {
    let mut failures: Vec<NodeFailure> = pods
        .into_iter()
        .filter_map(|pod| {
            Some(NodeFailure {
                node: pod
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.node_name.clone())
                    .unwrap_or_default(),
                pod: pod.name_any(),
                message: failure(pod)?,
            })
        })
        .collect();
    failures.sort();
    failures.truncate(MOST);
    failures
}

/// Whether a pod is ready and stays.
pub fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
        && pod.status.as_ref().is_some_and(|status| {
            status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        })
}

/// Whether it has ended for good: kubelet refused or evicted it, or its node went down.
pub fn has_failed(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.and_then(|status| status.phase.as_deref()) == Some("Failed")
}

/// The ConfigMaps that pods mount.
pub fn mounted(pods: &[Pod]) -> BTreeSet<String> {
    pods.iter()
        .filter_map(|pod| pod.spec.as_ref())
        .flat_map(config_maps)
        .collect()
}

/// The ConfigMaps that a pod mounts.
pub fn config_maps(spec: &PodSpec) -> impl Iterator<Item = String> + use<'_> {
    let volumes = spec.volumes.iter().flatten();
    volumes.filter_map(|volume| Some(volume.config_map.as_ref()?.name.clone()))
}

/// Why this pod does not run; none if it does, or if nothing speaks against it yet.
pub fn failure(pod: &Pod) -> Option<String> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.as_ref()?;
    let containers = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten());
    if let Some(line) = containers.filter_map(container_failure).next() {
        return Some(line);
    }
    let unschedulable = status.conditions.iter().flatten().find(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
    });
    if let Some(condition) = unschedulable {
        return condition.message.as_deref().map(line);
    }
    // Refused by kubelet before any container was made.
    has_failed(pod).then(|| {
        let reason = status.reason.as_deref().unwrap_or("Failed");
        format!(
            "{reason}: {}",
            line(status.message.as_deref().unwrap_or("no message"))
        )
    })
}

fn container_failure(status: &ContainerStatus) -> Option<String> {
    if status.ready {
        return None;
    }
    let ended = |state: &Option<ContainerState>| {
        let terminated = state.as_ref()?.terminated.as_ref()?;
        (terminated.exit_code != 0).then(|| {
            let signal = terminated.signal.map_or_else(
                || format!("exit code {}", terminated.exit_code),
                |signal| format!("signal {signal}"),
            );
            let said = match (terminated.message.as_deref(), terminated.reason.as_deref()) {
                (Some(message), Some("StartError")) => start_error(message),
                (message, _) => message.map(line).unwrap_or_default(),
            };
            match terminated.reason.as_deref() {
                _ if !said.is_empty() => said,
                Some(reason) => format!("container {} ended: {reason}, {signal}", status.name),
                None => format!("container {} ended with {signal}", status.name),
            }
        })
    };
    if let Some(line) = ended(&status.state) {
        return Some(line);
    }
    let waiting = status.state.as_ref()?.waiting.as_ref();
    match waiting.map(|waiting| {
        (
            waiting.reason.as_deref().unwrap_or_default(),
            waiting.message.as_deref(),
        )
    }) {
        // Its own message only says that kubelet waits.
        Some(("CrashLoopBackOff", _)) => ended(&status.last_state),
        Some(("ContainerCreating" | "PodInitializing" | "", _)) => None,
        // The line speaks for itself, and is the same as that of the state that follows.
        Some(("RunContainerError", Some(message))) => Some(line(message)),
        Some((reason, message)) => Some(format!(
            "{reason}: {}",
            message.map(line).unwrap_or_default()
        )),
        // It runs again, or is about to: what ended it last still counts until it is ready.
        None => ended(&status.last_state),
    }
}

/// The last line of a message, without what containerd and kubelet put around it.
pub fn line(message: &str) -> String {
    let last = message
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .unwrap_or_default();
    let mut rest = last;
    while let Some(stripped) = strip(rest) {
        rest = stripped;
    }
    // Part of it is a tenant's text, and whoever reads it may sit at a terminal.
    rest.chars()
        .filter_map(|c| match c {
            c if !c.is_control() => Some(c),
            c if c.is_whitespace() => Some(' '),
            _ => None,
        })
        .take(LONGEST)
        .collect()
}

/// What the runtime said when a container could not be started. It comes first; kubelet appends the container's log
/// after a colon, whose first line is the head of a traceback, or says the same again.
fn start_error(message: &str) -> String {
    let first = line(
        message
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default(),
    );
    let own = first
        .strip_suffix(": Traceback (most recent call last):")
        .unwrap_or(&first);
    let again = own
        .match_indices(": ")
        .find(|(at, colon)| own[..*at].ends_with(&own[at + colon.len()..]));
    own[..again.map_or(own.len(), |(at, _)| at)].to_owned()
}

/// Takes one wrapping off, if there is one.
fn strip(text: &str) -> Option<&str> {
    const PLAIN: [&str; 7] = [
        "failed to create containerd task: ",
        "failed to create shim task: ",
        "failed to create containerd container: ",
        "failed to start shim task: ",
        "failed to create task for container: ",
        "failed to start task: ",
        "Error: ",
    ];
    /// Followed by a quoted name and a colon.
    const NAMED: [&str; 3] = [
        "failed to start containerd task \"",
        "failed to start container \"",
        "failed to create containerd task \"",
    ];
    for prefix in PLAIN {
        if let Some(rest) = text.strip_prefix(prefix) {
            return Some(rest);
        }
    }
    for prefix in NAMED {
        if let Some((_, rest)) = text
            .strip_prefix(prefix)
            .and_then(|rest| rest.split_once("\": "))
        {
            return Some(rest);
        }
    }
    if let Some(rest) = text.strip_prefix("rpc error: code = ") {
        return Some(rest.split_once(" desc = ")?.1);
    }
    // The name of a gRPC code, at the end of every error that crossed containerd.
    text.strip_suffix(": unknown")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "hello-1" },
            "spec": { "nodeName": "worker", "containers": [] },
            "status": status,
        }))
        .unwrap()
    }

    fn container(state: serde_json::Value, last: serde_json::Value) -> serde_json::Value {
        json!([{ "name": "function", "image": "", "imageID": "", "ready": false, "restartCount": 1,
                 "state": state, "lastState": last }])
    }

    #[test]
    fn a_start_that_failed_gives_the_shims_own_words() {
        let pod = pod(json!({ "containerStatuses": container(
            json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container" } }),
            json!({ "terminated": { "exitCode": 128, "reason": "StartError", "message":
                "failed to start containerd task \"ab12\": rpc error: code = Unknown desc = ModuleNotFoundError: No module named 'panda' (app.py:1): unknown" } }),
        ) }));
        assert_eq!(
            failure(&pod).unwrap(),
            "ModuleNotFoundError: No module named 'panda' (app.py:1)"
        );
    }

    #[test]
    fn the_log_that_kubelet_appends_to_a_failed_start_is_left_out() {
        for (message, expected) in [
            (
                "failed to start containerd task \"3f\": handler app.handler: ModuleNotFoundError: No module named 'nosuch' (/srv/function/app.py, line 1): Traceback (most recent call last):\n  File \"/srv/function/app.py\", line 1, in <module>\nModuleNotFoundError: No module named 'nosuch'\n",
                "handler app.handler: ModuleNotFoundError: No module named 'nosuch' (/srv/function/app.py, line 1)",
            ),
            (
                "failed to start containerd task \"5a\": PackageSet p: x: ImportError: no x: ImportError: no x\nTraceback (most recent call last):\n",
                "PackageSet p: x: ImportError: no x",
            ),
        ] {
            let ended = json!({ "terminated": { "exitCode": 128, "reason": "StartError", "message": message } });
            let waits = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
            let pod = pod(json!({ "containerStatuses": container(waits, ended) }));
            assert_eq!(failure(&pod).unwrap(), expected);
        }
    }

    #[test]
    fn a_log_gives_its_last_line() {
        let pod = pod(json!({ "initContainerStatuses": container(
            json!({ "terminated": { "exitCode": 1, "reason": "Error", "message": "resolving\nsix==1.17.0: hash differs\n\n" } }),
            json!({}),
        ) }));
        assert_eq!(failure(&pod).unwrap(), "six==1.17.0: hash differs");
    }

    #[test]
    fn an_end_without_words_is_described() {
        let pod = pod(json!({ "containerStatuses": container(
            json!({ "waiting": { "reason": "CrashLoopBackOff" } }),
            json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } }),
        ) }));
        assert_eq!(
            failure(&pod).unwrap(),
            "container function ended: OOMKilled, exit code 137"
        );
    }

    #[test]
    fn an_image_that_cannot_be_pulled_is_said() {
        let pod = pod(json!({ "containerStatuses": container(
            json!({ "waiting": { "reason": "ErrImagePull", "message": "not found" } }), json!({}),
        ) }));
        assert_eq!(failure(&pod).unwrap(), "ErrImagePull: not found");
    }

    #[test]
    fn a_pod_that_only_starts_has_no_failure() {
        let waiting = json!({ "waiting": { "reason": "PodInitializing" } });
        assert_eq!(
            failure(&pod(
                json!({ "containerStatuses": container(waiting, json!({})) })
            )),
            None
        );
        assert_eq!(failure(&pod(json!({ "phase": "Pending" }))), None);
    }

    #[test]
    fn a_pod_without_a_node_says_why() {
        let pod = pod(
            json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available" }] }),
        );
        assert_eq!(failure(&pod).unwrap(), "0/3 nodes are available");
    }

    #[test]
    fn a_line_has_no_control_characters_of_whoever_wrote_it() {
        assert_eq!(
            line("ValueError: \x1b[2J\x07gone\rOK"),
            "ValueError: [2Jgone OK"
        );
    }

    /// Words of containerd, kubelet and Python in any order, and anything else.
    fn messages() -> impl Strategy<Value = String> {
        let word = prop::sample::select(vec![
            "rpc error: code = ",
            "Unknown",
            " desc = ",
            "failed to start containerd task \"",
            "ab12\": ",
            "Error: ",
            "failed to create shim task: ",
            ": unknown",
            ": ",
            "ImportError: no x",
            ": Traceback (most recent call last):",
            "\n",
            "\r\n",
            "\r",
            "\x1b[31m",
            "\0",
            "\u{2028}",
            " ",
        ]);
        let any =
            prop_oneof![8 => word.prop_map(str::to_owned), 1 => "\\PC{0,6}", 1 => "x{0,2000}"];
        prop::collection::vec(any, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_message_becomes_one_short_line(message in messages(), reason in prop::option::of("StartError|Error|\\PC{0,9}"), exit_code in any::<i32>()) {
            for said in [line(&message), start_error(&message)] {
                prop_assert!(said.chars().count() <= LONGEST);
                prop_assert!(!said.contains(char::is_control), "{said:?}");
            }
            let state = json!({ "terminated": { "exitCode": exit_code, "reason": reason, "message": message } });
            let told = failure(&pod(json!({ "containerStatuses": container(state, json!({})) })));
            prop_assert_eq!(told.is_some(), exit_code != 0);
        }
    }
}
