//! Which namespace a tenant is, as this node has seen it.
//!
//! A tenant is named by the UID of its namespace, which the operator writes and an admission policy keeps; the name of the
//! namespace comes from containerd. A UID has one name for ever, so the first container of a tenant on a node says which, and
//! one of another namespace that names the same tenant is refused: it would get packages and zygotes that are not its own.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

use crate::task::Failure;

/// On the tenant's directory in the node cache, and as long there as that. Only root of the node sees it (xattr(7)).
const NAMESPACE: &str = "trusted.sock.namespace";
/// Longest name of a namespace (RFC 1123 label).
const LONGEST: usize = 63;

/// Takes the tenant for a namespace, in the node cache at `cache`.
///
/// # Errors
/// It is another namespace's, or the directory cannot be made.
pub fn claim(cache: &Path, tenant: &str, namespace: &str) -> Result<(), Failure> {
    let directory = cache.join(tenant);
    // The sweeper may remove the directory of a tenant that has nothing there, in between.
    for _ in 0..10 {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&directory)?;
        match setxattr(
            &directory,
            NAMESPACE,
            namespace.as_bytes(),
            XattrFlags::CREATE,
        ) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {
                let mut first = [0u8; LONGEST];
                let length = match getxattr(&directory, NAMESPACE, &mut first) {
                    Err(Errno::NOENT | Errno::NODATA) => continue,
                    other => other.map_err(io::Error::from)?,
                };
                if &first[..length] == namespace.as_bytes() {
                    return Ok(());
                }
                return Err(Failure::invalid(format!(
                    "annotation sock.dev/tenant: {tenant} is the tenant of namespace {}, and this pod is in {namespace}",
                    String::from_utf8_lossy(&first[..length])
                )));
            }
            Err(Errno::NOENT) => {}
            // The admission policy alone stands between tenants then.
            Err(errno @ (Errno::NOTSUP | Errno::PERM)) => {
                tracing::warn!(%errno, directory = %directory.display(), "a tenant's namespace cannot be noted");
                return Ok(());
            }
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
    Err(io::Error::other(format!(
        "{} is removed again and again",
        directory.display()
    ))
    .into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_is_one_namespace() {
        let cache = tempfile::tempdir().unwrap();
        claim(cache.path(), "0a-1", "team-a").unwrap();
        claim(cache.path(), "0a-1", "team-a").unwrap();
        let refused = claim(cache.path(), "0a-1", "team-b").unwrap_err();
        let said = format!("{refused:?}");
        assert!(said.contains("team-a") && said.contains("team-b"), "{said}");
        claim(cache.path(), "0a-2", "team-b").unwrap();
        // Nothing stands in the way of the sweeper.
        std::fs::remove_dir(cache.path().join("0a-1")).unwrap();
        claim(cache.path(), "0a-1", "team-b").unwrap();
    }
}
