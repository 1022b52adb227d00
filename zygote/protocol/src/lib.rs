//! Messages between the shim, a zygote and its leaves, and how they travel.
//!
//! Every channel is a `SOCK_SEQPACKET` Unix socket: one message is one packet, and descriptors ride
//! with the message that names them (`SCM_RIGHTS`, unix(7)). A zygote and a leaf run tenants' code, so
//! whoever receives from one treats the packet as hostile: sizes are bounded, an undecodable packet is
//! an error, never a panic, and surplus descriptors are closed.
//!
//! This crate holds the wire only. It starts no process and knows neither Python nor containerd.

mod message;
mod wire;

pub use message::{
    Attached, Counted, FdRole, FromLeaf, FromZygote, LeafExtras, LeafSetup, ModuleImport, Phase,
    Rlimit, ToLeaf, ToZygote, ZygoteEntry, ZygoteFd, ZygoteSetup,
};
pub use wire::{Credentials, Error, MAX_FDS, MAX_MESSAGE, Received, pair, receive, send};
