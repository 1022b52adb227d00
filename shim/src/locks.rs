//! What entries of the node cache hold: the lock of each, written down when it was installed.
//!
//! A lock is known by its digest, so whoever reads one back can tell that it is the right one. By the locks themselves, and not
//! by anybody's word, a shim decides whether a process that has imported packages of one may serve another.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sock_lock::Lock;

use crate::activation::Ancestor;

/// Beside `site-packages` in an entry.
const FILE: &str = "lock.json";
/// Larger than the API server takes a ConfigMap.
const MOST: u64 = 2 << 20;

fn file(cache: &Path, tenant: &str, digest: &str) -> PathBuf {
    cache.join(tenant).join(digest).join(FILE)
}

/// Writes down what an entry of the cache holds. Its directory is the install user's, of whom no process is left there.
///
/// # Errors
/// The file cannot be written.
pub fn record(cache: &Path, tenant: &str, lock: &Lock) -> io::Result<()> {
    let path = file(cache, tenant, &lock.digest());
    let new = path.with_extension("new");
    for stale in [&new, &path] {
        match fs::remove_file(stale) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    let mut written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)?;
    written.write_all(&serde_json::to_vec(lock)?)?;
    fs::rename(&new, &path)
}

/// Whether that is written down.
#[must_use]
pub fn is_recorded(cache: &Path, tenant: &str, digest: &str) -> bool {
    recorded(cache, tenant, digest).is_some()
}

/// What was written down of an entry. `None` if that is not there, or not what the digest says.
fn recorded(cache: &Path, tenant: &str, digest: &str) -> Option<Lock> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(file(cache, tenant, digest))
        .ok()?;
    let about = opened.metadata().ok()?;
    if !about.is_file() || about.uid() != 0 || about.len() > MOST {
        return None;
    }
    let mut text = Vec::new();
    opened.take(MOST).read_to_end(&mut text).ok()?;
    let lock: Lock = serde_json::from_slice(&text).ok()?;
    (lock.digest() == digest).then_some(lock)
}

/// Whether what has a lock may descend from an ancestor.
///
/// # Errors
/// Why not, in words.
pub fn may_descend(
    cache: &Path,
    tenant: &str,
    lock: &str,
    ancestor: &Ancestor,
) -> Result<(), String> {
    let read = |digest: &str| {
        recorded(cache, tenant, digest)
            .ok_or_else(|| format!("what lock {digest} holds is not written down on this node"))
    };
    let (own, other) = (read(lock)?, read(&ancestor.lock)?);
    own.holds(&other).map_err(|e| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lock(lines: &[&str]) -> Lock {
        let hash = "0".repeat(64);
        Lock {
            image: "python:3.13".into(),
            requirements: lines
                .iter()
                .map(|line| format!("{line} --hash=sha256:{hash}\n"))
                .collect(),
        }
    }

    #[test]
    fn who_may_descend_is_decided_by_what_was_written_down() {
        let cache = tempfile::tempdir().unwrap();
        let (small, large) = (lock(&["six==1.0"]), lock(&["six==1.0", "numpy==2.0"]));
        let ancestor = |lock: &Lock| Ancestor {
            digest: "0a".into(),
            lock: lock.digest(),
        };
        let ask = |own: &Lock, other: &Lock| {
            may_descend(cache.path(), "team", &own.digest(), &ancestor(other))
        };
        assert!(
            ask(&large, &small)
                .unwrap_err()
                .contains("not written down")
        );
        for lock in [&small, &large] {
            fs::create_dir_all(cache.path().join("team").join(lock.digest())).unwrap();
            record(cache.path(), "team", lock).unwrap();
            record(cache.path(), "team", lock).unwrap();
        }
        assert_eq!(ask(&large, &small), Ok(()));
        let refused = ask(&small, &large).unwrap_err();
        assert!(refused.contains("numpy==2.0"), "{refused}");
        // Another lock's text does not pass for it, nor does a link or what is not root's.
        let path = file(cache.path(), "team", &large.digest());
        fs::copy(file(cache.path(), "team", &small.digest()), &path).unwrap();
        assert!(ask(&large, &small).is_err());
        record(cache.path(), "team", &large).unwrap();
        assert_eq!(ask(&large, &small), Ok(()));
        std::os::unix::fs::chown(&path, Some(65531), None).unwrap();
        assert!(ask(&large, &small).is_err());
        fs::rename(&path, cache.path().join("elsewhere")).unwrap();
        std::os::unix::fs::chown(cache.path().join("elsewhere"), Some(0), None).unwrap();
        std::os::unix::fs::symlink(cache.path().join("elsewhere"), &path).unwrap();
        assert!(ask(&large, &small).is_err());
    }
}
