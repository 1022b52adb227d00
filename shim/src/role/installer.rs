//! The container that installs packages into the node cache.
//!
//! It is an ordinary one, with an empty directory to write to. What it leaves there becomes the cache's entry by one rename,
//! after it has ended well: an entry is whole or not there.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::{CACHE, add_env, add_payload, bind, is_real_directory};
use crate::activation::ZygoteName;
use crate::task::Failure;

/// An installation under way.
pub struct Installer {
    /// Empty if the packages are there already.
    staging: Option<PathBuf>,
    entry: PathBuf,
}

impl Installer {
    /// Makes the directory and mounts it.
    pub(super) fn prepare(
        id: &str,
        spec: &mut Spec,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, Failure> {
        let name = ZygoteName::from_annotations(annotations).map_err(Failure::invalid)?;
        let tenant = Path::new(CACHE).join(&name.tenant);
        let entry = tenant.join(&name.lock);
        add_payload(spec, None)?;
        if is_real_directory(&entry.join("site-packages")) {
            add_env(spec, "SOCK_CACHED", "1");
            return Ok(Self {
                staging: None,
                entry,
            });
        }
        let staging = tenant.join(format!(".staging-{id}"));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&tenant)?;
        std::fs::DirBuilder::new().mode(0o755).create(&staging)?;
        if let Some(process) = spec.process() {
            std::os::unix::fs::chown(
                &staging,
                Some(process.user().uid()),
                Some(process.user().gid()),
            )?;
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        mounts.push(bind(&staging, "/opt/sock/install", true)?);
        spec.set_mounts(Some(mounts));
        Ok(Self {
            staging: Some(staging),
            entry,
        })
    }

    /// After its end, before anybody is told of it.
    pub fn finish(&self, status: u32) {
        let Some(staging) = &self.staging else { return };
        if status == 0
            && is_real_directory(&staging.join("site-packages"))
            && let Err(e) = std::fs::rename(staging, &self.entry)
        {
            // Another pod of the same set was first: its packages are the same.
            tracing::info!(entry = %self.entry.display(), error = %e, "not taken into the cache");
        }
        self.discard();
    }

    /// Removes what was not taken.
    pub fn discard(&self) {
        if let Some(staging) = &self.staging
            && let Err(e) = std::fs::remove_dir_all(staging)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %staging.display(), error = %e, "is left");
        }
    }
}

/// After a crash of the shim: removes what a container was installing.
pub fn discard_staging(container: &str) {
    for tenant in std::fs::read_dir(CACHE).into_iter().flatten().flatten() {
        let staging = tenant.path().join(format!(".staging-{container}"));
        if staging.exists() {
            let _ = std::fs::remove_dir_all(staging);
        }
    }
}
