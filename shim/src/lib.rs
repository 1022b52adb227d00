//! What the shim does beyond containerd's task API: [`activation`] makes a Function's pod answer
//! requests, [`status`] tells what a pool's zygote has done. The binary wires them to containerd.

pub mod activation;
pub mod status;
