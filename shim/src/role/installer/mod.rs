//! The container that installs packages into the node cache.
//!
//! It is an ordinary one, with an empty directory to write to. What it leaves there becomes the cache's entry by one rename,
//! after it has ended well: an entry is whole or not there. One that is there is looked at before it is used again ([`entry`]); what is no
//! longer what was installed is installed anew. Pods that want the same at the same time wait for the first of them.

pub mod entry;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, flock};
use sock_lock::Lock;
use tokio::io::Interest;
use tokio::time::{Instant, sleep, timeout};

use super::{CACHE, add_env, add_payload, bind, is_real_directory};
use crate::activation::ZygoteName;
use crate::children::Claim;
use crate::locks;
use crate::task::Failure;
use crate::uses::Use;

/// Where the installer finds the requirements, and in which file.
const REQUIREMENTS: (&str, &str) = ("/etc/sock", "requirements.txt");
/// Larger than the API server takes a ConfigMap.
const MOST_REQUIREMENTS: u64 = 2 << 20;

/// Of an entry, whose packages are all read: kubelet gives up on a container's creation after two minutes.
const LOOKED_WITHIN: Duration = Duration::from_secs(60);
/// Reading, and writing to the disk whatever waits for that.
const TAKEN_WITHIN: Duration = Duration::from_secs(180);
/// For another that installs the same.
const TURN_WITHIN: Duration = Duration::from_secs(45);
/// Between two looks whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// An installation under way.
pub struct Installer {
    /// The container.
    id: String,
    /// Empty if the packages are there already.
    staging: RefCell<Option<PathBuf>>,
    /// Locked while this one installs.
    turn: RefCell<Option<File>>,
    /// The container's standard error: whoever reads it stops when nobody has it.
    log: RefCell<Option<OwnedFd>>,
    entry: PathBuf,
    tenant: String,
    /// To be written down with the entry. An operator of a release that knows nothing of it does not say the image.
    lock: Option<Lock>,
}

impl Installer {
    pub(super) fn prepare(
        id: &str,
        spec: &mut Spec,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, Failure> {
        let name = ZygoteName::from_annotations(annotations).map_err(Failure::invalid)?;
        let entry = Path::new(CACHE).join(&name.tenant).join(&name.lock);
        let lock = lock(spec, annotations, &name.lock)?;
        add_payload(spec, None)?;
        Ok(Self {
            id: id.to_owned(),
            staging: RefCell::default(),
            turn: RefCell::default(),
            log: RefCell::default(),
            entry,
            tenant: name.tenant,
            lock,
        })
    }

    /// Looks whether the packages are there, and otherwise makes a directory for them and mounts it.
    ///
    /// # Errors
    /// That cannot be made.
    pub async fn stage(&self, spec: &mut Spec, used: Option<&Use>) -> Result<(), Failure> {
        if let Some(used) = used {
            *self.turn.borrow_mut() = turn(used.directory()).await?;
        }
        if self.is_there(spec).await? {
            add_env(spec, "SOCK_CACHED", "1");
            if let Some(lock) = &self.lock
                && !locks::is_recorded(Path::new(CACHE), &self.tenant, &lock.digest())
            {
                self.record();
            }
            // Whoever waits has nothing to wait for.
            self.turn.take();
            return Ok(());
        }
        let tenant = Path::new(CACHE).join(&self.tenant);
        let staging = tenant.join(format!(".staging-{}", self.id));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&tenant)?;
        std::fs::DirBuilder::new().mode(0o755).create(&staging)?;
        *self.staging.borrow_mut() = Some(staging.clone());
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
        Ok(())
    }

    /// Whether there is an entry that is what was installed. One that is not is put aside.
    async fn is_there(&self, spec: &mut Spec) -> Result<bool, Failure> {
        if !is_real_directory(&self.entry.join(entry::PACKAGES)) {
            return Ok(false);
        }
        let looked = run(&[OsStr::new("look"), self.entry.as_os_str()], LOOKED_WITHIN).await;
        let fault = match looked {
            Ok(path) if path.is_empty() => return Ok(true),
            Ok(path) => path,
            Err(error) => {
                tracing::warn!(entry = %self.entry.display(), %error, "used as it is: it cannot be looked at");
                return Ok(true);
            }
        };
        tracing::warn!(entry = %self.entry.display(), fault, "is not what was installed: installed anew");
        add_env(spec, "SOCK_ALTERED", &fault);
        // Whoever has it mounted goes on with it. The node installer removes it when nobody uses what it was.
        let name = self.entry.file_name().unwrap_or_default();
        let aside = format!(".altered-{}-{}", name.display(), self.id);
        std::fs::rename(&self.entry, self.entry.with_file_name(aside))?;
        Ok(false)
    }

    /// That this fails is a matter of speed: nothing descends from the entry's zygote then.
    fn record(&self) {
        if let Some(lock) = &self.lock
            && let Err(e) = locks::record(Path::new(CACHE), &self.tenant, lock)
        {
            tracing::warn!(entry = %self.entry.display(), error = %e, "what it holds is not written down");
        }
    }

    /// Keeps the container's standard error until what it has left is taken in.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn keep_log(&self, stderr: Option<&OwnedFd>) -> Result<(), Failure> {
        *self.log.borrow_mut() = stderr.map(OwnedFd::try_clone).transpose()?;
        Ok(())
    }

    /// After its end, before anybody is told of it: takes what it has left into the cache.
    ///
    /// # Errors
    /// It is not there then, as the log says: the container has failed, whatever its status.
    pub async fn settle(&self, status: u32) -> Result<(), Failure> {
        let Some(staging) = self.staging.borrow().clone() else {
            return Ok(());
        };
        if status != 0 {
            return Ok(());
        }
        let arguments = [
            OsStr::new("take"),
            staging.as_os_str(),
            self.entry.as_os_str(),
        ];
        match run(&arguments, TAKEN_WITHIN).await {
            Ok(shared) => {
                tracing::info!(entry = %self.entry.display(), shared, "taken into the cache");
                self.record();
            }
            // Another pod of the same set was first: its packages are the same.
            Err(error) if is_real_directory(&self.entry.join(entry::PACKAGES)) => {
                tracing::info!(entry = %self.entry.display(), %error, "not taken into the cache");
            }
            Err(error) => {
                tracing::warn!(entry = %self.entry.display(), %error, "not taken into the cache");
                if let Some(stderr) = &*self.log.borrow() {
                    let line =
                        format!("what was installed is not taken into the node cache: {error}");
                    crate::stdio::say(stderr, &line);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes what was not taken, and lets the next one have its turn.
    pub fn finish(&self) {
        if let Some(staging) = self.staging.take()
            && let Err(e) = std::fs::remove_dir_all(&staging)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %staging.display(), error = %e, "is left");
        }
        self.turn.take();
        self.log.take();
    }
}

/// Waits until nobody else installs an entry. The directory is that of its uses, which stays as long as there is one; the lock goes with this process.
/// `None` when that takes too long: both install then, and the first counts.
async fn turn(directory: &Path) -> Result<Option<File>, Failure> {
    let directory = File::open(directory)?;
    let until = Instant::now() + TURN_WITHIN;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(directory)),
            Err(rustix::io::Errno::AGAIN) if Instant::now() < until => sleep(LOOK_AGAIN).await,
            Err(_) => return Ok(None),
        }
    }
}

/// Has a process of its own do what reads all of an entry: this one serves a pod meanwhile, and has no threads. Yields its answer.
async fn run(arguments: &[&OsStr], within: Duration) -> Result<String, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("cache")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut reader = Reader::start(&mut command)?;
    if timeout(within, reader.ended()).await.is_err() {
        return Err(Failure::unknown(format!(
            "not done within {} s",
            within.as_secs()
        )));
    }
    let output = reader.output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false if output.stderr.is_empty() => Err(Failure::unknown(output.status)),
        false => Err(Failure::unknown(text(&output.stderr))),
    }
}

/// That process. When nobody waits for it any more it is killed; it ends when the disk lets it.
struct Reader(Option<(Child, Claim)>);

impl Reader {
    fn start(command: &mut Command) -> Result<Reader, Failure> {
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(Failure::unknown)?;
        Ok(Reader(Some((child, Claim::new(pid)))))
    }

    async fn ended(&self) -> std::io::Result<()> {
        match &self.0 {
            Some((child, _)) => ended(child).await,
            None => Ok(()),
        }
    }

    /// What it has said, once it has ended.
    fn output(&mut self) -> std::io::Result<Output> {
        let (child, _claim) = self.0.take().ok_or(std::io::ErrorKind::NotFound)?;
        child.wait_with_output()
    }
}

async fn ended(child: &Child) -> std::io::Result<()> {
    let number = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty())?;
    let pidfd = crate::async_fd::watch(pidfd, Interest::READABLE)?;
    pidfd.readable().await.map(drop)
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Some((mut child, claim)) = self.0.take() else {
            return;
        };
        let _ = child.kill();
        tokio::task::spawn_local(async move {
            let _ = ended(&child).await;
            let _ = child.wait();
            drop(claim);
        });
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
