//! Where the shim itself is accounted: in its pod.
//!
//! What the shim costs (its memory, the sockets it makes for leaves) belongs to the pod that causes it.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

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
    match before.and_then(|before| pod.enter().map(|()| before)) {
        Ok(before) => BEFORE.set(Some(before)),
        Err(e) => tracing::warn!(error = %e, "the shim is not accounted to its pod"),
    }
}

/// Moves it back to where containerd started it, so that the pod's cgroup can go.
pub fn leave() {
    if let Some(before) = BEFORE.take()
        && let Err(e) = before.enter()
    {
        tracing::warn!(error = %e, "the shim stays in its pod's cgroup");
    }
}

/// The entrances of where the shim was started, for a process that has to outlive the pod.
pub fn outside() -> Vec<OwnedFd> {
    let entrances = BEFORE.with_borrow(|before| before.as_ref().map(Cgroup::entrances));
    entrances
        .transpose()
        .unwrap_or_else(|error| {
            tracing::warn!(%error, "a holder stays in the pod's cgroup, and ends with it");
            None
        })
        .unwrap_or_default()
}
