//! A leaf's life: from the fork, or the start of a plain interpreter, to serving.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use pyo3::prelude::*;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::{Errno, pread};
use rustix::process::{getgid, getuid};
use sock_zygote_protocol::{
    self as protocol, FdRole, FromLeaf, LeafExtras, LeafSetup, Received, ToLeaf,
};

use crate::confine::{Fds, Masks, Phases, confine, prepare};
use crate::http;
use crate::python::Runtime;

/// What a zygote sends to a spare, with its control channel: the channel is all there is to say.
pub const ASSIGNED: bool = true;
/// A larger setup is a mistake: the kernel passes no environment above 2 MiB to a program either.
const MOST_SETUP: u64 = 4 * 1024 * 1024;
/// Of a traceback, so that it fits one packet.
const MOST_TRACEBACK: usize = 32 * 1024;
/// Of the line for a person, which ends in a container's status (kubelet cuts at 4096).
const MOST_MESSAGE: usize = 2048;

/// Where a leaf comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// Forked for a request, with its control channel.
    Fork,
    /// Forked ahead: its channel leads to the zygote and brings the control channel later.
    Spare,
    /// Started by the shim inside the container.
    Interpreter,
}

/// Why a leaf ends before it serves.
enum End {
    /// The shim has closed the channel, or asked for it.
    Dismissed,
    Failed {
        message: String,
        traceback: String,
    },
}

impl End {
    fn failed(message: impl ToString) -> End {
        End::Failed {
            message: message.to_string(),
            traceback: String::new(),
        }
    }
}

impl From<protocol::Error> for End {
    fn from(error: protocol::Error) -> End {
        match error {
            protocol::Error::Closed => End::Dismissed,
            other => End::failed(format!("control channel: {other}")),
        }
    }
}

/// Lives and ends: a forked child must never return into the zygote's loop.
pub fn run(py: Python<'_>, runtime: &Runtime, channel: OwnedFd, birth: Birth) -> ! {
    let mut phases = Phases::default();
    let begin = || runtime.after_fork(py).map_err(|e| failed(py, runtime, &e));
    let (control, prepared) = match birth {
        Birth::Interpreter => (channel, Ok(None)),
        Birth::Fork => {
            // Said first: the setup is then on its way while the namespaces are made.
            let prepared = hello(&channel)
                .and_then(|()| begin())
                .and_then(|()| prepare(&mut phases).map_err(End::failed));
            (channel, prepared.map(|()| Some(Masks::default())))
        }
        Birth::Spare => {
            let prepared = begin().and_then(|()| {
                let masks = prepare(&mut Phases::default())
                    .and_then(|()| Masks::usual())
                    .map_err(End::failed)?;
                // Its pages that every leaf writes to are copied now, and not while a client waits.
                runtime.rehearse(py);
                runtime.reseed(py).map_err(|e| failed(py, runtime, &e))?;
                Ok(Some(masks))
            });
            let Ok(mut assigned) = protocol::receive::<bool>(&channel) else {
                exit(py, runtime, 0)
            };
            let Some(control) = assigned.fds.pop() else {
                exit(py, runtime, 0)
            };
            drop(channel);
            let said = hello(&control);
            (control, said.and(prepared))
        }
    };
    if birth == Birth::Interpreter && hello(&control).is_err() {
        exit(py, runtime, 0);
    }
    let status =
        match prepared.and_then(|masks| become_leaf(py, runtime, &control, birth, masks, phases)) {
            Ok(server) => http::serve(py, runtime, &control, server),
            Err(End::Dismissed) => 0,
            Err(End::Failed { message, traceback }) => {
                eprintln!(
                    "{}",
                    if traceback.is_empty() {
                        &message
                    } else {
                        &traceback
                    }
                    .trim_end()
                );
                let failed = FromLeaf::Failed {
                    message: cut(message, MOST_MESSAGE),
                    traceback: cut(traceback, MOST_TRACEBACK),
                };
                // Nobody else can be told.
                let _ = protocol::send(&control, &failed, &[]);
                1
            }
        };
    exit(py, runtime, status)
}

/// Ends the process without finalising the interpreter: destructors of a forked heap full of packages
/// take tens of milliseconds, write to pages that are shared until then, and may wait for threads
/// that the fork did not carry over.
pub fn exit(py: Python<'_>, runtime: &Runtime, status: i32) -> ! {
    runtime.flush(py);
    // SAFETY: ends the process; the streams were flushed.
    unsafe { libc::_exit(status) }
}

fn failed(py: Python<'_>, runtime: &Runtime, error: &PyErr) -> End {
    let explained = runtime.explain(py, error);
    End::Failed {
        message: explained.line,
        traceback: explained.traceback,
    }
}

fn hello(control: &OwnedFd) -> Result<(), End> {
    protocol::send(control, &FromLeaf::Hello, &[]).map_err(End::from)
}

fn become_leaf(
    py: Python<'_>,
    runtime: &Runtime,
    control: &OwnedFd,
    birth: Birth,
    masks: Option<Masks>,
    mut phases: Phases,
) -> Result<http::Server, End> {
    let start = Instant::now();
    let Received { message, fds, .. } = protocol::receive::<ToLeaf>(control)?;
    let roles = match message {
        ToLeaf::Setup { fds } => fds,
        ToLeaf::Exit => return Err(End::Dismissed),
        ToLeaf::Serve { .. } | ToLeaf::Park { .. } => {
            return Err(End::failed("a connection came before the setup"));
        }
    };
    phases.time("wait", || start);
    let (setup, extras, fds) = phases.time("setup", || sort(&roles, fds))?;
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    if (uid, gid) != (setup.uid, setup.gid) {
        let due = (setup.uid, setup.gid);
        return Err(End::failed(format!(
            "the leaf runs as user {uid}:{gid} where {}:{} is due",
            due.0, due.1
        )));
    }
    // Namespaces, capabilities and filters are a thread's: one that a fork hook has started would stay what the zygote is.
    if birth != Birth::Interpreter && !alone() {
        return Err(End::failed(
            "a module starts a thread in every fork (os.register_at_fork or pthread_atfork), which cannot be confined: leave it out of the PackageSet's imports",
        ));
    }
    let listener = confine(&setup, &fds, masks, &mut phases).map_err(End::failed)?;
    drop(fds);
    let list: Vec<BorrowedFd<'_>> = listener.iter().map(AsFd::as_fd).collect();
    protocol::send(
        control,
        &FromLeaf::Confined {
            phases: phases.into_list(),
        },
        &list,
    )?;
    // With a copy of its own listener it could answer itself.
    drop(listener);

    let explain = |error: PyErr| failed(py, runtime, &error);
    runtime
        .enter(py, &setup.env, &setup.path, &setup.cwd, &setup.handler)
        .map_err(explain)?;
    if birth == Birth::Fork {
        runtime.reseed_untouched(py).map_err(explain)?;
    }
    let begin = Instant::now();
    let (handler, new) = runtime
        .load_handler(py, &setup.handler, &setup.path, &extras)
        .map_err(|e| {
            if let Some(status) = Runtime::exit_status(py, &e) {
                return End::failed(format!(
                    "the import of handler {:?} ended the process with status {status}",
                    setup.handler
                ));
            }
            explain(e)
        })?;
    // Without it others compile for themselves.
    let compiled = (!new.is_empty()).then(|| memory_file(&new).ok()).flatten();
    let import_micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    if setup.threads > 0 {
        runtime.allow_threads(py, setup.threads).map_err(explain)?;
    }
    let list: Vec<BorrowedFd<'_>> = compiled.iter().map(AsFd::as_fd).collect();
    protocol::send(control, &FromLeaf::Ready { import_micros }, &list)?;
    drop(compiled);
    Ok(http::Server::new(handler, setup))
}

/// Whether the process has one thread: the directory of its threads has a link for each besides its own two
/// (`proc_task_getattr`, fs/proc/base.c).
fn alone() -> bool {
    rustix::fs::stat(c"/proc/self/task").is_ok_and(|task| task.st_nlink == 3)
}

/// Gives every descriptor its place, and reads the setup.
fn sort(roles: &[FdRole], list: Vec<OwnedFd>) -> Result<(LeafSetup, LeafExtras, Fds), End> {
    if roles.len() != list.len() {
        return Err(End::failed(format!(
            "{} descriptors came where {} were named",
            list.len(),
            roles.len()
        )));
    }
    let mut fds = Fds::default();
    let mut setup = None;
    for (role, fd) in roles.iter().zip(list) {
        let place = match role {
            FdRole::Setup => &mut setup,
            FdRole::Root => &mut fds.root,
            FdRole::Network => &mut fds.network,
            FdRole::Stdout => &mut fds.stdout,
            FdRole::Stderr => &mut fds.stderr,
            FdRole::Cgroup => {
                fds.cgroups.push(fd);
                continue;
            }
        };
        if place.replace(fd).is_some() {
            return Err(End::failed(format!("two descriptors are {role:?}")));
        }
    }
    let file = setup.ok_or_else(|| End::failed("the setup has no memory file"))?;
    let bytes = read(&file).map_err(|e| End::failed(format!("read the setup: {e}")))?;
    let (setup, extras) =
        LeafSetup::from_bytes(&bytes).map_err(|e| End::failed(format!("read the setup: {e}")))?;
    Ok((setup, extras, fds))
}

fn memory_file(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"sock-compiled", flags)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// All leaves of a pod have the same open file, so its position is not used.
pub fn read(file: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let size = u64::try_from(fstat(file)?.st_size).unwrap_or(u64::MAX);
    if size > MOST_SETUP {
        return Err(Errno::FBIG);
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    let mut at = 0;
    while at < bytes.len() {
        match pread(file, &mut bytes[at..], at as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => at += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(bytes)
}

/// The end of a text says more than its beginning: there is the error.
fn cut(text: String, most: usize) -> String {
    match text.len().checked_sub(most) {
        None | Some(0) => text,
        Some(mut from) => {
            while !text.is_char_boundary(from) {
                from += 1;
            }
            text[from..].to_owned()
        }
    }
}
