//! An entry of the node cache: `site-packages`, and beside it the list of what was installed there, by which is seen whether it still is.
//!
//! Equal files of a tenant's entries are one file: the same numpy in ten PackageSets lies on the disk, and in memory, once. Each file
//! has a second name in `TENANT/.files`, made of what it contains; what is installed anew and has an equal there becomes another link to that. Files of
//! two tenants are never one.
//!
//! All of this takes as long as reading the packages, so it is done by a process of its own (`containerd-shim-sock-v1 cache`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fchmod, fchown, fstat, linkat, mkdirat,
    openat, readlinkat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// Packages, in an entry.
pub const PACKAGES: &str = "site-packages";
/// The list of them, beside.
const LIST: &str = "files";
/// Of a tenant.
const STORE: &str = ".files";
/// Below this a file takes a block of the disk and a page of memory at most.
const LEAST_SHARED: u64 = 4096;
/// Of a list that is read.
const LONGEST_LIST: u64 = 256 << 20;
/// What an entry may have: files and directories, their names together, one below the other, and bytes. Far more than any PackageSet has, and what a process
/// can keep in mind.
const MOST: Most = Most {
    files: 1_000_000,
    names: 128 << 20,
    depth: 64,
    bytes: 128 << 30,
};

/// A file that may be anything, which is neither followed nor waited for.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

struct Most {
    files: usize,
    names: usize,
    depth: usize,
    bytes: u64,
}

/// Takes an installation into the cache of a tenant: `staging` becomes `entry`, whole or not at all. Yields how many files are shared
/// with other entries.
///
/// Whoever has written there may still have a descriptor of a directory, in another container of its pod: so nothing is
/// reached by a path that it could change, but from one opened directory to the next.
///
/// # Errors
/// What cannot be read or written. An entry that is there already is one: it holds the same packages.
pub fn take_in(staging: &Path, entry: &Path) -> io::Result<usize> {
    let tenant = entry.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let store = Store::of(tenant)?;
    let top = directory(CWD, staging.as_os_str())?;
    // From here on only the packages themselves are the installer's.
    fchown(
        &top,
        Some(rustix::process::Uid::ROOT),
        Some(rustix::process::Gid::ROOT),
    )?;
    let mut shared = 0;
    let list = list(directory(&top, OsStr::new(PACKAGES))?, false, |file| {
        shared += usize::from(store.share(file));
    })?;
    write(&top, &list)?;
    rustix::fs::syncfs(&top)?;
    fs::rename(staging, entry)?;
    File::open(tenant)?.sync_all()?;
    Ok(shared)
}

/// What in an entry is not what was installed, if anything: the first path at fault, also one that cannot be read. An entry of a release that wrote no
/// list is taken as it is from here on.
///
/// # Errors
/// Its directories cannot be read.
pub fn altered(entry: &Path) -> io::Result<Option<PathBuf>> {
    let top = directory(CWD, entry.as_os_str())?;
    let now = list(directory(&top, OsStr::new(PACKAGES))?, true, |_| {})?;
    let file = match openat(&top, LIST, READ, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => {
            write(&top, &now)?;
            return Ok(None);
        }
        Err(_) => return Ok(Some(LIST.into())),
    };
    let about = fstat(&file)?;
    if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile || about.st_uid != 0 {
        return Ok(Some(LIST.into()));
    }
    let mut then = Vec::new();
    File::from(file).take(LONGEST_LIST).read_to_end(&mut then)?;
    Ok(first_difference(&then, &now))
}

fn directory(below: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(below, name, flags, Mode::empty())?)
}

/// Writes the list, in place of whatever is there.
fn write(top: &OwnedFd, list: &[u8]) -> io::Result<()> {
    let new = format!("{LIST}.new");
    remove(top, &new)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(top, &new, flags, Mode::from_raw_mode(0o600))?);
    file.write_all(list)?;
    file.sync_all()?;
    remove(top, LIST)?;
    Ok(renameat(top, &new, top, LIST)?)
}

/// A file, a link, or an empty directory.
fn remove(top: &OwnedFd, name: &str) -> io::Result<()> {
    match unlinkat(top, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Ok(unlinkat(top, name, AtFlags::REMOVEDIR)?),
        Err(errno) => Err(errno.into()),
    }
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

/// A regular file that was read.
struct Seen<'a> {
    directory: &'a OwnedFd,
    name: &'a OsStr,
    about: Stat,
    digest: &'a str,
}

/// A line for all that is in a directory, at any depth, in the order of the paths: kind, mode, owner, group, size and SHA-256 of the content or, of a
/// link, of what it names; then the path. Each regular file is given to `seen`. What cannot be read gets a line that no other list has, or is an error.
fn list(top: OwnedFd, or_say_so: bool, mut seen: impl FnMut(&Seen<'_>)) -> io::Result<Vec<u8>> {
    let mut lines: Vec<(OsString, String)> = Vec::new();
    let (mut names, mut bytes) = (0, 0_u64);
    let mut left = vec![(top, OsString::new(), 0)];
    while let Some((from, below, depth)) = left.pop() {
        for one in Dir::read_from(&from)? {
            let one = one?;
            let own = OsString::from_vec(one.file_name().to_bytes().to_vec());
            if own == "." || own == ".." {
                continue;
            }
            let mut name = below.clone();
            if !name.is_empty() {
                name.push("/");
            }
            name.push(&own);
            let line = match line(&from, &own, &mut seen) {
                Ok((line, size, inner)) => {
                    bytes = bytes.saturating_add(size);
                    left.extend(inner.map(|inner| (inner, name.clone(), depth + 1)));
                    line
                }
                Err(error) if or_say_so => format!("? {}", error.kind()),
                Err(error) => {
                    let what = format!("{}: {error}", Path::new(&name).display());
                    return Err(io::Error::new(error.kind(), what));
                }
            };
            names += name.len() + line.len();
            lines.push((name, line));
            if lines.len() > MOST.files
                || names > MOST.names
                || depth >= MOST.depth
                || bytes > MOST.bytes
            {
                return Err(io::Error::other("more files than packages have"));
            }
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

/// What is to be said of one, its size, and itself if it is a directory.
fn line(
    from: &OwnedFd,
    name: &OsStr,
    seen: &mut impl FnMut(&Seen<'_>),
) -> io::Result<(String, u64, Option<OwnedFd>)> {
    let mut about = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let (letter, size, digest, inner) = match FileType::from_raw_mode(about.st_mode) {
        FileType::RegularFile => {
            let file = openat(from, name, READ, Mode::empty())?;
            about = fstat(&file)?;
            let size = u64::try_from(about.st_size).unwrap_or_default();
            if size > MOST.bytes || FileType::from_raw_mode(about.st_mode) != FileType::RegularFile
            {
                return Err(io::Error::other("it is no file of a package"));
            }
            let digest = digest(File::from(file))?;
            seen(&Seen {
                directory: from,
                name,
                about,
                digest: &digest,
            });
            ('f', size, digest, None)
        }
        FileType::Symlink => {
            let target = readlinkat(from, name, Vec::new())?;
            ('l', 0, hex(&Sha256::digest(target.to_bytes())), None)
        }
        FileType::Directory => {
            let inner = directory(from, name)?;
            about = fstat(&inner)?;
            ('d', 0, "-".into(), Some(inner))
        }
        _ => ('o', 0, "-".into(), None),
    };
    let (mode, uid, gid) = rights(&about);
    let line = format!("{letter} {mode:o} {uid} {gid} {size} {digest}");
    Ok((line, size, inner))
}

/// Mode, owner and group.
fn rights(about: &Stat) -> (u32, u32, u32) {
    (about.st_mode & 0o7777, about.st_uid, about.st_gid)
}

/// SHA-256 of what is left to read.
fn digest(mut file: File) -> io::Result<String> {
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

/// Files of a tenant by what they contain: a directory that is root's alone.
struct Store(OwnedFd);

impl Store {
    fn of(tenant: &Path) -> io::Result<Store> {
        match mkdirat(CWD, tenant.join(STORE), Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let store = directory(CWD, tenant.join(STORE).as_os_str())?;
        fchmod(&store, Mode::RWXU)?;
        Ok(Store(store))
    }

    /// Makes a file one with its equal in the store, or its first if there is none. That it does not get there costs room.
    fn share(&self, file: &Seen<'_>) -> bool {
        if u64::try_from(file.about.st_size).is_ok_and(|size| size < LEAST_SHARED)
            || file.about.st_nlink > 1
        {
            return false;
        }
        let (mode, uid, gid) = rights(&file.about);
        let stored = format!("{}-{mode:o}-{uid}-{gid}", file.digest);
        let shared = match self.link_to(&stored, file) {
            Err(Errno::NOENT) => {
                let flags = AtFlags::empty();
                linkat(file.directory, file.name, &self.0, &stored, flags).map(|()| false)
            }
            other => other,
        };
        shared.unwrap_or_else(|errno| {
            tracing::debug!(name = %Path::new(file.name).display(), %errno, "not shared");
            false
        })
    }

    fn link_to(&self, stored: &str, file: &Seen<'_>) -> rustix::io::Result<bool> {
        let found = openat(&self.0, stored, READ, Mode::empty())?;
        // What it is called is what it was: what it is now is looked at.
        let is_same = rights(&fstat(&found)?) == rights(&file.about)
            && digest(File::from(found)).is_ok_and(|digest| digest == file.digest);
        if !is_same {
            unlinkat(&self.0, stored, AtFlags::empty())?;
            return Err(Errno::NOENT);
        }
        let new = format!(".new-{}", std::process::id());
        match unlinkat(&self.0, &new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        match linkat(&self.0, stored, &self.0, &new, AtFlags::empty()) {
            // It has as many names as the file system allows: from here on another has the next ones.
            Err(Errno::MLINK) => {
                unlinkat(&self.0, stored, AtFlags::empty())?;
                return Err(Errno::NOENT);
            }
            other => other?,
        }
        renameat(&self.0, &new, file.directory, file.name)?;
        Ok(true)
    }
}

/// What the process is asked for by its arguments; its answer, one line.
///
/// # Errors
/// What cannot be done, in words.
pub fn answer(arguments: &[OsString]) -> Result<String, String> {
    // What a tenant has installed decides how much memory this takes: the shim, whose score it has, is never killed for that.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
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
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

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
    fn directories_that_turn_into_links_lead_nowhere() {
        let tenant = Tenant::new();
        let outside = tenant.at("outside");
        fs::create_dir(&outside).unwrap();
        let content = large(5);
        tenant.install("first", &[("d/x.so", &content)]);
        let (inside, link) = (tenant.at(".staging/site-packages/d"), tenant.at("link"));
        let exchange = || {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            let _ = rustix::fs::renameat_with(CWD, &inside, CWD, &link, flags);
        };
        for number in 0..200 {
            fs::create_dir_all(&inside).unwrap();
            fs::write(inside.join("x.so"), &content).unwrap();
            symlink(&outside, &link).unwrap();
            fs::write(outside.join("x.so"), &content).unwrap();
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        exchange();
                    }
                });
                // Whatever it finds, or takes in.
                let _ = take_in(
                    &tenant.at(".staging"),
                    &tenant.at(&format!("entry-{number}")),
                );
                over.store(true, Ordering::Relaxed);
            });
            let about = fs::metadata(outside.join("x.so")).unwrap();
            assert_eq!(
                about.nlink(),
                1,
                "a stored file is outside, or a file from there stored"
            );
            for left in [tenant.at(".staging"), link.clone()] {
                let _ = fs::remove_dir_all(&left);
                let _ = fs::remove_file(&left);
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_at_fault_and_what_no_package_has_is_refused() {
        let tenant = Tenant::new();
        tenant.install("one", &[("a.so", &large(1))]);
        let top = directory(CWD, tenant.at("one/site-packages").as_os_str()).unwrap();
        let said = list(top, true, |_| {}).unwrap();
        let unread = String::from_utf8(said.clone()).unwrap().replace('f', "?");
        assert_eq!(
            first_difference(&said, unread.as_bytes()),
            Some("a.so".into())
        );
        let mut deep = tenant.at(".staging").join(PACKAGES);
        for _ in 0..=MOST.depth {
            deep.push("d");
        }
        fs::create_dir_all(deep).unwrap();
        assert!(take_in(&tenant.at(".staging"), &tenant.at("two")).is_err());
        fs::remove_dir_all(tenant.at(".staging")).unwrap();
        let packages = tenant.at(".staging").join(PACKAGES);
        fs::create_dir_all(&packages).unwrap();
        let sparse = File::create(packages.join("sparse")).unwrap();
        sparse.set_len(MOST.bytes + 1).unwrap();
        assert!(take_in(&tenant.at(".staging"), &tenant.at("two")).is_err());
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
