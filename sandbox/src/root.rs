//! A container's root file system, built in a mount namespace of its own.
//!
//! Sources are opened and destinations resolved by descriptor inside the new root (`openat2(2)` with `RESOLVE_IN_ROOT`),
//! so a symbolic link of the image can never lead a mount out of it. Mount flags are set by `mount_setattr(2)` on the
//! clone before it is attached: there is no moment at which a read-only bind is writable.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, mkdirat, openat,
    openat2, statx, symlinkat,
};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::error::Step;
use crate::launch::Mapped;
use crate::timeline::Timeline;
use crate::users;
use crate::{Error, Result};

/// What the root is mounted from.
#[derive(Debug, Clone)]
pub enum Root {
    /// An empty read-only directory: all that a holder needs.
    Empty,
    /// These mounts, on this directory, in this order. Without mounts the directory itself.
    Mounts {
        /// Usually the bundle's `rootfs`.
        target: PathBuf,
        /// From the snapshotter.
        mounts: Vec<RootMount>,
    },
}

/// One of the snapshotter's mounts.
#[derive(Debug, Clone)]
pub struct RootMount {
    /// `overlay`, `bind`, ...
    pub kind: String,
    /// Device or path.
    pub source: String,
    /// As in mount(8).
    pub options: Vec<String>,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;
const MOUNT_ATTR_ATIME: u64 = 0x70;
const MOUNT_ATTR_RELATIME: u64 = 0x0;
const MOUNT_ATTR_NOATIME: u64 = 0x10;
const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x20_0000;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

impl MountAttr {
    fn is_noop(self) -> bool {
        self == Self::default()
    }
    fn change(&mut self, change: Change) {
        match change {
            Change::Add(bit) => {
                self.set |= bit;
                self.clear &= !bit;
            }
            Change::Remove(bit) => {
                self.clear |= bit;
                self.set &= !bit;
            }
            Change::Atime(bit) => {
                self.clear |= MOUNT_ATTR_ATIME;
                self.set = (self.set & !MOUNT_ATTR_ATIME) | bit;
            }
        }
    }
}

/// Options of a mount, sorted out.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    bind: bool,
    recursive_bind: bool,
    attr: MountAttr,
    recursive_attr: MountAttr,
    /// `(MS_SHARED and the like, recursive)`
    propagation: Option<(libc::c_ulong, bool)>,
    /// Flags of mount(2) that belong to the file system (`sync`, `mand`, ...).
    super_flags: libc::c_ulong,
    /// What is left for the file system itself.
    data: Vec<String>,
    /// `tmpcopyup`: fill a tmpfs with what it covers.
    copy_up: bool,
    /// `ridmap`: the mounts below have the same users.
    recursive_idmap: bool,
}

/// What an option asks of the flags of a mount.
#[derive(Clone, Copy)]
enum Change {
    Add(u64),
    Remove(u64),
    Atime(u64),
}

/// Options that are flags of a mount; with an `r` before, of all mounts below it too (config.md of the OCI runtime specification).
const ATTRIBUTES: [(&str, Change); 15] = [
    ("ro", Change::Add(MOUNT_ATTR_RDONLY)),
    ("rw", Change::Remove(MOUNT_ATTR_RDONLY)),
    ("nosuid", Change::Add(MOUNT_ATTR_NOSUID)),
    ("suid", Change::Remove(MOUNT_ATTR_NOSUID)),
    ("nodev", Change::Add(MOUNT_ATTR_NODEV)),
    ("dev", Change::Remove(MOUNT_ATTR_NODEV)),
    ("noexec", Change::Add(MOUNT_ATTR_NOEXEC)),
    ("exec", Change::Remove(MOUNT_ATTR_NOEXEC)),
    ("nodiratime", Change::Add(MOUNT_ATTR_NODIRATIME)),
    ("diratime", Change::Remove(MOUNT_ATTR_NODIRATIME)),
    ("nosymfollow", Change::Add(MOUNT_ATTR_NOSYMFOLLOW)),
    ("symfollow", Change::Remove(MOUNT_ATTR_NOSYMFOLLOW)),
    ("relatime", Change::Atime(MOUNT_ATTR_RELATIME)),
    ("noatime", Change::Atime(MOUNT_ATTR_NOATIME)),
    ("strictatime", Change::Atime(MOUNT_ATTR_STRICTATIME)),
];

const PROPAGATIONS: [(&str, libc::c_ulong); 4] = [
    ("private", libc::MS_PRIVATE),
    ("slave", libc::MS_SLAVE),
    ("shared", libc::MS_SHARED),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Options that are flags of the file system, in mount(2).
const SUPER_FLAGS: [(&str, libc::c_ulong); 4] = [
    ("sync", libc::MS_SYNCHRONOUS),
    ("dirsync", libc::MS_DIRSYNC),
    ("mand", libc::MS_MANDLOCK),
    ("silent", libc::MS_SILENT),
];

/// What is so anyway, or a matter of who calls.
const WITHOUT_EFFECT: [&str; 8] = [
    "defaults",
    "async",
    "atime",
    "loud",
    "nomand",
    "norelatime",
    "nostrictatime",
    // The mappings beside it say the same.
    "idmap",
];

/// All options that are understood, but for those of single file systems, as `features` of the OCI runtime specification has them.
#[must_use]
pub fn mount_options() -> Vec<String> {
    let both = ATTRIBUTES.iter().map(|(name, _)| *name);
    let both = both.chain(PROPAGATIONS.iter().map(|(name, _)| *name));
    let recursive = both.clone().map(|name| format!("r{name}"));
    let once = ["bind", "rbind", "ridmap", "tmpcopyup"]
        .into_iter()
        .chain(both);
    let once = once.chain(SUPER_FLAGS.iter().map(|(name, _)| *name));
    let once = once.chain(WITHOUT_EFFECT).map(str::to_owned);
    let mut all: Vec<String> = once.chain(recursive).collect();
    all.sort();
    all
}

fn named<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    let found = table.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value)
}

fn options(list: &[String]) -> Options {
    let mut out = Options::default();
    for option in list {
        let below = option.strip_prefix('r').unwrap_or_default();
        if let Some(change) = named(&ATTRIBUTES, option) {
            out.attr.change(change);
        } else if let Some(change) = named(&ATTRIBUTES, below) {
            out.recursive_attr.change(change);
        } else if let Some(kind) = named(&PROPAGATIONS, option) {
            out.propagation = Some((kind, false));
        } else if let Some(kind) = named(&PROPAGATIONS, below) {
            out.propagation = Some((kind, true));
        } else if let Some(flag) = named(&SUPER_FLAGS, option) {
            out.super_flags |= flag;
        } else {
            match option.as_str() {
                "bind" => out.bind = true,
                "rbind" => (out.bind, out.recursive_bind) = (true, true),
                "tmpcopyup" => out.copy_up = true,
                "ridmap" => out.recursive_idmap = true,
                mapping if users::is_mapping(mapping) => {}
                other if other.is_empty() || WITHOUT_EFFECT.contains(&other) => {}
                other => out.data.push(other.to_string()),
            }
        }
    }
    out
}

fn set_attributes(tree: impl AsFd, attr: MountAttr, recursive: bool, what: &Path) -> Result<()> {
    if attr.is_noop() {
        return Ok(());
    }
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an empty C string, and a whole mount_attr whose size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).at("set mount attributes of", what)
    }
}

/// Has a mount that is not attached yet show its files as those of the users of a user namespace.
fn map_users(
    tree: impl AsFd,
    namespace: Option<RawFd>,
    recursive: bool,
    what: &Path,
) -> Result<()> {
    let Some(namespace) = namespace else {
        return Ok(());
    };
    let attr = MountAttr {
        set: MOUNT_ATTR_IDMAP,
        userns_fd: u64::try_from(namespace).unwrap_or(u64::MAX),
        ..MountAttr::default()
    };
    set_attributes(tree, attr, recursive, what).map_err(|error| match error.errno() {
        Some(libc::EINVAL) => Error::spec(
            "mounts[].uidMappings",
            format!("{}: the file system there cannot show its files as another user's (idmapped mounts): use another, or hostUsers: true", what.display()),
        ),
        _ => error,
    })
}

fn c(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::spec("mounts", format!("{} has a zero byte", path.display())))
}

/// mount(2) on an open directory or file.
fn mount_on(
    target: &OwnedFd,
    kind: &str,
    source: &str,
    flags: libc::c_ulong,
    data: &[String],
    what: &Path,
) -> Result<()> {
    let target = CString::new(format!("/proc/self/fd/{}", target.as_raw_fd())).unwrap_or_default();
    let text = |s: &str| {
        CString::new(s).map_err(|_| Error::spec("mounts", format!("{s:?} has a zero byte")))
    };
    let (kind_c, source, data) = (text(kind)?, text(source)?, text(&data.join(","))?);
    // SAFETY: C strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind_c.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).step("mount", format!("{kind} on {}", what.display()))
    }
}

/// mount(2) that changes a mount.
fn remount(path: &Path, flags: libc::c_ulong) -> Result<()> {
    let path_c = c(path)?;
    // SAFETY: a C string that outlives the call.
    let result = unsafe {
        libc::mount(
            std::ptr::null(),
            path_c.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).at("change propagation of", path)
    }
}

/// Between mounts and renames of others there is always a moment, of microseconds.
const MOST_TRIES: usize = 10_000;

/// As many as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// A root under construction.
struct Builder<'a> {
    root: OwnedFd,
    spec: &'a Spec,
    mapped: &'a Mapped,
}

impl Builder<'_> {
    /// Opens a path inside the root, following links inside it only.
    fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        let mut tries = 0;
        loop {
            let opened = openat2(
                &self.root,
                relative,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            tries += 1;
            // A path with `..` cannot be followed while anything on the machine is mounted or renamed (openat2(2)).
            if opened.as_ref().err() != Some(&rustix::io::Errno::AGAIN) || tries == MOST_TRIES {
                return opened;
            }
            std::thread::yield_now();
        }
    }

    /// Who a user of the container is outside: everything here is made before its user namespace is entered.
    fn user(&self, inside: u32) -> Result<u32> {
        let Some(users) = &self.mapped.users else {
            return Ok(inside);
        };
        users.uid(inside).ok_or_else(|| unmapped("user", inside))
    }

    /// The same of a group.
    fn group(&self, inside: u32) -> Result<u32> {
        let Some(users) = &self.mapped.users else {
            return Ok(inside);
        };
        users.gid(inside).ok_or_else(|| unmapped("group", inside))
    }

    /// Makes something in a directory as the container's root, whose it then is: on a mount with the container's users nobody
    /// else can. In a directory that belongs to nobody of the container its root could make nothing either.
    fn as_root_of_pod(
        &self,
        parent: &OwnedFd,
        what: &Path,
        make: impl FnOnce() -> rustix::io::Result<()>,
    ) -> rustix::io::Result<()> {
        let Some(users) = &self.mapped.users else {
            return make();
        };
        let (Some(uid), Some(gid)) = (users.uid(0), users.gid(0)) else {
            return Err(rustix::io::Errno::OVERFLOW);
        };
        let owner = rustix::fs::fstat(parent)?;
        if !users.has(owner.st_uid, owner.st_gid) {
            tracing::debug!(path = %what.display(), "its directory is nobody's of the pod");
            return Err(rustix::io::Errno::ACCESS);
        }
        let keep = SecureBits::new()?;
        set_file_user(uid, gid);
        let made = make();
        set_file_user(0, 0);
        drop(keep);
        made
    }

    /// Gives what is just made to a user of the container.
    fn give(&self, parent: &OwnedFd, name: &CStr, uid: u32, gid: u32, what: &Path) -> Result<()> {
        if self.mapped.users.is_none() && (uid, gid) == (0, 0) {
            return Ok(());
        }
        let (uid, gid) = (self.user(uid)?, self.group(gid)?);
        let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: an open directory and a C string.
        let result = unsafe { libc::fchownat(parent.as_raw_fd(), name.as_ptr(), uid, gid, flags) };
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error()).at("set owner of", what)
        }
    }

    /// Options of a file system that name users: who those are outside, and that its files are the container's root's.
    fn owners(&self, kind: &str, data: &mut Vec<String>) -> Result<()> {
        if self.mapped.users.is_none() {
            return Ok(());
        }
        let mut named = [false; 2];
        for option in data.iter_mut() {
            for (i, key) in ["uid=", "gid="].into_iter().enumerate() {
                let id = option.strip_prefix(key);
                if let Some(id) = id.and_then(|id| id.parse().ok()) {
                    let outside = if i == 0 {
                        self.user(id)?
                    } else {
                        self.group(id)?
                    };
                    *option = format!("{key}{outside}");
                    named[i] = true;
                }
            }
        }
        if kind == "tmpfs" {
            if !named[0] {
                data.push(format!("uid={}", self.user(0)?));
            }
            if !named[1] {
                data.push(format!("gid={}", self.group(0)?));
            }
        }
        Ok(())
    }

    /// Opens the place of a mount, making directories, and an empty file for the mount of a file.
    fn destination(&self, path: &Path, directory: bool) -> Result<OwnedFd> {
        self.make_destination(path, directory, 0)
    }

    fn make_destination(&self, path: &Path, directory: bool, links: usize) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH) {
            Ok(fd) => return Ok(fd),
            Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(e).at("open mount point", path),
        }
        let mut so_far = PathBuf::from("/");
        let mut parent = self.open(&so_far, OFlags::PATH).at("open", "/")?;
        // What `..` leads to depends on the links before it, which the kernel follows at each step.
        let parts: Vec<Component<'_>> = path
            .components()
            .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
            .collect();
        for (i, part) in parts.iter().enumerate() {
            let name = part.as_os_str();
            let above = so_far.clone();
            so_far.push(name);
            parent = match self.open(&so_far, OFlags::PATH) {
                Ok(fd) => fd,
                Err(rustix::io::Errno::NOENT) => {
                    if let Ok(link) = rustix::fs::readlinkat(&parent, name, Vec::new()) {
                        // A link to what is not there: its target is made, inside the root like every target.
                        if links == MOST_LINKS {
                            return Err(rustix::io::Errno::LOOP).at("open mount point", path);
                        }
                        let rest: PathBuf = parts[i + 1..].iter().collect();
                        let target = above
                            .join(std::ffi::OsStr::from_bytes(link.as_bytes()))
                            .join(rest);
                        return self.make_destination(&target, directory, links + 1);
                    }
                    let is_file = i + 1 == parts.len() && !directory;
                    self.as_root_of_pod(&parent, &so_far, || {
                        if is_file {
                            let flags =
                                OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                            openat(&parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
                        } else {
                            mkdirat(&parent, name, Mode::from_raw_mode(0o755))
                        }
                    })
                    .at("make mount point", &so_far)?;
                    self.open(&so_far, OFlags::PATH)
                        .at("open mount point", &so_far)?
                }
                Err(e) => return Err(e).at("open mount point", &so_far),
            };
        }
        Ok(parent)
    }

    fn mount(&self, mount: &Mount, cgroups: &[(String, PathBuf)]) -> Result<()> {
        let kind = mount.typ().as_deref().unwrap_or("none");
        let list = mount.options().clone().unwrap_or_default();
        let mut options = options(&list);
        let destination = mount.destination();
        let source = mount
            .source()
            .clone()
            .unwrap_or_else(|| PathBuf::from(kind));
        if options.bind || kind == "bind" {
            let users = self.mapped.maps.of_mount(self.spec, mount)?;
            return self.bind(&source, destination, &options, users);
        }
        if kind == "cgroup" && !cgroups.is_empty() {
            return self.cgroups(destination, cgroups, &options);
        }
        let kind = if kind == "cgroup" { "cgroup2" } else { kind };
        let target = self.destination(destination, true)?;
        if kind == "cgroup2" {
            options.data.clear();
        }
        if kind == "mqueue" {
            // Takes no data (mq_overview(7)).
            options.data.clear();
        }
        self.owners(kind, &mut options.data)?;
        let saved = if options.copy_up {
            Some(
                self.open(destination, OFlags::RDONLY | OFlags::DIRECTORY)
                    .at("open", destination)?,
            )
        } else {
            None
        };
        let flags = options.super_flags | mount_flags(options.attr);
        mount_on(
            &target,
            kind,
            &source.to_string_lossy(),
            flags,
            &options.data,
            destination,
        )?;
        if let Some(saved) = saved {
            let fresh = self
                .open(destination, OFlags::RDONLY | OFlags::DIRECTORY)
                .at("open", destination)?;
            copy_directory(&saved, &fresh).at("copy into tmpfs", destination)?;
        }
        if let Some((propagation, recursive)) = options.propagation {
            let fd = self
                .open(destination, OFlags::PATH)
                .at("open", destination)?;
            propagate(&fd, propagation, recursive, destination)?;
        }
        Ok(())
    }

    fn bind(
        &self,
        source: &Path,
        destination: &Path,
        options: &Options,
        users: Option<RawFd>,
    ) -> Result<()> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if options.recursive_bind {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, source, flags).at("open mount source", source)?;
        let directory = rustix::fs::fstat(&tree)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir());
        set_attributes(&tree, options.attr, false, destination)?;
        set_attributes(&tree, options.recursive_attr, true, destination)?;
        map_users(&tree, users, options.recursive_idmap, destination)?;
        if let Some((propagation, recursive)) = options.propagation {
            propagate(&tree, propagation, recursive, destination)?;
        }
        self.attach(&tree, destination, directory)
    }

    fn attach(&self, tree: &OwnedFd, destination: &Path, directory: bool) -> Result<()> {
        let target = self.destination(destination, directory)?;
        move_mount(
            tree,
            "",
            &target,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .at("attach mount", destination)
    }

    /// Version 1 in a container: a directory of binds of the container's own cgroups.
    fn cgroups(
        &self,
        destination: &Path,
        cgroups: &[(String, PathBuf)],
        given: &Options,
    ) -> Result<()> {
        let target = self.destination(destination, true)?;
        let mut data = vec!["mode=755".to_owned()];
        self.owners("tmpfs", &mut data)?;
        mount_on(
            &target,
            "tmpfs",
            "tmpfs",
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            &data,
            destination,
        )?;
        for (name, source) in cgroups {
            let own = options(&["rbind".into()]);
            self.bind(
                source,
                &destination.join(name),
                &Options {
                    attr: given.attr,
                    ..own
                },
                None,
            )?;
            for alias in name.split(',').filter(|a| a != name) {
                let directory = self
                    .open(destination, OFlags::PATH)
                    .at("open", destination)?;
                symlinkat(name.as_str(), &directory, alias).at("link", destination.join(alias))?;
            }
        }
        let top = self
            .open(destination, OFlags::PATH)
            .at("open", destination)?;
        set_attributes(
            &top,
            MountAttr {
                set: MOUNT_ATTR_RDONLY,
                ..MountAttr::default()
            },
            false,
            destination,
        )
    }

    fn device(&self, device: &LinuxDevice) -> Result<()> {
        let path = device.path();
        let kind = match device.typ() {
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
            LinuxDeviceType::P => libc::S_IFIFO,
            LinuxDeviceType::A => {
                return Err(Error::spec(
                    "linux.devices.type",
                    format!("{}: 'a' is no device type, use c, b or p", path.display()),
                ));
            }
        };
        let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
        let number = rustix::fs::makedev(
            u32::try_from(device.major()).unwrap_or(0),
            u32::try_from(device.minor()).unwrap_or(0),
        );
        self.node(path, kind | mode, number, false)?;
        let fd = self.open(path, OFlags::PATH).at("open", path)?;
        if self.mapped.users.is_some() {
            // A device of the node is not the pod's: its root would otherwise own every disk of a privileged pod.
            return Ok(());
        }
        let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        self.give(&fd, c"", uid, gid, path)
    }

    fn node(&self, path: &Path, mode: u32, number: u64, given: bool) -> Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::spec(
                "linux.devices.path",
                format!("{} is not below a directory", path.display()),
            ));
        };
        let parent = self.destination(parent, true)?;
        let name = c(Path::new(name))?;
        // SAFETY: an open directory and a C string.
        let result = unsafe { libc::mknodat(parent.as_raw_fd(), name.as_ptr(), mode, number) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EEXIST) {
                return Ok(());
            }
            return Err(error).at("make device", path);
        }
        // The process's umask took bits away.
        // SAFETY: as above.
        unsafe { libc::fchmodat(parent.as_raw_fd(), name.as_ptr(), mode & 0o7777, 0) };
        if given {
            self.give(&parent, &name, 0, 0, path)?;
        }
        Ok(())
    }

    fn devices(&self, list: &[LinuxDevice]) -> Result<()> {
        for (name, major, minor) in [
            ("null", 1, 3),
            ("zero", 1, 5),
            ("full", 1, 7),
            ("random", 1, 8),
            ("urandom", 1, 9),
            ("tty", 5, 0),
        ] {
            self.node(
                &Path::new("/dev").join(name),
                libc::S_IFCHR | 0o666,
                rustix::fs::makedev(major, minor),
                true,
            )?;
        }
        for device in list {
            self.device(device)?;
        }
        let dev = self.destination(Path::new("/dev"), true)?;
        for (target, name) in [
            ("/proc/self/fd", "fd"),
            ("/proc/self/fd/0", "stdin"),
            ("/proc/self/fd/1", "stdout"),
            ("/proc/self/fd/2", "stderr"),
            ("/proc/kcore", "core"),
            ("pts/ptmx", "ptmx"),
        ] {
            // Not every kernel has an image of its memory (CONFIG_PROC_KCORE).
            if name == "core" && !Path::new(target).exists() {
                continue;
            }
            match symlinkat(target, &dev, name) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e).at("link", Path::new("/dev").join(name)),
            }
        }
        Ok(())
    }

    /// Hides a path: an empty read-only directory over a directory, `/dev/null` over a file.
    fn mask(&self, path: &Path) -> Result<()> {
        let fd = match self.open(path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(_) => return Ok(()),
        };
        let directory = rustix::fs::fstat(&fd)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir());
        if directory {
            mount_on(
                &fd,
                "tmpfs",
                "tmpfs",
                libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
                &["size=0k".into(), "nr_inodes=1".into()],
                path,
            )
        } else {
            let null = open_tree(
                CWD,
                "/dev/null",
                OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
            )
            .at("open", "/dev/null")?;
            move_mount(
                &null,
                "",
                &fd,
                "",
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
            )
            .at("hide", path)
        }
    }

    fn make_readonly(&self, path: &Path) -> Result<()> {
        let fd = match self.open(path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(_) => return Ok(()),
        };
        let tree = open_tree(
            &fd,
            "",
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .at("open", path)?;
        set_attributes(
            &tree,
            MountAttr {
                set: MOUNT_ATTR_RDONLY,
                ..MountAttr::default()
            },
            true,
            path,
        )?;
        move_mount(
            &tree,
            "",
            &fd,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .at("make read-only", path)
    }
}

fn mount_flags(attr: MountAttr) -> libc::c_ulong {
    let mut flags = 0;
    for (bit, flag) in [
        (MOUNT_ATTR_RDONLY, libc::MS_RDONLY),
        (MOUNT_ATTR_NOSUID, libc::MS_NOSUID),
        (MOUNT_ATTR_NODEV, libc::MS_NODEV),
        (MOUNT_ATTR_NOEXEC, libc::MS_NOEXEC),
        (MOUNT_ATTR_NOATIME, libc::MS_NOATIME),
        (MOUNT_ATTR_STRICTATIME, libc::MS_STRICTATIME),
        (MOUNT_ATTR_NODIRATIME, libc::MS_NODIRATIME),
    ] {
        if attr.set & bit != 0 {
            flags |= flag;
        }
    }
    flags
}

fn propagate(tree: impl AsFd, kind: libc::c_ulong, recursive: bool, what: &Path) -> Result<()> {
    set_attributes(
        tree,
        MountAttr {
            propagation: kind,
            ..MountAttr::default()
        },
        recursive,
        what,
    )
}

fn copy_directory(from: &OwnedFd, to: &OwnedFd) -> std::io::Result<()> {
    let path = |fd: &OwnedFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (source, target, kind) =
                (entry.path(), to.join(entry.file_name()), entry.file_type()?);
            if kind.is_dir() {
                fs::create_dir(&target)?;
                copy(&source, &target)?;
                fs::set_permissions(&target, entry.metadata()?.permissions())?;
            } else if kind.is_symlink() {
                std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
            } else if kind.is_file() {
                fs::copy(&source, &target)?;
            }
            let meta = entry.metadata()?;
            std::os::unix::fs::lchown(
                &target,
                Some(std::os::unix::fs::MetadataExt::uid(&meta)),
                Some(std::os::unix::fs::MetadataExt::gid(&meta)),
            )?;
        }
        Ok(())
    }
    copy(&path(from), &path(to))
}

/// Builds the root in the calling process's own mount namespace and makes it the root directory.
/// `cgroups` are the container's directories by hierarchy name on version 1, empty on version 2. `mounted` is done when all is
/// there, and the root directory still the host's.
pub(crate) fn enter(
    root: &Root,
    spec: &Spec,
    cgroups: &[(String, PathBuf)],
    nodev: bool,
    mapped: &Mapped,
    timeline: &Timeline,
    mounted: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let linux = spec.linux().as_ref();
    let wanted = linux.and_then(|l| l.rootfs_propagation().as_deref());
    // Mounts made here must not reach the host; the host's are to reach in unless asked otherwise.
    let propagation = match wanted {
        Some("shared" | "rshared") => libc::MS_SHARED | libc::MS_REC,
        Some("private" | "rprivate") => libc::MS_PRIVATE | libc::MS_REC,
        _ => libc::MS_SLAVE | libc::MS_REC,
    };
    remount(Path::new("/"), propagation)?;
    if let (libc::MS_SHARED, Root::Mounts { target, .. }) = (propagation & !libc::MS_REC, root) {
        // What is mounted below a mount that is shared would be mounted on the host too, and cannot become a root.
        remount(mount_of(target), libc::MS_PRIVATE)?;
    }
    let (target, mounts) = match root {
        Root::Empty => {
            let at = Path::new("/tmp");
            let at = if at.is_dir() { at } else { Path::new("/proc") };
            let fd = rustix::fs::open(at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .at("open", at)?;
            mount_on(
                &fd,
                "tmpfs",
                "tmpfs",
                libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
                &["size=0k".into(), "nr_inodes=2".into(), "mode=555".into()],
                at,
            )?;
            timeline.passed("root file system");
            mounted()?;
            pivot(at)?;
            timeline.passed("pivot_root");
            return Ok(());
        }
        Root::Mounts { target, mounts } => (target.clone(), mounts),
    };
    if mounts.is_empty() {
        let tree = open_tree(
            CWD,
            &target,
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .at("open root", &target)?;
        attach_root(&tree, &target)?;
    }
    for mount in mounts {
        let options = options(&mount.options);
        let users = mapped.maps.of_root(mount)?;
        if mount.kind == "bind" || options.bind {
            let tree = open_tree(
                CWD,
                mount.source.as_str(),
                OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE,
            )
            .at("open root", &mount.source)?;
            set_attributes(&tree, options.attr, false, &target)?;
            map_users(&tree, users, true, &target)?;
            attach_root(&tree, &target)?;
        } else if mount.kind == "overlay" {
            overlay(&target, mount, &options, users)?;
        } else {
            let fd = rustix::fs::open(&target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .at("open", &target)?;
            mount_on(
                &fd,
                &mount.kind,
                &mount.source,
                options.super_flags | mount_flags(options.attr),
                &options.data,
                &target,
            )?;
        }
    }
    let builder = Builder {
        root: rustix::fs::open(
            &target,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .at("open root", &target)?,
        spec,
        mapped,
    };
    // pivot_root(2) wants a parent that is not shared.
    propagate(&builder.root, libc::MS_PRIVATE, false, &target)?;
    timeline.passed("root file system");
    for mount in spec.mounts().iter().flatten() {
        builder.mount(mount, cgroups)?;
    }
    timeline.passed("mounts");
    if spec
        .mounts()
        .iter()
        .flatten()
        .any(|m| m.destination() == Path::new("/dev") && m.typ().as_deref() == Some("tmpfs"))
    {
        builder.devices(
            linux
                .and_then(|l| l.devices().as_deref())
                .unwrap_or_default(),
        )?;
    }
    for path in linux
        .and_then(|l| l.readonly_paths().as_ref())
        .into_iter()
        .flatten()
    {
        builder.make_readonly(Path::new(path))?;
    }
    for path in linux
        .and_then(|l| l.masked_paths().as_ref())
        .into_iter()
        .flatten()
    {
        builder.mask(Path::new(path))?;
    }
    if let Some(cwd) = spec.process().as_ref().map(oci_spec::runtime::Process::cwd) {
        // A working directory that the image lacks is made, as containerd's own runtime does.
        if builder.open(cwd, OFlags::PATH).is_err() {
            builder.destination(cwd, true)?;
        }
    }
    if nodev || mapped.users.is_some() {
        let attr = MountAttr {
            set: MOUNT_ATTR_NODEV,
            ..MountAttr::default()
        };
        set_attributes(&builder.root, attr, false, &target)?;
    }
    let readonly = spec
        .root()
        .as_ref()
        .and_then(oci_spec::runtime::Root::readonly)
        .unwrap_or(false);
    if readonly {
        set_attributes(
            &builder.root,
            MountAttr {
                set: MOUNT_ATTR_RDONLY,
                ..MountAttr::default()
            },
            false,
            &target,
        )?;
    }
    drop(builder);
    timeline.passed("devices, masked and read-only paths");
    mounted()?;
    pivot(&target)?;
    if let Some(flags) = match wanted {
        Some("shared" | "rshared") => Some(libc::MS_SHARED | libc::MS_REC),
        Some("slave" | "rslave") => Some(libc::MS_SLAVE | libc::MS_REC),
        _ => None,
    } {
        remount(Path::new("/"), flags)?;
    }
    timeline.passed("pivot_root");
    Ok(())
}

/// While it is there, a change of the user for access to files (setfsuid(2)) changes no capability (capabilities(7)).
struct SecureBits(libc::c_int);

impl SecureBits {
    fn new() -> rustix::io::Result<SecureBits> {
        const NO_SETUID_FIXUP: libc::c_int = 1 << 2;
        let last = || {
            let error = std::io::Error::last_os_error();
            rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::PERM)
        };
        // SAFETY: plain numbers.
        let before = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
        if before < 0 {
            return Err(last());
        }
        // SAFETY: plain numbers.
        if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, before | NO_SETUID_FIXUP, 0, 0, 0) } != 0 {
            return Err(last());
        }
        Ok(SecureBits(before))
    }
}

impl Drop for SecureBits {
    fn drop(&mut self) {
        // SAFETY: plain numbers.
        unsafe { libc::prctl(libc::PR_SET_SECUREBITS, self.0, 0, 0, 0) };
    }
}

/// Who makes files (setfsuid(2)); the calls say nothing of success.
fn set_file_user(uid: u32, gid: u32) {
    // The raw calls: of this thread alone, which is the only one.
    // SAFETY: plain numbers.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
    }
}

/// As many bytes of options as mount(2) takes: a page, with the zero at its end.
const LONGEST_OPTIONS: usize = 4095;

/// Mounts an overlay whose layers show their files as those of other users, or whose options are too long for mount(2).
fn overlay(
    target: &Path,
    mount: &RootMount,
    options: &Options,
    users: Option<RawFd>,
) -> Result<()> {
    let open = || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(target, flags, Mode::empty()).at("open", target)
    };
    let on = |place: &OwnedFd, data: &[String]| {
        let flags = options.super_flags | mount_flags(options.attr);
        mount_on(place, &mount.kind, &mount.source, flags, data, target)
    };
    let length: usize = options.data.iter().map(|option| option.len() + 1).sum();
    if users.is_none() && length <= LONGEST_OPTIONS {
        return on(&open()?, &options.data);
    }
    // Layers are attached to short names, below what the root will cover. The overlay keeps clones of its own.
    mount_on(
        &open()?,
        "tmpfs",
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
        &["mode=700".into()],
        target,
    )?;
    let scratch = open()?;
    rustix::process::fchdir(&scratch).at("enter", target)?;
    let data = options.data.iter().map(|option| {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            return Ok(option.clone());
        };
        let names = layers.split(':').enumerate().map(|(number, layer)| {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = open_tree(CWD, layer, flags).at("open layer", layer)?;
            map_users(&tree, users, false, Path::new(layer))?;
            let name = number.to_string();
            mkdirat(&scratch, name.as_str(), Mode::from_raw_mode(0o700))
                .at("make place of layer", layer)?;
            move_mount(
                &tree,
                "",
                &scratch,
                name.as_str(),
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )
            .at("attach layer", layer)?;
            Ok(name)
        });
        let names: Vec<String> = names.collect::<Result<_>>()?;
        Ok(format!("lowerdir={}", names.join(":")))
    });
    let data: Vec<String> = data.collect::<Result<_>>()?;
    on(&scratch, &data)
}

/// The mount that a path lies on.
fn mount_of(path: &Path) -> &Path {
    let is_mount = |path: &&Path| {
        let flags = StatxFlags::empty();
        statx(CWD, *path, AtFlags::empty(), flags)
            .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    };
    path.ancestors().find(is_mount).unwrap_or(Path::new("/"))
}

fn unmapped(what: &str, inside: u32) -> Error {
    Error::spec(
        "linux.uidMappings",
        format!(
            "the pod's user namespace has no {what} {inside}, which a mount or device of the container names"
        ),
    )
}

fn attach_root(tree: &OwnedFd, target: &Path) -> Result<()> {
    move_mount(
        tree,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .at("attach root", target)
}

/// Makes `target` the root and lets the old one go (pivot_root(2), "pivot_root(".", ".")").
fn pivot(target: &Path) -> Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).at("open", "/")?;
    rustix::process::chdir(target).at("enter", target)?;
    rustix::process::pivot_root(".", ".").at("pivot to", target)?;
    // The old root lies over the new one now; it must not carry its unmounts to the host. The working directory is below it
    // still, as mount(2) sees it, though not as umount(2) does.
    rustix::process::fchdir(&old).at("enter", "old root")?;
    drop(old);
    remount(Path::new("."), libc::MS_SLAVE | libc::MS_REC)?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH).at("detach", "old root")?;
    rustix::process::chdir("/").at("enter", "/")
}

/// Whether a path exists as this process sees it, for callers that edit a specification.
#[must_use]
pub fn exists(path: &Path) -> bool {
    rustix::fs::statat(CWD, path, AtFlags::empty()).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::users::Maps;
    use proptest::prelude::*;

    fn opts(list: &[&str]) -> Options {
        options(&list.iter().map(|s| (*s).to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_sorted_into_flags_propagation_and_data() {
        let o = opts(&["rbind", "rprivate", "ro", "nosuid", "size=64k", "relatime"]);
        assert!(o.bind && o.recursive_bind);
        assert_eq!(o.propagation, Some((libc::MS_PRIVATE, true)));
        assert_eq!(o.attr.set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID);
        assert_eq!(o.attr.clear, MOUNT_ATTR_ATIME);
        assert_eq!(o.data, ["size=64k"]);
    }

    #[test]
    fn the_last_of_contradicting_options_counts() {
        assert_eq!(opts(&["ro", "rw"]).attr.set, 0);
        assert_eq!(
            opts(&["rw", "ro"]).attr,
            MountAttr {
                set: MOUNT_ATTR_RDONLY,
                ..MountAttr::default()
            }
        );
    }

    #[test]
    fn every_option_that_is_told_of_is_understood() {
        let all = mount_options();
        assert_eq!(options(&all).data, [""; 0]);
        for name in [
            "rro",
            "rrw",
            "rnosuid",
            "rstrictatime",
            "rbind",
            "rslave",
            "sync",
            "idmap",
        ] {
            assert!(all.iter().any(|known| known == name), "{name}");
        }
    }

    #[test]
    fn an_r_before_it_is_for_all_mounts_below() {
        let o = opts(&["rro", "rnoexec", "rrw", "nodev"]);
        assert_eq!(o.recursive_attr.set, MOUNT_ATTR_NOEXEC);
        assert_eq!(o.recursive_attr.clear, MOUNT_ATTR_RDONLY);
        assert_eq!(o.attr.set, MOUNT_ATTR_NODEV);
    }

    /// An image in a directory, and beside it what it must not reach.
    struct Image(tempfile::TempDir, Spec, Mapped);

    impl Image {
        fn of(entries: &[(String, Option<String>)]) -> Image {
            let mapped = Mapped {
                users: None,
                maps: Maps::default(),
            };
            let image = Image(tempfile::tempdir().unwrap(), Spec::default(), mapped);
            let (root, beside) = (image.root(), image.0.path().join("beside"));
            fs::create_dir_all(&root).unwrap();
            fs::create_dir(beside).unwrap();
            let directories = entries.iter().filter(|(_, link)| link.is_none());
            for (path, _) in directories {
                fs::create_dir_all(root.join(path)).unwrap();
            }
            for (path, link) in entries {
                let path = root.join(path);
                let parent = path.parent().unwrap().canonicalize();
                if let Some(target) = link
                    && parent.is_ok_and(|p| p.starts_with(&root))
                {
                    // Fails where there is something already.
                    let _ = std::os::unix::fs::symlink(target, &path);
                }
            }
            image
        }

        fn root(&self) -> PathBuf {
            self.0.path().join("root")
        }

        fn builder(&self) -> Builder<'_> {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Builder {
                root: rustix::fs::open(self.root(), flags, Mode::empty()).unwrap(),
                spec: &self.1,
                mapped: &self.2,
            }
        }

        fn is_contained(&self) -> bool {
            let names = |path: PathBuf| {
                let mut names: Vec<_> = fs::read_dir(path)
                    .unwrap()
                    .map(|e| e.unwrap().file_name())
                    .collect();
                names.sort();
                names
            };
            names(self.0.path().into()) == ["beside", "root"]
                && names(self.0.path().join("beside")).is_empty()
        }
    }

    fn inode(fd: &OwnedFd) -> (u64, u64) {
        let stat = rustix::fs::fstat(fd).unwrap();
        (stat.st_dev, stat.st_ino)
    }

    #[test]
    fn a_mount_on_a_dangling_link_is_where_the_link_leads() {
        // As images of virtual machines have it for systemd-resolved.
        let image = Image::of(&[
            ("etc".into(), None),
            ("etc/resolv.conf".into(), Some("../run/stub.conf".into())),
        ]);
        let builder = image.builder();
        let path = Path::new("/etc/resolv.conf");
        let made = builder.destination(path, false).unwrap();
        let seen = builder.open(path, OFlags::PATH).unwrap();
        assert_eq!(inode(&made), inode(&seen));
        assert!(image.root().join("run/stub.conf").is_file());
    }

    #[test]
    fn a_path_is_followed_while_others_rename() {
        let image = Image::of(&[("a/b/c".into(), None)]);
        let (builder, beside) = (image.builder(), image.0.path().join("beside"));
        let ended = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (one, other) = (beside.join("one"), beside.join("other"));
                fs::create_dir(&one).unwrap();
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::rename(&one, &other).unwrap();
                    fs::rename(&other, &one).unwrap();
                }
            });
            for _ in 0..2000 {
                let opened = builder.open(Path::new("/a/b/../b/../b/c"), OFlags::PATH);
                if let Err(error) = opened {
                    ended.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("{error}");
                }
            }
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    proptest! {
        #[test]
        fn any_options_can_be_sorted(list in prop::collection::vec("[a-z=0-9]{0,12}|r?(ro|rw|nosuid|suid|dev|exec|noatime|bind|private|shared)|\\PC{0,8}", 0..8)) {
            let o = options(&list);
            prop_assert_eq!(o.attr.set & o.attr.clear & !MOUNT_ATTR_ATIME, 0);
            prop_assert!(o.data.iter().all(|d| list.contains(d)));
            prop_assert!(o.bind || !o.recursive_bind);
        }

        #[test]
        fn no_image_leads_a_mount_astray(
            entries in prop::collection::vec(
                ("[abc](/[abc]){0,2}", prop::option::of("(/|(\\.\\./){1,3})?([abc.]|\\.\\.)(/([abc]|\\.\\.)){0,3}")), 0..10),
            destination in "/([abc.]|\\.\\.)(/([abc]|\\.\\.)){0,3}",
            directory in any::<bool>(),
        ) {
            let image = Image::of(&entries);
            let builder = image.builder();
            let path = Path::new(&destination);
            if let Ok(made) = builder.destination(path, directory) {
                let seen = builder.open(path, OFlags::PATH).map_err(|e| TestCaseError::fail(e.to_string()))?;
                prop_assert_eq!(inode(&made), inode(&seen));
            }
            prop_assert!(image.is_contained());
        }
    }
}
