//! Starting the first process of a container, and further ones inside it.
//!
//! ```text
//! caller                         child
//!   clone3 ───────────────────▶  waits
//!   cgroup, user mapping
//!   proceed() ────────────────▶  enters its cgroup, joins namespaces, builds the root
//!            ◀──────────────── Created (with the terminal, if any)
//!   start()  ────────────────▶  limits, user, capabilities, seccomp, execve
//!            ◀──────────────── end of channel: the program runs; or Failed
//! ```

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxNamespaceType as Type, LinuxSeccomp, Process, Spec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::error::Step;
use crate::holder::HolderKind;
use crate::hook::Identity;
use crate::init;
use crate::namespace::{self, Wanted};
use crate::root::Root;
use crate::timeline::{self, Timed, Timeline};
use crate::users::{Maps, Users};
use crate::{Error, Result};

/// What the first process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// `process.args` of the specification.
    Specified,
    /// The holder: the container is there, with nothing running in it.
    Holder(HolderKind),
}

/// Descriptors 0, 1 and 2 of a process. `None` is `/dev/null`.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// Descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// Descriptor 2.
    pub stderr: Option<OwnedFd>,
}

/// Users and one group of a new user namespace, the same inside and outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserMapping {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Another user, as whom nobody runs: user namespaces nested in this one will belong to it. Whoever owns a user
    /// namespace has every capability there (user_namespaces(7)), also without one at home.
    pub owner: Option<u32>,
}

/// Namespaces in which others are to be nested.
#[derive(Debug)]
pub struct Outer {
    /// The user namespace, whose [`UserMapping::owner`] is this. It maps what is to be mapped in the new one.
    pub owner: u32,
    /// Itself.
    pub user: OwnedFd,
    /// The PID namespace, which belongs to it.
    pub pid: OwnedFd,
}

/// The first process of a container.
#[derive(Debug)]
pub struct Plan<'a> {
    /// What to make.
    pub spec: &'a Spec,
    /// Root file system.
    pub root: Root,
    /// What to run.
    pub program: Program,
    /// Ignored when the specification wants a terminal.
    pub stdio: Stdio,
    /// Further descriptors: the number each gets in the program.
    pub extra: Vec<(RawFd, OwnedFd)>,
    /// Mapping of a user namespace that is to be made.
    pub mapping: Option<UserMapping>,
    /// Where that and a new PID namespace are nested, if not in the caller's. The process is no child of the caller's then.
    pub outer: Option<Outer>,
    /// Device files of the image are none. For containers whose cgroup does not control which devices may be opened.
    pub nodev_root: bool,
    /// What the specification's hooks are told. Without it none are run.
    pub identity: Option<Identity>,
    /// On cgroup version 1: the container's directories, to be shown at the specification's cgroup mount.
    pub cgroups: Vec<(String, PathBuf)>,
}

/// A further process of a container.
#[derive(Debug)]
pub struct ExecPlan<'a> {
    /// Any process of the container.
    pub target: i32,
    /// What to run.
    pub process: &'a Process,
    /// What the container says for all of its processes.
    pub linux: Option<&'a Linux>,
    /// The container's profile, if its processes have one.
    pub seccomp: Option<&'a LinuxSeccomp>,
    /// Ignored with a terminal.
    pub stdio: Stdio,
    /// Further descriptors.
    pub extra: Vec<(RawFd, OwnedFd)>,
}

/// Users of a container's user namespace, and what its mounts need for that.
pub(crate) struct Mapped {
    /// `None` where it has the host's.
    pub users: Option<Users>,
    pub maps: Maps,
}

/// News from a child.
#[derive(Debug)]
pub enum Progress {
    /// Everything is mounted, and the hooks that want to see that are to be run. It waits for [`Launched::proceed`].
    Mounted,
    /// Everything is made.
    Created(Made),
    /// The program runs.
    Started,
    /// It did not get there, and is gone.
    Failed(Error),
}

/// What a child has made.
#[derive(Debug)]
pub struct Made {
    /// The master side of the terminal, if one is wanted.
    pub terminal: Option<OwnedFd>,
    /// The steps of making it.
    pub steps: Vec<Timed>,
}

/// A child on its way to its program. Dropping it before [`Launched::start`] ends the child.
#[derive(Debug)]
pub struct Launched {
    /// Its process number here.
    pub pid: i32,
    /// For waiting and for signals without the risk of a reused number.
    pub pidfd: OwnedFd,
    channel: OwnedFd,
}

impl Launched {
    /// Lets it build its namespaces and root, or go on after [`Progress::Mounted`].
    ///
    /// # Errors
    /// It is gone.
    pub fn proceed(&self) -> Result<()> {
        self.tell(b"go", &[])
    }

    /// [`Launched::proceed`], once it has moved itself into a cgroup by these
    /// ([`crate::cgroup::Cgroup::entrances`], at most [`MOST_ENTRANCES`]).
    ///
    /// # Errors
    /// It is gone.
    pub fn proceed_in(&self, entrances: &[OwnedFd]) -> Result<()> {
        let entrances: Vec<BorrowedFd<'_>> = entrances.iter().map(AsFd::as_fd).collect();
        self.tell(b"go", &entrances)
    }

    /// Lets it run its program.
    ///
    /// # Errors
    /// It is gone.
    pub fn start(&self) -> Result<()> {
        self.tell(b"start", &[])
    }

    fn tell(&self, word: &[u8], entrances: &[BorrowedFd<'_>]) -> Result<()> {
        say(&self.channel, word, entrances).step("tell child", self.pid)
    }

    /// Becomes readable when [`Launched::progress`] has news.
    #[must_use]
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Waits for news. With a non-blocking channel the error is `EAGAIN` while there is none.
    ///
    /// # Errors
    /// The channel broke.
    pub fn progress(&self) -> Result<Progress> {
        let mut bytes = [0u8; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.channel,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )
        .step("hear child", self.pid)?;
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let text = String::from_utf8_lossy(&bytes[..got.bytes]);
        Ok(match &*text {
            "" => Progress::Started,
            "mounted" => Progress::Mounted,
            other => match other.strip_prefix(CREATED) {
                Some(steps) => Progress::Created(Made {
                    terminal: fd,
                    steps: timeline::parse(steps),
                }),
                None => Progress::Failed(Error::Child(other.to_string())),
            },
        })
    }

    /// [`Launched::progress`], waiting with poll(2).
    ///
    /// # Errors
    /// The channel broke.
    pub fn wait_progress(&self) -> Result<Progress> {
        loop {
            let mut fds = [rustix::event::PollFd::new(
                &self.channel,
                rustix::event::PollFlags::IN,
            )];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => return self.progress(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e).step("wait for child", self.pid),
            }
        }
    }
}

/// How the word begins that everything is made; what each step took follows.
const CREATED: &str = "created\n";

/// The child's end.
pub(crate) struct Caller {
    channel: OwnedFd,
    /// Since it was asked for.
    pub timeline: Timeline,
}

impl Caller {
    pub(crate) fn fd(&self) -> RawFd {
        self.channel.as_raw_fd()
    }
    pub(crate) fn created(&self, terminal: Option<BorrowedFd<'_>>) -> Result<()> {
        let fds: Vec<BorrowedFd<'_>> = terminal.into_iter().collect();
        let text = format!("{CREATED}{}", self.timeline.text());
        say(&self.channel, text.as_bytes(), &fds).step("tell", "caller")
    }
    pub(crate) fn mounted(&self) -> Result<()> {
        say(&self.channel, b"mounted", &[]).step("tell", "caller")
    }
    pub(crate) fn failed(&self, error: &Error) {
        let text = error.to_string();
        let most = text.len().min(8000);
        let _ = rustix::net::send(&self.channel, &text.as_bytes()[..most], SendFlags::NOSIGNAL);
    }
    /// Waits for the next word, and enters the cgroup that comes with it. A caller that is gone is an order to end.
    pub(crate) fn hear(&self) -> Result<()> {
        let mut word = [0u8; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_ENTRANCES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let heard = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.channel,
                &mut [IoSliceMut::new(&mut word)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        });
        match heard {
            Ok(heard) if heard.bytes > 0 => {}
            _ => init::leave(1),
        }
        self.timeline.passed("waiting for the shim");
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(entrances) = part {
                for entrance in entrances {
                    rustix::io::write(&entrance, b"0").step("enter", "cgroup")?;
                }
                self.timeline.passed("into its cgroup");
            }
        }
        Ok(())
    }
}

/// As many hierarchies as version 1 can have: one for each controller, and some with names only.
pub const MOST_ENTRANCES: usize = 32;

/// Sends a word, with descriptors.
fn say(channel: &OwnedFd, word: &[u8], fds: &[BorrowedFd<'_>]) -> std::result::Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_ENTRANCES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(
        channel,
        &[IoSlice::new(word)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .map(drop)
}

/// `struct clone_args` of linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

enum Side {
    Parent(i32),
    Child,
}

/// fork(2) with namespaces.
fn clone(namespaces: libc::c_int, sibling: bool) -> Result<Side> {
    let mut args = CloneArgs {
        flags: u64::from(namespaces.unsigned_abs()),
        ..CloneArgs::default()
    };
    if sibling {
        args.flags |= u64::from(libc::CLONE_PARENT.unsigned_abs());
    } else {
        args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    }
    // SAFETY: a fork: no shared memory, no new stack. The child goes on with a copy of this one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        0 => Ok(Side::Child),
        p if p > 0 => Ok(Side::Parent(i32::try_from(p).unwrap_or(i32::MAX))),
        _ => Err(std::io::Error::last_os_error()).step("clone", format!("{namespaces:#x}")),
    }
}

fn pidfd(pid: i32) -> Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).step("open process", pid);
    }
    // SAFETY: just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) })
}

/// Where a child is born.
enum Birthplace {
    Here,
    /// By way of a middle process: joining affects only children (pid_namespaces(7)).
    PidNamespace(OwnedFd),
    /// With namespaces of its own nested in others, by way of two: a PID namespace is nested in the one that its maker was
    /// born into (`copy_pid_ns`, kernel/pid_namespace.c). The owner's
    /// group has to be mapped in the outer user namespace too. The child is no child of the caller: PID 1 of the outer PID
    /// namespace gets and reaps it, so that one that waits for its last descendant waits for this one.
    Nested {
        outer: Outer,
        group: u32,
    },
}

/// Forks a child that runs `work` and never returns.
fn fork_child(
    namespaces: libc::c_int,
    birthplace: Birthplace,
    work: impl FnOnce(&Caller) -> Result<std::convert::Infallible>,
) -> Result<Launched> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .step("make", "channel")?;
    let caller = Caller {
        channel: theirs,
        timeline: Timeline::default(),
    };
    let run = |caller: Caller| -> ! {
        match work(&caller) {
            Ok(never) => match never {},
            Err(e) => caller.failed(&e),
        }
        init::leave(1)
    };
    let (outer, pid_namespace) = match birthplace {
        Birthplace::Here => {
            return match clone(namespaces, false)? {
                Side::Child => run(caller),
                Side::Parent(pid) => Ok(Launched {
                    pid,
                    pidfd: pidfd(pid)?,
                    channel: ours,
                }),
            };
        }
        Birthplace::PidNamespace(pids) => (None, pids),
        Birthplace::Nested { outer, group } => (Some((outer.user, outer.owner, group)), outer.pid),
    };
    let (told, tell) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .step("make", "channel")?;
    // What is said on it comes from a copy of this process, in whatever namespaces that is: numbers are translated.
    rustix::net::sockopt::set_socket_passcred(&told, true).step("ask for", "credentials")?;
    let middle = || -> Result<Side> {
        namespace::join(&pid_namespace, Type::Pid)?;
        let Some((user, owner, group)) = &outer else {
            return clone(namespaces, true);
        };
        match clone(0, true)? {
            Side::Parent(pid) => Ok(Side::Parent(pid)),
            Side::Child => {
                say_who(&tell)?;
                init::undumpable();
                init::no_groups()?;
                namespace::join(user, Type::User)?;
                init::change_user(*owner, *group)?;
                match clone(namespaces, false)? {
                    Side::Child => Ok(Side::Child),
                    Side::Parent(_) => init::leave(0),
                }
            }
        }
    };
    match clone(0, false)? {
        Side::Child => {
            init::undumpable();
            match middle() {
                Ok(Side::Child) => match say_who(&tell) {
                    Ok(()) => {
                        drop(tell);
                        run(caller)
                    }
                    Err(_) => init::leave(1),
                },
                Ok(Side::Parent(_)) => init::leave(0),
                Err(e) => {
                    caller.failed(&e);
                    init::leave(1)
                }
            }
        }
        Side::Parent(middle) => {
            drop((tell, caller));
            // Whoever is in the outer PID namespace may stop what passes through it, so nothing is waited for without an end.
            let end = |pid| {
                // SAFETY: a child of this process that is not reaped yet, and has nothing left to do.
                unsafe {
                    libc::kill(pid, libc::SIGKILL);
                    libc::waitpid(pid, std::ptr::null_mut(), 0);
                }
            };
            let second = outer.is_some().then(|| hear_who(&told)).flatten();
            let child = match (&outer, second) {
                (Some(_), None) => None,
                _ => hear_who(&told),
            };
            [Some(middle), second].into_iter().flatten().for_each(end);
            let Some(pid) = child else {
                let gone = Launched {
                    pid: middle,
                    pidfd: ours.try_clone().step("duplicate", "channel")?,
                    channel: ours,
                };
                return Err(match gone.progress() {
                    Ok(Progress::Failed(e)) => e,
                    _ => Error::Child("the middle process ended early, or was stopped".into()),
                });
            };
            Ok(Launched {
                pid,
                pidfd: pidfd(pid)?,
                channel: ours,
            })
        }
    }
}

/// The kernel adds the number.
fn say_who(tell: &OwnedFd) -> Result<()> {
    rustix::net::send(tell, b"!", SendFlags::NOSIGNAL)
        .step("tell", "caller")
        .map(drop)
}

/// A process that was not stopped on its way says its word within microseconds.
const SAID_WITHIN: rustix::event::Timespec = rustix::event::Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// The number of the next process that says a word, here; `None` when none does.
fn hear_who(told: &OwnedFd) -> Option<i32> {
    use rustix::event::{PollFd, PollFlags, poll};
    let ready = rustix::io::retry_on_intr(|| {
        poll(&mut [PollFd::new(told, PollFlags::IN)], Some(&SAID_WITHIN))
    });
    if !ready.is_ok_and(|ready| ready > 0) {
        return None;
    }
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        recvmsg(
            told,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::empty(),
        )
    });
    if got.is_ok_and(|got| got.bytes == 0) {
        return None;
    }
    control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmCredentials(c) => Some(c.pid.as_raw_pid()).filter(|pid| *pid > 0),
        _ => None,
    })
}

/// Forks the first process of a container; it waits for [`Launched::proceed`].
///
/// Must be called by a process with one thread: the child allocates.
///
/// # Errors
/// The specification is wrong, or a namespace cannot be made or joined.
pub fn launch(mut plan: Plan<'_>) -> Result<Launched> {
    let namespaces = plan
        .spec
        .linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .cloned()
        .unwrap_or_default();
    let wanted = Wanted::of(&namespaces);
    let prepared = init::Prepared::new(plan.spec, &plan.program)?;
    let pid_namespace = wanted.joins(Type::Pid).map(namespace::open).transpose()?;
    // A cgroup namespace is made once the process is in its cgroup, which becomes the root of it.
    let now = wanted.create & !libc::CLONE_NEWCGROUP & !wanted.late(&plan.root);
    let mapping = plan.mapping;
    let users = Users::of(plan.spec)?;
    let maps = Maps::of(plan.spec, &plan.root)?;
    let score = plan
        .spec
        .process()
        .as_ref()
        .and_then(Process::oom_score_adj);
    let ranges = users.as_ref().filter(|_| wanted.creates(Type::User));
    let ranges = ranges.map(Users::maps);
    if wanted.creates(Type::User) && mapping.is_none() && ranges.is_none() {
        return Err(Error::spec(
            "linux.uidMappings",
            "is missing: a new user namespace needs to know who its users are",
        ));
    }
    let outer = plan.outer.take();
    let outer_user = match &outer {
        Some(outer) => Some(outer.user.try_clone().step("duplicate", "namespace")?),
        None => None,
    };
    let birthplace = match (outer, pid_namespace) {
        (Some(outer), None) => {
            let group = mapping.map(|mapping| mapping.gid);
            let group = group.filter(|_| wanted.creates(Type::User) && wanted.creates(Type::Pid));
            let group = group.ok_or_else(|| {
                Error::spec(
                    "linux.namespaces",
                    "only a new user namespace and a new PID namespace can be nested",
                )
            })?;
            Birthplace::Nested { outer, group }
        }
        (Some(_), Some(_)) => {
            return Err(Error::spec(
                "linux.namespaces",
                "a PID namespace is either joined or nested",
            ));
        }
        (None, Some(pids)) => Birthplace::PidNamespace(pids),
        (None, None) => Birthplace::Here,
    };
    let launched = fork_child(now, birthplace, move |caller| {
        init::first(plan, wanted, prepared, &Mapped { users, maps }, caller)
    })?;
    match (mapping, outer_user, ranges) {
        (Some(mapping), None, _) => map_user(launched.pid, mapping)?,
        (Some(mapping), Some(outer), _) => map_nested_user(&outer, launched.pid, mapping)?,
        (None, _, Some((uids, gids))) => write_maps(launched.pid, &uids, &gids)?,
        (None, _, None) => {}
    }
    set_oom_score(launched.pid, score)?;
    Ok(launched)
}

/// Forks a further process of a container.
///
/// # Errors
/// The container is gone.
pub fn exec(plan: ExecPlan<'_>) -> Result<Launched> {
    let prepared = init::Prepared::for_process(plan.process, plan.seccomp)?;
    let pid_namespace = namespace::of_process(plan.target, "pid")?;
    let score = plan.process.oom_score_adj();
    let birthplace = Birthplace::PidNamespace(pid_namespace);
    let launched = fork_child(0, birthplace, move |caller| {
        init::further(plan, prepared, caller)
    })?;
    set_oom_score(launched.pid, score)?;
    Ok(launched)
}

fn map_user(pid: i32, mapping: UserMapping) -> Result<()> {
    let owner = mapping.owner.map(|id| format!("{id} {id} 1\n"));
    let owner = owner.unwrap_or_default();
    let line = |id| format!("{id} {id} 1\n");
    write_maps(pid, &(line(mapping.uid) + &owner), &line(mapping.gid))
}

fn write_maps(pid: i32, uids: &str, gids: &str) -> Result<()> {
    for (file, lines) in [("gid_map", gids), ("uid_map", uids)] {
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, lines).step("write", path)?;
    }
    Ok(())
}

/// A user namespace with nobody in it.
pub(crate) fn user_namespace(users: &Users) -> Result<OwnedFd> {
    let helper = fork_child(libc::CLONE_NEWUSER, Birthplace::Here, |caller| {
        init::undumpable();
        caller.hear()?;
        init::leave(1)
    })?;
    let (uids, gids) = users.maps();
    let made = write_maps(helper.pid, &uids, &gids)
        .and_then(|()| namespace::of_process(helper.pid, "user"));
    // SAFETY: a child that is not reaped yet, and has nothing left to do.
    unsafe {
        libc::kill(helper.pid, libc::SIGKILL);
        libc::waitpid(helper.pid, std::ptr::null_mut(), 0);
    }
    made
}

/// The same by a process in the outer user namespace: from further out it is refused (`proc_uid_map_write`,
/// kernel/user_namespace.c).
fn map_nested_user(outer: &OwnedFd, pid: i32, mapping: UserMapping) -> Result<()> {
    let helper = helper(|| {
        namespace::join(outer, Type::User)?;
        map_user(pid, mapping)
    })?;
    let outcome = helper.wait_progress();
    // SAFETY: reaps a child that ends at once.
    unsafe { libc::waitpid(helper.pid, std::ptr::null_mut(), 0) };
    match outcome? {
        Progress::Created(_) => Ok(()),
        Progress::Failed(e) => Err(e),
        Progress::Started | Progress::Mounted => {
            Err(Error::Child("the user mapping was not written".into()))
        }
    }
}

/// Has something done by a process of its own, which then ends: [`Progress::Created`] when it is done. Whoever calls reaps it.
pub(crate) fn helper(work: impl FnOnce() -> Result<()>) -> Result<Launched> {
    fork_child(0, Birthplace::Here, |caller| {
        init::undumpable();
        work()?;
        caller.created(None)?;
        init::leave(0)
    })
}

/// How readily the kernel kills the process for want of memory: as the pod says, and not as the shim has it, which is never to
/// be killed. Lowering needs `CAP_SYS_RESOURCE`; without it the value stays.
fn set_oom_score(pid: i32, score: Option<i32>) -> Result<()> {
    let Some(score) = score else { return Ok(()) };
    let path = format!("/proc/{pid}/oom_score_adj");
    match std::fs::write(&path, score.to_string()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => Ok(()),
        other => other.step("write", path),
    }
}
