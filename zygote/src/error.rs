use std::path::PathBuf;

use rustix::io::Errno;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a shim, a zygote and a leaf.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{step}: {errno}")]
    System {
        /// What was being done, with the call's name.
        step: &'static str,
        /// Why the kernel refused.
        errno: Errno,
    },
    /// A system call on a path failed.
    #[error("{step} {}: {errno}", path.display())]
    Path {
        /// What was being done, with the call's name.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why the kernel refused.
        errno: Errno,
    },
    /// The asynchronous runtime would not watch a descriptor.
    #[error("watch a descriptor: {0}")]
    Watch(std::io::Error),
    /// A packet did not get through, or was none.
    #[error("{peer}: {source}")]
    Wire {
        /// `zygote`, `leaf` or `broker`.
        peer: &'static str,
        /// What happened.
        source: sock_zygote_protocol::Error,
    },
    /// The peer's message does not fit the state of the conversation.
    #[error("{peer} said {said} when {expected} was due")]
    Unexpected {
        /// `zygote`, `leaf` or `broker`.
        peer: &'static str,
        /// Name of what came.
        said: &'static str,
        /// Name of what should have come.
        expected: &'static str,
    },
    /// The modules do not make a zygote.
    #[error("{}{message}", if module.is_empty() { String::new() } else { format!("{module}: ") })]
    Refused {
        /// The module at fault, may be empty.
        module: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// The zygote could not fork.
    #[error("the zygote did not fork: {0}")]
    ForkFailed(String),
    /// The leaf could not get ready.
    #[error("{message}")]
    LeafFailed {
        /// The line a person needs.
        message: String,
        /// The whole traceback.
        traceback: String,
    },
    /// The leaf is not the process that it must be.
    #[error("leaf: process {pid} {problem}")]
    Impostor {
        /// As the kernel translated it.
        pid: i32,
        /// What does not fit.
        problem: &'static str,
    },
}

impl Error {
    pub(crate) fn system(step: &'static str) -> impl FnOnce(Errno) -> Error {
        move |errno| Error::System { step, errno }
    }

    pub(crate) fn path(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(Errno) -> Error {
        let path = path.into();
        move |errno| Error::Path { step, path, errno }
    }

    /// Whether the peer is gone: its process ended, or it dropped this channel.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(
            self,
            Error::Wire {
                source: sock_zygote_protocol::Error::Closed,
                ..
            }
        )
    }
}

/// The errno inside an I/O error of the standard library.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
