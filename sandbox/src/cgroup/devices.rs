//! Which devices may be opened and made in a cgroup: lists of version 1's controller, a program of version 2's
//! (`BPF_PROG_TYPE_CGROUP_DEVICE`, bpf(2); cgroup-v2.rst, "Device controller").

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::Step;
use crate::{Error, Result};

/// One rule: what it is about, and whether that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub allow: bool,
    /// `None`: devices of both kinds.
    pub kind: Option<Kind>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Of [`MAKE`], [`READ`], [`WRITE`].
    pub access: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Block,
    Character,
}

/// As the kernel has them (`BPF_DEVCG_ACC_*`, linux/bpf.h).
pub(super) const MAKE: u32 = 1;
pub(super) const READ: u32 = 2;
pub(super) const WRITE: u32 = 4;
const ALL: u32 = MAKE | READ | WRITE;

/// What every container has whatever the rules say (config-linux.md, "Default Devices"): null, zero, full, random, urandom, tty,
/// ptmx, terminals; and it may make any device file.
const ALWAYS: [(u32, Option<u32>); 8] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(2)),
    (136, None),
];

/// The rules of a specification, in their order, and those of every container. The last that speaks of a device and an access
/// counts. None where the specification has none.
///
/// # Errors
/// An access is none of `r`, `w` and `m`.
pub(super) fn rules(given: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for rule in given {
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(Kind::Block),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(Kind::Character),
            LinuxDeviceType::P => continue,
        };
        let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
        let text = rule.access().as_deref().unwrap_or("rwm");
        rules.push(Rule {
            allow: rule.allow(),
            kind,
            // Version 1's controller has no rule for both kinds of devices but that for all.
            major: kind.and(number(rule.major())),
            minor: kind.and(number(rule.minor())),
            access: access(text)?,
        });
    }
    if !rules.is_empty() {
        rules.extend(ALWAYS.map(|(major, minor)| Rule {
            allow: true,
            kind: Some(Kind::Character),
            major: Some(major),
            minor,
            access: ALL,
        }));
        rules.extend([Kind::Character, Kind::Block].map(|kind| Rule {
            allow: true,
            kind: Some(kind),
            major: None,
            minor: None,
            access: MAKE,
        }));
    }
    Ok(rules)
}

fn access(text: &str) -> Result<u32> {
    text.chars().try_fold(0, |access, letter| {
        Ok(access
            | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MAKE,
                _ => {
                    return Err(Error::spec(
                        "linux.resources.devices[].access",
                        format!("{text:?} is not made of r, w and m"),
                    ));
                }
            })
    })
}

impl Rule {
    /// The file that version 1 takes it by, and the line.
    pub(super) fn version_1(self) -> (&'static str, String) {
        let file = if self.allow {
            "devices.allow"
        } else {
            "devices.deny"
        };
        let Some(kind) = self.kind else {
            return (file, "a".to_owned());
        };
        let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let letters = [(READ, 'r'), (WRITE, 'w'), (MAKE, 'm')];
        let access: String = letters
            .iter()
            .filter(|(bit, _)| self.access & bit != 0)
            .map(|(_, letter)| letter)
            .collect();
        let kind = match kind {
            Kind::Block => 'b',
            Kind::Character => 'c',
        };
        let (major, minor) = (number(self.major), number(self.minor));
        (file, format!("{kind} {major}:{minor} {access}"))
    }
}

/// `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// linux/bpf.h and linux/bpf_common.h. All comparisons are of 32 bits, as all values are.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const SET: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const UNLESS_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const UNLESS_BITS: u8 = 0x46; // BPF_JMP32 | BPF_JSET | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// What is asked, of what, in registers: the result, the context, the kind, the access that no rule has allowed yet, the numbers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn with(code: u8, register: u8, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset: 0,
        immediate: immediate.cast_signed(),
    }
}

fn load(register: u8, offset: i16) -> Instruction {
    Instruction {
        code: LOAD_WORD,
        registers: register | CONTEXT << 4,
        offset,
        immediate: 0,
    }
}

fn answer(allowed: bool) -> [Instruction; 2] {
    [with(SET, RESULT, u32::from(allowed)), with(EXIT, 0, 0)]
}

/// The program: from the last rule to the first, one that denies any part of what is asked denies it, one that allows a part
/// leaves the rest to those before it. What no rule speaks of is denied.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    // `struct bpf_cgroup_dev_ctx`: access << 16 | kind, major, minor.
    let mut out = vec![
        load(KIND, 0),
        Instruction {
            code: MOVE,
            registers: ACCESS | KIND << 4,
            offset: 0,
            immediate: 0,
        },
        with(AND, KIND, 0xffff),
        with(SHIFT_RIGHT, ACCESS, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let kind = rule.kind.map(|kind| match kind {
            Kind::Block => 1,
            Kind::Character => 2,
        });
        let conditions: Vec<Instruction> = [(KIND, kind), (MAJOR, rule.major), (MINOR, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| Some(with(UNLESS_EQUAL, register, value?)))
            .collect();
        let mut consequence = Vec::new();
        if rule.allow {
            // Something is left: on to the rules before.
            consequence.push(with(AND, ACCESS, ALL & !rule.access));
            consequence.push(Instruction {
                offset: 2,
                ..with(UNLESS_EQUAL, ACCESS, 0)
            });
            consequence.extend(answer(true));
        } else {
            consequence.push(Instruction {
                offset: 1,
                ..with(UNLESS_BITS, ACCESS, rule.access)
            });
            consequence.push(Instruction {
                code: 0x05, // BPF_JMP | BPF_JA
                registers: 0,
                offset: 2,
                immediate: 0,
            });
            consequence.extend(answer(false));
        }
        let length = conditions.len() + consequence.len();
        let jumps = conditions
            .into_iter()
            .enumerate()
            .map(|(at, condition)| Instruction {
                // Over everything that is left of this rule.
                offset: i16::try_from(length - at - 1).unwrap_or(i16::MAX),
                ..condition
            });
        out.extend(jumps);
        out.extend(consequence);
    }
    out.extend(answer(false));
    out
}

/// A program that the kernel has taken.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// `bpf_attr` as the commands below take it: of 8 bytes each, which is how they lie.
type Attributes = [u64; 16];

fn bpf(command: libc::c_long, attributes: &mut Attributes) -> std::io::Result<RawFd> {
    // SAFETY: a whole bpf_attr; pointers in it are of what outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(RawFd::try_from(result).unwrap_or(-1))
}

fn number(fd: RawFd) -> u64 {
    u64::from(fd.unsigned_abs())
}

// Commands and kinds (linux/bpf.h).
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const PROG_QUERY: libc::c_long = 16;
const TYPE_CGROUP_DEVICE: u64 = 15;
const ATTACH_CGROUP_DEVICE: u64 = 6;
const ALLOW_MULTI: u64 = 2;

impl Program {
    /// Gives the kernel a program for these rules.
    ///
    /// # Errors
    /// It takes none: it is built without them, or this process may not (`CAP_BPF`).
    pub(super) fn load(rules: &[Rule]) -> Result<Program> {
        let instructions = program(rules);
        let mut attributes = Attributes::default();
        let count = u64::try_from(instructions.len()).unwrap_or(u64::MAX);
        attributes[0] = TYPE_CGROUP_DEVICE | count << 32;
        attributes[1] = instructions.as_ptr().addr() as u64;
        attributes[2] = c"Apache-2.0".as_ptr().addr() as u64;
        let fd = bpf(PROG_LOAD, &mut attributes).step("load", "a program for devices")?;
        // SAFETY: just made, owned by nobody else.
        Ok(Program(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Has it decide for a cgroup, in place of one that did so before.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn attach(&self, directory: &Path) -> Result<()> {
        let opened = File::open(directory).at("open", directory)?;
        let cgroup = number(opened.as_raw_fd());
        let before = attached(cgroup).at("ask for device programs of", directory)?;
        let mut attributes = Attributes::default();
        attributes[0] = cgroup | number(self.0.as_raw_fd()) << 32;
        attributes[1] = ATTACH_CGROUP_DEVICE | ALLOW_MULTI << 32;
        bpf(PROG_ATTACH, &mut attributes).at("attach a device program to", directory)?;
        for program in before {
            let mut attributes = Attributes::default();
            attributes[0] = cgroup | number(program.as_raw_fd()) << 32;
            attributes[1] = ATTACH_CGROUP_DEVICE;
            bpf(PROG_DETACH, &mut attributes).at("detach a device program of", directory)?;
        }
        Ok(())
    }
}

/// Programs that decide for a cgroup, not those of the ones above it.
fn attached(cgroup: u64) -> std::io::Result<Vec<OwnedFd>> {
    let mut ids = [0u32; 64];
    let mut attributes = Attributes::default();
    attributes[0] = cgroup | ATTACH_CGROUP_DEVICE << 32;
    // query_flags and attach_flags are 0.
    attributes[2] = ids.as_mut_ptr().addr() as u64;
    attributes[3] = 64;
    bpf(PROG_QUERY, &mut attributes)?;
    let count = usize::try_from(attributes[3] & 0xffff_ffff).unwrap_or(0);
    ids.iter()
        .take(count)
        .map(|id| {
            let mut attributes = Attributes::default();
            attributes[0] = u64::from(*id);
            let fd = bpf(PROG_GET_FD_BY_ID, &mut attributes)?;
            // SAFETY: just made, owned by nobody else.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })
        .collect()
}

/// Whether a cgroup has a program of its own.
pub(super) fn is_guarded(directory: &Path) -> bool {
    let found = File::open(directory).and_then(|cgroup| attached(number(cgroup.as_raw_fd())));
    found.is_ok_and(|programs| !programs.is_empty())
}

/// Whether the kernel is told by these rules which devices a container may open. On version 1 there are always some; on version 2
/// the kernel may have no programs, or this process may not give it any.
#[must_use]
pub fn can_be_guarded(unified: bool, given: &[LinuxDeviceCgroup]) -> bool {
    let loads = || rules(given).and_then(|rules| Program::load(&rules)).is_ok();
    !unified || (!given.is_empty() && loads())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// What the kernel makes of a program.
    fn run(program: &[Instruction], context: [u32; 3]) -> u32 {
        let mut registers = [0u32; 6];
        let mut at = 0;
        for _ in 0..=program.len() {
            let Instruction {
                code,
                registers: which,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(which & 15), usize::from(which >> 4));
            let immediate = immediate.cast_unsigned();
            let jumps = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset / 4).unwrap()];
                    false
                }
                MOVE => {
                    registers[to] = registers[from];
                    false
                }
                SET => {
                    registers[to] = immediate;
                    false
                }
                AND => {
                    registers[to] &= immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= immediate;
                    false
                }
                UNLESS_EQUAL => registers[to] != immediate,
                UNLESS_BITS => registers[to] & immediate != 0,
                0x05 => true,
                EXIT => return registers[0],
                other => panic!("{other:#x}"),
            };
            at += 1 + if jumps {
                usize::try_from(offset).unwrap()
            } else {
                0
            };
        }
        panic!("it does not end");
    }

    /// A plain reading: of each access asked for, the last rule that speaks of it counts.
    fn allowed(rules: &[Rule], kind: Kind, major: u32, minor: u32, access: u32) -> bool {
        [MAKE, READ, WRITE]
            .into_iter()
            .filter(|bit| access & bit != 0)
            .all(|bit| {
                let speaks = |rule: &&Rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|k| k == kind)
                        && rule.major.is_none_or(|n| n == major)
                        && rule.minor.is_none_or(|n| n == minor)
                };
                rules.iter().rfind(speaks).is_some_and(|rule| rule.allow)
            })
    }

    fn specified(rules: serde_json::Value) -> Vec<Rule> {
        super::rules(&serde_json::from_value::<Vec<_>>(rules).unwrap()).unwrap()
    }

    #[test]
    fn version_1_takes_them_as_lines() {
        let rules = specified(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": true, "type": "b", "access": "m"},
        ]));
        let lines: Vec<_> = rules.iter().map(|rule| rule.version_1()).collect();
        assert_eq!(lines[0], ("devices.deny", "a".into()));
        assert_eq!(lines[1], ("devices.allow", "c 10:229 rw".into()));
        assert_eq!(lines[2], ("devices.allow", "b *:* m".into()));
        assert_eq!(lines[3], ("devices.allow", "c 1:3 rwm".into()));
        assert_eq!(lines.len(), 13);
        assert_eq!(specified(json!([])), []);
    }

    #[test]
    fn an_access_that_is_none_is_named() {
        let rules = serde_json::from_value::<Vec<LinuxDeviceCgroup>>(
            json!([{"allow": true, "access": "rx"}]),
        );
        let error = rules
            .map(|rules| super::rules(&rules))
            .unwrap()
            .unwrap_err();
        assert!(
            error.to_string().contains("\"rx\" is not made of"),
            "{error}"
        );
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let kind = prop::option::of(prop_oneof![Just(Kind::Block), Just(Kind::Character)]);
        let number = || prop::option::of(0u32..3);
        (any::<bool>(), kind, number(), number(), 0u32..8).prop_map(
            |(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            },
        )
    }

    proptest! {
        #[test]
        fn a_program_decides_as_the_rules_read(rules in prop::collection::vec(any_rule(), 0..8)) {
            let program = program(&rules);
            for kind in [Kind::Block, Kind::Character] {
                for (major, minor) in [(0, 0), (0, 1), (1, 0), (2, 2), (u32::MAX, 1)] {
                    for access in 1..8 {
                        let number = if kind == Kind::Block { 1 } else { 2 };
                        let got = run(&program, [access << 16 | number, major, minor]);
                        prop_assert_eq!(got == 1, allowed(&rules, kind, major, minor, access));
                    }
                }
            }
        }
    }
}
