//! Gives up imports until the zygotes fit into a budget: always what spares least time for its memory.

use fixedbitset::FixedBitSet;

use crate::shelf::Shelf;
use crate::tree::{Overhead, Tree};

/// Why nothing fits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TooSmall {
    /// What the zygotes take that import nothing, in KiB.
    pub least_kib: f64,
}

/// Makes the tree fit into so many KiB.
///
/// # Errors
/// It does not even if nothing is imported.
pub fn fit(mut tree: Tree, shelf: &Shelf, overhead: Overhead, kib: f64) -> Result<Tree, TooSmall> {
    loop {
        let now = tree.kib(overhead);
        if now <= kib {
            return Ok(tree);
        }
        let spared = tree.millis(shelf).0;
        let mut worst: Option<((f64, f64), Tree)> = None;
        for place in 0..tree.nodes.len() {
            for package in tree.nodes[place].own.ones() {
                let without = without(&tree, shelf, place, package);
                let freed = now - without.kib(overhead);
                let cost = spared - without.millis(shelf).0;
                // Of those that are worth the same, what spares least in all.
                let worth = (cost / freed.max(1.0), cost);
                if worst.as_ref().is_none_or(|(least, _)| worth < *least) {
                    worst = Some((worth, without));
                }
            }
        }
        let Some((_, without)) = worst else {
            return Err(TooSmall { least_kib: now });
        };
        tree = without;
    }
}

/// The tree without a package that a zygote imports, and without what loads it there and below.
fn without(tree: &Tree, shelf: &Shelf, place: usize, package: usize) -> Tree {
    let mut tree = tree.clone();
    let below = tree.below(place);
    let group = tree.nodes[place].group;
    let mut gone = shelf.none();
    gone.insert(package);
    for set in shelf.sets.iter().filter(|set| set.group == group) {
        let loading = set
            .loads
            .iter()
            .filter(|(_, loads)| loads.contains(package));
        gone.extend(loading.map(|(other, _)| *other));
    }
    // What each imports itself: the rest follows from that.
    let mut own: Vec<FixedBitSet> = tree.nodes.iter().map(|node| node.own.clone()).collect();
    for &other in &below {
        own[other].difference_with(&gone);
    }
    for (other, own) in own.into_iter().enumerate() {
        let above = tree.nodes[other]
            .parent
            .map(|above| tree.nodes[above].warm.clone());
        let above = above.unwrap_or_else(|| shelf.none());
        let mut warm = own;
        warm.union_with(&above);
        // A set names modules, and has what they load, or not.
        if let Some(set) = tree.nodes[other].set.map(|set| &shelf.sets[set]) {
            let mut kept = above.clone();
            for loads in set.imports.iter().filter(|loads| loads.is_subset(&warm)) {
                kept.union_with(loads);
            }
            warm = kept;
        }
        tree.nodes[other].warm = warm;
    }
    tree.settle(shelf);
    dissolve(&mut tree, shelf);
    tree
}

/// Removes zygotes that are there for others and import nothing any more.
fn dissolve(tree: &mut Tree, shelf: &Shelf) {
    let empty = |tree: &Tree| {
        let mut nodes = tree.nodes.iter();
        nodes.position(|node| node.set.is_none() && node.own.is_clear())
    };
    let mut changed = false;
    while let Some(place) = empty(tree) {
        let above = tree.nodes.remove(place).parent;
        for node in &mut tree.nodes {
            node.parent = match node.parent {
                Some(parent) if parent == place => above,
                Some(parent) if parent > place => Some(parent - 1),
                parent => parent,
            };
        }
        changed = true;
    }
    if changed {
        tree.settle(shelf);
    }
}
