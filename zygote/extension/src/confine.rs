//! From a forked child to a process of the pod, in the order that the kernel demands.
//!
//! Everything that needs a capability of the zygote's user namespace comes before the capabilities
//! are dropped, everything that the pod's seccomp profile may forbid before the profile is loaded.
//! What does not depend on the Function is done by [`prepare`], ahead of need in a spare.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, OFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, mount, mount_bind, mount_change, move_mount,
};
use rustix::process::{DumpableBehavior, chdir, chroot, fchdir, set_dumpable_behavior};
use rustix::system::sethostname;
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, capabilities,
    clear_ambient_capability_set, move_into_link_name_space, set_capabilities, set_no_new_privs,
    unshare_unsafe,
};
use sock_zygote_protocol::{LeafSetup, Phase, Rlimit};

use crate::filter::Program;

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}{}{path}: {errno}", if path.is_empty() { "" } else { " " })]
pub struct Error {
    step: &'static str,
    path: String,
    errno: Errno,
}

fn at(step: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error {
        step,
        path: String::new(),
        errno,
    }
}

fn on<'a>(step: &'static str, path: &'a str) -> impl FnOnce(Errno) -> Error + 'a {
    move |errno| Error {
        step,
        path: path.to_owned(),
        errno,
    }
}

/// The errno of the last call made through `libc`.
pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Where the time goes.
#[derive(Default)]
pub struct Phases(Vec<Phase>);

impl Phases {
    /// Runs a step and notes its time.
    pub fn time<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.push(name, start);
        result
    }

    fn push(&mut self, name: &str, start: Instant) {
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.0.push(Phase {
            name: name.to_owned(),
            micros,
        });
    }

    pub fn into_list(self) -> Vec<Phase> {
        self.0
    }
}

/// The descriptors of a setup.
#[derive(Default)]
pub struct Fds {
    pub root: Option<OwnedFd>,
    pub network: Option<OwnedFd>,
    pub cgroups: Vec<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// The part that is the same for every Function: namespaces of its own, and a `/proc` of its own
/// process namespace, mounted over the zygote's until there is a root to move it to.
pub fn prepare(phases: &mut Phases) -> Result<(), Error> {
    phases.time("namespaces", || {
        // SAFETY: the process has one thread, and none of these namespaces is behind a descriptor or
        // memory that Rust code relies on.
        unsafe {
            unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
        }
        .map_err(at("make mount, IPC and UTS namespaces (unshare)"))?;
        // Nothing mounted from here on may reach the zygote, or the next leaf.
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .map_err(at("make the mounts private (mount)"))
    })?;
    phases.time("proc", fresh_proc)
}

fn fresh_proc() -> Result<(), Error> {
    mount(
        c"proc",
        c"/proc",
        c"proc",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        None::<&CStr>,
    )
    .map_err(at("mount a fresh /proc (mount)"))
}

/// Paths below `/proc` that are masked, and read-only, already.
#[derive(Debug, Default)]
pub struct Masks {
    masked: Vec<&'static str>,
    /// One of these that is a directory.
    empty: Option<&'static str>,
    readonly: Vec<&'static str>,
}

impl Masks {
    /// In a spare, what container runtimes mask and make read-only unless a pod asks for less (`procMount`): the pod that
    /// the spare is for is not known yet, and a third of the way into one is this.
    pub fn usual() -> Result<Masks, Error> {
        const MASKED: [&str; 10] = [
            "/proc/acpi",
            "/proc/asound",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/proc/timer_list",
            "/proc/timer_stats",
        ];
        const READONLY: [&str; 5] = [
            "/proc/bus",
            "/proc/fs",
            "/proc/irq",
            "/proc/sys",
            "/proc/sysrq-trigger",
        ];
        let mut empty = None;
        Ok(Masks {
            masked: mask(&MASKED, &mut empty)?,
            empty,
            readonly: make_all_readonly(&READONLY)?,
        })
    }

    /// Whether the pod asks for all of it.
    fn are_of(&self, setup: &LeafSetup) -> bool {
        let within = |done: &[&str], asked: &[String]| {
            done.iter().all(|path| asked.iter().any(|a| a == path))
        };
        within(&self.masked, &setup.masked_paths) && within(&self.readonly, &setup.readonly_paths)
    }
}

/// The rest. `masks`: of a leaf that was forked. Yields the listener for intercepted sockets.
pub fn confine(
    setup: &LeafSetup,
    fds: &Fds,
    masks: Option<Masks>,
    phases: &mut Phases,
) -> Result<Option<OwnedFd>, Error> {
    let forked = masks.is_some();
    // First, so that what follows is charged to the pod.
    phases.time("cgroup", || {
        fds.cgroups
            .iter()
            .try_for_each(|procs| match rustix::io::write(procs, b"0") {
                Ok(_) => Ok(()),
                Err(errno) => Err(Error {
                    step: "join the cgroup (write)",
                    path: String::new(),
                    errno,
                }),
            })
    })?;
    if let Some(network) = &fds.network {
        phases.time("network", || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(at("enter the pod's empty network namespace (setns)"))
        })?;
    }
    if let Some(root) = &fds.root {
        let masks = match masks.unwrap_or_default() {
            masks if masks.are_of(setup) => masks,
            _ => {
                fresh_proc()?;
                Masks::default()
            }
        };
        phases.time("root", || change_root(root.as_fd()))?;
        phases.time("masks", || {
            let mut empty = masks.empty;
            mask(&rest(&setup.masked_paths, &masks.masked), &mut empty)?;
            make_all_readonly(&rest(&setup.readonly_paths, &masks.readonly)).map(drop)
        })?;
        if !setup.hostname.is_empty() {
            sethostname(setup.hostname.as_bytes())
                .map_err(on("set the host name (sethostname)", &setup.hostname))?;
        }
    }
    phases.time("limits", || setup.rlimits.iter().try_for_each(limit))?;
    for (fd, number) in [(&fds.stdout, 1), (&fds.stderr, 2)] {
        if let Some(fd) = fd {
            // SAFETY: replaces standard output or error, which no Rust object owns.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                return Err(at("replace standard output and error (dup2)")(last_errno()));
            }
        }
    }
    phases.time("capabilities", || drop_capabilities(forked))?;
    if let Some(profile) = (!setup.seccomp.is_empty()).then_some(&setup.seccomp) {
        phases.time("seccomp", || {
            let program = Program::from_bytes(profile).ok_or(Errno::INVAL);
            program
                .and_then(|p| p.load())
                .map_err(at("load the pod's seccomp profile (seccomp)"))
        })?;
    }
    if setup.intercept_sockets {
        let load = || {
            Program::sockets()
                .load_with_listener()
                .map_err(at("load the socket filter (seccomp)"))
        };
        return phases.time("sockets", load).map(Some);
    }
    Ok(None)
}

/// Attaches the tree over `/` and goes there. The process's own `/` is still the zygote's root below
/// it, so both are in reach until the `chroot`; afterwards `..` leads nowhere, as `/` is where the
/// tree is attached, and the tree cannot be taken away from above the zygote's files.
fn change_root(root: BorrowedFd<'_>) -> Result<(), Error> {
    move_mount(
        root,
        c"",
        CWD,
        c"/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(at("attach the root (move_mount)"))?;
    fchdir(root).map_err(at("enter the root (fchdir)"))?;
    move_mount(CWD, c"/proc", root, c"proc", MoveMountFlags::empty()).map_err(at(
        "move /proc into the root, which must have that directory (move_mount)",
    ))?;
    chroot(c".").map_err(at("change the root directory (chroot)"))?;
    chdir(c"/").map_err(at("enter the new root directory (chdir)"))
}

fn rest<'a>(asked: &'a [String], done: &[&str]) -> Vec<&'a str> {
    let paths = asked.iter().map(String::as_str);
    paths.filter(|path| !done.contains(path)).collect()
}

/// Hides what is there of `paths`; yields that. `empty`: a directory that is hidden, which will do for all.
fn mask<'a>(paths: &[&'a str], empty: &mut Option<&'a str>) -> Result<Vec<&'a str>, Error> {
    let mut done = Vec::with_capacity(paths.len());
    for &path in paths {
        let Some(kind) = kind(path).map_err(on("look at the path to mask (statx)", path))? else {
            continue;
        };
        if kind != FileType::Directory {
            mount_bind(c"/dev/null", path).map_err(on("mask (mount)", path))?;
        } else if let Some(first) = *empty {
            mount_bind(first, path).map_err(on("mask (mount)", path))?;
        } else {
            mount(
                c"tmpfs",
                path,
                c"tmpfs",
                MountFlags::RDONLY,
                Some(c"size=0,nr_inodes=2"),
            )
            .map_err(on("mask (mount)", path))?;
            *empty = Some(path);
        }
        done.push(path);
    }
    Ok(done)
}

/// Makes read-only what is there of `paths`; yields that.
fn make_all_readonly<'a>(paths: &[&'a str]) -> Result<Vec<&'a str>, Error> {
    let mut done = Vec::with_capacity(paths.len());
    for &path in paths {
        if kind(path)
            .map_err(on("look at the read-only path (statx)", path))?
            .is_none()
        {
            continue;
        }
        mount_bind(path, path).map_err(on("bind the read-only path (mount)", path))?;
        make_readonly(path).map_err(on("make read-only (mount_setattr)", path))?;
        done.push(path);
    }
    Ok(done)
}

/// `None` for a path that does not exist here: profiles name what only some kernels have.
fn kind(path: &str) -> Result<Option<FileType>, Errno> {
    match statx(CWD, path, rustix::fs::AtFlags::empty(), StatxFlags::TYPE) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.stx_mode.into()))),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Adds one attribute and leaves the others, some of which are locked, as they are.
fn make_readonly(path: &str) -> Result<(), Errno> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the kernel reads `size_of` bytes of the structure, and an empty path with AT_EMPTY_PATH.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// A limit that may not be raised from where the zygote was started is lowered as far as it is asked
/// and otherwise left.
fn limit(limit: &Rlimit) -> Result<(), Error> {
    let set = |soft, hard| {
        let value = libc::rlimit64 {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: reads one structure; no old value is asked for.
        match unsafe {
            libc::prlimit64(
                0,
                limit.resource as _,
                &raw const value,
                std::ptr::null_mut(),
            )
        } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    };
    match set(limit.soft, limit.hard) {
        Err(Errno::PERM) => {
            let mut now = libc::rlimit64 {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: writes one structure.
            unsafe { libc::prlimit64(0, limit.resource as _, std::ptr::null(), &raw mut now) };
            set(limit.soft.min(now.rlim_max), now.rlim_max)
        }
        other => other,
    }
    .map_err(at("set a resource limit (prlimit)"))
}

/// In a zygote that has just entered its own user namespace, where it has every capability: it keeps what it takes to make
/// leaves, and not even a program that it executes could have another.
pub fn keep_zygote_capabilities() -> Result<(), Error> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT | CapabilitySet::SETPCAP;
    let sets = CapabilitySets {
        effective: needed,
        permitted: needed,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(at("keep three capabilities (capset)"))?;
    drop_bounding_set()
}

/// Empties the bounding set of a zygote, from which its leaves have theirs, and gives up what it takes to
/// do so: `CAP_SETPCAP`.
pub fn drop_bounding_set() -> Result<(), Error> {
    for capability in 0.. {
        // SAFETY: takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            match last_errno() {
                // One past the last that this kernel knows.
                Errno::INVAL => break,
                errno => return Err(at("drop the capability bounding set (prctl)")(errno)),
            }
        }
    }
    let mut sets = capabilities(None).map_err(at("read the capabilities (capget)"))?;
    for set in [
        &mut sets.effective,
        &mut sets.permitted,
        &mut sets.inheritable,
    ] {
        set.remove(CapabilitySet::SETPCAP);
    }
    set_capabilities(None, sets).map_err(at("drop CAP_SETPCAP (capset)"))
}

fn drop_capabilities(forked: bool) -> Result<(), Error> {
    clear_ambient_capability_set().map_err(at("clear the ambient capabilities (prctl)"))?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .map_err(at("drop the capabilities (capset)"))?;
    set_no_new_privs(true).map_err(at("set no_new_privs (prctl)"))?;
    if forked {
        // A zygote that has changed its user is not dumpable, and a handler that opens /proc/self/…
        // would find it root's.
        set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(at("become dumpable (prctl)"))?;
    }
    Ok(())
}
