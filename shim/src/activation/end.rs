//! How a leaf ended, in words for its client and for the log.

use std::fmt;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// How a leaf's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With an exit status.
    Exited(i32),
    /// By a signal.
    Killed(i32),
    /// By the kernel, for want of memory.
    OutOfMemory(Shortage),
    /// The kernel does not say.
    Unknown,
}

/// Where there was no memory. A pod with a limit can also be hit when its node has no more; its limit is then named all the
/// same, since the kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// The pod has a limit.
    Pod,
    /// It has none.
    Node,
}

impl Shortage {
    /// When the kernel has killed in a container's cgroup.
    #[must_use]
    pub fn in_cgroup(container: &sock_sandbox::cgroup::Cgroup) -> Shortage {
        if container.is_memory_limited() {
            Shortage::Pod
        } else {
            Shortage::Node
        }
    }
}

/// `struct pidfd_info` in its first version (include/uapi/linux/pidfd.h, Linux 6.13).
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    /// pid, tgid, ppid, and the credentials.
    numbers: [u32; 11],
    exit_code: i32,
}

/// The exit code is asked for, or given (Linux 6.15).
const PIDFD_INFO_EXIT: u64 = 1 << 3;
const PIDFD_GET_INFO: libc::Ioctl =
    rustix::ioctl::opcode::read_write::<PidfdInfo>(0xff, 11) as libc::Ioctl;

impl End {
    /// Of the process behind a pidfd, if there is one, which its parent may have reaped: a leaf's parent is the zygote, not
    /// the shim. `shortage`: the kernel has killed in its cgroup for want of memory.
    pub fn of(pidfd: Option<&OwnedFd>, shortage: Option<Shortage>) -> End {
        Self::from_code(pidfd.and_then(exit_code), shortage)
    }

    /// Of a process whose status is known in a shell's form, 128 and more for signals.
    #[must_use]
    pub fn of_status(status: u32, shortage: Option<Shortage>) -> End {
        let status = i32::try_from(status).unwrap_or(i32::MAX);
        // No signal has a number above 64.
        let code = match status {
            129..=192 => status - 128,
            _ => status << 8,
        };
        Self::from_code(Some(code), shortage)
    }

    /// In a shell's form; 255 where the kernel does not say.
    #[must_use]
    pub fn status(self) -> u32 {
        let status = match self {
            End::Exited(status) => status,
            End::Killed(signal) => 128 + signal,
            End::OutOfMemory(_) => 128 + libc::SIGKILL,
            End::Unknown => 255,
        };
        u32::try_from(status).unwrap_or(255)
    }

    /// `code` is in the form of wait(2).
    fn from_code(code: Option<i32>, shortage: Option<Shortage>) -> End {
        match code {
            Some(code) if libc::WIFSIGNALED(code) => match libc::WTERMSIG(code) {
                libc::SIGKILL => shortage.map_or(End::Killed(libc::SIGKILL), End::OutOfMemory),
                signal => End::Killed(signal),
            },
            Some(code) => End::Exited(libc::WEXITSTATUS(code)),
            None => shortage.map_or(End::Unknown, End::OutOfMemory),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(status) => write!(f, "exited with status {status}"),
            End::Killed(signal) => write!(f, "was killed by signal {signal}{}", name(*signal)),
            End::OutOfMemory(Shortage::Pod) => f.write_str(
                "was killed because its pod reached the memory limit (resources.limits.memory)",
            ),
            End::OutOfMemory(Shortage::Node) => f.write_str(
                "was killed because its node ran out of memory (give it resources.requests.memory)",
            ),
            End::Unknown => f.write_str("ended"),
        }
    }
}

/// In the form of wait(2), if the process has ended and the kernel tells.
fn exit_code(pidfd: &OwnedFd) -> Option<i32> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the kernel writes at most the size that is part of the command, which is that of the structure.
    let asked = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (asked == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGBUS => " (SIGBUS)",
        libc::SIGFPE => " (SIGFPE)",
        libc::SIGILL => " (SIGILL)",
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGSYS => " (SIGSYS)",
        libc::SIGTERM => " (SIGTERM)",
        libc::SIGXCPU => " (SIGXCPU)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Runs a shell script and asks after it was reaped.
    fn end_of(script: &str) -> End {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .spawn()
            .expect("a shell");
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd: OwnedFd =
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("pidfd");
        child.wait().expect("its end");
        End::of(Some(&pidfd), None)
    }

    #[test]
    fn the_kernel_tells_how_a_process_ended_that_somebody_else_reaped() {
        let (exited, killed) = (end_of("exit 3"), end_of("kill -SEGV $$"));
        // Older kernels do not say, and then nothing is made up.
        if exited == End::Unknown {
            assert_eq!(killed, End::Unknown);
            return;
        }
        assert_eq!(
            (exited, killed),
            (End::Exited(3), End::Killed(libc::SIGSEGV))
        );
    }

    #[test]
    fn want_of_memory_is_told_from_other_kills() {
        for shortage in [Shortage::Pod, Shortage::Node] {
            let killed = End::OutOfMemory(shortage);
            let shortage = Some(shortage);
            assert_eq!(End::from_code(Some(libc::SIGKILL), shortage), killed);
            assert_eq!(End::from_code(None, shortage), killed);
            assert_eq!(
                End::from_code(Some(libc::SIGSEGV), shortage),
                End::Killed(11)
            );
            assert_eq!(End::from_code(Some(1 << 8), shortage), End::Exited(1));
            assert_eq!(End::of_status(137, shortage), killed);
        }
        assert_eq!(End::from_code(Some(libc::SIGKILL), None), End::Killed(9));
        assert_eq!(End::of_status(134, None), End::Killed(libc::SIGABRT));
        assert_eq!(End::of_status(255, None), End::Exited(255));
        for status in [0, 3, 134, 137, 255] {
            assert_eq!(End::of_status(status, None).status(), status);
        }
        assert_eq!(
            End::Killed(libc::SIGSEGV).to_string(),
            "was killed by signal 11 (SIGSEGV)"
        );
    }
}
