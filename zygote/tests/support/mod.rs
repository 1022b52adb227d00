//! Containers, zygotes and Functions without Kubernetes: what a node does for the library, in small.
//! Shared by the integration tests and by `examples/fork.rs`. Needs root.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    reason = "support of tests: a failure here is theirs"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "numbers of system calls, all small"
)]
#![allow(missing_docs)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;
use sock_zygote::protocol::{
    self, LeafExtras, LeafSetup, Phase, ZygoteEntry, ZygoteFd, ZygoteSetup,
};
use sock_zygote::{
    Arrived, Confining, EntryFds, Error, Event, ForkOrigin, FunctionRoot, Leaf, SealedSetup,
    SetupFds, Warm, Zygote, ZygoteChannel, inject_sockets,
};

/// The only user of a zygote's user namespace.
pub const USER: u32 = 1_234_567_890;
/// Owns user namespaces that are nested in it.
pub const OWNER: u32 = 2_000_000_000;

/// Where `make extension` puts what a node gets at `/opt/sock`.
pub fn payload() -> PathBuf {
    let path = std::env::var_os("SOCK_PAYLOAD").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/payload/opt/sock"),
        PathBuf::from,
    );
    let extension = path.join("lib/glibc/sock_zygote.abi3.so");
    assert!(
        extension.is_file(),
        "{} is missing: run `make extension`, or set SOCK_PAYLOAD to the directory that becomes /opt/sock",
        extension.display()
    );
    path.canonicalize().unwrap()
}

/// The interpreter to test with: `SOCK_PYTHON`, a path below `/usr`, or the machine's own.
pub fn python() -> String {
    std::env::var("SOCK_PYTHON").unwrap_or_else(|_| "/usr/bin/python3".into())
}

/// A container's root directory in a mount namespace of its own: the machine's programs, sock's files and
/// what the test adds.
pub struct Container {
    pub mounts: OwnedFd,
    dir: tempfile::TempDir,
}

impl Container {
    /// `files` are written below the root; `binds` are directories of the machine, read-only.
    pub fn new(files: &[(&str, &str)], binds: &[(&Path, &str)]) -> Container {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        for name in [
            "proc",
            "sys",
            "dev",
            "tmp",
            "etc",
            "opt",
            "srv",
            "srv/function",
            "usr",
            "var",
        ] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        for (path, text) in files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        for name in ["bin", "lib", "lib64", "sbin"] {
            if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
                symlink(target, root.join(name)).unwrap();
            }
        }
        let payload = payload();
        let mut all: Vec<(PathBuf, PathBuf)> = vec![
            ("/usr".into(), root.join("usr")),
            (payload, root.join("opt/sock")),
        ];
        all.extend(
            binds
                .iter()
                .map(|(from, to)| (from.to_path_buf(), root.join(to.trim_start_matches('/')))),
        );
        for (_, to) in &all {
            fs::create_dir_all(to).unwrap();
        }
        let path = root.clone();
        // A mount namespace is per thread: this one enters it and leaves it by ending.
        let mounts = std::thread::spawn(move || enter_new_root(&path, &all))
            .join()
            .unwrap();
        Container { mounts, dir }
    }

    /// Where this machine has a file of the container that was given to `new`.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside.trim_start_matches('/'))
    }
}

fn enter_new_root(root: &Path, binds: &[(PathBuf, PathBuf)]) -> OwnedFd {
    let namespace = "/proc/thread-self/ns/mnt";
    // SAFETY: this thread alone gets another mount namespace, root and working directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    mount_bind_recursive(root, root).unwrap();
    for (from, to) in binds {
        mount_bind_recursive(from, to).unwrap();
        mount_remount(
            to,
            MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
            c"",
        )
        .unwrap();
    }
    let dev = root.join("dev");
    mount(
        c"tmpfs",
        &dev,
        c"tmpfs",
        MountFlags::NOSUID,
        Some(c"mode=755,size=64k"),
    )
    .unwrap();
    for name in ["null", "zero", "urandom"] {
        fs::write(dev.join(name), "").unwrap();
        mount_bind_recursive(Path::new("/dev").join(name), dev.join(name)).unwrap();
    }
    mount(
        c"proc",
        root.join("proc"),
        c"proc",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        None::<&std::ffi::CStr>,
    )
    .unwrap();
    let namespace = File::open(namespace).unwrap();
    chdir(root).unwrap();
    pivot_root(".", ".").unwrap();
    unmount(".", UnmountFlags::DETACH).unwrap();
    namespace.into()
}

/// A zygote's process with its holder.
pub struct ZygoteProcess {
    /// Outside of the new namespaces, parent of the holder.
    guard: libc::pid_t,
    pub holder: libc::pid_t,
    pub user_namespace: OwnedFd,
    pub control: Option<OwnedFd>,
}

impl ZygoteProcess {
    /// Starts `/opt/sock/python/zygote.py` in `container` by `python`, as [`USER`] in a user namespace that
    /// maps only that user, with the three capabilities that a zygote has there.
    pub fn start(container: &Container, python: &str) -> ZygoteProcess {
        let (ours, theirs) = protocol::pair().unwrap();
        let (told, tell) = rustix::pipe::pipe().unwrap();
        let (wait, go) = rustix::pipe::pipe().unwrap();
        let program = CString::new(python).unwrap();
        let script = CString::new("/opt/sock/python/zygote.py").unwrap();
        let fds = [&container.mounts, &theirs, &tell, &wait].map(|fd| fd.as_raw_fd());
        // SAFETY: the child only makes system calls on memory that was set up before.
        let guard = unsafe { libc::fork() };
        if guard == 0 {
            drop_to_zygote(fds, go.as_raw_fd(), &program, &script);
        }
        assert!(guard > 0, "fork");
        drop(theirs);
        drop(tell);
        let mut pipe = File::from(told);
        let mut word = [0u8; 4];
        pipe.read_exact(&mut word)
            .unwrap_or_else(|_| panic!("the namespaces of a zygote could not be made"));
        let users = format!("{USER} {USER} 1\n{OWNER} {OWNER} 1\n");
        for (map, ids) in [("uid_map", users), ("gid_map", format!("{USER} {USER} 1"))] {
            fs::write(format!("/proc/{guard}/{map}"), ids).unwrap();
        }
        let user_namespace = File::open(format!("/proc/{guard}/ns/user")).unwrap().into();
        File::from(go).write_all(b"!").unwrap();
        pipe.read_exact(&mut word)
            .unwrap_or_else(|_| panic!("the holder could not be forked"));
        ZygoteProcess {
            guard,
            holder: i32::from_ne_bytes(word),
            user_namespace,
            control: Some(ours),
        }
    }

    /// The zygote's own number.
    pub fn pid(&self) -> i32 {
        children(self.holder).into_iter().next().unwrap()
    }

    pub fn kill(&self) {
        // SAFETY: takes numbers only.
        unsafe { libc::kill(self.pid(), libc::SIGKILL) };
    }
}

impl Drop for ZygoteProcess {
    fn drop(&mut self) {
        // SAFETY: takes numbers only; both are children of ours and not reaped before.
        unsafe {
            // All that is below the holder goes with it.
            libc::kill(self.holder, libc::SIGKILL);
            libc::waitpid(self.guard, std::ptr::null_mut(), 0);
        }
    }
}

pub fn children(pid: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace()
        .filter_map(|p| p.parse().ok())
        .collect()
}

fn check(result: libc::c_int, step: &str) {
    if result < 0 {
        let text = step.as_bytes();
        // SAFETY: writes a string that lives; ends the process.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::write(2, b": refused\n".as_ptr().cast(), 10);
            libc::_exit(1)
        }
    }
}

/// The guard: enters the container, makes the namespaces, forks the holder, waits for its end.
fn drop_to_zygote(
    [mounts, control, tell, wait]: [RawFd; 4],
    go: RawFd,
    program: &CString,
    script: &CString,
) -> ! {
    // SAFETY: system calls on numbers and on memory that lives.
    unsafe {
        libc::close(go);
        check(libc::setns(mounts, libc::CLONE_NEWNS), "setns");
        let kinds = libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS;
        check(libc::unshare(kinds), "unshare");
        let mut word = [0u8; 4];
        libc::write(tell, word.as_ptr().cast(), 4);
        libc::read(wait, word.as_mut_ptr().cast(), 1);
        // The raw calls: the C library's would look for other threads.
        check(libc::syscall(libc::SYS_setgroups, 0, 0) as i32, "setgroups");
        check(
            libc::syscall(libc::SYS_setresgid, USER, USER, USER) as i32,
            "setresgid",
        );
        check(
            libc::syscall(libc::SYS_setresuid, USER, USER, USER) as i32,
            "setresuid",
        );
        let holder = libc::fork();
        check(holder, "fork");
        if holder > 0 {
            libc::write(tell, holder.to_ne_bytes().as_ptr().cast(), 4);
            close_from(3);
            libc::waitpid(holder, std::ptr::null_mut(), 0);
            libc::_exit(0);
        }
        let zygote = libc::fork();
        check(zygote, "fork");
        if zygote > 0 {
            close_from(0);
            while libc::waitpid(-1, std::ptr::null_mut(), 0) > 0
                || *libc::__errno_location() == libc::EINTR
            {}
            libc::_exit(0);
        }
        check(libc::unshare(libc::CLONE_NEWNS), "unshare mounts");
        let proc = c"proc".as_ptr();
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        check(
            libc::mount(proc, c"/proc".as_ptr(), proc, flags, std::ptr::null()),
            "mount /proc",
        );
        keep_three_capabilities();
        check(libc::chdir(c"/".as_ptr()), "chdir");
        check(libc::dup2(control, 3), "dup2");
        close_from(4);
        let argv = [program.as_ptr(), script.as_ptr(), std::ptr::null()];
        let envp = [
            c"SOCK_CONTROL_FD=3".as_ptr(),
            c"PATH=/usr/bin:/bin".as_ptr(),
            c"LANG=C.UTF-8".as_ptr(),
            std::ptr::null(),
        ];
        libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
        check(-1, "exec");
        libc::_exit(1)
    }
}

unsafe fn close_from(first: libc::c_uint) {
    // SAFETY: closes numbers.
    unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
}

/// CAP_SETPCAP, CAP_SYS_CHROOT and CAP_SYS_ADMIN across execve(2), nothing else.
unsafe fn keep_three_capabilities() {
    const THREE: [libc::c_int; 3] = [8, 18, 21];
    // SAFETY: system calls on numbers and on local memory.
    unsafe {
        for capability in (0..64).filter(|c| !THREE.contains(c)) {
            libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
        let bits = THREE.iter().fold(0u32, |bits, c| bits | 1 << c);
        let header = [0x2008_0522u32, 0];
        let data = [bits, bits, bits, 0, 0, 0];
        check(
            libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) as i32,
            "capset",
        );
        for capability in THREE {
            check(
                libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    libc::PR_CAP_AMBIENT_RAISE,
                    capability,
                    0,
                    0,
                ),
                "ambient",
            );
        }
    }
}

/// A cgroup: of version 1's freezer where that is mounted, else of the unified hierarchy.
pub struct Cgroup(pub PathBuf);

impl Cgroup {
    pub fn new() -> Cgroup {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let find = |wanted: &dyn Fn(&[&str]) -> bool| {
            let fields = mounts
                .lines()
                .map(|line| line.split(' ').collect::<Vec<_>>());
            fields
                .into_iter()
                .find(|f| f.len() > 3 && wanted(f))
                .map(|f| f[1].to_owned())
        };
        let mount = find(&|f| f[2] == "cgroup" && f[3].split(',').any(|o| o == "freezer"))
            .or_else(|| find(&|f| f[2] == "cgroup2"))
            .expect("a mounted cgroup hierarchy");
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = Path::new(&mount).join(format!("sock-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    pub fn procs(&self) -> OwnedFd {
        let tasks = self.0.join("tasks");
        let path = if tasks.exists() {
            tasks
        } else {
            self.0.join("cgroup.procs")
        };
        File::options().write(true).open(path).unwrap().into()
    }

    pub fn members(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..500 {
            for pid in self.members() {
                // SAFETY: takes numbers only.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        eprintln!("{} could not be removed", self.0.display());
    }
}

/// A runtime on this thread, which gets a working directory and a network namespace of its own, as a shim
/// has: `clone_tree` needs the one, injected sockets belong to the other.
pub fn shim<F: Future>(work: F) -> F::Output {
    // SAFETY: affects this thread alone, which holds no socket yet.
    unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNET) }.unwrap();
    loopback_up();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(120), work)
            .await
            .expect("the test hangs")
    })
}

fn loopback_up() {
    let socket = TcpOrUdp::udp();
    // SAFETY: plain data; SIOCSIFFLAGS (netdevice(7)) reads a whole ifreq.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as _;
        request.ifr_name[1] = b'o' as _;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as _;
        assert_eq!(
            libc::ioctl(socket.as_raw_fd(), 0x8914, &raw const request),
            0
        );
    }
}

struct TcpOrUdp;

impl TcpOrUdp {
    fn udp() -> OwnedFd {
        std::net::UdpSocket::bind("127.0.0.1:0")
            .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))
            .unwrap()
            .into()
    }
}

/// A zygote that is warm, with a channel to ask it.
pub struct Pool {
    pub process: ZygoteProcess,
    pub zygote: Zygote,
    pub warm: Warm,
    pub channel: ZygoteChannel,
    /// The zygote's root: its files go with it.
    pub image: Container,
}

pub fn zygote_setup(imports: &[&str]) -> ZygoteSetup {
    ZygoteSetup {
        imports: imports.iter().map(|&m| m.to_owned()).collect(),
        path: vec!["/opt/sock/site-packages".into()],
        spares: 0,
        accepted_threads: vec![],
        warm_up: String::new(),
    }
}

impl Pool {
    pub async fn start(container: Container, setup: &ZygoteSetup) -> Result<Pool, Error> {
        Pool::with_python(container, setup, &python()).await
    }

    pub async fn with_python(
        container: Container,
        setup: &ZygoteSetup,
        python: &str,
    ) -> Result<Pool, Error> {
        let mut process = ZygoteProcess::start(&container, python);
        let (zygote, warm) = Zygote::configure(process.control.take().unwrap(), setup).await?;
        let channel = ZygoteChannel::new(zygote.attach()?)?;
        Ok(Pool {
            process,
            zygote,
            warm,
            channel,
            image: container,
        })
    }
}

/// Namespaces nested in those of a zygote, with the root of a container.
pub struct Nested {
    guard: libc::pid_t,
    namespaces: Vec<(ZygoteFd, OwnedFd)>,
}

impl Nested {
    /// `user` and `pids` are those of the outer zygote.
    pub fn new(user: BorrowedFd<'_>, pids: BorrowedFd<'_>, container: &Container) -> Nested {
        let (told, tell) = rustix::pipe::pipe().unwrap();
        let fds = [
            container.mounts.as_raw_fd(),
            user.as_raw_fd(),
            pids.as_raw_fd(),
            tell.as_raw_fd(),
        ];
        // SAFETY: the child only makes system calls on memory that was set up before.
        let guard = unsafe { libc::fork() };
        if guard == 0 {
            nest(fds);
        }
        assert!(guard > 0, "fork");
        drop(tell);
        let mut word = [0u8; 1];
        File::from(told)
            .read_exact(&mut word)
            .unwrap_or_else(|_| panic!("nested namespaces could not be made"));
        let maker = children(guard)[0];
        let holder = children(maker)[0];
        let open = |kind| {
            File::open(format!("/proc/{holder}/ns/{kind}"))
                .unwrap()
                .into()
        };
        let namespaces = [
            (ZygoteFd::Pid, "pid"),
            (ZygoteFd::User, "user"),
            (ZygoteFd::Mount, "mnt"),
            (ZygoteFd::Network, "net"),
            (ZygoteFd::Ipc, "ipc"),
            (ZygoteFd::Uts, "uts"),
        ]
        .map(|(kind, name)| (kind, open(name)));
        Nested {
            guard,
            namespaces: namespaces.into(),
        }
    }

    pub fn user(&self) -> BorrowedFd<'_> {
        self.namespaces[1].1.as_fd()
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let maker = children(self.guard);
        let holder = maker.iter().flat_map(|maker| children(*maker));
        // SAFETY: takes numbers only; descendants of ours whose parents wait for them.
        unsafe {
            for pid in holder {
                libc::kill(pid, libc::SIGKILL);
            }
            libc::waitpid(self.guard, std::ptr::null_mut(), 0);
        }
    }
}

/// The guard writes the user mapping, the maker makes the namespaces, the holder is PID 1 in them.
fn nest([mounts, user, pids, tell]: [RawFd; 4]) -> ! {
    // SAFETY: system calls on numbers and on memory that lives; the process has one thread.
    unsafe {
        let mut to_guard = [0; 2];
        let mut to_maker = [0; 2];
        check(libc::pipe(to_guard.as_mut_ptr()), "pipe");
        check(libc::pipe(to_maker.as_mut_ptr()), "pipe");
        check(libc::syscall(libc::SYS_setgroups, 0, 0) as i32, "setgroups");
        check(libc::setns(mounts, libc::CLONE_NEWNS), "setns mounts");
        check(libc::setns(pids, libc::CLONE_NEWPID), "setns pids");
        let maker = libc::fork();
        check(maker, "fork");
        let mut word = [0u8; 1];
        if maker > 0 {
            libc::read(to_guard[0], word.as_mut_ptr().cast(), 1);
            check(libc::setns(user, libc::CLONE_NEWUSER), "setns user");
            let users = format!("{USER} {USER} 1\n{OWNER} {OWNER} 1\n");
            for (map, ids) in [("uid_map", users), ("gid_map", format!("{USER} {USER} 1"))] {
                check(
                    fs::write(format!("/proc/{maker}/{map}"), ids).map_or(-1, |()| 0),
                    map,
                );
            }
            libc::write(to_maker[1], word.as_ptr().cast(), 1);
            close_from(3);
            libc::waitpid(maker, std::ptr::null_mut(), 0);
            libc::_exit(0);
        }
        check(libc::setns(user, libc::CLONE_NEWUSER), "setns user");
        for (call, id) in [(libc::SYS_setresgid, USER), (libc::SYS_setresuid, OWNER)] {
            check(libc::syscall(call, id, id, id) as i32, "owner");
        }
        let kinds = libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS;
        check(libc::unshare(kinds), "unshare");
        libc::write(to_guard[1], word.as_ptr().cast(), 1);
        libc::read(to_maker[0], word.as_mut_ptr().cast(), 1);
        check(
            libc::syscall(libc::SYS_setresuid, USER, USER, USER) as i32,
            "setresuid",
        );
        let holder = libc::fork();
        check(holder, "fork");
        if holder > 0 {
            close_from(3);
            libc::waitpid(holder, std::ptr::null_mut(), 0);
            libc::_exit(0);
        }
        let proc = c"proc".as_ptr();
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        check(
            libc::mount(proc, c"/proc".as_ptr(), proc, flags, std::ptr::null()),
            "mount /proc",
        );
        libc::write(tell, word.as_ptr().cast(), 1);
        close_from(0);
        loop {
            if libc::waitpid(-1, std::ptr::null_mut(), 0) < 0 {
                libc::usleep(10_000);
            }
        }
    }
}

/// A zygote that was forked from another.
pub struct Child {
    pub zygote: Zygote,
    pub warm: Warm,
    pub channel: ZygoteChannel,
    pub pidfd: OwnedFd,
    pub cgroup: Cgroup,
    pub nested: Nested,
    pub image: Container,
}

impl Child {
    /// From one that is asked on `channel`, and whose user namespace is `user`.
    pub async fn of(
        channel: &ZygoteChannel,
        user: BorrowedFd<'_>,
        image: Container,
        setup: &ZygoteSetup,
    ) -> Result<Child, Error> {
        let newborn = channel.fork_zygote().await?;
        let (user, pids) = newborn.namespaces(user)?;
        let nested = Nested::new(user.as_fd(), pids.as_fd(), &image);
        let cgroup = Cgroup::new();
        let entry = SealedSetup::of_zygote(&ZygoteEntry {
            env: vec![("LANG".into(), "C.UTF-8".into())],
        })?;
        let procs = cgroup.procs();
        let stderr = std::io::stderr();
        let fds = EntryFds {
            namespaces: nested
                .namespaces
                .iter()
                .map(|(kind, fd)| (*kind, fd.as_fd()))
                .collect(),
            cgroups: vec![procs.as_fd()],
            stdout: stderr.as_fd(),
            stderr: stderr.as_fd(),
        };
        let entering = newborn.enter(&entry, &fds)?;
        let (control, pidfd, _) = entering.entered(&cgroup.0, None).await?;
        let (zygote, warm) = Zygote::configure_over(control, setup).await?;
        let channel = ZygoteChannel::new(zygote.attach()?)?;
        Ok(Child {
            zygote,
            warm,
            channel,
            pidfd,
            cgroup,
            nested,
            image,
        })
    }

    pub fn function(&self, source: &str) -> Function {
        let container = Container::new(&[("/srv/function/app.py", source)], &[]);
        Function::of_zygote(self.nested.user(), container)
    }
}

/// A Function pod.
pub struct Function {
    pub container: Container,
    pub root: FunctionRoot,
    pub cgroup: Cgroup,
    pub setup: LeafSetup,
    pub extras: LeafExtras,
    pub network: String,
}

pub fn leaf_setup() -> LeafSetup {
    LeafSetup {
        handler: "app.handler".into(),
        path: vec!["/srv/function".into(), "/opt/sock/site-packages".into()],
        env: vec![
            ("GREETING".into(), "hello".into()),
            ("HOME".into(), "/tmp".into()),
            ("LANG".into(), "C.UTF-8".into()),
        ],
        cwd: "/srv/function".into(),
        hostname: "pod-7".into(),
        function: "fun".into(),
        namespace: "team".into(),
        pod: "pod-7".into(),
        uid: USER,
        gid: USER,
        masked_paths: [
            "/proc/kcore",
            "/proc/keys",
            "/proc/timer_list",
            "/proc/acpi",
            "/proc/scsi",
            "/sys/firmware",
        ]
        .map(Into::into)
        .into(),
        readonly_paths: [
            "/proc/bus",
            "/proc/fs",
            "/proc/irq",
            "/proc/sys",
            "/proc/sysrq-trigger",
        ]
        .map(Into::into)
        .into(),
        rlimits: vec![],
        seccomp: vec![],
        intercept_sockets: true,
        single_request: false,
        park_after_ms: 50,
        max_body: 1024 * 1024,
        threads: 0,
        timeout_seconds: 30,
    }
}

/// A leaf with what a shim holds for it.
pub struct Running {
    pub leaf: Leaf,
    pub phases: Vec<Phase>,
    pub origin: Option<ForkOrigin>,
    pub import_micros: u64,
    pub compiled: Option<Vec<u8>>,
    pub times: Times,
}

/// Milestones on the way to a leaf.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub start: Instant,
    pub tree: Instant,
    pub hello: Instant,
    pub confined: Instant,
    pub ready: Instant,
}

impl Function {
    pub fn new(pool: &Pool, source: &str, binds: &[(&Path, &str)]) -> Function {
        Function::in_container(
            pool,
            Container::new(&[("/srv/function/app.py", source)], binds),
        )
    }

    pub fn in_container(pool: &Pool, container: Container) -> Function {
        Function::of_zygote(pool.process.user_namespace.as_fd(), container)
    }

    /// For leaves of the zygote that this user namespace is of.
    pub fn of_zygote(user_namespace: BorrowedFd<'_>, container: Container) -> Function {
        let root = FunctionRoot::prepare(container.mounts.as_fd(), user_namespace).unwrap();
        let network = fs::read_link("/proc/thread-self/ns/net")
            .unwrap()
            .display()
            .to_string();
        Function {
            container,
            root,
            cgroup: Cgroup::new(),
            setup: leaf_setup(),
            extras: LeafExtras::default(),
            network,
        }
    }

    /// Forks and hands `connection` over behind the setup.
    pub async fn leaf(
        &self,
        channel: &ZygoteChannel,
        fresh: bool,
        connection: Option<(u64, BorrowedFd<'_>)>,
    ) -> Result<Running, Error> {
        let start = Instant::now();
        let setup = SealedSetup::new(&self.setup, &self.extras)?;
        let tree = self.root.clone_tree()?;
        let cloned = Instant::now();
        let (arrived, origin) = channel.fork(fresh).await?;
        let hello = Instant::now();
        let confining = self.confine(arrived, &setup, &tree)?;
        drop(tree);
        if let Some((conn, fd)) = connection {
            confining.queue(conn, fd)?;
        }
        let (loading, phases, listener) = confining.confined(Some(&self.cgroup.0), None).await?;
        let confined = Instant::now();
        if let Some(listener) = listener {
            tokio::task::spawn_local(async move {
                if let Err(error) = inject_sockets(listener, USER, USER).await {
                    eprintln!("injection: {error}");
                }
            });
        }
        let (leaf, import_micros, compiled) = loading.ready(self.extras.keep_compiled).await?;
        let times = Times {
            start,
            tree: cloned,
            hello,
            confined,
            ready: Instant::now(),
        };
        Ok(Running {
            leaf,
            phases,
            origin,
            import_micros,
            compiled,
            times,
        })
    }

    fn confine(
        &self,
        arrived: Arrived,
        setup: &SealedSetup,
        tree: &OwnedFd,
    ) -> Result<Confining, Error> {
        let procs = self.cgroup.procs();
        let stderr = std::io::stderr();
        let fds = SetupFds {
            root: Some(tree.as_fd()),
            network: Some(self.root.network()),
            cgroups: vec![procs.as_fd()],
            stdout: Some(stderr.as_fd()),
            stderr: Some(stderr.as_fd()),
        };
        arrived.setup(setup, &fds)
    }
}

/// A connected pair over loopback: the client's end, and the accepted one.
pub fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let (served, _) = listener.accept().unwrap();
    served.set_nodelay(true).unwrap();
    (client, served)
}

/// What a client reads: status, head and body.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Of a header given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(": "));
        fields
            .filter(|(field, _)| field.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
            .next()
    }
}

pub fn reply(client: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        let mut one = [0u8];
        assert_eq!(
            client.read(&mut one).unwrap(),
            1,
            "the connection ended within a head: {:?}",
            String::from_utf8_lossy(&bytes)
        );
        bytes.push(one[0]);
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length:")
                .map(|v| v.trim().parse().unwrap())
        })
        .unwrap_or(0);
    let mut body = vec![0u8; length];
    client.read_exact(&mut body).unwrap();
    Reply { status, head, body }
}

/// What a leaf answers.
pub async fn answer(leaf: &Running) -> Value {
    let (mut client, served) = connection();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    leaf.leaf.serve(1, served.as_fd()).unwrap();
    until(&leaf.leaf, |e| matches!(e, Event::Done { .. })).await;
    let reply = reply(&mut client);
    assert_eq!(reply.status, 200, "{}", reply.text());
    serde_json::from_slice(&reply.body).unwrap()
}

/// A zygote's root with a package of one file.
pub fn image(name: &str, source: &str) -> Container {
    Container::new(&[(&format!("/packages/{name}.py"), source)], &[])
}

/// To import these, some of which are of the container.
pub fn packaged(imports: &[&str]) -> ZygoteSetup {
    let mut setup = zygote_setup(imports);
    setup.path = vec!["/packages".into()];
    setup
}

/// The next events until one fits.
pub async fn until(leaf: &Leaf, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut seen = Vec::new();
    loop {
        let event = leaf
            .event()
            .await
            .unwrap_or_else(|e| panic!("{e} after {seen:?}"));
        seen.push(event);
        if wanted(&event) {
            return seen;
        }
    }
}

/// For tests that look at modes.
pub fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}
