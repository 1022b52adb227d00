//! What a node keeps warm, and for how long.
//!
//! Decisions only: nothing here does anything, asks for the time, or knows what a leaf or a zygote is made of. Whoever asks gives
//! what was seen and when, so that days of arrivals can be decided on in seconds (`sock-bench simulate`).
//!
//! | decision | by |
//! |---|---|
//! | when an idle leaf is ended, and when one is made ahead of the next request | [`idle`]: [`Idle`] |
//! | how many spares a zygote keeps | [`spares`] |
//! | which leaves end when there is too little memory | [`pressure::idle_while_short`] |
//! | which zygotes end when there is too little memory, and which may come back | [`pressure::zygotes`], [`pressure::may_begin`] |

#![forbid(unsafe_code)]

pub mod histogram;
pub mod idle;
pub mod pressure;
pub mod rate;
pub mod spares;

pub use histogram::Histogram;
pub use idle::{BreakEven, Fixed, Ghosts, HybridHistogram, Idle, Plan, Seen};
pub use rate::Rate;
