//! The zygote's event loop: import, then fork on request.
//!
//! It is one thread, because a fork carries over one thread only. Whoever speaks on an attached channel
//! can ask for leaves and nothing else; a channel that carries anything else is dropped.

use std::collections::VecDeque;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{socket_domain, socket_type};
use sock_zygote_protocol::{
    self as protocol, FromZygote, ModuleImport, Received, ToZygote, ZygoteSetup,
};

use crate::confine::last_errno;
use crate::fork::{Error as ForkError, Forker, Side};
use crate::immortal::immortalize;
use crate::leaf::{self, Birth};
use crate::pages::{self, Memory};
use crate::python::Runtime;
use crate::{arenas, confine, descend, files, nursery};

/// A spare is replaced when nothing has been asked for this long: its fork would otherwise take the
/// processor from the request that has just got the last one.
const QUIET: Duration = Duration::from_millis(4);
/// The same after a fork that the kernel refused: it is out of processes or memory.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// Channels of Functions' shims on one node. kubelet's own default limit is 110 pods.
const MOST_CHANNELS: usize = 4096;
/// What is at fault where it is no module.
const WARM_UP: &str = "warmUp";
/// Spares beyond this are a mistake in the setup.
const MOST_SPARES: u32 = 64;

/// Where a zygote comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Descent {
    /// None: it was started as a program.
    Root,
    /// Forked from another.
    Child {
        /// Whether the parent has kept hooks of packages from the interpreter, which it does if it has accepted no threads.
        hooks_are_kept: bool,
    },
}

/// Runs until the pool's shim closes `control`.
pub fn live(py: Python<'_>, runtime: Runtime, control: OwnedFd, descent: Descent) -> PyResult<()> {
    let setup = match protocol::receive::<ToZygote>(&control) {
        Ok(Received {
            message: ToZygote::Configure(setup),
            ..
        }) => setup,
        Ok(_) => {
            return Err(PyRuntimeError::new_err(
                "the first message was not Configure",
            ));
        }
        Err(error) => return Err(PyRuntimeError::new_err(error.to_string())),
    };
    let spares = setup.spares.min(MOST_SPARES) as usize;
    // What an ancestor has accepted is there still, and cannot be taken back from the interpreter.
    let threads = !setup.accepted_threads.is_empty()
        || descent
            == Descent::Child {
                hooks_are_kept: false,
            };
    let ready = match warm(py, &runtime, &setup, descent, threads) {
        Ok(ready) => ready,
        Err(Refusal { module, message }) => {
            let text = if module.is_empty() {
                message.clone()
            } else {
                format!("{module}: {message}")
            };
            // If the shim is gone, the exception below still says it on standard error.
            let _ = protocol::send(&control, &FromZygote::Refused { module, message }, &[]);
            return Err(PyRuntimeError::new_err(text));
        }
    };
    // No zombies and no wakeups: nobody asks for the status of a leaf here. Only now, because an
    // import may have waited for children of its own.
    // SAFETY: sets the action of a signal; SIG_IGN runs no code.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // Here and not in each leaf: it takes a system call for every capability that there is.
    if descent == Descent::Root {
        confine::drop_bounding_set().map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
    }
    let forker = Forker::new(threads)
        .map_err(|e| PyRuntimeError::new_err(format!("prepare to fork: {e}")))?;
    protocol::send(&control, &ready, &[]).map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
    Zygote {
        runtime,
        forker,
        control,
        channels: Vec::new(),
        spares: VecDeque::new(),
        wanted: spares,
    }
    .serve(py)
}

struct Refusal {
    module: String,
    message: String,
}

/// Imports everything; yields `Ready`.
fn warm(
    py: Python<'_>,
    runtime: &Runtime,
    setup: &ZygoteSetup,
    descent: Descent,
    accepts_threads: bool,
) -> Result<FromZygote, Refusal> {
    let shared = match descent {
        Descent::Root => Memory::default(),
        Descent::Child { .. } => Memory::now(),
    };
    let refuse = |module: &str, error: &PyErr| {
        let explained = runtime.explain(py, error);
        eprintln!("{}", explained.traceback.trim_end());
        Refusal {
            module: module.to_owned(),
            message: explained.line,
        }
    };
    runtime
        .become_zygote(py, &setup.path, accepts_threads)
        .map_err(|e| refuse("", &e))?;
    arenas::gather();
    let start = Instant::now();
    let mut modules = Vec::with_capacity(setup.imports.len());
    let mut threads = threads().unwrap_or(1);
    let check_threads = |module: &str, threads: &mut usize| {
        let now = threads_of(module)?;
        if now > *threads && !setup.accepted_threads.iter().any(|name| name == module) {
            return Err(Refusal {
                module: module.to_owned(),
                message: thread_message(py, runtime, now - *threads),
            });
        }
        *threads = now;
        Ok(())
    };
    for name in &setup.imports {
        let begin = Instant::now();
        py.import(name.as_str()).map_err(|e| refuse(name, &e))?;
        modules.push(ModuleImport {
            name: name.clone(),
            micros: micros(begin),
        });
        check_threads(name, &mut threads)?;
    }
    let warm_up = if setup.warm_up.is_empty() {
        ""
    } else {
        WARM_UP
    };
    runtime
        .try_out(py, &setup.warm_up)
        .map_err(|e| refuse(warm_up, &e))?;
    check_threads(WARM_UP, &mut threads)?;
    let ran = runtime.watch(py).map_err(|e| refuse(warm_up, &e))?;
    let fresh = nursery::begin(py);
    runtime
        .gather(py, ran, fresh.heap)
        .map_err(|e| refuse("", &e))?;
    runtime.warm_up(py).map_err(|e| refuse(WARM_UP, &e))?;
    check_threads(WARM_UP, &mut threads)?;
    runtime.settle(py).map_err(|e| refuse("", &e))?;
    let immortal = immortalize(py).map_err(|e| refuse("", &e))?;
    // Half a line that an import has printed would be printed again by every leaf.
    runtime.flush(py);
    runtime.freeze(py).map_err(|e| refuse("", &e))?;
    // Beside threads that were accepted a child may hang.
    if !accepts_threads {
        files::carry_over(py, runtime);
    }
    nursery::begin(py);
    pages::collapse(fresh, &shared);
    eprintln!("sock: {immortal} objects are not counted any more");
    Ok(FromZygote::Ready {
        import_micros: micros(start),
        modules,
    })
}

fn threads() -> std::io::Result<usize> {
    Ok(fs::read_dir("/proc/self/task")?.count())
}

fn threads_of(module: &str) -> Result<usize, Refusal> {
    threads().map_err(|e| Refusal {
        module: module.to_owned(),
        message: format!("cannot count threads in /proc/self/task: {e}"),
    })
}

fn thread_message(py: Python<'_>, runtime: &Runtime, count: usize) -> String {
    let own = std::process::id().to_string();
    let mut names: Vec<String> = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str() != Some(&own))
        .filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    names.dedup();
    let python = runtime.threads_of_python(py).unwrap_or_default();
    let python = if python.is_empty() {
        String::new()
    } else {
        format!("; Python's own: {python}")
    };
    format!(
        "it started {count} thread{} ({}{python}), which a fork does not carry over; \
         keep it from starting threads, or add it to the accepted threads at your own risk",
        if count == 1 { "" } else { "s" },
        names.join(", ")
    )
}

struct Zygote {
    runtime: Runtime,
    forker: Forker,
    control: OwnedFd,
    channels: Vec<OwnedFd>,
    /// Their ends of private channels, over which each gets its control channel.
    spares: VecDeque<OwnedFd>,
    wanted: usize,
}

impl Zygote {
    fn serve(mut self, py: Python<'_>) -> PyResult<()> {
        let mut replenish_at = Instant::now();
        loop {
            let missing = self.spares.len() < self.wanted;
            let wait = missing.then(|| replenish_at.saturating_duration_since(Instant::now()));
            let events = self.look(py, wait)?;
            // One spare at a time, so that a request that comes meanwhile waits for one fork at most.
            if events.is_empty()
                && missing
                && replenish_at <= Instant::now()
                && let Err(error) = self.add_spare(py)
            {
                stop_if_stranded(&error)?;
                eprintln!("sock: no spare could be forked: {error}");
                replenish_at = Instant::now() + AFTER_FAILURE;
            }
            if events.contains(&Ready::Control) && !self.control() {
                // The pool is gone. Spares see their channels close; leaves belong to their shims.
                self.runtime.flush(py);
                // SAFETY: ends the process without finalising an interpreter full of packages, whose
                // destructors have nothing to save and take long.
                unsafe { libc::_exit(0) }
            }
            let mut gone = Vec::new();
            for event in &events {
                if let Ready::Channel(index) = *event {
                    replenish_at = Instant::now() + QUIET;
                    if !self.request(py, index)? {
                        gone.push(index);
                    }
                }
            }
            for index in gone.into_iter().rev() {
                self.channels.swap_remove(index);
            }
            self.spares.retain(alive);
        }
    }

    /// Which sockets have something to say, in order of their index.
    fn look(&self, py: Python<'_>, wait: Option<Duration>) -> PyResult<Vec<Ready>> {
        let fds: Vec<BorrowedFd<'_>> = [&self.control]
            .into_iter()
            .chain(&self.channels)
            .chain(&self.spares)
            .map(AsFd::as_fd)
            .collect();
        let mut fds: Vec<PollFd<'_>> = fds
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        let wait = wait.and_then(|w| Timespec::try_from(w).ok());
        let mut poll = || poll(&mut fds, wait.as_ref());
        let found = if self.forker.threads {
            py.detach(poll)
        } else {
            // Nobody else wants the interpreter, and to give it away writes to pages that the last fork shares.
            poll()
        };
        match found {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(PyRuntimeError::new_err(format!(
                    "wait for requests (poll): {errno}"
                )));
            }
        }
        let spares_from = 1 + self.channels.len();
        Ok(fds
            .iter()
            .enumerate()
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(index, _)| match index {
                0 => Ready::Control,
                i if i < spares_from => Ready::Channel(i - 1),
                _ => Ready::Spare,
            })
            .collect())
    }

    /// A message of the pool's shim. `false` when its channel has ended.
    fn control(&mut self) -> bool {
        match protocol::receive::<ToZygote>(&self.control) {
            Ok(Received {
                message: ToZygote::Attach,
                mut fds,
                ..
            }) => {
                if let (Some(channel), true) = (fds.pop(), fds.is_empty())
                    && self.channels.len() < MOST_CHANNELS
                    && is_channel(&channel)
                    && ioctl_fionbio(&channel, true).is_ok()
                {
                    self.channels.push(channel);
                }
                true
            }
            Ok(_) => true,
            Err(protocol::Error::Malformed(_) | protocol::Error::TooLarge) => true,
            Err(error) => error.would_block(),
        }
    }

    /// A message of a Function's shim. `false` when the channel is to be dropped.
    fn request(&mut self, py: Python<'_>, index: usize) -> PyResult<bool> {
        let start = Instant::now();
        let (ticket, wanted, mut fds) = match protocol::receive::<ToZygote>(&self.channels[index]) {
            Ok(Received {
                message: ToZygote::Fork { ticket, fresh },
                fds,
                ..
            }) => (ticket, Wanted::Leaf { fresh }, fds),
            Ok(Received {
                message: ToZygote::ForkZygote { ticket },
                fds,
                ..
            }) => (ticket, Wanted::Zygote, fds),
            Err(error) if error.would_block() => return Ok(true),
            Ok(_) | Err(_) => return Ok(false),
        };
        let (Some(child), true) = (fds.pop(), fds.is_empty()) else {
            return Ok(false);
        };
        if !is_channel(&child) {
            return Ok(false);
        }
        let forked = match wanted {
            Wanted::Leaf { fresh } => self.leaf(py, &child, fresh),
            Wanted::Zygote => self.zygote(py, &child).map(|()| false),
        };
        let answer = match forked {
            Ok(spare) => FromZygote::Forked {
                ticket,
                spare,
                micros: micros(start),
            },
            Err(error) => {
                stop_if_stranded(&error)?;
                FromZygote::ForkFailed {
                    ticket,
                    message: error.to_string(),
                }
            }
        };
        // A shim that does not read its answers loses its channel.
        Ok(protocol::send(&self.channels[index], &answer, &[]).is_ok())
    }

    /// Gives the control channel to a spare or a new leaf; says if it was a spare.
    fn leaf(&mut self, py: Python<'_>, channel: &OwnedFd, fresh: bool) -> Result<bool, ForkError> {
        while !fresh && let Some(spare) = self.spares.pop_front() {
            if protocol::send(&spare, &leaf::ASSIGNED, &[channel.as_fd()]).is_ok() {
                return Ok(true);
            }
        }
        match self.forker.fork(py, &self.runtime, channel)? {
            Side::Parent => Ok(false),
            Side::Child(control) => leaf::run(py, &self.runtime, control, Birth::Fork),
        }
    }

    fn zygote(&self, py: Python<'_>, channel: &OwnedFd) -> Result<(), ForkError> {
        // Whether a filter forbids it can be seen from what no namespace is wrong with.
        // SAFETY: fails, as it is given no descriptor.
        unsafe { libc::setns(-1, libc::CLONE_NEWUSER) };
        match last_errno() {
            Errno::BADF => {}
            errno => return Err(ForkError::Refused("this zygote has no children", errno)),
        }
        match self.forker.fork_zygote(py, &self.runtime, channel)? {
            Side::Parent => Ok(()),
            Side::Child(control) => descend::run(py, &self.runtime, control, self.forker.threads),
        }
    }

    fn add_spare(&mut self, py: Python<'_>) -> Result<(), ForkError> {
        let (ours, theirs) = protocol::pair()
            .map_err(|_| ForkError::Refused("make a channel (socketpair)", Errno::MFILE))?;
        match self.forker.fork(py, &self.runtime, &theirs)? {
            Side::Parent => {
                self.spares.push_back(ours);
                Ok(())
            }
            Side::Child(assignment) => leaf::run(py, &self.runtime, assignment, Birth::Spare),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy)]
enum Wanted {
    Leaf { fresh: bool },
    Zygote,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ready {
    Control,
    Channel(usize),
    Spare,
}

/// A spare says nothing: whatever can be read from it is its end.
fn alive(spare: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    !matches!(poll(&mut [PollFd::new(spare, PollFlags::IN)], Some(&now)), Ok(n) if n > 0)
}

fn is_channel(fd: &OwnedFd) -> bool {
    matches!(socket_domain(fd), Ok(AddressFamily::UNIX))
        && matches!(socket_type(fd), Ok(rustix::net::SocketType::SEQPACKET))
}

fn stop_if_stranded(error: &ForkError) -> PyResult<()> {
    match error {
        ForkError::Stranded(_) => Err(PyRuntimeError::new_err(error.to_string())),
        ForkError::Refused(..) => Ok(()),
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
