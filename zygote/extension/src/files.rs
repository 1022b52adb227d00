//! Pages of programs and libraries that leaves read.
//!
//! A fork leaves out the page tables of a file's mapping, since a process can look its pages up again in the page cache
//! (`vma_needs_copy`, mm/memory.c): one fault for every 64 KiB that a leaf runs or reads. It copies them where the mapping has
//! a page of its own. So each mapping that a leaf will look into gets one, a copy of what is there, and holds nothing else in
//! memory than what a leaf looks at: what only the imports needed would be copied for nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::confine::last_errno;
use crate::fork::tell_python;
use crate::maps;
use crate::python::Runtime;

/// Of what the kernel says of a page (`pagemap`, Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// A warm-up may take longer, and is not waited for.
const WATCHED_WITHIN: Duration = Duration::from_secs(30);
/// `MADV_POPULATE_READ` (madvise(2)), since Linux 5.14.
const POPULATE_READ: libc::c_int = 22;

/// What a child that does what leaves do looks at is there for every leaf from its beginning. It is a matter of speed only:
/// what does not succeed is left as it is.
pub fn carry_over(py: Python<'_>, runtime: &Runtime) {
    if let Err(problem) = try_carry_over(py, runtime) {
        eprintln!("sock: what a leaf reads of files is not known: {problem}");
    }
}

fn try_carry_over(py: Python<'_>, runtime: &Runtime) -> std::io::Result<()> {
    let pages = Pages::new()?;
    join(&pages)?;
    let read = watch(py, runtime)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    for mapping in maps::private().into_iter().map(|mapping| mapping.range) {
        let read: Vec<_> = read
            .iter()
            .filter(|run| mapping.start <= run.start && run.end <= mapping.end)
            .collect();
        let Some(first) = read.first() else { continue };
        let fresh = pages.are_of_file(&mapping)?;
        if fresh {
            advise(&mapping, libc::MADV_DONTNEED);
        }
        for run in &read {
            advise(run, POPULATE_READ);
        }
        if fresh {
            let (mut byte, at) = ([0], first.start as u64);
            memory.read_exact_at(&mut byte, at)?;
            // The kernel copies the page, though the mapping is not writable (`FOLL_FORCE`, mm/gup.c).
            memory.write_all_at(&byte, at)?;
        }
    }
    Ok(())
}

/// Linkers lay out a library's constants before and behind its code, in mappings of their own that are read and not run, only so
/// that nobody runs them. A fork copies mappings one by one, the least part of which is their pages: they are made one again,
/// as they were before linkers parted them.
fn join(pages: &Pages) -> std::io::Result<()> {
    let mut all = maps::private();
    all.retain(|mapping| !mapping.is_written);
    for pair in all.windows(2) {
        let constants = match (pair[0].is_run, pair[1].is_run) {
            (true, false) => &pair[1],
            (false, true) => &pair[0],
            _ => continue,
        };
        if pair[0].goes_on_in(&pair[1]) && pages.are_of_file(&constants.range)? {
            let (start, len) = (constants.range.start, constants.range.len());
            // SAFETY: what could be read can still be read.
            unsafe {
                libc::mprotect(
                    start as *mut libc::c_void,
                    len,
                    libc::PROT_READ | libc::PROT_EXEC,
                )
            };
        }
    }
    Ok(())
}

fn advise(range: &Range<usize>, advice: libc::c_int) {
    let address = range.start as *mut libc::c_void;
    // SAFETY: the range is mapped from a file and has no page of its own, so what is dropped is read again.
    unsafe { libc::madvise(address, range.len(), advice) };
}

/// What a leaf reads: a child does what leaves do, and tells.
fn watch(py: Python<'_>, runtime: &Runtime) -> std::io::Result<Vec<Range<usize>>> {
    let mut report = File::from(memfd_create(c"sock-read", MemfdFlags::CLOEXEC)?);
    runtime.flush(py);
    // SAFETY: libc's own fork; the child ends below without returning.
    match unsafe { libc::fork() } {
        0 => {
            tell_python(false);
            let done = runtime.after_fork(py).is_ok();
            runtime.rehearse(py);
            let told = done && tell(&mut report).is_ok();
            // SAFETY: ends the process, which shares what is buffered with the zygote.
            unsafe { libc::_exit(i32::from(!told)) }
        }
        pid if pid > 0 => wait(pid)?,
        _ => return Err(last_errno().into()),
    }
    let mut bytes = Vec::new();
    report.seek(SeekFrom::Start(0))?;
    report.read_to_end(&mut bytes)?;
    let numbers: Vec<usize> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| usize::from_ne_bytes(*bytes))
        .collect();
    Ok(numbers
        .as_chunks()
        .0
        .iter()
        .map(|[start, end]| *start..*end)
        .collect())
}

/// Waits for the child, and kills it when it takes too long.
fn wait(pid: libc::pid_t) -> std::io::Result<()> {
    let process = Pid::from_raw(pid).ok_or(std::io::ErrorKind::NotFound)?;
    let ended = pidfd_open(process, PidfdFlags::empty())?;
    let within = Timespec::try_from(WATCHED_WITHIN).map_err(std::io::Error::other)?;
    let in_time = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&within)) == Ok(1);
    if !in_time {
        pidfd_send_signal(&ended, Signal::KILL)?;
    }
    let mut status = 0;
    // SAFETY: writes the status of this process's own child. There is none where an import has SIGCHLD ignored.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    if in_time && status == 0 {
        return Ok(());
    }
    if in_time {
        return Err(std::io::Error::other(
            "a child that was to show it ended before",
        ));
    }
    let seconds = WATCHED_WITHIN.as_secs();
    Err(std::io::Error::other(format!(
        "the warm-up took longer than {seconds} s"
    )))
}

/// In the child: the pages of files that are in its page tables, which at the fork were empty.
fn tell(report: &mut File) -> std::io::Result<()> {
    let pages = Pages::new()?;
    let own = carry_over as *const () as usize;
    let all = maps::private();
    let own = all.iter().find(|mapping| mapping.range.contains(&own));
    let own = own.and_then(|own| own.file.as_ref());
    let run = all.iter().filter(|mapping| mapping.is_run);
    let run: BTreeSet<_> = run.filter_map(|mapping| mapping.file.as_ref()).collect();
    for mapping in &all {
        let range = &mapping.range;
        let runs = match &mapping.file {
            // The rehearsal serves no request.
            file if own.is_some() && file.as_ref() == own => vec![range.clone()],
            Some(file) if run.contains(file) => runs(&pages.of(range)?, range.start, pages.size),
            // Data, or of no file.
            _ => continue,
        };
        for run in runs {
            report.write_all(&run.start.to_ne_bytes())?;
            report.write_all(&run.end.to_ne_bytes())?;
        }
    }
    Ok(())
}

/// Ranges of pages that are present and of a file.
fn runs(pages: &[u64], start: usize, page: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, flags) in pages.iter().enumerate() {
        if flags & PRESENT == 0 || flags & OF_FILE == 0 {
            continue;
        }
        let at = start + index * page;
        match runs.last_mut() {
            Some(last) if last.end == at => last.end += page,
            _ => runs.push(at..at + page),
        }
    }
    runs
}

struct Pages {
    table: File,
    /// Of a page, in bytes.
    size: usize,
}

impl Pages {
    fn new() -> std::io::Result<Pages> {
        Ok(Pages {
            table: File::open("/proc/self/pagemap")?,
            size: rustix::param::page_size(),
        })
    }

    /// Whether no page of a range is the process's own.
    fn are_of_file(&self, range: &Range<usize>) -> std::io::Result<bool> {
        let of_file = |page: &u64| page & (PRESENT | SWAPPED) == 0 || page & OF_FILE != 0;
        Ok(self.of(range)?.iter().all(of_file))
    }

    /// A number for each page of the range.
    fn of(&self, range: &Range<usize>) -> std::io::Result<Vec<u64>> {
        let mut bytes = vec![0; range.len() / self.size * size_of::<u64>()];
        let at = range.start / self.size * size_of::<u64>();
        self.table.read_exact_at(&mut bytes, at as u64)?;
        let numbers = bytes.as_chunks().0.iter();
        Ok(numbers.map(|bytes| u64::from_ne_bytes(*bytes)).collect())
    }
}
