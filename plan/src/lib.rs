//! Which PackageSets should descend from which: from what each costs to import, the tree of zygotes that takes least memory, and
//! within a budget the one that spares most import time (after SOCK, ATC '18, section 4.3).
//!
//! [`report`] says what was measured, [`shelf`] makes of it packages and sets, [`tree`] searches, [`budget`] gives up what is worth
//! least, [`proposal`] writes PackageSets and [`picture`] draws them. None of them asks a cluster; the program does that.

#![forbid(unsafe_code)]

pub mod budget;
pub mod picture;
pub mod proposal;
pub mod report;
pub mod shelf;
pub mod tree;
