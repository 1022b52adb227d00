//! The holder's program, and holders that stand for themselves (a zygote's namespaces).

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::Result;
use crate::error::Step;

/// A kilobyte of machine code, see `holder/holder.rs`.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/holder"));

/// When a holder ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolderKind {
    /// At SIGTERM.
    Pod,
    /// After SIGTERM, with the last of its descendants.
    Descendants,
}

/// A sealed file with the holder's program. `/proc/PID/exe` of a holder leads here and to nothing of the host's
/// (CVE-2019-5736 is the lesson). One per process: the pages are shared by all holders started from it.
///
/// # Errors
/// The process is out of descriptors or memory.
pub fn holder_program() -> Result<OwnedFd> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    if FILE.get().is_none() {
        let fd = memfd_create(
            "sock-holder",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .step("make", "holder program")?;
        let mut file = std::fs::File::from(fd);
        file.write_all(PROGRAM).step("write", "holder program")?;
        let fd = OwnedFd::from(file);
        // Executable and not readable: whoever runs it is not dumpable, so a process of the same user cannot trace it
        // (would_dump, fs/exec.c) and so become one without a filter.
        rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(0o111))
            .step("protect", "holder program")?;
        fcntl_add_seals(
            &fd,
            SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
        )
        .step("seal", "holder program")?;
        let _ = FILE.set(fd);
    }
    let fd = FILE
        .get()
        .ok_or_else(|| crate::Error::spec("holder", "no program"))?;
    fd.try_clone().step("duplicate", "holder program")
}
