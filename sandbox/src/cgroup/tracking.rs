//! Which processes systemd takes for a scope's.
//!
//! Where version 1 has the controllers, systemd still tells by the version 2 hierarchy, if that is mounted too. To join there
//! takes a lock of the whole system, so a leaf that was forked from a zygote stays in the zygote's place. That is right for
//! as long as the zygote lives: when its scope ends, systemd asks every process in it to end, kills it 90 s later, and
//! keeps the pod's slice until then.

use std::fs;
use std::path::PathBuf;

use super::{below_exactly, init_path, write};
use crate::Result;
use crate::error::Step as _;

/// Moves processes to where `host` is in a version 2 hierarchy without controllers. Does nothing where there is none. Processes
/// that have ended are left out.
///
/// # Errors
/// `host` is gone, or the kernel refuses.
pub fn follow(host: i32, processes: &[i32]) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let path = format!("/proc/{host}/cgroup");
    let cgroups = fs::read_to_string(&path).at("read", &path)?;
    let Some(directory) = place(&mounts, &cgroups) else {
        return Ok(());
    };
    let file = directory.join("cgroup.procs");
    for process in processes {
        match write(&file, &process.to_string()) {
            Err(e) if e.errno() == Some(libc::ESRCH) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The directory of the version 2 hierarchy, beside version 1, that the process with these cgroups is in.
fn place(mounts: &str, cgroups: &str) -> Option<PathBuf> {
    let beside = cgroups.lines().any(|line| !line.starts_with("0::"));
    beside.then_some(())?;
    below_exactly(mounts, &[], init_path(cgroups, &[])?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    const MOUNTS: &str = "50 49 0:30 / /sys/fs/cgroup/memory rw - cgroup memory rw,memory\n\
                          52 49 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_place_is_that_of_version_2_beside_version_1() {
        let cgroups = "4:memory:/a.slice/b.scope/leaf-1\n0::/a.slice/b.scope\n";
        assert_eq!(
            place(MOUNTS, cgroups).unwrap(),
            Path::new("/sys/fs/cgroup/unified/a.slice/b.scope")
        );
    }

    #[test]
    fn where_version_2_accounts_everything_follows_already() {
        assert_eq!(place(MOUNTS, "0::/a.slice/b.scope\n"), None);
        assert_eq!(place("", "4:memory:/a\n0::/\n"), None);
        assert_eq!(place(MOUNTS, "4:memory:/a\n"), None);
    }
}
