//! What is drawn: PackageSets of packages, and Functions of PackageSets, both by Zipf's law. What few want, few want, and most want the same.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use rand::RngExt as _;
use rand::rngs::StdRng;

/// Projects that are asked for and the module of each that is imported, the most popular first.
const PACKAGES: [(&str, &str); 43] = [
    ("numpy", "numpy"),
    ("requests", "requests"),
    ("pandas", "pandas"),
    ("pyyaml", "yaml"),
    ("pydantic", "pydantic"),
    ("scikit-learn", "sklearn.linear_model"),
    ("jinja2", "jinja2"),
    ("scipy", "scipy.stats"),
    ("attrs", "attr"),
    ("click", "click"),
    ("sqlalchemy", "sqlalchemy.orm"),
    ("matplotlib", "matplotlib.figure"),
    ("rich", "rich.console"),
    ("beautifulsoup4", "bs4"),
    ("flask", "flask"),
    ("lxml", "lxml.etree"),
    ("boto3", "boto3.session"),
    ("pillow", "PIL.Image"),
    ("aiohttp", "aiohttp"),
    ("networkx", "networkx"),
    ("tqdm", "tqdm"),
    ("httpx", "httpx"),
    ("cryptography", "cryptography.fernet"),
    ("jsonschema", "jsonschema"),
    ("fastapi", "fastapi"),
    ("statsmodels", "statsmodels.regression.linear_model"),
    ("openpyxl", "openpyxl"),
    ("seaborn", "seaborn"),
    ("sympy", "sympy"),
    ("pygments", "pygments.lexers"),
    ("tabulate", "tabulate"),
    ("markdown", "markdown"),
    ("orjson", "orjson"),
    ("msgpack", "msgpack"),
    ("python-dateutil", "dateutil.parser"),
    ("shapely", "shapely"),
    ("pyjwt", "jwt"),
    ("psutil", "psutil"),
    ("cachetools", "cachetools"),
    ("xmltodict", "xmltodict"),
    ("docutils", "docutils.core"),
    ("regex", "regex"),
    ("tornado", "tornado.web"),
];
/// How many packages a set asks for, and how many of 20 sets ask for so many.
const SIZES: [(usize, u32); 5] = [(1, 5), (2, 6), (3, 5), (4, 3), (5, 1)];

/// What a team installs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Lines of requirements: what it asks for and all that this needs, pinned.
    pub lines: Vec<String>,
    /// Modules that its Functions import.
    pub imports: Vec<&'static str>,
}

/// Everything that can be drawn from.
#[derive(Debug)]
pub struct Shelf {
    /// By project.
    lines: BTreeMap<String, String>,
    needs: BTreeMap<String, Vec<String>>,
}

impl Shelf {
    /// Of pinned lines, and which project needs which.
    ///
    /// # Errors
    /// If what is needed is not pinned.
    pub fn new(requirements: &[&str], needs: &str) -> Result<Shelf> {
        let lines: BTreeMap<String, String> = requirements
            .iter()
            .filter_map(|line| Some((line.split_once("==")?.0.to_owned(), (*line).to_owned())))
            .collect();
        let needs: BTreeMap<String, Vec<String>> =
            serde_json::from_str(needs).context("which project needs which")?;
        let asked = PACKAGES.iter().map(|(project, _)| *project);
        for project in asked.chain(needs.values().flatten().map(String::as_str)) {
            lines
                .get(project)
                .with_context(|| format!("{project} is not pinned"))?;
        }
        Ok(Shelf { lines, needs })
    }

    /// All that can be asked for, in one.
    #[must_use]
    pub fn whole(&self) -> Set {
        self.of(&(0..PACKAGES.len()).collect())
    }

    /// So many, no two alike.
    #[must_use]
    pub fn sets(&self, count: usize, random: &mut StdRng) -> Vec<Set> {
        let popularity = Zipf::new(PACKAGES.len());
        let mut drawn: Vec<BTreeSet<usize>> = Vec::new();
        while drawn.len() < count {
            let size = size(random.random_range(0..SIZES.iter().map(|(_, share)| share).sum()));
            let mut packages = BTreeSet::new();
            while packages.len() < size {
                packages.insert(popularity.draw(random));
            }
            if !drawn.contains(&packages) {
                drawn.push(packages);
            }
        }
        drawn.iter().map(|packages| self.of(packages)).collect()
    }

    fn of(&self, packages: &BTreeSet<usize>) -> Set {
        let mut projects = BTreeSet::new();
        let mut open: Vec<&str> = packages.iter().map(|index| PACKAGES[*index].0).collect();
        while let Some(project) = open.pop() {
            if projects.insert(project) {
                let needs = self.needs.get(project).into_iter().flatten();
                open.extend(needs.map(String::as_str));
            }
        }
        Set {
            lines: projects
                .iter()
                .filter_map(|project| self.lines.get(*project).cloned())
                .collect(),
            imports: packages.iter().map(|index| PACKAGES[*index].1).collect(),
        }
    }
}

fn size(mut at: u32) -> usize {
    for (size, share) in SIZES {
        if at < share {
            return size;
        }
        at -= share;
    }
    1
}

/// Which set each of so many Functions is on: every set has one, the first ones have most.
#[must_use]
pub fn functions(count: usize, sets: usize, random: &mut StdRng) -> Vec<usize> {
    let popularity = Zipf::new(sets);
    (0..count)
        .map(|function| {
            if function < sets {
                function
            } else {
                popularity.draw(random)
            }
        })
        .collect()
}

/// Ranks from 0 on, each with a share that is inversely proportional to its place (Zipf's law with exponent 1).
#[derive(Debug)]
pub struct Zipf {
    /// Sums of shares up to each rank.
    sums: Vec<f64>,
}

impl Zipf {
    /// Of so many ranks, at least one.
    #[must_use]
    pub fn new(ranks: usize) -> Zipf {
        let mut sum = 0.0;
        let sums = (1..=u32::try_from(ranks.max(1)).unwrap_or(u32::MAX))
            .map(|place| {
                sum += 1.0 / f64::from(place);
                sum
            })
            .collect();
        Zipf { sums }
    }

    /// One rank.
    pub fn draw(&self, random: &mut StdRng) -> usize {
        let last = self.sums.len() - 1;
        let at = random.random::<f64>() * self.sums[last];
        self.sums.partition_point(|sum| *sum <= at).min(last)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;
    use crate::run::requirements;

    fn shelf() -> Shelf {
        let lines = requirements(super::super::REQUIREMENTS);
        Shelf::new(&lines, super::super::NEEDS).unwrap()
    }

    #[test]
    fn what_is_drawn_is_the_same_each_time_and_no_two_sets_are() {
        let draw = || shelf().sets(30, &mut StdRng::seed_from_u64(1));
        let sets = draw();
        assert_eq!(sets, draw());
        let different: BTreeSet<_> = sets.iter().map(|set| &set.imports).collect();
        assert_eq!(different.len(), 30);
    }

    #[test]
    fn a_set_has_all_that_its_packages_need() {
        let shelf = shelf();
        let seaborn = PACKAGES.iter().position(|(name, _)| *name == "seaborn");
        let set = shelf.of(&BTreeSet::from([seaborn.unwrap()]));
        assert_eq!(set.imports, ["seaborn"]);
        for project in ["seaborn", "matplotlib", "pillow", "numpy", "pandas", "six"] {
            let start = format!("{project}==");
            assert!(set.lines.iter().any(|line| line.starts_with(&start)));
        }
        assert!(!set.lines.iter().any(|line| line.starts_with("scipy==")));
    }

    #[test]
    fn every_set_has_a_function_and_the_first_ones_most() {
        let functions = functions(600, 20, &mut StdRng::seed_from_u64(1));
        let of = |set| functions.iter().filter(|one| **one == set).count();
        assert!((0..20).all(|set| of(set) > 0));
        assert!(of(0) > 3 * of(10));
    }

    #[test]
    fn the_first_of_three_is_drawn_six_times_of_eleven() {
        let (zipf, mut random) = (Zipf::new(3), StdRng::seed_from_u64(1));
        let drawn: Vec<usize> = (0..11_000).map(|_| zipf.draw(&mut random)).collect();
        let of = |rank| drawn.iter().filter(|one| **one == rank).count();
        assert!(of(0).abs_diff(6000) < 300 && of(2).abs_diff(2000) < 200);
        assert_eq!(Zipf::new(0).draw(&mut random), 0);
    }
}
