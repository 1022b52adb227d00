//! The Python extension `sock_zygote`: a zygote's event loop, a leaf's confinement, and its HTTP loop.
//!
//! It is loaded by the entry points in `zygote/python`, on whatever Python an image brings (stable
//! ABI, 3.10 or newer), and works in one thread: it forks.

mod arenas;
mod confine;
mod descend;
mod files;
mod filter;
mod fork;
mod http;
mod immortal;
mod leaf;
mod maps;
mod nursery;
mod pages;
mod python;
mod stream;
mod zygote;

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use rustix::io::{FdFlags, fcntl_setfd};

/// Becomes a zygote that is spoken to on descriptor `fd`. Returns when the channel is closed, in the
/// zygote; leaves exit by themselves.
#[pyfunction]
fn run_zygote(py: Python<'_>, fd: RawFd) -> PyResult<()> {
    let runtime = python::Runtime::load(py)?;
    zygote::live(py, runtime, adopt(fd)?, zygote::Descent::Root)
}

/// Becomes a leaf without a fork (a plain interpreter), spoken to on descriptor `fd`. Does not return.
#[pyfunction]
fn run_leaf(py: Python<'_>, fd: RawFd) -> PyResult<()> {
    let runtime = python::Runtime::load(py)?;
    leaf::run(py, &runtime, adopt(fd)?, leaf::Birth::Interpreter)
}

/// Takes over a descriptor that the parent process has handed down.
fn adopt(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!(
            "the control descriptor is {fd}"
        )));
    }
    // SAFETY: the number comes from SOCK_CONTROL_FD and belongs to nobody else in this process; one
    // that is not open is found by the next call.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl_setfd(&fd, FdFlags::CLOEXEC) {
        Ok(()) => Ok(fd),
        Err(errno) => {
            // A number that is not open must not be closed by the owner's drop.
            std::mem::forget(fd);
            Err(PyOSError::new_err(format!(
                "the control descriptor: {errno}"
            )))
        }
    }
}

#[pymodule]
fn sock_zygote(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(run_zygote, module)?)?;
    module.add_function(wrap_pyfunction!(run_leaf, module)?)
}
