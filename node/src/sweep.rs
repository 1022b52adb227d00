//! Removes from the node what no container uses any more: entries of the node cache, installations that were broken off, files
//! that entries shared and none has any longer, and empty directories.
//!
//! Before it looks for an entry a shim puts a file at `/run/sock/uses/TENANT/LOCK/CONTAINER`; it removes it when the container
//! is deleted. What two looks found unused, some time apart, goes; an entry is first renamed away and the uses are looked
//! at once more, so that a container either finds all of an entry or none.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host::Host;

const CACHE: &str = "/var/lib/sock/cache";
const USES: &str = "/run/sock/uses";
const POOLS: &str = "/run/sock/pools";

const STAGING: &str = ".staging-";
const REMOVED: &str = ".removed-";
/// An entry that was no longer what was installed, by its lock and the container that has found it so. Containers may have it mounted as long as any
/// uses that lock.
const ALTERED: &str = ".altered-";
/// Files of a tenant that entries share, each by one more name (`shim/src/role/installer/entry.rs`).
const STORE: &str = ".files";

/// A pod that is replaced leaves its entry unused for a moment.
const UNUSED: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}")]
pub struct Error {
    step: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error { step, path, source }
}

/// Something that may be removed.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Thing {
    /// Packages of a tenant, by tenant and lock.
    Entry(String, String),
    /// What a container was installing, by tenant and container.
    Staging(String, String),
    /// An entry that was put aside, by tenant, lock and the rest of its name.
    Altered(String, String, String),
    /// A tenant's directory with nothing in it.
    Tenant(String),
    /// An empty directory of a pool, with its inode: one that was made anew under the same name is another.
    Pool(PathBuf, u64),
}

/// Containers that use an entry: tenant, lock, container.
type Uses = BTreeSet<(String, String, String)>;

impl Thing {
    fn is_used(&self, uses: &Uses) -> bool {
        match self {
            Self::Entry(tenant, lock) | Self::Altered(tenant, lock, _) => {
                uses.iter().any(|(t, l, _)| t == tenant && l == lock)
            }
            Self::Staging(tenant, container) => {
                uses.iter().any(|(t, _, c)| t == tenant && c == container)
            }
            Self::Tenant(tenant) => uses.iter().any(|(t, _, _)| t == tenant),
            Self::Pool(..) => false,
        }
    }
}

/// What was unused when last looked at, and since which look.
#[derive(Debug, Default)]
struct Memory(BTreeMap<Thing, Instant>);

impl Memory {
    /// Takes in what is there and what is used, and says what is to be removed.
    fn decide(&mut self, there: BTreeSet<Thing>, uses: &Uses, now: Instant) -> Vec<Thing> {
        let before = std::mem::take(&mut self.0);
        for thing in there {
            if !thing.is_used(uses) {
                let since = before.get(&thing).copied().unwrap_or(now);
                self.0.insert(thing, since);
            }
        }
        self.0
            .iter()
            .filter(|(_, since)| now.saturating_duration_since(**since) >= UNUSED)
            .map(|(thing, _)| thing.clone())
            .collect()
    }
}

/// Looks at a host's directories again and again.
#[derive(Debug)]
pub struct Sweeper {
    cache: PathBuf,
    uses: PathBuf,
    pools: PathBuf,
    memory: Memory,
    renamed: u64,
    /// Tenants whose shared files have not been looked at since an entry was removed, or ever by this process.
    stores: BTreeSet<String>,
    has_looked: bool,
}

impl Sweeper {
    pub fn new(host: &Host) -> Self {
        Self {
            cache: host.path(CACHE),
            uses: host.path(USES),
            pools: host.path(POOLS),
            memory: Memory::default(),
            renamed: 0,
            stores: BTreeSet::new(),
            has_looked: false,
        }
    }

    /// Looks once. What cannot be looked at or removed is logged and stays for the next time.
    pub fn sweep(&mut self, now: Instant) {
        let due = match self.look(now) {
            Ok(due) => due,
            Err(error) => return tracing::warn!("nothing is removed: {error}"),
        };
        for thing in due {
            match self.remove(&thing) {
                Ok(true) => tracing::info!(?thing, "unused, removed"),
                Ok(false) => {}
                Err(error) => tracing::warn!("{error}"),
            }
        }
        for tenant in std::mem::take(&mut self.stores) {
            match self.clean(&self.cache.join(&tenant).join(STORE)) {
                Ok(0) => {}
                Ok(files) => tracing::info!(tenant, files, "no entry has them any longer, removed"),
                Err(error) => tracing::warn!("{error}"),
            }
            if let Err(error) = self.remove_tenant(&tenant) {
                tracing::warn!("{error}");
            }
        }
        self.has_looked = true;
    }

    /// Removes shared files that no entry has, and the directory when none is left. A shim that makes another link to one at this moment
    /// keeps that, or finds none and keeps its own file.
    fn clean(&self, store: &Path) -> Result<usize, Error> {
        let mut removed = 0;
        // One after the other: a tenant decides how many there are.
        let files = match fs::read_dir(store) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
            other => other.map_err(failed("list", store))?,
        };
        for file in files {
            let path = file.map_err(failed("list", store))?.path();
            match fs::symlink_metadata(&path) {
                Ok(about) if about.nlink() > 1 || about.is_dir() => continue,
                _ => {}
            }
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(e));
                }
                _ => removed += 1,
            }
        }
        remove_empty(store)?;
        Ok(removed)
    }

    fn look(&mut self, now: Instant) -> Result<Vec<Thing>, Error> {
        let mut there = BTreeSet::new();
        for tenant in entries(&self.cache)? {
            if !tenant.is_directory {
                continue;
            }
            let Some(name) = tenant.text() else { continue };
            if name.starts_with(REMOVED) {
                // A sweep was killed between the renaming and the removal.
                if let Err(error) = remove_all(&tenant.path) {
                    tracing::warn!("{error}");
                }
                continue;
            }
            if !is_name(name) {
                continue;
            }
            let below = entries(&tenant.path)?;
            if below.is_empty() {
                there.insert(Thing::Tenant(name.to_owned()));
            }
            if !self.has_looked {
                self.stores.insert(name.to_owned());
            }
            for entry in below.iter().filter(|entry| entry.is_directory) {
                match entry.text() {
                    Some(lock) if is_name(lock) => {
                        there.insert(Thing::Entry(name.to_owned(), lock.to_owned()));
                    }
                    Some(other) => {
                        if let Some(container) = other.strip_prefix(STAGING) {
                            there.insert(Thing::Staging(name.to_owned(), container.to_owned()));
                        }
                        let altered = other.strip_prefix(ALTERED);
                        // A lock has no hyphen: it is a digest.
                        if let Some((lock, rest)) = altered.and_then(|name| name.split_once('-')) {
                            let thing = Thing::Altered(name.into(), lock.into(), rest.into());
                            there.insert(thing);
                        }
                    }
                    None => {}
                }
            }
        }
        empty_below(&self.pools, &mut there)?;
        // Last: a shim makes its file before it makes anything of the above.
        let uses = self.uses()?;
        Ok(self.memory.decide(there, &uses, now))
    }

    /// Fails rather than miss one.
    fn uses(&self) -> Result<Uses, Error> {
        let mut uses = Uses::new();
        for tenant in entries(&self.uses)? {
            for lock in entries_if_directory(&tenant)? {
                for container in entries_if_directory(&lock)? {
                    uses.insert((
                        tenant.name.to_string_lossy().into_owned(),
                        lock.name.to_string_lossy().into_owned(),
                        container.name.to_string_lossy().into_owned(),
                    ));
                }
            }
        }
        Ok(uses)
    }

    /// False if it turned out to be used, or is gone.
    fn remove(&mut self, thing: &Thing) -> Result<bool, Error> {
        let (tenant, path) = match thing {
            Thing::Entry(tenant, lock) => (tenant, self.cache.join(tenant).join(lock)),
            Thing::Staging(tenant, container) => (
                tenant,
                self.cache
                    .join(tenant)
                    .join(format!("{STAGING}{container}")),
            ),
            Thing::Altered(tenant, lock, rest) => (
                tenant,
                self.cache
                    .join(tenant)
                    .join(format!("{ALTERED}{lock}-{rest}")),
            ),
            Thing::Tenant(tenant) => return self.remove_tenant(tenant),
            Thing::Pool(path, inode) => {
                return match fs::symlink_metadata(path) {
                    Ok(now) if now.ino() == *inode => remove_empty(path),
                    _ => Ok(false),
                };
            }
        };
        if self.take(thing, &path, Self::uses)? {
            self.stores.insert(tenant.clone());
            return Ok(true);
        }
        Ok(false)
    }

    /// Renames away, looks at the uses again, and then removes or gives back.
    fn take(
        &mut self,
        thing: &Thing,
        path: &Path,
        uses: impl FnOnce(&Self) -> Result<Uses, Error>,
    ) -> Result<bool, Error> {
        self.renamed += 1;
        let aside = self
            .cache
            .join(format!("{REMOVED}{}-{}", std::process::id(), self.renamed));
        match fs::rename(path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed("rename away", path))?,
        }
        let uses = uses(self);
        if !matches!(&uses, Ok(uses) if !thing.is_used(uses)) {
            // A place that was filled meanwhile holds the same packages: the rename onto it fails.
            match fs::rename(&aside, path) {
                Ok(()) => return uses.map(|_| false),
                Err(error) => {
                    tracing::info!(entry = %path.display(), %error, "not given back");
                }
            }
        }
        remove_all(&aside)?;
        uses.map(|_| true)
    }

    fn remove_tenant(&self, tenant: &str) -> Result<bool, Error> {
        if Thing::Tenant(tenant.to_owned()).is_used(&self.uses()?) {
            return Ok(false);
        }
        remove_empty(&self.cache.join(tenant))
    }
}

/// What the shim takes for a tenant, a lock or a digest.
fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'))
}

struct Entry {
    name: OsString,
    path: PathBuf,
    /// Itself, not what a symbolic link leads to.
    is_directory: bool,
}

impl Entry {
    fn text(&self) -> Option<&str> {
        self.name.to_str()
    }
}

/// Empty if the directory is not there.
fn entries(directory: &Path) -> Result<Vec<Entry>, Error> {
    let list = || -> io::Result<Vec<Entry>> {
        if !fs::symlink_metadata(directory)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            match fs::symlink_metadata(entry.path()) {
                Ok(metadata) => found.push(Entry {
                    name: entry.file_name(),
                    path: entry.path(),
                    is_directory: metadata.is_dir(),
                }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    };
    match list() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(failed("list", directory)),
    }
}

fn entries_if_directory(entry: &Entry) -> Result<Vec<Entry>, Error> {
    if entry.is_directory {
        entries(&entry.path)
    } else {
        Ok(Vec::new())
    }
}

fn empty_below(directory: &Path, there: &mut BTreeSet<Thing>) -> Result<(), Error> {
    for entry in entries(directory)?
        .iter()
        .filter(|entry| entry.is_directory)
    {
        if !entries(&entry.path)?.is_empty() {
            empty_below(&entry.path, there)?;
        } else if let Ok(metadata) = fs::symlink_metadata(&entry.path) {
            there.insert(Thing::Pool(entry.path.clone(), metadata.ino()));
        }
    }
    Ok(())
}

fn remove_empty(directory: &Path) -> Result<bool, Error> {
    match fs::remove_dir(directory) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(failed("remove", directory)(error)),
    }
}

fn remove_all(directory: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", directory)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn entry(lock: &str) -> Thing {
        Thing::Entry("aa".into(), lock.into())
    }

    fn uses(all: &[(&str, &str, &str)]) -> Uses {
        all.iter()
            .map(|(t, l, c)| ((*t).into(), (*l).into(), (*c).into()))
            .collect()
    }

    #[test]
    fn only_what_stays_unused_is_due() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let there = || BTreeSet::from([entry("01"), entry("02")]);
        let used = uses(&[("aa", "01", "c"), ("bb", "02", "c")]);

        assert_eq!(memory.decide(there(), &used, at(0)), []);
        assert_eq!(memory.decide(there(), &used, at(15)), []);
        assert_eq!(memory.decide(there(), &used, at(30)), [entry("02")]);

        // A use in between starts the time anew.
        let other = uses(&[("aa", "02", "d")]);
        assert_eq!(memory.decide(there(), &other, at(45)), []);
        assert_eq!(memory.decide(there(), &used, at(60)), []);
        assert_eq!(memory.decide(there(), &used, at(89)), []);
        assert_eq!(memory.decide(there(), &used, at(90)), [entry("02")]);
        assert_eq!(memory.decide(BTreeSet::new(), &used, at(105)), []);
        assert_eq!(memory.decide(there(), &used, at(120)), []);
    }

    #[test]
    fn an_installation_is_its_containers() {
        let staging = Thing::Staging("aa".into(), "c".into());
        assert!(staging.is_used(&uses(&[("aa", "01", "c")])));
        assert!(!staging.is_used(&uses(&[("aa", "01", "d"), ("bb", "01", "c")])));
    }

    struct Node {
        root: tempfile::TempDir,
        sweeper: Sweeper,
        start: Instant,
    }

    impl Node {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let sweeper = Sweeper::new(&Host::at(root.path(), Path::new("/nowhere")));
            Self {
                root,
                sweeper,
                start: Instant::now(),
            }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn file(&self, path: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }

        fn sweep(&mut self, seconds: u64) {
            self.sweeper
                .sweep(self.start + Duration::from_secs(seconds));
        }
    }

    #[test]
    fn unused_things_go_and_used_ones_stay() {
        let mut node = Node::new();
        node.file("var/lib/sock/cache/aa/01/site-packages/m.py");
        node.file("var/lib/sock/cache/aa/02/site-packages/m.py");
        node.file("var/lib/sock/cache/aa/.staging-c1/half");
        node.file("var/lib/sock/cache/aa/.staging-gone/half");
        node.file("var/lib/sock/cache/aa/.altered-01-c1/site-packages/m.py");
        node.file("var/lib/sock/cache/aa/.altered-02-c2/site-packages/m.py");
        node.file("var/lib/sock/cache/bb/01/site-packages/m.py");
        node.file("var/lib/sock/cache/.removed-1-1/m.py");
        node.file("var/lib/sock/cache/lost+found/x");
        node.file("run/sock/uses/aa/01/c1");
        fs::create_dir_all(node.path("run/sock/uses/bb/01")).unwrap();
        node.file("run/sock/pools/aa/d1/s.sock");
        fs::create_dir_all(node.path("run/sock/pools/bb/d1")).unwrap();

        node.sweep(0);
        assert!(!node.path("var/lib/sock/cache/.removed-1-1").exists());
        node.sweep(29);
        assert!(node.path("var/lib/sock/cache/bb/01").exists());
        assert!(node.path("run/sock/pools/bb/d1").exists());

        node.sweep(30);
        for stays in [
            "var/lib/sock/cache/aa/01/site-packages/m.py",
            "var/lib/sock/cache/aa/.staging-c1/half",
            "var/lib/sock/cache/aa/.altered-01-c1/site-packages/m.py",
            "var/lib/sock/cache/lost+found/x",
            "run/sock/pools/aa/d1/s.sock",
        ] {
            assert!(node.path(stays).exists(), "{stays}");
        }
        for goes in [
            "var/lib/sock/cache/aa/02",
            "var/lib/sock/cache/aa/.staging-gone",
            "var/lib/sock/cache/aa/.altered-02-c2",
            "var/lib/sock/cache/bb",
            "run/sock/pools/bb/d1",
        ] {
            assert!(!node.path(goes).exists(), "{goes}");
        }
        assert_eq!(entries(&node.path("var/lib/sock/cache")).unwrap().len(), 2);
        // The directory above became empty only now.
        node.sweep(60);
        node.sweep(90);
        assert!(!node.path("run/sock/pools/bb").exists());
        assert!(node.path("run/sock/pools").exists());
    }

    #[test]
    fn shared_files_go_with_the_last_entry_that_has_them() {
        let mut node = Node::new();
        let link = |node: &Node, name: &str, entry: &str| {
            let file = node.path(&format!(
                "var/lib/sock/cache/aa/{entry}/site-packages/{name}"
            ));
            let store = node.path(&format!("var/lib/sock/cache/aa/.files/{name}"));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::create_dir_all(store.parent().unwrap()).unwrap();
            if !store.exists() {
                fs::write(&store, "").unwrap();
            }
            fs::hard_link(store, file).unwrap();
        };
        for (name, entry) in [("one", "01"), ("both", "01"), ("both", "02"), ("two", "02")] {
            link(&node, name, entry);
        }
        // What a shim that was killed has left, from before this process.
        node.file("var/lib/sock/cache/aa/.files/.new-7");
        node.file("run/sock/uses/aa/02/c");
        node.sweep(0);
        assert!(!node.path("var/lib/sock/cache/aa/.files/.new-7").exists());
        node.sweep(30);
        let left = |node: &Node| {
            let there = entries(&node.path("var/lib/sock/cache/aa/.files")).unwrap();
            let mut names: Vec<_> = there.into_iter().map(|entry| entry.name).collect();
            names.sort();
            names
        };
        assert_eq!(left(&node), ["both", "two"]);
        fs::remove_file(node.path("run/sock/uses/aa/02/c")).unwrap();
        node.sweep(60);
        node.sweep(90);
        assert!(!node.path("var/lib/sock/cache/aa").exists());
    }

    #[test]
    fn an_empty_directory_of_a_pool_that_is_made_anew_has_its_time() {
        let mut node = Node::new();
        let pool = node.path("run/sock/pools/aa/d1");
        fs::create_dir_all(&pool).unwrap();
        node.sweep(0);
        fs::create_dir(pool.with_extension("new")).unwrap();
        fs::rename(pool.with_extension("new"), &pool).unwrap();
        node.sweep(30);
        assert!(pool.exists());
        node.sweep(60);
        assert!(!pool.exists());
    }

    #[test]
    fn what_is_used_by_now_is_given_back() {
        let mut node = Node::new();
        node.file("var/lib/sock/cache/aa/01/site-packages/m.py");
        let path = node.path("var/lib/sock/cache/aa/01");
        let used = |_: &Sweeper| Ok(uses(&[("aa", "01", "c")]));
        assert!(!node.sweeper.take(&entry("01"), &path, used).unwrap());
        assert!(path.join("site-packages/m.py").exists());

        // Also if nobody can say.
        let unknown =
            |_: &Sweeper| Err(failed("list", Path::new("/u"))(io::ErrorKind::Other.into()));
        node.sweeper.take(&entry("01"), &path, unknown).unwrap_err();
        assert!(path.join("site-packages/m.py").exists());
    }

    #[test]
    fn what_was_installed_meanwhile_is_left_alone() {
        let mut node = Node::new();
        node.file("var/lib/sock/cache/aa/01/site-packages/old.py");
        let path = node.path("var/lib/sock/cache/aa/01");
        let installed = path.join("site-packages/new.py");
        let used = |_: &Sweeper| {
            fs::create_dir_all(installed.parent().unwrap()).unwrap();
            fs::write(&installed, "").unwrap();
            Ok(uses(&[("aa", "01", "c")]))
        };
        assert!(node.sweeper.take(&entry("01"), &path, used).unwrap());
        assert!(installed.exists());
        assert!(!path.join("site-packages/old.py").exists());
        assert_eq!(entries(&node.path("var/lib/sock/cache")).unwrap().len(), 1);
    }

    #[test]
    fn links_are_not_followed() {
        let mut node = Node::new();
        node.file("elsewhere/01/site-packages/m.py");
        fs::create_dir_all(node.path("elsewhere/empty")).unwrap();
        node.file("var/lib/sock/cache/aa/01/site-packages/own.py");
        let outside = node.path("elsewhere");
        symlink(&outside, node.path("var/lib/sock/cache/bb")).unwrap();
        symlink(&outside, node.path("var/lib/sock/cache/aa/02")).unwrap();
        symlink(
            &outside,
            node.path("var/lib/sock/cache/aa/01/site-packages/link"),
        )
        .unwrap();
        fs::create_dir_all(node.path("run/sock/pools")).unwrap();
        symlink(&outside, node.path("run/sock/pools/aa")).unwrap();

        node.sweep(0);
        node.sweep(30);
        assert!(!node.path("var/lib/sock/cache/aa/01").exists());
        assert!(node.path("elsewhere/01/site-packages/m.py").exists());
        assert!(node.path("elsewhere/empty").exists());
    }

    #[test]
    fn nothing_goes_while_the_uses_cannot_be_read() {
        let mut node = Node::new();
        node.file("var/lib/sock/cache/aa/01/site-packages/m.py");
        node.file("run/sock/uses");
        node.sweep(0);
        node.sweep(30);
        assert!(node.path("var/lib/sock/cache/aa/01").exists());
    }
}
