//! A zygote that is forked from another: from the parent's namespaces into those of its own container, nested in them.
//!
//! The child of the parent is a process that only waits: where it is to go is made for it meanwhile, inside of where it is.
//! It forks once more, because a PID namespace is entered by being born there, and its child goes on. Python learns of
//! the fork only then.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sock_zygote_protocol::{
    self as protocol, FromZygote, Received, ToZygote, ZygoteEntry, ZygoteFd,
};

use crate::confine::{self, last_errno};
use crate::fork;
use crate::leaf;
use crate::python::Runtime;
use crate::zygote;

/// Why there is no zygote.
enum End {
    /// The shim is gone or wants none.
    Dismissed,
    Failed(String),
}

impl From<protocol::Error> for End {
    fn from(error: protocol::Error) -> End {
        match error {
            protocol::Error::Closed => End::Dismissed,
            other => End::Failed(format!("control channel: {other}")),
        }
    }
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> End {
    move |errno| End::Failed(format!("{step}: {errno}"))
}

/// Lives and ends: never returns into the parent's loop. `threads`: see [`fork::Forker`].
pub fn run(py: Python<'_>, parent: &Runtime, control: OwnedFd, threads: bool) -> ! {
    let entered = enter(&control).and_then(|entry| {
        fork::tell_python(threads);
        let runtime = parent.renewed(py);
        let kept = runtime.descend(py, &entry.env);
        let kept = kept.map_err(|e| End::Failed(runtime.explain(py, &e).line))?;
        protocol::send(&control, &FromZygote::Entered, &[])?;
        Ok((runtime, kept))
    });
    let status = match entered {
        Ok((runtime, hooks_are_kept)) => {
            match zygote::live(
                py,
                runtime,
                control,
                zygote::Descent::Child { hooks_are_kept },
            ) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("sock: {error}");
                    1
                }
            }
        }
        Err(End::Dismissed) => 0,
        Err(End::Failed(message)) => {
            eprintln!("sock: {message}");
            let module = String::new();
            // Nobody else can be told.
            let _ = protocol::send(&control, &FromZygote::Refused { module, message }, &[]);
            1
        }
    };
    leaf::exit(py, parent, status)
}

fn enter(control: &OwnedFd) -> Result<ZygoteEntry, End> {
    protocol::send(control, &FromZygote::Hello, &[])?;
    let (kinds, fds) = match protocol::receive::<ToZygote>(control)? {
        Received {
            message: ToZygote::Enter { fds: kinds },
            fds,
            ..
        } => (kinds, fds),
        _ => return Err(End::Failed("something came before Enter".into())),
    };
    if kinds.len() != fds.len() {
        let (came, named) = (fds.len(), kinds.len());
        return Err(End::Failed(format!(
            "{came} descriptors came where {named} were named"
        )));
    }
    let mut entry = None;
    let mut namespaces = Vec::new();
    let mut streams = Vec::new();
    for (kind, fd) in kinds.into_iter().zip(fds) {
        match kind {
            ZygoteFd::Entry => entry = Some(fd),
            // First, so that what follows is charged to the pod.
            ZygoteFd::Cgroup => {
                rustix::io::write(&fd, b"0").map_err(failed("join the cgroup (write)"))?;
            }
            ZygoteFd::Stdout => streams.push((1, fd)),
            ZygoteFd::Stderr => streams.push((2, fd)),
            other => namespaces.push((other, fd)),
        }
    }
    let entry = entry.ok_or_else(|| End::Failed("the entry has no memory file".into()))?;
    let entry = leaf::read(&entry).map_err(failed("read the entry"))?;
    let entry =
        postcard::from_bytes(&entry).map_err(|e| End::Failed(format!("read the entry: {e}")))?;
    let interpreter = interpreter()?;

    let take = |wanted, namespaces: &mut Vec<(ZygoteFd, OwnedFd)>| {
        let at = namespaces.iter().position(|(kind, _)| *kind == wanted);
        at.map(|at| namespaces.swap_remove(at).1)
            .ok_or_else(|| End::Failed(format!("the namespace {wanted:?} is missing")))
    };
    let pids = take(ZygoteFd::Pid, &mut namespaces)?;
    let user = take(ZygoteFd::User, &mut namespaces)?;
    move_into_link_name_space(pids.as_fd(), Some(LinkNameSpaceType::ProcessID))
        .map_err(failed("enter the process namespace (setns)"))?;
    // SAFETY: libc's own fork, so that its locks and those of pthread_atfork are in order in the child.
    match unsafe { libc::fork() } {
        -1 => return Err(failed("fork into the process namespace")(last_errno())),
        0 => {}
        // SAFETY: ends the process, which has nothing to flush: it has run no Python.
        _ => unsafe { libc::_exit(0) },
    }
    // With it comes every capability over what it owns.
    move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(failed("enter the user namespace (setns)"))?;
    for (kind, fd) in namespaces {
        let (link, step) = match kind {
            ZygoteFd::Mount => (
                LinkNameSpaceType::Mount,
                "enter the mount namespace (setns)",
            ),
            ZygoteFd::Network => (
                LinkNameSpaceType::Network,
                "enter the network namespace (setns)",
            ),
            ZygoteFd::Ipc => (
                LinkNameSpaceType::InterProcessCommunication,
                "enter the IPC namespace (setns)",
            ),
            ZygoteFd::CgroupNamespace => (
                LinkNameSpaceType::ControlGroup,
                "enter the cgroup namespace (setns)",
            ),
            _ => (
                LinkNameSpaceType::HostNameAndNISDomainName,
                "enter the UTS namespace (setns)",
            ),
        };
        move_into_link_name_space(fd.as_fd(), Some(link)).map_err(failed(step))?;
    }
    fork::replace(&streams).map_err(failed("replace standard output and error (dup2)"))?;
    confine::keep_zygote_capabilities().map_err(|e| End::Failed(e.to_string()))?;
    is_same(&interpreter)?;
    Ok(entry)
}

/// The files of the interpreter that runs: the program, and the library that most of it is in.
fn interpreter() -> Result<Vec<(PathBuf, File)>, End> {
    let maps = fs::read_to_string("/proc/self/maps");
    let maps = maps.map_err(|e| End::Failed(format!("read /proc/self/maps: {e}")))?;
    let program = fs::read_link("/proc/self/exe").unwrap_or_default();
    let mut paths: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .filter(|path| {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            *path == program || name.is_some_and(|name| name.starts_with("libpython"))
        })
        .collect();
    paths.sort();
    paths.dedup();
    paths
        .into_iter()
        .map(|path| match File::open(&path) {
            Ok(file) => Ok((path, file)),
            Err(e) => Err(End::Failed(format!("open {}: {e}", path.display()))),
        })
        .collect()
}

/// Code of one interpreter in the directories of another would find modules that are not its own.
fn is_same(interpreter: &[(PathBuf, File)]) -> Result<(), End> {
    for (path, ours) in interpreter {
        if !is_equal(path, ours).unwrap_or(false) {
            return Err(End::Failed(format!(
                "the image has another {} than the zygote that this one is forked from: where both name the same image, the name has come to mean another one, and the pods of what it extends are to be restarted",
                path.display()
            )));
        }
    }
    Ok(())
}

fn is_equal(path: &Path, ours: &File) -> std::io::Result<bool> {
    let theirs = File::open(path)?;
    if ours.metadata()?.len() != theirs.metadata()?.len() {
        return Ok(false);
    }
    let (mut ours, mut theirs) = (ours, &theirs);
    let (mut a, mut b) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let got = ours.read(&mut a)?;
        if got == 0 {
            return Ok(true);
        }
        theirs.read_exact(&mut b[..got])?;
        if a[..got] != b[..got] {
            return Ok(false);
        }
    }
}
