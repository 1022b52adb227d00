//! Huge pages under what was imported.
//!
//! A fork copies a page table entry for every 4 KiB of the zygote's memory, one for every 2 MiB where
//! that lies on a huge page. Nothing is written there any more until a leaf does, which then splits
//! what it touches.

use std::fs::read_to_string;

use crate::nursery::Nursery;

/// A huge page (x86_64, and arm64 with pages of 4 KiB), in bytes.
pub const HUGE: usize = 2 << 20;
/// `MADV_COLLAPSE` (madvise(2)), since Linux 6.1.
const COLLAPSE: libc::c_int = 25;

/// Private anonymous memory of this process, by address.
#[derive(Default)]
pub struct Memory(Vec<(usize, usize)>);

impl Memory {
    /// What there is now; nothing if that cannot be read.
    pub fn now() -> Memory {
        let maps = read_to_string("/proc/self/maps").unwrap_or_default();
        Memory(maps.lines().filter_map(anonymous).collect())
    }

    /// Pieces of a range that are not of this memory. Both are in order of their addresses.
    fn missing(&self, (from, to): (usize, usize)) -> Vec<(usize, usize)> {
        let (mut pieces, mut next) = (Vec::new(), from);
        for &(start, end) in &self.0 {
            if start < to && from < end {
                pieces.push((next, start));
                next = end;
            }
        }
        pieces.push((next, to));
        pieces.retain(|(from, to)| from < to);
        pieces
    }
}

/// Asks for huge pages under all private anonymous memory of this process but what is `fresh`, and what is of the zygote
/// that it was forked from: to put that together anew would be to copy it. What the kernel does not give stays as it is.
pub fn collapse(fresh: Nursery, shared: &Memory) {
    let own = Memory::now().0;
    for (from, to) in own.into_iter().flat_map(|range| shared.missing(range)) {
        let ends = [fresh.heap, fresh.arenas].into_iter();
        let to = ends
            .filter(|end| (from..to).contains(end))
            .min()
            .unwrap_or(to);
        let (from, to) = (from.next_multiple_of(HUGE), to / HUGE * HUGE);
        if from < to {
            // SAFETY: collapsing changes where memory lies, not what it holds; the range was read from
            // this process's own map, and no other thread is there to change it.
            unsafe { libc::madvise(from as *mut libc::c_void, to - from, COLLAPSE) };
        }
    }
}

/// The range of a line of `/proc/self/maps` (proc_pid_maps(5)), if it is writable, private and of no file.
fn anonymous(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (range, access, _offset, _device, inode) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    if access != "rw-p"
        || inode != "0"
        || fields.next().is_some_and(|name| name.starts_with("[stack"))
    {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    Some((
        usize::from_str_radix(from, 16).ok()?,
        usize::from_str_radix(to, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::{Memory, anonymous};

    #[test]
    fn what_is_shared_is_left_out() {
        let shared = Memory(vec![(10, 20), (30, 40)]);
        for (range, own) in [
            ((0, 5), vec![(0, 5)]),
            ((0, 50), vec![(0, 10), (20, 30), (40, 50)]),
            ((10, 20), vec![]),
            ((12, 35), vec![(20, 30)]),
            ((20, 30), vec![(20, 30)]),
            ((38, 60), vec![(40, 60)]),
        ] {
            assert_eq!(shared.missing(range), own, "{range:?}");
        }
    }

    #[test]
    fn only_private_anonymous_memory_counts() {
        assert_eq!(
            anonymous("7f00-8f00 rw-p 00000000 00:00 0 "),
            Some((0x7f00, 0x8f00))
        );
        assert_eq!(
            anonymous("7f00-8f00 rw-p 00000000 00:00 0 [heap]"),
            Some((0x7f00, 0x8f00))
        );
        assert_eq!(anonymous("7f00-8f00 rw-p 00000000 00:00 0 [stack]"), None);
        assert_eq!(anonymous("7f00-8f00 r-xp 00000000 00:00 0 "), None);
        assert_eq!(
            anonymous("7f00-8f00 rw-p 00001000 fe:00 77 /usr/lib/libc.so.6"),
            None
        );
        assert_eq!(anonymous("nonsense"), None);
    }
}
