//! Carries out what [`super::decide`] decides, and tells it what happened.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use rustix::io::Errno;
use sock_zygote::protocol::LeafExtras;
use tokio::sync::{Notify, oneshot};

use super::answers::{Overloads, request_id};
use super::cgroups::LeafCgroups;
use super::connections::{Connections, Peeked, Watch, peek, readable};
use super::decide::{Action, Answer, Conn, Dispatcher, Input, Leaf, Rules};
use super::end::End;
use super::leaf::{self, Origin, Slot, StartTimes};
use super::listener::{Accepted, Listener};
use super::output::Output;
use super::zygotes::{Interpreter, Told, Zygote, Zygotes};

/// When descriptors run out, accepting goes on after this.
const EXHAUSTED: Duration = Duration::from_millis(50);
/// A client that connected or had its answer just before the stop may still send its request.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Connections taken from the kernel before others get their turn.
const ACCEPT_AT_ONCE: usize = 64;

/// Numbers since the start.
#[derive(Debug, Default, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Counts {
    /// Requests by status: those of leaves by the leaves' word, and the shim's own.
    pub(super) requests: BTreeMap<u16, u64>,
    pub(super) forks: u64,
    pub(super) spares: u64,
    pub(super) cold_starts: u64,
    pub(super) failed_starts: u64,
    pub(super) last_start: Option<StartTimes>,
}

/// See the module.
pub(super) struct Driver {
    dispatcher: RefCell<Dispatcher>,
    connections: RefCell<Connections>,
    leaves: RefCell<HashMap<Leaf, Rc<Slot>>>,
    /// What happened while a decision was being carried out.
    inbox: RefCell<VecDeque<Input>>,
    busy: Cell<bool>,
    /// When the timer rings.
    armed: Cell<Option<Instant>>,
    rearm: Notify,
    changed: Notify,
    /// A leaf was frozen.
    pub(super) froze: Notify,
    closing: Notify,
    stopping: Cell<bool>,
    /// No further request is waited for.
    over: Cell<bool>,
    leaf_tasks: Cell<usize>,
    pub(super) counts: RefCell<Counts>,
    first: RefCell<Option<oneshot::Sender<Result<(), String>>>>,
    pub(super) cgroups: Rc<dyn LeafCgroups>,
    pub(super) output: Rc<Output>,
    /// The connection of a leaf whose end is being dealt with, and how that ended.
    ending: Cell<Option<(Conn, End)>>,
    pub(super) interpreter: Rc<dyn Interpreter>,
    pub(super) cold: Told,
    pub(super) oom_score_adj: Option<i32>,
    zygotes: Option<Rc<dyn Zygotes>>,
    overloads: RefCell<Overloads>,
}

impl Driver {
    pub(super) fn new(
        rules: Rules,
        zygotes: Option<Rc<dyn Zygotes>>,
        interpreter: Rc<dyn Interpreter>,
        cgroups: Rc<dyn LeafCgroups>,
        output: Rc<Output>,
        cold: Told,
        oom_score_adj: Option<i32>,
    ) -> Driver {
        Driver {
            dispatcher: RefCell::new(Dispatcher::new(rules)),
            connections: RefCell::default(),
            leaves: RefCell::default(),
            inbox: RefCell::default(),
            busy: Cell::new(false),
            armed: Cell::new(None),
            rearm: Notify::new(),
            changed: Notify::new(),
            froze: Notify::new(),
            closing: Notify::new(),
            stopping: Cell::new(false),
            over: Cell::new(false),
            leaf_tasks: Cell::new(0),
            counts: RefCell::default(),
            first: RefCell::new(None),
            cgroups,
            output,
            ending: Cell::new(None),
            interpreter,
            cold,
            oom_score_adj,
            zygotes,
            overloads: RefCell::default(),
        }
    }

    /// Decides about `input` and acts. What acting brings about is decided right after.
    pub(super) fn input(self: &Rc<Self>, input: Input) {
        self.inbox.borrow_mut().push_back(input);
        if self.busy.replace(true) {
            return;
        }
        loop {
            let Some(input) = self.inbox.borrow_mut().pop_front() else {
                break;
            };
            let actions = self.dispatcher.borrow_mut().apply(now(), input);
            for action in actions {
                self.perform(action);
            }
        }
        self.busy.set(false);
        self.changed.notify_waiters();
        let next = self.dispatcher.borrow().next_deadline();
        // A timer that rings early does no harm, so only an earlier deadline matters.
        if next.is_some_and(|next| self.armed.get().is_none_or(|armed| next < armed)) {
            self.armed.set(next);
            self.rearm.notify_one();
        }
    }

    fn perform(self: &Rc<Self>, action: Action) {
        match action {
            Action::Fork(name) => self.start_leaf(name),
            Action::HandOver(conn, leaf) => self.hand_over(conn, leaf),
            Action::Mark(conn) => self.connections.borrow_mut().mark(conn),
            Action::Park(leaf, conn) => self.tell(leaf, |to| to.park(conn.0)),
            Action::Drain(leaf) => self.tell(leaf, sock_zygote::Leaf::drain),
            Action::End(leaf) => self.tell(leaf, sock_zygote::Leaf::exit),
            Action::Watch(conn) => self.watch(conn, Watch::Parked),
            Action::Answer(conn, answer) => self.answer(conn, answer),
            Action::Close(conn) => self.connections.borrow_mut().close(conn),
            Action::Freeze(leaf) => {
                if let Some(Err(error)) = self.cgroup(leaf, |cgroup| cgroup.freeze()) {
                    tracing::warn!(leaf = leaf.0, %error, "an idle leaf is not frozen");
                }
                self.froze.notify_one();
            }
            Action::Thaw(leaf) => {
                if let Some(Err(error)) = self.cgroup(leaf, |cgroup| cgroup.thaw()) {
                    tracing::warn!(leaf = leaf.0, %error, "a leaf does not go on");
                    self.input(Input::Unruly(leaf));
                }
            }
            Action::Kill(leaf) => {
                if let Some(slot) = self.slot(leaf) {
                    slot.kill();
                }
            }
        }
    }

    fn slot(&self, leaf: Leaf) -> Option<Rc<Slot>> {
        self.leaves.borrow().get(&leaf).cloned()
    }

    fn cgroup<T>(
        &self,
        leaf: Leaf,
        act: impl FnOnce(&dyn super::cgroups::LeafCgroup) -> T,
    ) -> Option<T> {
        let slot = self.slot(leaf)?;
        let cgroup = slot.cgroup.borrow().clone()?;
        Some(act(&*cgroup))
    }

    /// Sends to a leaf that serves. One that takes no message is of no use any more.
    fn tell(
        self: &Rc<Self>,
        name: Leaf,
        say: impl FnOnce(&sock_zygote::Leaf) -> sock_zygote::Result<()>,
    ) {
        let Some(slot) = self.slot(name) else { return };
        let Some(leaf) = slot.leaf.borrow().clone() else {
            return;
        };
        if let Err(error) = say(&leaf) {
            // A leaf that has ended says so on its own channel, with all it said before.
            if !error.is_closed() {
                tracing::warn!(leaf = name.0, %error, "leaf takes no messages");
                self.input(Input::Unruly(name));
            }
        }
    }

    fn start_leaf(self: &Rc<Self>, name: Leaf) {
        let slot = Rc::new(Slot::default());
        self.leaves.borrow_mut().insert(name, Rc::clone(&slot));
        self.leaf_tasks.set(self.leaf_tasks.get() + 1);
        let driver = Rc::clone(self);
        tokio::task::spawn_local(async move {
            leaf::run(Rc::clone(&driver), name, slot).await;
            driver.leaf_tasks.set(driver.leaf_tasks.get() - 1);
            driver.changed.notify_waiters();
        });
    }

    fn hand_over(self: &Rc<Self>, conn: Conn, name: Leaf) {
        self.connections.borrow_mut().mark(conn);
        let Some(slot) = self.slot(name) else { return };
        slot.held.set(Some(conn));
        if slot.leaf.borrow().is_none() {
            slot.early.set(Some(conn));
        } else if let Some(socket) = self.socket(conn) {
            self.tell(name, |leaf| leaf.serve(conn.0, socket.as_fd()));
        }
    }

    /// The socket of a connection that is with a leaf.
    pub(super) fn socket(&self, conn: Conn) -> Option<Rc<OwnedFd>> {
        self.connections.borrow().socket(conn)
    }

    fn answer(&self, conn: Conn, answer: Answer) {
        let id = request_id();
        let ending = self.ending.get().filter(|(of, _)| *of == conn);
        let error = answer.error(ending.map(|(_, end)| end));
        let response = answer.render(&error, &id, SystemTime::now());
        let sent = self.connections.borrow_mut().answer(conn, &response);
        *self
            .counts
            .borrow_mut()
            .requests
            .entry(answer.status())
            .or_default() += 1;
        let status = answer.status();
        let others = if answer == Answer::Overloaded {
            tracing::debug!(conn = conn.0, request = %id, status, "the queue is full");
            let Some(others) = self.overloads.borrow_mut().count(now()) else {
                return;
            };
            others
        } else {
            tracing::warn!(conn = conn.0, request = %id, status, reason = %error, sent, "answered in a leaf's place");
            0
        };
        let others = match others {
            0 => String::new(),
            others => format!(", as {others} were before it"),
        };
        let output = Rc::clone(&self.output);
        tokio::task::spawn_local(async move {
            let line = format!("sock: request {id}: {error}: answered with {status}{others}");
            output.say(&line).await;
        });
    }

    /// Waits for bytes on a connection, with a limit on how long and on how many wait.
    fn watch(self: &Rc<Self>, conn: Conn, watch: Watch) {
        let Some(socket) = self.socket(conn) else {
            return;
        };
        match peek(&socket) {
            Peeked::Bytes => {
                self.connections.borrow_mut().unwatch(conn);
                self.input(Input::Readable(conn));
                return;
            }
            Peeked::Nothing if !self.over.get() => {}
            Peeked::Nothing | Peeked::End => {
                self.connections.borrow_mut().close(conn);
                return;
            }
        }
        let driver = Rc::clone(self);
        let until = tokio::time::Instant::now() + watch.limit();
        let task = tokio::task::spawn_local(async move {
            let found = readable(socket, until).await;
            driver.connections.borrow_mut().unwatch(conn);
            match found {
                Ok(Peeked::Bytes) => driver.input(Input::Readable(conn)),
                Ok(_) => driver.drop_connection(conn),
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be watched");
                    driver.drop_connection(conn);
                }
            }
        });
        let crowded_out = self
            .connections
            .borrow_mut()
            .watched(conn, watch, task.abort_handle());
        if let Some(conn) = crowded_out {
            self.drop_connection(conn);
        }
    }

    /// Closes a connection on which no request is, as of now.
    fn end_of_patience(self: &Rc<Self>, conn: Conn) {
        let bytes = self
            .socket(conn)
            .is_some_and(|socket| peek(&socket) == Peeked::Bytes);
        if bytes {
            self.connections.borrow_mut().unwatch(conn);
            self.input(Input::Readable(conn));
        } else {
            self.drop_connection(conn);
        }
    }

    fn drop_connection(&self, conn: Conn) {
        self.connections.borrow_mut().close(conn);
        self.changed.notify_waiters();
    }

    /// Accepts until the stop, then what has connected by then.
    pub(super) async fn accept(self: Rc<Self>, listener: Listener) {
        let mut taken = 0;
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.closing.notified() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(Accepted::Connection(socket)) => self.take_in(socket),
                Ok(Accepted::Nothing) => {}
                Ok(Accepted::Failed(errno)) => self.make_room(errno).await,
                Err(error) => {
                    tracing::error!(%error, "the pod's socket cannot be watched: no further connections");
                    return;
                }
            }
            taken += 1;
            if taken % ACCEPT_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        while let Accepted::Connection(socket) = listener.take() {
            self.take_in(socket);
        }
    }

    fn take_in(self: &Rc<Self>, socket: OwnedFd) {
        let conn = self.connections.borrow_mut().add(socket);
        self.watch(conn, Watch::Silent);
    }

    async fn make_room(&self, errno: Errno) {
        let least_needed = self.connections.borrow().least_needed();
        tracing::warn!(%errno, connections = self.connections.borrow().len(), "cannot accept a connection");
        if let Some(conn) = least_needed {
            self.drop_connection(conn);
        }
        tokio::time::sleep(EXHAUSTED).await;
    }

    /// Tells the dispatcher when its deadlines have come.
    pub(super) async fn keep_time(self: Rc<Self>) {
        loop {
            let rings = async {
                match self.armed.get() {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.rearm.notified() => {}
                () = rings => {
                    self.armed.set(None);
                    self.input(Input::Tick);
                }
            }
        }
    }

    /// A zygote to fork from, if one is there now.
    pub(super) async fn zygote(&self) -> Option<Rc<dyn Zygote>> {
        match &self.zygotes {
            Some(zygotes) => zygotes.attach().await,
            None => None,
        }
    }

    /// Whether what was looked for last is there, but has no zygote at present.
    pub(super) fn zygotes_rest(&self) -> bool {
        let zygotes = self.zygotes.as_ref();
        zygotes.is_some_and(|zygotes| zygotes.are_resting())
    }

    /// Has one leaf started, and waits until it is ready.
    pub(super) async fn first_leaf(self: &Rc<Self>) -> Result<(), String> {
        let (sender, receiver) = oneshot::channel();
        self.first.replace(Some(sender));
        self.input(Input::Wanted);
        receiver
            .await
            .unwrap_or_else(|_| Err("the pod is stopping".to_owned()))
    }

    /// Whether the leaf that is being started is the first, which alone no request comes before.
    pub(super) fn keeps_compiled(&self) -> bool {
        self.first.borrow().is_some()
    }

    /// What leaves are told from here on besides their setup.
    fn tell_leaves(&self, extras: &LeafExtras) {
        let forked = self.zygotes.as_ref();
        let told = [
            self.cold.besides(extras),
            forked.map_or(Ok(()), |zygotes| zygotes.tell_leaves(extras)),
        ];
        for error in told.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "every leaf compiles its handler by itself");
        }
    }

    /// `compiled`: the handler's module, from the first leaf.
    pub(super) fn started(&self, leaf: Leaf, times: StartTimes, compiled: Option<Vec<u8>>) {
        tracing::debug!(
            leaf = leaf.0, origin = ?times.origin, fork = times.fork, told = times.told, confined = times.confined,
            import = times.import, total = times.total, phases = ?times.phases, "leaf ready (microseconds)"
        );
        let mut counts = self.counts.borrow_mut();
        match times.origin {
            Origin::Fork => counts.forks += 1,
            Origin::Spare => {
                counts.forks += 1;
                counts.spares += 1;
            }
            Origin::Interpreter => counts.cold_starts += 1,
        }
        counts.last_start = Some(times);
        drop(counts);
        if let Some(first) = self.first.take() {
            self.tell_leaves(&LeafExtras {
                keep_compiled: false,
                compiled: compiled.unwrap_or_default(),
            });
            let _ = first.send(Ok(()));
        }
    }

    pub(super) fn failed(&self, leaf: Leaf, line: &str) {
        if self.stopping.get() {
            return;
        }
        tracing::warn!(leaf = leaf.0, error = line, "leaf did not get ready");
        self.counts.borrow_mut().failed_starts += 1;
        if let Some(first) = self.first.take() {
            let _ = first.send(Err(line.to_owned()));
        }
    }

    pub(super) fn answered(&self, leaf: Leaf, conn: Conn, status: u16) {
        let held = self
            .slot(leaf)
            .is_some_and(|slot| slot.held.get() == Some(conn));
        if held && (100..600).contains(&status) {
            *self.counts.borrow_mut().requests.entry(status).or_default() += 1;
        }
    }

    pub(super) fn ended(self: &Rc<Self>, leaf: Leaf, slot: &Slot) {
        self.leaves.borrow_mut().remove(&leaf);
        let held = slot.held.get();
        let untouched = held.is_some_and(|conn| self.connections.borrow().untouched(conn));
        self.ending.set(held.zip(slot.end.get()));
        self.input(Input::Ended { leaf, untouched });
        self.ending.set(None);
    }

    pub(super) fn census(&self) -> super::decide::Census {
        self.dispatcher.borrow().census()
    }

    pub(super) fn open_connections(&self) -> usize {
        self.connections.borrow().len()
    }

    /// See [`super::Activation::drain`].
    pub(super) fn drain(self: &Rc<Self>) {
        self.input(Input::Drain);
    }

    /// Ends [`Driver::accept`]; what has connected by then is taken in.
    pub(super) fn close(&self) {
        self.stopping.set(true);
        self.closing.notify_one();
    }

    /// Lets what is under way finish until `deadline`, then ends everything.
    pub(super) async fn stop(self: &Rc<Self>, deadline: Instant) {
        self.stopping.set(true);
        self.drain();
        let patience = tokio::time::Instant::from_std(deadline.min(now() + LAST_WORDS));
        let quiet = || {
            let connections = self.connections.borrow();
            [Watch::Silent, Watch::Parked]
                .map(|watch| connections.all_watched(watch))
                .concat()
        };
        let _ = tokio::time::timeout_at(patience, self.until(|| quiet().is_empty())).await;
        self.over.set(true);
        for conn in quiet() {
            self.end_of_patience(conn);
        }
        self.input(Input::Stop(deadline));
        self.until(|| self.dispatcher.borrow().is_empty() && self.leaf_tasks.get() == 0)
            .await;
    }

    async fn until(&self, condition: impl Fn() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition() {
                return;
            }
            changed.await;
        }
    }
}

/// The runtime's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
