//! When a process gets the processor and the disk, and as what machine it sees this one: `process.scheduler`,
//! `process.ioPriority`, `linux.personality`.

use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxPersonalityDomain, LinuxSchedulerFlag as Flag,
    LinuxSchedulerPolicy as Policy, Process, Scheduler,
};

use crate::error::Step;
use crate::{Error, Result};

/// `struct sched_attr` in its first version (`sched_setattr(2)`).
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn attributes(wanted: &Scheduler) -> Result<Attributes> {
    // linux/sched.h
    let policy = match wanted.policy() {
        Policy::SchedOther => 0,
        Policy::SchedFifo => 1,
        Policy::SchedRr => 2,
        Policy::SchedBatch => 3,
        Policy::SchedIso => {
            return Err(Error::spec(
                "process.scheduler.policy",
                "SCHED_ISO is reserved and in no kernel: use SCHED_OTHER",
            ));
        }
        Policy::SchedIdle => 5,
        Policy::SchedDeadline => 6,
    };
    let flags = wanted.flags().iter().flatten().map(|flag| match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    });
    Ok(Attributes {
        size: u32::try_from(size_of::<Attributes>()).unwrap_or(0),
        policy,
        flags: flags.fold(0, |flags, flag| flags | flag),
        nice: wanted.nice().unwrap_or(0),
        priority: wanted.priority().unwrap_or(0).unsigned_abs(),
        runtime: wanted.runtime().unwrap_or(0),
        deadline: wanted.deadline().unwrap_or(0),
        period: wanted.period().unwrap_or(0),
    })
}

/// `IOPRIO_PRIO_VALUE` (linux/ioprio.h).
fn io_priority(class: IOPriorityClass, priority: i64) -> Result<libc::c_int> {
    let class = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match libc::c_int::try_from(priority) {
        Ok(priority @ 0..=7) => Ok(class << 13 | priority),
        _ => Err(Error::spec(
            "process.ioPriority.priority",
            format!("{priority} is not between 0 and 7"),
        )),
    }
}

fn done(result: libc::c_long, step: &'static str, subject: impl std::fmt::Display) -> Result<()> {
    if result < 0 {
        return Err(std::io::Error::last_os_error()).step(step, subject);
    }
    Ok(())
}

/// Gives the calling process what a container's or a further process of it is to have. Some of it only the node's root may.
///
/// # Errors
/// A value that is none, or that the kernel refuses.
pub(crate) fn apply(process: &Process, linux: Option<&Linux>) -> Result<()> {
    if let Some(wanted) = process.scheduler() {
        let attributes = attributes(wanted)?;
        // SAFETY: a whole sched_attr with its size; no flags.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        done(result, "set scheduler", format!("{wanted:?}"))?;
    }
    if let Some(wanted) = process.io_priority() {
        let value = io_priority(wanted.class(), wanted.priority())?;
        // SAFETY: plain numbers: IOPRIO_WHO_PROCESS, this one.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, value) };
        done(result, "set I/O priority", format!("{wanted:?}"))?;
    }
    if let Some(wanted) = linux.and_then(|linux| linux.personality().as_ref()) {
        let domain: libc::c_ulong = match wanted.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => 8,
        };
        if let Some(flag) = wanted.flags().iter().flatten().next() {
            return Err(Error::spec(
                "linux.personality.flags",
                format!("{flag:?}: the specification defines no flags"),
            ));
        }
        // SAFETY: plain number.
        let result = unsafe { libc::personality(domain) };
        done(result.into(), "set personality", format!("{domain:#x}"))?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_asked_is_what_the_kernel_is_told() {
        let wanted: Scheduler = serde_json::from_value(
            json!({"policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_RESET_ON_FORK"]}),
        )
        .unwrap();
        let expected = Attributes {
            size: 48,
            policy: 3,
            flags: 1,
            nice: 5,
            ..Attributes::default()
        };
        assert_eq!(attributes(&wanted).unwrap(), expected);
        let iso = serde_json::from_value(json!({"policy": "SCHED_ISO"})).unwrap();
        assert!(attributes(&iso).is_err());
        assert_eq!(
            io_priority(IOPriorityClass::IoprioClassBe, 7).unwrap(),
            0x4007
        );
        let error = io_priority(IOPriorityClass::IoprioClassBe, 8).unwrap_err();
        assert!(error.to_string().contains("8 is not between 0 and 7"));
    }
}
