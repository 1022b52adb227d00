//! Counts how often a text occurs in the memory of a process: `sock-e2e-memory PID`, the text on standard input.
//! Prints the count and how many bytes were read, so that a reader sees that there was something to read.
//!
//! `sock-e2e-memory frames PID PID` counts the frames of anonymous memory that two processes share.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail};

const CHUNK: usize = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, one, other] = &arguments[..]
        && word == "frames"
    {
        let (one, other) = (frames(one)?, frames(other)?);
        if one.is_empty() || other.is_empty() {
            bail!("a process without anonymous memory");
        }
        let flags = File::open("/proc/kpageflags")?;
        let mut shared = 0;
        for frame in one.intersection(&other) {
            shared += u64::from(number_at(&flags, *frame)? & OF_ZEROES == 0);
        }
        println!("{shared}");
        return Ok(());
    }
    let pid: u32 = std::env::args()
        .nth(1)
        .context("usage: sock-e2e-memory PID")?
        .parse()?;
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text)?;
    if text.is_empty() {
        bail!("no text on standard input");
    }
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let (mut found, mut read) = (0, 0);
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let mut words = line.split(' ');
        let (range, rights) = (words.next(), words.next());
        let bounds = range.and_then(|range| range.split_once('-'));
        let (Some((start, end)), Some(rights)) = (bounds, rights) else {
            bail!("a line of maps is {line:?}");
        };
        if rights.starts_with('r') {
            let (start, end) = (
                u64::from_str_radix(start, 16)?,
                u64::from_str_radix(end, 16)?,
            );
            let region = region(&memory, start, end);
            read += region.len();
            found += region
                .windows(text.len())
                .filter(|window| *window == text)
                .count();
        }
    }
    println!("{found} {read}");
    Ok(())
}

/// `KPF_ZERO_PAGE` (linux/kernel-page-flags.h): all processes read zeroes from one frame.
const OF_ZEROES: u64 = 1 << 24;
/// Of an entry of a pagemap: the frame, whether there is one, and whether it is a file's or shared by intention (proc_pid_pagemap(5)).
const FRAME: u64 = (1 << 55) - 1;
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;
const PAGE: u64 = 4096;

/// The frames of a process's anonymous memory.
fn frames(pid: &str) -> Result<HashSet<u64>> {
    let pages = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = HashSet::new();
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let bounds = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let (start, end) = bounds.with_context(|| format!("a line of maps is {line:?}"))?;
        let (start, end) = (
            u64::from_str_radix(start, 16)? / PAGE,
            u64::from_str_radix(end, 16)? / PAGE,
        );
        let mut entries = vec![0; usize::try_from((end - start) * 8)?];
        // Not of what lies above the addresses of programs.
        let Ok(read) = pages.read_at(&mut entries, start * 8) else {
            continue;
        };
        for entry in entries[..read].as_chunks::<8>().0 {
            let entry = u64::from_ne_bytes(*entry);
            if entry & PRESENT != 0 && entry & OF_A_FILE == 0 && entry & FRAME != 0 {
                found.insert(entry & FRAME);
            }
        }
    }
    Ok(found)
}

fn number_at(file: &File, index: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, index * 8)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What can be read of a region: pages of devices, and of files that have become shorter, cannot.
fn region(memory: &File, start: u64, end: u64) -> Vec<u8> {
    let mut content = Vec::new();
    let mut chunk = vec![0; CHUNK];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
        match memory.read_at(&mut chunk[..wanted], at) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                content.extend_from_slice(&chunk[..count]);
                at += count as u64;
            }
        }
    }
    content
}
