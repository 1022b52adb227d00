//! The memory of pods: of the processes that are there for the pod alone, and of its cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::output;

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

struct Process {
    directory: PathBuf,
    name: String,
    command: Vec<String>,
    /// As in `/proc/PID/cgroup`, one line a hierarchy.
    cgroups: String,
}

/// One answer a pod.
///
/// # Errors
/// If a pod has no process or no cgroup here, or /proc cannot be read.
pub fn run(pods: &[Pod]) -> Result<Vec<Memory>> {
    let processes = processes()?;
    pods.iter()
        .map(|pod| of(pod, &processes).with_context(|| format!("pod {}", pod.uid)))
        .collect()
}

fn of(pod: &Pod, processes: &[Process]) -> Result<Memory> {
    let label = format!("io.kubernetes.pod.uid={}", pod.uid);
    let sandboxes = output("crictl", &["pods", "-q", "--label", &label])?;
    let sandboxes: Vec<&str> = sandboxes.lines().collect();
    let mut memory = Memory {
        pss: 0,
        cgroup: 0,
        processes: BTreeMap::new(),
    };
    let mut cgroup = None;
    for process in processes {
        let inside = pod_cgroup(&process.cgroups, &pod.uid);
        if inside.is_none() && !is_shim_of(&process.command, &sandboxes) {
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

fn processes() -> Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let directory = entry?.path();
        let is_process = directory
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
        if !is_process {
            continue;
        }
        let read = |file: &str| fs::read_to_string(directory.join(file));
        let (Ok(name), Ok(command), Ok(cgroups)) = (read("comm"), read("cmdline"), read("cgroup"))
        else {
            continue;
        };
        found.push(Process {
            name: name.trim_end().to_owned(),
            command: command.split('\0').map(str::to_owned).collect(),
            cgroups,
            directory,
        });
    }
    Ok(found)
}

/// A shim's command line names the sandbox that it was started for: `-id SANDBOX`.
fn is_shim_of(command: &[String], sandboxes: &[&str]) -> bool {
    command
        .first()
        .is_some_and(|program| program.contains("containerd-shim"))
        && command
            .windows(2)
            .any(|pair| pair[0] == "-id" && sandboxes.contains(&&*pair[1]))
}

/// The pod's own directory in the hierarchy that accounts for memory, if the process is in it.
fn pod_cgroup(cgroups: &str, uid: &str) -> Option<PathBuf> {
    // The systemd driver has names like kubepods-pod1_2.slice, the other one like pod1-2.
    let names = [uid.to_owned(), uid.replace('-', "_")];
    let mut lines: Vec<(&str, &str)> = cgroups
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
        .filter(|(controllers, _)| {
            controllers.is_empty() || controllers.split(',').any(|c| c == "memory")
        })
        .collect();
    // Version 1 first: where it has the memory controller, version 2 cannot.
    lines.sort_by_key(|(controllers, _)| controllers.is_empty());
    let root = Path::new("/sys/fs/cgroup");
    lines.into_iter().find_map(|(controllers, path)| {
        let end = names
            .iter()
            .find_map(|name| Some(path.find(name.as_str())? + name.len()))?;
        let end = path[end..].find('/').map_or(path.len(), |rest| end + rest);
        let hierarchy = if controllers.is_empty() {
            root.to_owned()
        } else {
            root.join("memory")
        };
        Some(hierarchy.join(path[..end].trim_start_matches('/')))
    })
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
fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "905feb9b-31ba-43ac-95cd-9a894a7c1385";

    #[test]
    fn the_pods_directory_is_found_with_both_drivers_and_both_versions() {
        let slice = "/kubelet.slice/kubelet-pod905feb9b_31ba_43ac_95cd_9a894a7c1385.slice";
        let one = format!(
            "5:devices:{slice}/a.scope\n4:memory:{slice}/a.scope/leaf-1\n0::/system.slice\n"
        );
        assert_eq!(
            pod_cgroup(&one, UID).unwrap(),
            Path::new(&format!("/sys/fs/cgroup/memory{slice}"))
        );
        let two = format!("0::/kubepods/pod{UID}/123\n");
        assert_eq!(
            pod_cgroup(&two, UID).unwrap(),
            Path::new(&format!("/sys/fs/cgroup/kubepods/pod{UID}"))
        );
        assert_eq!(pod_cgroup("4:memory:/\n0::/\n", UID), None);
        assert_eq!(pod_cgroup(&format!("4:cpu:/pod{UID}\n"), UID), None);
    }

    #[test]
    fn a_shim_is_known_by_its_sandbox() {
        let command = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let shim = command("/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id abc -address a");
        assert!(is_shim_of(&shim, &["abc"]));
        assert!(!is_shim_of(&shim, &["ab"]));
        assert!(!is_shim_of(&command("crictl -id abc"), &["abc"]));
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "inactive_file 1\ntotal_inactive_file 22\nPss:  333 kB\nPss_Dirty: 4 kB\n";
        assert_eq!(number(text, "total_inactive_file"), Some(22));
        assert_eq!(number(text, "Pss:"), Some(333));
        assert_eq!(number(text, "Pss"), None);
    }
}
