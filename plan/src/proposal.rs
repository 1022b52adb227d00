//! A tree as PackageSets.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sock_crds::{Extends, PackageSetSpec, Requirements};

use crate::report::Package;
use crate::shelf::{Shelf, Wish};
use crate::tree::Tree;

/// Label of PackageSets that are there for their descendants only: a later plan may change or remove them.
pub const PLANNED: &str = "sock.dev/planned";

/// Annotation of PackageSets of which a plan gave up imports: JSON with what was `wished` and what is `planned`.
pub const GIVEN_UP: &str = "sock.dev/planned-imports";

/// What a plan that gave up imports did, so that the next one knows what is asked for.
#[derive(Debug, Deserialize, Serialize)]
struct GivenUp {
    /// What was asked for.
    wished: Vec<String>,
    /// What the plan left in the spec.
    planned: Vec<String>,
}

/// The imports that are asked for: those of the spec, or if they are what a plan left, those that it found.
#[must_use]
pub fn wished_imports(
    annotations: &BTreeMap<String, String>,
    spec: &PackageSetSpec,
) -> Vec<String> {
    let given_up = annotations
        .get(GIVEN_UP)
        .and_then(|text| serde_json::from_str(text).ok());
    match given_up {
        Some(GivenUp { wished, planned }) if planned == spec.imports => wished,
        _ => spec.imports.clone(),
    }
}

/// A PackageSet as it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its spec.
    pub spec: PackageSetSpec,
    /// What an `apply` would do.
    pub change: Change,
}

/// What becomes of a PackageSet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// It is made.
    New,
    /// It is changed.
    Changed,
    /// It stays as it is.
    Same,
}

/// A PackageSet that an earlier plan made.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its spec.
    pub spec: PackageSetSpec,
}

/// The PackageSets of a tree, in the order of its zygotes, so that each comes after what it extends.
///
/// `taken` holds namespaces and names that new ones may not have. What is among `planned` keeps its name.
#[must_use]
pub fn proposals(
    tree: &Tree,
    shelf: &Shelf,
    wishes: &[Wish],
    planned: &[Planned],
    taken: &BTreeSet<(String, String)>,
) -> Vec<Proposal> {
    let mut taken = taken.clone();
    let mut made: Vec<Proposal> = Vec::new();
    for (place, node) in tree.nodes.iter().enumerate() {
        let extends = node.parent.map(|above| Extends {
            name: made[above].name.clone(),
        });
        let proposal = match node.set {
            Some(set) => of_set(
                &wishes[set],
                imports_of(tree, shelf, wishes, place),
                extends,
            ),
            None => {
                let below = tree.below(place);
                let mut sets = below.iter().filter_map(|below| tree.nodes[*below].set);
                // It was made of what sets have in common.
                let Some(like) = sets.next().map(|set| &wishes[set]) else {
                    continue;
                };
                let lines = node
                    .lock
                    .ones()
                    .map(|number| shelf.packages[number].line.clone());
                let spec = PackageSetSpec {
                    requirements: Some(Requirements {
                        lines: Some(lines.collect()),
                        config_map_key_ref: None,
                    }),
                    extends,
                    imports: imports_of(tree, shelf, wishes, place),
                    warm_up: None,
                    resources: None,
                    // No Function runs on it.
                    spares: 0,
                    accepted_threads: accepted_threads(tree, wishes, place),
                    ..like.spec.clone()
                };
                shared(
                    spec,
                    &like.namespace,
                    tree,
                    shelf,
                    place,
                    planned,
                    &mut taken,
                )
            }
        };
        made.push(proposal);
    }
    made
}

fn of_set(wish: &Wish, imports: Vec<String>, extends: Option<Extends>) -> Proposal {
    let spec = PackageSetSpec {
        imports,
        extends,
        ..wish.spec.clone()
    };
    let mut annotations = wish.annotations.clone();
    annotations.remove(GIVEN_UP);
    let given_up = GivenUp {
        wished: wish.spec.imports.clone(),
        planned: spec.imports.clone(),
    };
    if given_up.wished != given_up.planned
        && let Ok(text) = serde_json::to_string(&given_up)
    {
        annotations.insert(GIVEN_UP.to_owned(), text);
    }
    Proposal {
        namespace: wish.namespace.clone(),
        name: wish.name.clone(),
        labels: wish.labels.clone(),
        change: match &wish.now {
            None => Change::New,
            Some(now) if *now == spec && annotations == wish.annotations => Change::Same,
            Some(_) => Change::Changed,
        },
        annotations,
        spec,
    }
}

fn shared(
    spec: PackageSetSpec,
    namespace: &str,
    tree: &Tree,
    shelf: &Shelf,
    place: usize,
    planned: &[Planned],
    taken: &mut BTreeSet<(String, String)>,
) -> Proposal {
    let same_packages = |one: &&Planned| {
        one.namespace == namespace
            && one.spec.image == spec.image
            && sorted(&one.spec) == sorted(&spec)
    };
    let earlier = planned.iter().find(same_packages);
    let (name, change) = match earlier {
        Some(earlier) if earlier.spec == spec => (earlier.name.clone(), Change::Same),
        Some(earlier) => (earlier.name.clone(), Change::Changed),
        None => (new_name(namespace, tree, shelf, place, taken), Change::New),
    };
    taken.insert((namespace.to_owned(), name.clone()));
    Proposal {
        namespace: namespace.to_owned(),
        name,
        labels: BTreeMap::from([(PLANNED.to_owned(), "true".to_owned())]),
        annotations: BTreeMap::new(),
        spec,
        change,
    }
}

fn sorted(spec: &PackageSetSpec) -> Option<BTreeSet<&String>> {
    let lines = spec.requirements.as_ref()?.lines.as_ref()?;
    Some(lines.iter().collect())
}

/// Of the packages that take most of what it imports itself.
fn new_name(
    namespace: &str,
    tree: &Tree,
    shelf: &Shelf,
    place: usize,
    taken: &BTreeSet<(String, String)>,
) -> String {
    const LONGEST: usize = 46;
    let mut dearest: Vec<_> = tree.nodes[place]
        .own
        .ones()
        .map(|number| &shelf.packages[number])
        .collect();
    dearest.sort_by(|a, b| b.kib.total_cmp(&a.kib).then_with(|| a.name.cmp(&b.name)));
    let mut stem = String::from("shared");
    let notable = dearest.first().map_or(0.0, |first| first.kib / 10.0);
    for package in dearest.iter().take(3).filter(|one| one.kib >= notable) {
        if stem.len() + 1 + package.name.len() <= LONGEST {
            stem = format!("{stem}-{}", package.name);
        }
    }
    (1_usize..)
        .map(|count| match count {
            1 => stem.clone(),
            count => format!("{stem}-{count}"),
        })
        .find(|name| !taken.contains(&(namespace.to_owned(), name.clone())))
        .unwrap_or(stem)
}

/// What a zygote imports by name: of a set what it asks for, of one that is there for others what any of them asks for, as far as that
/// loads no more than the zygote is to have; and the modules of packages that none of these loads.
fn imports_of(tree: &Tree, shelf: &Shelf, wishes: &[Wish], place: usize) -> Vec<String> {
    let node = &tree.nodes[place];
    let name = |number: usize| &*shelf.packages[number].name;
    let warm: BTreeSet<&str> = node.warm.ones().map(name).collect();
    let own: BTreeSet<&str> = node.own.ones().map(name).collect();
    let within = |loads: &[String]| loads.iter().all(|name| warm.contains(&**name));
    let below = match node.set {
        Some(_) => vec![place],
        None => tree.below(place),
    };
    let sets = below.iter().filter_map(|below| tree.nodes[*below].set);
    let sets: Vec<&Wish> = sets.map(|set| &wishes[set]).collect();
    let mut modules: Vec<String> = Vec::new();
    let mut covered: BTreeSet<&str> = BTreeSet::new();
    for wish in &sets {
        for module in &wish.spec.imports {
            let loads = wish
                .report
                .imports
                .get(module)
                .map_or(&[][..], Vec::as_slice);
            // Who is there for others imports nothing that their packages do not need.
            let concerns = node.set.is_some() || loads.iter().any(|name| own.contains(&**name));
            if concerns && within(loads) {
                covered.extend(loads.iter().map(String::as_str));
                if !modules.contains(module) {
                    modules.push(module.clone());
                }
            }
        }
    }
    // The one that loads most of the others comes first, and what it loads needs no name.
    let mut left: Vec<(&str, &Package)> = sets
        .iter()
        .flat_map(|wish| &wish.report.packages)
        .filter(|(name, _)| own.contains(&***name))
        .map(|(name, package)| (&**name, package))
        .collect();
    left.sort_by_key(|(name, package)| (std::cmp::Reverse(package.loads.len()), *name));
    for (name, package) in left {
        if covered.contains(name) || !within(&package.loads) {
            continue;
        }
        covered.insert(name);
        covered.extend(package.loads.iter().map(String::as_str));
        for module in &package.modules {
            if !modules.contains(module) {
                modules.push(module.clone());
            }
        }
    }
    modules
}

/// Threads that the sets below accept, who import the same and more.
fn accepted_threads(tree: &Tree, wishes: &[Wish], place: usize) -> Vec<String> {
    let below = tree.below(place);
    let sets = below.iter().filter_map(|below| tree.nodes[*below].set);
    let all: BTreeSet<&String> = sets
        .flat_map(|set| &wishes[set].spec.accepted_threads)
        .collect();
    all.into_iter().cloned().collect()
}
