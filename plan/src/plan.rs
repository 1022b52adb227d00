//! The command `plan`: gathers, searches, prints.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use fixedbitset::FixedBitSet;
use sock_crds::{PackageSet, PackageSetSpec};
use sock_plan::proposal::{Change, GIVEN_UP, Proposal, proposals};
use sock_plan::shelf::{Shelf, Wish, group_of};
use sock_plan::tree::{Overhead, Tree, least_memory};
use sock_plan::{budget, picture};

use crate::costs::Costs;
use crate::given::{Given, pinned};
use crate::stop::Stop;
use crate::{Output, Plan, cluster, folder};

/// Plans and prints.
///
/// # Errors
/// Nothing can be read or measured, or nothing fits.
pub fn run(plan: &Plan) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(text(plan));
    // The search may go on in its thread: nobody waits for it.
    runtime.shutdown_background();
    print!("{}", done?);
    Ok(())
}

async fn text(plan: &Plan) -> Result<String> {
    let mut stop = Stop::listen()?;
    let mut costs = Costs::open(plan.costs.as_deref())?;
    let mut given = if plan.paths.is_empty() {
        cluster::gather(plan, &mut costs, &mut stop).await?
    } else {
        folder::gather(plan, &mut costs, &mut stop).await?
    };
    given.leave_out_descendants();
    for one in &given.left_out {
        let place = if given.running {
            format!("{}/", one.namespace)
        } else {
            String::new()
        };
        eprintln!("left out: {place}{}: {}", one.name, one.why);
    }
    if given.wishes.is_empty() {
        bail!("there is nothing to plan for: no PackageSet could be measured");
    }
    let (output, memory) = (plan.output, plan.memory);
    let text = tokio::task::spawn_blocking(move || propose(&given, output, memory));
    stop.unless(async { text.await? }).await
}

fn propose(given: &Given, output: Output, memory: Option<f64>) -> Result<String> {
    let overhead = Overhead::default();
    let shelf = Shelf::new(&given.wishes);
    let mut tree = least_memory(&shelf, overhead);
    if let Some(kib) = memory {
        tree = budget::fit(tree, &shelf, overhead, kib).map_err(|least| {
            anyhow::anyhow!(
                "--memory: {} are not enough: the zygotes of {} PackageSets take {} even if they import nothing",
                picture::mib(kib),
                given.wishes.len(),
                picture::mib(least.least_kib)
            )
        })?;
    }
    let made = proposals(&tree, &shelf, &given.wishes, &given.planned, &given.taken);
    match output {
        Output::Tree => Ok(drawn(given, &shelf, &tree, &made, overhead)),
        Output::Yaml => yaml(given, &made),
    }
}

/// How to delete what an earlier plan made and nobody needs any more.
fn deletions(given: &Given, made: &[Proposal]) -> Vec<String> {
    let made = made
        .iter()
        .map(|one| (&*one.namespace, &*one.name))
        .collect();
    let unused = given.unused(&made).into_iter();
    unused
        .map(|one| {
            format!(
                "kubectl delete --namespace {} packageset {}",
                one.namespace, one.name
            )
        })
        .collect()
}

fn drawn(
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
    let deletions = deletions(given, made);
    let changed = made.iter().any(|one| one.change != Change::Same) || !deletions.is_empty();
    text += match (given.running, changed) {
        (true, false) => "\nNothing is to be changed.\n",
        (true, true) => {
            "\n+ is new, ~ is changed: apply it with --output yaml | kubectl apply -f -\n"
        }
        (false, _) => "\nApply it with --output yaml | kubectl apply -f -\n",
    };
    for command in deletions {
        text += &format!("Not used any more: {command}\n");
    }
    text
}

/// The tree that the cluster has.
fn there(given: &Given, shelf: &Shelf) -> Tree {
    let now = |wish: &'_ Wish| wish.now.as_ref().unwrap_or(&wish.spec).clone();
    let wishes = given.wishes.iter();
    let of_wishes = wishes.map(|wish| (&wish.namespace, &wish.name, now(wish)));
    let planned = given.planned.iter();
    let of_planned = planned.map(|one| (&one.namespace, &one.name, one.spec.clone()));
    let all: Vec<_> = of_wishes.chain(of_planned).collect();
    let nodes: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(place, (namespace, _, spec))| {
            let above = spec.extends.as_ref().and_then(|extends| {
                let mut all = all.iter();
                all.position(|(other, name, _)| other == namespace && **name == extends.name)
            });
            let set = (place < shelf.sets.len()).then_some(place);
            (set, imported(given, shelf, set, namespace, spec), above)
        })
        .collect();
    Tree::of(shelf, &nodes)
}

/// What a PackageSet imports as it is: of one that an earlier plan made, as far as those that share its packages are measured.
fn imported(
    given: &Given,
    shelf: &Shelf,
    set: Option<usize>,
    namespace: &str,
    spec: &PackageSetSpec,
) -> FixedBitSet {
    let mut all = shelf.none();
    let group = group_of(namespace, spec);
    let related = given.wishes.iter().zip(&shelf.sets).enumerate();
    let related = related.filter(|(place, (wish, _))| match set {
        Some(set) => *place == set,
        None => wish.group() == group,
    });
    for (_, (wish, set)) in related {
        let loaded = spec
            .imports
            .iter()
            .flat_map(|module| wish.report.loaded_by(module));
        let names: BTreeSet<&str> = loaded.collect();
        let wanted = set.wanted.ones();
        all.extend(wanted.filter(|number| names.contains(&*shelf.packages[*number].name)));
    }
    // Of what others have under the same names it has its own versions.
    let lines = spec
        .requirements
        .as_ref()
        .and_then(|all| all.lines.as_ref());
    if let (None, Some(lines)) = (set, lines)
        && let Ok(pinned) = pinned(&lines.join("\n"))
    {
        let own: BTreeSet<String> = pinned.into_iter().map(|(_, line)| line).collect();
        let foreign = |number: &usize| !own.contains(&shelf.packages[*number].line);
        let foreign: Vec<usize> = all.ones().filter(foreign).collect();
        foreign
            .into_iter()
            .for_each(|number| all.set(number, false));
    }
    all
}

fn yaml(given: &Given, made: &[Proposal]) -> Result<String> {
    let mut text = String::new();
    for one in made.iter().filter(|one| one.change != Change::Same) {
        let mut set = PackageSet::new(&one.name, one.spec.clone());
        let some =
            |of: &std::collections::BTreeMap<String, String>| (!of.is_empty()).then(|| of.clone());
        set.metadata.namespace = (!one.namespace.is_empty()).then(|| one.namespace.clone());
        set.metadata.labels = some(&one.labels);
        set.metadata.annotations = some(&one.annotations);
        let mut set = serde_json::to_value(&set)?;
        if one.change == Change::Changed {
            // What `kubectl apply` has not made itself, it removes only where it is told to (its three-way merge).
            set["spec"]["imports"] = one.spec.imports.clone().into();
            if one.spec.extends.is_none() {
                set["spec"]["extends"] = serde_json::Value::Null;
            }
            let mut wishes = given.wishes.iter();
            let before =
                wishes.find(|wish| wish.namespace == one.namespace && wish.name == one.name);
            if before.is_some_and(|wish| wish.annotations.contains_key(GIVEN_UP))
                && !one.annotations.contains_key(GIVEN_UP)
            {
                set["metadata"]["annotations"][GIVEN_UP] = serde_json::Value::Null;
            }
        }
        text += "---\n";
        text += &serde_yaml_ng::to_string(&set)?;
    }
    for command in deletions(given, made) {
        text += &format!("# not used any more: {command}\n");
    }
    Ok(text)
}
