//! Seccomp profiles of zygotes, and what is left of a pod's for a leaf that comes from one.
//!
//! A zygote's profile is its pod's with some calls more. A leaf inherits it. Where a Function's pod has the same profile as the
//! pool's, which is the rule (`RuntimeDefault`), a leaf needs no other filter than one that takes those calls back: a dozen
//! instructions instead of hundreds, which the kernel would try every system call on at each fork.

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};
use sock_sandbox::seccomp::Program;

use crate::activation::Profile;
use crate::task::Failure;

/// System calls that a zygote needs to make leaves, and that default profiles keep for those with privileges on the host.
const FORKING: [&str; 5] = [
    "mount",
    "move_mount",
    "mount_setattr",
    "chroot",
    "sethostname",
];
/// Namespaces that a leaf gets of its own. No user namespace: in one it would hold every capability anew.
const OWN: libc::c_int =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
/// Namespaces that are joined: the zygote's own after a fork, the pod's empty network.
const JOINED: [libc::c_int; 2] = [libc::CLONE_NEWPID, libc::CLONE_NEWNET];
/// The same where others extend the PackageSet: by children that become zygotes. Only what is nested in their parent's lets them
/// in; but who enters a user namespace has every capability there, whatever it does with them, and so this is for
/// those alone who need it.
const JOINED_BY_CHILDREN: [libc::c_int; 5] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];
/// What a zygote's sockets are for: some code asks for one when it is imported, and leaves have theirs made by the shim. Others
/// (packets, netfilter) would be of use to nobody but who has gained capabilities.
const FAMILIES: [libc::c_int; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];

/// The profile of a zygote in a pod with this one.
///
/// # Errors
/// None that a profile could cause.
pub fn of_zygote(pods: &LinuxSeccomp, is_extended: bool) -> Result<LinuxSeccomp, Failure> {
    let mut calls = pods.syscalls().clone().unwrap_or_default();
    for call in &mut calls {
        let others = call.names().iter().filter(|name| *name != "socket");
        let others: Vec<String> = others.cloned().collect();
        call.set_names(others);
    }
    calls.retain(|call| !call.names().is_empty());
    calls.extend(forking(is_extended)?);
    let mut profile = pods.clone();
    profile.set_syscalls(Some(calls));
    Ok(profile)
}

/// A Function's pod's profile, for leaves of zygotes that are held to it.
///
/// # Errors
/// A profile that cannot be compiled.
pub fn for_leaves(pods: &LinuxSeccomp) -> Result<Profile, Failure> {
    Ok(Profile {
        name: name(pods)?,
        rest: rest(pods)?.bytes(),
    })
}

fn rest(pods: &LinuxSeccomp) -> Result<Program, Failure> {
    let beyond = forking(true)?;
    let beyond = beyond.iter().flat_map(|call| call.names());
    Ok(Program::compile_only(pods, beyond.map(String::as_str))?)
}

/// Digest of what a zygote in a pod with this profile is held to. Two that are equal differ in no call that it is not made for,
/// also by shims of different releases.
///
/// # Errors
/// A profile that cannot be compiled.
pub fn name(pods: &LinuxSeccomp) -> Result<String, Failure> {
    let programs = [
        Program::compile(pods)?.bytes(),
        Program::compile(&of_zygote(pods, true)?)?.bytes(),
    ];
    Ok(sock_lock::sha256(&programs))
}

/// What a zygote's profile allows beyond its pod's.
fn forking(is_extended: bool) -> Result<Vec<LinuxSyscall>, Failure> {
    let allow = |names: &[&str], arguments: Vec<LinuxSeccompArg>| {
        let call = LinuxSyscallBuilder::default()
            .names(names.iter().map(ToString::to_string).collect::<Vec<_>>())
            .action(LinuxSeccompAction::ScmpActAllow);
        match arguments.is_empty() {
            true => call.build(),
            false => call.args(arguments).build(),
        }
        .map_err(Failure::unknown)
    };
    let argument = LinuxSeccompArgBuilder::default;
    let is = |index: usize, value: libc::c_int| {
        let equal = argument()
            .index(index)
            .op(LinuxSeccompOperator::ScmpCmpEq)
            .value(u64::from(value.unsigned_abs()));
        equal.build().map_err(Failure::unknown)
    };
    let only_own = argument()
        .index(0usize)
        .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
        .value(!u64::from(OWN.unsigned_abs()))
        .value_two(0u64);
    let only_own = only_own.build().map_err(Failure::unknown)?;
    let mut calls = vec![
        allow(&FORKING, vec![])?,
        allow(&["unshare"], vec![only_own])?,
        allow(
            &["socket"],
            vec![is(0, libc::AF_NETLINK)?, is(2, libc::NETLINK_ROUTE)?],
        )?,
    ];
    for family in FAMILIES {
        calls.push(allow(&["socket"], vec![is(0, family)?])?);
    }
    let by_children = JOINED_BY_CHILDREN.iter().filter(|_| is_extended);
    for kind in JOINED.iter().chain(by_children) {
        calls.push(allow(&["setns"], vec![is(1, *kind)?])?);
    }
    Ok(calls)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use oci_spec::runtime::LinuxSeccompBuilder;

    use super::*;

    fn pods(calls: &[(&[&str], Vec<LinuxSeccompArg>)]) -> LinuxSeccomp {
        let calls = calls.iter().map(|(names, arguments)| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            LinuxSyscallBuilder::default()
                .names(names)
                .action(LinuxSeccompAction::ScmpActAllow)
                .args(arguments.clone())
                .build()
                .unwrap()
        });
        LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActErrno)
            .default_errno_ret(1u32)
            .syscalls(calls.collect::<Vec<_>>())
            .build()
            .unwrap()
    }

    #[test]
    fn a_leaf_that_has_a_zygotes_filter_and_the_rest_is_held_to_the_pods_profile() {
        let not_vsock = LinuxSeccompArgBuilder::default()
            .index(0usize)
            .op(LinuxSeccompOperator::ScmpCmpNe)
            .value(40u64)
            .build()
            .unwrap();
        let profiles = [
            pods(&[(&["read", "write", "unshare", "mount"], vec![])]),
            pods(&[(&["read"], vec![]), (&["socket"], vec![not_vsock])]),
            pods(&[]),
        ];
        let numbers = (0..1024).chain([0x4000_0000, 0x4000_0029]);
        for profile in profiles {
            let whole = Program::compile(&profile).unwrap();
            let rest = rest(&profile).unwrap();
            assert!(rest.instructions().len() < 100);
            for is_extended in [false, true] {
                let zygotes = of_zygote(&profile, is_extended).unwrap();
                let zygotes = Program::compile(&zygotes).unwrap();
                for number in numbers.clone() {
                    for first in [0, 1, 2, 16, 17, 40, 0x0002_0000, 0x1000_0000] {
                        let arguments = [first, first, 0, 0, 0, 0];
                        let answer = |program: &Program| program.answer(number, arguments);
                        // The kernel goes by the strictest, which is the lowest for those that there are here (seccomp(2)).
                        let before = answer(&zygotes).min(answer(&whole));
                        let now = answer(&zygotes).min(answer(&rest));
                        assert_eq!(now, before, "{number} {first:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn profiles_have_different_names() {
        let one = pods(&[(&["read"], vec![])]);
        let other = pods(&[(&["read", "write"], vec![])]);
        assert_eq!(name(&one).unwrap(), name(&one.clone()).unwrap());
        assert_ne!(name(&one).unwrap(), name(&other).unwrap());
    }
}
