//! A pool whose PackageSet extends another: its zygote is forked from that one's, on the same node.
//!
//! The container's first process is then a holder, as of a Function, and the zygote a process that comes into it. If there is
//! nobody to descend from, the zygote is started by itself and imports everything: that takes longer and shares nothing.

use std::cell::RefCell;
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxNamespaceType;
use sock_sandbox::cgroup::follow;
use sock_sandbox::{Outer, UserMapping, namespace};
use sock_zygote::protocol::{ZygoteEntry, ZygoteFd};
use sock_zygote::{Attachment, Channel, EntryFds, Look, Newborn, SealedSetup};
use tokio::time::{Instant, sleep, timeout};

use super::{CACHE, POOLS, PoolConfig};
use crate::activation::Ancestor;
use crate::container::Container;
use crate::locks;
use crate::task::Failure;

/// The parent's pool may start at the same moment. What is waited here is not there for the imports.
const PARENT_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks for the parent.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The same by a zygote that has begun without one.
const LOOK_SELDOM: Duration = Duration::from_secs(30);
/// From the request to the child that waits.
const BORN_WITHIN: Duration = Duration::from_secs(5);
/// From there into the container.
const ENTERED_WITHIN: Duration = Duration::from_secs(10);

/// To whom user namespaces nested in a zygote's belong; nobody runs as this user. Above those of tenants
/// (`docs/design.md`, "Annotations").
pub const OWNER: u32 = 2_000_000_000;

thread_local! {
    /// Brokers of parents that had no child for this pod, or one that did not get into its container: another would not either.
    static FAILED: RefCell<HashSet<PathBuf>> = RefCell::default();
}

/// A child of another pool's zygote, on its way.
pub struct Descent {
    newborn: Newborn,
    parent: Attachment,
}

fn has_failed(broker: &Path) -> bool {
    FAILED.with_borrow(|failed| failed.contains(broker))
}

fn note_failure(broker: PathBuf) {
    FAILED.with_borrow_mut(|failed| failed.insert(broker));
}

/// Why a zygote is started by itself.
enum Alone {
    /// There is nobody now.
    Nobody(String),
    /// This one does not have children.
    Refused(PathBuf, String),
    /// That will not change.
    Never(String),
}

impl Descent {
    /// Has a child forked, if the PackageSet extends another and the child may be: its lock has to hold the parent's.
    /// Yields where its namespaces are to be nested.
    pub async fn begin(config: &PoolConfig, user: UserMapping) -> Option<(Descent, Outer)> {
        let parent = config.parent.as_ref()?;
        let until = Instant::now() + PARENT_WITHIN;
        let reason = loop {
            match born(config, parent, user).await {
                Ok(found) => return Some(found),
                // A parent that has no children may be about to be replaced by one that has, in another pod.
                Err(Alone::Nobody(_) | Alone::Refused(..)) if Instant::now() < until => {
                    sleep(LOOK_AGAIN).await;
                }
                Err(Alone::Nobody(reason) | Alone::Never(reason)) => break reason,
                Err(Alone::Refused(path, reason)) => {
                    note_failure(path);
                    break reason;
                }
            }
        };
        tracing::warn!(
            package_set = config.name.package_set,
            parent = parent.digest,
            reason,
            "imports everything by itself"
        );
        None
    }

    /// It cannot get where it should: the next of this parent's is not tried.
    pub fn give_up(&self) {
        note_failure(self.parent.path.clone());
    }

    /// Brings the child into its container. Yields its channel, its process and the number of that, and what tells of the parent's end.
    ///
    /// # Errors
    /// It does not get there.
    pub async fn enter(
        self,
        container: &Container,
        streams: (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<(Channel, OwnedFd, i32, Parent), Failure> {
        let path = self.parent.path.clone();
        let entered = self.try_to_enter(container, streams).await;
        if entered.is_err() {
            note_failure(path);
        }
        entered
    }

    async fn try_to_enter(
        self,
        container: &Container,
        (stdout, stderr): (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<(Channel, OwnedFd, i32, Parent), Failure> {
        let spec = &container.spec;
        let init = container.running()?;
        let mut namespaces = Vec::new();
        for (kind, file) in [
            (ZygoteFd::Pid, "pid"),
            (ZygoteFd::User, "user"),
            (ZygoteFd::Mount, "mnt"),
            (ZygoteFd::Network, "net"),
            (ZygoteFd::Ipc, "ipc"),
            (ZygoteFd::Uts, "uts"),
        ] {
            namespaces.push((kind, namespace::of_process(init, file)?));
        }
        let linux = spec.linux().as_ref();
        let mut listed = linux
            .and_then(|l| l.namespaces().as_ref())
            .into_iter()
            .flatten();
        if listed.any(|n| n.typ() == LinuxNamespaceType::Cgroup) {
            let cgroup = namespace::of_process(init, "cgroup")?;
            namespaces.push((ZygoteFd::CgroupNamespace, cgroup));
        }
        let cgroup = container.own_cgroup()?;
        let entrances = cgroup.entrances()?;
        let process = spec.process().as_ref();
        let env = process.and_then(|p| p.env().as_ref()).into_iter().flatten();
        let entry = ZygoteEntry {
            env: env
                .filter_map(|e| e.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        };
        let entry = SealedSetup::of_zygote(&entry).map_err(Failure::unknown)?;
        let fds = EntryFds {
            namespaces: namespaces
                .iter()
                .map(|(kind, fd)| (*kind, fd.as_fd()))
                .collect(),
            cgroups: entrances.iter().map(AsFd::as_fd).collect(),
            stdout,
            stderr,
        };
        let directory = cgroup.controller("memory").map(PathBuf::from);
        let directory = directory
            .ok_or_else(|| Failure::precondition("the container's memory is not accounted"))?;
        let score = process.and_then(oci_spec::runtime::Process::oom_score_adj);
        let entering = self.newborn.enter(&entry, &fds).map_err(Failure::unknown)?;
        let entered = timeout(ENTERED_WITHIN, entering.entered(&directory, score)).await;
        let (control, pidfd, pid) = entered
            .map_err(|_| {
                Failure::unknown(format!(
                    "the zygote did not enter its container within {} s",
                    ENTERED_WITHIN.as_secs()
                ))
            })?
            .map_err(Failure::unknown)?;
        // Where version 1 has the controllers it is in its parent's systemd scope still, and would end with that.
        if let Err(error) = follow(init, &[pid]) {
            tracing::warn!(%error, "the zygote may be killed with the pod of what it extends");
        }
        Ok((control, pidfd, pid, Parent(self.parent)))
    }
}

/// The zygote that one may descend from.
async fn find_parent(
    config: &PoolConfig,
    parent: &Ancestor,
    user: UserMapping,
) -> Result<Attachment, Alone> {
    let name = &config.name;
    let found = sock_zygote::attach(&parent.pools(&name.tenant, Path::new(POOLS)))
        .await
        .map_err(|e| Alone::Nobody(e.to_string()))?;
    let found = found.found().ok_or_else(|| {
        Alone::Nobody("there is no zygote of what it extends on this node".into())
    })?;
    if has_failed(&found.path) {
        return Err(Alone::Never(
            "the zygote of what it extends had no child for this pod before".into(),
        ));
    }
    // Only now: an entry that the parent's pool is to install may have been missing.
    locks::may_descend(Path::new(CACHE), &name.tenant, &name.lock, parent).map_err(Alone::Never)?;
    if (found.uid, found.gid) != (user.uid, user.gid) {
        let reason = "the zygote of what it extends runs as another user";
        return Err(Alone::Never(reason.into()));
    }
    Ok(found)
}

async fn born(
    config: &PoolConfig,
    parent: &Ancestor,
    user: UserMapping,
) -> Result<(Descent, Outer), Alone> {
    let attachment = find_parent(config, parent, user).await?;
    let born = async {
        let newborn = attachment.zygote.fork_zygote().await?;
        if let Some(leaves) = &attachment.leaves {
            leaves.add();
        }
        let (user, pid) = newborn.namespaces(attachment.user_namespace.as_fd())?;
        Ok::<_, sock_zygote::Error>((
            newborn,
            Outer {
                owner: OWNER,
                user,
                pid,
            },
        ))
    };
    let refused = |reason: &dyn std::fmt::Display| {
        Alone::Refused(attachment.path.clone(), reason.to_string())
    };
    let born = timeout(BORN_WITHIN, born).await;
    let born = born.map_err(|_| refused(&"the zygote of what it extends does not answer"))?;
    let (newborn, outer) = born.map_err(|e| refused(&e))?;
    let descent = Descent {
        newborn,
        parent: attachment,
    };
    Ok((descent, outer))
}

/// In a pool whose zygote imported everything by itself: waits until there is one that it could descend from.
pub async fn until_it_could(config: &PoolConfig, user: UserMapping) {
    let Some(parent) = &config.parent else {
        return std::future::pending().await;
    };
    loop {
        sleep(LOOK_SELDOM).await;
        if find_parent(config, parent, user).await.is_ok() {
            return;
        }
    }
}

/// The zygote that another descends from.
pub struct Parent(Attachment);

impl Parent {
    /// Name of the profile that its zygote, and whatever is forked from that, is held to.
    #[must_use]
    pub fn profile(&self) -> &str {
        &self.0.profile
    }

    /// Waits until it has ended and another is there in its place. Its child lives on, but shares memory with nobody
    /// who comes after.
    pub async fn replaced(&self) {
        let error = self.0.zygote.ended().await;
        tracing::info!(%error, "the zygote that this one descends from is gone");
        // The pools of one digest listen side by side.
        let Some(directory) = self.0.path.parent() else {
            return std::future::pending().await;
        };
        loop {
            match sock_zygote::attach(directory).await {
                Ok(Look::Found(_)) => return,
                // Each look asks for it, and nobody here needs it.
                Ok(Look::Resting) => sleep(LOOK_SELDOM).await,
                Ok(Look::Nobody) | Err(_) => sleep(LOOK_AGAIN).await,
            }
        }
    }
}
