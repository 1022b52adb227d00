//! Activation: what makes the pod of a Function answer.
