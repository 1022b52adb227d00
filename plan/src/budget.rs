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
        let now = tree.kib(shelf, overhead);
        if now <= kib {
            return Ok(tree);
        }
        let worst = loads(&tree, shelf)
            .into_iter()
            .min_by(|a, b| (a.worth().total_cmp(&b.worth())).then(a.spared.total_cmp(&b.spared)));
        let Some(worst) = worst else {
            return Err(TooSmall { least_kib: now });
        };
        for (place, packages) in &worst.given_up {
            tree.nodes[*place].own.difference_with(packages);
        }
        inherit(&mut tree);
        dissolve(&mut tree);
    }
}

/// A package that a zygote imports, and what else goes with it.
struct Load {
    given_up: Vec<(usize, FixedBitSet)>,
    kib: f64,
    /// Milliseconds, each as often as there are Functions.
    spared: f64,
}

impl Load {
    fn worth(&self) -> f64 {
        self.spared / self.kib.max(1.0)
    }
}

fn loads(tree: &Tree, shelf: &Shelf) -> Vec<Load> {
    let below: Vec<Vec<usize>> = (0..tree.nodes.len())
        .map(|place| tree.below(place))
        .collect();
    let weight: Vec<f64> = below
        .iter()
        .map(|below| {
            let sets = below.iter().filter_map(|place| tree.nodes[*place].set);
            sets.map(|set| shelf.sets[set].weight).sum()
        })
        .collect();
    let loads_it = |group: usize, package: usize, other: usize| {
        shelf.sets.iter().any(|set| {
            set.group == group
                && set
                    .loads
                    .get(&other)
                    .is_some_and(|loads| loads.contains(package))
        })
    };
    let mut found = Vec::new();
    for (place, node) in tree.nodes.iter().enumerate() {
        for package in node.own.ones() {
            let mut load = Load {
                given_up: Vec::new(),
                kib: 0.0,
                spared: 0.0,
            };
            for &other in &below[place] {
                let mut gone = shelf.none();
                for own in tree.nodes[other].own.ones() {
                    if (own == package && other == place) || loads_it(node.group, package, own) {
                        gone.insert(own);
                    }
                }
                load.kib += shelf.kib(&gone);
                load.spared += weight[other] * shelf.millis(&gone);
                if !gone.is_clear() {
                    load.given_up.push((other, gone));
                }
            }
            found.push(load);
        }
    }
    found
}

/// What is imported by descent, anew.
fn inherit(tree: &mut Tree) {
    for place in 0..tree.nodes.len() {
        let mut warm = tree.nodes[place].own.clone();
        if let Some(above) = tree.nodes[place].parent {
            warm.union_with(&tree.nodes[above].warm);
        }
        tree.nodes[place].warm = warm;
    }
}

/// Removes zygotes that are there for others and import nothing any more.
fn dissolve(tree: &mut Tree) {
    while let Some(place) = tree
        .nodes
        .iter()
        .position(|node| node.set.is_none() && node.own.is_clear())
    {
        let above = tree.nodes.remove(place).parent;
        for node in &mut tree.nodes {
            node.parent = match node.parent {
                Some(parent) if parent == place => above,
                Some(parent) if parent > place => Some(parent - 1),
                parent => parent,
            };
        }
    }
}
