//! What a container is for.

/// Decided at its creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The pod's sandbox: a holder, and no program.
    Sandbox,
    /// Any container.
    Plain,
}
