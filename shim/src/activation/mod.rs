//! Activation: what makes the pod of a Function answer.

pub mod decide;
