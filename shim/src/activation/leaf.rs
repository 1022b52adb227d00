//! The life of one leaf: from the fork, or from the start of an interpreter, until nothing of it is
//! left.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_passcred;
use sock_zygote::protocol::{self, Phase};
use sock_zygote::{Arrived, Confining, Event, SetupFds};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::cgroups::LeafCgroup;
use super::connections::register;
use super::decide::{Conn, Input, Leaf};
use super::driver::Driver;
use super::end::End;
use super::output::Streams;
use super::zygotes::{ForkError, Zygote};

/// A zygote forks within milliseconds. One that takes this long is stuck.
const FORKED_WITHIN: Duration = Duration::from_secs(5);
/// So does a leaf enter the pod; the rest of the time allowed is the handler's.
const CONFINED_WITHIN: Duration = Duration::from_secs(10);
/// How long to wait for killed processes: what does not die by then hangs in the kernel.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// What a leaf said before its end lies in the channel already; the runtime may not have looked yet.
const LAST_MESSAGES: Duration = Duration::from_millis(20);
/// Pauses between looks at a cgroup that is still in use.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// Why a leaf is not, or no longer, there.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeafError {
    #[error("pipes for what it prints: {0}")]
    Output(#[source] std::io::Error),
    #[error("its cgroup: {0}")]
    Cgroup(#[source] sock_sandbox::Error),
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error(transparent)]
    Zygote(#[from] sock_zygote::Error),
    #[error("the interpreter did not start: {0:#}")]
    Interpreter(anyhow::Error),
    #[error("control channel: {0}")]
    Channel(#[from] protocol::Error),
    #[error("credentials on its control channel (SO_PASSCRED): {0}")]
    Credentials(rustix::io::Errno),
    #[error("its process cannot be watched: {0}")]
    Watch(#[source] std::io::Error),
    #[error("{step} took longer than {} s", limit.as_secs())]
    Late { step: &'static str, limit: Duration },
}

impl LeafError {
    /// What the author of a Function can mend, or whoever runs the cluster must know.
    fn line(&self, end: Option<End>) -> String {
        match self {
            LeafError::Zygote(sock_zygote::Error::Wire {
                source: protocol::Error::Closed,
                ..
            }) => format!(
                "the function's process {} before its handler was imported",
                end.unwrap_or(End::Unknown)
            ),
            other => other.to_string(),
        }
    }
}

/// How a leaf came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// Forked for this pod.
    Fork,
    /// Forked ahead.
    Spare,
    /// An interpreter of its own.
    Interpreter,
}

/// Where the time went until a leaf was ready, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StartTimes {
    /// How it came to be.
    pub origin: Origin,
    /// In the zygote, by its word; 0 where it did not say so in time.
    pub fork: u64,
    /// From the decision until the leaf was told of its Function.
    pub told: u64,
    /// From there until it was confined.
    pub confined: u64,
    /// The steps of that, by the leaf's word.
    pub phases: Vec<(String, u64)>,
    /// Import of the handler, by the leaf's word.
    pub import: u64,
    /// From the decision until it was ready.
    pub total: u64,
}

/// What the driver holds of a leaf.
#[derive(Default)]
pub(super) struct Slot {
    /// Once it serves.
    pub(super) leaf: RefCell<Option<Rc<sock_zygote::Leaf>>>,
    pub(super) cgroup: RefCell<Option<Rc<dyn LeafCgroup>>>,
    /// A connection given to it before it served.
    pub(super) early: Cell<Option<Conn>>,
    /// The connection it has.
    pub(super) held: Cell<Option<Conn>>,
    /// How it ended.
    pub(super) end: Cell<Option<End>>,
    process: RefCell<Option<Rc<OwnedFd>>>,
    kill: Notify,
    sockets: RefCell<Option<AbortHandle>>,
}

impl Slot {
    /// Kills its processes and ends its task.
    pub(super) fn kill(&self) {
        if let Some(cgroup) = &*self.cgroup.borrow() {
            kill(&**cgroup);
        }
        self.kill.notify_one();
    }
}

fn kill(cgroup: &dyn LeafCgroup) {
    if let Err(error) = cgroup.kill() {
        tracing::warn!(%error, "cannot kill a leaf");
    }
}

/// Runs a leaf from its start until its cgroup is removed.
pub(super) async fn run(driver: Rc<Driver>, leaf: Leaf, slot: Rc<Slot>) {
    let mut copying = None;
    let made = driver
        .cgroups
        .make(&format!("leaf-{}", leaf.0))
        .map_err(LeafError::Cgroup);
    let result = match made.and_then(|cgroup| {
        let (streams, copies) = driver.output.open().map_err(LeafError::Output)?;
        copying = Some(copies);
        Ok((cgroup, streams))
    }) {
        Ok((cgroup, streams)) => {
            slot.cgroup.replace(Some(Rc::clone(&cgroup)));
            tokio::select! {
                biased;
                () = slot.kill.notified() => Ok(()),
                result = live(&driver, leaf, &slot, &*cgroup, streams) => result,
            }
        }
        Err(error) => Err(error),
    };
    let started = slot.leaf.take().is_some();
    if let Some(sockets) = slot.sockets.take() {
        sockets.abort();
    }
    let cgroup = slot.cgroup.take();
    if let Some(cgroup) = &cgroup {
        wait_until_empty(leaf, &**cgroup).await;
        let shortage = cgroup.shortage();
        let process = slot.process.take();
        slot.end.set(Some(End::of(process.as_deref(), shortage)));
    }
    // Before the answer, so that whoever looks for the reason in the log finds it.
    if let Some(copying) = copying {
        copying.finish().await;
    }
    match result {
        Err(error) if started => tracing::warn!(leaf = leaf.0, %error, "leaf ended"),
        Err(error) => driver.failed(leaf, &error.line(slot.end.get())),
        Ok(()) if !started => driver.failed(leaf, "the handler was not imported in time"),
        Ok(()) => tracing::debug!(leaf = leaf.0, "leaf ended"),
    }
    driver.ended(leaf, &slot);
    if let Some(cgroup) = &cgroup {
        remove(leaf, &**cgroup).await;
    }
}

/// Ends when the leaf does, with an error if it did not get as far as serving or broke the protocol.
async fn live(
    driver: &Rc<Driver>,
    name: Leaf,
    slot: &Rc<Slot>,
    cgroup: &dyn LeafCgroup,
    streams: Streams,
) -> Result<(), LeafError> {
    let begin = Instant::now();
    let (entered, mut times) = enter(driver, name, slot, cgroup, &streams, begin).await?;
    // The leaf has them now: the copying ends with it.
    drop(streams);
    let (loading, mut sent) = entered;
    if let Some(conn) = unsent(slot, &mut sent)
        && let Some(socket) = driver.socket(conn)
    {
        loading.queue(conn.0, socket.as_fd())?;
    }
    // While the leaf imports its handler there is time.
    driver.output.prepare();
    let process = exit_of(&loading)?;
    slot.process.replace(Some(Rc::clone(process.get_ref())));
    let keep = driver.keeps_compiled();
    let (leaf, import, compiled) = unless_ended(&process, loading.ready(keep))
        .await
        .unwrap_or_else(|| {
            Err(sock_zygote::Error::Wire {
                peer: "leaf",
                source: protocol::Error::Closed,
            })
        })?;
    let leaf = Rc::new(leaf);
    if let Some(conn) = unsent(slot, &mut sent)
        && let Some(socket) = driver.socket(conn)
    {
        leaf.serve(conn.0, socket.as_fd())?;
    }
    slot.leaf.replace(Some(Rc::clone(&leaf)));
    times.import = import;
    times.total = micros(begin);
    driver.started(name, times, compiled);
    driver.input(Input::Ready(name));
    loop {
        // A leaf that never stops talking must not stop the shim's other tasks.
        tokio::task::coop::consume_budget().await;
        let input = match unless_ended(&process, leaf.event()).await {
            Some(Ok(Event::Began { conn })) => Input::Began(name, Conn(conn)),
            Some(Ok(Event::Done { conn, status, .. })) => {
                driver.answered(name, Conn(conn), status);
                Input::Done(name, Conn(conn))
            }
            Some(Ok(Event::Parked { conn })) => Input::Parked(name, Conn(conn)),
            Some(Ok(Event::Closed { conn })) => Input::Closed(name, Conn(conn)),
            Some(Err(error)) if !error.is_closed() => return Err(error.into()),
            Some(Err(_)) | None => return Ok(()),
        };
        driver.input(input);
    }
}

/// The leaf's process, readable once it has ended. A child of the leaf may keep the control channel
/// open, so its end alone does not tell.
fn exit_of(leaf: &sock_zygote::Loading) -> Result<AsyncFd<Rc<OwnedFd>>, LeafError> {
    let process = leaf
        .pidfd()
        .try_clone_to_owned()
        .and_then(|pidfd| register(Rc::new(pidfd)));
    process.map_err(LeafError::Watch)
}

/// What comes from the leaf; `None` when it has ended and all that it said has been heard.
async fn unless_ended<T>(
    process: &AsyncFd<Rc<OwnedFd>>,
    message: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(message);
    tokio::select! {
        biased;
        message = &mut message => Some(message),
        _ = process.readable() => tokio::time::timeout(LAST_MESSAGES, message).await.ok(),
    }
}

/// Gets a confined leaf: from a zygote, or, where there is none or it fails, from an interpreter.
async fn enter(
    driver: &Rc<Driver>,
    name: Leaf,
    slot: &Rc<Slot>,
    cgroup: &dyn LeafCgroup,
    streams: &Streams,
    begin: Instant,
) -> Result<((sock_zygote::Loading, bool), StartTimes), LeafError> {
    if let Some(zygote) = driver.zygote().await {
        match fork(driver, name, slot, (cgroup, streams), &*zygote, begin).await {
            Ok(entered) => return Ok(entered),
            Err(error) => {
                tracing::warn!(
                    leaf = name.0,
                    error = error.line(None),
                    "no leaf by fork: a plain interpreter is started"
                );
                if matches!(error, LeafError::Late { .. }) {
                    zygote.give_up();
                }
            }
        }
        wait_until_empty(name, cgroup).await;
    }
    interpreter(driver, name, slot, (cgroup, streams), begin).await
}

async fn fork(
    driver: &Rc<Driver>,
    name: Leaf,
    slot: &Rc<Slot>,
    (cgroup, streams): (&dyn LeafCgroup, &Streams),
    zygote: &dyn Zygote,
    begin: Instant,
) -> Result<((sock_zygote::Loading, bool), StartTimes), LeafError> {
    let forked = within("the fork", FORKED_WITHIN, zygote.fork(cgroup, streams)).await??;
    let sent = told(driver, name, slot, &forked.leaf)?;
    let told = micros(begin);
    let directory = cgroup.directory();
    let confined = forked
        .leaf
        .confined(directory.as_deref(), driver.oom_score_adj);
    let (loading, phases, listener) =
        within("the way into the pod", CONFINED_WITHIN, confined).await??;
    if let Some(listener) = listener {
        let task = tokio::task::spawn_local(zygote.serve_sockets(listener));
        slot.sockets.replace(Some(task.abort_handle()));
    }
    let origin = if forked.origin.is_some_and(|origin| origin.spare) {
        Origin::Spare
    } else {
        Origin::Fork
    };
    let fork = forked.origin.map_or(0, |origin| origin.micros);
    Ok(((loading, sent), times(origin, fork, told, begin, phases)))
}

async fn interpreter(
    driver: &Rc<Driver>,
    name: Leaf,
    slot: &Rc<Slot>,
    (cgroup, streams): (&dyn LeafCgroup, &Streams),
    begin: Instant,
) -> Result<((sock_zygote::Loading, bool), StartTimes), LeafError> {
    let (ours, theirs) = protocol::pair()?;
    set_socket_passcred(&ours, true).map_err(LeafError::Credentials)?;
    driver
        .interpreter
        .start(theirs, cgroup, streams)
        .await
        .map_err(LeafError::Interpreter)?;
    let leaf = Arrived::interpreter(ours)
        .await?
        .setup(&driver.cold.sealed(), &SetupFds::default())?;
    let sent = told(driver, name, slot, &leaf)?;
    let told = micros(begin);
    let (loading, phases, _) = leaf.confined(None, None).await?;
    Ok((
        (loading, sent),
        times(Origin::Interpreter, 0, told, begin, phases),
    ))
}

/// The leaf knows its Function: a connection may be sent behind. Whether one was.
fn told(driver: &Rc<Driver>, name: Leaf, slot: &Slot, leaf: &Confining) -> Result<bool, LeafError> {
    driver.input(Input::There(name));
    let mut sent = false;
    if let Some(conn) = unsent(slot, &mut sent)
        && let Some(socket) = driver.socket(conn)
    {
        leaf.queue(conn.0, socket.as_fd())?;
    }
    Ok(sent)
}

/// The connection given to the leaf early, once.
fn unsent(slot: &Slot, sent: &mut bool) -> Option<Conn> {
    let conn = slot.early.get().filter(|_| !*sent);
    *sent |= conn.is_some();
    conn
}

fn times(origin: Origin, fork: u64, told: u64, begin: Instant, phases: Vec<Phase>) -> StartTimes {
    let phases = phases
        .into_iter()
        .take(32)
        .map(|phase| (phase.name.chars().take(32).collect(), phase.micros))
        .collect();
    StartTimes {
        origin,
        fork,
        told,
        confined: micros(begin) - told,
        phases,
        import: 0,
        total: 0,
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

async fn within<T>(
    step: &'static str,
    limit: Duration,
    future: impl Future<Output = T>,
) -> Result<T, LeafError> {
    tokio::time::timeout(limit, future)
        .await
        .map_err(|_| LeafError::Late { step, limit })
}

/// Kills what is left in the cgroup and waits until it is gone: only then can nobody write to the
/// leaf's connection any more.
async fn wait_until_empty(leaf: Leaf, cgroup: &dyn LeafCgroup) {
    let until = Instant::now() + GONE_WITHIN;
    let mut pause = PAUSE.0;
    loop {
        match cgroup.is_empty() {
            Ok(true) => return,
            Ok(false) => kill(cgroup),
            Err(error) => {
                tracing::warn!(leaf = leaf.0, %error, "cannot tell whether a leaf is gone")
            }
        }
        if Instant::now() >= until {
            tracing::warn!(leaf = leaf.0, "processes of a leaf do not die");
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// The kernel keeps a cgroup busy for a moment after its last process.
async fn remove(leaf: Leaf, cgroup: &dyn LeafCgroup) {
    let until = Instant::now() + GONE_WITHIN;
    let mut pause = PAUSE.0;
    while let Err(error) = cgroup.remove() {
        if error.errno() != Some(libc::EBUSY) || Instant::now() >= until {
            tracing::warn!(leaf = leaf.0, %error, "cannot remove the cgroup of a leaf");
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}
