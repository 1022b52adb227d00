//! The files of `/opt/sock`: copied from the image to the host so that nobody ever sees half of one.

use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use crate::host::Host;

#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}{}", remedy(source))]
pub struct Error {
    step: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

fn remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::ReadOnlyFilesystem => {
            "; this system keeps the directory read-only: mount a writable file system there"
        }
        std::io::ErrorKind::StorageFull => "; make room on the node's disk",
        _ => "",
    }
}

trait Step<T> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error {
            step,
            path: path.to_owned(),
            source,
        })
    }
}

/// Directories that are only mount points: an image builder may drop them for being empty.
const MOUNT_POINTS: [&str; 2] = ["site-packages", "install"];

/// Makes `to` hold the files of `from`, and returns how many it had to write.
///
/// A file that differs is replaced by rename: shims that run keep the one they were started from. Programs come
/// last, so that a new one never meets old files of its own.
pub fn copy(from: &Path, to: &Path) -> Result<usize, Error> {
    let mut files = Vec::new();
    list(from, Path::new(""), &mut files)?;
    files.sort_by_key(|file| (file.starts_with("bin"), file.clone()));

    make_directory(to)?;
    for name in MOUNT_POINTS {
        make_directory(&to.join(name))?;
    }
    let mut written = 0;
    for file in files {
        written += usize::from(replace(&from.join(&file), &to.join(&file))?);
    }
    Ok(written)
}

/// Where the files of sock lie, in the image and on the host.
pub const PAYLOAD: &str = "/opt/sock";

/// Where containerd looks for programs before its PATH (its plugin `io.containerd.internal.v1.opt`, docs/managed-opt.md), and
/// makes the directory itself.
const PROGRAMS: &str = "/opt/containerd/bin";
const SHIM: &str = "containerd-shim-sock-v1";

/// containerd's way to start pods, on the host.
pub fn shim() -> PathBuf {
    Path::new(PAYLOAD).join("bin").join(SHIM)
}

/// Lets containerd find the shim by the name of the runtime, `io.containerd.sock.v1`, for those who do without Kubernetes'
/// configuration (`ctr run`, nerdctl). What somebody else has put there stays. Says if it was put there now.
pub fn link(host: &Host) -> Result<bool, Error> {
    let directory = host.path(PROGRAMS);
    let link = directory.join(SHIM);
    if !directory.is_dir() || fs::symlink_metadata(&link).is_ok() {
        return Ok(false);
    }
    symlink(shim(), &link).step("link", &link)?;
    Ok(true)
}

/// Takes that back.
pub fn unlink(host: &Host) -> Result<(), Error> {
    let link = host.path(PROGRAMS).join(SHIM);
    if fs::read_link(&link).is_ok_and(|to| to == shim()) {
        fs::remove_file(&link).step("remove", &link)?;
    }
    Ok(())
}

fn list(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let directory = root.join(below);
    for entry in fs::read_dir(&directory).step("list", &directory)? {
        let entry = entry.step("list", &directory)?;
        let name = below.join(entry.file_name());
        if entry.file_type().step("look at", &entry.path())?.is_dir() {
            list(root, &name, files)?;
        } else {
            files.push(name);
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).step("create directory", path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755)).step("set the mode of", path)
}

fn replace(from: &Path, to: &Path) -> Result<bool, Error> {
    let mode = fs::metadata(from)
        .step("look at", from)?
        .permissions()
        .mode()
        & 0o755;
    if let Ok(there) = fs::symlink_metadata(to)
        && there.is_file()
        && there.permissions().mode() & 0o7777 == mode
        && same(from, to)?
    {
        return Ok(false);
    }
    if let Some(parent) = to.parent() {
        make_directory(parent)?;
    }
    write(to, mode, &fs::read(from).step("read", from)?)?;
    Ok(true)
}

fn same(one: &Path, other: &Path) -> Result<bool, Error> {
    if fs::metadata(one).step("look at", one)?.len()
        != fs::metadata(other).step("look at", other)?.len()
    {
        return Ok(false);
    }
    let (mut first, mut second) = (
        File::open(one).step("open", one)?,
        File::open(other).step("open", other)?,
    );
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let read = first.read(&mut left).step("read", one)?;
        if read == 0 {
            return Ok(true);
        }
        if second.read_exact(&mut right[..read]).is_err() || left[..read] != right[..read] {
            return Ok(false);
        }
    }
}

/// Writes a file beside its place and renames it there, with everything on the disk before the name changes.
pub fn write(to: &Path, mode: u32, bytes: &[u8]) -> Result<(), Error> {
    let parent = to.parent().unwrap_or(Path::new("/"));
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = parent.join(format!(".{name}.unfinished"));
    fs::write(&unfinished, bytes).step("write", &unfinished)?;
    fs::set_permissions(&unfinished, Permissions::from_mode(mode))
        .step("set the mode of", &unfinished)?;
    File::open(&unfinished)
        .and_then(|file| file.sync_all())
        .step("sync", &unfinished)?;
    fs::rename(&unfinished, to).step("rename into place", to)?;
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .step("sync", parent)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn containerd_finds_the_shim_where_it_looks_and_only_as_long_as_sock_is_there() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path(), Path::new("/proc"));
        // containerd has not been started, or looks elsewhere.
        assert!(!link(&host).unwrap());
        unlink(&host).unwrap();
        let programs = root.path().join("opt/containerd/bin");
        fs::create_dir_all(&programs).unwrap();
        assert!(link(&host).unwrap());
        assert!(!link(&host).unwrap());
        let shim = programs.join("containerd-shim-sock-v1");
        assert_eq!(
            fs::read_link(&shim).unwrap(),
            Path::new("/opt/sock/bin/containerd-shim-sock-v1")
        );
        unlink(&host).unwrap();
        assert_eq!(fs::read_dir(&programs).unwrap().count(), 0);
        fs::write(&shim, "somebody else's").unwrap();
        assert!(!link(&host).unwrap());
        unlink(&host).unwrap();
        assert_eq!(fs::read_to_string(&shim).unwrap(), "somebody else's");
    }

    #[test]
    fn a_second_copy_writes_nothing() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("bin")).unwrap();
        fs::write(from.path().join("bin/shim"), "one").unwrap();
        fs::set_permissions(from.path().join("bin/shim"), Permissions::from_mode(0o755)).unwrap();
        fs::write(from.path().join("zygote.py"), "two").unwrap();

        assert_eq!(copy(from.path(), to.path()).unwrap(), 2);
        assert_eq!(copy(from.path(), to.path()).unwrap(), 0);
        assert_eq!(
            fs::metadata(to.path().join("bin/shim")).unwrap().mode() & 0o777,
            0o755
        );
        assert!(to.path().join("site-packages").is_dir());
    }

    #[test]
    fn a_file_in_use_is_replaced_and_not_written_over() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("shim"), "old").unwrap();
        copy(from.path(), to.path()).unwrap();
        let mut running = File::open(to.path().join("shim")).unwrap();

        fs::write(from.path().join("shim"), "new").unwrap();
        assert_eq!(copy(from.path(), to.path()).unwrap(), 1);

        let mut old = String::new();
        running.read_to_string(&mut old).unwrap();
        assert_eq!(old, "old");
        assert_eq!(fs::read_to_string(to.path().join("shim")).unwrap(), "new");
    }

    #[test]
    fn a_lost_mode_is_mended() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("shim"), "same").unwrap();
        fs::set_permissions(from.path().join("shim"), Permissions::from_mode(0o755)).unwrap();
        copy(from.path(), to.path()).unwrap();
        fs::set_permissions(to.path().join("shim"), Permissions::from_mode(0o644)).unwrap();
        assert_eq!(copy(from.path(), to.path()).unwrap(), 1);
    }
}
