//! Fresh memory for what is allocated from now on.
//!
//! After the imports, memory that was used and given back lies in holes between all that stays. What a leaf
//! allocates would go there: each hole is another page that the kernel has to copy. The zygote itself
//! allocates a little for every fork, and a single byte that it writes breaks a huge page into 512 entries that
//! each later fork copies. So the holes are filled, and both begin on pages where nothing lies yet.

use std::ffi::c_void;
use std::ops::Range;

use pyo3::ffi;
use pyo3::prelude::*;

/// More than this is not given up to fill holes of one size.
const MOST: usize = 64 << 20;
/// Largest object that CPython's own allocator takes, and the step of its sizes (Objects/obmalloc.c).
const SMALL: usize = 512;
/// Step of sizes of both allocators.
const STEP: usize = 16;

/// Where fresh memory begins; what lies below is not written to any more, or rarely.
#[derive(Clone, Copy, Default)]
pub struct Nursery {
    /// Of the C library's heap.
    pub heap: usize,
    /// Of Python's arenas.
    pub arenas: usize,
}

/// Fills the holes. To be called when everything is imported and what can be collected is.
pub fn begin(_: Python<'_>) -> Nursery {
    let arenas = crate::arenas::fresh();
    if !arenas.is_empty() {
        for size in (STEP..=SMALL).rev().step_by(STEP) {
            // SAFETY: the GIL is held; see `fill`.
            unsafe { fill(size, &arenas, ffi::PyObject_Malloc, ffi::PyObject_Free) };
        }
    }
    Nursery {
        heap: fresh_heap(),
        arenas: arenas.start,
    }
}

/// Fills the holes of the C library's heap; yields where that ends.
#[cfg(target_env = "gnu")]
fn fresh_heap() -> usize {
    /// Largest size of which glibc keeps a list for each thread (its tcache), in bytes.
    const LISTED: usize = 1032;
    /// glibc takes larger pieces from the kernel one by one (`M_MMAP_THRESHOLD`).
    const LARGE: usize = 120 << 10;
    /// What it asks of the kernel ahead, so that a leaf rarely does.
    const AHEAD: libc::c_int = 1 << 20;
    // SAFETY: takes no memory when it grows by nothing, and changes a setting of the allocator.
    let heap = unsafe {
        libc::mallopt(libc::M_TOP_PAD, AHEAD);
        libc::sbrk(0) as usize
    };
    let fresh = heap..usize::MAX;
    let halves = std::iter::successors(Some(LARGE), |size| Some(size / 2));
    let halves = halves.take_while(|size| *size > LISTED);
    for size in halves.chain((24..=LISTED).rev().step_by(STEP)) {
        // SAFETY: the two belong together and may be called anywhere.
        unsafe { fill(size, &fresh, libc::malloc, libc::free) };
    }
    heap
}

/// musl lays its memory out by itself, in groups of equal pieces.
#[cfg(not(target_env = "gnu"))]
fn fresh_heap() -> usize {
    0
}

/// Allocates pieces of one size until one lies where memory is fresh.
///
/// # Safety
/// `allocate` and `free` belong together and may be called here.
unsafe fn fill(
    size: usize,
    fresh: &Range<usize>,
    allocate: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
) {
    for _ in 0..MOST / size {
        // SAFETY: by the caller.
        let piece = unsafe { allocate(size) };
        if fresh.contains(&(piece as usize)) {
            // SAFETY: it was just allocated.
            unsafe { free(piece) };
            return;
        }
        if piece.is_null() {
            return;
        }
    }
}
