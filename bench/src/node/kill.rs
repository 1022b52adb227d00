//! Kills one process by SIGKILL, and says which and when.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde::{Deserialize, Serialize};

use super::now;
use super::processes::{Process, all, sandboxes};

/// A leaf that is not there at this moment may be there at the next.
const UNTIL_THERE: Duration = Duration::from_secs(5);

const STOPPED_WITHIN: Duration = Duration::from_millis(200);

const GONE_WITHIN: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Who is killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Victim {
    /// A leaf of the Function's pod with this UID, while its handler sleeps.
    Leaf(String),
    /// The zygote of the pool's pod with this UID.
    Zygote(String),
    /// The shim of the pod with this UID.
    Shim(String),
    /// The program of this name, of which there is one.
    Program(String),
}

/// Who was killed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Killed {
    /// As the node numbers it.
    pub pid: i32,
    /// Microseconds since 1970, right before the signal.
    pub at: u64,
    /// The same when it was gone. Until then its sockets are open, and on a busy node that is not at once.
    pub gone: u64,
}

/// Kills.
///
/// # Errors
/// If there is no such process.
pub fn run(victim: &Victim) -> Result<Killed> {
    let sandboxes = match victim {
        Victim::Shim(pod) => sandboxes(pod)?,
        _ => Vec::new(),
    };
    let until = Instant::now() + UNTIL_THERE;
    loop {
        let found = all()?.into_iter().find(|one| is(one, victim, &sandboxes));
        let found = found.filter(|one| !matches!(victim, Victim::Leaf(_)) || stopped_asleep(one));
        if let Some((process, pid)) = found.and_then(|one| Some((Pid::from_raw(one.pid)?, one.pid)))
        {
            let pidfd = pidfd_open(process, PidfdFlags::empty());
            let at = now();
            match kill_process(process, Signal::KILL) {
                Ok(()) => {
                    let pidfd = pidfd.with_context(|| format!("process {pid}"))?;
                    poll(
                        &mut [PollFd::new(&pidfd, PollFlags::IN)],
                        Some(&GONE_WITHIN),
                    )?;
                    let gone = now();
                    return Ok(Killed { pid, at, gone });
                }
                // It ended by itself meanwhile.
                Err(Errno::SRCH) => {}
                Err(errno) => bail!("kill {pid}: {errno}"),
            }
        }
        if Instant::now() > until {
            bail!("there is no such process: {victim:?}");
        }
    }
}

fn is(process: &Process, victim: &Victim, sandboxes: &[String]) -> bool {
    match victim {
        Victim::Leaf(pod) => process.cgroup_of_pod(pod).is_some() && process.is_interpreter(),
        // What it forks lives one PID namespace deeper.
        Victim::Zygote(pod) => {
            process.cgroup_of_pod(pod).is_some() && process.is_interpreter() && depth(process) == 2
        }
        Victim::Shim(_) => process.is_shim_of(sandboxes),
        Victim::Program(name) => process.name == *name,
    }
}

/// Stops a process that sleeps for a time, as the handler does and nothing else in a leaf; any other goes on.
///
/// Stopped, it cannot finish and answer before it is killed.
fn stopped_asleep(process: &Process) -> bool {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return false;
    };
    if !sleeps(process) || kill_process(pid, Signal::STOP).is_err() {
        return false;
    }
    let until = Instant::now() + STOPPED_WITHIN;
    while !is_stopped(process) && Instant::now() < until {
        std::thread::yield_now();
    }
    let asleep = is_stopped(process) && sleeps(process);
    if !asleep {
        // It is gone, or it is somebody else's.
        let _ = kill_process(pid, Signal::CONT);
    }
    asleep
}

/// Whether it is in clock_nanosleep(2) (proc_pid_syscall(5)).
fn sleeps(process: &Process) -> bool {
    let call = fs::read_to_string(process.directory.join("syscall")).unwrap_or_default();
    let number = call
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    number == Some(libc::SYS_clock_nanosleep)
}

/// The state follows the name in parentheses (proc_pid_stat(5)).
fn is_stopped(process: &Process) -> bool {
    let stat = fs::read_to_string(process.directory.join("stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// How many PID namespaces see it, from the node's on.
fn depth(process: &Process) -> usize {
    let status = fs::read_to_string(process.directory.join("status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("NSpid:"));
    line.map_or(0, |line| line.split_ascii_whitespace().count() - 1)
}
