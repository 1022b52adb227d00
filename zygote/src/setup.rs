//! What a forked process is to become, as sealed bytes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, write};
use sock_zygote_protocol::{LeafExtras, LeafSetup, ZygoteEntry};

use crate::error::{Error, Result};

/// A [`LeafSetup`] or a [`ZygoteEntry`] in a memory file that nobody can change: one serves every leaf of a pod, and none
/// of them can speak to the next through it.
#[derive(Debug)]
pub struct SealedSetup(OwnedFd);

impl SealedSetup {
    /// Writes and seals.
    ///
    /// # Errors
    /// [`Error::System`] when memory or descriptors run out.
    pub fn new(setup: &LeafSetup, extras: &LeafExtras) -> Result<SealedSetup> {
        let bytes = setup.to_bytes(extras).map_err(malformed("leaf"))?;
        sealed("sock-leaf-setup", &bytes).map(SealedSetup)
    }

    /// The same for a zygote that is forked from another.
    ///
    /// # Errors
    /// As above.
    pub fn of_zygote(entry: &ZygoteEntry) -> Result<SealedSetup> {
        let bytes = postcard::to_stdvec(entry).map_err(malformed("zygote"))?;
        sealed("sock-zygote-entry", &bytes).map(SealedSetup)
    }
}

fn malformed(peer: &'static str) -> impl FnOnce(postcard::Error) -> Error {
    move |error| Error::Wire {
        peer,
        source: sock_zygote_protocol::Error::Malformed(error),
    }
}

fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag; those after it may demand it (vm.memfd_noexec).
    let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(name, flags),
        other => other,
    }
    .map_err(Error::system("create the setup file (memfd_create)"))?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = match write(&file, rest) {
            Ok(0) => Err(Errno::IO),
            Err(Errno::INTR) => continue,
            other => other,
        };
        rest = &rest[written.map_err(Error::system("write the setup file (write)"))?..];
    }
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&file, seals).map_err(Error::system("seal the setup file (F_ADD_SEALS)"))?;
    Ok(file)
}

impl AsFd for SealedSetup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
