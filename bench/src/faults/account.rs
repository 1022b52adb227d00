//! What is on the nodes, listed, to see what a fault has left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cluster::Equipped;

/// The same that the end-to-end tests look at.
const INVENTORY: &str = include_str!("../../../e2e/src/inventory.sh");

/// The node installer removes what was last used a minute ago.
const SETTLED_WITHIN: Duration = Duration::from_secs(150);

/// Every thing on the nodes: `worker: mount /run/…` and so on.
pub type Account = BTreeSet<String>;

/// Looks.
///
/// # Errors
/// If a node does not answer.
pub fn look(nodes: &[Equipped]) -> Result<Account> {
    let mut account = Account::new();
    for node in nodes {
        let found = node.node.shell(INVENTORY)?;
        account.extend(
            found
                .lines()
                .map(|line| format!("{}: {line}", node.node.name)),
        );
    }
    Ok(account)
}

/// Looks until nothing has changed for some seconds.
///
/// # Errors
/// If a node does not answer.
pub fn settled(nodes: &[Equipped]) -> Result<Account> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    let mut last = look(nodes)?;
    loop {
        std::thread::sleep(Duration::from_secs(3));
        let now = look(nodes)?;
        if now == last || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// What is more than it was, once it does not become less any more: how many of each kind, and which of these
/// kinds are new.
///
/// # Errors
/// If a node does not answer.
pub fn left(
    nodes: &[Equipped],
    before: &Account,
) -> Result<(BTreeMap<String, usize>, Vec<String>)> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    loop {
        let now = look(nodes)?;
        let left = more(before, &now);
        if left.is_empty() || Instant::now() > deadline {
            let new = now.difference(before);
            let new = new.filter(|line| left.contains_key(kind(line)));
            let new = new.cloned().collect();
            return Ok((left, new));
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

fn kind(line: &str) -> &str {
    line.split(' ').nth(1).unwrap_or_default()
}

/// By kind, since pods have other names in the end, and may have changed their nodes: what one has more the
/// other has less.
fn more(before: &Account, after: &Account) -> BTreeMap<String, usize> {
    let mut more = BTreeMap::<String, usize>::new();
    for line in after {
        *more.entry(kind(line).to_owned()).or_default() += 1;
    }
    for line in before {
        if let Some(count) = more.get_mut(kind(line)) {
            *count = count.saturating_sub(1);
        }
    }
    more.retain(|_, count| *count > 0);
    more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moved_to_another_node_is_not_left() {
        let account = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
        let before: Account = account(&["a: mount /x", "a: mount /y", "b: shim 1"]);
        let after = account(&["b: mount /x", "b: mount /z", "a: mount /w", "a: shim 2"]);
        assert_eq!(
            more(&before, &after),
            BTreeMap::from([("mount".to_owned(), 1)])
        );
    }
}
