//! The cluster under test, through `kubectl`.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;

/// What `e2e/cluster/env` sets.
struct Environment {
    kubeconfig: String,
    path: String,
    docker_host: Option<String>,
}

fn environment() -> Result<&'static Environment> {
    static FOUND: OnceLock<Result<Environment, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| find().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

fn find() -> Result<Environment> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/env");
    let found = output(
        Command::new("bash").args([
            "-c",
            r#"variables=$("$0") && eval "$variables" && printf '%s\n' "$KUBECONFIG" "$PATH" "${DOCKER_HOST-}""#,
            script,
        ]),
        None,
    )
    .context("e2e/cluster/env: is there a cluster? `make install` makes it")?;
    let mut lines = found.lines();
    let mut line = || lines.next().unwrap_or_default().to_owned();
    Ok(Environment {
        kubeconfig: line(),
        path: line(),
        docker_host: Some(line()).filter(|host| !host.is_empty()),
    })
}

/// A program with the variables that reach the cluster.
///
/// # Errors
/// There is no cluster.
pub fn program(name: &str, arguments: &[&str]) -> Result<Command> {
    let environment = environment()?;
    let mut command = Command::new(name);
    command
        .args(arguments)
        .env("KUBECONFIG", &environment.kubeconfig)
        .env("PATH", &environment.path);
    if let Some(host) = &environment.docker_host {
        command.env("DOCKER_HOST", host);
    }
    Ok(command)
}

/// Path of a program of the project that was built beside the tests.
///
/// # Errors
/// It was not.
pub fn built(name: &str, package: &str) -> Result<String> {
    let test = std::env::current_exe()?;
    let directory = test.parent().and_then(std::path::Path::parent);
    let path = directory.context("the directory of the build")?.join(name);
    if !path.exists() {
        bail!("{} is missing: cargo build -p {package}", path.display());
    }
    Ok(path.to_string_lossy().into_owned())
}

/// What a program prints.
///
/// # Errors
/// It fails; what it said is in the error.
pub(crate) fn output(command: &mut Command, input: Option<&str>) -> Result<String> {
    let described = || format!("{command:?}").chars().take(300).collect::<String>();
    let text = described();
    let mut child = command
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| text.clone())?;
    let writer = child.stdin.take().zip(input).map(|(mut pipe, input)| {
        let input = input.to_owned();
        // A program that ends early leaves the rest unread; its exit code tells.
        std::thread::spawn(move || pipe.write_all(input.as_bytes()))
    });
    let done = child.wait_with_output().with_context(|| text.clone())?;
    if let Some(writer) = writer {
        let _ = writer.join();
    }
    if !done.status.success() {
        bail!(
            "{text}: {}: {}{}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim(),
            String::from_utf8_lossy(&done.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// What `kubectl` prints.
///
/// # Errors
/// It fails; what it said is in the error.
pub fn kubectl(arguments: &[&str]) -> Result<String> {
    output(&mut program("kubectl", arguments)?, None)
}

/// The same with standard input.
///
/// # Errors
/// It fails; what it said is in the error.
pub fn kubectl_with(arguments: &[&str], input: &str) -> Result<String> {
    output(&mut program("kubectl", arguments)?, Some(input))
}

/// An object, or a list of them, as `kubectl get` finds it.
///
/// # Errors
/// It is not there.
pub fn get(arguments: &[&str]) -> Result<Value> {
    let mut all = vec!["get", "-o", "json"];
    all.extend(arguments);
    Ok(serde_json::from_str(&kubectl(&all)?)?)
}

/// Applies objects as a user would.
///
/// # Errors
/// The API server refuses one.
pub fn apply(objects: &[Value]) -> Result<()> {
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
    kubectl_with(&["apply", "-f", "-"], &list.to_string())?;
    Ok(())
}

/// Whether an event in a namespace about `object`, which is `KIND/NAME`, has all these words in its reason and message.
///
/// # Errors
/// `kubectl` fails.
pub fn has_event(namespace: &str, object: &str, words: &[&str]) -> Result<bool> {
    let (kind, name) = object.split_once('/').context("KIND/NAME")?;
    let selector = format!("--field-selector=involvedObject.name={name}");
    let events = get(&["events", "--namespace", namespace, &selector])?;
    let mut events = events["items"].as_array().context("events")?.iter();
    Ok(events.any(|event| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let said = format!("{} {}", text(&event["reason"]), text(&event["message"]));
        let of = text(&event["involvedObject"]["kind"]);
        of.eq_ignore_ascii_case(kind) && words.iter().all(|word| said.contains(word))
    }))
}
