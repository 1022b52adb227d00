//! The container that installs packages into the node cache.
//!
//! It is an ordinary one, with an empty directory to write to. What it leaves there becomes the cache's entry by one rename,
//! after it has ended well: an entry is whole or not there.

use std::collections::HashMap;
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use sock_lock::Lock;

use super::{CACHE, add_env, add_payload, bind, is_real_directory};
use crate::activation::ZygoteName;
use crate::locks;
use crate::task::Failure;

/// Where the installer finds the requirements, and in which file.
const REQUIREMENTS: (&str, &str) = ("/etc/sock", "requirements.txt");
/// Larger than the API server takes a ConfigMap.
const MOST_REQUIREMENTS: u64 = 2 << 20;

/// An installation under way.
pub struct Installer {
    /// Empty if the packages are there already.
    staging: Option<PathBuf>,
    entry: PathBuf,
    tenant: String,
    /// To be written down with the entry. An operator of a release that knows nothing of it does not say the image.
    lock: Option<Lock>,
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
        let lock = lock(spec, annotations, &name.lock)?;
        add_payload(spec, None)?;
        if is_real_directory(&entry.join("site-packages")) {
            add_env(spec, "SOCK_CACHED", "1");
            let installer = Self {
                staging: None,
                entry,
                tenant: name.tenant.clone(),
                lock,
            };
            if !locks::is_recorded(Path::new(CACHE), &name.tenant, &name.lock) {
                installer.record();
            }
            return Ok(installer);
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
            tenant: name.tenant,
            lock,
        })
    }

    /// That this fails is a matter of speed: nothing descends from the entry's zygote then.
    fn record(&self) {
        if let Some(lock) = &self.lock
            && let Err(e) = locks::record(Path::new(CACHE), &self.tenant, lock)
        {
            tracing::warn!(entry = %self.entry.display(), error = %e, "what it holds is not written down");
        }
    }

    /// After its end, before anybody is told of it.
    pub fn finish(&self, status: u32) {
        let Some(staging) = &self.staging else { return };
        if status == 0 && is_real_directory(&staging.join("site-packages")) {
            match std::fs::rename(staging, &self.entry) {
                Ok(()) => self.record(),
                // Another pod of the same set was first: its packages are the same.
                Err(e) => {
                    tracing::info!(entry = %self.entry.display(), error = %e, "not taken into the cache");
                }
            }
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

/// What is to be installed. In a volume of the operator's only root can write; were it another, no link leads out of it and
/// nothing in it is waited for.
fn lock(
    spec: &Spec,
    annotations: &HashMap<String, String>,
    digest: &str,
) -> Result<Option<Lock>, Failure> {
    let Some(image) = annotations.get("sock.dev/image") else {
        return Ok(None);
    };
    let (directory, file) = REQUIREMENTS;
    let mounts = spec.mounts().as_ref().into_iter().flatten();
    let mount = mounts
        .filter(|mount| mount.destination() == Path::new(directory))
        .find_map(|mount| mount.source().as_ref());
    let mount =
        mount.ok_or_else(|| Failure::invalid(format!("no volume is mounted at {directory}")))?;
    let requirements = read_below(mount, file)
        .map_err(|e| Failure::invalid(format!("read {file} in the volume at {directory}: {e}")))?;
    let lock = Lock {
        image: image.clone(),
        requirements,
    };
    if lock.digest() != digest {
        return Err(Failure::invalid(format!(
            "annotation sock.dev/lock: {digest:?} is not that of image {image:?} and {directory}/{file}: let the operator make the pod"
        )));
    }
    Ok(Some(lock))
}

fn read_below(directory: &Path, file: &str) -> std::io::Result<String> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, directory, flags, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(
        &directory,
        file,
        flags,
        Mode::empty(),
        ResolveFlags::BENEATH,
    )?;
    let file = std::fs::File::from(file);
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    let mut text = String::new();
    file.take(MOST_REQUIREMENTS).read_to_string(&mut text)?;
    Ok(text)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::read_below;

    #[test]
    fn requirements_are_read_as_kubelet_lays_them_out_and_in_no_other_way() {
        let volume = tempfile::tempdir().unwrap();
        let at = |name: &str| volume.path().join(name);
        std::fs::create_dir(at("..2026")).unwrap();
        std::fs::write(at("..2026/requirements.txt"), "six==1.0").unwrap();
        std::os::unix::fs::symlink("..2026", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/requirements.txt", at("requirements.txt")).unwrap();
        assert_eq!(
            read_below(volume.path(), "requirements.txt").unwrap(),
            "six==1.0"
        );
        std::os::unix::fs::symlink("/etc/passwd", at("out")).unwrap();
        assert!(read_below(volume.path(), "out").is_err());
        let pipe = std::ffi::CString::new(at("pipe").to_str().unwrap()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o644) }, 0);
        assert!(read_below(volume.path(), "pipe").is_err());
        assert!(read_below(volume.path(), "..2026").is_err());
    }
}
