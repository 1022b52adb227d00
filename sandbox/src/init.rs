//! What a container's process does before its program, in the order the kernel demands.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType as Type, LinuxSeccomp, Process, Spec};

use crate::error::Step;
use crate::holder::{HolderKind, holder_program};
use crate::hook::{self, Kind};
use crate::launch::{Caller, ExecPlan, Mapped, Plan, Program, Stdio};
use crate::namespace::{self, Wanted};
use crate::{Error, Result, capability, rlimit, root, schedule, seccomp};

/// Ends the calling process without running what the copied program registered for its end.
pub(crate) fn leave(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Keeps everybody who has no capability on the host from tracing the calling process, which is a copy of its caller, and
/// from following `/proc/PID/exe` to the caller's binary.
pub(crate) fn undumpable() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Gives up supplementary groups.
pub(crate) fn no_groups() -> Result<()> {
    set_groups(&[]).step("set groups", "[]")
}

/// Changes user and group.
pub(crate) fn change_user(uid: u32, gid: u32) -> Result<()> {
    // The raw calls: the C library's would try to reach other threads.
    // SAFETY: plain numbers.
    unsafe {
        if libc::syscall(libc::SYS_setresgid, gid, gid, gid) != 0 {
            return Err(std::io::Error::last_os_error()).step("set group", gid);
        }
        if libc::syscall(libc::SYS_setresuid, uid, uid, uid) != 0 {
            return Err(std::io::Error::last_os_error()).step("set user", uid);
        }
    }
    Ok(())
}

/// Becomes root of the user namespace that this process is in, if that has one: whoever is nobody there owns nothing that it
/// makes.
fn be_root() -> Result<()> {
    // The raw call, as below.
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) };
    if result != 0 {
        // A zygote's has one user, who is not root.
        return Ok(());
    }
    no_groups()?;
    change_user(0, 0)?;
    // A change of user may undo it, as the node has it (fs.suid_dumpable, proc_sys_fs(5)).
    undumpable();
    Ok(())
}

/// Enters a user namespace as its root.
fn enter_users(users: impl AsFd, process: Option<&Process>) -> Result<()> {
    if let Some(limits) = process.and_then(|process| process.rlimits().as_ref()) {
        // Inside nobody may raise one (setrlimit(2)).
        rlimit::apply(limits)?;
    }
    namespace::join(users, Type::User)?;
    be_root()
}

/// What is computed before the fork: allocation and parsing that the child need not do.
pub(crate) struct Prepared {
    seccomp: Option<seccomp::Program>,
    holder: Option<OwnedFd>,
}

impl Prepared {
    pub(crate) fn new(spec: &Spec, program: &Program) -> Result<Self> {
        let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
        let process = spec.process().as_ref();
        if matches!(program, Program::Specified)
            && process.is_none_or(|p| p.args().as_ref().is_none_or(Vec::is_empty))
        {
            return Err(Error::spec(
                "process.args",
                "no program is given: set the container's command",
            ));
        }
        Ok(Self {
            // A holder makes six system calls; the profile of a tenant might not allow them.
            seccomp: if *program == Program::Specified {
                profile.map(seccomp::Program::compile).transpose()?
            } else {
                None
            },
            holder: if matches!(program, Program::Holder(_)) {
                Some(holder_program()?)
            } else {
                None
            },
        })
    }
    pub(crate) fn for_process(_process: &Process, profile: Option<&LinuxSeccomp>) -> Result<Self> {
        Ok(Self {
            seccomp: profile.map(seccomp::Program::compile).transpose()?,
            holder: None,
        })
    }
}

/// The first process of a container.
pub(crate) fn first(
    plan: Plan<'_>,
    wanted: Wanted,
    prepared: Prepared,
    mapped: &Mapped,
    caller: &Caller,
) -> Result<Infallible> {
    let extra = plan.extra.iter().map(|(_, fd)| fd.as_raw_fd());
    isolate(
        caller,
        &plan.stdio,
        extra.chain(mapped.maps.descriptors()),
        prepared.holder.as_ref(),
    )?;
    caller.timeline.passed("cloned, cut off from the shim");
    caller.hear()?;
    if wanted.creates(Type::User) && mapped.users.is_some() {
        be_root()?;
    }
    let spec = plan.spec;
    // The user namespace is joined last: from inside it the others could not be.
    let user = wanted.joins(Type::User).map(namespace::open).transpose()?;
    for (kind, path) in &wanted.join {
        if !matches!(kind, Type::User | Type::Pid) {
            namespace::join(namespace::open(path)?, *kind)?;
        }
    }
    if wanted.creates(Type::Cgroup) {
        unshare(libc::CLONE_NEWCGROUP, "cgroup namespace")?;
    }
    let late = wanted.late(&plan.root);
    let names_later = late & libc::CLONE_NEWUTS != 0;
    if !names_later && (wanted.creates(Type::Uts) || wanted.joins(Type::Uts).is_some()) {
        set_names(spec)?;
    }
    if wanted.creates(Type::Network) {
        // A new network namespace has a loopback device that is down.
        loopback_up()?;
    }
    for (key, value) in spec
        .linux()
        .as_ref()
        .and_then(|l| l.sysctl().as_ref())
        .into_iter()
        .flatten()
    {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        if key.contains("..") || key.starts_with('/') {
            return Err(Error::spec(
                "linux.sysctl",
                format!("{key:?} is not the name of a sysctl"),
            ));
        }
        std::fs::write(&path, value).at("set sysctl", path)?;
    }
    caller.timeline.passed("namespaces, sysctls");
    if wanted.creates(Type::Mount) {
        root::enter(
            &plan.root,
            spec,
            &plan.cgroups,
            plan.nodev_root,
            mapped,
            &caller.timeline,
            || {
                let Some(container) = &plan.identity else {
                    return Ok(());
                };
                if hook::has(spec, &[Kind::Prestart, Kind::CreateRuntime]) {
                    caller.mounted()?;
                    caller.hear()?;
                }
                hook::run(spec, Kind::CreateContainer, container, own_pid())
            },
        )?;
    }
    if let (Program::Specified, Some(process)) = (&plan.program, spec.process()) {
        schedule::apply(process, spec.linux().as_ref())?;
    }
    if let Some(user) = user {
        enter_users(&user, spec.process().as_ref())?;
        // The copy belongs to the user namespace, so the flags of its mounts are locked there (mount_namespaces(7)). So does
        // another cgroup namespace, and others of that user namespace may enter it.
        let own = if wanted.creates(Type::Cgroup) {
            libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP
        } else {
            libc::CLONE_NEWNS
        };
        unshare(own | late, "namespaces of the pod's users")?;
        if names_later {
            set_names(spec)?;
        }
    }
    caller.timeline.passed("scheduling, users");
    let process = spec.process().as_ref();
    let terminal = if plan.program == Program::Specified {
        terminal(process)?
    } else {
        None
    };
    caller.created(terminal.as_ref().map(|t| t.master.as_fd()))?;
    caller.hear()?;
    stdio(plan.stdio, terminal, plan.extra)?;
    match plan.program {
        Program::Specified => {
            let process = process.ok_or_else(|| Error::spec("process", "is missing"))?;
            become_user(process, prepared.seccomp.as_ref())?;
            if let Some(container) = &plan.identity {
                hook::run(spec, Kind::StartContainer, container, own_pid())?;
            }
            execute(process)
        }
        Program::Holder(kind) => {
            if let Some(process) = process {
                let mut process = process.clone();
                // It needs none; with CAP_DAC_OVERRIDE it could read its program, and be traced in turn.
                process.set_capabilities(None);
                become_user(&process, None)?;
            }
            execute_holder(prepared.holder.as_ref(), kind)
        }
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_pid()
}

/// A further process.
pub(crate) fn further(
    plan: ExecPlan<'_>,
    prepared: Prepared,
    caller: &Caller,
) -> Result<Infallible> {
    isolate(
        caller,
        &plan.stdio,
        plan.extra.iter().map(|(_, fd)| fd.as_raw_fd()),
        None,
    )?;
    caller.hear()?;
    let own_user = std::fs::read_link("/proc/self/ns/user").at("read", "/proc/self/ns/user")?;
    let target = PathBuf::from(format!("/proc/{}/ns", plan.target));
    let open = |name: &str| namespace::open(&target.join(name));
    let different_user =
        std::fs::read_link(target.join("user")).at("read", target.join("user"))? != own_user;
    let user = if different_user {
        Some(open("user")?)
    } else {
        None
    };
    let joined = [
        (Type::Ipc, open("ipc")?),
        (Type::Uts, open("uts")?),
        (Type::Network, open("net")?),
        (Type::Cgroup, open("cgroup")?),
        (Type::Mount, open("mnt")?),
    ];
    for (kind, fd) in joined {
        namespace::join(fd, kind)?;
    }
    schedule::apply(plan.process, plan.linux)?;
    if let Some(user) = user {
        enter_users(user, Some(plan.process))?;
    }
    let terminal = terminal(Some(plan.process))?;
    caller.created(terminal.as_ref().map(|t| t.master.as_fd()))?;
    caller.hear()?;
    stdio(plan.stdio, terminal, plan.extra)?;
    become_user(plan.process, prepared.seccomp.as_ref())?;
    execute(plan.process)
}

/// Cuts the child off from what it copied of its parent: descriptors, signal handling, its readability through `/proc`.
fn isolate(
    caller: &Caller,
    stdio: &Stdio,
    extra: impl Iterator<Item = RawFd>,
    holder: Option<&OwnedFd>,
) -> Result<()> {
    undumpable();
    let mut keep: Vec<RawFd> = extra.collect();
    keep.push(caller.fd());
    keep.extend(
        [&stdio.stdin, &stdio.stdout, &stdio.stderr]
            .into_iter()
            .flatten()
            .map(AsRawFd::as_raw_fd),
    );
    keep.extend(holder.map(AsRawFd::as_raw_fd));
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        if fd >= from {
            close_range(from, fd - 1);
            from = fd + 1;
        }
    }
    close_range(from, RawFd::MAX);
    // Rust ignores SIGPIPE and an ignored signal stays ignored across execve; so would a blocked one stay blocked.
    // SAFETY: resets dispositions and the mask of this process, which has one thread.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::setsid();
    }
    Ok(())
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: closes descriptors that nothing in this process uses again.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

fn unshare(flags: libc::c_int, what: &'static str) -> Result<()> {
    // SAFETY: plain number; the process has one thread.
    if unsafe { libc::unshare(flags) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).step("make", what)
    }
}

fn set_names(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname().as_ref().filter(|n| !n.is_empty()) {
        rustix::system::sethostname(name.as_bytes()).step("set host name", name)?;
    }
    if let Some(name) = spec.domainname().as_ref().filter(|n| !n.is_empty()) {
        rustix::system::setdomainname(name.as_bytes()).step("set domain name", name)?;
    }
    Ok(())
}

fn loopback_up() -> Result<()> {
    /// `SIOCSIFFLAGS` (netdevice(7)), in the type of this C library's ioctl.
    const SET_FLAGS: libc::Ioctl = 0x8914;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .step("make", "socket")?;
    // SAFETY: an ifreq is plain data; all zeros is one without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    #[allow(
        clippy::cast_possible_truncation,
        reason = "IFF_UP and IFF_RUNNING fit 16 bits"
    )]
    {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    }
    // SAFETY: a whole ifreq.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SET_FLAGS, &raw const request) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).step("bring up", "lo")
    }
}

/// A pseudo terminal of the container's own devpts.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

fn terminal(process: Option<&Process>) -> Result<Option<Terminal>> {
    let Some(process) = process.filter(|p| p.terminal().unwrap_or(false)) else {
        return Ok(None);
    };
    let master = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/pts/ptmx")
        .or_else(|_| {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/ptmx")
        })
        .at("open", "/dev/ptmx")?;
    let master = OwnedFd::from(master);
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK takes a pointer to an int (ioctl_tty(2)).
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK as _, &raw const unlock) } != 0 {
        return Err(std::io::Error::last_os_error()).step("unlock", "terminal");
    }
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    let fd = unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER as _,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).step("open", "terminal");
    }
    // SAFETY: just made, owned by nobody else.
    let slave = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Some(size) = process.console_size().as_ref() {
        let rows = u16::try_from(size.height()).unwrap_or(0);
        let columns = u16::try_from(size.width()).unwrap_or(0);
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: a whole winsize.
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) };
    }
    let user = process.user();
    // SAFETY: an open descriptor; the group is left alone.
    unsafe { libc::fchown(slave.as_raw_fd(), user.uid(), libc::gid_t::MAX) };
    Ok(Some(Terminal { master, slave }))
}

fn dup_to(fd: RawFd, number: RawFd) -> Result<()> {
    // SAFETY: plain numbers. dup2 clears close-on-exec, except onto itself.
    let result = unsafe {
        if fd == number {
            libc::fcntl(fd, libc::F_SETFD, 0)
        } else {
            libc::dup2(fd, number)
        }
    };
    if result >= 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).step("duplicate descriptor to", number)
    }
}

fn stdio(stdio: Stdio, terminal: Option<Terminal>, extra: Vec<(RawFd, OwnedFd)>) -> Result<()> {
    if let Some(Terminal { master, slave }) = terminal {
        drop(master);
        // SAFETY: makes the slave this session's controlling terminal.
        unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY as _, 0) };
        for number in 0..3 {
            dup_to(slave.as_raw_fd(), number)?;
        }
    } else {
        let null = || -> Result<OwnedFd> {
            rustix::fs::open(
                "/dev/null",
                rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .at("open", "/dev/null")
        };
        for (number, fd) in [(0, stdio.stdin), (1, stdio.stdout), (2, stdio.stderr)] {
            match fd {
                Some(fd) => dup_to(fd.as_raw_fd(), number)?,
                // An empty root has no /dev/null; a holder neither reads nor writes.
                None => match null() {
                    Ok(fd) => dup_to(fd.as_raw_fd(), number)?,
                    Err(_) => close_range(number, number),
                },
            }
        }
    }
    // A wanted number may be another's present one: all go out of the way first.
    let highest = extra.iter().map(|(n, _)| *n).max().unwrap_or(2);
    let mut moved = Vec::new();
    for (number, fd) in extra {
        // SAFETY: plain numbers; the result is a new descriptor.
        let high = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, highest + 1) };
        if high < 0 {
            return Err(std::io::Error::last_os_error()).step("duplicate descriptor", number);
        }
        moved.push((number, high));
    }
    for (number, high) in moved {
        dup_to(high, number)?;
        close_range(high, high);
    }
    Ok(())
}

/// From root to the process's user, groups, capabilities and system call filter.
fn become_user(process: &Process, filter: Option<&seccomp::Program>) -> Result<()> {
    if let Some(limits) = process.rlimits() {
        rlimit::apply(limits)?;
    }
    if let Some(label) = process
        .apparmor_profile()
        .as_ref()
        .filter(|l| !l.is_empty())
    {
        apply_label("self/attr/apparmor/exec", &format!("exec {label}"))?;
    }
    if let Some(label) = process.selinux_label().as_ref().filter(|l| !l.is_empty()) {
        apply_label("self/attr/exec", label)?;
    }
    // A keyring of its own: keys are not namespaced (keyrings(7)). Where seccomp forbids keyctl, so it does inside.
    // SAFETY: joins an anonymous session keyring.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            1, /* KEYCTL_JOIN_SESSION_KEYRING */
            std::ptr::null::<libc::c_char>(),
        )
    };
    let user = process.user();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(
        user.umask().unwrap_or(0o022),
    ));
    let privileges_can_grow = !process.no_new_privileges().unwrap_or(false);
    // Without no_new_privs only a capable process may load a filter, and must do so while it is one.
    if privileges_can_grow && let Some(filter) = filter {
        filter.load()?;
    }
    capability::bound(process.capabilities().as_ref())?;
    // SAFETY: keeps the permitted set across the change of user, until it is settled below.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) };
    let groups: Vec<libc::gid_t> = user.additional_gids().clone().unwrap_or_default();
    // A user namespace that maps one group takes that group alone.
    if let Err(error) = set_groups(&groups) {
        let unmapped = matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM));
        if !unmapped || set_groups(&[]).is_err() {
            return Err(error).step("set groups", format!("{groups:?}"));
        }
    }
    change_user(user.uid(), user.gid())?;
    let cwd = process.cwd();
    let enter = || rustix::process::chdir(cwd).at("enter working directory", cwd);
    // First as the user; a directory that only root may enter is entered with the capabilities still held.
    let entered = enter();
    capability::settle(process.capabilities().as_ref())?;
    entered?;
    if !privileges_can_grow {
        // SAFETY: plain numbers.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(std::io::Error::last_os_error()).step("set", "no_new_privs");
        }
        if let Some(filter) = filter {
            filter.load()?;
        }
    }
    Ok(())
}

fn set_groups(groups: &[libc::gid_t]) -> std::io::Result<()> {
    // SAFETY: a slice with its length. The raw call, as below.
    if unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The image, or a volume, may have put something else at `/proc`, or over one of its files: the label would be written to
/// that and mean nothing (CVE-2019-16884).
fn apply_label(path: &str, label: &str) -> Result<()> {
    use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstatfs, openat, openat2};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let proc = openat(CWD, "/proc", flags, Mode::empty()).step("open", "/proc")?;
    if fstatfs(&proc).step("look at", "/proc")?.f_type != PROC_SUPER_MAGIC {
        return Err(Error::spec(
            "process",
            format!("its security label {label} cannot be set: /proc is no proc file system"),
        ));
    }
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = match openat2(&proc, path, flags, Mode::empty(), resolve) {
        // No such module in this kernel: the label means nothing here.
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        other => other.step("open security label", path)?,
    };
    match rustix::io::write(&file, label.as_bytes()) {
        // The same of a module that is there and not in use.
        Err(rustix::io::Errno::INVAL) => Ok(()),
        other => other.map(drop).step("set security label", label),
    }
}

fn c(text: &OsStr) -> Result<CString> {
    CString::new(text.as_bytes())
        .map_err(|_| Error::spec("process", format!("{} has a zero byte", text.display())))
}

fn execute(process: &Process) -> Result<Infallible> {
    let args = process.args().clone().unwrap_or_default();
    let program = args.first().ok_or_else(|| {
        Error::spec(
            "process.args",
            "no program is given: set the container's command",
        )
    })?;
    let env = process.env().clone().unwrap_or_default();
    let argv = args
        .iter()
        .map(|a| c(OsStr::new(a)))
        .collect::<Result<Vec<_>>>()?;
    let mut envp = env
        .iter()
        .map(|e| c(OsStr::new(e)))
        .collect::<Result<Vec<_>>>()?;
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        envp.push(c(OsStr::new(&format!(
            "HOME={}",
            home(Path::new("/etc/passwd"), process.user().uid())
        )))?);
    }
    let path = find(program, &env)?;
    let path_c = c(path.as_os_str())?;
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, envp) = (pointers(&argv), pointers(&envp));
    // SAFETY: null-terminated lists of C strings that outlive the call.
    unsafe { libc::execve(path_c.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = std::io::Error::last_os_error();
    Err(Error::Child(format!(
        "exec: {program:?}: {}: {error}",
        path.display()
    )))
}

/// Looks a program up as execvp(3) would, and says what is wrong in the words people search for.
fn find(program: &str, env: &[String]) -> Result<PathBuf> {
    if program.contains('/') {
        if !Path::new(program).exists() {
            return Err(Error::Child(format!(
                "exec: {program:?}: stat {program}: no such file or directory"
            )));
        }
        return Ok(program.into());
    }
    let path = env
        .iter()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let mut forbidden = None;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(program);
        let Ok(text) = c(candidate.as_os_str()) else {
            continue;
        };
        // SAFETY: a C string.
        if candidate.is_file() {
            // SAFETY: a C string that outlives the call.
            if unsafe { libc::access(text.as_ptr(), libc::X_OK) } == 0 {
                return Ok(candidate);
            }
            forbidden = Some(candidate);
        }
    }
    Err(Error::Child(match forbidden {
        Some(file) => format!("exec: {program:?}: {}: permission denied", file.display()),
        None => format!("exec: {program:?}: executable file not found in $PATH"),
    }))
}

/// The user's home by the image's list of users, which may be anything: a pipe that nobody writes to, a device without an end.
fn home(users: &Path, uid: u32) -> String {
    const MOST: u64 = 1 << 20;
    let read = || -> std::io::Result<Vec<u8>> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(users)?;
        let mut text = Vec::new();
        if file.metadata()?.is_file() {
            file.take(MOST).read_to_end(&mut text)?;
        }
        Ok(text)
    };
    let text = read().unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| {
            let parts: Vec<&str> = line.split(':').collect();
            (parts.get(2)?.parse() == Ok(uid)).then(|| parts.get(5).map(|h| (*h).to_string()))?
        })
        .filter(|h| !h.is_empty() && !h.contains('\0'))
        .unwrap_or_else(|| "/".into())
}

fn execute_holder(program: Option<&OwnedFd>, kind: HolderKind) -> Result<Infallible> {
    let program = program.ok_or_else(|| Error::spec("holder", "no program"))?;
    let (name, last) = (c"holder", c"last");
    let argv = match kind {
        HolderKind::Pod => [name.as_ptr(), std::ptr::null(), std::ptr::null()],
        HolderKind::Descendants => [name.as_ptr(), last.as_ptr(), std::ptr::null()],
    };
    let envp = [std::ptr::null::<libc::c_char>()];
    // What is blocked stays so, and what comes waits. Unblocked, a PID 1 without a handler would lose a SIGTERM that comes before its
    // first instruction.
    // SAFETY: changes the mask of this process, which has one thread.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
    // SAFETY: null-terminated lists; an empty path names the descriptor itself.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(std::io::Error::last_os_error()).step("run", "holder")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pipe_or_a_device_in_place_of_the_users_holds_nobody_up() {
        let image = tempfile::tempdir().unwrap();
        let pipe = image.path().join("passwd");
        let name = c(pipe.as_os_str()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o644) }, 0);
        assert_eq!(home(&pipe, 0), "/");
        assert_eq!(home(Path::new("/dev/zero"), 0), "/");
        assert_eq!(home(image.path(), 0), "/");
        assert_eq!(home(&image.path().join("none"), 0), "/");
    }

    #[test]
    fn a_line_that_is_no_text_hides_no_other() {
        let image = tempfile::tempdir().unwrap();
        let users = image.path().join("passwd");
        std::fs::write(
            &users,
            b"j\xfcrgen:x:7:7::/home/j:\nada:x:8:8:Ada:/home/ada:/bin/sh\n",
        )
        .unwrap();
        assert_eq!(home(&users, 8), "/home/ada");
        assert_eq!(home(&users, 7), "/home/j");
        assert_eq!(home(&users, 9), "/");
    }

    proptest! {
        #[test]
        fn any_list_of_users_yields_a_home(bytes in prop::collection::vec(prop_oneof![Just(b':'), Just(b'\n'), Just(b'7'), any::<u8>()], 0..200)) {
            let image = tempfile::tempdir().unwrap();
            let users = image.path().join("passwd");
            std::fs::write(&users, &bytes).unwrap();
            let home = home(&users, 7);
            prop_assert!(!home.is_empty() && !home.contains(['\0', '\n', ':']));
        }
    }
}
