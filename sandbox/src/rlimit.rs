//! Resource limits (setrlimit(2)).

use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};

use crate::Result;
use crate::error::Step;

/// The number of a limit in `setrlimit(2)`.
#[must_use]
fn number(kind: PosixRlimitType) -> u32 {
    use PosixRlimitType as T;
    match kind {
        T::RlimitCpu => libc::RLIMIT_CPU as u32,
        T::RlimitFsize => libc::RLIMIT_FSIZE as u32,
        T::RlimitData => libc::RLIMIT_DATA as u32,
        T::RlimitStack => libc::RLIMIT_STACK as u32,
        T::RlimitCore => libc::RLIMIT_CORE as u32,
        T::RlimitRss => libc::RLIMIT_RSS as u32,
        T::RlimitNproc => libc::RLIMIT_NPROC as u32,
        T::RlimitNofile => libc::RLIMIT_NOFILE as u32,
        T::RlimitMemlock => libc::RLIMIT_MEMLOCK as u32,
        T::RlimitAs => libc::RLIMIT_AS as u32,
        T::RlimitLocks => libc::RLIMIT_LOCKS as u32,
        T::RlimitSigpending => libc::RLIMIT_SIGPENDING as u32,
        T::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE as u32,
        T::RlimitNice => libc::RLIMIT_NICE as u32,
        T::RlimitRtprio => libc::RLIMIT_RTPRIO as u32,
        T::RlimitRttime => libc::RLIMIT_RTTIME as u32,
    }
}

/// A process's limits as `(RLIMIT_*, soft, hard)`, for whoever sets them elsewhere.
#[must_use]
pub fn rlimits(process: &Process) -> Vec<(u32, u64, u64)> {
    process
        .rlimits()
        .iter()
        .flatten()
        .map(|l| (number(l.typ()), l.soft(), l.hard()))
        .collect()
}

/// Sets each limit on the calling process. A hard limit that may not be raised (no `CAP_SYS_RESOURCE`)
/// stays as it is, and the soft one goes as high as that allows.
pub(crate) fn apply(limits: &[PosixRlimit]) -> Result<()> {
    for limit in limits {
        let resource = number(limit.typ());
        let mut value = libc::rlimit {
            rlim_cur: limit.soft(),
            rlim_max: limit.hard(),
        };
        // SAFETY: `value` is a whole rlimit.
        if unsafe { libc::setrlimit(resource as _, &raw const value) } == 0 {
            continue;
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EPERM) {
            return Err(error).step("set limit", limit.typ());
        }
        let mut have = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: `have` is a whole rlimit to be filled in.
        if unsafe { libc::getrlimit(resource as _, &raw mut have) } == 0 {
            value.rlim_max = value.rlim_max.min(have.rlim_max);
            value.rlim_cur = value.rlim_cur.min(value.rlim_max);
            // SAFETY: as above.
            unsafe { libc::setrlimit(resource as _, &raw const value) };
        }
    }
    Ok(())
}
