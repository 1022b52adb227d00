//! One error for the crate: the step that failed, on what, and why.

use std::path::Path;

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a sandbox could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{step} {subject}: {source}")]
    System {
        /// What was attempted: `mount`, `join network namespace`, ...
        step: &'static str,
        /// Path, process or value.
        subject: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The specification asks for something that is wrong or not supported.
    #[error("{field}: {reason}")]
    Spec {
        /// OCI field, such as `process.user.uid`.
        field: &'static str,
        /// The value and what to do about it.
        reason: String,
    },
    /// A container's child process reports what went wrong inside.
    #[error("{0}")]
    Child(String),
    /// systemd refused to make or change a scope.
    #[error("systemd: {step} {unit}: {reason}")]
    Systemd {
        /// Method called.
        step: &'static str,
        /// Scope or slice.
        unit: String,
        /// systemd's words.
        reason: String,
    },
}

impl Error {
    pub(crate) fn spec(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Spec {
            field,
            reason: reason.into(),
        }
    }
    /// The kernel's error number, if this came from a system call.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Adds step and subject to the error of a system call.
pub(crate) trait Step<T> {
    fn step(self, step: &'static str, subject: impl std::fmt::Display) -> Result<T>;
    fn at(self, step: &'static str, path: impl AsRef<Path>) -> Result<T>
    where
        Self: Sized,
    {
        self.step(step, path.as_ref().display())
    }
}

impl<T, E: Into<std::io::Error>> Step<T> for std::result::Result<T, E> {
    fn step(self, step: &'static str, subject: impl std::fmt::Display) -> Result<T> {
        self.map_err(|e| Error::System {
            step,
            subject: subject.to_string(),
            source: e.into(),
        })
    }
}
