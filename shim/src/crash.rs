//! What is known of a pod after its shim crashed.
//!
//! containerd then runs the `delete` command for the sandbox alone, with nothing but the sandbox's bundle. So every container
//! leaves a line there before anything of it exists.

use std::fs::{OpenOptions, read_to_string};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// In the sandbox's bundle, which is the working directory of the shim's server.
const FILE: &str = "sock-containers";

/// A container as the file names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Its ID.
    pub id: String,
    /// Its `linux.cgroupsPath`.
    pub cgroup: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
}

/// Adds a container. The three parts come from containerd and hold no line break.
///
/// # Errors
/// The file cannot be written.
pub fn record(sandbox: &Path, trace: &Trace) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(sandbox.join(FILE))?;
    writeln!(
        file,
        "{}\t{}\t{}",
        trace.id,
        trace.cgroup,
        trace.bundle.display()
    )
}

/// All containers of a pod.
#[must_use]
pub fn traces(sandbox: &Path) -> Vec<Trace> {
    let text = read_to_string(sandbox.join(FILE)).unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Trace> {
    let mut parts = line.splitn(3, '\t');
    Some(Trace {
        id: parts.next()?.into(),
        cgroup: parts.next()?.into(),
        bundle: parts.next()?.into(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_found_and_a_torn_line_is_not() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(traces(bundle.path()), []);
        let trace = |id: &str| Trace {
            id: id.into(),
            cgroup: format!("a.slice:cri:{id}"),
            bundle: format!("/run/{id}").into(),
        };
        record(bundle.path(), &trace("one")).unwrap();
        record(bundle.path(), &trace("two")).unwrap();
        let mut file = OpenOptions::new()
            .append(true)
            .open(bundle.path().join(FILE))
            .unwrap();
        file.write_all(b"thr").unwrap();
        assert_eq!(traces(bundle.path()), [trace("one"), trace("two")]);
    }
}
