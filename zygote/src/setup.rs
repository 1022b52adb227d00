//! The Function's part of a leaf, as sealed bytes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, write};
use sock_zygote_protocol::{LeafExtras, LeafSetup};

use crate::error::{Error, Result};

/// A [`LeafSetup`] in a memory file that nobody can change: one serves every leaf of a pod, and none
/// of them can speak to the next through it.
#[derive(Debug)]
pub struct SealedSetup(OwnedFd);

impl SealedSetup {
    /// Writes and seals.
    ///
    /// # Errors
    /// [`Error::System`] when memory or descriptors run out.
    pub fn new(setup: &LeafSetup, extras: &LeafExtras) -> Result<SealedSetup> {
        let bytes = setup.to_bytes(extras).map_err(|e| Error::Wire {
            peer: "leaf",
            source: sock_zygote_protocol::Error::Malformed(e),
        })?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag; those after it may demand it (vm.memfd_noexec).
        let file = match memfd_create("sock-leaf-setup", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create("sock-leaf-setup", flags),
            other => other,
        }
        .map_err(Error::system("create the setup file (memfd_create)"))?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match write(&file, rest) {
                Ok(0) => {
                    return Err(Error::System {
                        step: "write the setup file (write)",
                        errno: Errno::IO,
                    });
                }
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::System {
                        step: "write the setup file (write)",
                        errno,
                    });
                }
            }
        }
        fcntl_add_seals(
            &file,
            SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
        )
        .map_err(Error::system("seal the setup file (F_ADD_SEALS)"))?;
        Ok(SealedSetup(file))
    }
}

impl AsFd for SealedSetup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
