//! The server of a pod's containers: how `start` leaves it running, and what it speaks.
//!
//! `start` itself listens and gives the socket to the server, so that containerd has the address while the server is still
//! loaded: its first call waits in the socket.

use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use containerd_shim::api::Options;
use containerd_shim::asynchronous::Shim as _;
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim_async::{Task, create_task};
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use containerd_shim::{Error, Flags, StartOpts};
use serde_json::json;

use crate::service::Service;

/// Where the server finds its socket.
const LISTENER: RawFd = 3;
/// Where containerd hears of events (containerd's core/runtime/v2/README.md).
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// What is known of the program that asked last, until the next boot.
const KNOWN: &str = "/run/sock/containerd-line";
/// What containerd calls itself since 2.0 (`containerd --version`).
const SINCE_2_0: &str = "github.com/containerd/containerd/v2 ";

fn at(context: &str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
    let context = format!("{context} {}", path.as_ref().display());
    move |err| Error::IoError { context, err }
}

/// Starts the server of a group of containers at this address, unless it runs.
///
/// # Errors
/// The socket cannot be made, or the process not be started.
pub fn spawn(opts: &StartOpts, address: &str) -> Result<(), Error> {
    let path = address.trim_start_matches("unix://");
    let Some(listener) = listen(Path::new(path)).map_err(at("listen on", path))? else {
        return Ok(());
    };
    let started = start(opts, address, &listener);
    if started.is_err() {
        // containerd removes the bundle alone.
        let _ = std::fs::remove_file(path);
    }
    started
}

/// Starts the server, which takes the socket over.
fn start(opts: &StartOpts, address: &str, listener: &UnixListener) -> Result<(), Error> {
    let (mut command, program) =
        crate::reexec::command().map_err(at("mount read-only", "this program"))?;
    command
        .args(["-namespace", &opts.namespace, "-id", &opts.id])
        .args(["-address", &opts.address, "-socket", address])
        .args(opts.debug.then_some("-debug"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if !opts.ttrpc_address.is_empty() {
        command.env(TTRPC_ADDRESS, &opts.ttrpc_address);
    }
    let socket = listener.as_raw_fd();
    // SAFETY: system calls only. A descriptor that is duplicated onto itself would stay closed on execve.
    unsafe {
        command.pre_exec(move || {
            let result = if socket == LISTENER {
                libc::fcntl(socket, libc::F_SETFD, 0)
            } else {
                libc::dup2(socket, LISTENER)
            };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut server = command.spawn().map_err(at("start", "this program"))?;
    drop(program);
    let options = opts.extension::<Options>();
    let confined = options.and_then(|options| {
        let cgroup = options
            .map(|options| options.shim_cgroup)
            .unwrap_or_default();
        containerd_shim::cgroup::set_cgroup_and_oom_score(server.id(), &cgroup)
    });
    if let Err(error) = confined {
        let _ = server.kill();
        let _ = server.wait();
        return Err(error);
    }
    Ok(())
}

/// A socket that listens, or nothing if somebody listens there.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    loop {
        match UnixListener::bind(path) {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Ok(None);
                }
                // Of a server that was killed.
                std::fs::remove_file(path)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether containerd is of the line 1.7, which speaks version 2 of the task API. It says nothing of that to a shim, and what it
/// says of its own limit (`MAX_SHIM_VERSION`) it says since 2.0 too. One of 2.0 or later would take an answer of version 2 as well,
/// but then runs `start` and `delete` for each container of a pod. So each program is asked once.
#[must_use]
pub fn is_for_version_2(flags: &Flags) -> bool {
    flags.action == "start" && is_before_2_0(Path::new(&flags.publish_binary), Path::new(KNOWN))
}

fn is_before_2_0(program: &Path, known: &Path) -> bool {
    let Ok(found) = std::fs::metadata(program) else {
        return false;
    };
    let of = |line: u8| format!("{}-{}-{} {line}", found.dev(), found.ino(), found.mtime());
    let answer = std::fs::read_to_string(known).unwrap_or_default();
    if answer == of(1) || answer == of(2) {
        return answer == of(1);
    }
    let asked = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let Ok(asked) = asked.map(|asked| String::from_utf8_lossy(&asked.stdout).into_owned()) else {
        return false;
    };
    let is_before = asked.contains("containerd") && !asked.contains(SINCE_2_0);
    // Whoever cannot keep it asks again.
    if let Some(directory) = known.parent() {
        let _ = std::fs::create_dir_all(directory);
        let _ = std::fs::write(known, of(if is_before { 1 } else { 2 }));
    }
    is_before
}

/// `start` for a containerd that speaks version 2 of the task API: what it says by flags, environment and input, and what it
/// reads.
///
/// # Errors
/// As of [`spawn`]; the bundle has no specification.
pub async fn start_version_2(flags: &Flags) -> Result<String, Error> {
    let mut input = Vec::new();
    io::stdin()
        .read_to_end(&mut input)
        .map_err(at("read", "stdin"))?;
    let options = Any::parse_from_bytes(&input).ok();
    let options = options.filter(|options| !options.type_url.is_empty());
    let opts = StartOpts {
        id: flags.id.clone(),
        publish_binary: flags.publish_binary.clone(),
        address: flags.address.clone(),
        ttrpc_address: std::env::var(TTRPC_ADDRESS).unwrap_or_default(),
        namespace: flags.namespace.clone(),
        debug: flags.debug,
        extensions: options.into_iter().collect(),
        ..StartOpts::default()
    };
    let address = Service::of(flags).start_shim(opts).await?;
    Ok(json!({"version": 2, "address": address, "protocol": "ttrpc"}).to_string())
}

/// Serves until the last container of the pod is deleted.
///
/// # Errors
/// It was not started by [`spawn`].
pub async fn serve(flags: &Flags) -> Result<(), Error> {
    if crate::reexec::program().is_none() {
        return Err(Error::Other(
            "the server is started by `start`, from a read-only mount".into(),
        ));
    }
    let listener = listener().map_err(at("take over the socket", &flags.socket))?;
    // SAFETY: plain numbers. Orphans of containers come here (prctl(2)).
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
        return Err(at("become", "subreaper")(io::Error::last_os_error()));
    }
    // It was executed by a descriptor's name.
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"containerd-shim".as_ptr()) };
    // Whoever tells all processes of a machine to end does not mean to leave its containers alone.
    for kind in [
        tokio::signal::unix::SignalKind::terminate(),
        tokio::signal::unix::SignalKind::interrupt(),
    ] {
        let mut signal = tokio::signal::unix::signal(kind).map_err(at("follow", "signals"))?;
        tokio::task::spawn_local(async move { while signal.recv().await.is_some() {} });
    }
    let mut service = Service::of(flags);
    let task: Arc<dyn Task + Send + Sync> = Arc::new(service.tasks());
    let mut services = create_task(Arc::clone(&task));
    // Version 3 is version 2 under another name.
    let former = create_task(task).into_iter();
    services.extend(former.map(|(name, methods)| (name.replace(".v3.", ".v2."), methods)));
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(services);
    server.start().await?;
    service.wait().await;
    let _ = server.shutdown().await;
    let _ = std::fs::remove_file(flags.socket.trim_start_matches("unix://"));
    Ok(())
}

fn listener() -> io::Result<tokio::net::UnixListener> {
    // SAFETY: nothing in this process uses that number yet, and what it is is looked at below.
    let socket = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    if !rustix::net::sockopt::socket_acceptconn(&socket)? {
        return Err(io::Error::other("nobody listens on it"));
    }
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn containerd_is_asked_once_which_line_it_is_of() {
        let directory = tempfile::tempdir().unwrap();
        let known = directory.path().join("known");
        for (said, expected) in [
            (
                "containerd github.com/containerd/containerd v1.7.31 abc",
                true,
            ),
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1",
                true,
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.2.9 abc",
                false,
            ),
            ("something else", false),
        ] {
            let program = directory.path().join("containerd");
            let asked = directory.path().join("asked");
            let script = format!("#!/bin/sh\necho >>{}\necho '{said}'\n", asked.display());
            let fresh = directory.path().join("fresh");
            // By another process: what this one has open for writing, a child of another test may hold when it is executed.
            let written = Command::new("sh")
                .args(["-c", "printf %s \"$2\" >\"$1\" && chmod 755 \"$1\"", "sh"])
                .arg(&fresh)
                .arg(&script)
                .status();
            assert!(written.unwrap().success());
            std::fs::rename(&fresh, &program).unwrap();
            let _ = std::fs::remove_file(&asked);
            let _ = std::fs::remove_file(&known);
            for _ in 0..2 {
                assert_eq!(is_before_2_0(&program, &known), expected, "{said}");
            }
            assert_eq!(std::fs::read_to_string(&asked).unwrap(), "\n", "{said}");
        }
        assert!(!is_before_2_0(&directory.path().join("none"), &known));
    }
}
