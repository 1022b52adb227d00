//! What is on the nodes, counted, to see what a fault has left behind.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cluster::Equipped;

/// The same that the end-to-end tests look at.
const INVENTORY: &str = include_str!("../../../e2e/src/inventory.sh");

/// The node installer removes what was last used a minute ago.
const SETTLED_WITHIN: Duration = Duration::from_secs(150);

/// How many things of a kind each node has: `worker: mount` and so on.
pub type Account = BTreeMap<String, usize>;

/// Counts.
///
/// # Errors
/// If a node does not answer.
pub fn count(nodes: &[Equipped]) -> Result<Account> {
    let mut account = Account::new();
    for node in nodes {
        for line in node.node.shell(INVENTORY)?.lines() {
            let kind = line.split(' ').next().unwrap_or_default();
            *account
                .entry(format!("{}: {kind}", node.node.name))
                .or_default() += 1;
        }
    }
    Ok(account)
}

/// Counts until two counts that are seconds apart are the same.
///
/// # Errors
/// If a node does not answer.
pub fn settled(nodes: &[Equipped]) -> Result<Account> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    let mut last = count(nodes)?;
    loop {
        std::thread::sleep(Duration::from_secs(3));
        let now = count(nodes)?;
        if now == last || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// What is more than it was, once it does not become less any more.
///
/// # Errors
/// If a node does not answer.
pub fn left(nodes: &[Equipped], before: &Account) -> Result<Account> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    loop {
        let left = more(before, &count(nodes)?);
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// Pods may have changed their nodes: what one has more the other has less.
fn more(before: &Account, after: &Account) -> Account {
    let by_kind = |account: &Account| {
        let mut kinds = Account::new();
        for (name, count) in account {
            let kind = name.rsplit(' ').next().unwrap_or_default();
            *kinds.entry(kind.to_owned()).or_default() += count;
        }
        kinds
    };
    let before = by_kind(before);
    let mut after = by_kind(after);
    for (kind, count) in &mut after {
        *count = count.saturating_sub(before.get(kind).copied().unwrap_or(0));
    }
    after.retain(|_, count| *count > 0);
    after
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moved_to_another_node_is_not_left() {
        let account = |parts: &[(&str, usize)]| {
            let parts = parts
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count));
            parts.collect::<Account>()
        };
        let before = account(&[("a: mount", 3), ("b: mount", 2), ("a: shim", 1)]);
        let after = account(&[("a: mount", 2), ("b: mount", 4), ("b: shim", 1)]);
        assert_eq!(more(&before, &after), account(&[("mount", 1)]));
    }
}
