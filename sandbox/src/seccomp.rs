//! Compiles OCI seccomp profiles to BPF.
//!
//! A profile of some 400 system calls is mostly ranges with one answer. The program is a binary search over
//! those ranges, a dozen instructions deep, instead of a list that is walked: it loads in a fraction of the
//! time (the kernel tries every system call number on it at load to fill its bitmap of constant answers,
//! `seccomp_cache_prepare` in kernel/seccomp.c), and a leaf loads it at every fork.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Op,
};
use syscalls::Sysno;

use crate::error::Step;
use crate::{Error, Result};

/// One instruction of classic BPF: `struct sock_filter` of linux/filter.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if true.
    pub jt: u8,
    /// Instructions to skip if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

impl Instruction {
    /// Its eight bytes in memory order.
    #[must_use]
    pub fn bytes(self) -> [u8; 8] {
        let mut out = [0; 8];
        out[..2].copy_from_slice(&self.code.to_ne_bytes());
        out[2] = self.jt;
        out[3] = self.jf;
        out[4..].copy_from_slice(&self.k.to_ne_bytes());
        out
    }
}

// linux/bpf_common.h
const LD_W_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ: u16 = 0x15;
const JMP_JGT: u16 = 0x25;
const JMP_JGE: u16 = 0x35;
const ALU_AND: u16 = 0x54;
const RET: u16 = 0x06;
// offsets in struct seccomp_data (linux/seccomp.h)
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;
/// Of a system call.
const ARGUMENTS: usize = 6;
/// In one rule: six instructions each, which a jump of 8 bits spans.
const MOST_COMPARISONS: usize = 42;
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xC000_00B7;
/// Numbers from here on are the x32 ABI's on x86_64; no profile allows them.
const FIRST_FOREIGN: u32 = 0x4000_0000;

/// `SECCOMP_RET_ALLOW`.
const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_LOG`: this and above lets a call through.
const LOG: u32 = 0x7ffc_0000;
/// `SECCOMP_RET_ERRNO` with ENOSYS.
const DENY: u32 = 0x0005_0000 | 38;

fn value(action: Action, errno: Option<u32>) -> Result<u32> {
    let data = errno.unwrap_or(libc::EPERM.unsigned_abs()) & 0xffff;
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => 0x0000_0000,
        Action::ScmpActKillProcess => 0x8000_0000,
        Action::ScmpActTrap => 0x0003_0000,
        Action::ScmpActErrno => 0x0005_0000 | data,
        Action::ScmpActTrace => 0x7ff0_0000 | data,
        Action::ScmpActLog => LOG,
        Action::ScmpActAllow => 0x7fff_0000,
        Action::ScmpActNotify => {
            return Err(Error::spec(
                "linux.seccomp",
                "SCMP_ACT_NOTIFY needs an agent (listenerPath), which is not supported: use ERRNO or ALLOW",
            ));
        }
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    conditions: Vec<LinuxSeccompArg>,
    action: u32,
}

impl Rule {
    fn new(conditions: Vec<LinuxSeccompArg>, action: u32) -> Result<Self> {
        if let Some(bad) = conditions.iter().find(|c| c.index() >= ARGUMENTS) {
            return Err(Error::spec(
                "linux.seccomp",
                format!(
                    "a rule compares argument {}: a system call has 0 to 5",
                    bad.index()
                ),
            ));
        }
        let mut tests = Vec::new();
        for condition in &conditions {
            compare(condition, &mut tests);
        }
        // The first test that fails jumps over all the others.
        if tests.iter().map(Test::len).sum::<usize>() > usize::from(u8::MAX) {
            return Err(Error::spec(
                "linux.seccomp",
                format!(
                    "a rule has {} comparisons: give at most {MOST_COMPARISONS}",
                    conditions.len()
                ),
            ));
        }
        Ok(Self { conditions, action })
    }
}

/// What happens to one system call: conditional rules in order, then the last word.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    rules: Vec<Rule>,
    otherwise: u32,
}

/// The number of a system call, if this architecture has it.
fn number(name: &str) -> Option<u32> {
    let number = Sysno::from_str(name).ok()?;
    u32::try_from(number.id()).ok()
}

/// What a profile says of the system calls that it names.
fn verdicts(profile: &LinuxSeccomp) -> Result<BTreeMap<u32, Verdict>> {
    let default = value(profile.default_action(), profile.default_errno_ret())?;
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    for entry in profile.syscalls().iter().flatten() {
        let action = value(entry.action(), entry.errno_ret())?;
        let conditions = entry.args().clone().unwrap_or_default();
        for name in entry.names() {
            let Some(number) = number(name) else {
                continue;
            };
            let verdict = verdicts.entry(number).or_insert(Verdict {
                rules: Vec::new(),
                otherwise: default,
            });
            if conditions.is_empty() {
                verdict.otherwise = action;
            } else {
                verdict.rules.push(Rule::new(conditions.clone(), action)?);
            }
        }
    }
    Ok(verdicts)
}

/// A profile, compiled: ready for `seccomp(SECCOMP_SET_MODE_FILTER)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Vec<Instruction>);

impl Program {
    /// Compiles. System calls that this architecture does not have are passed over, as every profile
    /// names those of several.
    ///
    /// # Errors
    /// An action or a comparison that is not supported, or a rule of too many.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let default = value(profile.default_action(), profile.default_errno_ret())?;
        Ok(Self::assemble(&verdicts(profile)?, default))
    }

    /// Compiles what a profile says of some system calls, and allows all others: for a process that is held to the others
    /// already.
    ///
    /// # Errors
    /// As [`Program::compile`].
    pub fn compile_only<'a>(
        profile: &LinuxSeccomp,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        let default = value(profile.default_action(), profile.default_errno_ret())?;
        let mut verdicts = verdicts(profile)?;
        let numbers: BTreeSet<u32> = names.filter_map(number).collect();
        verdicts.retain(|number, _| numbers.contains(number));
        for number in numbers {
            verdicts.entry(number).or_insert(Verdict {
                rules: Vec::new(),
                otherwise: default,
            });
        }
        Ok(Self::assemble(&verdicts, ALLOW))
    }

    /// What the kernel answers to a system call of this architecture.
    #[must_use]
    pub fn answer(&self, number: u32, arguments: [u64; 6]) -> u32 {
        self.run(AUDIT_ARCH, number, arguments)
    }

    fn run(&self, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        // `struct seccomp_data`.
        let mut data = [number.to_ne_bytes(), architecture.to_ne_bytes()].concat();
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let words: Vec<u32> = data
            .as_chunks()
            .0
            .iter()
            .map(|word| u32::from_ne_bytes(*word))
            .collect();
        let (mut next, mut accumulator) = (0, 0);
        while let Some(instruction) = self.0.get(next) {
            let Instruction { code, jt, jf, k } = *instruction;
            next += 1;
            let branch = |holds: bool| usize::from(if holds { jt } else { jf });
            match code {
                LD_W_ABS => accumulator = words[k as usize / size_of::<u32>()],
                ALU_AND => accumulator &= k,
                JMP_JA => next += k as usize,
                JMP_JEQ => next += branch(accumulator == k),
                JMP_JGT => next += branch(accumulator > k),
                JMP_JGE => next += branch(accumulator >= k),
                RET => return k,
                // None other is made here.
                _ => break,
            }
        }
        libc::SECCOMP_RET_KILL_PROCESS
    }

    /// The instructions.
    #[must_use]
    pub fn instructions(&self) -> &[Instruction] {
        &self.0
    }

    /// As bytes, eight an instruction.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|i| i.bytes()).collect()
    }

    /// Installs it on the calling thread, for good. Needs `no_new_privs` or `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// `seccomp(2)` refused.
    pub fn load(&self) -> Result<()> {
        #[repr(C)]
        struct Filter {
            len: u16,
            filter: *const Instruction,
        }
        let len = u16::try_from(self.0.len())
            .map_err(|_| Error::spec("linux.seccomp", "the profile is too long"))?;
        let filter = Filter {
            len,
            filter: self.0.as_ptr(),
        };
        // SAFETY: points to `len` instructions that outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                &raw const filter,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error()).step("load", "seccomp profile")
        }
    }

    fn assemble(verdicts: &BTreeMap<u32, Verdict>, default: u32) -> Self {
        // A profile that allows what it does not name must not allow the same calls under other numbers.
        let foreign = if default >= LOG { DENY } else { default };
        let plain = Verdict {
            rules: Vec::new(),
            otherwise: default,
        };
        let abroad = Verdict {
            rules: Vec::new(),
            otherwise: foreign,
        };
        let mut ranges: Vec<(u32, Verdict)> = vec![(0, plain.clone())];
        let mut next = 0;
        for (&number, verdict) in verdicts {
            if number > next {
                ranges.push((next, plain.clone()));
            }
            ranges.push((number, verdict.clone()));
            next = number + 1;
        }
        ranges.push((next, plain));
        ranges.push((FIRST_FOREIGN, abroad));
        ranges.sort_by_key(|(from, _)| *from);
        // Of several at one number the last was pushed for a named call or its successor; equal neighbours merge.
        let mut merged: Vec<(u32, Verdict)> = Vec::new();
        for (from, verdict) in ranges {
            if merged.last().is_some_and(|(f, _)| *f == from) {
                merged.pop();
            }
            if merged.last().is_some_and(|(_, v)| *v == verdict) {
                continue;
            }
            merged.push((from, verdict));
        }
        let mut out = vec![
            Instruction {
                code: LD_W_ABS,
                jt: 0,
                jf: 0,
                k: ARCH,
            },
            Instruction {
                code: JMP_JEQ,
                jt: 1,
                jf: 0,
                k: AUDIT_ARCH,
            },
            Instruction {
                code: RET,
                jt: 0,
                jf: 0,
                k: foreign,
            },
            Instruction {
                code: LD_W_ABS,
                jt: 0,
                jf: 0,
                k: NR,
            },
        ];
        search(&merged, &mut out);
        Self(out)
    }
}

/// Code that finds the range of the number in the accumulator and answers.
fn search(ranges: &[(u32, Verdict)], out: &mut Vec<Instruction>) {
    if let [(_, verdict)] = ranges {
        for rule in &verdict.rules {
            check(rule, out);
        }
        out.push(Instruction {
            code: RET,
            jt: 0,
            jf: 0,
            k: verdict.otherwise,
        });
        return;
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    // Offsets of conditional jumps have 8 bits, those of an unconditional one 32.
    out.push(Instruction {
        code: JMP_JGE,
        jt: 0,
        jf: 1,
        k: right[0].0,
    });
    let jump = out.len();
    out.push(Instruction {
        code: JMP_JA,
        jt: 0,
        jf: 0,
        k: 0,
    });
    search(left, out);
    out[jump].k = u32::try_from(out.len() - jump - 1).unwrap_or(u32::MAX);
    search(right, out);
}

/// Code that answers with the rule's action if all its conditions hold, and falls through if not.
fn check(rule: &Rule, out: &mut Vec<Instruction>) {
    let mut code: Vec<Test> = Vec::new();
    for condition in &rule.conditions {
        compare(condition, &mut code);
    }
    // Each test is two or three instructions; `Fail` jumps lead behind the RET at the end.
    let length: usize = code.iter().map(Test::len).sum();
    let mut done = 0;
    for test in code {
        done += test.len();
        let fail = u8::try_from(length - done + 1).unwrap_or(u8::MAX);
        test.emit(fail, out);
    }
    out.push(Instruction {
        code: RET,
        jt: 0,
        jf: 0,
        k: rule.action,
    });
}

/// A comparison of one 32-bit half of an argument.
#[derive(Clone, Copy)]
struct Test {
    offset: u32,
    mask: u32,
    code: u16,
    k: u32,
    then: Way,
    otherwise: Way,
}

#[derive(Clone, Copy)]
enum Way {
    Next,
    /// Over this many instructions: the condition holds already.
    Skip(u8),
    Fail,
}

impl Test {
    fn len(&self) -> usize {
        2 + usize::from(self.mask != u32::MAX)
    }
    fn emit(self, fail: u8, out: &mut Vec<Instruction>) {
        out.push(Instruction {
            code: LD_W_ABS,
            jt: 0,
            jf: 0,
            k: self.offset,
        });
        if self.mask != u32::MAX {
            out.push(Instruction {
                code: ALU_AND,
                jt: 0,
                jf: 0,
                k: self.mask,
            });
        }
        let way = |w: Way| match w {
            Way::Next => 0,
            Way::Skip(n) => n,
            Way::Fail => fail,
        };
        out.push(Instruction {
            code: self.code,
            jt: way(self.then),
            jf: way(self.otherwise),
            k: self.k,
        });
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the two halves of 64 bits")]
fn compare(condition: &LinuxSeccompArg, out: &mut Vec<Test>) {
    // Little endian on both architectures: the low half comes first.
    let low_offset = ARGS + 8 * condition.index() as u32;
    let high_offset = low_offset + 4;
    let (mut mask, mut want) = (u64::MAX, condition.value());
    if condition.op() == Op::ScmpCmpMaskedEq {
        mask = condition.value();
        want = condition.value_two().unwrap_or_default() & mask;
    }
    let high = |code, then, otherwise| Test {
        offset: high_offset,
        mask: (mask >> 32) as u32,
        code,
        k: (want >> 32) as u32,
        then,
        otherwise,
    };
    let low = |code, then, otherwise| Test {
        offset: low_offset,
        mask: mask as u32,
        code,
        k: want as u32,
        then,
        otherwise,
    };
    // A test of the low half behind one of the high half is two instructions long (no mask there).
    match condition.op() {
        Op::ScmpCmpEq | Op::ScmpCmpMaskedEq => {
            out.push(high(JMP_JEQ, Way::Next, Way::Fail));
            out.push(low(JMP_JEQ, Way::Next, Way::Fail));
        }
        Op::ScmpCmpNe => {
            out.push(high(JMP_JEQ, Way::Next, Way::Skip(2)));
            out.push(low(JMP_JEQ, Way::Fail, Way::Next));
        }
        Op::ScmpCmpGt | Op::ScmpCmpGe => {
            let last = if condition.op() == Op::ScmpCmpGt {
                JMP_JGT
            } else {
                JMP_JGE
            };
            out.push(high(JMP_JGT, Way::Skip(4), Way::Next));
            out.push(high(JMP_JEQ, Way::Next, Way::Fail));
            out.push(low(last, Way::Next, Way::Fail));
        }
        Op::ScmpCmpLt | Op::ScmpCmpLe => {
            let last = if condition.op() == Op::ScmpCmpLt {
                JMP_JGE
            } else {
                JMP_JGT
            };
            out.push(high(JMP_JGT, Way::Fail, Way::Next));
            out.push(high(JMP_JEQ, Way::Next, Way::Skip(2)));
            out.push(low(last, Way::Fail, Way::Next));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSyscallBuilder};
    use proptest::prelude::*;

    fn run(program: &Program, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        program.run(arch, nr, args)
    }

    fn holds(c: &LinuxSeccompArg, args: [u64; 6]) -> bool {
        let (a, v) = (args[c.index()], c.value());
        match c.op() {
            Op::ScmpCmpNe => a != v,
            Op::ScmpCmpLt => a < v,
            Op::ScmpCmpLe => a <= v,
            Op::ScmpCmpEq => a == v,
            Op::ScmpCmpGe => a >= v,
            Op::ScmpCmpGt => a > v,
            Op::ScmpCmpMaskedEq => a & v == c.value_two().unwrap_or_default() & v,
        }
    }

    fn condition() -> impl Strategy<Value = LinuxSeccompArg> {
        let number = prop_oneof![
            0u64..4,
            Just(u64::from(u32::MAX)),
            Just(1 << 32),
            Just((1 << 32) + 1),
            any::<u64>()
        ];
        let op = prop::sample::select(vec![
            Op::ScmpCmpNe,
            Op::ScmpCmpLt,
            Op::ScmpCmpLe,
            Op::ScmpCmpEq,
            Op::ScmpCmpGe,
            Op::ScmpCmpGt,
            Op::ScmpCmpMaskedEq,
        ]);
        (0usize..6, number.clone(), number, op).prop_map(|(i, v, w, op)| {
            LinuxSeccompArgBuilder::default()
                .index(i)
                .value(v)
                .value_two(w)
                .op(op)
                .build()
                .unwrap()
        })
    }

    #[test]
    fn what_a_profile_allows_by_default_it_does_not_under_other_numbers() {
        let profile = LinuxSeccompBuilder::default()
            .default_action(Action::ScmpActAllow)
            .build()
            .unwrap();
        let program = Program::compile(&profile).unwrap();
        assert_eq!(run(&program, AUDIT_ARCH, 1, [0; 6]), 0x7fff_0000);
        assert_eq!(run(&program, AUDIT_ARCH, FIRST_FOREIGN + 1, [0; 6]), DENY);
        assert_eq!(run(&program, 0x4000_0003, 1, [0; 6]), DENY);
    }

    fn one_rule(conditions: Vec<LinuxSeccompArg>) -> LinuxSeccomp {
        let call = LinuxSyscallBuilder::default()
            .names(vec!["clone".to_string()])
            .args(conditions)
            .action(Action::ScmpActAllow)
            .build()
            .unwrap();
        LinuxSeccompBuilder::default()
            .default_action(Action::ScmpActErrno)
            .syscalls(vec![call])
            .build()
            .unwrap()
    }

    fn equal(index: usize, value: u64) -> LinuxSeccompArg {
        LinuxSeccompArgBuilder::default()
            .index(index)
            .value(value)
            .op(Op::ScmpCmpEq)
            .build()
            .unwrap()
    }

    #[test]
    fn a_seventh_argument_is_refused() {
        for index in [6, usize::MAX, 1 << 29] {
            let error = Program::compile(&one_rule(vec![equal(index, 0)])).unwrap_err();
            assert!(error.to_string().contains("argument"), "{error}");
        }
    }

    #[test]
    fn a_rule_too_long_for_its_jumps_lets_nothing_through() {
        let mut conditions = vec![equal(0, 1)];
        conditions.extend(std::iter::repeat_n(equal(1, 0), 99));
        match Program::compile(&one_rule(conditions)) {
            Err(error) => assert!(error.to_string().contains("comparisons"), "{error}"),
            Ok(program) => {
                let answer = run(&program, AUDIT_ARCH, Sysno::clone as u32, [0; 6]);
                assert_eq!(answer, 0x0005_0001, "its first condition does not hold");
            }
        }
    }

    proptest! {
        #[test]
        fn every_profile_is_refused_or_ends_in_an_answer(
            conditions in prop::collection::vec((condition(), prop_oneof![9 => 0usize..6, 1 => any::<usize>()]), 0..60),
            args in prop::array::uniform6(prop_oneof![0u64..5, any::<u64>()]),
        ) {
            let conditions: Vec<_> = conditions.into_iter()
                .map(|(c, index)| LinuxSeccompArgBuilder::default().index(index).value(c.value()).value_two(c.value_two().unwrap_or_default()).op(c.op()).build().unwrap())
                .collect();
            if let Ok(program) = Program::compile(&one_rule(conditions.clone())) {
                let allowed = conditions.iter().all(|c| holds(c, args));
                let answer = run(&program, AUDIT_ARCH, Sysno::clone as u32, args);
                prop_assert_eq!(answer, if allowed { 0x7fff_0000 } else { 0x0005_0001 });
                // The kernel takes no jump beyond the end, and no end but an answer (bpf_check_classic, net/core/filter.c).
                let code = program.instructions();
                for (at, i) in code.iter().enumerate() {
                    let furthest = match i.code {
                        JMP_JA => i.k as usize,
                        JMP_JEQ | JMP_JGT | JMP_JGE => usize::from(i.jt.max(i.jf)),
                        RET => continue,
                        _ => 0,
                    };
                    prop_assert!(at + 1 + furthest < code.len());
                }
            }
        }

        #[test]
        fn a_program_answers_as_its_profile_says(
            conditional in prop::collection::vec((prop::collection::vec(condition(), 1..4), any::<bool>()), 0..5),
            plain in prop::collection::btree_set(prop::sample::select(vec!["read", "write", "open", "close", "mount", "personality"]), 0..6),
            args in prop::array::uniform6(prop_oneof![0u64..5, Just(1u64 << 32), any::<u64>()]),
            nr in 0u32..500,
        ) {
            let mut calls = Vec::new();
            if !plain.is_empty() {
                calls.push(LinuxSyscallBuilder::default().names(plain.iter().map(|s| (*s).to_string()).collect::<Vec<_>>()).action(Action::ScmpActAllow).build().unwrap());
            }
            for (conditions, log) in &conditional {
                calls.push(LinuxSyscallBuilder::default().names(vec!["clone".to_string()]).args(conditions.clone())
                    .action(if *log { Action::ScmpActLog } else { Action::ScmpActAllow }).build().unwrap());
            }
            let profile = LinuxSeccompBuilder::default().default_action(Action::ScmpActErrno).default_errno_ret(1u32).syscalls(calls).build().unwrap();
            let program = Program::compile(&profile).unwrap();
            let deny = 0x0005_0001;
            for nr in [nr, Sysno::clone as u32, Sysno::read as u32, Sysno::mount as u32, FIRST_FOREIGN] {
                let name = Sysno::new(nr as usize).map(|s| s.name()).unwrap_or("");
                let expected = if plain.contains(name) { 0x7fff_0000 } else if name == "clone" {
                    conditional.iter().find(|(c, _)| c.iter().all(|c| holds(c, args))).map_or(deny, |(_, log)| if *log { 0x7ffc_0000 } else { 0x7fff_0000 })
                } else { deny };
                prop_assert_eq!(run(&program, AUDIT_ARCH, nr, args), expected);
            }
            prop_assert_eq!(run(&program, 0x4000_0003, 1, args), deny);
        }
    }
}
