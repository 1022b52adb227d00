//! Where the shim itself is accounted: in its pod.
//!
//! What the shim costs (its memory, the sockets it makes for leaves) belongs to the pod that causes it.

use std::cell::RefCell;

use sock_sandbox::cgroup::{Cgroup, Hierarchies};

thread_local! {
    static BEFORE: RefCell<Option<Cgroup>> = const { RefCell::new(None) };
}

fn own() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// Moves the shim into the pod's cgroup.
pub fn enter(hierarchies: &Hierarchies, pod: &Cgroup) {
    let before = Cgroup::of_process(hierarchies, own());
    match before.and_then(|before| pod.add(own()).map(|()| before)) {
        Ok(before) => BEFORE.set(Some(before)),
        Err(e) => tracing::warn!(error = %e, "the shim is not accounted to its pod"),
    }
}

/// Moves it back to where containerd started it, so that the pod's cgroup can go.
pub fn leave() {
    if let Some(before) = BEFORE.take()
        && let Err(e) = before.add(own())
    {
        tracing::warn!(error = %e, "the shim stays in its pod's cgroup");
    }
}

/// Moves a process to where the shim was started, because it has to outlive the pod.
pub fn keep_out(pid: i32) {
    BEFORE.with_borrow(|before| {
        if let Some(before) = before
            && let Err(e) = before.add(pid)
        {
            tracing::warn!(pid, error = %e, "stays in the pod's cgroup, and ends with it");
        }
    });
}
