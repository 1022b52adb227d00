//! A pool whose PackageSet extends another: its zygote is forked from that one's, on the same node.
//!
//! The container's first process is then a holder, as of a Function, and the zygote a process that comes into it. If there is
//! nobody to descend from, the zygote is started by itself and imports everything: that takes longer and shares nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::LinuxNamespaceType;
use sock_sandbox::{Outer, UserMapping, namespace};
use sock_zygote::protocol::{ZygoteEntry, ZygoteFd};
use sock_zygote::{Attachment, Channel, EntryFds, Newborn, SealedSetup};
use tokio::time::{Instant, sleep, timeout};

use super::{CACHE, POOLS, PoolConfig};
use crate::container::Container;
use crate::locks;
use crate::task::Failure;

/// The parent's pool may start at the same moment. kubelet waits for the creation of a container for 120 s.
const PARENT_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks for the parent.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// From the request to the child that waits.
const BORN_WITHIN: Duration = Duration::from_secs(5);
/// From there into the container.
const ENTERED_WITHIN: Duration = Duration::from_secs(10);

/// A child of another pool's zygote, on its way.
pub struct Descent {
    newborn: Newborn,
    parent: Attachment,
    directory: PathBuf,
}

impl Descent {
    /// Has a child forked, if the PackageSet extends another and the child may be: its lock has to hold the parent's.
    /// Yields where its namespaces are to be nested.
    pub async fn begin(config: &PoolConfig, user: UserMapping) -> Option<(Descent, Outer)> {
        let parent = config.parent.as_ref()?;
        let name = &config.name;
        let alone = |reason: &dyn std::fmt::Display| {
            tracing::warn!(
                package_set = name.package_set,
                parent = parent.digest,
                %reason,
                "imports everything by itself"
            );
        };
        let until = Instant::now() + PARENT_WITHIN;
        let directory = parent.pools(&name.tenant, Path::new(POOLS));
        let attachment = loop {
            match sock_zygote::attach(&directory).await {
                Ok(Some(found)) => break found,
                Ok(None) if Instant::now() < until => sleep(LOOK_AGAIN).await,
                Ok(None) => {
                    alone(&"there is no zygote of what it extends on this node");
                    return None;
                }
                Err(error) => {
                    alone(&error);
                    return None;
                }
            }
        };
        // Only now: an entry that the parent's pool is to install may have been missing.
        if let Err(reason) = locks::may_descend(Path::new(CACHE), &name.tenant, &name.lock, parent)
        {
            alone(&reason);
            return None;
        }
        if (attachment.uid, attachment.gid) != (user.uid, user.gid) {
            alone(&"the zygote of what it extends runs as another user");
            return None;
        }
        let born = async {
            let newborn = attachment.zygote.fork_zygote().await?;
            let (user, pid) = newborn.namespaces(attachment.user_namespace.as_fd())?;
            Ok::<_, sock_zygote::Error>((newborn, Outer { user, pid }))
        };
        match timeout(BORN_WITHIN, born).await {
            Ok(Ok((newborn, outer))) => {
                let descent = Descent {
                    newborn,
                    parent: attachment,
                    directory,
                };
                Some((descent, outer))
            }
            Ok(Err(error)) => {
                alone(&error);
                None
            }
            Err(_) => {
                alone(&"the zygote of what it extends does not answer");
                None
            }
        }
    }

    /// Brings the child into its container. Yields its channel, its process, and what tells of the parent's end.
    ///
    /// # Errors
    /// It does not get there.
    pub async fn enter(
        self,
        container: &Container,
        (stdout, stderr): (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<(Channel, OwnedFd, Parent), Failure> {
        let spec = &container.spec;
        let init = container.init.pid();
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
        let cgroup = container.cgroup.borrow().clone();
        let cgroup = cgroup.ok_or_else(|| Failure::precondition("the container has no cgroup"))?;
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
        let (control, pidfd) = entered
            .map_err(|_| {
                Failure::unknown(format!(
                    "the zygote did not enter its container within {} s",
                    ENTERED_WITHIN.as_secs()
                ))
            })?
            .map_err(Failure::unknown)?;
        let parent = Parent {
            attachment: Rc::new(self.parent),
            directory: self.directory,
        };
        Ok((control, pidfd, parent))
    }
}

/// The zygote that another descends from.
pub struct Parent {
    attachment: Rc<Attachment>,
    directory: PathBuf,
}

impl Parent {
    /// Waits until it has ended and another is there in its place. Its child lives on, but shares memory with nobody
    /// who comes after.
    pub async fn replaced(self) {
        let error = self.attachment.zygote.ended().await;
        tracing::info!(%error, "the zygote that this one descends from is gone");
        loop {
            sleep(LOOK_AGAIN).await;
            if let Ok(Some(_)) = sock_zygote::attach(&self.directory).await {
                return;
            }
        }
    }
}
