//! The tree of zygotes that takes least memory when everything that is asked for is imported.
//!
//! What several sets have in common may be imported once, in a zygote that they all descend from. Which such zygotes are worth it is
//! searched for by adding and removing one at a time, as long as that saves memory.

use std::collections::BTreeMap;

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
#[derive(Clone, Debug, PartialEq)]
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
    /// Memory of what it imports itself, in KiB. Of a package that it has by descent, modules that only it imports count.
    pub kib: f64,
    /// Time of the same, in milliseconds.
    pub millis: f64,
}

/// Zygotes, each behind the one that it descends from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    /// All of them.
    pub nodes: Vec<Node>,
}

/// What a zygote that is there for others would import and install.
#[derive(Clone, Debug, PartialEq)]
struct Shared {
    warm: FixedBitSet,
    lock: FixedBitSet,
    /// What importing it takes for the set that imports most of it, in KiB.
    kib: f64,
}

/// More are made only of the best of those that were found until then.
const MOST_FOUND: usize = 1500;
/// Those that save most are tried, in each group of sets.
const MOST_TRIED: usize = 150;

/// Less memory than this, in KiB, is not worth another zygote.
const WORTH: f64 = 1024.0;

/// Searches for the tree of least memory. Groups of sets have nothing in common, and each has trees of its own.
#[must_use]
pub fn least_memory(shelf: &Shelf, overhead: Overhead) -> Tree {
    let mut all = Tree::default();
    for group in shelf.groups() {
        let first = all.nodes.len();
        let mut tree = of_group(shelf, group, overhead);
        for node in &mut tree.nodes {
            node.parent = node.parent.map(|above| above + first);
        }
        all.nodes.append(&mut tree.nodes);
    }
    all
}

fn of_group(shelf: &Shelf, group: usize, overhead: Overhead) -> Tree {
    let candidates = candidates(shelf, group, overhead);
    let mut chosen: Vec<usize> = Vec::new();
    let tree_of = |chosen: &[usize]| {
        let shared: Vec<&Shared> = chosen.iter().map(|one| &candidates[*one]).collect();
        arrange(shelf, group, &shared)
    };
    let mut best = tree_of(&chosen);
    let mut least = best.kib(overhead);
    loop {
        let mut step: Option<(f64, Tree, Vec<usize>)> = None;
        for one in 0..candidates.len() {
            let mut next = chosen.clone();
            match next.iter().position(|chosen| *chosen == one) {
                Some(place) => {
                    next.remove(place);
                }
                None => next.push(one),
            }
            let tree = tree_of(&next);
            let kib = tree.kib(overhead);
            if kib < step.as_ref().map_or(least - WORTH, |(kib, ..)| *kib) {
                step = Some((kib, tree, next));
            }
        }
        let Some((kib, tree, next)) = step else {
            return best;
        };
        (best, least, chosen) = (tree, kib, next);
    }
}

/// What two or more sets of a group have in common, those first that save most memory.
fn candidates(shelf: &Shelf, group: usize, overhead: Overhead) -> Vec<Shared> {
    let members: Vec<usize> = (0..shelf.sets.len())
        .filter(|set| shelf.sets[*set].group == group)
        .collect();
    let mut found: BTreeMap<FixedBitSet, (f64, Shared)> = BTreeMap::new();
    // What is common to some sets, and which those are.
    let mut fresh: Vec<(FixedBitSet, Vec<usize>)> = members
        .iter()
        .map(|set| (shelf.sets[*set].wanted.clone(), vec![*set]))
        .collect();
    while !fresh.is_empty() && found.len() < MOST_FOUND {
        let mut next: Vec<(f64, FixedBitSet, Vec<usize>)> = Vec::new();
        for (warm, of) in fresh {
            for &other in members.iter().filter(|other| !of.contains(other)) {
                let mut of = of.clone();
                of.push(other);
                let common = common(shelf, &warm, &of);
                if common.is_clear() || found.contains_key(&common) {
                    continue;
                }
                let lock = shelf.sets[other].installed(&common);
                let takers: Vec<&Set> = members
                    .iter()
                    .map(|set| &shelf.sets[*set])
                    .filter(|set| lock.is_subset(&set.lock) && set.takes(&common))
                    .collect();
                let most = |package: usize| {
                    takers
                        .iter()
                        .map(|set| set.kib[package])
                        .fold(0.0, f64::max)
                };
                let kib: f64 = common.ones().map(most).sum();
                let each: f64 = takers
                    .iter()
                    .flat_map(|set| common.ones().map(|package| set.kib[package]))
                    .sum();
                let saved = each - kib - overhead.child;
                if takers.len() < 2 || saved <= 0.0 {
                    continue;
                }
                let shared = Shared {
                    warm: common.clone(),
                    lock,
                    kib,
                };
                found.insert(common.clone(), (saved, shared));
                next.push((saved, common, of));
            }
        }
        next.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        next.truncate(MOST_TRIED);
        fresh = next.into_iter().map(|(_, warm, of)| (warm, of)).collect();
    }
    let mut found: Vec<(f64, Shared)> = found.into_values().collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.warm.cmp(&b.1.warm)));
    found.truncate(MOST_TRIED);
    found.into_iter().map(|(_, shared)| shared).collect()
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

/// Each set and each shared zygote below the one that spares it most memory.
fn arrange(shelf: &Shelf, group: usize, shared: &[&Shared]) -> Tree {
    let of_sets = shelf
        .sets
        .iter()
        .enumerate()
        .filter(|(_, set)| set.group == group);
    let of_sets = of_sets.map(|(number, set)| {
        let kib = set.wanted.ones().map(|package| set.kib[package]).sum();
        (
            Node::new(set.group, &set.lock, &set.wanted, Some(number)),
            kib,
        )
    });
    let of_others = shared.iter().map(|shared| {
        (
            Node::new(group, &shared.lock, &shared.warm, None),
            shared.kib,
        )
    });
    let mut nodes: Vec<(Node, f64)> = of_others.chain(of_sets).collect();
    nodes.sort_by_key(|(node, _)| (node.lock.count_ones(..), node.warm.count_ones(..), node.set));
    let mut depth = vec![1; nodes.len()];
    for place in 0..nodes.len() {
        let above = (0..place)
            .filter(|above| {
                depth[*above] < DEEPEST && may_descend(shelf, &nodes[place].0, &nodes[*above].0)
            })
            .max_by(|a, b| nodes[*a].1.total_cmp(&nodes[*b].1).then(b.cmp(a)));
        if let Some(above) = above {
            depth[place] = depth[above] + 1;
            nodes[place].0.parent = Some(above);
        }
    }
    let mut tree = Tree {
        nodes: nodes.into_iter().map(|(node, _)| node).collect(),
    };
    tree.settle(shelf);
    tree
}

fn may_descend(shelf: &Shelf, node: &Node, above: &Node) -> bool {
    let fits = above.lock.is_subset(&node.lock) && above.warm.is_subset(&node.warm);
    // Sharing nothing but the interpreter would tie sets to each other for little.
    if !fits || above.warm.is_clear() {
        return false;
    }
    // What one runs after its imports is not the others' wish.
    let warm_up = above.set.and_then(|set| shelf.sets[set].warm_up.as_ref());
    match node.set {
        Some(set) => {
            let set = &shelf.sets[set];
            set.takes(&above.warm) && (warm_up.is_none() || warm_up == set.warm_up.as_ref())
        }
        None => {
            let takers = shelf.sets.iter().filter(|set| {
                set.group == node.group && node.lock.is_subset(&set.lock) && set.takes(&node.warm)
            });
            warm_up.is_none() && { takers }.all(|set| set.takes(&above.warm))
        }
    }
}

impl Node {
    fn new(group: usize, lock: &FixedBitSet, warm: &FixedBitSet, set: Option<usize>) -> Node {
        Node {
            group,
            lock: lock.clone(),
            warm: warm.clone(),
            own: warm.clone(),
            set,
            parent: None,
            kib: 0.0,
            millis: 0.0,
        }
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
            let group = set.map_or(0, |set| shelf.sets[set].group);
            let lock = set.map_or(imports, |set| &shelf.sets[set].lock);
            let mut node = Node::new(group, lock, imports, *set);
            node.parent = above.and_then(|above| placed.iter().position(|one| *one == above));
            placed.push(next);
            nodes.push(node);
        }
        let mut tree = Tree { nodes };
        tree.settle(shelf);
        tree
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

    /// Works out what each zygote imports itself and what that takes, from what it is to have imported and whom it descends from.
    ///
    /// Who is there for others imports of each package as much as any of them does.
    pub(crate) fn settle(&mut self, shelf: &Shelf) {
        let none = || vec![(0.0, 0.0); shelf.packages.len()];
        let mut asked: Vec<Vec<(f64, f64)>> = vec![none(); self.nodes.len()];
        for place in (0..self.nodes.len()).rev() {
            let node = &self.nodes[place];
            if let Some(set) = node.set.map(|set| &shelf.sets[set]) {
                for package in node.warm.ones() {
                    asked[place][package] = (set.kib[package], set.millis[package]);
                }
            }
            if let Some(above) = node.parent.filter(|above| self.nodes[*above].set.is_none()) {
                let (before, after) = asked.split_at_mut(place);
                for package in self.nodes[above].warm.ones() {
                    if after[0][package].0 > before[above][package].0 {
                        before[above][package] = after[0][package];
                    }
                }
            }
        }
        for place in 0..self.nodes.len() {
            let mut node = self.nodes[place].clone();
            let mut have = none();
            node.own = node.warm.clone();
            if let Some(above) = node.parent {
                have = asked[above].clone();
                let warm = &self.nodes[above].warm;
                node.own.difference_with(warm);
                node.warm.union_with(warm);
            }
            (node.kib, node.millis) = (0.0, 0.0);
            for package in node.warm.ones() {
                let (kib, millis) = asked[place][package];
                node.kib += (kib - have[package].0).max(0.0);
                node.millis += (millis - have[package].1).max(0.0);
                have[package] = (kib.max(have[package].0), millis.max(have[package].1));
            }
            asked[place] = have;
            self.nodes[place] = node;
        }
    }

    /// Memory of all zygotes, in KiB.
    #[must_use]
    pub fn kib(&self, overhead: Overhead) -> f64 {
        (0..self.nodes.len())
            .map(|place| self.kib_of(place, overhead))
            .sum()
    }

    /// What a zygote takes beside those that it descends from, in KiB.
    #[must_use]
    pub fn kib_of(&self, place: usize, overhead: Overhead) -> f64 {
        let node = &self.nodes[place];
        let beside = match node.parent {
            Some(_) => overhead.child,
            None => overhead.root,
        };
        beside + node.kib
    }

    /// Import time that a start of each set is spared, in milliseconds: the mean over Functions, and what there would be to spare.
    #[must_use]
    pub fn millis(&self, shelf: &Shelf) -> (f64, f64) {
        let (mut spared, mut all, mut weight) = (0.0, 0.0, 0.0);
        for node in &self.nodes {
            let Some(set) = node.set.map(|set| &shelf.sets[set]) else {
                continue;
            };
            let millis = |package: usize| set.millis[package];
            let warm = |package: &usize| node.warm.contains(*package);
            spared += set.weight * set.wanted.ones().filter(warm).map(millis).sum::<f64>();
            all += set.weight * set.wanted.ones().map(millis).sum::<f64>();
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
