//! The process that keeps a zygote's namespaces, with those of its leaves below them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Spec;
use rustix::fs::fstat;
use sock_sandbox::root::Root;
use sock_sandbox::{HolderKind, Launched, Outer, Plan, Program, Stdio, UserMapping, namespace};

use crate::children::Claim;
use crate::process::run_program;
use crate::task::Failure;

/// Making namespaces takes milliseconds, unless somebody in those around them interferes.
const MADE_WITHIN: Duration = Duration::from_secs(10);

/// It ends with the last process below it, once this is dropped.
pub struct NamespaceHolder {
    /// The holder.
    pub process: Launched,
    /// The user namespace.
    pub user: OwnedFd,
    /// The user namespace of another zygote around it.
    outer: Option<Inode>,
}

/// Device and number.
type Inode = (u64, u64);

fn inode(file: impl AsFd) -> Result<Inode, Failure> {
    let file = fstat(file).map_err(std::io::Error::from)?;
    Ok((file.st_dev, file.st_ino))
}

impl NamespaceHolder {
    /// Makes namespaces, nested in those of another zygote if there is one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn make(
        spec: &Spec,
        id: &str,
        mapping: UserMapping,
        outer: Option<Outer>,
    ) -> Result<NamespaceHolder, Failure> {
        let around = outer.as_ref().map(|o| inode(&o.user)).transpose()?;
        let process = sock_sandbox::launch(Plan {
            spec,
            root: Root::Empty,
            program: Program::Holder(HolderKind::Descendants),
            stdio: Stdio::default(),
            extra: Vec::new(),
            mapping: Some(mapping),
            outer,
            identity: None,
            nodev_root: false,
            cgroups: Vec::new(),
        })?;
        // A nested one is the child of the holder around it.
        let _claim = around.is_none().then(|| Claim::new(process.pid));
        let made = async {
            record(id, process.pid)?;
            let ran =
                tokio::time::timeout(MADE_WITHIN, run_program(&process, &crate::home::outside()))
                    .await;
            let problem = match ran {
                Ok(ran) => ran?.map(|e| e.to_string()),
                Err(_) => Some(format!("not made within {} s", MADE_WITHIN.as_secs())),
            };
            if let Some(problem) = problem {
                return Err(Failure::unknown(format!(
                    "namespaces of the zygote: {problem}: this node may forbid user namespaces"
                )));
            }
            Ok(namespace::of_process(process.pid, "user")?)
        };
        match made.await {
            Ok(user) => Ok(NamespaceHolder {
                process,
                user,
                outer: around,
            }),
            Err(e) => {
                signal(&process.pidfd, libc::SIGKILL);
                Err(e)
            }
        }
    }

    /// Whether its namespaces are nested in those of another zygote.
    #[must_use]
    pub fn is_nested(&self) -> bool {
        self.outer.is_some()
    }

    /// Whether it is this user namespace that they are nested in.
    #[must_use]
    pub fn is_within(&self, outer: &Outer) -> bool {
        inode(&outer.user).is_ok_and(|inode| self.outer == Some(inode))
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        signal(&self.process.pidfd, libc::SIGTERM);
    }
}

/// Sends a signal to a process by descriptor; to one that is gone it goes nowhere.
pub fn signal(process: impl AsFd, signal: libc::c_int) {
    // SAFETY: sends a signal to a process by descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            std::os::fd::AsRawFd::as_raw_fd(&process.as_fd()),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// Begin of the names of the files that name holders, for the `delete` command after a crash of the shim.
const HOLDER: &str = "sock-holder";

/// Process number and start time: together they name one process for ever.
fn record(id: &str, pid: i32) -> Result<(), Failure> {
    let started = start_time(pid).ok_or_else(|| Failure::unknown("the zygote's holder is gone"))?;
    Ok(std::fs::write(
        holder_of(Path::new("."), id),
        format!("{pid} {started}"),
    )?)
}

/// In the sandbox's bundle, the working directory of the shim's server: containerd may have removed the
/// container's own when it runs the `delete` command.
fn holder_of(sandbox: &Path, id: &str) -> PathBuf {
    sandbox.join(format!("{HOLDER}-{id}"))
}

fn start_time(pid: i32) -> Option<u64> {
    // A process names itself as it likes, also in bytes that are no text.
    started(&std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): fields are counted from behind the name, which ends at the last parenthesis.
#[must_use]
pub fn started(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let fields = std::str::from_utf8(&stat[end + 1..]).ok()?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// The process that a bundle's file names, and its start time.
#[must_use]
pub fn recorded(text: &str) -> Option<(i32, u64)> {
    let (pid, started) = text.trim().split_once(' ')?;
    // 0 and negative numbers are groups of processes to kill(2), and 1 is nobody's holder.
    let pid = pid.parse().ok().filter(|pid| *pid > 1)?;
    Some((pid, started.parse().ok()?))
}

/// After a crash: has the holder of a container's zygote end with the last leaf. `sandbox` is the bundle of the pod's sandbox.
pub fn release(sandbox: &Path, id: &str) {
    let Ok(text) = std::fs::read_to_string(holder_of(sandbox, id)) else {
        return;
    };
    if let Some((pid, started)) = recorded(&text)
        && start_time(pid) == Some(started)
    {
        // SAFETY: sends a signal to a process that was just found to be the one recorded.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_start_time_is_that_of_the_kernel_whatever_the_name() {
        let rest = "S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0";
        for name in [&b"python3"[..], b") S 1", b"\xff\xfe", b"a b\nc"] {
            let stat = [b"17 (", name, b") ", rest.as_bytes()].concat();
            assert_eq!(started(&stat), Some(4242), "{name:?}");
        }
        let own = i32::try_from(std::process::id()).expect("a process number");
        assert!(start_time(own).is_some_and(|t| t > 0));
    }

    #[test]
    fn no_group_of_processes_is_taken_for_a_holder() {
        for text in [
            "-1 5",
            "0 5",
            "1 5",
            "",
            "7",
            "7 x",
            "7 5 9",
            "99999999999 5",
        ] {
            assert_eq!(recorded(text), None, "{text}");
        }
        assert_eq!(recorded("7 5"), Some((7, 5)));
    }

    proptest! {
        #[test]
        fn what_a_bundle_records_is_read_back(pid in 2.., started in any::<u64>()) {
            prop_assert_eq!(recorded(&format!("{pid} {started}")), Some((pid, started)));
        }

        #[test]
        fn no_text_is_a_panic_or_a_group(bytes in prop::collection::vec(any::<u8>(), 0..120), text in "\\PC{0,30}|-?[0-9]{0,12} [0-9]{0,22}") {
            let _ = super::started(&bytes);
            prop_assert!(recorded(&text).is_none_or(|(pid, _)| pid > 1));
        }
    }
}
