//! What the zygotes of a node may hold, and what they do.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::cluster::{self, Node};

const NODES: &str = "daemonset/sock-node";
const SYSTEM: &str = "--namespace=sock-system";
const VARIABLE: &str = "SOCK_ZYGOTE_MEMORY";
/// Zygotes that were busy a minute ago end a moment later.
const SETTLED_WITHIN: Duration = Duration::from_secs(180);

/// Puts back what the node installer was told before, when dropped.
pub struct Budget<'a> {
    node: &'a Node,
    before: String,
}

impl<'a> Budget<'a> {
    /// As it is.
    pub fn of(node: &'a Node) -> Result<Budget<'a>> {
        let set = cluster::get(&[SYSTEM, NODES])?;
        let environment = &set["spec"]["template"]["spec"]["containers"][0]["env"];
        let mut environment = environment.as_array().into_iter().flatten();
        let before = environment.find(|one| one["name"] == VARIABLE);
        let before = before.and_then(|one| one["value"].as_str());
        let before = before.with_context(|| format!("{NODES} has no {VARIABLE}"))?;
        Ok(Budget {
            node,
            before: before.to_owned(),
        })
    }

    fn set(value: &str) -> Result<()> {
        let value = format!("{VARIABLE}={value}");
        cluster::kubectl(&["set", "env", SYSTEM, NODES, &value])?;
        cluster::kubectl(&["rollout", "status", SYSTEM, NODES, "--timeout=120s"])?;
        Ok(())
    }

    /// To so many bytes, and returns when the node's shims can know.
    pub fn change(&self, bytes: u64) -> Result<()> {
        Self::set(&bytes.to_string())?;
        let begun = Instant::now();
        while self.node.shell("cat /run/sock/zygote-memory")?.trim() != bytes.to_string() {
            if begun.elapsed() > SETTLED_WITHIN {
                bail!("the shims of {} are not told their budget", self.node.name);
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }
}

impl Drop for Budget<'_> {
    fn drop(&mut self) {
        if let Err(error) = Self::set(&self.before) {
            eprintln!("{VARIABLE} is not what it was, {}: {error:#}", self.before);
        }
    }
}

/// As pools' shims account for it on the node.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Account {
    tenant: String,
    bytes: u64,
    is_alive: bool,
}

/// The zygotes of a namespace that live.
pub struct Zygotes<'a> {
    node: &'a Node,
    namespace: &'a str,
    /// How many.
    pub count: usize,
    /// What they hold together.
    pub bytes: u64,
}

impl<'a> Zygotes<'a> {
    /// Now.
    pub fn of(node: &'a Node, namespace: &'a str) -> Result<Zygotes<'a>> {
        let tenant = cluster::get(&["namespace", namespace])?;
        let tenant = tenant["metadata"]["uid"].as_str().context("metadata.uid")?;
        let text = node.shell("cat /run/sock/zygotes/* 2>/dev/null || true")?;
        let accounts = serde_json::Deserializer::from_str(&text).into_iter::<Account>();
        let accounts = accounts
            .collect::<Result<Vec<_>, _>>()
            .context("an account of a zygote")?;
        let living = accounts
            .iter()
            .filter(|one| one.is_alive && one.tenant == tenant);
        let (count, bytes) = living.fold((0, 0), |(n, bytes), one| (n + 1, bytes + one.bytes));
        Ok(Zygotes {
            node,
            namespace,
            count,
            bytes,
        })
    }

    /// Returns when those that live hold at most so much.
    pub fn until_within(&self, bytes: u64) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = Zygotes::of(self.node, self.namespace)?;
            if now.bytes <= bytes {
                return Ok(());
            }
            if begun.elapsed() > SETTLED_WITHIN {
                bail!("zygotes hold {} bytes, of {bytes} that they may", now.bytes);
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// How long nobody on the machine got on for want of memory so far, in microseconds; none where the kernel does not say.
pub fn stalled_micros(node: &Node) -> Result<u64> {
    let text = node.shell("cat /proc/pressure/memory 2>/dev/null || true")?;
    let full = text.lines().find_map(|line| line.strip_prefix("full "));
    let total = full.and_then(|line| line.split("total=").nth(1));
    total.map_or(Ok(0), |total| Ok(total.trim().parse()?))
}
