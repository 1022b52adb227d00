//! One process of a container: its way from created to stopped.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::SystemTime;

use oci_spec::runtime::Spec;
use sock_sandbox::hook::{self, Identity, Kind};
use sock_sandbox::{Launched, Progress, Timed};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::async_fd::watch;
use crate::children::Claim;
use crate::crash;
use crate::stdio::{Console, Kept, Paths};
use crate::task::Failure;

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// An exec that was announced and not started.
    Added,
    /// Waits for its start.
    Created,
    /// Runs its program.
    Running,
    /// Ended.
    Stopped,
}

/// How it ended.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    /// 0–255, or 128 and the signal.
    pub status: u32,
    /// When the shim learned of it.
    pub at: SystemTime,
}

/// A process of a container.
pub struct Process {
    /// Empty for the first process.
    pub exec_id: String,
    /// Its streams.
    pub paths: Paths,
    pid: Cell<i32>,
    phase: Cell<Phase>,
    pidfd: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
    launched: RefCell<Option<Rc<Launched>>>,
    /// Ends of FIFOs.
    pub kept: RefCell<Kept>,
    console: RefCell<Option<Console>>,
    /// What an exec is to run.
    pub spec: RefCell<Option<oci_spec::runtime::Process>>,
    exit: watch::Sender<Option<Exit>>,
    /// Said in place of its own status.
    ends_as: Cell<Option<u32>>,
    told_to_die: Cell<bool>,
}

impl Process {
    /// One that does not exist yet.
    #[must_use]
    pub fn new(exec_id: String, paths: Paths) -> Self {
        Self {
            exec_id,
            paths,
            pid: Cell::new(0),
            phase: Cell::new(Phase::Added),
            pidfd: RefCell::default(),
            launched: RefCell::default(),
            kept: RefCell::default(),
            console: RefCell::default(),
            spec: RefCell::default(),
            exit: watch::Sender::new(None),
            ends_as: Cell::new(None),
            told_to_die: Cell::new(false),
        }
    }

    /// Its number, 0 before it exists.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.get()
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Takes charge of a child that waits to be let on.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn adopt(&self, launched: Launched) -> Result<Rc<Launched>, Failure> {
        let pidfd = launched.pidfd.try_clone()?;
        *self.pidfd.borrow_mut() = Some(Rc::new(watch(pidfd, Interest::READABLE)?));
        self.pid.set(launched.pid);
        let launched = Rc::new(launched);
        *self.launched.borrow_mut() = Some(launched.clone());
        Ok(launched)
    }

    /// Lets the child build what it needs, waits until it has, and gives the steps of that. `mounted` is done when it has mounted everything, if its hooks
    /// ask for that.
    ///
    /// # Errors
    /// What the child says went wrong; it is gone then. Or what went wrong in `mounted`; it waits then.
    pub async fn create(
        &self,
        entrances: Vec<OwnedFd>,
        mounted: impl Future<Output = Result<(), Failure>>,
    ) -> Result<Vec<Timed>, Failure> {
        let launched = self
            .launched
            .borrow()
            .clone()
            .ok_or_else(|| Failure::precondition("the process was not launched"))?;
        launched.proceed_in(&entrances)?;
        drop(entrances);
        let mut news = progress(&launched).await?;
        if matches!(news, Progress::Mounted) {
            mounted.await?;
            launched.proceed()?;
            news = progress(&launched).await?;
        }
        match news {
            Progress::Created(made) => {
                if let Some(master) = made.terminal {
                    *self.console.borrow_mut() = Some(Console::attach(master, &self.paths)?);
                }
                self.phase.set(Phase::Created);
                Ok(made.steps)
            }
            Progress::Failed(e) => Err(Failure::unknown(e)),
            Progress::Started => Err(Failure::unknown("the process ended before it was created")),
            Progress::Mounted => Err(Failure::unknown("the process reported twice")),
        }
    }

    /// Starts the program and waits until it runs.
    ///
    /// # Errors
    /// It cannot be executed, in the child's words.
    pub async fn start(&self) -> Result<(), Failure> {
        if self.phase.get() != Phase::Created {
            return Err(Failure::precondition(format!(
                "cannot start a process that is {:?}",
                self.phase.get()
            )));
        }
        let launched = self
            .launched
            .borrow_mut()
            .take()
            .ok_or_else(|| Failure::precondition("the process was started before"))?;
        launched.start()?;
        match progress(&launched).await? {
            Progress::Started => {
                self.phase.set(Phase::Running);
                Ok(())
            }
            Progress::Failed(e) => Err(Failure::unknown(e)),
            Progress::Created(_) | Progress::Mounted => {
                Err(Failure::unknown("the process reported twice"))
            }
        }
    }

    /// A holder in whose container another process matters: that one's status is told as its own.
    pub fn end_as(&self, status: u32) {
        self.ends_as.set(Some(status));
    }

    /// Waits until the kernel says it has ended, and reaps it. Tells nobody: see [`Process::finish`].
    pub async fn reap(&self) -> Exit {
        if let Some(exit) = self.exited() {
            return exit;
        }
        let pidfd = self.pidfd.borrow().clone();
        let mut status = 255;
        if let Some(pidfd) = pidfd {
            loop {
                let Ok(mut guard) = pidfd.readable().await else {
                    break;
                };
                match wait(pidfd.get_ref()) {
                    Some(s) => {
                        status = s;
                        break;
                    }
                    None => guard.clear_ready(),
                }
            }
        }
        // From here on its number may be another's.
        self.phase.set(Phase::Stopped);
        Exit {
            status: self.ends_as.get().unwrap_or(status),
            at: SystemTime::now(),
        }
    }

    /// Makes the end known to all who wait.
    pub fn finish(&self, exit: Exit) {
        self.phase.set(Phase::Stopped);
        *self.launched.borrow_mut() = None;
        *self.kept.borrow_mut() = Kept::default();
        self.exit.send_replace(Some(exit));
    }

    /// Waits for [`Process::finish`].
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                return Exit {
                    status: 255,
                    at: SystemTime::now(),
                };
            }
        }
    }

    /// Whether it was sent SIGKILL from here.
    #[must_use]
    pub fn was_told_to_die(&self) -> bool {
        self.told_to_die.get()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn signal(&self, signal: i32) -> Result<(), Failure> {
        let gone = || Failure::not_found("process already finished");
        let pidfd = self.pidfd.borrow().clone().ok_or_else(gone)?;
        if self.exited().is_some() {
            return Err(gone());
        }
        if signal == libc::SIGKILL {
            self.told_to_die.set(true);
        }
        // SAFETY: plain numbers and no siginfo.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result == 0 {
            return Ok(());
        }
        match std::io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Err(gone()),
            e => Err(e.into()),
        }
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has none.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Failure> {
        match &*self.console.borrow() {
            Some(console) => Ok(console.resize(rows, columns)?),
            None => Ok(()),
        }
    }
}

/// Takes a child that nobody else has to know of to its program. The value is why it did not get there, if so.
pub(crate) async fn run_program(
    launched: &Launched,
    entrances: &[OwnedFd],
) -> Result<Option<sock_sandbox::Error>, Failure> {
    launched.proceed_in(entrances)?;
    if let Progress::Failed(e) = progress(launched).await? {
        return Ok(Some(e));
    }
    launched.start()?;
    match progress(launched).await? {
        Progress::Failed(e) => Ok(Some(e)),
        Progress::Created(_) | Progress::Mounted | Progress::Started => Ok(None),
    }
}

/// Runs the hooks that a container has for after its end, unless they were run before. It is gone when they are called.
pub(crate) async fn after_stop(spec: &Spec, container: &Identity) -> Result<(), Failure> {
    const KIND: &[Kind] = &[Kind::Poststop];
    if !hook::has(spec, KIND) || !crash::stopped(&container.bundle)? {
        return Ok(());
    }
    done(hook::launch(spec, KIND, container, 0)?).await
}

/// Waits for a child that does something for the shim and ends, and reaps it.
pub(crate) async fn done(helper: Launched) -> Result<(), Failure> {
    let _claim = Claim::new(helper.pid);
    let news = progress(&helper).await;
    let ended = watch(helper.pidfd.try_clone()?, Interest::READABLE)?;
    while wait(ended.get_ref()).is_none() {
        ended.readable().await?.clear_ready();
    }
    match news? {
        Progress::Created(_) => Ok(()),
        Progress::Failed(e) => Err(Failure::unknown(e)),
        Progress::Mounted | Progress::Started => {
            Err(Failure::unknown("a helper ended without a word"))
        }
    }
}

/// Waits for a child's news without blocking the others.
async fn progress(launched: &Launched) -> Result<Progress, Failure> {
    let ready = watch(launched.channel().try_clone_to_owned()?, Interest::READABLE)?;
    loop {
        let mut guard = ready.readable().await?;
        match launched.progress() {
            Err(e) if e.errno() == Some(libc::EAGAIN) => guard.clear_ready(),
            other => return Ok(other?),
        }
    }
}

/// Reaps by descriptor. `None` while it lives.
fn wait(pidfd: &OwnedFd) -> Option<u32> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    match waitid(
        WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    ) {
        Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => u32::try_from(code).unwrap_or(255) & 0xff,
            (None, Some(signal)) => 128 + u32::try_from(signal).unwrap_or(0),
            (None, None) => 255,
        }),
        Ok(None) | Err(rustix::io::Errno::INTR) => None,
        // Not our child any more: reaped elsewhere, its status is lost.
        Err(_) => Some(255),
    }
}
