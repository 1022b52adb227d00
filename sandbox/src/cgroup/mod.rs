//! Control groups of a container, version 1 and 2, placed by path or as a systemd scope.
//!
//! On version 1 a "cgroup" is one directory in every mounted hierarchy; on version 2 it is one
//! directory. [`Cgroup`] hides the difference. A systemd scope lives only while it has a process, so it is created
//! together with the container's first one ([`Cgroup::create`]).

mod devices;
mod expendable;
mod known;
mod limits;
mod oom;
mod systemd;
mod tracking;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::Step;
use crate::{Error, Result};

pub use devices::can_be_guarded as devices_can_be_guarded;
pub use expendable::Expendable;
pub use oom::OomWatch;
pub use tracking::follow;

/// Of a directory, in bytes (`NAME_MAX`).
const LONGEST_NAME: usize = 255;

/// Where the specification wants the cgroup (`linux.cgroupsPath`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A path below the root of every hierarchy.
    Path(PathBuf),
    /// `slice:prefix:name`, a scope of systemd.
    Scope {
        /// `kubepods-besteffort-podX.slice`
        slice: String,
        /// `prefix-name.scope`
        unit: String,
    },
}

impl Location {
    /// Parses `linux.cgroupsPath`.
    ///
    /// # Errors
    /// A path with `..`, or a name of systemd's form with an empty, foreign or overlong part.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::spec("linux.cgroupsPath", format!("{text:?} {why}"));
        let parts: Vec<&str> = text.split(':').collect();
        if let [slice, prefix, name] = parts[..] {
            if slice.contains('/') || prefix.contains('/') || name.contains('/') || name.is_empty()
            {
                return Err(bad("is not slice:prefix:name"));
            }
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            if !slice.ends_with(".slice") {
                return Err(bad("names a slice that does not end in .slice"));
            }
            let unit = format!("{prefix}-{name}.scope");
            if slice.len() > LONGEST_NAME || unit.len() > LONGEST_NAME {
                return Err(bad("has a longer name than a directory can have"));
            }
            return Ok(Self::Scope {
                slice: slice.into(),
                unit,
            });
        }
        let path = Path::new(text.trim_start_matches('/'));
        if text.trim_matches('/').is_empty()
            || !path
                .components()
                .all(|c| matches!(c, std::path::Component::Normal(_)))
        {
            return Err(bad("is not a path below a cgroup root"));
        }
        Ok(Self::Path(path.into()))
    }

    /// The directory below a hierarchy's root.
    fn directory(&self) -> PathBuf {
        match self {
            Self::Path(p) => p.clone(),
            Self::Scope { slice, unit } => systemd::slice_path(slice).join(unit),
        }
    }
}

/// One hierarchy of version 1, or the one of version 2.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// `memory`, `cpu`, `name=systemd`; empty for version 2.
    controllers: Vec<String>,
    /// The directory that stands for `/` as this process's PID 1 sees it.
    root: PathBuf,
}

/// The hierarchies of this machine.
#[derive(Debug, Clone)]
pub struct Hierarchies {
    unified: bool,
    list: Vec<Hierarchy>,
}

impl Hierarchies {
    /// Reads `/proc/self/mountinfo` and `/proc/1/cgroup`.
    ///
    /// # Errors
    /// They cannot be read, or no cgroup file system is mounted.
    pub fn detect() -> Result<Self> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
        let init = fs::read_to_string("/proc/1/cgroup").at("read", "/proc/1/cgroup")?;
        Self::parse(&mounts, &init)
    }

    /// Finds them in a process's `mountinfo`, and the part of each that is PID 1's in its `cgroup` file.
    ///
    /// # Errors
    /// No cgroup file system is mounted.
    pub fn parse(mounts: &str, init: &str) -> Result<Self> {
        let (mut first, mut second) = (Vec::<Hierarchy>::new(), None);
        for line in mounts.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let (Some(mount_root), Some(point)) = (left.get(3), left.get(4)) else {
                continue;
            };
            match right.first() {
                Some(&"cgroup2") if second.is_none() => second = Some((*mount_root, *point)),
                Some(&"cgroup") => {
                    let controllers: Vec<String> = right
                        .get(2)
                        .into_iter()
                        .flat_map(|o| o.split(','))
                        .filter(|o| o.starts_with("name=") || V1_CONTROLLERS.contains(o))
                        .map(str::to_string)
                        .collect();
                    if controllers.is_empty() || first.iter().any(|h| h.controllers == controllers)
                    {
                        continue;
                    }
                    let path = init_path(init, &controllers);
                    first.push(Hierarchy {
                        root: below(point, mount_root, path),
                        controllers,
                    });
                }
                _ => {}
            }
        }
        if first
            .iter()
            .any(|h| h.controllers.iter().any(|c| c == "memory"))
        {
            return Ok(Self {
                unified: false,
                list: first,
            });
        }
        let Some((mount_root, point)) = second else {
            return Err(Error::spec(
                "linux.cgroupsPath",
                "no cgroup file system is mounted on this machine",
            ));
        };
        let path = init_path(init, &[]);
        Ok(Self {
            unified: true,
            list: vec![Hierarchy {
                controllers: Vec::new(),
                root: below(
                    point,
                    mount_root,
                    path.map(|p| p.trim_end_matches("/init.scope")),
                ),
            }],
        })
    }

    /// Whether version 2 carries the controllers.
    #[must_use]
    pub fn unified(&self) -> bool {
        self.unified
    }
}

const V1_CONTROLLERS: [&str; 13] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
];

/// PID 1's own path in the hierarchy with these controllers: what `/` means to a nested machine such as a kind node.
fn init_path<'a>(init: &'a str, controllers: &[String]) -> Option<&'a str> {
    init.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
        let wanted = controllers.join(",");
        (names == wanted
            || (!wanted.is_empty() && names.split(',').any(|n| controllers.iter().any(|c| c == n))))
        .then_some(path)
    })
}

/// Where PID 1's `path` is found under a mount of `mount_root` at `point`.
fn below(point: &str, mount_root: &str, path: Option<&str>) -> PathBuf {
    let path = Path::new(path.unwrap_or("/"));
    let path = inside(mount_root, path).unwrap_or(Path::new(""));
    // systemd itself lives in init.scope of the root it manages.
    let path = match path.parent() {
        Some(parent) if path.ends_with("init.scope") => parent,
        _ => path,
    };
    Path::new(point).join(path)
}

/// A hierarchy's path as a mount of `mount_root` shows it. `None` if it leads out: a cgroup namespace shows what is not below
/// its own root by `..` (cgroup_namespaces(7)).
fn inside<'a>(mount_root: &str, path: &'a Path) -> Option<&'a Path> {
    // A mount of a part of the hierarchy shows paths below that part only.
    let path = path.strip_prefix(mount_root).unwrap_or(path);
    let path = path.strip_prefix("/").unwrap_or(path);
    path.components()
        .all(|c| matches!(c, std::path::Component::Normal(_)))
        .then_some(path)
}

/// Where a hierarchy's `path` is found, the path taken as it is. `None` if it is not seen here.
fn below_exactly(mounts: &str, controllers: &[String], path: &str) -> Option<PathBuf> {
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(mount_root), Some(point), Some(kind)) = (left.get(3), left.get(4), right.first())
        else {
            continue;
        };
        let ours = if controllers.is_empty() {
            *kind == "cgroup2"
        } else {
            *kind == "cgroup"
                && right
                    .get(2)
                    .is_some_and(|o| controllers.iter().all(|c| o.split(',').any(|x| x == c)))
        };
        if ours {
            return Some(Path::new(point).join(inside(mount_root, Path::new(path))?));
        }
    }
    None
}

/// The child that holds a container's own processes once its leaves have cgroups beside it (version 2).
const HOLDER: &str = "holder";

/// The cgroup of a container, or of a leaf below it.
#[derive(Debug, Clone)]
pub struct Cgroup {
    unified: bool,
    /// `(controllers, directory)` of each hierarchy.
    directories: Vec<(Vec<String>, PathBuf)>,
    scope: Option<String>,
}

/// One that waits in the kernel for a device stops when that has answered, and is not waited for.
const STOPPED_WITHIN: Duration = Duration::from_millis(20);

/// Whether a process is stopped, or runs no more, by `/proc/PID/stat` (proc_pid_stat(5)).
fn rests(pid: i32) -> bool {
    // A process names itself as it likes, also in bytes that are no text.
    let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else {
        return true;
    };
    let name = stat.iter().rposition(|byte| *byte == b')');
    let state = name.and_then(|end| stat.get(end + 2));
    state.is_none_or(|state| b"TtZX".contains(state))
}

impl Cgroup {
    /// The cgroup at a location, which need not exist yet.
    #[must_use]
    pub fn at(hierarchies: &Hierarchies, location: &Location) -> Self {
        let directory = location.directory();
        Self {
            unified: hierarchies.unified,
            directories: hierarchies
                .list
                .iter()
                .map(|h| (h.controllers.clone(), h.root.join(&directory)))
                .collect(),
            scope: match location {
                Location::Scope { unit, .. } => Some(unit.clone()),
                Location::Path(_) => None,
            },
        }
    }

    /// The cgroup a process is in now.
    ///
    /// # Errors
    /// The process is gone, or is in a cgroup that is not seen from here.
    pub fn of_process(hierarchies: &Hierarchies, pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&path).at("read", &path)?;
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
        let mut directories = Vec::new();
        for h in &hierarchies.list {
            let Some(own) = init_path(&text, &h.controllers) else {
                continue;
            };
            let directory = below_exactly(&mounts, &h.controllers, own).ok_or_else(|| {
                Error::spec(
                    "linux.cgroupsPath",
                    format!("{own:?} of {path} is outside of the cgroups that are mounted here"),
                )
            })?;
            directories.push((h.controllers.clone(), directory));
        }
        Ok(Self {
            unified: hierarchies.unified,
            directories,
            scope: None,
        })
    }

    /// On version 1 the directory of each hierarchy by the name a container sees (`memory`, `cpu,cpuacct`, `systemd`).
    #[must_use]
    pub fn version_1_directories(&self) -> Vec<(String, PathBuf)> {
        if self.unified {
            return Vec::new();
        }
        self.directories
            .iter()
            .map(|(c, d)| {
                (
                    c.join(",").trim_start_matches("name=").to_string(),
                    d.clone(),
                )
            })
            .collect()
    }

    /// Makes the cgroup for a process, with its limits. The process has yet to move itself there by what is returned beside it:
    /// [`Cgroup::entrances`], or nothing where systemd has moved it.
    ///
    /// A process that moves itself does not wait for other processes' forks, as one that moves another does.
    ///
    /// # Errors
    /// systemd or the kernel refuses; the message names which file.
    pub async fn create(
        hierarchies: &Hierarchies,
        location: &Location,
        pid: i32,
        resources: Option<&LinuxResources>,
    ) -> Result<(Self, Vec<OwnedFd>)> {
        let cgroup = Self::at(hierarchies, location);
        if let Location::Scope { slice, unit } = location {
            systemd::start_scope(slice, unit, pid, resources, hierarchies.unified).await?;
        }
        // A scope has no directory in the hierarchies that systemd does not manage.
        cgroup.make_directories()?;
        if let Some(resources) = resources {
            limits::apply(&cgroup, resources)?;
        }
        let entrances = if cgroup.unified && cgroup.scope.is_some() {
            Vec::new()
        } else {
            cgroup.entrances()?
        };
        Ok((cgroup, entrances))
    }

    fn make_directories(&self) -> Result<()> {
        for (controllers, directory) in &self.directories {
            if self.unified {
                enable_controllers(directory)?;
            }
            fs::create_dir_all(directory).at("make cgroup", directory)?;
            if controllers.iter().any(|c| c == "cpuset") {
                inherit_cpuset(directory)?;
            }
        }
        Ok(())
    }

    /// A cgroup below this one for a leaf: of its own where a leaf must be told apart (freezer, memory, pids), this one's
    /// elsewhere, which saves the move.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn leaf(&self, name: &str) -> Result<Self> {
        let mut leaf = self.clone();
        leaf.scope = None;
        for (controllers, directory) in &mut leaf.directories {
            if self.unified
                || controllers
                    .iter()
                    .any(|c| ["freezer", "memory", "pids"].contains(&c.as_str()))
            {
                directory.push(name);
                match fs::create_dir(&*directory) {
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                    other => other.at("make cgroup", &*directory)?,
                }
            }
        }
        Ok(leaf)
    }

    /// On version 2: a child that holds the container's first process, so that its siblings may have
    /// controllers ("no internal processes", cgroups(7)). On version 1 the cgroup itself.
    ///
    /// # Errors
    /// The directory cannot be made or the process not be moved.
    pub fn delegate(&self, pid: i32) -> Result<()> {
        if !self.unified {
            return Ok(());
        }
        let (_, directory) = &self.directories[0];
        let holder = directory.join(HOLDER);
        fs::create_dir_all(&holder).at("make cgroup", &holder)?;
        write(&holder.join("cgroup.procs"), &pid.to_string())?;
        for controller in ["+memory", "+pids", "+cpu"] {
            if let Err(e) = write(&directory.join("cgroup.subtree_control"), controller) {
                tracing::debug!(controller, error = %e, "controller not delegated to leaves");
            }
        }
        Ok(())
    }

    /// The file that a process of one thread is moved by.
    ///
    /// On version 1 that is `tasks`: whoever moves itself by it need not stop all forks of the machine, which everything else does
    /// by a lock whose writer waits for a grace period (`cgroup_attach_lock` and `cgroup_procs_write_start`,
    /// kernel/cgroup/cgroup.c): 35 µs against 10 ms.
    fn entrance(&self, directory: &Path) -> PathBuf {
        if !self.unified {
            return directory.join("tasks");
        }
        // A cgroup whose children have controllers takes no process itself.
        let holder = directory.join(HOLDER);
        if holder.is_dir() {
            holder.join("cgroup.procs")
        } else {
            directory.join("cgroup.procs")
        }
    }

    /// Moves a process of one thread here.
    ///
    /// # Errors
    /// The kernel refuses, for instance because the process is gone.
    pub fn add(&self, pid: i32) -> Result<()> {
        for (_, directory) in &self.directories {
            write(&self.entrance(directory), &pid.to_string())?;
        }
        Ok(())
    }

    /// Moves the calling process here, which has one thread. Where that fails half-way, it stays in two cgroups.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enter(&self) -> Result<()> {
        // The kernel takes 0 for whoever writes.
        self.add(0)
    }

    /// Descriptors of the files by which a process of one thread that has no rights here moves itself in: it writes `0` to each.
    /// The kernel checks who opened them (`cgroup_procs_write`, `__cgroup1_procs_write`).
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn entrances(&self) -> Result<Vec<OwnedFd>> {
        self.directories
            .iter()
            .map(|(_, directory)| {
                let (path, _) = self.entrance_there(directory);
                fs::OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .at("open", &path)
                    .map(OwnedFd::from)
            })
            .collect()
    }

    /// Whether what [`Cgroup::entrances`] gave out still leads in.
    #[must_use]
    pub fn are_current(&self, entrances: &[OwnedFd]) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let there = self.directories.iter();
        let there = there.map(|(_, directory)| self.entrance_there(directory).1);
        there.zip(entrances).all(|(there, entrance)| {
            let opened = rustix::fs::fstat(entrance);
            matches!((there, opened), (Some(there), Ok(opened)) if there.ino() == opened.st_ino && there.dev() == opened.st_dev)
        })
    }

    /// The entrance, or that of the next directory above that exists, and what it is, unless there is none. On version 1 systemd takes a scope out of hierarchies whose
    /// controller it does not want for it, for instance when it is told to read its units again: processes are moved to where
    /// its slice is, and the directory is removed (`cg_migrate_v1_controllers`, src/shared/cgroup-setup.c).
    fn entrance_there(&self, directory: &Path) -> (PathBuf, Option<fs::Metadata>) {
        let paths = directory.ancestors().map(|above| self.entrance(above));
        let mut paths = paths.take_while(|path| path.starts_with("/sys/fs/cgroup"));
        paths
            .find_map(|path| {
                let there = fs::metadata(&path).ok()?;
                Some((path, Some(there)))
            })
            .unwrap_or_else(|| (self.entrance(directory), None))
    }

    /// Sets limits again (`Update`).
    ///
    /// # Errors
    /// A value that the kernel refuses, with the file's name.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        limits::apply(self, resources)
    }

    /// Whether the kernel is told here which devices may be opened: always on version 1, and on version 2 if it has a program.
    #[must_use]
    pub fn guards_devices(&self) -> bool {
        match self.directories.first() {
            Some((_, directory)) if self.unified => devices::is_guarded(directory),
            _ => true,
        }
    }

    /// Every process in here and below.
    ///
    /// # Errors
    /// `cgroup.procs` cannot be read for another reason than that it is gone.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut out = Vec::new();
        if let Some(directory) = self.main() {
            collect(directory, &mut out)?;
        }
        Ok(out)
    }

    /// Stops every process in here. Returns once the kernel says so, at the latest after 500 ms.
    ///
    /// # Errors
    /// The file cannot be written, or the cgroup does not get there in time.
    pub fn freeze(&self) -> Result<()> {
        let Some(directory) = self.freezer() else {
            return Ok(());
        };
        let (file, value) = if self.unified {
            ("cgroup.freeze", "1")
        } else {
            ("freezer.state", "FROZEN")
        };
        write(&directory.join(file), value)?;
        let end = Instant::now() + Duration::from_millis(500);
        loop {
            let frozen = if self.unified {
                read(&directory.join("cgroup.events"))?
                    .lines()
                    .any(|l| l == "frozen 1")
            } else {
                read(&directory.join("freezer.state"))?.trim() == "FROZEN"
            };
            if frozen {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(std::io::Error::from_raw_os_error(libc::ETIMEDOUT))
                    .at("freeze", directory);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn thaw(&self) -> Result<()> {
        let Some(directory) = self.freezer() else {
            return Ok(());
        };
        let (file, value) = if self.unified {
            ("cgroup.freeze", "0")
        } else {
            ("freezer.state", "THAWED")
        };
        write(&directory.join(file), value)
    }

    /// Keeps the processes in here from running until [`Cgroup::resume`], and still lets SIGKILL end them. On version 1 a process
    /// that the freezer holds does not die: it would hold up the end of its PID namespace, which may be that of the whole node,
    /// when nobody is left to thaw it. There the processes are stopped by SIGSTOP.
    ///
    /// # Errors
    /// As [`Cgroup::freeze`], or they fork faster than they can be stopped (`EAGAIN`).
    pub fn suspend(&self) -> Result<()> {
        if self.unified {
            return self.freeze();
        }
        let mut told = BTreeSet::new();
        let end = Instant::now() + STOPPED_WITHIN;
        // What one forks before it stops is found by the next pass, once it has stopped: a child is not listed until the system
        // call that makes it is nearly over (`cgroup_post_fork`, kernel/cgroup/cgroup.c).
        let mut passes = 0;
        while passes < 20 {
            let have_stopped = self.processes()?.into_iter().all(rests);
            if self.signal_others(Signal::STOP, &mut told)? {
                passes += 1;
            } else if have_stopped || Instant::now() > end {
                return Ok(());
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let directory = self.main().unwrap_or(Path::new(""));
        Err(std::io::Error::from_raw_os_error(libc::EAGAIN)).at("stop the processes of", directory)
    }

    /// Lets them go on after [`Cgroup::suspend`].
    ///
    /// # Errors
    /// The file cannot be written, or processes cannot be listed.
    pub fn resume(&self) -> Result<()> {
        if self.unified {
            return self.thaw();
        }
        // Stopped processes have forked nothing: one pass reaches all.
        self.signal_others(Signal::CONT, &mut BTreeSet::new())?;
        Ok(())
    }

    /// Signals each process but those that were `told`, and notes it there. Yields whether there was any.
    fn signal_others(&self, signal: Signal, told: &mut BTreeSet<i32>) -> Result<bool> {
        let new: Vec<(i32, OwnedFd)> = self
            .processes()?
            .into_iter()
            .filter(|number| told.insert(*number))
            .filter_map(|number| {
                let pid = Pid::from_raw(number)?;
                Some((number, pidfd_open(pid, PidfdFlags::empty()).ok()?))
            })
            .collect();
        if new.is_empty() {
            return Ok(false);
        }
        // A number may have come back between list and descriptor, with another process.
        let still = self.processes()?;
        for (number, process) in new {
            if still.contains(&number) {
                // It may have ended.
                let _ = pidfd_send_signal(&process, signal);
            }
        }
        Ok(true)
    }

    /// Sends SIGKILL to everything in here and below but the calling process. The dead are gone a moment later, not on return.
    ///
    /// # Errors
    /// Processes cannot be listed.
    pub fn kill(&self) -> Result<()> {
        let Some(directory) = self.main() else {
            return Ok(());
        };
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let others = || -> Result<Vec<i32>> {
            Ok(self
                .processes()?
                .into_iter()
                .filter(|p| *p != own)
                .collect())
        };
        if self.unified
            && directory.join("cgroup.kill").exists()
            && !self.processes()?.contains(&own)
        {
            return write(&directory.join("cgroup.kill"), "1");
        }
        // Without cgroup.kill a fork bomb outruns a single pass; each pass kills all it sees.
        for _ in 0..20 {
            let processes = others()?;
            if processes.is_empty() {
                break;
            }
            for pid in processes {
                // SAFETY: sends a signal; a number that was reused within microseconds is still read from our cgroup.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            // On version 1 a frozen process does not see the signal.
            self.thaw()?;
        }
        Ok(())
    }

    /// Removes the directories. Not an error if they are gone; `Busy` while a process is left.
    ///
    /// # Errors
    /// A directory cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for (controllers, directory) in &self.directories {
            if self.scope.is_some()
                && !self.unified
                && controllers.iter().any(|c| c.starts_with("name="))
            {
                // systemd removes its own directory when the scope has ended.
                remove_children(directory)?;
                continue;
            }
            remove_tree(directory)?;
        }
        Ok(())
    }

    /// Removes a leaf's directories, and none of the container's.
    ///
    /// # Errors
    /// As [`Cgroup::remove`].
    pub fn remove_leaf(&self, name: &str) -> Result<()> {
        for (_, directory) in &self.directories {
            if directory.file_name().is_some_and(|n| n == name) {
                remove_tree(directory)?;
            }
        }
        Ok(())
    }

    /// Whether the cgroup is no more, as a scope is when its last process has ended.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.main().is_none_or(|directory| !directory.exists())
    }

    /// Whether this cgroup or the one above it, of its pod, has a limit of memory.
    #[must_use]
    pub fn is_memory_limited(&self) -> bool {
        let Some(directory) = self.controller("memory") else {
            return false;
        };
        let file = if self.unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        let limited = |directory: &Path| {
            let limit = fs::read_to_string(directory.join(file)).ok();
            // Version 1 says a number near 2^63 if there is none, version 2 `max`.
            limit.is_some_and(|text| text.trim().parse().is_ok_and(|limit: u64| limit < 1 << 60))
        };
        limited(directory) || directory.parent().is_some_and(limited)
    }

    /// How many processes were killed for want of memory so far: none when the cgroup is gone ([`OomWatch`]).
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.counted_oom_kills().unwrap_or(0)
    }

    fn counted_oom_kills(&self) -> Option<u64> {
        let file = if self.unified {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        oom_kills_in(&self.controller("memory")?.join(file))
    }

    /// Memory that goes when its processes do, in bytes: their own, and what they share by `shmem` (memory files, tmpfs), but no files. Each page counts
    /// for the cgroup whose process was the first to write to it.
    #[must_use]
    pub fn own_memory(&self) -> Option<u64> {
        let text = fs::read_to_string(self.controller("memory")?.join("memory.stat")).ok()?;
        let get = |key: &str| -> Option<u64> {
            let value = text.lines().find_map(|line| line.strip_prefix(key))?;
            value.trim().parse().ok()
        };
        let own = get(if self.unified { "anon " } else { "rss " })?;
        Some(own + get("shmem ").unwrap_or(0))
    }

    /// The directory that says of memory, or on version 2 the only one.
    #[must_use]
    pub fn controller(&self, name: &str) -> Option<&Path> {
        self.directories
            .iter()
            .find(|(c, _)| self.unified || c.iter().any(|c| c == name))
            .map(|(_, d)| d.as_path())
    }

    /// Whether this is version 2.
    #[must_use]
    pub fn unified(&self) -> bool {
        self.unified
    }

    fn freezer(&self) -> Option<&Path> {
        self.controller("freezer")
    }

    /// The hierarchy asked for processes: one in which a leaf has its own directory.
    fn main(&self) -> Option<&Path> {
        self.controller("memory")
            .or_else(|| self.directories.first().map(|(_, d)| d.as_path()))
    }
}

fn collect(directory: &Path, out: &mut Vec<i32>) -> Result<()> {
    match fs::read_to_string(directory.join("cgroup.procs")) {
        Ok(text) => out.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
        Err(e) if gone(&e) => return Ok(()),
        // A threaded cgroup lists no processes.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(e).at("read", directory),
    }
    for child in children(directory) {
        collect(&child, out)?;
    }
    Ok(())
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

fn remove_children(directory: &Path) -> Result<()> {
    children(directory).iter().try_for_each(|c| remove_tree(c))
}

fn remove_tree(directory: &Path) -> Result<()> {
    remove_children(directory)?;
    match fs::remove_dir(directory) {
        Err(e) if !gone(&e) => Err(e).at("remove cgroup", directory),
        _ => Ok(()),
    }
}

fn gone(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn enable_controllers(directory: &Path) -> Result<()> {
    let mut parents: Vec<&Path> = directory
        .ancestors()
        .skip(1)
        .take_while(|p| p.join("cgroup.controllers").exists() || !p.exists())
        .collect();
    parents.reverse();
    for parent in parents {
        if !parent.exists() {
            fs::create_dir(parent).at("make cgroup", parent)?;
        }
        let have = read(&parent.join("cgroup.subtree_control"))?;
        for controller in read(&parent.join("cgroup.controllers"))?.split_whitespace() {
            if !have.split_whitespace().any(|c| c == controller) {
                // A controller that cannot be had (internal processes, threaded) shows when a limit needs it.
                let _ = write(
                    &parent.join("cgroup.subtree_control"),
                    &format!("+{controller}"),
                );
            }
        }
    }
    Ok(())
}

/// A new cpuset of version 1 has no processor and no memory node, and takes no process until it has.
fn inherit_cpuset(directory: &Path) -> Result<()> {
    let mut missing: Vec<&Path> = directory
        .ancestors()
        .take_while(|d| {
            fs::read_to_string(d.join("cpuset.cpus")).is_ok_and(|t| t.trim().is_empty())
        })
        .collect();
    missing.reverse();
    for level in missing {
        let Some(parent) = level.parent() else {
            continue;
        };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            write(&level.join(file), read(&parent.join(file))?.trim())?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).at("read", path)
}

fn oom_kills_in(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let number = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    number?.trim().parse().ok()
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut f| f.write_all(value.as_bytes()))
        .step("write", format!("{value:?} to {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_scope_lies_below_the_slices_that_its_name_spells() {
        let l = Location::parse("kubelet-kubepods-pod1.slice:cri-containerd:abc").unwrap();
        assert_eq!(
            l.directory(),
            Path::new(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice/cri-containerd-abc.scope"
            )
        );
    }

    #[test]
    fn a_kind_node_sees_its_own_part_of_each_hierarchy() {
        let mounts = "50 49 0:30 /docker/x /sys/fs/cgroup/memory rw - cgroup memory rw,memory\n\
                      51 49 0:31 /docker/x /sys/fs/cgroup/cpu,cpuacct rw - cgroup c rw,cpu,cpuacct\n\
                      52 49 0:32 /docker/x /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let init =
            "3:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x/init.scope\n";
        let h = Hierarchies::parse(mounts, init).unwrap();
        assert!(!h.unified());
        let c = Cgroup::at(&h, &Location::parse("/kubepods/a").unwrap());
        assert_eq!(
            c.controller("memory").unwrap(),
            Path::new("/sys/fs/cgroup/memory/kubepods/a")
        );
        assert_eq!(
            c.controller("cpuacct").unwrap(),
            Path::new("/sys/fs/cgroup/cpu,cpuacct/kubepods/a")
        );
    }

    #[test]
    fn a_production_machine_has_one_hierarchy() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let h = Hierarchies::parse(mounts, "0::/init.scope\n").unwrap();
        assert!(h.unified());
        let c = Cgroup::at(&h, &Location::parse("system.slice:cri:1").unwrap());
        assert_eq!(
            c.controller("memory").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/cri-1.scope")
        );
    }

    /// Whether a path goes down only.
    fn descends(path: &Path) -> bool {
        path.components()
            .all(|c| matches!(c, std::path::Component::Normal(_)))
    }

    #[test]
    fn a_name_that_no_directory_can_have_is_refused_before_it_is_spelt_out() {
        // Each of its prefixes would be a slice: half a gigabyte of names.
        let slice = format!("{}.slice:cri:1", "-".repeat(32 * 1024));
        assert!(Location::parse(&slice).is_err());
        assert!(Location::parse(&format!("a.slice:cri:{}", "1".repeat(256))).is_err());
    }

    #[test]
    fn a_process_outside_of_what_is_seen_here_is_in_no_cgroup_of_ours() {
        // How a cgroup namespace shows what is not below its root (cgroup_namespaces(7)).
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(below_exactly(mounts, &[], "/../../system.slice"), None);
        assert_eq!(
            Hierarchies::parse(mounts, "0::/../..\n").unwrap().list[0].root,
            Path::new("/sys/fs/cgroup")
        );
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_hierarchy(text in "[a-z./:-]{0,30}|\\PC{0,30}") {
            if let Ok(l) = Location::parse(&text) {
                let directory = l.directory();
                prop_assert!(descends(&directory));
                prop_assert!(directory.as_os_str().len() <= (text.len() + 16).pow(2));
            }
        }

        #[test]
        fn no_text_of_the_kernels_leads_out_of_its_mounts(
            mounts in prop::collection::vec(("[/a-z.]{0,12}", "/[a-z/]{1,8}", "cgroup2?|tmpfs", "(rw,)?(memory|cpu,cpuacct|name=systemd|pids)?"), 0..6),
            own in prop::collection::vec(("memory|cpu,cpuacct|name=systemd||[a-z=,]{0,8}", "[/a-z.]{0,20}|\\PC{0,20}"), 0..6),
            noise in prop::collection::vec("\\PC{0,40}", 0..3),
        ) {
            let mut text: Vec<String> = mounts.iter().map(|(root, point, kind, options)| format!("1 2 0:3 {root} {point} rw - {kind} x {options}")).collect();
            text.extend(noise.iter().cloned());
            let text = text.join("\n");
            let init: String = own.iter().map(|(names, path)| format!("1:{names}:{path}\n")).collect();
            if let Ok(h) = Hierarchies::parse(&text, &init) {
                for hierarchy in &h.list {
                    prop_assert!(mounts.iter().any(|(_, point, ..)| hierarchy.root.strip_prefix(point).is_ok_and(descends)), "{:?}", hierarchy);
                    prop_assert!(h.unified() || !hierarchy.controllers.is_empty());
                    for (_, path) in &own {
                        if let Some(found) = below_exactly(&text, &hierarchy.controllers, path) {
                            prop_assert!(mounts.iter().any(|(_, point, ..)| found.strip_prefix(point).is_ok_and(descends)), "{:?}", found);
                        }
                    }
                }
            }
        }
    }
}
