//! The shim's side of zygotes and leaves: brokering channels to a zygote, preparing the root a leaf
//! gets, forking, following a leaf through its states, and making sockets for it.
//!
//! A Function's shim goes this way:
//!
//! 1. [`attach`] finds a pool's broker and yields an [`Attachment`]: a [`ZygoteChannel`], the zygote's
//!    user namespace, and the user it maps.
//! 2. [`FunctionRoot::prepare`], once per pod and zygote, and [`FunctionRoot::clone_tree`] per leaf.
//! 3. [`SealedSetup::new`], once per pod.
//! 4. [`ZygoteChannel::fork`] → [`Arrived::setup`] → [`Confining`] (connections may be queued) →
//!    [`Confining::confined`] → [`Loading::ready`] → [`Leaf`].
//! 5. [`inject_sockets`] runs beside each leaf for as long as it lives.
//!
//! The shim of a pool uses [`Zygote::configure`] and [`Broker`]; that of a pool whose PackageSet extends another [`attach`],
//! [`ZygoteChannel::fork_zygote`] → [`Newborn`] → [`Entering`] → [`Zygote::configure_over`] before. Nothing here starts a process other
//! than the short-lived one of [`FunctionRoot::prepare`], and nothing knows Kubernetes.
//!
//! Whoever calls must be single-threaded where a function says so: `setns(2)` into a mount namespace
//! demands it.

mod broker;
mod channel;
mod descend;
mod error;
mod inject;
mod leaf;
mod patience;
mod peer;
mod root;
mod setup;
mod zygote;

pub use broker::{Attachment, Broker, Count, Look, attach};
pub use channel::Channel;
pub use descend::{Entering, EntryFds, Newborn};
pub use error::{Error, Result};
pub use inject::inject_sockets;
pub use leaf::{Arrived, Confining, Event, Leaf, Loading, SetupFds};
pub use root::FunctionRoot;
pub use setup::SealedSetup;
pub use sock_zygote_protocol as protocol;
pub use zygote::{ForkOrigin, Warm, Zygote, ZygoteChannel};
