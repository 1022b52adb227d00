//! What a node must have for sock, and what to do where it has not.

use std::fmt;
use std::fs;

use crate::containerd::{self, Process, Version};
use crate::host::Host;

/// Mounts of the host's PID 1 that hold cgroups.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cgroups {
    /// Controllers with a hierarchy of version 1.
    pub first: Vec<String>,
    /// Controllers of the hierarchy of version 2 at `/sys/fs/cgroup`.
    pub second: Option<Vec<String>>,
}

/// What was found on a host.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Kernel release, as uname(2) has it.
    pub kernel: String,
    /// Where cgroups are mounted.
    pub cgroups: Cgroups,
    /// `user.max_user_namespaces`; none where the kernel has no user namespaces.
    pub user_namespaces: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns`.
    pub apparmor_restricts: bool,
    /// SELinux is there and enforces.
    pub selinux_enforces: bool,
    /// `kernel.seccomp.actions_avail`.
    pub seccomp_actions: String,
    /// containerd's version, or why it is not known.
    pub containerd: Result<Version, String>,
}

/// Something about a host that sock cannot, or can hardly, live with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// The runtime must not be installed.
    pub blocks: bool,
    /// What is the matter.
    pub what: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

/// Looks at the host.
pub fn look(host: &Host) -> Facts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let on_host = |path: &str| fs::read_to_string(host.path(path)).unwrap_or_default();
    Facts {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        cgroups: cgroups(
            &read("/proc/1/mountinfo"),
            &on_host("/sys/fs/cgroup/cgroup.controllers"),
        ),
        user_namespaces: read("/proc/sys/user/max_user_namespaces")
            .trim()
            .parse()
            .ok(),
        apparmor_restricts: read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").trim()
            == "1",
        selinux_enforces: on_host("/sys/fs/selinux/enforce").trim() == "1",
        seccomp_actions: read("/proc/sys/kernel/seccomp/actions_avail"),
        containerd: Process::find(host)
            .and_then(|process| containerd::version(host, &process))
            .map_err(|error| error.to_string()),
    }
}

/// Reads the cgroup mounts out of a mountinfo (proc_pid_mountinfo(5)): the file system type and its options follow
/// the separator.
fn cgroups(mountinfo: &str, controllers: &str) -> Cgroups {
    let mut found = Cgroups::default();
    for line in mountinfo.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else {
            continue;
        };
        let at = mount.split(' ').nth(4).unwrap_or_default();
        let mut fields = file_system.split(' ');
        match (fields.next(), fields.nth(1)) {
            (Some("cgroup"), Some(options)) => {
                found.first.extend(options.split(',').map(str::to_owned))
            }
            (Some("cgroup2"), _) if at == "/sys/fs/cgroup" => {
                found.second = Some(
                    controllers
                        .split_ascii_whitespace()
                        .map(str::to_owned)
                        .collect(),
                );
            }
            _ => {}
        }
    }
    found
}

/// Judges what was found.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |blocks, what: String, remedy| {
        findings.push(Finding {
            blocks,
            what,
            remedy,
        })
    };

    match release(&facts.kernel) {
        Some(version) if version >= (5, 12) => {}
        Some(_) => add(
            true,
            format!(
                "kernel {} has no mount_setattr(2), which makes whole trees of mounts read-only",
                facts.kernel
            ),
            "boot Linux 5.12 or later",
        ),
        None => add(
            false,
            format!("kernel {} has no version that can be read", facts.kernel),
            "make sure that it is Linux 5.12 or later",
        ),
    }

    let has = |list: &[String], name: &str| list.iter().any(|entry| entry == name);
    let missing: Vec<&str> = match &facts.cgroups.second {
        Some(controllers) => ["cpu", "memory", "pids"]
            .into_iter()
            .filter(|name| !has(controllers, name))
            .collect(),
        None => ["cpu", "memory", "pids", "freezer"]
            .into_iter()
            .filter(|name| !has(&facts.cgroups.first, name))
            .collect(),
    };
    if !missing.is_empty() {
        add(
            true,
            format!("cgroup controllers are missing: {}", missing.join(", ")),
            "enable them on the kernel command line (for memory: cgroup_enable=memory) and reboot",
        );
    }

    match facts.user_namespaces {
        None => add(
            true,
            "the kernel has no user namespaces".into(),
            "boot a kernel built with CONFIG_USER_NS; zygotes live in one so as to have no privilege on the host",
        ),
        Some(0) => add(
            true,
            "user.max_user_namespaces is 0".into(),
            "`sysctl -w user.max_user_namespaces=15000`, and in /etc/sysctl.d to keep it",
        ),
        Some(few @ 1..256) => add(
            false,
            format!("user.max_user_namespaces is {few}, and every zygote takes one"),
            "`sysctl -w user.max_user_namespaces=15000`, and in /etc/sysctl.d to keep it",
        ),
        Some(_) => {}
    }
    if !facts
        .seccomp_actions
        .split_ascii_whitespace()
        .any(|action| action == "user_notif")
    {
        add(
            true,
            "seccomp has no user notification, by which leaves get their sockets".into(),
            "boot a kernel built with CONFIG_SECCOMP_FILTER",
        );
    }
    if facts.apparmor_restricts {
        add(
            false,
            "AppArmor takes the capabilities of user namespaces that unprivileged processes make"
                .into(),
            "if zygotes fail here, `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`",
        );
    }
    if facts.selinux_enforces {
        add(
            false,
            "SELinux enforces, and sock gives its processes no label of their own".into(),
            "if pods fail here, look for denials with `ausearch -m avc -c zygote` and allow them",
        );
    }

    match &facts.containerd {
        Err(reason) => add(
            true,
            reason.clone(),
            "sock runs under containerd 2.0 or later only",
        ),
        Ok(Version {
            number: Some(number),
            ..
        }) if *number >= (2, 0) => {}
        Ok(Version {
            number: Some(_),
            text,
        }) => add(
            true,
            format!(
                "containerd is {text}; before 2.0 it speaks another protocol with runtimes, and a drop-in replaces the whole configuration"
            ),
            "upgrade containerd to 2.0 or later",
        ),
        Ok(Version { number: None, text }) => add(
            false,
            format!("containerd calls its version {text}"),
            "make sure that it is 2.0 or later",
        ),
    }
    findings
}

/// Major and minor number of a kernel release.
fn release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|character: char| !character.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Why a host is unfit: every finding that blocks.
#[derive(Debug, thiserror::Error)]
#[error("this node is unfit for sock: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct Unfit(pub Vec<Finding>);

/// Logs every finding, and errs if one of them blocks.
pub fn print(host: &Host) -> Result<(), Unfit> {
    let facts = look(host);
    tracing::info!(
        kernel = facts.kernel,
        cgroups = if facts.cgroups.second.is_some() {
            "v2"
        } else {
            "v1"
        },
        containerd = facts
            .containerd
            .as_ref()
            .map_or("unknown", |version| &version.text),
        "host"
    );
    let (blocking, others): (Vec<_>, Vec<_>) = judge(&facts)
        .into_iter()
        .partition(|finding| finding.blocks);
    for finding in others {
        tracing::warn!("{finding}");
    }
    if blocking.is_empty() {
        Ok(())
    } else {
        Err(Unfit(blocking))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            kernel: "6.1.0-13-cloud-amd64".into(),
            cgroups: Cgroups {
                first: vec![],
                second: Some(
                    ["cpuset", "cpu", "io", "memory", "pids"]
                        .map(str::to_owned)
                        .to_vec(),
                ),
            },
            user_namespaces: Some(15_000),
            apparmor_restricts: false,
            selinux_enforces: false,
            seccomp_actions: "kill_process user_notif errno allow\n".into(),
            containerd: Ok(Version {
                number: Some((2, 2)),
                text: "2.2.9".into(),
            }),
        }
    }

    fn blocks(facts: &Facts) -> bool {
        judge(facts).iter().any(|finding| finding.blocks)
    }

    #[test]
    fn a_common_node_is_fit() {
        assert_eq!(judge(&good()), []);
    }

    #[test]
    fn each_lack_blocks_and_is_named() {
        type Damage = fn(&mut Facts);
        let broken: [(&str, Damage); 7] = [
            ("5.10.0", |facts| facts.kernel = "5.10.0-26-amd64".into()),
            ("memory", |facts| {
                facts.cgroups.second = Some(vec!["cpu".into(), "pids".into()]);
            }),
            ("freezer", |facts| {
                facts.cgroups = Cgroups {
                    first: ["cpu", "memory", "pids"].map(str::to_owned).to_vec(),
                    second: None,
                };
            }),
            ("max_user_namespaces", |facts| {
                facts.user_namespaces = Some(0)
            }),
            ("no user namespaces", |facts| facts.user_namespaces = None),
            ("notification", |facts| {
                facts.seccomp_actions = "kill_process errno".into()
            }),
            ("1.7.12", |facts| {
                facts.containerd = Ok(Version {
                    number: Some((1, 7)),
                    text: "1.7.12".into(),
                });
            }),
        ];
        for (word, change) in broken {
            let mut facts = good();
            change(&mut facts);
            let findings = judge(&facts);
            assert!(
                findings
                    .iter()
                    .any(|finding| finding.blocks && finding.what.contains(word)),
                "{word}: {findings:?}"
            );
        }
    }

    #[test]
    fn restrictions_that_may_do_no_harm_only_warn() {
        let mut facts = good();
        facts.apparmor_restricts = true;
        facts.selinux_enforces = true;
        assert!(!blocks(&facts));
        assert_eq!(judge(&facts).len(), 2);
    }

    #[test]
    fn cgroups_of_both_versions_are_found() {
        let first = "30 25 0:26 /docker/ab /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n\
                     31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                     32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = cgroups(first, "");
        assert_eq!(found.second, None);
        assert!(
            found.first.iter().any(|name| name == "memory")
                && found.first.iter().any(|name| name == "cpu")
        );

        let second = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            cgroups(second, "cpu memory\n").second.unwrap(),
            ["cpu", "memory"]
        );
    }
}
