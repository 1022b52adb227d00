//! The memory of pods: of the processes that are there for the pod alone, and of its cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::processes::{Process, all, sandboxes};

/// A pod of this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: String,
}

/// What it uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Bytes, every process of the pod and its shim: proportional set size, a page that several
    /// processes share counted in parts.
    pub pss: u64,
    /// Bytes that the pod's cgroup is charged with, without the inactive part of the page cache:
    /// what kubelet calls the working set.
    pub cgroup: u64,
    /// Names of these processes, and how many have each.
    pub processes: BTreeMap<String, usize>,
}

/// One answer a pod.
///
/// # Errors
/// If a pod has no process or no cgroup here, or /proc cannot be read.
pub fn run(pods: &[Pod]) -> Result<Vec<Memory>> {
    let processes = all()?;
    pods.iter()
        .map(|pod| of(pod, &processes).with_context(|| format!("pod {}", pod.uid)))
        .collect()
}

fn of(pod: &Pod, processes: &[Process]) -> Result<Memory> {
    let sandboxes = sandboxes(&pod.uid)?;
    let mut memory = Memory {
        pss: 0,
        cgroup: 0,
        processes: BTreeMap::new(),
    };
    let mut cgroup = None;
    for process in processes {
        let inside = process.cgroup_of_pod(&pod.uid);
        if inside.is_none() && !process.is_shim_of(&sandboxes) {
            continue;
        }
        // A process that has just ended uses nothing.
        let Ok(rollup) = fs::read_to_string(process.directory.join("smaps_rollup")) else {
            continue;
        };
        memory.pss += number(&rollup, "Pss:").unwrap_or(0) * 1024;
        *memory.processes.entry(process.name.clone()).or_default() += 1;
        cgroup = cgroup.or(inside);
    }
    let directory = cgroup.context("no process in a memory cgroup of its own")?;
    memory.cgroup = working_set(&directory)?;
    Ok(memory)
}

fn working_set(directory: &Path) -> Result<u64> {
    let (usage, inactive) = if directory.join("memory.current").exists() {
        ("memory.current", "inactive_file")
    } else {
        ("memory.usage_in_bytes", "total_inactive_file")
    };
    let read = |file: &str| {
        let path = directory.join(file);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    let used: u64 = read(usage)?.trim().parse()?;
    let Some(cached) = number(&read("memory.stat")?, inactive) else {
        bail!("memory.stat of {} has no {inactive}", directory.display());
    };
    Ok(used.saturating_sub(cached))
}

/// The number behind a name that begins a line.
pub(super) fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "inactive_file 1\ntotal_inactive_file 22\nPss:  333 kB\nPss_Dirty: 4 kB\n";
        assert_eq!(number(text, "total_inactive_file"), Some(22));
        assert_eq!(number(text, "Pss:"), Some(333));
        assert_eq!(number(text, "Pss"), None);
    }
}
