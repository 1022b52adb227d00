//! The tree of zygotes that takes least memory when everything that is asked for is imported.
//!
//! What several sets have in common may be imported once, in a zygote that they all descend from. Which such zygotes are worth it is
//! searched for by adding and removing one at a time, as long as that saves memory.

use std::collections::BTreeSet;

use fixedbitset::FixedBitSet;

use crate::shelf::{Set, Shelf};

/// Most zygotes above each other, the highest among them, as the shim allows.
pub const DEEPEST: usize = 8;

/// Memory in KiB of a zygote beside what it imports: the interpreter if it descends from nobody; of one that does, its holder, its page
/// tables, and the pages that counting references makes its own (docs/performance.md, "Trees").
#[derive(Clone, Copy, Debug)]
pub struct Overhead {
    /// Of one that descends from nobody.
    pub root: f64,
    /// Of one that descends from another.
    pub child: f64,
}

impl Default for Overhead {
    fn default() -> Overhead {
        Overhead {
            root: 12.0 * 1024.0,
            child: 8.0 * 1024.0,
        }
    }
}

/// A zygote.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// See [`Set::group`].
    pub group: usize,
    /// What is installed.
    pub lock: FixedBitSet,
    /// What it has imported, itself and by descent.
    pub warm: FixedBitSet,
    /// What it imports itself.
    pub own: FixedBitSet,
    /// The set whose zygote it is; none if it is there for its descendants only.
    pub set: Option<usize>,
    /// Place of the zygote that it descends from, always before its own.
    pub parent: Option<usize>,
}

/// Zygotes, each behind the one that it descends from.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tree {
    /// All of them.
    pub nodes: Vec<Node>,
}

/// What a zygote that is there for others would import and install.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Shared {
    group: usize,
    warm: FixedBitSet,
    lock: FixedBitSet,
}

/// More are not tried: sets that differ in every possible way have too many things in common.
const MOST_CANDIDATES: usize = 400;

/// Less memory than this, in KiB, is not worth another zygote.
const WORTH: f64 = 1024.0;

/// Searches for the tree of least memory.
#[must_use]
pub fn least_memory(shelf: &Shelf, overhead: Overhead) -> Tree {
    let mut left = candidates(shelf);
    let mut chosen: Vec<Shared> = Vec::new();
    let mut best = arrange(shelf, &chosen);
    let mut least = best.kib(shelf, overhead);
    loop {
        let mut step: Option<(f64, Tree, Vec<Shared>)> = None;
        let added = left.iter().map(|shared| {
            let mut chosen = chosen.clone();
            chosen.push(shared.clone());
            chosen
        });
        let removed = (0..chosen.len()).map(|place| {
            let mut chosen = chosen.clone();
            chosen.remove(place);
            chosen
        });
        for chosen in added.chain(removed) {
            let tree = arrange(shelf, &chosen);
            let kib = tree.kib(shelf, overhead);
            let before = step.as_ref().map_or(least - WORTH, |(kib, ..)| *kib);
            if kib < before {
                step = Some((kib, tree, chosen));
            }
        }
        let Some((kib, tree, now)) = step else {
            return best;
        };
        let all: BTreeSet<Shared> = left.into_iter().chain(chosen).collect();
        left = all.into_iter().filter(|one| !now.contains(one)).collect();
        (best, least, chosen) = (tree, kib, now);
    }
}

/// What two or more sets have in common.
fn candidates(shelf: &Shelf) -> Vec<Shared> {
    let mut found: BTreeSet<Shared> = BTreeSet::new();
    // What is common to some sets, and which those are.
    let mut fresh: Vec<(FixedBitSet, Vec<usize>)> = (0..shelf.sets.len())
        .map(|set| (shelf.sets[set].wanted.clone(), vec![set]))
        .collect();
    while !fresh.is_empty() && found.len() < MOST_CANDIDATES {
        let mut next = Vec::new();
        for (warm, of) in fresh {
            for (other, set) in shelf.sets.iter().enumerate() {
                if of.contains(&other) || set.group != shelf.sets[of[0]].group {
                    continue;
                }
                let mut of = of.clone();
                of.push(other);
                let common = common(shelf, &warm, &of);
                if common.is_clear() {
                    continue;
                }
                let shared = Shared {
                    group: set.group,
                    lock: set.installed(&common),
                    warm: common.clone(),
                };
                let takers = shelf.sets.iter().filter(|set| shared.suits(set));
                if takers.count() > 1 && found.len() < MOST_CANDIDATES && found.insert(shared) {
                    next.push((common, of));
                }
            }
        }
        fresh = next;
    }
    found.into_iter().collect()
}

/// As much of these packages as each of the sets wants, without those that load more in one of them than is left.
fn common(shelf: &Shelf, packages: &FixedBitSet, of: &[usize]) -> FixedBitSet {
    let mut common = packages.clone();
    loop {
        let before = common.count_ones(..);
        for set in of {
            common = shelf.sets[*set].closed(&common);
        }
        if common.count_ones(..) == before {
            return common;
        }
    }
}

impl Shared {
    fn suits(&self, set: &Set) -> bool {
        self.group == set.group && self.lock.is_subset(&set.lock) && set.takes(&self.warm)
    }
}

fn users<'a>(shelf: &'a Shelf, group: usize, warm: &FixedBitSet) -> impl Iterator<Item = &'a Set> {
    let warm = warm.clone();
    let of_group = shelf.sets.iter().filter(move |set| set.group == group);
    of_group.filter(move |set| warm.is_subset(&set.wanted))
}

/// Each set and each shared zygote below the one that spares it most memory.
fn arrange(shelf: &Shelf, shared: &[Shared]) -> Tree {
    let of_sets = shelf.sets.iter().enumerate().map(|(number, set)| Node {
        group: set.group,
        lock: set.lock.clone(),
        warm: set.wanted.clone(),
        own: set.wanted.clone(),
        set: Some(number),
        parent: None,
    });
    let of_others = shared.iter().map(|shared| Node {
        group: shared.group,
        lock: shared.lock.clone(),
        warm: shared.warm.clone(),
        own: shared.warm.clone(),
        set: None,
        parent: None,
    });
    let mut nodes: Vec<Node> = of_others.chain(of_sets).collect();
    nodes.sort_by_key(|node| (node.lock.count_ones(..), node.warm.count_ones(..), node.set));
    let mut depth = vec![1; nodes.len()];
    for place in 0..nodes.len() {
        let node = &nodes[place];
        let spared = |above: usize| shelf.kib(&nodes[above].warm);
        let above = (0..place)
            .filter(|above| depth[*above] < DEEPEST && may_descend(shelf, node, &nodes[*above]))
            .max_by(|a, b| spared(*a).total_cmp(&spared(*b)).then(b.cmp(a)));
        if let Some(above) = above {
            depth[place] = depth[above] + 1;
            let mut own = node.warm.clone();
            own.difference_with(&nodes[above].warm);
            nodes[place].own = own;
            nodes[place].parent = Some(above);
        }
    }
    Tree { nodes }
}

fn may_descend(shelf: &Shelf, node: &Node, above: &Node) -> bool {
    let fits = node.group == above.group
        && above.lock.is_subset(&node.lock)
        && above.warm.is_subset(&node.warm);
    fits && match node.set {
        Some(set) => shelf.sets[set].takes(&above.warm),
        None => users(shelf, node.group, &node.warm)
            .filter(|set| set.takes(&node.warm))
            .all(|set| set.takes(&above.warm)),
    }
}

impl Tree {
    /// The zygotes that are there already, `(set, what it imports or is to, place of what it extends)` each.
    #[must_use]
    pub fn of(shelf: &Shelf, there: &[(Option<usize>, FixedBitSet, Option<usize>)]) -> Tree {
        let mut placed: Vec<usize> = Vec::new();
        let mut nodes: Vec<Node> = Vec::new();
        while placed.len() < there.len() {
            let left = || (0..there.len()).filter(|one| !placed.contains(one));
            let ready = |one: &usize| there[*one].2.is_none_or(|above| placed.contains(&above));
            // Whoever comes back to itself descends from nobody.
            let Some(next) = left().find(ready).or_else(|| left().next()) else {
                break;
            };
            let (set, imports, above) = &there[next];
            let parent = above.and_then(|above| placed.iter().position(|one| *one == above));
            let (mut warm, mut own) = (imports.clone(), imports.clone());
            if let Some(parent) = parent {
                let above: &Node = &nodes[parent];
                own.difference_with(&above.warm);
                warm.union_with(&above.warm);
            }
            placed.push(next);
            nodes.push(Node {
                group: set.map_or(0, |set| shelf.sets[set].group),
                lock: set.map_or_else(|| imports.clone(), |set| shelf.sets[set].lock.clone()),
                warm,
                own,
                set: *set,
                parent,
            });
        }
        Tree { nodes }
    }

    /// Each set by itself.
    #[must_use]
    pub fn alone(shelf: &Shelf) -> Tree {
        let sets = shelf.sets.iter().enumerate();
        let there: Vec<_> = sets
            .map(|(number, set)| (Some(number), set.wanted.clone(), None))
            .collect();
        Tree::of(shelf, &there)
    }

    /// Memory of all zygotes, in KiB.
    #[must_use]
    pub fn kib(&self, shelf: &Shelf, overhead: Overhead) -> f64 {
        (0..self.nodes.len())
            .map(|place| self.kib_of(place, shelf, overhead))
            .sum()
    }

    /// What a zygote takes beside those that it descends from, in KiB.
    #[must_use]
    pub fn kib_of(&self, place: usize, shelf: &Shelf, overhead: Overhead) -> f64 {
        let node = &self.nodes[place];
        let beside = match node.parent {
            Some(_) => overhead.child,
            None => overhead.root,
        };
        // In part warm: the modules that others do not import are left out as well.
        let set = node.set.map(|set| &shelf.sets[set]);
        let more = set.filter(|set| set.wanted.is_subset(&node.warm));
        beside + shelf.kib(&node.own) + more.map_or(0.0, |set| set.more_kib)
    }

    /// Import time that a start of each set is spared, in milliseconds: the mean over Functions, and what there would be to spare.
    #[must_use]
    pub fn millis(&self, shelf: &Shelf) -> (f64, f64) {
        let (mut spared, mut all, mut weight) = (0.0, 0.0, 0.0);
        for node in &self.nodes {
            let Some(set) = node.set.map(|set| &shelf.sets[set]) else {
                continue;
            };
            let mut useful = node.warm.clone();
            useful.intersect_with(&set.wanted);
            let whole = set.wanted.is_subset(&useful);
            let more = if whole { set.more_millis } else { 0.0 };
            spared += set.weight * (shelf.millis(&useful) + more);
            all += set.weight * (shelf.millis(&set.wanted) + set.more_millis);
            weight += set.weight;
        }
        if weight == 0.0 {
            return (0.0, 0.0);
        }
        (spared / weight, all / weight)
    }

    /// Places of those that descend from this one, itself among them.
    #[must_use]
    pub fn below(&self, place: usize) -> Vec<usize> {
        let mut found = vec![place];
        for (next, node) in self.nodes.iter().enumerate().skip(place + 1) {
            if node.parent.is_some_and(|above| found.contains(&above)) {
                found.push(next);
            }
        }
        found
    }

    /// Places of those that descend directly from this one.
    pub fn children(&self, place: usize) -> impl Iterator<Item = usize> {
        let nodes = self.nodes.iter().enumerate();
        nodes
            .filter(move |(_, node)| node.parent == Some(place))
            .map(|(child, _)| child)
    }
}
