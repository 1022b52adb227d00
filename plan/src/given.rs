//! What there is to plan for.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use sock_lock::{Requirement, logical_lines, requirements, sha256};
use sock_plan::proposal::Planned;
use sock_plan::shelf::Wish;

/// Measures what a directory of packages costs to import.
pub const MEASURE: &str = include_str!("measure.py");

/// Longest text of a tenant's that is shown.
const LONGEST: usize = 400;

/// PackageSets, and what is not planned for.
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
    /// What stays as it is.
    pub left_out: Vec<LeftOut>,
}

/// A PackageSet that could not be measured, or extends one.
#[derive(Debug)]
pub struct LeftOut {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What it extends.
    pub extends: Option<String>,
    /// Why, for a person.
    pub why: String,
}

impl Given {
    /// Leaves out what extends something that is not planned for: its zygote could lose what it has by descent.
    pub fn leave_out_descendants(&mut self) {
        let orphan = |given: &Given| {
            let names = given.wishes.iter().map(|one| (&one.namespace, &one.name));
            let planned = given.planned.iter().map(|one| (&one.namespace, &one.name));
            let known: BTreeSet<_> = names.chain(planned).collect();
            given.wishes.iter().position(|wish| {
                let extends = wish.spec.extends.as_ref();
                extends.is_some_and(|extends| !known.contains(&(&wish.namespace, &extends.name)))
            })
        };
        while let Some(place) = orphan(self) {
            let wish = self.wishes.remove(place);
            let extends = wish.spec.extends.map(|extends| extends.name);
            let above = extends.clone().unwrap_or_default();
            self.left_out.push(LeftOut {
                namespace: wish.namespace,
                name: wish.name,
                extends,
                why: format!("it extends {above}, which is left out or missing"),
            });
        }
    }

    /// Those of an earlier plan that neither the PackageSets of these names nor those that are left out need.
    pub fn unused(&self, made: &BTreeSet<(&str, &str)>) -> Vec<&Planned> {
        let mut kept = made.clone();
        let of_left_out = self.left_out.iter();
        kept.extend(of_left_out.filter_map(|one| Some((&*one.namespace, one.extends.as_deref()?))));
        loop {
            let planned = self.planned.iter();
            let of_kept = planned.filter(|one| kept.contains(&(&*one.namespace, &*one.name)));
            let above = of_kept.filter_map(|one| {
                let extends = one.spec.extends.as_ref()?;
                Some((&*one.namespace, &*extends.name))
            });
            let more: Vec<_> = above.filter(|one| !kept.contains(one)).collect();
            if more.is_empty() {
                break;
            }
            kept.extend(more);
        }
        let planned = self.planned.iter();
        planned
            .filter(|one| !kept.contains(&(&*one.namespace, &*one.name)))
            .collect()
    }
}

/// Text of a tenant's for a terminal: without control characters, and not too much of it.
pub fn shown(text: &str) -> String {
    let text = text.trim();
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push_str(" ...");
    }
    shown
}

/// The requirements of a text, each with its line.
///
/// # Errors
/// The first line that is not pinned and hashed.
pub fn pinned(text: &str) -> Result<Vec<(Requirement, String)>> {
    let found = requirements(text).map_err(|error| anyhow::anyhow!("{error}"))?;
    let lines: BTreeMap<usize, String> = logical_lines(text).into_iter().collect();
    found
        .into_iter()
        .map(|requirement| {
            let line = lines.get(&requirement.line);
            let line = canonical(line.context("a line of the requirements")?);
            Ok((requirement, line))
        })
        .collect()
}

/// A requirement as the API server takes it: `name[extras]==version ; marker --hash=...`, the marker to the letter, since locks are
/// compared by it.
fn canonical(line: &str) -> String {
    let (head, hashes) = line.find(" --").map_or((line, ""), |at| line.split_at(at));
    let (project, marker) = head.split_once(';').unwrap_or((head, ""));
    let mut text: String = project.split_whitespace().collect();
    if !marker.is_empty() {
        text += " ; ";
        text += marker.trim();
    }
    for hash in hashes.split_whitespace() {
        text.push(' ');
        text += hash;
    }
    text
}

/// The extras that requirements ask for, by the name of the package.
pub fn extras(requirements: &[(Requirement, String)]) -> BTreeMap<&str, Vec<&str>> {
    let of = |line: &'_ str| {
        let at = line.split_once("==")?.0.split_once('[')?.0.len();
        let end = line.find(']')?;
        Some((at + 1, end))
    };
    let asked = requirements.iter().filter_map(|(one, line)| {
        let (from, to) = of(line)?;
        Some((&*one.name, line.get(from..to)?.split(',').collect()))
    });
    asked.collect()
}

/// Name of a measurement: another program, image, lock or list of imports may give other figures.
///
/// `whose` keeps those apart who need not believe each other: what is measured is what a tenant's own code says of itself.
pub fn key(whose: &str, image: &str, requirements: &str, imports: &[String]) -> String {
    let mut texts = vec![MEASURE, whose, image, requirements];
    texts.extend(imports.iter().map(String::as_str));
    sha256(&texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_are_written_as_the_api_server_takes_them() {
        let hash = format!("--hash=sha256:{}", "0".repeat(64));
        let text = format!("A_b [x, y] == 1.0 ;  python_version  < '3.11'   {hash} \\\n  {hash}\n");
        let found = pinned(&text).expect("requirements");
        assert_eq!(found[0].0.name, "a-b");
        assert_eq!(
            found[0].1,
            format!("A_b[x,y]==1.0 ; python_version  < '3.11' {hash} {hash}")
        );
        assert_eq!(extras(&found), BTreeMap::from([("a-b", vec!["x", "y"])]));
        // It is the same requirement to those who compare locks.
        let again = pinned(&found[0].1).expect("requirements");
        assert_eq!(again[0].0.marker, found[0].0.marker);
    }

    #[test]
    fn what_a_tenant_says_moves_no_cursor() {
        assert_eq!(shown("\u{1b}[2Jgone\nnext\u{7}."), " [2Jgone next .");
        assert!(shown(&"x".repeat(1000)).len() < 410);
    }
}
