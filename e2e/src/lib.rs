//! Drives a cluster as a user would, with `kubectl`, and looks at its nodes as an administrator would.
//!
//! The tests in `tests/` need the cluster that `make install` makes; `e2e/cluster/env` says where it is.

pub mod attempts;
mod client;
mod cluster;
mod inventory;
pub mod manifest;
mod namespace;
mod node;
mod wait;

pub use client::{Answer, Client, Load};
pub use cluster::{apply, built, get, has_event, kubectl, kubectl_with, program};
pub use inventory::{
    Inventory, inventory, inventory_of_quiet, until_as_before, until_as_much,
    until_other_tests_are_gone,
};
pub use namespace::{Namespace, Security, in_namespace, in_namespace_of};
pub use node::{Node, Process, is_of_pod, workers};
pub use wait::{MINUTE, until};
