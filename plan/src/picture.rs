//! A tree and what it is worth, for a terminal.

use std::fmt::Write as _;

use crate::proposal::{Change, Proposal};
use crate::shelf::{Shelf, Wish};
use crate::tree::{Overhead, Tree};

/// Names in a line of packages; more are counted.
const NAMED: usize = 4;

/// Draws the tree: per zygote what it imports itself, the memory and the import time of that, and who runs on it.
#[must_use]
pub fn tree(
    tree: &Tree,
    shelf: &Shelf,
    wishes: &[Wish],
    proposals: &[Proposal],
    overhead: Overhead,
) -> String {
    let mut rows: Vec<[String; 5]> = Vec::new();
    let roots = (0..tree.nodes.len()).filter(|place| tree.nodes[*place].parent.is_none());
    let mut namespace = "";
    let mut roots: Vec<usize> = roots.collect();
    roots.sort_by_key(|place| (&proposals[*place].namespace, &proposals[*place].spec.image));
    for root in roots {
        let proposal = &proposals[root];
        if proposal.namespace != namespace {
            namespace = &proposal.namespace;
            rows.push([
                format!("{namespace}:"),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
            ]);
        }
        branch(tree, root, "", "", &mut |place, prefix| {
            let node = &tree.nodes[place];
            let proposal = &proposals[place];
            let mut names: Vec<&str> = Vec::new();
            let mut own: Vec<usize> = node.own.ones().collect();
            own.sort_by(|a, b| most(shelf, *b).total_cmp(&most(shelf, *a)));
            names.extend(
                own.iter()
                    .take(NAMED)
                    .map(|number| &*shelf.packages[*number].name),
            );
            let mut packages = names.join(", ");
            if own.len() > NAMED {
                let _ = write!(packages, " and {} more", own.len() - NAMED);
            }
            let left = node.set.map_or(0, |set| {
                let mut left = shelf.sets[set].wanted.clone();
                left.difference_with(&node.warm);
                left.count_ones(..)
            });
            if left > 0 {
                let _ = write!(
                    packages,
                    "{}({left} not ahead)",
                    if own.is_empty() { "" } else { " " }
                );
            }
            let mark = match proposal.change {
                Change::New => "+ ",
                Change::Changed => "~ ",
                Change::Same => "  ",
            };
            let functions = match node.set.map(|set| wishes[set].functions) {
                None => String::new(),
                Some(1) => "1 Function".to_owned(),
                Some(count) => format!("{count} Functions"),
            };
            rows.push([
                format!("{mark}{prefix}{}", proposal.name),
                packages,
                mib(tree.kib_of(place, overhead)),
                format!("{:.0} ms", node.millis),
                functions,
            ]);
        });
    }
    columns(&rows)
}

fn most(shelf: &Shelf, package: usize) -> f64 {
    shelf
        .sets
        .iter()
        .map(|set| set.kib[package])
        .fold(0.0, f64::max)
}

fn branch(tree: &Tree, place: usize, prefix: &str, below: &str, draw: &mut dyn FnMut(usize, &str)) {
    draw(place, prefix);
    let children: Vec<usize> = tree.children(place).collect();
    for (count, child) in children.iter().enumerate() {
        let (here, next) = if count + 1 == children.len() {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        branch(
            tree,
            *child,
            &format!("{below}{here}"),
            &format!("{below}{next}"),
            draw,
        );
    }
}

/// Trees side by side: zygotes, memory on each node, import time that a start is spared.
#[must_use]
pub fn comparison(trees: &[(&str, &Tree)], shelf: &Shelf, overhead: Overhead) -> String {
    let head = [
        "",
        "zygotes",
        "memory of a node",
        "import spared, mean of a start",
    ]
    .map(str::to_owned);
    let rows = trees.iter().map(|(name, tree)| {
        let (spared, all) = tree.millis(shelf);
        [
            (*name).to_owned(),
            tree.nodes.len().to_string(),
            mib(tree.kib(overhead)),
            format!("{spared:.0} of {all:.0} ms"),
        ]
    });
    let rows: Vec<[String; 4]> = std::iter::once(head).chain(rows).collect();
    columns(&rows)
}

/// KiB as people read them.
#[must_use]
pub fn mib(kib: f64) -> String {
    format!("{:.0} MiB", kib / 1024.0)
}

fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let mut text = String::new();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        // A line of a heading only.
        if row[1..].iter().all(String::is_empty) {
            text += row[0].trim_end();
        } else {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                // Numbers are read from the right.
                let number = cell.starts_with(|c: char| c.is_ascii_digit()) && column > 0;
                line += &match number {
                    true => format!("{cell:>width$}  "),
                    false => format!("{cell:<width$}  "),
                };
            }
            text += line.trim_end();
        }
        text.push('\n');
    }
    text
}
