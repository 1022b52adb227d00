//! Plans of small sets, beside all that could be planned for them.

use std::collections::{BTreeMap, BTreeSet};

use fixedbitset::FixedBitSet;
use proptest::prelude::*;
use sock_crds::PackageSetSpec;
use sock_lock::requirements;
use sock_plan::budget::fit;
use sock_plan::picture;
use sock_plan::proposal::{Change, Planned, Proposal, proposals, wished_imports};
use sock_plan::report::{Package, Report};
use sock_plan::shelf::{Shelf, Wish};
use sock_plan::tree::{DEEPEST, Overhead, Tree, least_memory};

const OVERHEAD: Overhead = Overhead {
    root: 12_000.0,
    child: 8_000.0,
};

/// A package: its name, memory in KiB (and as many microseconds), and what importing it loads.
type Kind = (&'static str, u64, &'static [&'static str]);

const SCIENCE: &[Kind] = &[
    ("numpy", 20_000, &[]),
    ("pandas", 30_000, &["numpy"]),
    ("scipy", 40_000, &["numpy"]),
    ("sklearn", 25_000, &["numpy", "scipy"]),
    ("flask", 9_000, &[]),
];

fn line(name: &str) -> String {
    format!("{name}==1.0 --hash=sha256:{}", "0".repeat(64))
}

fn wish(name: &str, imports: &[&str], kinds: &[Kind]) -> Wish {
    let kind = |name: &str| kinds.iter().find(|kind| kind.0 == name);
    let mut packages: BTreeSet<&str> = BTreeSet::new();
    let mut report = Report::default();
    for import in imports {
        let mut loads: Vec<&str> = vec![import];
        loads.extend(kind(import).into_iter().flat_map(|kind| kind.2));
        packages.extend(&loads);
        let loads = loads.iter().map(|&name| name.to_owned()).collect();
        report.imports.insert((*import).to_owned(), loads);
    }
    for (name, cost, loads) in kinds.iter().filter(|kind| packages.contains(kind.0)) {
        let loads: Vec<String> = loads.iter().map(|&name| name.to_owned()).collect();
        report.packages.insert(
            (*name).to_owned(),
            Package {
                version: "1.0".into(),
                requires: loads.clone(),
                modules: vec![(*name).to_owned()],
                loads,
                micros: *cost,
                kib: *cost,
            },
        );
    }
    let lines: Vec<String> = packages.iter().map(|name| line(name)).collect();
    let found = requirements(&lines.join("\n")).expect("requirements");
    let spec = serde_json::json!({
        "image": "python:3.13", "imports": imports, "requirements": {"lines": lines},
    });
    let spec: PackageSetSpec = serde_json::from_value(spec).expect("a spec");
    Wish {
        namespace: "shop".into(),
        name: name.into(),
        now: Some(spec.clone()),
        spec,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        requirements: found.into_iter().zip(lines).collect(),
        functions: 1,
        report,
    }
}

fn names(shelf: &Shelf, packages: &FixedBitSet) -> Vec<String> {
    let mut names: Vec<String> = packages
        .ones()
        .map(|one| shelf.packages[one].name.clone())
        .collect();
    names.sort();
    names
}

/// Per zygote: of which set it is, above which it stands, what it imports itself.
fn drawn(
    shelf: &Shelf,
    wishes: &[Wish],
    tree: &Tree,
) -> Vec<(String, Option<String>, Vec<String>)> {
    let name = |place: usize| match tree.nodes[place].set {
        Some(set) => wishes[set].name.clone(),
        None => format!("({})", names(shelf, &tree.nodes[place].own).join(" ")),
    };
    (0..tree.nodes.len())
        .map(|place| {
            let node = &tree.nodes[place];
            (name(place), node.parent.map(name), names(shelf, &node.own))
        })
        .collect()
}

fn made(wishes: &[Wish], planned: &[Planned], tree: &Tree, shelf: &Shelf) -> Vec<Proposal> {
    let taken = wishes
        .iter()
        .map(|wish| (wish.namespace.clone(), wish.name.clone()))
        .collect();
    proposals(tree, shelf, wishes, planned, &taken)
}

/// Two sets of which neither has all packages of the other.
fn crossing() -> [Wish; 2] {
    [
        wish("a", &["pandas", "flask"], SCIENCE),
        wish("b", &["scipy", "pandas"], SCIENCE),
    ]
}

#[test]
fn what_two_sets_share_is_imported_once() {
    let wishes = [
        wish("stats", &["pandas", "scipy"], SCIENCE),
        wish("learn", &["pandas", "sklearn"], SCIENCE),
        wish("web", &["flask"], SCIENCE),
    ];
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    // All of stats is in learn, whose zygote can descend from it as it is.
    assert_eq!(
        drawn(&shelf, &wishes, &tree),
        [
            ("web".into(), None, vec!["flask".into()]),
            (
                "stats".into(),
                None,
                vec!["numpy".into(), "pandas".into(), "scipy".into()]
            ),
            ("learn".into(), Some("stats".into()), vec!["sklearn".into()]),
        ]
    );
}

#[test]
fn what_no_set_is_by_itself_becomes_a_package_set_of_its_own() {
    let wishes = crossing();
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    let made = made(&wishes, &[], &tree, &shelf);
    let seen: Vec<_> = made
        .iter()
        .map(|one| {
            let extends = one.spec.extends.as_ref().map(|extends| &*extends.name);
            (&*one.name, extends, one.spec.imports.join(" "), one.change)
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("shared-pandas-numpy", None, "pandas".into(), Change::New),
            (
                "a",
                Some("shared-pandas-numpy"),
                "pandas flask".into(),
                Change::Changed
            ),
            (
                "b",
                Some("shared-pandas-numpy"),
                "scipy pandas".into(),
                Change::Changed
            ),
        ]
    );
    let shared = &made[0].spec;
    let lines = shared
        .requirements
        .as_ref()
        .and_then(|all| all.lines.clone());
    assert_eq!(lines, Some(vec![line("numpy"), line("pandas")]));
    assert_eq!(shared.spares, 0, "no Function runs on it");
}

#[test]
fn a_plan_that_is_applied_is_the_plan_again() {
    let (_, again) = twice(crossing().into());
    assert!(
        again.iter().all(|one| one.change == Change::Same),
        "{again:#?}"
    );
}

#[test]
fn sets_of_different_images_or_namespaces_or_indexes_share_nothing() {
    type Alter = fn(&mut Wish);
    let alterations: [Alter; 4] = [
        |wish| wish.namespace = "other".into(),
        |wish| wish.spec.image = "python:3.12".into(),
        |wish| {
            let index = serde_json::json!({"image": "x", "index": {"url": "https://x/simple"}});
            let spec: PackageSetSpec = serde_json::from_value(index).expect("a spec");
            wish.spec.index = spec.index;
        },
        |wish| {
            wish.spec.node_selector.insert("disk".into(), "fast".into());
        },
    ];
    for alter in alterations {
        let mut wishes = crossing();
        alter(&mut wishes[1]);
        let tree = least_memory(&Shelf::new(&wishes), OVERHEAD);
        assert!(
            tree.nodes.iter().all(|node| node.parent.is_none()),
            "{tree:#?}"
        );
    }
}

#[test]
fn a_package_that_looks_for_others_is_not_imported_where_they_are_missing() {
    // Beside pandas it loads pandas, and otherwise goes without for good.
    let beside: &[Kind] = &[
        ("pandas", 30_000, &[]),
        ("learn", 50_000, &["pandas"]),
        ("flask", 9_000, &[]),
    ];
    let wishes = [
        wish("alone", &["learn"], &[("learn", 50_000, &[])]),
        wish("both", &["learn", "flask"], beside),
        wish("alike", &["learn", "flask"], beside),
    ];
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    let drawn = drawn(&shelf, &wishes, &tree);
    assert!(
        drawn.contains(&("alone".into(), None, vec!["learn".into()])),
        "{drawn:?}"
    );
    assert_eq!(
        drawn.iter().filter(|(_, above, _)| above.is_some()).count(),
        1,
        "{drawn:?}"
    );
    assert!(
        drawn
            .iter()
            .all(|(_, above, _)| above.as_deref() != Some("alone")),
        "{drawn:?}"
    );
}

#[test]
fn what_must_be_installed_beside_a_package_is() {
    let mut wishes = [
        wish("a", &["pandas", "flask"], SCIENCE),
        wish("b", &["pandas", "scipy"], SCIENCE),
    ];
    for wish in &mut wishes {
        // Data that no module stands for.
        let found = requirements(&line("tzdata")).expect("a requirement");
        wish.requirements.push((found[0].clone(), line("tzdata")));
        wish.report
            .packages
            .insert("tzdata".into(), Package::default());
        let pandas = wish.report.packages.get_mut("pandas").expect("pandas");
        pandas.requires.push("tzdata".into());
    }
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    let made = made(&wishes, &[], &tree, &shelf);
    let lines = made[0]
        .spec
        .requirements
        .as_ref()
        .and_then(|all| all.lines.as_ref());
    assert!(
        lines.is_some_and(|lines| lines.contains(&line("tzdata"))),
        "{:?}",
        made[0]
    );
}

#[test]
fn a_budget_gives_up_what_spares_least() {
    let mut wishes = [
        wish("stats", &["pandas", "scipy"], SCIENCE),
        wish("web", &["flask"], SCIENCE),
    ];
    // Much memory for little time.
    if let Some(scipy) = wishes[0].report.packages.get_mut("scipy") {
        scipy.micros = 1000;
    }
    let shelf = Shelf::new(&wishes);
    let whole = least_memory(&shelf, OVERHEAD);
    let all = whole.kib(OVERHEAD);
    let tree = fit(whole.clone(), &shelf, OVERHEAD, all - 1.0).expect("it fits");
    let made = made(&wishes, &[], &tree, &shelf);
    let stats = made.iter().find(|one| one.name == "stats").expect("stats");
    assert_eq!(stats.spec.imports, ["pandas"]);
    assert!(tree.kib(OVERHEAD) <= all - 40_000.0);
    let text = picture::tree(&tree, &shelf, &wishes, &made, OVERHEAD);
    assert!(text.contains("pandas, numpy (1 not ahead)"), "{text}");
    let error = fit(whole, &shelf, OVERHEAD, 1000.0).expect_err("two interpreters");
    assert!((error.least_kib - 24_000.0).abs() < 1.0, "{error:?}");
}

#[test]
fn what_a_plan_gave_up_is_asked_for_by_the_next() {
    let mut wishes = [wish("stats", &["pandas", "sklearn"], SCIENCE)];
    let shelf = Shelf::new(&wishes);
    let whole = least_memory(&shelf, OVERHEAD);
    let kib = whole.kib(OVERHEAD);
    let tree = fit(whole, &shelf, OVERHEAD, kib - 1.0).expect("it fits");
    let small = made(&wishes, &[], &tree, &shelf).remove(0);
    assert_eq!(small.spec.imports, ["sklearn"]);
    assert_eq!(
        wished_imports(&small.annotations, &small.spec),
        ["pandas", "sklearn"]
    );
    let mut edited = small.spec.clone();
    edited.imports = vec!["scipy".into()];
    assert_eq!(wished_imports(&small.annotations, &edited), ["scipy"]);

    wishes[0].now = Some(small.spec.clone());
    wishes[0].annotations = small.annotations.clone();
    let again = made(&wishes, &[], &tree, &shelf).remove(0);
    assert_eq!(again.change, Change::Same);
    let large = made(&wishes, &[], &least_memory(&shelf, OVERHEAD), &shelf).remove(0);
    assert_eq!(
        (large.change, large.annotations.len()),
        (Change::Changed, 0)
    );
    assert_eq!(large.spec.imports, ["pandas", "sklearn"]);
}

/// Plans, takes it as applied, and plans again.
fn twice(mut wishes: Vec<Wish>) -> (Vec<Proposal>, Vec<Proposal>) {
    let shelf = Shelf::new(&wishes);
    let first = made(&wishes, &[], &least_memory(&shelf, OVERHEAD), &shelf);
    let mut planned = Vec::new();
    for one in &first {
        let of = |wish: &&mut Wish| wish.namespace == one.namespace && wish.name == one.name;
        match wishes.iter_mut().find(of) {
            Some(wish) => {
                wish.now = Some(one.spec.clone());
                wish.spec = one.spec.clone();
            }
            None => planned.push(Planned {
                namespace: one.namespace.clone(),
                name: one.name.clone(),
                spec: one.spec.clone(),
            }),
        }
    }
    let shelf = Shelf::new(&wishes);
    let second = made(&wishes, &planned, &least_memory(&shelf, OVERHEAD), &shelf);
    (first, second)
}

#[test]
fn a_second_plan_takes_each_package_set_of_the_first_once() {
    // The same packages on different nodes.
    let mut wishes = Vec::new();
    for disk in ["slow", "fast"] {
        for (name, imports) in [("a", ["pandas", "flask"]), ("b", ["scipy", "pandas"])] {
            let mut wish = wish(&format!("{name}-{disk}"), &imports, SCIENCE);
            wish.spec.node_selector.insert("disk".into(), disk.into());
            wish.now = Some(wish.spec.clone());
            wishes.push(wish);
        }
    }
    let (first, second) = twice(wishes);
    let new = first.iter().filter(|one| one.change == Change::New);
    assert_eq!(new.count(), 2, "{first:#?}");
    assert!(
        second.iter().all(|one| one.change == Change::Same),
        "{second:#?}"
    );
    let names: BTreeSet<&String> = second.iter().map(|one| &one.name).collect();
    assert_eq!(names.len(), second.len());
}

#[test]
fn the_lines_of_one_package_for_several_machines_stay_together() {
    let marked = |version: &str, marker: &str| {
        format!(
            "numpy=={version} ; {marker} --hash=sha256:{}",
            "0".repeat(64)
        )
    };
    let mut wishes = [
        wish("a", &["pandas", "flask"], SCIENCE),
        wish("b", &["pandas", "scipy"], SCIENCE),
    ];
    for wish in &mut wishes {
        wish.requirements.retain(|(one, _)| one.name != "numpy");
        for (version, marker) in [
            ("0.9", "python_version < '3.11'"),
            ("1.0", "python_version >= '3.11'"),
        ] {
            let line = marked(version, marker);
            let found = requirements(&line).expect("a requirement").remove(0);
            wish.requirements.push((found, line));
        }
    }
    let shelf = Shelf::new(&wishes);
    let made = made(&wishes, &[], &least_memory(&shelf, OVERHEAD), &shelf);
    let lines = made[0]
        .spec
        .requirements
        .as_ref()
        .and_then(|all| all.lines.as_ref());
    let numpy = lines
        .into_iter()
        .flatten()
        .filter(|line| line.starts_with("numpy=="));
    assert_eq!(
        (made[0].change, numpy.count()),
        (Change::New, 2),
        "{:#?}",
        made[0]
    );
}

#[test]
fn who_imports_little_of_a_package_keeps_nobody_from_sharing_all_of_it() {
    let light: Vec<Kind> = SCIENCE
        .iter()
        .map(|kind| {
            (
                kind.0,
                if kind.0 == "scipy" { 1_500 } else { kind.1 },
                kind.2,
            )
        })
        .collect();
    let mut wishes: Vec<Wish> = (0..3)
        .map(|count| wish(&format!("heavy-{count}"), &["sklearn", "flask"], SCIENCE))
        .collect();
    let memory = |wishes: &[Wish]| {
        let shelf = Shelf::new(wishes);
        least_memory(&shelf, OVERHEAD).kib(OVERHEAD)
    };
    let before = memory(&wishes);
    wishes.push(wish("light", &["scipy"], &light));
    assert!(memory(&wishes) <= before + OVERHEAD.root + 21_500.0);
}

#[test]
fn what_most_sets_have_in_common_is_found_among_many_that_differ() {
    let small: Vec<String> = (0..20).map(|count| format!("p{count}")).collect();
    let mut kinds: Vec<Kind> = Vec::new();
    for name in &small {
        kinds.push((name.clone().leak(), 9_000, &[]));
    }
    kinds.push(("big", 100_000, &[]));
    let mut wishes: Vec<Wish> = (0..18)
        .map(|count| {
            wish(
                &format!("pair-{count}"),
                &[kinds[count].0, kinds[count + 1].0],
                &kinds,
            )
        })
        .collect();
    for (count, name) in ["x", "y"].into_iter().enumerate() {
        wishes.push(wish(name, &["big", kinds[count * 5].0], &kinds));
    }
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    let big = tree
        .nodes
        .iter()
        .filter(|node| names(&shelf, &node.own).contains(&"big".into()));
    assert_eq!(big.count(), 1);
}

#[test]
fn nobody_descends_from_a_set_without_packages_or_with_code_of_its_own() {
    let mut wishes = vec![
        wish("plain", &[], SCIENCE),
        wish("numbers", &["numpy"], SCIENCE),
        wish("tables", &["pandas"], SCIENCE),
    ];
    let above = |wishes: &[Wish]| {
        let shelf = Shelf::new(wishes);
        let drawn = drawn(&shelf, wishes, &least_memory(&shelf, OVERHEAD));
        let tables = drawn.into_iter().find(|(name, ..)| name == "tables");
        tables.and_then(|(_, above, _)| above)
    };
    assert_eq!(above(&wishes).as_deref(), Some("numbers"));
    wishes[1].spec.warm_up = Some("import numpy; numpy.seterr(all='raise')".into());
    assert_eq!(above(&wishes).as_deref(), Some("(numpy)"));
    wishes.remove(1);
    assert_eq!(above(&wishes), None);
}

#[test]
fn what_a_set_imports_beyond_others_counts_against_a_budget_until_it_is_given_up() {
    let heavy: Vec<Kind> = SCIENCE
        .iter()
        .map(|kind| {
            (
                kind.0,
                if kind.0 == "scipy" { 90_000 } else { kind.1 },
                kind.2,
            )
        })
        .collect();
    let wishes = [
        wish("light", &["scipy"], SCIENCE),
        wish("heavy", &["scipy", "flask"], &heavy),
    ];
    let shelf = Shelf::new(&wishes);
    let whole = least_memory(&shelf, OVERHEAD);
    let all = whole.kib(OVERHEAD);
    // flask alone frees 9,000 KiB, and nothing else goes with it.
    let tree = fit(whole, &shelf, OVERHEAD, all - 8_000.0).expect("it fits");
    let heavy = tree
        .nodes
        .iter()
        .find(|node| node.set == Some(1))
        .expect("heavy");
    let scipy = heavy
        .warm
        .ones()
        .any(|number| shelf.packages[number].name == "scipy");
    assert_eq!(tree.kib(OVERHEAD) < all - 60_000.0, !scipy);
}

#[test]
fn a_chain_is_as_deep_as_the_shim_allows() {
    let kinds: Vec<Kind> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
        .into_iter()
        .map(|name| (name, 50_000, &[][..]))
        .collect();
    let wishes: Vec<Wish> = (1..=kinds.len())
        .map(|count| {
            let imports: Vec<&str> = kinds.iter().take(count).map(|kind| kind.0).collect();
            wish(&format!("set-{count}"), &imports, &kinds)
        })
        .collect();
    let tree = least_memory(&Shelf::new(&wishes), OVERHEAD);
    let depth = |mut place: usize| {
        let mut depth = 1;
        while let Some(above) = tree.nodes[place].parent {
            (place, depth) = (above, depth + 1);
        }
        depth
    };
    assert_eq!((0..tree.nodes.len()).map(depth).max(), Some(DEEPEST));
}

#[test]
fn the_picture_shows_the_tree_and_what_it_saves() {
    let wishes = crossing();
    let shelf = Shelf::new(&wishes);
    let tree = least_memory(&shelf, OVERHEAD);
    let made = made(&wishes, &[], &tree, &shelf);
    assert_eq!(
        picture::tree(&tree, &shelf, &wishes, &made, OVERHEAD),
        "shop:\n\
         + shared-pandas-numpy  pandas, numpy  61 MiB  50 ms\n\
         ~ ├─ a                 flask          17 MiB   9 ms  1 Function\n\
         ~ └─ b                 scipy          47 MiB  40 ms  1 Function\n"
    );
    let alone = Tree::alone(&shelf);
    let compared = picture::comparison(&[("alone", &alone), ("planned", &tree)], &shelf, OVERHEAD);
    assert_eq!(
        compared,
        "         zygotes  memory of a node  import spared, mean of a start\n\
         alone          2           169 MiB                     74 of 74 ms\n\
         planned        3           124 MiB                     74 of 74 ms\n"
    );
}

/// Some of six packages for each of a few sets. The first three are needed by others.
fn few_sets() -> impl Strategy<Value = Vec<Vec<bool>>> {
    prop::collection::vec(prop::collection::vec(any::<bool>(), 6), 1..5)
}

const KINDS: &[Kind] = &[
    ("a", 30_000, &[]),
    ("b", 9_000, &["a"]),
    ("c", 60_000, &[]),
    ("d", 20_000, &["a", "c"]),
    ("e", 5_000, &["b", "a"]),
    ("f", 15_000, &[]),
];

fn wishes_of(sets: &[Vec<bool>]) -> Vec<Wish> {
    sets.iter()
        .enumerate()
        .map(|(number, chosen)| {
            let kinds = KINDS.iter().zip(chosen).filter(|(_, chosen)| **chosen);
            let imports: Vec<&str> = kinds.map(|(kind, _)| kind.0).collect();
            wish(&format!("set-{number}"), &imports, KINDS)
        })
        .collect()
}

/// Least memory of all trees with at most two zygotes that are there for others, by trying them all.
fn least_of_all(wishes: &[Wish]) -> f64 {
    let all: Vec<Wish> = (1_u32..64)
        .map(|bits| {
            let chosen = (0..6).map(|bit| bits & (1 << bit) != 0).collect();
            wishes_of(&[chosen]).remove(0)
        })
        // What loads more than itself is another one of them.
        .filter(|wish| wish.requirements.len() == wish.spec.imports.len())
        .collect();
    let sets: Vec<Vec<&str>> = wishes.iter().map(loaded).collect();
    let shared: Vec<Vec<&str>> = all.iter().map(loaded).collect();
    let cost = |packages: &[&str]| -> f64 {
        let kinds = KINDS.iter().filter(|kind| packages.contains(&kind.0));
        kinds
            .map(|kind| f64::from(u32::try_from(kind.1).expect("small")))
            .sum()
    };
    let memory = |shared: &[&Vec<&str>]| -> f64 {
        let mut nodes: Vec<Vec<&str>> = shared.iter().map(|one| (*one).clone()).collect();
        nodes.extend(sets.iter().cloned());
        nodes.sort_by_key(Vec::len);
        (0..nodes.len())
            .map(|place| {
                // Nobody descends from one that has nothing to share.
                let within = |one: &&Vec<&str>| {
                    !one.is_empty() && one.iter().all(|name| nodes[place].contains(name))
                };
                let above = nodes[..place].iter().filter(within).map(|one| cost(one));
                let above = above.max_by(f64::total_cmp);
                let beside = above.map_or(OVERHEAD.root, |above| OVERHEAD.child - above);
                beside + cost(&nodes[place])
            })
            .sum()
    };
    let mut least = memory(&[]);
    for (count, one) in shared.iter().enumerate() {
        least = least.min(memory(&[one]));
        for other in &shared[..count] {
            least = least.min(memory(&[one, other]));
        }
    }
    least
}

fn loaded(wish: &Wish) -> Vec<&str> {
    wish.requirements
        .iter()
        .map(|(one, _)| &*one.name)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_tree_takes_much_less_memory(sets in few_sets()) {
        let wishes = wishes_of(&sets);
        let shelf = Shelf::new(&wishes);
        let tree = least_memory(&shelf, OVERHEAD);
        let (found, least) = (tree.kib(OVERHEAD), least_of_all(&wishes));
        prop_assert!(found <= 1.05 * least + 1024.0, "{found} instead of {least}");
    }

    #[test]
    fn every_proposal_keeps_the_rules_of_a_tree(sets in few_sets(), share in 0.0..1.2_f64) {
        let wishes = wishes_of(&sets);
        let shelf = Shelf::new(&wishes);
        let whole = least_memory(&shelf, OVERHEAD);
        let kib = share * whole.kib(OVERHEAD);
        let Ok(tree) = fit(whole.clone(), &shelf, OVERHEAD, kib) else {
            return Ok(());
        };
        prop_assert!(tree.kib(OVERHEAD) <= kib);
        prop_assert!(tree.millis(&shelf).0 <= whole.millis(&shelf).0 + 1e-6);
        let made = made(&wishes, &[], &tree, &shelf);
        let packages = |one: &Proposal| -> BTreeSet<String> {
            let lines = one.spec.requirements.clone().and_then(|all| all.lines);
            lines.into_iter().flatten().collect()
        };
        for (place, one) in made.iter().enumerate() {
            // What it extends comes first, and has no package that this one lacks (lock/).
            if let Some(extends) = &one.spec.extends {
                let above = made[..place].iter().find(|above| above.name == extends.name);
                let above = above.expect("what it extends");
                prop_assert!(packages(above).is_subset(&packages(one)));
            }
            // An import finds all that it loads.
            for module in &one.spec.imports {
                let kind = KINDS.iter().find(|kind| kind.0 == module).expect("a kind");
                for name in kind.2.iter().chain([&kind.0]) {
                    prop_assert!(packages(one).contains(&line(name)));
                }
            }
        }
        let names: BTreeSet<&String> = made.iter().map(|one| &one.name).collect();
        prop_assert_eq!(names.len(), made.len());
        for wish in &wishes {
            prop_assert!(names.contains(&wish.name));
        }
    }
}
