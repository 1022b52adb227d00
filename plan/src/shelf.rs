//! All packages of all PackageSets as numbers: what is the same in several of them has one number.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fixedbitset::FixedBitSet;
use sock_crds::PackageSetSpec;
use sock_lock::Requirement;

use crate::report::Report;

/// A PackageSet to plan for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its spec, with all imports that are asked for.
    pub spec: PackageSetSpec,
    /// Its spec as the cluster has it, if it does: an earlier plan may have given up imports.
    pub now: Option<PackageSetSpec>,
    /// Labels and annotations that an `apply` must not lose.
    pub labels: BTreeMap<String, String>,
    /// See `labels`.
    pub annotations: BTreeMap<String, String>,
    /// Every requirement, with its line as it was written.
    pub requirements: Vec<(Requirement, String)>,
    /// How many Functions run on it.
    pub functions: usize,
    /// What its imports cost.
    pub report: Report,
}

/// A package in one version, for one group of sets.
#[derive(Clone, Debug)]
pub struct Package {
    /// In its normal form.
    pub name: String,
    /// The whole requirement, hashes and all.
    pub line: String,
}

/// What a PackageSet asks for, in numbers of packages.
#[derive(Clone, Debug)]
pub struct Set {
    /// Sets of different groups cannot descend from each other: their image, namespace, index or nodes differ.
    pub group: usize,
    /// All that is installed.
    pub lock: FixedBitSet,
    /// What its imports load.
    pub wanted: FixedBitSet,
    /// What each of its imports loads.
    pub imports: Vec<FixedBitSet>,
    /// Of what is wanted: what importing each loads.
    pub loads: HashMap<usize, FixedBitSet>,
    /// What must be installed beside each package.
    pub beside: HashMap<usize, FixedBitSet>,
    /// Time that importing each package takes as this set imports it, in milliseconds, by number.
    pub millis: Vec<f64>,
    /// The same for memory, in KiB.
    pub kib: Vec<f64>,
    /// Code that its zygote runs after its imports.
    pub warm_up: Option<String>,
    /// Starts that it counts for, beside those of others.
    pub weight: f64,
}

/// Packages and sets.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    /// By number.
    pub packages: Vec<Package>,
    /// In the order of the wishes.
    pub sets: Vec<Set>,
}

impl Shelf {
    /// Gives numbers to what the wishes name.
    #[must_use]
    pub fn new(wishes: &[Wish]) -> Shelf {
        let mut groups: HashMap<String, usize> = HashMap::new();
        let mut numbers: HashMap<(usize, String), usize> = HashMap::new();
        let mut packages: Vec<Package> = Vec::new();
        let mut named: Vec<Named> = Vec::new();
        for wish in wishes {
            let next = groups.len();
            let group = *groups.entry(wish.group()).or_insert(next);
            let mut lines: Named = (group, HashMap::new());
            for (requirement, line) in &wish.requirements {
                let marker = requirement.marker.as_deref().unwrap_or_default();
                let what = format!("{}=={};{marker}", requirement.name, requirement.version);
                let number = *numbers.entry((group, what)).or_insert_with(|| {
                    packages.push(Package {
                        name: requirement.name.clone(),
                        line: line.clone(),
                    });
                    packages.len() - 1
                });
                let of_name = lines.1.entry(requirement.name.as_str()).or_default();
                of_name.push((number, requirement.version.as_str()));
            }
            named.push(lines);
        }
        let unused = wishes.iter().all(|wish| wish.functions == 0);
        let sets = wishes.iter().zip(&named);
        let sets = sets
            .map(|(wish, named)| set(wish, named, &packages, unused))
            .collect();
        Shelf { packages, sets }
    }

    /// An empty set of packages.
    #[must_use]
    pub fn none(&self) -> FixedBitSet {
        FixedBitSet::with_capacity(self.packages.len())
    }

    /// Numbers of the groups that there are.
    #[must_use]
    pub fn groups(&self) -> BTreeSet<usize> {
        self.sets.iter().map(|set| set.group).collect()
    }
}

/// A group, and in it by name the numbers of packages with their versions: several, if a requirement has lines for several machines.
type Named<'a> = (usize, HashMap<&'a str, Vec<(usize, &'a str)>>);

impl Wish {
    /// What sets must have in common to have anything in common.
    #[must_use]
    pub fn group(&self) -> String {
        group_of(&self.namespace, &self.spec)
    }
}

/// See [`Wish::group`].
#[must_use]
pub fn group_of(namespace: &str, spec: &PackageSetSpec) -> String {
    let parts = serde_json::json!([
        namespace,
        spec.image,
        spec.index,
        spec.node_selector,
        spec.tolerations
    ]);
    parts.to_string()
}

impl Set {
    /// Whether a zygote of this set may descend from one that has imported `warm`: it would import all of that itself, and nothing
    /// of that would load a package that is missing there. A module that finds an optional package missing at its import never
    /// looks for it again, so that a descendant that has the package would go without.
    #[must_use]
    pub fn takes(&self, warm: &FixedBitSet) -> bool {
        warm.is_subset(&self.wanted)
            && warm.ones().all(|number| {
                self.loads
                    .get(&number)
                    .is_none_or(|loads| loads.is_subset(warm))
            })
    }

    /// These packages without those that load what is not among them.
    #[must_use]
    pub fn closed(&self, packages: &FixedBitSet) -> FixedBitSet {
        let mut closed = packages.clone();
        closed.intersect_with(&self.wanted);
        loop {
            let open: Vec<usize> = closed
                .ones()
                .filter(|number| {
                    let loads = self.loads.get(number);
                    loads.is_some_and(|loads| !loads.is_subset(&closed))
                })
                .collect();
            if open.is_empty() {
                return closed;
            }
            for number in open {
                closed.set(number, false);
            }
        }
    }

    /// These packages and all that must be installed beside them.
    #[must_use]
    pub fn installed(&self, packages: &FixedBitSet) -> FixedBitSet {
        let mut all = packages.clone();
        let mut left: Vec<usize> = all.ones().collect();
        while let Some(number) = left.pop() {
            for required in self
                .beside
                .get(&number)
                .into_iter()
                .flat_map(FixedBitSet::ones)
            {
                if !all.put(required) {
                    left.push(required);
                }
            }
        }
        all
    }
}

fn set(wish: &Wish, (group, named): &Named, packages: &[Package], unused: bool) -> Set {
    let none = || FixedBitSet::with_capacity(packages.len());
    // Of several lines that which is installed, as the report says.
    let number = |name: &str| {
        let lines = named.get(name)?;
        let version = wish.report.packages.get(name).map(|found| &*found.version);
        let installed = lines.iter().find(|(_, of)| Some(*of) == version);
        installed.or(lines.first()).map(|(number, _)| *number)
    };
    let numbers = |names: &[String]| {
        let mut bits = none();
        bits.extend(names.iter().filter_map(|name| number(name)));
        bits
    };
    let imports: Vec<FixedBitSet> = wish
        .report
        .imports
        .values()
        .map(|loads| numbers(loads))
        .collect();
    let mut wanted = none();
    imports.iter().for_each(|loads| wanted.union_with(loads));
    let mut set = Set {
        group: *group,
        lock: none(),
        wanted,
        imports,
        loads: HashMap::new(),
        beside: HashMap::new(),
        millis: vec![0.0; packages.len()],
        kib: vec![0.0; packages.len()],
        warm_up: wish.spec.warm_up.clone(),
        // Where there are no Functions yet, each set is as good as another.
        weight: if unused {
            1.0
        } else {
            float(wish.functions as u64)
        },
    };
    for (name, lines) in named {
        let mut beside = none();
        beside.extend(lines.iter().map(|(number, _)| *number));
        set.lock.union_with(&beside);
        let found = wish.report.packages.get(*name);
        for required in found.iter().flat_map(|found| &found.requires) {
            let lines = named.get(required.as_str()).into_iter().flatten();
            beside.extend(lines.map(|(number, _)| *number));
        }
        for (number, _) in lines {
            set.beside.insert(*number, beside.clone());
        }
        if let (Some(found), Some(number)) = (found, number(name))
            && set.wanted.contains(number)
        {
            set.loads.insert(number, numbers(&found.loads));
            set.millis[number] = float(found.micros) / 1000.0;
            set.kib[number] = float(found.kib);
        }
    }
    set
}

#[allow(clippy::cast_precision_loss)] // Far below 2^52.
fn float(number: u64) -> f64 {
    number as f64
}
