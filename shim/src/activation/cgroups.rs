//! Cgroups of leaves: what makes one leaf stop, go on, and end, whatever processes it has started.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use sock_sandbox::cgroup::{Cgroup, Expendable};
use sock_sandbox::{Error, Result};

use super::end::Shortage;

/// Makes cgroups for leaves.
pub trait LeafCgroups {
    /// One below the container's with nothing in it. `name` is unique in the pod.
    ///
    /// # Errors
    /// The kernel refuses.
    fn make(&self, name: &str) -> Result<Rc<dyn LeafCgroup>>;
}

/// The cgroup of one leaf.
pub trait LeafCgroup {
    /// A `cgroup.procs` of every hierarchy, open for writing: whoever writes `0` to all has joined.
    ///
    /// # Errors
    /// A file cannot be opened.
    fn entrances(&self) -> Result<Vec<OwnedFd>>;
    /// The directory whose `cgroup.procs` lists the members.
    fn directory(&self) -> Option<PathBuf>;
    /// Stops its processes, and lets the kernel have their memory before that of others.
    ///
    /// # Errors
    /// The kernel refuses.
    fn freeze(&self) -> Result<()>;
    /// Lets them go on.
    ///
    /// # Errors
    /// The kernel refuses.
    fn thaw(&self) -> Result<()>;
    /// Sends SIGKILL to every process, frozen or not.
    ///
    /// # Errors
    /// They cannot be listed.
    fn kill(&self) -> Result<()>;
    /// Whether no process is left.
    ///
    /// # Errors
    /// They cannot be listed.
    fn is_empty(&self) -> Result<bool>;
    /// Of what memory there was too little, if the kernel has killed a process of this leaf for that.
    fn shortage(&self) -> Option<Shortage>;
    /// Removes it, or keeps it for the next leaf; `EBUSY` while a process is left.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove(&self) -> Result<()>;
}

/// How many cgroups wait for another leaf when theirs has ended.
const KEPT: usize = 1;

/// Cgroups below a container's. To make one costs more than a fork of a small process, so the last one is kept when
/// its leaf has ended (SOCK, ATC '18, section 4.1); it goes with the container's.
#[derive(Debug)]
pub struct BelowContainer {
    container: Cgroup,
    kept: Kept,
}

type Kept = Rc<RefCell<Vec<Rc<Place>>>>;

/// A cgroup that leaves live in, one after the other.
#[derive(Debug)]
struct Place {
    cgroup: Cgroup,
    name: String,
    entrances: Vec<OwnedFd>,
    /// Processes killed for want of memory until the last look, leaves before this one's included.
    killed: Cell<u64>,
}

struct Below {
    place: Rc<Place>,
    kept: Kept,
    container: Cgroup,
    /// While it is frozen, what the kernel kills first.
    expendable: RefCell<Expendable>,
}

impl BelowContainer {
    /// Below the cgroup of a container that is delegated to.
    #[must_use]
    pub fn new(container: Cgroup) -> BelowContainer {
        BelowContainer {
            container,
            kept: Kept::default(),
        }
    }
}

impl LeafCgroups for BelowContainer {
    fn make(&self, name: &str) -> Result<Rc<dyn LeafCgroup>> {
        let kept = self.kept.borrow_mut().pop();
        // Others than the shim remove cgroups too: a leaf would not get into one that is gone.
        let (kept, stale): (Option<_>, Option<_>) = match kept {
            Some(place) if place.cgroup.are_current(&place.entrances) => (Some(place), None),
            stale => (None, stale),
        };
        if let Some(place) = stale {
            let removed = place.cgroup.remove_leaf(&place.name);
            tracing::warn!(
                place = place.name,
                ?removed,
                "a cgroup of leaves is gone in part, and made anew"
            );
        }
        let place = match kept {
            Some(place) => place,
            None => {
                let cgroup = self.container.leaf(name)?;
                Rc::new(Place {
                    entrances: cgroup.entrances()?,
                    name: name.to_owned(),
                    killed: Cell::new(0),
                    cgroup,
                })
            }
        };
        Ok(Rc::new(Below {
            place,
            kept: Rc::clone(&self.kept),
            container: self.container.clone(),
            expendable: RefCell::default(),
        }))
    }
}

impl LeafCgroup for Below {
    fn entrances(&self) -> Result<Vec<OwnedFd>> {
        let copies = self.place.entrances.iter().map(OwnedFd::try_clone);
        copies
            .collect::<std::io::Result<_>>()
            // Out of descriptors, then; opening anew says so with the path.
            .or_else(|_| self.place.cgroup.entrances())
    }

    fn directory(&self) -> Option<PathBuf> {
        self.place.cgroup.controller("memory").map(PathBuf::from)
    }

    fn freeze(&self) -> Result<()> {
        self.place.cgroup.suspend()?;
        // A leaf that does nothing is only worth the time that its fork takes.
        match Expendable::make(&self.place.cgroup) {
            Ok(expendable) => *self.expendable.borrow_mut() = expendable,
            Err(error) => {
                tracing::warn!(%error, "a leaf that nobody needs is not the first to be killed for want of memory");
            }
        }
        Ok(())
    }

    fn thaw(&self) -> Result<()> {
        let expendable = self.expendable.take();
        // It may have been a process that the leaf works with, and the leaf be left without.
        if !expendable.is_empty() && self.place.cgroup.oom_kills() > self.place.killed.get() {
            return Err(Error::Child(
                "the kernel has taken a process of it for want of memory".into(),
            ));
        }
        if let Err(error) = expendable.end() {
            tracing::warn!(%error, "a leaf that is needed is still the first to be killed for want of memory");
        }
        self.place.cgroup.resume()
    }

    fn kill(&self) -> Result<()> {
        self.place.cgroup.kill()
    }

    fn is_empty(&self) -> Result<bool> {
        self.place
            .cgroup
            .processes()
            .map(|processes| processes.is_empty())
    }

    fn shortage(&self) -> Option<Shortage> {
        let killed = self.place.cgroup.oom_kills();
        (killed > self.place.killed.replace(killed)).then(|| Shortage::in_cgroup(&self.container))
    }

    fn remove(&self) -> Result<()> {
        if self.kept.borrow().len() < KEPT && self.is_empty()? && self.thaw().is_ok() {
            self.kept.borrow_mut().push(Rc::clone(&self.place));
            return Ok(());
        }
        self.place.cgroup.remove_leaf(&self.place.name)
    }
}
