//! Counts how often a text occurs in the memory of a process: `sock-e2e-memory PID`, the text on standard input.
//!
//! Prints the count and how many bytes were read, so that a reader sees that there was something to read.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail};

const CHUNK: usize = 1 << 20;

fn main() -> Result<()> {
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
