//! The mount option `favordynmods`, which an administrator may ask for.
//!
//! Moving a process between cgroups waits for an RCU grace period, 16 to 24 ms on Linux 6.1; with the option it does
//! not, and forks and exits on the whole node cost slightly more. The kernel heeds it only when it comes from the
//! initial cgroup namespace.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::process::Command;

use rustix::mount::{MountFlags, mount_remount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::host::Host;

/// First argument of the process that remounts.
pub const INSIDE: &str = "remount-cgroups";

const OPTION: &str = "favordynmods";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{step}: {source}")]
    System {
        step: &'static str,
        source: std::io::Error,
    },
    #[error("remount {path} with {options}: {source}")]
    Remount {
        path: String,
        options: String,
        source: rustix::io::Errno,
    },
    #[error("remounting the cgroups ended with {0}")]
    Failed(String),
    #[error(
        "the kernel ignored favordynmods: this node's init is not in the initial cgroup namespace, or Linux is older than 6.0"
    )]
    Ignored,
}

/// The cgroup version 2 mount of a mountinfo: its path, options, and whether moves are favored already.
fn mount(mountinfo: &str) -> Option<(String, Vec<String>, bool)> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = file_system.split(' ');
        if fields.next()? != "cgroup2" {
            return None;
        }
        let options: Vec<String> = fields.nth(1)?.split(',').map(str::to_owned).collect();
        let favored = options.iter().any(|option| option == OPTION);
        Some((mount.split(' ').nth(4)?.to_owned(), options, favored))
    })
}

/// The options to remount with: those that are set, for a remount takes away what it does not name.
fn options(now: &[String], favored: bool) -> String {
    let mut options: Vec<&str> = now
        .iter()
        .map(String::as_str)
        .filter(|option| ![OPTION, "rw", "ro"].contains(option))
        .collect();
    if favored {
        options.push(OPTION);
    }
    options.join(",")
}

fn mountinfo() -> Result<String, Error> {
    fs::read_to_string("/proc/1/mountinfo").map_err(|source| Error::System {
        step: "read /proc/1/mountinfo",
        source,
    })
}

/// Turns the option on or off; true if that changed anything.
pub fn favor(_: &Host, wanted: bool) -> Result<bool, Error> {
    let Some((_, _, favored)) = mount(&mountinfo()?) else {
        return Ok(false);
    };
    if favored == wanted {
        return Ok(false);
    }
    let output = Command::new("/proc/self/exe")
        .args([INSIDE, if wanted { "on" } else { "off" }])
        .output()
        .map_err(|source| Error::System {
            step: "start the remount",
            source,
        })?;
    if !output.status.success() {
        return Err(Error::Failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ));
    }
    match mount(&mountinfo()?) {
        Some((_, _, now)) if now == wanted => Ok(true),
        _ => Err(Error::Ignored),
    }
}

/// Remounts from the namespaces of the host's PID 1, in a process of its own with a single thread.
pub fn inside(wanted: &str) -> Result<(), Error> {
    let Some((path, now, _)) = mount(&mountinfo()?) else {
        return Ok(());
    };
    for (name, kind) in [
        ("cgroup", LinkNameSpaceType::ControlGroup),
        ("mnt", LinkNameSpaceType::Mount),
    ] {
        let namespace =
            File::open(format!("/proc/1/ns/{name}")).map_err(|source| Error::System {
                step: "open a namespace of PID 1",
                source,
            })?;
        move_into_link_name_space(namespace.as_fd(), Some(kind)).map_err(|errno| {
            Error::System {
                step: "enter a namespace of PID 1",
                source: errno.into(),
            }
        })?;
    }
    let options = options(&now, wanted == "on");
    // Flags of the mount itself must be named again too; these are what systemd sets.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RELATIME;
    mount_remount(path.as_str(), flags, options.as_str()).map_err(|source| Error::Remount {
        path,
        options,
        source,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_remount_names_every_option_again() {
        let line = "35 24 0:29 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        let (path, now, favored) = mount(line).unwrap();
        assert_eq!((path.as_str(), favored), ("/sys/fs/cgroup", false));
        assert_eq!(
            options(&now, true),
            "nsdelegate,memory_recursiveprot,favordynmods"
        );
        assert_eq!(options(&now, false), "nsdelegate,memory_recursiveprot");
    }
}
