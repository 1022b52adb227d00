//! All packages of all PackageSets as numbers: what is the same in several of them has one number.

use std::collections::{BTreeMap, HashMap};

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

/// A package in one version, for one image of one namespace.
#[derive(Clone, Debug)]
pub struct Package {
    /// In its normal form.
    pub name: String,
    /// The whole requirement, hashes and all.
    pub line: String,
    /// Least time that importing it took, in milliseconds.
    pub millis: f64,
    /// Least memory that it took, in KiB.
    pub kib: f64,
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
    /// Of those: what importing each loads.
    pub loads: HashMap<usize, FixedBitSet>,
    /// What must be installed beside each package.
    pub requires: HashMap<usize, FixedBitSet>,
    /// Starts that it counts for, beside those of others.
    pub weight: f64,
    /// Time beyond the least of its packages, in milliseconds: it imports more modules of them than others do.
    pub more_millis: f64,
    /// The same for memory, in KiB.
    pub more_kib: f64,
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
        let mut named: Vec<HashMap<&str, usize>> = Vec::new();
        let mut group_of = Vec::new();
        for wish in wishes {
            let next = groups.len();
            let group = *groups.entry(group(wish)).or_insert(next);
            group_of.push(group);
            let mut names = HashMap::new();
            for (requirement, line) in &wish.requirements {
                let marker = requirement.marker.as_deref().unwrap_or_default();
                let what = format!("{}=={};{marker}", requirement.name, requirement.version);
                let number = *numbers.entry((group, what)).or_insert_with(|| {
                    packages.push(Package {
                        name: requirement.name.clone(),
                        line: line.clone(),
                        millis: f64::INFINITY,
                        kib: f64::INFINITY,
                    });
                    packages.len() - 1
                });
                // Of several lines for different machines only one is installed, which the report cannot tell apart.
                names.entry(requirement.name.as_str()).or_insert(number);
                if let Some(found) = wish.report.packages.get(&requirement.name)
                    && wish.loaded().any(|name| name == requirement.name)
                {
                    let package = &mut packages[number];
                    package.millis = package.millis.min(millis(found.micros));
                    package.kib = package.kib.min(kib(found.kib));
                }
            }
            named.push(names);
        }
        for package in &mut packages {
            // Loaded by nobody: free.
            if package.kib.is_infinite() {
                (package.millis, package.kib) = (0.0, 0.0);
            }
        }
        let sets = wishes
            .iter()
            .zip(&named)
            .zip(group_of)
            .map(|((wish, names), group)| set(wish, group, names, &packages))
            .collect();
        Shelf { packages, sets }
    }

    /// An empty set of packages.
    #[must_use]
    pub fn none(&self) -> FixedBitSet {
        FixedBitSet::with_capacity(self.packages.len())
    }

    /// Memory that importing them takes, in KiB.
    #[must_use]
    pub fn kib(&self, packages: &FixedBitSet) -> f64 {
        packages
            .ones()
            .map(|number| self.packages[number].kib)
            .sum()
    }

    /// Time that importing them takes, in milliseconds.
    #[must_use]
    pub fn millis(&self, packages: &FixedBitSet) -> f64 {
        packages
            .ones()
            .map(|number| self.packages[number].millis)
            .sum()
    }
}

impl Wish {
    /// Names of the packages that its imports load.
    fn loaded(&self) -> impl Iterator<Item = &str> {
        self.report.imports.values().flatten().map(String::as_str)
    }
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
                .requires
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

fn group(wish: &Wish) -> String {
    let spec = &wish.spec;
    serde_json::json!([
        wish.namespace,
        spec.image,
        spec.index,
        spec.node_selector,
        spec.tolerations
    ])
    .to_string()
}

fn set(wish: &Wish, group: usize, names: &HashMap<&str, usize>, packages: &[Package]) -> Set {
    let bits = |of: &mut dyn Iterator<Item = &str>| {
        let mut bits = FixedBitSet::with_capacity(packages.len());
        bits.extend(of.filter_map(|name| names.get(name).copied()));
        bits
    };
    let wanted = bits(&mut wish.loaded());
    let of = |names: &[String]| bits(&mut names.iter().map(String::as_str));
    let found = |number: usize| wish.report.packages.get(&packages[number].name);
    let mut lock = FixedBitSet::with_capacity(packages.len());
    lock.extend(names.values().copied());
    let loads = wanted
        .ones()
        .filter_map(|number| Some((number, of(&found(number)?.loads))))
        .collect();
    let requires = lock
        .ones()
        .filter_map(|number| Some((number, of(&found(number)?.requires))))
        .collect();
    let more = |one: &dyn Fn(usize) -> f64| wanted.ones().map(one).sum::<f64>().max(0.0);
    Set {
        group,
        loads,
        requires,
        weight: count(wish.functions),
        more_millis: more(&|number| {
            found(number).map_or(0.0, |found| millis(found.micros) - packages[number].millis)
        }),
        more_kib: more(&|number| {
            found(number).map_or(0.0, |found| kib(found.kib) - packages[number].kib)
        }),
        lock,
        wanted,
    }
}

#[allow(clippy::cast_precision_loss)] // Far below 2^52.
fn millis(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

#[allow(clippy::cast_precision_loss)] // Far below 2^52.
fn kib(kib: u64) -> f64 {
    kib as f64
}

#[allow(clippy::cast_precision_loss)] // Far below 2^52.
fn count(count: usize) -> f64 {
    count as f64
}
