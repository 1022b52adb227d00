//! A tree as PackageSets.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sock_crds::{Extends, PackageSetSpec, Requirements};

use crate::shelf::{Shelf, Wish, group_of};
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
    let mut earlier: Vec<&Planned> = planned.iter().collect();
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
                let spec = shared_spec(tree, shelf, wishes, place, extends);
                let namespace = sets_below(tree, wishes, place).next();
                let namespace = namespace.map_or("", |wish| &wish.namespace);
                let same = take_earlier(&mut earlier, namespace, &spec);
                let (name, change) = match same {
                    Some(one) if one.spec == spec => (one.name.clone(), Change::Same),
                    Some(one) => (one.name.clone(), Change::Changed),
                    None => (new_name(namespace, tree, shelf, place, &taken), Change::New),
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

/// The PackageSet of a zygote that is there for others: what they have in common, and the most that any of them asks for.
fn shared_spec(
    tree: &Tree,
    shelf: &Shelf,
    wishes: &[Wish],
    place: usize,
    extends: Option<Extends>,
) -> PackageSetSpec {
    let node = &tree.nodes[place];
    let lines = node
        .lock
        .ones()
        .map(|number| shelf.packages[number].line.clone());
    let requirements = Requirements {
        lines: Some(lines.collect()),
        config_map_key_ref: None,
    };
    let threads: BTreeSet<&String> = sets_below(tree, wishes, place)
        .flat_map(|wish| &wish.spec.accepted_threads)
        .collect();
    let below = tree.below(place);
    let dearest = below
        .iter()
        .filter_map(|below| tree.nodes[*below].set)
        .max_by(|a, b| cost(shelf, *a).total_cmp(&cost(shelf, *b)).then(b.cmp(a)));
    let like = dearest.map(|set| &wishes[set].spec);
    PackageSetSpec {
        image: like.map(|like| like.image.clone()).unwrap_or_default(),
        extends,
        requirements: Some(requirements),
        index: like.and_then(|like| like.index.clone()),
        imports: imports_of(tree, shelf, wishes, place),
        warm_up: None,
        node_selector: like
            .map(|like| like.node_selector.clone())
            .unwrap_or_default(),
        tolerations: like
            .map(|like| like.tolerations.clone())
            .unwrap_or_default(),
        // Enough for the one that takes most is enough for a part of it.
        resources: like.and_then(|like| like.resources.clone()),
        // No Function runs on it.
        spares: 0,
        accepted_threads: threads.into_iter().cloned().collect(),
    }
}

fn cost(shelf: &Shelf, set: usize) -> f64 {
    shelf.sets[set].kib.iter().sum()
}

fn sets_below<'a>(tree: &Tree, wishes: &'a [Wish], place: usize) -> impl Iterator<Item = &'a Wish> {
    let below = tree.below(place).into_iter();
    let sets: Vec<usize> = below.filter_map(|below| tree.nodes[below].set).collect();
    sets.into_iter().map(|set| &wishes[set])
}

/// The PackageSet of an earlier plan that has the same packages for the same nodes, that which imports the same if there is one. Each
/// is taken once.
fn take_earlier<'a>(
    earlier: &mut Vec<&'a Planned>,
    namespace: &str,
    spec: &PackageSetSpec,
) -> Option<&'a Planned> {
    let lines = |spec: &PackageSetSpec| -> Option<BTreeSet<String>> {
        Some(
            spec.requirements
                .as_ref()?
                .lines
                .clone()?
                .into_iter()
                .collect(),
        )
    };
    let same = |one: &Planned| {
        one.namespace == namespace
            && group_of(namespace, &one.spec) == group_of(namespace, spec)
            && lines(&one.spec) == lines(spec)
    };
    let imports = |one: &Planned| one.spec.imports == spec.imports;
    let place = earlier.iter().position(|one| same(one) && imports(one));
    let place = place.or_else(|| earlier.iter().position(|one| same(one)))?;
    Some(earlier.remove(place))
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
    let most = |number: usize| {
        shelf
            .sets
            .iter()
            .map(|set| set.kib[number])
            .fold(0.0, f64::max)
    };
    let own = tree.nodes[place].own.ones();
    let mut dearest: Vec<(f64, &str)> = own
        .map(|number| (most(number), &*shelf.packages[number].name))
        .collect();
    dearest.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    let notable = dearest.first().map_or(0.0, |first| first.0 / 10.0);
    let mut stem = String::from("shared");
    for (_, name) in dearest.iter().take(3).filter(|(kib, _)| *kib >= notable) {
        if stem.len() + 1 + name.len() <= LONGEST {
            stem = format!("{stem}-{name}");
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
/// loads no more than the zygote is to have; and of packages that none of these loads, what they are asked for by the one below
/// that asks for most.
fn imports_of(tree: &Tree, shelf: &Shelf, wishes: &[Wish], place: usize) -> Vec<String> {
    let node = &tree.nodes[place];
    let name = |number: usize| &*shelf.packages[number].name;
    let warm: BTreeSet<&str> = node.warm.ones().map(name).collect();
    let within = |loads: &[String]| loads.iter().all(|name| warm.contains(&**name));
    if let Some(set) = node.set {
        let wish = &wishes[set];
        let loads = |module: &String| wish.report.imports.get(module);
        let kept = wish.spec.imports.iter();
        return kept
            .filter(|module| loads(module).is_none_or(|loads| within(loads)))
            .cloned()
            .collect();
    }
    let below = tree.below(place);
    let mut sets: Vec<usize> = below
        .iter()
        .filter_map(|below| tree.nodes[*below].set)
        .collect();
    let mut modules: BTreeSet<&String> = BTreeSet::new();
    let whole = |wish: &'_ Wish, module: &String, loads: &[String]| {
        // What loads none of its packages is no concern of theirs.
        !loads.is_empty() && within(loads) && wish.spec.imports.contains(module)
    };
    for wish in sets.iter().map(|set| &wishes[*set]) {
        let imports = wish.report.imports.iter();
        modules.extend(
            imports
                .filter(|(module, loads)| whole(wish, module, loads))
                .map(|(module, _)| module),
        );
    }
    for number in node.own.ones() {
        sets.sort_by(|a, b| shelf.sets[*b].kib[number].total_cmp(&shelf.sets[*a].kib[number]));
        let Some(wish) = sets.first().map(|set| &wishes[*set]) else {
            continue;
        };
        let of_package = |loads: &[String]| loads.iter().any(|one| one == name(number));
        let mut imports = wish.report.imports.iter();
        if !imports.any(|(module, loads)| whole(wish, module, loads) && of_package(loads)) {
            let package = wish.report.packages.get(name(number));
            modules.extend(package.into_iter().flat_map(|package| &package.modules));
        }
    }
    // The API server takes no other names, and no more.
    let modules = modules.into_iter().filter(|module| is_module(module));
    modules.take(MOST_IMPORTS).cloned().collect()
}

const MOST_IMPORTS: usize = 256;

fn is_module(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    name.len() <= 256 && name.split('.').all(part)
}
