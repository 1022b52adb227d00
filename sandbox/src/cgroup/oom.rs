//! Whether the kernel has killed for want of memory, also where the cgroup that counts it is gone before anybody has looked:
//! systemd removes a scope as soon as its last process has ended.

use std::cell::Cell;
use std::fs;
use std::os::fd::AsRawFd;

use rustix::event::{EventfdFlags, eventfd};

use super::Cgroup;
use crate::Result;
use crate::error::Step;

/// Follows one cgroup from its beginning.
#[derive(Debug)]
pub struct OomWatch {
    cgroup: Cgroup,
    source: Source,
}

/// What is still there when the cgroup is not.
#[derive(Debug)]
enum Source {
    /// Version 1: counts up when the cgroup, or one above it, has no memory left, and once more when the cgroup has gone
    /// (`mem_cgroup_oom_notify`, `memcg1_css_offline`, mm/memcontrol-v1.c).
    Notified {
        counter: std::os::fd::OwnedFd,
        seen: Cell<u64>,
    },
    /// Version 2: the cgroup above counts what happens below it. The number is that at the beginning.
    Above(u64),
}

impl OomWatch {
    /// Begins to follow a cgroup.
    ///
    /// # Errors
    /// On version 1 the kernel does not notify.
    pub fn new(cgroup: &Cgroup) -> Result<OomWatch> {
        let source = if cgroup.unified {
            Source::Above(above(cgroup).unwrap_or(0))
        } else {
            let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .step("make", "a counter of out-of-memory events")?;
            let directory = cgroup
                .controller("memory")
                .unwrap_or(std::path::Path::new(""));
            let watched = directory.join("memory.oom_control");
            let watched = fs::File::open(&watched).at("open", &watched)?;
            // cgroups-v1/memory.rst, section 10.
            let line = format!("{} {}", counter.as_raw_fd(), watched.as_raw_fd());
            super::write(&directory.join("cgroup.event_control"), &line)?;
            Source::Notified {
                counter,
                seen: Cell::new(0),
            }
        };
        Ok(OomWatch {
            cgroup: cgroup.clone(),
            source,
        })
    }

    /// Whether a process of the cgroup was killed for want of memory, by the cgroup's own count. `None` when that is gone.
    #[must_use]
    pub fn counted(&self) -> Option<bool> {
        self.cgroup.counted_oom_kills().map(|kills| kills > 0)
    }

    /// The same for the last process, of which it is known that it was killed, and not by whom. When the count is gone it goes by
    /// what is known of the cgroups above, where others may have been killed. `None` while that cannot be told: what is left of
    /// the cgroup may yet speak, within milliseconds.
    #[must_use]
    pub fn killed(&self) -> Option<bool> {
        if let Some(counted) = self.counted() {
            return Some(counted);
        }
        match &self.source {
            Source::Notified { counter, seen } => {
                let mut count = [0; 8];
                if rustix::io::read(counter, &mut count).is_ok() {
                    seen.set(seen.get() + u64::from_ne_bytes(count));
                }
                // One was that it has gone.
                (seen.get() > 1).then_some(true)
            }
            Source::Above(before) => Some(above(&self.cgroup).is_some_and(|now| now > *before)),
        }
    }
}

fn above(cgroup: &Cgroup) -> Option<u64> {
    let directory = cgroup.controller("memory")?.parent()?;
    super::oom_kills_in(&directory.join("memory.events"))
}
