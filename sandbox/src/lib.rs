//! Lean sandboxes on Linux: namespaces, root file systems, cgroups, capabilities, seccomp, and the
//! processes inside them, after OCI's runtime specification.
//!
//! A container's first process is made in two halves. [`launch()`] starts a child that waits; the caller puts it into
//! its [`cgroup`], lets it build its root, and starts the program when told to. All of it
//! runs in a process with one thread: the child goes on in Rust after the fork.
//!
//! This crate knows nothing of containerd, Kubernetes or Python.

mod capability;
pub mod cgroup;
mod error;
mod holder;
pub mod hook;
mod init;
pub mod launch;
pub mod namespace;
mod rlimit;
pub mod root;
mod schedule;
pub mod seccomp;
mod timeline;
pub mod users;

pub use error::{Error, Result};
pub use holder::{HolderKind, holder_program};
pub use launch::{
    ExecPlan, Launched, Outer, Plan, Program, Progress, Stdio, UserMapping, exec, launch,
};
pub use rlimit::rlimits;
pub use timeline::{Timed, Timeline};
