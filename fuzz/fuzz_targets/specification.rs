//! A container's specification (OCI, `config.json`), as far as the shim and the sandbox read it: what a leaf is told, the seccomp
//! profile, cgroup path, limits and devices.

#![no_main]

use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Operator,
    Spec,
};
use sock_sandbox::cgroup::{Cgroup, Hierarchies, Location};
use sock_sandbox::seccomp::{Instruction, Program};
use sock_shim::devices;
use sock_shim::role::function::leaf_setup;
use sock_zygote_protocol::LeafSetup;
use syscalls::Sysno;

const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;

/// What the kernel demands of a filter, as far as it is about its form (`bpf_check_classic`, net/core/filter.c).
fn check_form(code: &[Instruction]) {
    for (at, instruction) in code.iter().enumerate() {
        let furthest = match instruction.code {
            0x06 => continue,
            0x05 => instruction.k as usize,
            0x15 | 0x25 | 0x35 => usize::from(instruction.jt.max(instruction.jf)),
            0x20 => {
                assert!(instruction.k < 64 && instruction.k % 4 == 0);
                0
            }
            0x54 => 0,
            other => panic!("code {other:#x}"),
        };
        assert!(at + 1 + furthest < code.len(), "a jump beyond the end");
    }
}

/// Runs a filter on one call as the kernel does.
fn run(code: &[Instruction], number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::from(number.to_le_bytes());
    data.extend(AUDIT_ARCH_X86_64.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    arguments.iter().for_each(|a| data.extend(a.to_le_bytes()));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let Instruction {
            code: op,
            jt,
            jf,
            k,
        } = code[at];
        at += 1;
        let branch = |yes: bool| usize::from(if yes { jt } else { jf });
        match op {
            0x20 => {
                let from = k as usize;
                accumulator = u32::from_le_bytes(data[from..from + 4].try_into().expect("a word"));
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            _ => return k,
        }
    }
}

fn holds(condition: &LinuxSeccompArg, arguments: [u64; 6]) -> bool {
    let (argument, value) = (arguments[condition.index()], condition.value());
    match condition.op() {
        Operator::ScmpCmpNe => argument != value,
        Operator::ScmpCmpLt => argument < value,
        Operator::ScmpCmpLe => argument <= value,
        Operator::ScmpCmpEq => argument == value,
        Operator::ScmpCmpGe => argument >= value,
        Operator::ScmpCmpGt => argument > value,
        Operator::ScmpCmpMaskedEq => {
            argument & value == condition.value_two().unwrap_or_default() & value
        }
    }
}

/// Whether the profile, read from top to bottom, lets a call through.
fn allows(profile: &LinuxSeccomp, number: Sysno, arguments: [u64; 6]) -> bool {
    let passes = |action| matches!(action, Action::ScmpActAllow | Action::ScmpActLog);
    let entries = || {
        let named = |entry: &&oci_spec::runtime::LinuxSyscall| {
            let is = |name: &String| Sysno::from_str(name) == Ok(number);
            entry.names().iter().any(is)
        };
        profile.syscalls().iter().flatten().filter(named)
    };
    let mut otherwise = profile.default_action();
    for entry in entries() {
        match entry.args() {
            Some(conditions) if !conditions.is_empty() => {}
            _ => otherwise = entry.action(),
        }
    }
    entries()
        .find(|entry| {
            let conditions = entry.args().as_deref().unwrap_or_default();
            !conditions.is_empty() && conditions.iter().all(|c| holds(c, arguments))
        })
        .map_or(passes(otherwise), |entry| passes(entry.action()))
}

fn check_profile(profile: &LinuxSeccomp) {
    let Ok(program) = Program::compile(profile) else {
        return;
    };
    let code = program.instructions();
    assert_eq!(program.bytes().len(), 8 * code.len());
    check_form(code);
    let conditions: Vec<LinuxSeccompArg> = profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(|entry| entry.args().clone().unwrap_or_default())
        // Rules for calls that this machine does not have are passed over.
        .filter(|condition| condition.index() < 6)
        .take(8)
        .collect();
    let mut calls = vec![[0; 6], [u64::MAX; 6]];
    for condition in &conditions {
        for value in [condition.value(), condition.value().wrapping_add(1)] {
            calls.push([value; 6]);
            let mut one = [0; 6];
            one[condition.index()] = value;
            calls.push(one);
        }
    }
    let names = profile.syscalls().iter().flatten().flat_map(|e| e.names());
    let named = names.filter_map(|name| Sysno::from_str(name).ok()).take(16);
    for number in named.chain([Sysno::read, Sysno::mount]) {
        for arguments in &calls {
            let answer = run(code, number as u32, *arguments);
            assert_eq!(
                (0x7ffc_0000..0x8000_0000).contains(&answer),
                allows(profile, number, *arguments),
                "{number} {arguments:x?}"
            );
        }
    }
}

fn check_location(text: &str) {
    let Ok(location) = Location::parse(text) else {
        return;
    };
    let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let hierarchies = Hierarchies::parse(mounts, "0::/\n").expect("one hierarchy");
    let cgroup = Cgroup::at(&hierarchies, &location);
    let below = cgroup
        .controller("memory")
        .expect("a directory")
        .strip_prefix("/sys/fs/cgroup")
        .expect("below the mount");
    assert!(
        below
            .components()
            .all(|c| matches!(c, std::path::Component::Normal(_)))
    );
}

fuzz_target!(|json: &[u8]| {
    let Ok(mut spec) = serde_json::from_slice::<Spec>(json) else {
        return;
    };
    if let Ok(setup) = leaf_setup(&spec) {
        assert!(setup.hostname.chars().count() <= 63);
        assert!(setup.seccomp.len().is_multiple_of(8));
        assert!(setup.env.iter().all(|(name, _)| !name.contains('=')));
        let bytes = postcard::to_stdvec(&setup).expect("a setup");
        assert_eq!(postcard::from_bytes::<LeafSetup>(&bytes), Ok(setup));
    }
    if let Some(linux) = spec.linux() {
        linux.seccomp().iter().for_each(check_profile);
        if let Some(path) = linux.cgroups_path() {
            check_location(&path.to_string_lossy());
        }
    }
    let _ = devices::all_allowed(&spec);
    if let Some(process) = spec.process_mut() {
        let limits = sock_sandbox::rlimits(process);
        assert_eq!(limits.len(), process.rlimits().iter().flatten().count());
        devices::forbid_making(process);
        assert!(!format!("{:?}", process.capabilities()).contains("Mknod"));
    }
});
