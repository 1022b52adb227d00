//! The processes of a node, and to which pod they belong.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::output;

/// A process as `/proc` shows it.
#[derive(Debug)]
pub struct Process {
    /// As the node numbers it.
    pub pid: i32,
    /// `/proc/PID`.
    pub directory: PathBuf,
    /// Its first 15 bytes.
    pub name: String,
    command: Vec<String>,
    /// As in `/proc/PID/cgroup`, one line a hierarchy.
    cgroups: String,
}

/// All that are there now.
///
/// # Errors
/// If /proc cannot be read.
pub fn all() -> Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let directory = entry?.path();
        let pid = directory.file_name().and_then(|name| name.to_str());
        let Some(pid) = pid.and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read_to_string(directory.join(file));
        let (Ok(name), Ok(command), Ok(cgroups)) = (read("comm"), read("cmdline"), read("cgroup"))
        else {
            continue;
        };
        found.push(Process {
            pid,
            name: name.trim_end().to_owned(),
            command: command.split('\0').map(str::to_owned).collect(),
            cgroups,
            directory,
        });
    }
    Ok(found)
}

/// The sandboxes that containerd knows of a pod.
///
/// # Errors
/// If it does not answer.
pub fn sandboxes(pod: &str) -> Result<Vec<String>> {
    let label = format!("io.kubernetes.pod.uid={pod}");
    let found = output("crictl", &["pods", "-q", "--label", &label])?;
    Ok(found.lines().map(str::to_owned).collect())
}

impl Process {
    /// Whether it is the shim of one of these sandboxes: its arguments name the one that it was started
    /// for, `-id SANDBOX`.
    #[must_use]
    pub fn is_shim_of(&self, sandboxes: &[String]) -> bool {
        self.command
            .first()
            .is_some_and(|program| program.contains("containerd-shim"))
            && self
                .command
                .windows(2)
                .any(|pair| pair[0] == "-id" && sandboxes.contains(&pair[1]))
    }

    /// Whether it is a Python interpreter.
    #[must_use]
    pub fn is_interpreter(&self) -> bool {
        let program = fs::read_link(self.directory.join("exe")).unwrap_or_default();
        program
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"python"))
    }

    /// The pod's own directory in the hierarchy that accounts for memory, if the process is in it.
    #[must_use]
    pub fn cgroup_of_pod(&self, uid: &str) -> Option<PathBuf> {
        pod_cgroup(&self.cgroups, uid)
    }
}

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
    let (controllers, path) = lines.into_iter().next()?;
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
    fn a_hierarchy_that_accounts_nothing_does_not_tell_the_pod() {
        let leaf = format!("4:memory:/kubepods/podother/1/leaf-1\n0::/kubepods/pod{UID}/1\n");
        assert_eq!(pod_cgroup(&leaf, UID), None);
    }

    #[test]
    fn a_shim_is_known_by_its_sandbox() {
        let process = |text: &str| Process {
            pid: 1,
            directory: "/proc/1".into(),
            name: "shim".into(),
            command: text.split(' ').map(str::to_owned).collect(),
            cgroups: String::new(),
        };
        let of = |ids: &[&str]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
        let shim = process("/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id abc -address a");
        assert!(shim.is_shim_of(&of(&["abc"])));
        assert!(!shim.is_shim_of(&of(&["ab"])));
        assert!(!process("crictl -id abc").is_shim_of(&of(&["abc"])));
    }
}
