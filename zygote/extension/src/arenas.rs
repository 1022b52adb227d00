//! Python's small objects, side by side.
//!
//! CPython takes memory for small objects in arenas of 1 MiB, each wherever the kernel finds room, which
//! is between the mapped libraries of the packages. There they cannot lie on huge pages, and each is a
//! mapping more that every fork copies. A zygote gives them out of one range instead.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::pages::HUGE;

/// Address space of one range. It costs nothing until it is used, and a zygote rarely needs a second.
const RANGE: usize = 1 << 30;

/// `PyObjectArenaAllocator` (Include/cpython/objimpl.h), unchanged since Python 3.4.
#[repr(C)]
#[derive(Clone, Copy)]
struct Allocator {
    context: *mut c_void,
    allocate: Option<unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void>,
    free: Option<unsafe extern "C" fn(*mut c_void, *mut c_void, usize)>,
}

type Exchange = unsafe extern "C" fn(*mut Allocator);

/// The allocator that was there before: what it has given goes back to it.
struct Before(Allocator);

// SAFETY: CPython calls allocators of objects with the GIL held, and ours is called that way only.
unsafe impl Send for Before {}
// SAFETY: likewise.
unsafe impl Sync for Before {}

static BEFORE: OnceLock<Before> = OnceLock::new();
static ARENAS: Mutex<Arenas> = Mutex::new(Arenas {
    start: 0,
    next: 0,
    usable: 0,
    end: 0,
    returned: Vec::new(),
});

/// Takes over from here on. Without effect where CPython lacks the two functions, which are no part of
/// its stable interface, and when called again.
pub fn gather() {
    let (Some(get), Some(set)) = (
        symbol(c"PyObject_GetArenaAllocator"),
        symbol(c"PyObject_SetArenaAllocator"),
    ) else {
        return;
    };
    let mut allocator = Allocator {
        context: null_mut(),
        allocate: None,
        free: None,
    };
    // SAFETY: fills the structure.
    unsafe { get(&raw mut allocator) };
    if allocator.free.is_none() || BEFORE.set(Before(allocator)).is_err() {
        return;
    }
    allocator = Allocator {
        context: null_mut(),
        allocate: Some(allocate),
        free: Some(free),
    };
    // SAFETY: copies the structure; the functions live as long as the process.
    unsafe { set(&raw mut allocator) };
}

/// From here on arenas lie where nothing has been before; yields where that is, which is nowhere if none are given out here.
pub fn fresh() -> Range<usize> {
    let mut arenas = ARENAS.lock().unwrap_or_else(PoisonError::into_inner);
    arenas.next = arenas.usable;
    arenas.returned.clear();
    arenas.next..arenas.end
}

fn symbol(name: &std::ffi::CStr) -> Option<Exchange> {
    // SAFETY: looks a name up among the symbols of the process.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() {
        return None;
    }
    // SAFETY: both functions have this signature.
    Some(unsafe { std::mem::transmute::<*mut c_void, Exchange>(found) })
}

struct Arenas {
    /// Of the range in use; earlier ranges are full.
    start: usize,
    next: usize,
    /// Up to here it may be written.
    usable: usize,
    end: usize,
    /// Address and size. Their memory has gone back to the kernel.
    returned: Vec<(usize, usize)>,
}

impl Arenas {
    /// An address, or `None` when there is no memory.
    fn allocate(&mut self, size: usize) -> Option<usize> {
        // The lowest, so that what is used stays together.
        let fits = self
            .returned
            .iter()
            .enumerate()
            .filter(|(_, r)| r.1 == size);
        if let Some((index, _)) = fits.min_by_key(|(_, r)| r.0) {
            return Some(self.returned.swap_remove(index).0);
        }
        if self.end - self.next < size {
            self.reserve(size)?;
        }
        let at = self.next;
        let needed = (at + size).next_multiple_of(HUGE);
        if needed > self.usable {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: within the range that was reserved, where nothing lies yet.
            let result =
                unsafe { libc::mprotect(self.usable as *mut c_void, needed - self.usable, access) };
            if result != 0 {
                return None;
            }
            self.usable = needed;
        }
        self.next += size;
        Some(at)
    }

    fn reserve(&mut self, size: usize) -> Option<()> {
        let length = RANGE.max(size.next_multiple_of(HUGE));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, with room to begin at a huge page.
        let at = unsafe { libc::mmap(null_mut(), length + HUGE, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        self.start = (at as usize).next_multiple_of(HUGE);
        self.next = self.start;
        self.usable = self.start;
        self.end = self.start + length;
        Some(())
    }
}

unsafe extern "C" fn allocate(_: *mut c_void, size: usize) -> *mut c_void {
    let ours = ARENAS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .allocate(size);
    if let Some(at) = ours {
        return at as *mut c_void;
    }
    // A limit of address space (RLIMIT_AS) may leave no room for a range, but for an arena.
    let before = BEFORE.get().map(|before| before.0);
    match before.and_then(|before| Some((before.context, before.allocate?))) {
        // SAFETY: the call that CPython would have made.
        Some((context, allocate)) => unsafe { allocate(context, size) },
        None => null_mut(),
    }
}

unsafe extern "C" fn free(_: *mut c_void, at: *mut c_void, size: usize) {
    let mut arenas = ARENAS.lock().unwrap_or_else(PoisonError::into_inner);
    let address = at as usize;
    if (arenas.start..arenas.end).contains(&address) {
        // SAFETY: CPython gives back what `allocate` gave it and does not touch it again.
        unsafe { libc::madvise(at, size, libc::MADV_DONTNEED) };
        arenas.returned.push((address, size));
        return;
    }
    drop(arenas);
    if let Some(Before(before)) = BEFORE.get()
        && let Some(free) = before.free
    {
        // SAFETY: it was given by that allocator, or lies in an earlier range of ours: like that one, it
        // goes back to the kernel (munmap).
        unsafe { free(before.context, at, size) };
    }
}
