//! An entry of the node cache: `site-packages`, and beside it the list of what was installed there, by which is seen whether it still is.
//!
//! Equal files of a tenant's entries are one file: the same numpy in ten PackageSets lies on the disk, and in memory, once. Each file
//! has a second name in `TENANT/.files`, made of what it contains; what is installed anew and has an equal there becomes another link to that. Files of
//! two tenants are never one.
//!
//! All of this takes as long as reading the packages, so it is done by a process of its own (`containerd-shim-sock-v1 cache`).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Packages, in an entry.
pub const PACKAGES: &str = "site-packages";
/// The list of them, beside.
const LIST: &str = "files";
/// Of a tenant.
const STORE: &str = ".files";
/// Below this a file takes a block of the disk and a page of memory at most.
const LEAST_SHARED: u64 = 4096;
/// Of a list that is read: 100,000 files with long names.
const LONGEST_LIST: u64 = 64 << 20;

/// Takes an installation into the cache of a tenant: `staging` becomes `entry`, whole or not at all. Yields how many files are shared
/// with other entries.
///
/// # Errors
/// What cannot be read or written. An entry that is there already is one: it holds the same packages.
pub fn take_in(staging: &Path, entry: &Path) -> io::Result<usize> {
    let tenant = entry.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let store = Store::of(tenant)?;
    let mut shared = 0;
    let list = list(&staging.join(PACKAGES), |path, about, digest| {
        shared += usize::from(store.share(path, about, digest));
    })?;
    let place = staging.join(LIST);
    // The directory was the installer's until now.
    remove(&place)?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(place)?;
    file.write_all(&list)?;
    rustix::fs::syncfs(&file)?;
    fs::rename(staging, entry)?;
    File::open(tenant)?.sync_all()?;
    Ok(shared)
}

/// What in an entry is not what was installed, if anything: the first path at fault. An entry of a release that wrote no list is taken as it is
/// from here on.
///
/// # Errors
/// It cannot be read.
pub fn altered(entry: &Path) -> io::Result<Option<PathBuf>> {
    let now = list(&entry.join(PACKAGES), |_, _, _| {})?;
    let place = entry.join(LIST);
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&place);
    let mut then = Vec::new();
    match opened {
        Ok(file) if file.metadata()?.is_file() && file.metadata()?.uid() == 0 => {
            file.take(LONGEST_LIST).read_to_end(&mut then)?;
        }
        Ok(_) => return Ok(Some(LIST.into())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let new = entry.join(format!("{LIST}.new"));
            remove(&new)?;
            fs::write(&new, &now)?;
            fs::rename(new, place)?;
            return Ok(None);
        }
        Err(e) => return Err(e),
    }
    Ok(first_difference(&then, &now))
}

/// The path of the first line that only one of two lists has.
fn first_difference(then: &[u8], now: &[u8]) -> Option<PathBuf> {
    if then == now {
        return None;
    }
    let lines = |list: &[u8]| -> Vec<Vec<u8>> {
        list.split_inclusive(|b| *b == b'\n')
            .map(<[u8]>::to_vec)
            .collect()
    };
    let (then, now) = (lines(then), lines(now));
    let same = then.iter().zip(&now).take_while(|(a, b)| a == b).count();
    let line = then.get(same).or_else(|| now.get(same));
    let path = line.and_then(|line| line.split(|b| *b == b' ').next_back());
    let path = String::from_utf8_lossy(path.unwrap_or_default()).into_owned();
    Some(match path.trim_end() {
        "" => LIST.into(),
        path => path.into(),
    })
}

/// A line for all that is in a directory, at any depth, in the order of the paths: kind, mode, owner, group, size and SHA-256 of the content or, of a
/// link, of what it names; then the path. Each regular file is given to `seen` with its digest.
fn list(directory: &Path, mut seen: impl FnMut(&Path, &fs::Metadata, &str)) -> io::Result<Vec<u8>> {
    let mut lines: Vec<(OsString, String)> = Vec::new();
    let mut left = vec![(directory.to_owned(), OsString::new())];
    while let Some((from, below)) = left.pop() {
        for one in fs::read_dir(&from)? {
            let one = one?;
            let path = one.path();
            let mut name = below.clone();
            if !name.is_empty() {
                name.push("/");
            }
            name.push(one.file_name());
            let about = fs::symlink_metadata(&path)?;
            let kind = about.file_type();
            let (letter, size, digest) = if kind.is_file() {
                let digest = digest(&path)?;
                seen(&path, &about, &digest);
                ('f', about.len(), digest)
            } else if kind.is_symlink() {
                let target = fs::read_link(&path)?;
                ('l', 0, hex(&Sha256::digest(target.as_os_str().as_bytes())))
            } else if kind.is_dir() {
                left.push((path, name.clone()));
                ('d', 0, String::new())
            } else {
                // Devices cannot be opened there.
                let other = if kind.is_fifo() { 'p' } else { 'o' };
                (other, 0, String::new())
            };
            let (mode, uid, gid) = rights(&about);
            let line = format!("{letter} {mode:o} {uid} {gid} {size} {digest}");
            lines.push((name, line));
        }
    }
    lines.sort();
    let mut text = Vec::new();
    for (name, line) in lines {
        // Neither a blank nor the end of a line is left in it.
        let name = name.as_bytes().escape_ascii().to_string();
        writeln!(text, "{line} {}", name.replace(' ', "\\x20"))?;
    }
    Ok(text)
}

/// Mode, owner and group.
fn rights(about: &fs::Metadata) -> (u32, u32, u32) {
    (about.mode() & 0o7777, about.uid(), about.gid())
}

/// SHA-256 of a regular file, which nothing is waited for in.
fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let mut sum = Sha256::new();
    let mut piece = vec![0; 256 << 10];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex(&sum.finalize())),
            n => sum.update(&piece[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A file, a link, or whatever is there.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Files of a tenant by what they contain.
struct Store(PathBuf);

impl Store {
    fn of(tenant: &Path) -> io::Result<Store> {
        let path = tenant.join(STORE);
        fs::DirBuilder::new().recursive(true).create(&path)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Store(path))
    }

    /// Makes a file one with its equal in the store, or its first if there is none. That it does not get there costs room.
    fn share(&self, path: &Path, about: &fs::Metadata, digest: &str) -> bool {
        if about.len() < LEAST_SHARED || about.nlink() > 1 {
            return false;
        }
        let (mode, uid, gid) = rights(about);
        let stored = self.0.join(format!("{digest}-{mode:o}-{uid}-{gid}"));
        let shared = match self.link_to(&stored, path, rights(about), digest) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::hard_link(path, &stored).map(|()| false)
            }
            other => other,
        };
        shared.unwrap_or_else(|error| {
            tracing::debug!(path = %path.display(), %error, "not shared");
            false
        })
    }

    fn link_to(
        &self,
        stored: &Path,
        path: &Path,
        wanted: (u32, u32, u32),
        digest: &str,
    ) -> io::Result<bool> {
        // What it is called is what it was: what it is now is looked at.
        if rights(&fs::symlink_metadata(stored)?) != wanted || self::digest(stored)? != digest {
            fs::remove_file(stored)?;
            return Err(io::ErrorKind::NotFound.into());
        }
        let number = std::process::id();
        let new = self.0.join(format!(".new-{number}"));
        remove(&new)?;
        match fs::hard_link(stored, &new) {
            // It has as many names as the file system allows: from here on another has the next ones.
            Err(e) if e.raw_os_error() == Some(libc::EMLINK) => {
                fs::remove_file(stored)?;
                return Err(io::ErrorKind::NotFound.into());
            }
            other => other?,
        }
        fs::rename(&new, path)?;
        Ok(true)
    }
}

/// What the process is asked for by its arguments; its answer, one line.
///
/// # Errors
/// What cannot be done, in words.
pub fn answer(arguments: &[OsString]) -> Result<String, String> {
    let failed = |path: &OsString, e: &io::Error| format!("{}: {e}", path.display());
    match arguments {
        [word, staging, entry] if word == "take" => take_in(Path::new(staging), Path::new(entry))
            .map(|shared| shared.to_string())
            .map_err(|e| failed(entry, &e)),
        [word, entry] if word == "look" => altered(Path::new(entry))
            .map(|path| path.map(|p| p.display().to_string()).unwrap_or_default())
            .map_err(|e| failed(entry, &e)),
        _ => Err("usage: cache take STAGING ENTRY | cache look ENTRY".into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tenant(tempfile::TempDir);

    impl Tenant {
        fn new() -> Tenant {
            Tenant(tempfile::tempdir().unwrap())
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn install(&self, entry: &str, files: &[(&str, &[u8])]) -> usize {
            let staging = self.at(".staging");
            for (name, content) in files {
                let path = staging.join(PACKAGES).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            take_in(&staging, &self.at(entry)).unwrap()
        }

        fn inode(&self, path: &str) -> u64 {
            fs::metadata(self.at(path)).unwrap().ino()
        }
    }

    fn large(seed: u8) -> Vec<u8> {
        vec![seed; 5000]
    }

    #[test]
    fn equal_files_of_a_tenant_are_one_and_others_are_not() {
        let tenant = Tenant::new();
        let files: [(&str, &[u8]); 3] = [("a/b.so", &large(1)), ("a/c.so", &large(2)), ("s", b"x")];
        assert_eq!(tenant.install("one", &files), 0);
        let files: [(&str, &[u8]); 3] = [("z.so", &large(1)), ("a/c.so", &large(3)), ("s", b"x")];
        assert_eq!(tenant.install("two", &files), 1);
        let of = |path: &str| tenant.inode(path);
        assert_eq!(of("one/site-packages/a/b.so"), of("two/site-packages/z.so"));
        assert_ne!(of("one/site-packages/s"), of("two/site-packages/s"));
        for entry in ["one", "two"] {
            assert_eq!(altered(&tenant.at(entry)).unwrap(), None);
        }
        let other = Tenant::new();
        assert_eq!(other.install("one", &[("z.so", &large(1))]), 0);
    }

    #[test]
    fn what_was_altered_is_named_and_shared_with_nobody_who_comes() {
        let tenant = Tenant::new();
        tenant.install("one", &[("a b\n/c.so", &large(1)), ("d.so", &large(2))]);
        type Alteration<'a> = (&'a str, &'a dyn Fn(&Path));
        let alter: [Alteration<'_>; 5] = [
            ("a\\x20b\\n/c.so", &|at| {
                fs::write(at.join("a b\n/c.so"), large(9)).unwrap()
            }),
            ("d.so", &|at| fs::remove_file(at.join("d.so")).unwrap()),
            ("e.so", &|at| fs::write(at.join("e.so"), "").unwrap()),
            ("f.so", &|at| {
                symlink("/etc/passwd", at.join("f.so")).unwrap()
            }),
            ("d.so", &|at| {
                fs::set_permissions(
                    at.join("d.so"),
                    std::os::unix::fs::PermissionsExt::from_mode(0o4755),
                )
                .unwrap();
            }),
        ];
        for (number, (name, alter)) in alter.iter().enumerate() {
            let entry = format!("entry-{number}");
            tenant.install(&entry, &[("a b\n/c.so", &large(1)), ("d.so", &large(2))]);
            assert_eq!(altered(&tenant.at(&entry)).unwrap(), None);
            alter(&tenant.at(&entry).join(PACKAGES));
            let found = altered(&tenant.at(&entry)).unwrap();
            assert_eq!(found.as_deref(), Some(Path::new(name)), "{entry}");
        }
        // The file that was written to is that of all, so none of them is whole; what comes now is.
        assert!(altered(&tenant.at("one")).unwrap().is_some());
        tenant.install("new", &[("a b\n/c.so", &large(1)), ("d.so", &large(2))]);
        assert_eq!(altered(&tenant.at("new")).unwrap(), None);
    }

    #[test]
    fn what_an_installer_leaves_behind_does_not_lead_elsewhere() {
        let tenant = Tenant::new();
        let outside = tenant.at("outside");
        fs::write(&outside, large(7)).unwrap();
        let staging = tenant.at(".staging");
        let packages = staging.join(PACKAGES);
        fs::create_dir_all(&packages).unwrap();
        symlink(&outside, staging.join(LIST)).unwrap();
        symlink("..", packages.join("up")).unwrap();
        symlink(&outside, packages.join("out.so")).unwrap();
        let pipe = std::ffi::CString::new(packages.join("pipe").into_os_string().as_bytes());
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(pipe.unwrap().as_ptr(), 0o644) }, 0);
        assert_eq!(take_in(&staging, &tenant.at("entry")).unwrap(), 0);
        assert_eq!(fs::read(outside).unwrap(), large(7));
        assert_eq!(altered(&tenant.at("entry")).unwrap(), None);
        assert_eq!(fs::read_dir(tenant.at(STORE)).unwrap().count(), 0);
    }

    #[test]
    fn an_entry_is_taken_in_once_and_a_list_that_is_torn_is_seen() {
        let tenant = Tenant::new();
        tenant.install("one", &[("a.so", &large(1))]);
        let staging = tenant.at(".staging");
        fs::create_dir_all(staging.join(PACKAGES)).unwrap();
        assert!(take_in(&staging, &tenant.at("one")).is_err());
        let list = tenant.at("one").join(LIST);
        let text = fs::read(&list).unwrap();
        for end in [0, 5, text.len() - 1] {
            fs::write(&list, &text[..end]).unwrap();
            assert!(altered(&tenant.at("one")).unwrap().is_some(), "{end}");
        }
        // A release before this one wrote none.
        fs::remove_file(&list).unwrap();
        assert_eq!(altered(&tenant.at("one")).unwrap(), None);
        assert_eq!(fs::read(&list).unwrap(), text);
    }
}
