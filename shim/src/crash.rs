//! What is known of a pod after its shim crashed.
//!
//! containerd then runs the `delete` command for the sandbox alone, with nothing but the sandbox's bundle. So every container
//! leaves a line there before anything of it exists.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
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

/// Adds a container. The line is written at once: a shim that is killed meanwhile leaves none, or all of it.
///
/// # Errors
/// The file cannot be written, or a part would end the line or the part before it.
pub fn record(sandbox: &Path, trace: &Trace) -> io::Result<()> {
    let bundle = trace.bundle.as_os_str().as_bytes();
    if trace.id.contains(['\n', '\t'])
        || trace.cgroup.contains(['\n', '\t'])
        || bundle.contains(&b'\n')
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{trace:?} has a line break or a tab"),
        ));
    }
    let parts = [trace.id.as_bytes(), trace.cgroup.as_bytes(), bundle];
    let mut line = parts.join(&b'\t');
    line.push(b'\n');
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(sandbox.join(FILE))?;
    file.write_all(&line)
}

/// In a container's bundle, once the hooks for after its end have been run.
const STOPPED: &str = "sock-stopped";

/// Notes that the hooks for after the end of a container are run now, unless they were. Says whether they are to be.
///
/// # Errors
/// The file cannot be written.
pub fn stopped(bundle: &Path) -> io::Result<bool> {
    let noted = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(bundle.join(STOPPED));
    match noted {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// All containers of a pod.
#[must_use]
pub fn traces(sandbox: &Path) -> Vec<Trace> {
    parse(&fs::read(sandbox.join(FILE)).unwrap_or_default())
}

/// The containers that a file names. A line without an end was not written whole, so nothing of its container exists.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Trace> {
    let trace = |line: &[u8]| {
        let mut parts = line.strip_suffix(b"\n")?.splitn(3, |b| *b == b'\t');
        let mut text = || Some(String::from_utf8_lossy(parts.next()?).into_owned());
        Some(Trace {
            id: text()?,
            cgroup: text()?,
            bundle: std::ffi::OsString::from_vec(parts.next()?.to_vec()).into(),
        })
    };
    text.split_inclusive(|b| *b == b'\n')
        .filter_map(trace)
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_text_hides_no_other_line() {
        let found = parse(b"\xff\xfe\t\na\tb.slice:cri:a\t/run/\xff\n\0\0\0");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].id, "a");
        assert_eq!(found[0].bundle.as_os_str().as_bytes(), b"/run/\xff");
    }

    #[test]
    fn a_bundle_cut_short_is_not_taken_for_another() {
        assert_eq!(parse(b"a\tb.slice:cri:a\t/run/containerd/io.cont"), []);
    }

    proptest! {
        #[test]
        fn what_is_recorded_is_found_as_it_was_or_refused(
            list in prop::collection::vec(("\\PC{0,12}|[a-z\n\t]{0,4}", "\\PC{0,12}|[a-z\n\t]{0,4}", prop::collection::vec(1u8.., 0..12)), 0..6),
            torn in prop::collection::vec(any::<u8>().prop_filter("no line", |b| *b != b'\n'), 0..20),
        ) {
            let bundle = tempfile::tempdir().unwrap();
            let mut kept = Vec::new();
            for (id, cgroup, path) in list {
                let trace = Trace { id, cgroup, bundle: std::ffi::OsString::from_vec(path).into() };
                if record(bundle.path(), &trace).is_ok() {
                    kept.push(trace);
                }
            }
            let mut file = OpenOptions::new().create(true).append(true).open(bundle.path().join(FILE)).unwrap();
            file.write_all(&torn).unwrap();
            prop_assert_eq!(traces(bundle.path()), kept);
        }

        #[test]
        fn no_bytes_make_more_containers_than_lines(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes).len() <= bytes.iter().filter(|b| **b == b'\n').count());
        }
    }

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
