//! The command `plan`: gathers, searches, prints.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use fixedbitset::FixedBitSet;
use sock_crds::{PackageSet, PackageSetSpec};
use sock_lock::{logical_lines, requirements, sha256};
use sock_plan::proposal::{Change, Planned, Proposal, proposals};
use sock_plan::shelf::{Shelf, Wish};
use sock_plan::tree::{Overhead, Tree, least_memory};
use sock_plan::{budget, picture};

use crate::costs::Costs;
use crate::{Output, Plan, cluster, folder};

/// Measures what a directory of packages costs to import.
pub const MEASURE: &str = include_str!("measure.py");

/// What there is to plan for.
#[derive(Debug, Default)]
pub struct Given {
    /// PackageSets with what was measured of them.
    pub wishes: Vec<Wish>,
    /// Those that an earlier plan made.
    pub planned: Vec<Planned>,
    /// Namespaces and names that are taken.
    pub taken: BTreeSet<(String, String)>,
    /// Whether they are on a cluster, so that there is a state to compare with.
    pub running: bool,
    /// What could not be measured, and why.
    pub left_out: Vec<String>,
}

/// Plans and prints.
///
/// # Errors
/// Nothing can be read or measured, or nothing fits.
pub fn run(plan: &Plan) -> Result<()> {
    let mut costs = Costs::open(plan.costs.as_deref())?;
    let given = if plan.paths.is_empty() {
        cluster::gather(plan, &mut costs)?
    } else {
        folder::gather(plan, &mut costs)?
    };
    for problem in &given.left_out {
        eprintln!("left out: {problem}");
    }
    if given.wishes.is_empty() {
        bail!("there is nothing to plan for: no PackageSet could be measured");
    }
    let overhead = Overhead::default();
    let shelf = Shelf::new(&given.wishes);
    let mut tree = least_memory(&shelf, overhead);
    if let Some(kib) = plan.memory {
        tree = budget::fit(tree, &shelf, overhead, kib).map_err(|least| {
            anyhow::anyhow!(
                "--memory: {} are not enough: {} zygotes take {} even if they import nothing",
                picture::mib(kib),
                given.wishes.len(),
                picture::mib(least.least_kib)
            )
        })?;
    }
    let made = proposals(&tree, &shelf, &given.wishes, &given.planned, &given.taken);
    match plan.output {
        Output::Tree => print!("{}", shown(&given, &shelf, &tree, &made, overhead)),
        Output::Yaml => print!("{}", yaml(&made, &unused(&given, &made))?),
    }
    Ok(())
}

/// Those of an earlier plan that this one does without.
fn unused(given: &Given, made: &[Proposal]) -> Vec<String> {
    let kept = |one: &&Planned| {
        !made
            .iter()
            .any(|made| made.namespace == one.namespace && made.name == one.name)
    };
    let unused = given.planned.iter().filter(kept);
    unused
        .map(|one| {
            format!(
                "kubectl delete --namespace {} packageset {}",
                one.namespace, one.name
            )
        })
        .collect()
}

fn shown(
    given: &Given,
    shelf: &Shelf,
    tree: &Tree,
    made: &[Proposal],
    overhead: Overhead,
) -> String {
    let mut text = picture::tree(tree, shelf, &given.wishes, made, overhead);
    text.push('\n');
    let alone = Tree::alone(shelf);
    let now = there(given, shelf);
    let mut trees = vec![("each by itself", &alone)];
    if given.running && now != alone {
        trees.push(("as it is", &now));
    }
    trees.push(("as planned", tree));
    text += &picture::comparison(&trees, shelf, overhead);
    let changed = made.iter().any(|one| one.change != Change::Same);
    let unused = unused(given, made);
    text += match (given.running, changed || !unused.is_empty()) {
        (true, false) => "\nNothing is to be changed.\n",
        (true, true) => {
            "\n+ is new, ~ is changed: apply it with --output yaml | kubectl apply -f -\n"
        }
        (false, _) => "\nApply it with --output yaml | kubectl apply -f -\n",
    };
    for command in unused {
        text += &format!("Not used any more: {command}\n");
    }
    text
}

/// The tree that the cluster has.
fn there(given: &Given, shelf: &Shelf) -> Tree {
    let of_wishes = given
        .wishes
        .iter()
        .map(|wish| (&wish.namespace, &wish.name, &wish.spec));
    let of_planned = given
        .planned
        .iter()
        .map(|one| (&one.namespace, &one.name, &one.spec));
    let all: Vec<_> = of_wishes.chain(of_planned).collect();
    let nodes: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(place, (namespace, _, spec))| {
            let above = spec.extends.as_ref().and_then(|extends| {
                all.iter()
                    .position(|(other, name, _)| other == namespace && **name == extends.name)
            });
            let set = (place < shelf.sets.len()).then_some(place);
            (set, imported(given, shelf, namespace, spec), above)
        })
        .collect();
    Tree::of(shelf, &nodes)
}

/// What a PackageSet imports as it is, as far as sets that share its packages are measured.
fn imported(given: &Given, shelf: &Shelf, namespace: &str, spec: &PackageSetSpec) -> FixedBitSet {
    let mut all = shelf.none();
    let related = |wish: &&Wish| wish.namespace == namespace && wish.spec.image == spec.image;
    for (wish, set) in given
        .wishes
        .iter()
        .zip(&shelf.sets)
        .filter(|(wish, _)| related(wish))
    {
        let loaded = spec
            .imports
            .iter()
            .flat_map(|module| wish.report.loaded_by(module));
        let names: BTreeSet<&str> = loaded.collect();
        all.extend(set.wanted.ones().filter(|number| {
            let package = &shelf.packages[*number];
            let lines = spec
                .requirements
                .as_ref()
                .and_then(|all| all.lines.as_ref());
            names.contains(&*package.name)
                && lines.is_some_and(|lines| lines.contains(&package.line))
        }));
    }
    all
}

fn yaml(made: &[Proposal], unused: &[String]) -> Result<String> {
    let mut text = String::new();
    for one in made.iter().filter(|one| one.change != Change::Same) {
        let mut set = PackageSet::new(&one.name, one.spec.clone());
        set.metadata.namespace = (!one.namespace.is_empty()).then(|| one.namespace.clone());
        set.metadata.labels = (!one.labels.is_empty()).then(|| one.labels.clone());
        set.metadata.annotations = (!one.annotations.is_empty()).then(|| one.annotations.clone());
        text += "---\n";
        text += &serde_yaml_ng::to_string(&set)?;
    }
    for command in unused {
        text += &format!("# not used any more: {command}\n");
    }
    Ok(text)
}

/// The requirements of a text, each with its line.
///
/// # Errors
/// The first line that is not pinned and hashed.
pub fn pinned(text: &str) -> Result<Vec<(sock_lock::Requirement, String)>> {
    let found = requirements(text).map_err(|error| anyhow::anyhow!("{error}"))?;
    let lines = logical_lines(text);
    found
        .into_iter()
        .map(|requirement| {
            let line = lines.iter().find(|(number, _)| *number == requirement.line);
            let (_, line) = line.context("a line of the requirements")?;
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            Ok((requirement, line))
        })
        .collect()
}

/// Name of a measurement: another program, image, lock or list of imports may give other figures.
pub fn key(image: &str, requirements: &str, imports: &[String]) -> String {
    let mut texts = vec![MEASURE, image, requirements];
    texts.extend(imports.iter().map(String::as_str));
    sha256(&texts)
}
