//! Children that somebody waits for, so that reaping orphans leaves them alone.

use std::cell::RefCell;
use std::collections::HashSet;

thread_local! {
    static EXPECTED: RefCell<HashSet<i32>> = RefCell::default();
}

/// Whether somebody waits for this child.
#[must_use]
pub fn expected(pid: i32) -> bool {
    EXPECTED.with_borrow(|e| e.contains(&pid))
}

/// A claim on a child, until dropped.
#[derive(Debug)]
pub struct Claim(i32);

impl Claim {
    /// Claims it.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        EXPECTED.with_borrow_mut(|e| e.insert(pid));
        Self(pid)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        EXPECTED.with_borrow_mut(|e| e.remove(&self.0));
    }
}
