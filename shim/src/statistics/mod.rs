//! What a container's cgroup counts, as containerd's messages: every value that the kernel tells and the message has a place for.
//!
//! A file that the kernel does not have (a controller that is not built in, a newer file) counts as zeros, as containerd's own
//! collector has it; the values are the cgroup's with all below it, so those of a Function include its leaves.

mod version_1;
mod version_2;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use containerd_shim::protos::protobuf;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use sock_sandbox::cgroup::Cgroup;

use crate::events::any;

/// The statistics of a cgroup: `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`.
///
/// # Errors
/// As protobuf's encoding.
pub fn of(cgroup: &Cgroup) -> Result<Any, protobuf::Error> {
    if cgroup.unified() {
        any("io.containerd.cgroups.v2", &version_2::metrics(cgroup))
    } else {
        any("io.containerd.cgroups.v1", &version_1::metrics(cgroup))
    }
}

/// The directory of one controller, which need not be there.
struct Files(Option<PathBuf>);

impl Files {
    fn of(cgroup: &Cgroup, controller: &str) -> Self {
        Self(cgroup.controller(controller).map(Path::to_owned))
    }

    fn text(&self, name: &str) -> String {
        let text = self.0.as_ref().map(|at| fs::read_to_string(at.join(name)));
        text.and_then(Result::ok).unwrap_or_default()
    }

    /// A file of one number; `max` is `unlimited`.
    fn number(&self, name: &str, unlimited: u64) -> u64 {
        match self.text(name).trim() {
            "max" => unlimited,
            text => text.parse().unwrap_or(0),
        }
    }

    /// A file of lines `KEY VALUE` (cgroup-v2.rst, "Flat keyed").
    fn table(&self, name: &str) -> Table {
        let text = self.text(name);
        let pair = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        };
        Table(text.lines().filter_map(pair).collect())
    }

    /// The sizes of huge pages that are accounted: `2MB` of each `hugetlb.2MB.*`.
    fn sizes_of_huge_pages(&self) -> Vec<String> {
        let entries = self.0.as_ref().map(fs::read_dir).and_then(Result::ok);
        let mut sizes: Vec<String> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (size, file) = name.strip_prefix("hugetlb.")?.split_once('.')?;
                matches!(file, "usage_in_bytes" | "current").then(|| size.to_owned())
            })
            .collect();
        sizes.sort();
        sizes
    }

    /// Lines `DEVICE hca_handle=N hca_object=M` (cgroup-v2.rst, "RDMA Interface Files"), each as `entry` has it.
    fn rdma<E>(&self, name: &str, entry: impl Fn(String, u32, u32) -> E) -> Vec<E> {
        let of = |line: &str| {
            let (device, values) = line.split_once(' ')?;
            let value = |key| {
                let found = pairs(values).find(|(name, _)| *name == key);
                found.map_or(0, |(_, value)| match value {
                    "max" => u32::MAX,
                    value => value.parse().unwrap_or(0),
                })
            };
            Some(entry(
                device.to_owned(),
                value("hca_handle"),
                value("hca_object"),
            ))
        };
        self.text(name).lines().filter_map(of).collect()
    }
}

/// `KEY=VALUE` in a line.
fn pairs(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split_ascii_whitespace()
        .filter_map(|pair| pair.split_once('='))
}

/// A device as `MAJOR:MINOR`.
fn device<N: FromStr>(text: &str) -> Option<(N, N)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

struct Table(HashMap<String, u64>);

impl Table {
    /// The value of a key, 0 where there is none.
    fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with files as the kernel writes them, and nothing else.
    pub(super) fn directory(files: &[(&str, &str)]) -> std::io::Result<tempfile::TempDir> {
        let directory = tempfile::tempdir()?;
        for (name, text) in files {
            fs::write(directory.path().join(name), text)?;
        }
        Ok(directory)
    }

    /// The same as [`Files`].
    pub(super) fn files(files: &[(&str, &str)]) -> std::io::Result<(tempfile::TempDir, Files)> {
        let directory = directory(files)?;
        let files = Files(Some(directory.path().to_owned()));
        Ok((directory, files))
    }

    #[test]
    fn a_limit_that_is_none_is_what_the_message_has_for_it() -> std::io::Result<()> {
        let (_directory, files) = files(&[("pids.max", "max\n"), ("pids.current", "3\n")])?;
        assert_eq!(files.number("pids.max", u64::MAX), u64::MAX);
        assert_eq!(files.number("pids.max", 0), 0);
        assert_eq!(files.number("pids.current", 0), 3);
        assert_eq!(files.number("pids.peak", u64::MAX), 0);
        assert_eq!(Files(None).number("pids.current", u64::MAX), 0);
        Ok(())
    }

    #[test]
    fn sizes_of_huge_pages_are_those_of_either_version() -> std::io::Result<()> {
        let (_directory, files) = files(&[
            ("hugetlb.2MB.usage_in_bytes", "0\n"),
            ("hugetlb.2MB.limit_in_bytes", "0\n"),
            ("hugetlb.1GB.current", "0\n"),
            ("hugetlb.1GB.rsvd.current", "0\n"),
            ("memory.current", "0\n"),
        ])?;
        assert_eq!(files.sizes_of_huge_pages(), ["1GB", "2MB"]);
        assert!(Files(None).sizes_of_huge_pages().is_empty());
        Ok(())
    }

    #[test]
    fn rdma_is_counted_by_device() -> std::io::Result<()> {
        let (_directory, files) = files(&[(
            "rdma.max",
            "mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\ngarbage\n",
        )])?;
        let entries = files.rdma("rdma.max", |device, handles, objects| {
            (device, handles, objects)
        });
        let expected = [("mlx4_0", 2, 2000), ("ocrdma1", 3, u32::MAX)];
        assert_eq!(entries, expected.map(|(d, h, o)| (d.to_owned(), h, o)));
        Ok(())
    }
}
