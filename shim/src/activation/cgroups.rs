//! Cgroups of leaves: what makes one leaf stop, go on, and end, whatever processes it has started.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use sock_sandbox::Result;
use sock_sandbox::cgroup::Cgroup;

/// Makes cgroups for leaves.
pub trait LeafCgroups {
    /// A new one below the container's. `name` is unique in the pod.
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
    /// Stops its processes.
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
    /// Removes it; `EBUSY` while a process is left.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove(&self) -> Result<()>;
}

/// Cgroups below a container's.
#[derive(Debug, Clone)]
pub struct BelowContainer(pub Cgroup);

struct Below {
    cgroup: Cgroup,
    name: String,
}

impl LeafCgroups for BelowContainer {
    fn make(&self, name: &str) -> Result<Rc<dyn LeafCgroup>> {
        Ok(Rc::new(Below {
            cgroup: self.0.leaf(name)?,
            name: name.to_owned(),
        }))
    }
}

impl LeafCgroup for Below {
    fn entrances(&self) -> Result<Vec<OwnedFd>> {
        self.cgroup.entrances()
    }

    fn directory(&self) -> Option<PathBuf> {
        self.cgroup.controller("memory").map(PathBuf::from)
    }

    fn freeze(&self) -> Result<()> {
        self.cgroup.freeze()
    }

    fn thaw(&self) -> Result<()> {
        self.cgroup.thaw()
    }

    fn kill(&self) -> Result<()> {
        self.cgroup.kill()
    }

    fn is_empty(&self) -> Result<bool> {
        self.cgroup
            .processes()
            .map(|processes| processes.is_empty())
    }

    fn remove(&self) -> Result<()> {
        self.cgroup.remove_leaf(&self.name)
    }
}
