//! What is on the nodes: processes, mounts, cgroups, files, networks. What a test adds must be gone after it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};

use crate::cluster::{get, kubectl};
use crate::node::Node;
use crate::wait::{MINUTE, until};

const SCRIPT: &str = include_str!("inventory.sh");

/// One thing a line, with its node.
pub type Inventory = BTreeSet<String>;

/// What is there now.
///
/// # Errors
/// A node does not answer.
pub fn inventory(nodes: &[Node]) -> Result<Inventory> {
    let mut all = Inventory::new();
    for node in nodes {
        for line in node.shell(SCRIPT, &[])?.lines() {
            all.insert(format!("{}: {line}", node.name));
        }
    }
    Ok(all)
}

/// What is there when nothing of earlier tests is left, which is on its way out for a while.
///
/// # Errors
/// Something stays.
pub fn inventory_of_quiet(nodes: &[Node]) -> Result<Inventory> {
    until_other_tests_are_gone()?;
    until("nothing of earlier tests is left", 3 * MINUTE, || {
        let strays = strays(nodes)?;
        ensure!(strays.is_empty(), "{strays:#?}");
        Ok(Some(()))
    })?;
    inventory(nodes)
}

/// Waits until nothing is there that was not before. Namespaces go when their pods' objects have gone. What is on the
/// nodes follows a little later, node cache and pool directories last: the node installer removes them within about a
/// minute of their last use.
///
/// # Errors
/// Something stays.
pub fn until_as_before(nodes: &[Node], before: &Inventory) -> Result<()> {
    until_settled(nodes, before, |now| now.is_subset(before))
}

/// The same where containers of others were started anew meanwhile, and have other names: there is as much of each kind.
///
/// # Errors
/// There is more.
pub fn until_as_much(nodes: &[Node], before: &Inventory) -> Result<()> {
    fn kinds(all: &Inventory) -> BTreeMap<&str, usize> {
        let mut kinds = BTreeMap::new();
        for line in all {
            let thing = line.split_once(": ").map_or("", |(_, thing)| thing);
            *kinds
                .entry(thing.split(' ').next().unwrap_or_default())
                .or_default() += 1;
        }
        kinds
    }
    let most = kinds(before);
    until_settled(nodes, before, |now| {
        let mut kinds = kinds(now).into_iter();
        kinds.all(|(kind, count)| count <= most.get(kind).copied().unwrap_or(0))
    })
}

fn until_settled(
    nodes: &[Node],
    before: &Inventory,
    is_settled: impl Fn(&Inventory) -> bool,
) -> Result<()> {
    until_other_tests_are_gone()?;
    let mut last: Vec<String> = Vec::new();
    let settled = until("the nodes are as they were", 3 * MINUTE, || {
        let now = inventory(nodes)?;
        last = now.difference(before).cloned().collect();
        Ok(is_settled(&now).then_some(()))
    });
    settled.with_context(|| format!("left behind: {last:#?}"))
}

/// What belongs to tests that ran before is on its way out; waits until it is gone.
///
/// # Errors
/// It stays.
pub fn until_other_tests_are_gone() -> Result<()> {
    kubectl(&[
        "delete",
        "namespace",
        "sock-e2e",
        "--ignore-not-found",
        "--timeout=60s",
    ])?;
    until("the namespaces of other tests are gone", 3 * MINUTE, || {
        let list = get(&["namespaces", "--selector=sock-e2e=test"])?;
        let left = list["items"].as_array().context("namespaces")?.len();
        Ok((left == 0).then_some(()))
    })
}

/// Every shim, pool directory and cached lock belongs to something that is there: what earlier tests left would not.
fn strays(nodes: &[Node]) -> Result<Vec<String>> {
    let namespaces = get(&["namespaces"])?;
    let tenants: BTreeSet<&str> = namespaces["items"]
        .as_array()
        .context("namespaces")?
        .iter()
        .filter_map(|one| one["metadata"]["uid"].as_str())
        .collect();
    let mut strays = Vec::new();
    for node in nodes {
        let sandboxes = node.shell("crictl pods --quiet --no-trunc", &[])?;
        let sandboxes: BTreeSet<&str> = sandboxes.lines().collect();
        let found = inventory(std::slice::from_ref(node))?;
        for line in &found {
            let thing = line.split_once(": ").map_or("", |(_, thing)| thing);
            if let Some(arguments) = thing.strip_prefix("shim ") {
                let id = arguments.split(' ').next().unwrap_or_default();
                if !sandboxes.contains(id) {
                    strays.push(line.clone());
                }
            }
            for directory in ["file /run/sock/pools/", "file /var/lib/sock/cache/"] {
                let tenant = thing
                    .strip_prefix(directory)
                    .and_then(|rest| rest.split('/').next());
                if tenant.is_some_and(|tenant| !tenants.contains(tenant)) {
                    strays.push(line.clone());
                }
            }
        }
    }
    Ok(strays)
}
