//! Objects that nobody counts references to.
//!
//! A leaf that only looks at an object of the zygote writes to it all the same: it counts its reference, and
//! the kernel copies the page. Since Python 3.12 there are objects whose references are not counted (PEP 683).
//! Whatever lives when a zygote is warm lives as long as any of its leaves, so all of it becomes such.

use std::collections::HashSet;
use std::ffi::{c_int, c_void};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyList;

/// `sys.hexversion` of the first Python with such objects.
const FIRST: u32 = 0x030c_0000;

/// The low half of `ob_refcnt` of an object that is not counted (`_Py_IMMORTAL_REFCNT`, Include/object.h; since
/// 3.14 `_Py_IMMORTAL_INITIAL_REFCNT`, Include/refcount.h). `Py_INCREF` leaves alone this very number up to 3.13, and
/// from there on all that are not below it.
const fn uncounted(version: u32) -> u32 {
    if version < 0x030e_0000 {
        u32::MAX
    } else {
        3 << 30
    }
}

/// Stops the counting for everything that the collector knows and all that is reachable from there. Yields how
/// many objects these are; 0 where this Python counts all.
///
/// # Errors
/// Python has no memory for the list of objects.
pub fn immortalize(py: Python<'_>) -> PyResult<usize> {
    let version: u32 = py.import("sys")?.getattr("hexversion")?.extract()?;
    // In other layouts of an object (free-threaded, 32 bits) this extension does not load.
    if version < FIRST {
        return Ok(0);
    }
    let known = py.import("gc")?.call_method0("get_objects")?;
    let known = known.cast::<PyList>()?;
    let code = py.import("types")?.getattr("CodeType")?;
    let mut walk = Walk {
        seen: HashSet::with_capacity(known.len() * 4),
        next: Vec::new(),
    };
    // The list itself is thrown away.
    walk.seen.insert(known.as_ptr() as usize);
    for object in known.iter() {
        walk.meet(object.as_ptr());
    }
    while let Some(object) = walk.next.pop() {
        // SAFETY: reached from an object that lives, so it lives; the GIL is held, and nothing below runs
        // code of packages that could end it.
        unsafe { walk.visit(py, object, code.as_ptr()) }?;
    }
    let count = walk.seen.len() - 1;
    for object in walk.seen {
        if object != known.as_ptr() as usize {
            let count = object as *mut u32;
            // SAFETY: an object that lives; its first four bytes are the low half of the count (little
            // endian), of which no part of this program keeps a copy.
            unsafe {
                // One of the zygote that this one was forked from lies on a page that is shared.
                if count.read() != uncounted(version) {
                    count.write(uncounted(version));
                }
            }
        }
    }
    Ok(count)
}

struct Walk {
    seen: HashSet<usize>,
    next: Vec<*mut ffi::PyObject>,
}

impl Walk {
    fn meet(&mut self, object: *mut ffi::PyObject) {
        if self.seen.insert(object as usize) {
            self.next.push(object);
        }
    }

    /// # Safety
    /// `object` lives.
    unsafe fn visit(
        &mut self,
        py: Python<'_>,
        object: *mut ffi::PyObject,
        code: *mut ffi::PyObject,
    ) -> PyResult<()> {
        // SAFETY: by the caller.
        let kind = unsafe { ffi::Py_TYPE(object) };
        self.meet(kind.cast());
        if kind.cast() == code {
            // The collector does not look into code, as it can be part of no cycle; its constants are
            // what running it counts most.
            // SAFETY: by the caller.
            let code = unsafe { Bound::from_borrowed_ptr(py, object) };
            for name in ["co_consts", "co_names"] {
                let list = code.getattr(name)?;
                self.meet(list.as_ptr());
            }
            return Ok(());
        }
        // SAFETY: likewise. The type of any object has no slots but functions of these signatures.
        let (traverse, is_collected) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Option<ffi::traverseproc>>(ffi::PyType_GetSlot(
                    kind,
                    ffi::Py_tp_traverse,
                )),
                std::mem::transmute::<*mut c_void, Option<ffi::inquiry>>(ffi::PyType_GetSlot(
                    kind,
                    ffi::Py_tp_is_gc,
                )),
            )
        };
        // Of some types (that of types is one) only some objects may be traversed.
        // SAFETY: likewise.
        if is_collected.is_some_and(|is_collected| unsafe { is_collected(object) } == 0) {
            return Ok(());
        }
        if let Some(traverse) = traverse {
            // SAFETY: traversing calls `each` for what the object refers to, and does nothing else.
            unsafe { traverse(object, each, std::ptr::from_mut(self).cast()) };
        }
        Ok(())
    }
}

unsafe extern "C" fn each(object: *mut ffi::PyObject, walk: *mut c_void) -> c_int {
    // SAFETY: `visit` passes a `Walk` that nobody else uses meanwhile.
    unsafe { &mut *walk.cast::<Walk>() }.meet(object);
    0
}
