//! Which entries of the node cache containers use.
//!
//! An empty file for each container stands at `/run/sock/uses/TENANT/LOCK/CONTAINER` from before the entry is looked for
//! until the container is deleted. The node installer removes entries that none stands for. The directory is gone after a
//! reboot, as the containers are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::activation::ZygoteName;

const ROOT: &str = "/run/sock/uses";

/// A container's use of an entry. It ends by [`Use::end`], not when dropped: a shim that crashes must not end it.
#[derive(Debug)]
pub struct Use(PathBuf);

impl Use {
    /// Says that a container uses the entry.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn begin(name: &ZygoteName, container: &str) -> io::Result<Self> {
        let directory = Path::new(ROOT).join(&name.tenant).join(&name.lock);
        let file = directory.join(container);
        // Another container's end may remove the directory in between.
        for _ in 0..10 {
            fs::create_dir_all(&directory)?;
            match fs::write(&file, "") {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => return other.map(|()| Self(file)),
            }
        }
        Err(io::Error::other(format!(
            "{} is removed again and again",
            directory.display()
        )))
    }

    /// In which the uses of the entry are said. It is there as long as this one is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.0.parent().unwrap_or(&self.0)
    }

    /// Says that it does no more.
    pub fn end(&self) {
        remove(&self.0);
    }
}

/// After a crash of a shim: a container uses nothing any more.
pub fn end_all(container: &str) {
    let below = |path: &Path| -> Vec<PathBuf> {
        fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect()
    };
    for lock in below(Path::new(ROOT))
        .iter()
        .flat_map(|tenant| below(tenant))
    {
        let file = lock.join(container);
        if file.exists() {
            remove(&file);
        }
    }
}

fn remove(file: &Path) {
    if let Err(e) = fs::remove_file(file)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(file = %file.display(), error = %e, "is left");
    }
    remove_empty(file.parent(), Path::new(ROOT));
}

/// Removes a directory and those above it, up to `root`, as far as they are empty.
pub fn remove_empty(from: Option<&Path>, root: &Path) {
    let mut next = from;
    while let Some(directory) = next.filter(|d| *d != root && d.starts_with(root)) {
        if fs::remove_dir(directory).is_err() {
            return;
        }
        next = directory.parent();
    }
}
