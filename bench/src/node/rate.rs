//! Requests as fast as they are answered, and forks as fast as the kernel makes them: how many each second.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::memory::{Pod, number};
use super::processes::{Process, all};
use crate::http::{Connection, Request};

/// Clients that each send one request after the other, on new connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rate {
    /// Of a pod.
    pub address: SocketAddr,
    /// What is asked.
    pub request: Request,
    /// How many at once.
    pub clients: usize,
    /// For how long.
    pub seconds: usize,
}

/// Processes that each fork and wait for the child, one after the other.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Forks {
    /// Pod whose largest interpreter each of them is like.
    pub like: Pod,
    /// How many at once.
    pub processes: usize,
    /// For how long.
    pub seconds: usize,
}

/// One of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Loop {
    /// Process whose memory it has the like of.
    like: i32,
    seconds: usize,
}

/// Answers in each second.
///
/// # Errors
/// If one of them is wrong.
pub fn run(rate: &Rate) -> Result<Vec<u64>> {
    repeated(rate.clients, rate.seconds, |number| {
        let request = rate.request.number(number);
        let answer = Connection::open(rate.address)?.ask(&request)?;
        request.check(&answer)
    })
}

/// How often `once` was done in each second, by so many clients at once. It is given a number that nobody else has.
///
/// # Errors
/// Of the first that fails.
pub fn repeated(
    clients: usize,
    seconds: usize,
    once: impl Fn(usize) -> Result<()> + Sync,
) -> Result<Vec<u64>> {
    let (begin, once) = (Instant::now(), &once);
    let client = move |client: usize| -> Result<Vec<u64>> {
        let mut counts = vec![0; seconds];
        for number in (client..).step_by(clients) {
            once(number)?;
            match second(begin, seconds) {
                Some(second) => counts[second] += 1,
                None => break,
            }
        }
        Ok(counts)
    };
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|number| scope.spawn(move || client(number)))
            .collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(counts) => counts,
            Err(_) => bail!("a client panicked"),
        });
        joined.collect::<Result<Vec<_>>>()
    })?;
    Ok(sum(&counts, seconds))
}

/// Forks in each second, of all processes together.
///
/// # Errors
/// If there is no such interpreter, or a process cannot be started.
pub fn forks(asked: &Forks) -> Result<Vec<u64>> {
    let resident = |process: &Process| {
        let rollup = std::fs::read_to_string(process.directory.join("smaps_rollup"));
        number(&rollup.unwrap_or_default(), "Rss:").unwrap_or(0)
    };
    let like = all()?
        .into_iter()
        .filter(|one| {
            one.name.starts_with("python") && one.cgroup_of_pod(&asked.like.uid).is_some()
        })
        .max_by_key(resident)
        .with_context(|| format!("no interpreter in pod {}", asked.like.uid))?
        .pid;
    let asked_of_each = Loop {
        like,
        seconds: asked.seconds,
    };
    let children = (0..asked.processes).map(|_| {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["node", "fork-loop"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        serde_json::to_writer(
            child.stdin.take().context("standard input")?,
            &asked_of_each,
        )?;
        Ok(child)
    });
    let children: Vec<_> = children.collect::<Result<_>>()?;
    let mut counts = Vec::new();
    for child in children {
        let done = child.wait_with_output()?;
        ensure!(
            done.status.success(),
            "a process that forks: {}",
            done.status
        );
        counts.push(serde_json::from_slice(&done.stdout)?);
    }
    Ok(sum(&counts, asked.seconds))
}

/// Forks in each second, of this process.
///
/// # Errors
/// If the other process cannot be looked at, or memory or processes run out.
pub fn fork_loop(asked: &Loop) -> Result<Vec<u64>> {
    let smaps = format!("/proc/{}/smaps", asked.like);
    let smaps = std::fs::read_to_string(&smaps).with_context(|| smaps.clone())?;
    let file = std::fs::File::open(std::env::current_exe()?)?;
    for mapping in mappings(&smaps) {
        imitate(&mapping, &file)?;
    }
    let mut counts = vec![0; asked.seconds];
    let begin = Instant::now();
    while let Some(second) = second(begin, asked.seconds) {
        // SAFETY: this process has one thread, and the child does nothing but end.
        match unsafe { libc::fork() } {
            -1 => bail!("fork: {}", std::io::Error::last_os_error()),
            // SAFETY: ends the child without running what the parent has registered.
            0 => unsafe { libc::_exit(0) },
            child => {
                // SAFETY: the child is this process's own, and its status is not asked for.
                let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                ensure!(
                    waited == child,
                    "waitpid: {}",
                    std::io::Error::last_os_error()
                );
            }
        }
        counts[second] += 1;
    }
    Ok(counts)
}

/// What a fork has to copy of a mapping.
#[derive(Debug, Default, Eq, PartialEq)]
struct Mapping {
    /// In bytes.
    size: usize,
    /// Of that, what no file stands for.
    anonymous: usize,
    /// Of that, what lies on huge pages.
    huge: usize,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), value) = (words.next(), words.next()) else {
            continue;
        };
        let bytes = || {
            value
                .and_then(|value| value.parse::<usize>().ok())
                .unwrap_or(0)
                * 1024
        };
        match (name, all.last_mut()) {
            ("Size:", _) => all.push(Mapping {
                size: bytes(),
                ..Mapping::default()
            }),
            ("Anonymous:", Some(last)) => last.anonymous = bytes(),
            ("AnonHugePages:", Some(last)) => last.huge = bytes(),
            _ => {}
        }
    }
    all
}

/// A mapping that costs a fork as much.
fn imitate(mapping: &Mapping, file: &std::fs::File) -> Result<()> {
    use std::os::fd::AsRawFd as _;

    const HUGE: usize = 2 << 20;
    // Since Linux 6.1; a zygote on an older one has no huge pages to be like.
    const MADV_COLLAPSE: i32 = 25;
    const PAGE: usize = 4096;
    let (flags, descriptor, protection) = match mapping.anonymous {
        // Pages of a file are not copied by a fork; the mapping itself is.
        0 => (libc::MAP_PRIVATE, file.as_raw_fd(), libc::PROT_READ),
        _ => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            libc::PROT_READ | libc::PROT_WRITE,
        ),
    };
    // SAFETY: a new mapping where the kernel finds room, which nothing refers to.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            mapping.size + HUGE,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    ensure!(
        start != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    // Huge pages begin where the address is a multiple of their size.
    let start = start.cast::<u8>();
    let start = start.wrapping_add(start.align_offset(HUGE));
    // SAFETY: lies within the mapping above, in whose place it comes.
    let start = unsafe {
        libc::mmap(
            start.cast(),
            mapping.size,
            protection,
            flags | libc::MAP_FIXED,
            descriptor,
            0,
        )
    };
    ensure!(
        start != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    let advise = |from: usize, length: usize, advice| {
        // SAFETY: lies within the mapping; the advice changes no content.
        unsafe { libc::madvise(start.byte_add(from), length, advice) }
    };
    if mapping.anonymous > 0 {
        advise(0, mapping.size, libc::MADV_NOHUGEPAGE);
        for at in (0..mapping.anonymous.min(mapping.size)).step_by(PAGE) {
            // SAFETY: lies within the mapping, which may be written to.
            unsafe { start.byte_add(at).cast::<u8>().write_volatile(1) };
        }
        // As the zygote does it, whatever the node does by itself.
        let huge = mapping.huge / HUGE * HUGE;
        if huge > 0 {
            advise(0, huge, libc::MADV_HUGEPAGE);
            let collapsed = advise(0, huge, MADV_COLLAPSE);
            ensure!(
                collapsed == 0,
                "MADV_COLLAPSE: {}",
                std::io::Error::last_os_error()
            );
        }
    }
    Ok(())
}

/// Which second it is, while there is one.
fn second(begin: Instant, seconds: usize) -> Option<usize> {
    let second = usize::try_from(begin.elapsed().as_secs()).ok()?;
    (second < seconds).then_some(second)
}

fn sum(counts: &[Vec<u64>], seconds: usize) -> Vec<u64> {
    (0..seconds)
        .map(|second| counts.iter().map(|counts| counts[second]).sum())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_known_by_what_a_fork_copies() {
        let smaps = "7f00-7f40 rw-p 00000000 00:00 0 \nSize: 4096 kB\nRss: 4096 kB\nAnonymous: 3072 kB\nAnonHugePages: 2048 kB\nVmFlags: rd wr\n\
                     8000-8001 r--p 00000000 08:01 5 /lib/x.so\nSize: 4 kB\nAnonymous: 0 kB\nAnonHugePages: 0 kB\n";
        let mib = 1 << 20;
        assert_eq!(
            mappings(smaps),
            [
                Mapping {
                    size: 4 * mib,
                    anonymous: 3 * mib,
                    huge: 2 * mib
                },
                Mapping {
                    size: 4096,
                    anonymous: 0,
                    huge: 0
                },
            ]
        );
    }

    #[test]
    fn forks_of_a_process_that_is_like_this_one_are_counted_by_the_second() {
        let of_self = || {
            let all = mappings(&std::fs::read_to_string("/proc/self/smaps").unwrap());
            let anonymous: usize = all.iter().map(|one| one.anonymous).sum();
            (all.len(), anonymous)
        };
        let like = i32::try_from(std::process::id()).unwrap();
        let before = of_self();
        let counts = fork_loop(&Loop { like, seconds: 1 }).unwrap();
        assert!(counts.len() == 1 && counts[0] > 10, "{counts:?}");
        let after = of_self();
        assert!(
            after.0 > before.0 && after.1 >= before.1 + before.1 / 2,
            "{before:?} {after:?}"
        );
        assert_eq!(sum(&[vec![1, 2], vec![3, 4]], 2), [4, 6]);
    }
}
