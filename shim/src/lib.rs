//! What the shim does beyond containerd's task API: [`activation`] makes a Function's pod answer
//! requests, [`status`] tells what a pool's zygote has done. The binary wires them to containerd.

pub mod activation;
pub mod async_fd;
pub mod children;
pub mod container;
pub mod crash;
pub mod devices;
pub mod events;
pub mod features;
pub mod home;
pub mod import_tier;
pub mod locks;
pub mod log;
pub mod memory;
pub mod pod;
pub mod process;
pub mod reexec;
pub mod role;
pub mod serve;
pub mod service;
pub mod statistics;
pub mod status;
pub mod stdio;
pub mod task;
pub mod tenants;
pub mod uses;
