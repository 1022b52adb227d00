//! Where the time of a forked request goes: the shim's debug line about each leaf, found in the
//! journal of the node by the time of the request.

use anyhow::{Context, Result, bail};

use crate::cluster::Node;
use crate::node::load::Sample;
use crate::table::table;

const DROP_IN: &str = "/run/systemd/system/containerd.service.d/sock-bench.conf";

/// A measurement by an earlier version that was cut short left a link to the shim here, on containerd's PATH.
const STALE: &str = "/usr/local/bin/containerd-shim-sock-v1";

/// Microseconds that a line may be written after the answer: the leaf does not wait for the shim to
/// hear that it is ready. Requests whose leaves are looked for are further apart.
const LATE: u64 = 20_000;

/// While this lives, the shims that containerd starts on the node log the start of every leaf.
#[derive(Debug)]
pub struct Tracing {
    node: Node,
}

impl Tracing {
    /// # Errors
    /// If containerd does not come back with the variable set.
    pub fn start(node: &Node) -> Result<Tracing> {
        let tracing = Tracing { node: node.clone() };
        // A shim inherits the environment of containerd. What lies in /run is gone after a reboot.
        node.shell(&format!(
            "rm -f {STALE} && mkdir -p $(dirname {DROP_IN}) &&
             printf '[Service]\\nEnvironment=SOCK_LOG=info,sock_shim::activation=debug\\n' >{DROP_IN} &&
             systemctl daemon-reload && systemctl restart containerd"
        ))?;
        Ok(tracing)
    }

    /// Whether it is this node's.
    #[must_use]
    pub fn is_on(&self, node: &Node) -> bool {
        self.node.name == node.name
    }

    /// The start of the leaf that each sample made, for the samples that made one.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub fn starts(&self, samples: &[Sample]) -> Result<Vec<(Sample, Start)>> {
        let Some(first) = samples.iter().map(|sample| sample.began).min() else {
            return Ok(Vec::new());
        };
        let since = first / 1_000_000;
        let journal = self.node.shell(&format!(
            "journalctl -u containerd --since @{since} --output=cat --no-pager | grep -F 'leaf ready (microseconds)' || true"
        ))?;
        let starts: Vec<(u64, Start)> = journal.lines().filter_map(logged).collect();
        Ok(samples
            .iter()
            .filter_map(|sample| {
                let until = sample.began + sample.took + LATE;
                let within = |(ready, _): &&(u64, Start)| (sample.began..=until).contains(ready);
                let (_, start) = starts.iter().find(within)?;
                Some((*sample, start.clone()))
            })
            .collect())
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let undone = self.node.shell(&format!(
            "rm -f {DROP_IN} && rmdir --ignore-fail-on-non-empty $(dirname {DROP_IN}) &&
             systemctl daemon-reload && systemctl restart containerd"
        ));
        if let Err(error) = undone {
            eprintln!("{} goes on to log every leaf: {error:#}", self.node.name);
        }
    }
}

/// How a leaf came to be; times in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// `Fork`, `Spare` or `Interpreter`.
    pub origin: String,
    /// In the zygote.
    pub fork: u64,
    /// From the decision until the leaf was told of its Function.
    pub told: u64,
    /// From there until it was confined.
    pub confined: u64,
    /// The steps of that.
    pub phases: Vec<(String, u64)>,
    /// Of the handler.
    pub import: u64,
    /// From the decision until it was ready.
    pub total: u64,
}

impl Start {
    /// A table of what each step of a request took.
    #[must_use]
    pub fn table(&self, request: &Sample) -> String {
        let rows = self.rows(request).into_iter();
        let rows: Vec<_> = rows
            .map(|(step, micros)| vec![step, micros.to_string()])
            .collect();
        table(&["step", "µs"], &rows)
    }

    /// Lines with what each step of a request took, the steps within a step indented.
    fn rows(&self, request: &Sample) -> Vec<(String, u64)> {
        let row = |name: &str, micros| (name.to_owned(), micros);
        let waited = self
            .total
            .saturating_sub(self.told + self.confined + self.import);
        let mut rows = vec![
            row("cgroup, fork, told of its Function", self.told),
            row("  of this, the fork in the zygote", self.fork),
            row(
                "into the pod's root, cgroup, namespaces and limits",
                self.confined,
            ),
        ];
        rows.extend(
            self.phases
                .iter()
                .map(|(name, micros)| row(&format!("  {name}"), *micros)),
        );
        rows.extend([
            row("import of the handler", self.import),
            row("reseeding, messages between shim and leaf", waited),
            row(
                "connection, handler, answer",
                request.took.saturating_sub(self.total),
            ),
            row("the whole request", request.took),
        ]);
        rows
    }
}

/// When the shim wrote a line, and what it says.
fn logged(line: &str) -> Option<(u64, Start)> {
    let time: jiff::Timestamp = line.split_whitespace().next()?.parse().ok()?;
    Some((
        u64::try_from(time.as_microsecond()).ok()?,
        start(line).ok()?,
    ))
}

fn start(line: &str) -> Result<Start> {
    let text = |name: &str| {
        let from = line
            .find(&format!(" {name}="))
            .with_context(|| format!("no {name}"))?
            + name.len()
            + 2;
        let rest = &line[from..];
        anyhow::Ok(&rest[..rest.find(' ').unwrap_or(rest.len())])
    };
    let number = |name: &str| text(name)?.parse::<u64>().with_context(|| name.to_owned());
    Ok(Start {
        origin: text("origin")?.to_owned(),
        fork: number("fork")?,
        told: number("told")?,
        confined: number("confined")?,
        phases: listed(line, "phases")?,
        import: number("import")?,
        total: number("total")?,
    })
}

/// `NAME=[("mount", 12), ("proc", 30)]`.
///
/// # Errors
/// The line has no such list.
pub fn listed(line: &str, name: &str) -> Result<Vec<(String, u64)>> {
    let list = line
        .split_once(&format!(" {name}=["))
        .and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.with_context(|| format!("no {name}"))?;
    let pairs = list.split("(\"").skip(1);
    pairs
        .map(|pair| {
            let Some((name, micros)) = pair.split_once("\", ") else {
                bail!("a phase without a time: {pair}")
            };
            let digits = micros.find(')').map_or(micros, |end| &micros[..end]);
            Ok((name.to_owned(), digits.parse()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = concat!(
        "2026-11-23T14:50:17.707801Z DEBUG shim::activation::driver: ",
        "leaf ready (microseconds) leaf=3 origin=Fork fork=810 told=1200 confined=900 import=300 total=2500 ",
        "phases=[(\"unshare\", 110), (\"cgroup move\", 45)]"
    );

    #[test]
    fn a_line_of_the_shim_is_understood() {
        let (time, start) = logged(LINE).unwrap();
        assert_eq!(time, 1_795_445_417_707_801);
        assert_eq!(start.origin, "Fork");
        assert_eq!((start.fork, start.told, start.confined), (810, 1200, 900));
        assert_eq!((start.import, start.total), (300, 2500));
        let phases = [("unshare".to_owned(), 110), ("cgroup move".to_owned(), 45)];
        assert_eq!(start.phases, phases);
    }

    #[test]
    fn the_steps_of_a_request_sum_up_to_it() {
        let (began, start) = logged(LINE).unwrap();
        let rows = start.rows(&Sample { began, took: 4000 });
        let steps = rows.iter().filter(|(name, _)| !name.starts_with(' '));
        let (whole, parts): (Vec<_>, Vec<_>) =
            steps.partition(|(name, _)| name == "the whole request");
        assert_eq!(
            whole[0].1,
            parts.iter().map(|(_, micros)| micros).sum::<u64>()
        );
    }

    #[test]
    fn other_lines_are_left_out() {
        assert_eq!(
            logged("2026-11-23T14:50:17.707801Z DEBUG shim: leaf ready (microseconds) leaf=3"),
            None
        );
        assert_eq!(logged(""), None);
    }
}
