//! Resource limits written to a cgroup's files.
//!
//! Values for version 2 are derived from the version 1 terms of the specification as in its
//! `config-linux.md` and runc: shares of 2..262144 become a weight of 1..10000.

use oci_spec::runtime::LinuxResources;

use super::{Cgroup, devices, write};
use crate::Result;

/// CPU shares of version 1 as a weight of version 2.
#[must_use]
pub(super) fn weight(shares: u64) -> u64 {
    if shares == 0 {
        0
    } else {
        1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
    }
}

fn bytes(limit: i64) -> String {
    if limit < 0 {
        "max".into()
    } else {
        limit.to_string()
    }
}

pub(super) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    if cgroup.unified() {
        version_2(cgroup, resources)
    } else {
        version_1(cgroup, resources)
    }
}

fn version_1(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let set = |controller: &str, file: &str, value: String| -> Result<()> {
        match cgroup.controller(controller) {
            Some(directory) => write(&directory.join(file), &value),
            None => Ok(()),
        }
    };
    if let Some(memory) = resources.memory() {
        let limit = memory.limit().filter(|l| *l != 0);
        let swap = memory.swap().filter(|l| *l != 0);
        let accounts_swap = cgroup
            .controller("memory")
            .is_some_and(|d| d.join("memory.memsw.limit_in_bytes").exists());
        let limit_file = "memory.limit_in_bytes";
        // Memory with swap may never be below memory, so the order depends on the direction.
        let order_reversed = match (limit, cgroup.controller("memory")) {
            (Some(new), Some(d)) => std::fs::read_to_string(d.join("memory.memsw.limit_in_bytes"))
                .ok()
                .and_then(|t| t.trim().parse::<i64>().ok())
                .is_some_and(|old| new > old || new == -1),
            _ => false,
        };
        let set_limit = || limit.map_or(Ok(()), |l| set("memory", limit_file, l.to_string()));
        let set_swap = || match swap {
            Some(s) if accounts_swap => set("memory", "memory.memsw.limit_in_bytes", s.to_string()),
            _ => Ok(()),
        };
        if order_reversed {
            set_swap()?;
            set_limit()?;
        } else {
            set_limit()?;
            set_swap()?;
        }
        if let Some(soft) = memory.reservation().filter(|l| *l != 0) {
            set("memory", "memory.soft_limit_in_bytes", soft.to_string())?;
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            set("cpu", "cpu.shares", shares.to_string())?;
        }
        if let Some(period) = cpu.period().filter(|p| *p != 0) {
            set("cpu", "cpu.cfs_period_us", period.to_string())?;
        }
        if let Some(quota) = cpu.quota().filter(|q| *q != 0) {
            set("cpu", "cpu.cfs_quota_us", quota.to_string())?;
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|c| !c.is_empty()) {
            set("cpuset", "cpuset.cpus", cpus.clone())?;
        }
        if let Some(nodes) = cpu.mems().as_ref().filter(|c| !c.is_empty()) {
            set("cpuset", "cpuset.mems", nodes.clone())?;
        }
    }
    if let Some(limit) = resources
        .pids()
        .as_ref()
        .map(oci_spec::runtime::LinuxPids::limit)
    {
        set(
            "pids",
            "pids.max",
            if limit > 0 {
                limit.to_string()
            } else {
                "max".into()
            },
        )?;
    }
    for page in resources.hugepage_limits().iter().flatten() {
        if page.page_size().contains('/') {
            return Err(crate::Error::spec(
                "linux.resources.hugepageLimits",
                format!("{:?} is not the size of a page", page.page_size()),
            ));
        }
        if let Some(directory) = cgroup.controller("hugetlb") {
            let file = format!("hugetlb.{}.limit_in_bytes", page.page_size());
            if directory.join(&file).exists() {
                write(&directory.join(file), &page.limit().to_string())?;
            }
        }
    }
    if let (Some(directory), Some(given)) = (cgroup.controller("devices"), resources.devices()) {
        for rule in devices::rules(given)? {
            let (file, line) = rule.version_1();
            write(&directory.join(file), &line)?;
        }
    }
    Ok(())
}

fn version_2(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let Some(directory) = cgroup.controller("") else {
        return Ok(());
    };
    let set = |file: &str, value: String| write(&directory.join(file), &value);
    if let Some(memory) = resources.memory() {
        if let Some(limit) = memory.limit().filter(|l| *l != 0) {
            set("memory.max", bytes(limit))?;
            if let Some(swap) = memory.swap().filter(|s| *s != 0) {
                // Version 1 counts memory and swap together, version 2 swap alone.
                let only = if swap < 0 {
                    -1
                } else {
                    (swap - limit.max(0)).max(0)
                };
                if directory.join("memory.swap.max").exists() {
                    set("memory.swap.max", bytes(only))?;
                }
            }
        }
        if let Some(soft) = memory.reservation().filter(|l| *l != 0) {
            set("memory.low", bytes(soft))?;
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            set("cpu.weight", weight(shares).to_string())?;
        }
        if let Some(quota) = cpu.quota().filter(|q| *q != 0) {
            let period = cpu.period().filter(|p| *p != 0).unwrap_or(100_000);
            set("cpu.max", format!("{} {period}", bytes(quota)))?;
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|c| !c.is_empty()) {
            set("cpuset.cpus", cpus.clone())?;
        }
        if let Some(nodes) = cpu.mems().as_ref().filter(|c| !c.is_empty()) {
            set("cpuset.mems", nodes.clone())?;
        }
    }
    if let Some(limit) = resources
        .pids()
        .as_ref()
        .map(oci_spec::runtime::LinuxPids::limit)
    {
        set(
            "pids.max",
            if limit > 0 {
                limit.to_string()
            } else {
                "max".into()
            },
        )?;
    }
    if let Some(given) = resources
        .devices()
        .as_ref()
        .filter(|rules| !rules.is_empty())
    {
        match devices::Program::load(&devices::rules(given)?) {
            Ok(program) => program.attach(directory)?,
            // Whoever makes the container looks at that (`Cgroup::guards_devices`).
            Err(error) => tracing::debug!(%error, "devices are not guarded"),
        }
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') {
            return Err(crate::Error::spec(
                "linux.resources.unified",
                format!("{file:?} is not the name of a cgroup file"),
            ));
        }
        set(file, value.clone())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::weight;

    #[test]
    fn shares_map_to_weights_as_the_specification_says() {
        assert_eq!(weight(2), 1);
        assert_eq!(weight(1024), 39);
        assert_eq!(weight(262_144), 10_000);
    }
}
