//! The seccomp filter that hands `socket(2)` of networked families to the shim, and the loading of
//! filters.

use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;

// `AUDIT_ARCH_*` (linux/audit.h) and the number of socket(2).
#[cfg(target_arch = "x86_64")]
const CONVENTION: (u32, u32) = (0xC000_003E, 41);
#[cfg(target_arch = "aarch64")]
const CONVENTION: (u32, u32) = (0xC000_00B7, 198);
/// Set in the numbers of the x32 calls, which carry the architecture of the 64-bit ones (seccomp(2)).
const X32_BIT: u32 = 0x4000_0000;

// Offsets in `struct seccomp_data` (linux/seccomp.h); the low half of an argument comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// A filter as the kernel takes it.
pub struct Program(Vec<libc::sock_filter>);

impl Program {
    /// From the bytes of a profile: `struct sock_filter` in native byte order. `None` if they are no
    /// whole number of instructions, or more than the kernel takes (`BPF_MAXINSNS`).
    pub fn from_bytes(bytes: &[u8]) -> Option<Program> {
        let (instructions, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() || instructions.len() > 4096 {
            return None;
        }
        let read = |i: &[u8; 8]| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        };
        Some(Program(instructions.iter().map(read).collect()))
    }

    /// `socket` of `AF_INET`, `AF_INET6` and `AF_NETLINK` becomes a notification. A call in a foreign
    /// convention, whose numbers mean something else, does not exist.
    pub fn sockets() -> Program {
        let (architecture, socket) = CONVENTION;
        let families = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK].map(i32::cast_unsigned);
        Program(vec![
            load(ARCHITECTURE),
            jump_equal(architecture, 0, 8),
            load(NUMBER),
            // No other convention has numbers this high: on arm64 the test is never true.
            jump_at_least(X32_BIT, 6, 0),
            jump_equal(socket, 0, 4),
            load(FIRST_ARGUMENT),
            jump_equal(families[0], 4, 0),
            jump_equal(families[1], 3, 0),
            jump_equal(families[2], 2, 0),
            give(libc::SECCOMP_RET_ALLOW),
            give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
            give(libc::SECCOMP_RET_USER_NOTIF),
        ])
    }

    /// Loads it for this thread and all it will start. Needs `no_new_privs`.
    pub fn load(&self) -> Result<(), Errno> {
        self.install(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW).map(drop)
    }

    /// Loads it and yields the listener for its notifications.
    pub fn load_with_listener(&self) -> Result<OwnedFd, Errno> {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // With the flag, a signal does not interrupt a call whose socket is being made; before 5.19 it does.
        let fd = match self.install(flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
            Err(Errno::INVAL) => self.install(flags)?,
            other => other?,
        };
        // SAFETY: with NEW_LISTENER the call yields a new descriptor that belongs to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn install(&self, flags: libc::c_ulong) -> Result<i32, Errno> {
        let len = u16::try_from(self.0.len()).map_err(|_| Errno::TOOBIG)?;
        let program = libc::sock_fprog {
            len,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions from `filter`, which live in this vector.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        match i32::try_from(result) {
            Ok(fd) if fd >= 0 => Ok(fd),
            _ => Err(crate::confine::last_errno()),
        }
    }
}

// Codes of linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_RET|BPF_K.
const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

const fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: LOAD,
        jt: 0,
        jf: 0,
        k: offset,
    }
}

const fn jump_equal(value: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: JUMP_EQUAL,
        jt: yes,
        jf: no,
        k: value,
    }
}

const fn jump_at_least(value: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: JUMP_AT_LEAST,
        jt: yes,
        jf: no,
        k: value,
    }
}

const fn give(value: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: value,
    }
}
