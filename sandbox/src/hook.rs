//! Hooks: programs that whoever made a specification has run at points of a container's life (config.md of the OCI runtime
//! specification, "POSIX-platform Hooks").

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{ContainerState, Hook, Hooks, Spec, StateBuilder};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::Step;
use crate::{Error, Result};

/// How much of what a hook says on standard error is told, in bytes.
const MOST_SAID: u64 = 1024;

/// When a hook runs, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Everything is mounted, and nothing is the root yet; on the host.
    Prestart,
    /// The same.
    CreateRuntime,
    /// The same; in the container's namespaces, with the host's files.
    CreateContainer,
    /// Before the program, in its place.
    StartContainer,
    /// The program runs; on the host.
    Poststart,
    /// The container is gone; on the host.
    Poststop,
}

impl Kind {
    fn field(self) -> &'static str {
        match self {
            Kind::Prestart => "hooks.prestart",
            Kind::CreateRuntime => "hooks.createRuntime",
            Kind::CreateContainer => "hooks.createContainer",
            Kind::StartContainer => "hooks.startContainer",
            Kind::Poststart => "hooks.poststart",
            Kind::Poststop => "hooks.poststop",
        }
    }

    fn status(self) -> ContainerState {
        match self {
            Kind::Prestart | Kind::CreateRuntime | Kind::CreateContainer => {
                ContainerState::Creating
            }
            Kind::StartContainer => ContainerState::Created,
            Kind::Poststart => ContainerState::Running,
            Kind::Poststop => ContainerState::Stopped,
        }
    }

    fn of(self, hooks: &Hooks) -> &[Hook] {
        #[allow(deprecated, reason = "some still use them")]
        let hooks = match self {
            Kind::Prestart => hooks.prestart(),
            Kind::CreateRuntime => hooks.create_runtime(),
            Kind::CreateContainer => hooks.create_container(),
            Kind::StartContainer => hooks.start_container(),
            Kind::Poststart => hooks.poststart(),
            Kind::Poststop => hooks.poststop(),
        };
        hooks.as_deref().unwrap_or_default()
    }
}

/// What hooks are told of a container.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
}

/// Whether there is a hook of one of these kinds.
#[must_use]
pub fn has(spec: &Spec, kinds: &[Kind]) -> bool {
    let hooks = spec.hooks().as_ref();
    hooks.is_some_and(|hooks| kinds.iter().any(|kind| !kind.of(hooks).is_empty()))
}

/// Runs the hooks of one kind, one after the other, up to the first that fails. `pid` is the container's process, 0 when it is
/// gone.
///
/// # Errors
/// A hook cannot be started, takes too long, or fails: in its own words.
pub fn run(spec: &Spec, kind: Kind, container: &Identity, pid: i32) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let hooks = kind.of(hooks);
    if hooks.is_empty() {
        return Ok(());
    }
    let mut state = StateBuilder::default()
        .version(spec.version().clone())
        .id(container.id.clone())
        .status(kind.status())
        .bundle(container.bundle.clone());
    if pid != 0 {
        state = state.pid(pid);
    }
    if let Some(annotations) = spec.annotations() {
        state = state.annotations(annotations.clone());
    }
    let state = state
        .build()
        .map_err(|e| Error::spec(kind.field(), e.to_string()))?;
    let state =
        serde_json::to_string(&state).map_err(|e| Error::spec(kind.field(), e.to_string()))?;
    for hook in hooks {
        one(hook, &state).map_err(|reason| {
            Error::spec(kind.field(), format!("{}: {reason}", hook.path().display()))
        })?;
    }
    Ok(())
}

/// The reason, if it fails.
fn one(hook: &Hook, state: &str) -> std::result::Result<(), String> {
    let within = match hook.timeout() {
        None => None,
        Some(seconds @ 1..) => Some(Duration::from_secs(seconds.unsigned_abs())),
        Some(seconds) => return Err(format!("timeout {seconds}: give seconds above 0")),
    };
    if !hook.path().is_absolute() {
        return Err("the path must be absolute".into());
    }
    let system = |step: &str, e: std::io::Error| format!("{step}: {e}");
    // Files and no pipes: neither side waits for the other.
    let file = || {
        memfd_create("sock-hook", MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|e| system("memory file", e.into()))
    };
    let (mut input, mut said) = (file()?, file()?);
    input
        .write_all(state.as_bytes())
        .and_then(|()| input.seek(SeekFrom::Start(0)))
        .map_err(|e| system("memory file", e))?;
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().unwrap_or_default().split_first() {
        command.arg0(name).args(arguments);
    }
    let environment = hook.env().iter().flatten();
    let mut child = command
        .env_clear()
        .envs(environment.filter_map(|entry| entry.split_once('=')))
        .current_dir("/")
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(said.try_clone().map_err(|e| system("memory file", e))?)
        .spawn()
        .map_err(|e| e.to_string())?;
    let ended = match within {
        None => Some(child.wait().map_err(|e| system("wait", e))?),
        Some(within) => wait(&mut child, within).map_err(|e| system("wait", e))?,
    };
    let Some(status) = ended else {
        let seconds = within.unwrap_or_default().as_secs();
        return Err(format!("did not end within {seconds} s"));
    };
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    // Without its words there is its status.
    let _ = said
        .seek(SeekFrom::Start(0))
        .and_then(|_| said.take(MOST_SAID).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    Err(format!("{status}: {}", text.trim()))
}

/// `None` if it was killed because it took longer.
fn wait(child: &mut Child, within: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(std::io::ErrorKind::NotFound)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let within = Timespec::try_from(within).map_err(std::io::Error::other)?;
    if poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&within))? == 0 {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// Has the hooks of some kinds run by a process of their own, which tells of their end: [`crate::Progress::Created`], or
/// [`crate::Progress::Failed`]. They are on the host, also if the calling process is in a pod's network.
///
/// # Errors
/// The process cannot be made.
pub fn launch(
    spec: &Spec,
    kinds: &[Kind],
    container: &Identity,
    pid: i32,
) -> Result<crate::Launched> {
    let network = File::open("/proc/1/ns/net").step("open", "/proc/1/ns/net")?;
    crate::launch::helper(|| {
        crate::namespace::join(&network, oci_spec::runtime::LinuxNamespaceType::Network)?;
        kinds
            .iter()
            .try_for_each(|kind| run(spec, *kind, container, pid))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(hooks: &Value) -> Spec {
        serde_json::from_value(
            json!({"ociVersion": "1.2.0", "annotations": {"a": "b"}, "hooks": hooks}),
        )
        .unwrap()
    }

    fn container() -> Identity {
        Identity {
            id: "c1".into(),
            bundle: "/run/bundle".into(),
        }
    }

    #[test]
    fn a_hook_has_its_arguments_its_environment_and_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script = format!("(echo $0 $1 $NAME $HOME; cat) >{}", out.display());
        let hook = json!({"path": "/bin/sh", "args": ["name", "-c", script, "zero", "one"], "env": ["NAME=value"], "timeout": 10});
        let spec = spec(&json!({"poststart": [hook]}));
        assert!(has(&spec, &[Kind::Poststop, Kind::Poststart]));
        assert!(!has(&spec, &[Kind::Prestart]));
        run(&spec, Kind::Prestart, &container(), 7).unwrap();
        assert!(!out.exists());
        run(&spec, Kind::Poststart, &container(), 7).unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        let (line, state) = text.split_once('\n').unwrap();
        assert_eq!(line, "zero one value");
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            state,
            json!({
                "ociVersion": "1.2.0", "id": "c1", "status": "running", "pid": 7, "bundle": "/run/bundle",
                "annotations": {"a": "b"},
            })
        );
    }

    #[test]
    fn a_hook_that_fails_is_named_with_its_words_and_is_the_last() {
        let fails = |hook: Value| {
            let never = json!({"path": "/bin/sh", "args": ["sh", "-c", "kill $PPID"]});
            let spec = spec(&json!({"createContainer": [hook, never]}));
            run(&spec, Kind::CreateContainer, &container(), 0)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            fails(json!({"path": "/bin/sh", "args": ["sh", "-c", "echo no device >&2; exit 3"]})),
            "hooks.createContainer: /bin/sh: exit status: 3: no device"
        );
        assert_eq!(
            fails(json!({"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1})),
            "hooks.createContainer: /bin/sleep: did not end within 1 s"
        );
        let missing = fails(json!({"path": "/no/such/hook"}));
        assert!(
            missing.starts_with("hooks.createContainer: /no/such/hook: No such file"),
            "{missing}"
        );
        let relative = fails(json!({"path": "hook"}));
        assert!(
            relative.ends_with("hook: the path must be absolute"),
            "{relative}"
        );
        let never = fails(json!({"path": "/bin/true", "timeout": 0}));
        assert!(
            never.ends_with("timeout 0: give seconds above 0"),
            "{never}"
        );
    }
}
