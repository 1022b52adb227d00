//! Huge pages under what was imported.
//!
//! A fork copies a page table entry for every 4 KiB of the zygote's memory, one for every 2 MiB where
//! that lies on a huge page. Nothing is written there any more until a leaf does, which then splits
//! what it touches.

use std::ops::Range;

use crate::maps::{self, Mapping};
use crate::nursery::Nursery;

/// A huge page (x86_64, and arm64 with pages of 4 KiB), in bytes.
pub const HUGE: usize = 2 << 20;
/// `MADV_COLLAPSE` (madvise(2)), since Linux 6.1.
const COLLAPSE: libc::c_int = 25;

/// Private anonymous memory of this process, by address.
#[derive(Default)]
pub struct Memory(Vec<Range<usize>>);

impl Memory {
    /// What there is now; nothing if that cannot be read.
    pub fn now() -> Memory {
        let own = maps::private().into_iter().filter(Mapping::is_anonymous);
        Memory(own.map(|own| own.range).collect())
    }
}

/// Asks for huge pages under all private anonymous memory of this process but what is `fresh`, and what is of the zygote
/// that it was forked from: to put that together anew would be to copy it. What the kernel does not give stays as it is.
pub fn collapse(fresh: Nursery, shared: &Memory) {
    let own = Memory::now().0;
    for Range {
        start: from,
        end: to,
    } in own.iter().flat_map(|range| maps::without(range, &shared.0))
    {
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
