//! Who serves which connection, and when a leaf is made, frozen and ended: all decisions of
//! activation as one state machine.
//!
//! It does no I/O and reads no clock. Whoever drives it says what happened and when ([`Input`]), and
//! carries out the [`Action`]s in their order. A leaf's words are a tenant's words: one that names a
//! connection which it does not hold is not believed.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::keeping::Keeping;

pub use super::keeping::IdlePolicy;

/// How long a leaf may take to give back a connection that it has answered on, beyond the time after
/// which it parks by itself. One that is silent for longer serves nobody.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(10);
/// How long a leaf may take to exit, once asked to or once its only request is done.
const EXIT: Duration = Duration::from_secs(5);
/// A connection is handed to a leaf that still imports its handler if the last one took no longer
/// than this. Otherwise it waits in the queue, where a leaf that becomes free earlier can take it.
const QUICK_START: Duration = Duration::from_millis(20);
/// How often a connection is offered to leaves that end without having read from it.
const MOST_TRIES: u8 = 2;
/// First and longest pause between forks when leaves end before they are ready.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Names a connection for as long as the shim knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conn(pub u64);

/// Names a leaf; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Leaf(pub u64);

/// What becomes of a leaf after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// It serves the next one.
    Always,
    /// It exits: no request sees what another left behind.
    Never,
}

/// The limits that decisions keep to.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Most leaves that exist at once.
    pub instances: usize,
    /// Most leaves that are being started at once: more of them would only slow each other down.
    pub forks_at_once: usize,
    /// Most connections that wait for a leaf.
    pub queue: usize,
    /// See [`Reuse`].
    pub reuse: Reuse,
    /// From the hand-over, or from the start of a further request on the same connection, to its end.
    /// Also the longest wait in the queue.
    pub timeout: Duration,
    /// From the fork until the handler is imported.
    pub ready_within: Duration,
    /// An idle leaf is frozen after this.
    pub freeze_after: Duration,
    /// An idle leaf is ended after this, unless something else was learned.
    pub end_after: Duration,
    /// See [`IdlePolicy`]. A leaf that serves one request has no idle time to learn of.
    pub idle_policy: IdlePolicy,
    /// The leaf gives an idle connection back by itself after this.
    pub park_after: Duration,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// A leaf is wanted although nobody waits.
    Wanted,
    /// A watched connection has bytes to read.
    Readable(Conn),
    /// The leaf was told of its Function: what is sent to it from now on will be read once it is ready.
    There(Leaf),
    /// The leaf has imported the handler.
    Ready(Leaf),
    /// The leaf read the head of a request.
    Began(Leaf, Conn),
    /// The leaf says that it has answered.
    Done(Leaf, Conn),
    /// The leaf gave the connection back at a request boundary.
    Parked(Leaf, Conn),
    /// The connection ended in the leaf.
    Closed(Leaf, Conn),
    /// The leaf broke the protocol or does not take messages.
    Unruly(Leaf),
    /// Nothing of the leaf runs any more. `untouched`: no byte was read from the connection it held since the
    /// hand-over or the last answer.
    Ended {
        /// Which.
        leaf: Leaf,
        /// Whether the connection can be given to another leaf as it is.
        untouched: bool,
    },
    /// The node has little memory left: a leaf that is idle for so long already ends.
    Short(Duration),
    /// The pod is about to stop: an answer is the last on its connection.
    Drain,
    /// No further connection comes; what is there may take until then.
    Stop(Instant),
    /// A deadline may have passed.
    Tick,
}

/// What to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a leaf of this name.
    Fork(Leaf),
    /// Give the connection to the leaf.
    HandOver(Conn, Leaf),
    /// A request was answered, or a further one began, on a connection that the leaf holds: remember what was
    /// sent and read until now.
    Mark(Conn),
    /// Ask the leaf for the connection back.
    Park(Leaf, Conn),
    /// Have the leaf say with every answer that it is the last on its connection.
    Drain(Leaf),
    /// Wait for the next bytes on it.
    Watch(Conn),
    /// Answer it if its request has been sent nothing yet, and close it.
    Answer(Conn, Answer),
    /// Close it.
    Close(Conn),
    /// Stop the leaf's processes where they are.
    Freeze(Leaf),
    /// Let them run on.
    Thaw(Leaf),
    /// Ask the leaf to exit.
    End(Leaf),
    /// Kill everything of the leaf, frozen or not; [`Input::Ended`] must follow.
    Kill(Leaf),
}

/// Why the shim itself answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The queue is full.
    Overloaded,
    /// The leaf ended before it answered.
    Crashed,
    /// No leaf gets as far as having the handler imported.
    Unstartable,
    /// The request took, or would have waited, too long.
    TimedOut,
    /// The pod stops and the time for its last requests is over.
    Stopping,
}

/// Counts of what there is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Census {
    /// Leaves that exist in any state.
    pub leaves: usize,
    /// Of these, not ready yet.
    pub starting: usize,
    /// Of these, without a connection.
    pub idle: usize,
    /// Of the idle ones, frozen.
    pub frozen: usize,
    /// Connections that wait for a leaf.
    pub queued: usize,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    conn: Conn,
    since: Instant,
    tries: u8,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Starting {
        deadline: Instant,
        there: Option<Instant>,
    },
    Ready,
    /// Was asked to exit, or does so by itself.
    Leaving {
        deadline: Instant,
    },
    /// Was killed. The answer is for the request that it holds.
    Dying {
        verdict: Answer,
    },
}

#[derive(Debug, Clone, Copy)]
enum Request {
    /// The bytes of it were there at the hand-over.
    Handed {
        deadline: Instant,
    },
    UnderWay {
        deadline: Instant,
    },
    /// Answered; the connection is still with the leaf.
    Between {
        deadline: Instant,
    },
}

#[derive(Debug, Clone, Copy)]
struct Held {
    waited: Waiting,
    request: Request,
    park_asked: bool,
}

#[derive(Debug)]
struct LeafState {
    stage: Stage,
    held: Option<Held>,
    /// Was ready once.
    started: bool,
    /// Has seen a request.
    used: bool,
    idle_since: Instant,
    /// It was the one used last when it became idle: the next request gets it.
    next: bool,
    /// It was made, or kept, for a request that is expected until then.
    kept_until: Option<Instant>,
    frozen: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Dispatcher {
    rules: Rules,
    leaves: BTreeMap<Leaf, LeafState>,
    /// Idle leaves, the one used last at the end.
    idle: Vec<Leaf>,
    queue: VecDeque<Waiting>,
    next_leaf: u64,
    quick_start: bool,
    failures: u32,
    no_fork_before: Option<Instant>,
    keeping: Keeping,
    draining: bool,
    stop: Option<Instant>,
}

impl Dispatcher {
    /// Without leaves and connections.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let policy = match rules.reuse {
            Reuse::Always => rules.idle_policy,
            Reuse::Never => IdlePolicy::Fixed,
        };
        Dispatcher {
            keeping: Keeping::new(policy, rules.freeze_after, rules.end_after),
            rules,
            leaves: BTreeMap::new(),
            idle: Vec::new(),
            queue: VecDeque::new(),
            next_leaf: 0,
            quick_start: false,
            failures: 0,
            no_fork_before: None,
            draining: false,
            stop: None,
        }
    }

    /// Takes note of what happened at `now` and says what to do about it.
    pub fn apply(&mut self, now: Instant, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Wanted => {
                if self.leaves.is_empty() && !self.draining {
                    self.fork(now, None, &mut actions);
                }
            }
            Input::Readable(conn) => self.queue.push_back(Waiting {
                conn,
                since: now,
                tries: 0,
            }),
            Input::There(leaf) => {
                if let Some(Stage::Starting { there, .. }) = self.stage_mut(leaf) {
                    *there = Some(now);
                }
            }
            Input::Ready(leaf) => self.ready(now, leaf, &mut actions),
            Input::Began(leaf, conn) => self.began(now, leaf, conn, &mut actions),
            Input::Done(leaf, conn) => self.done(now, leaf, conn, &mut actions),
            Input::Parked(leaf, conn) => self.parked(now, leaf, conn, &mut actions),
            Input::Closed(leaf, conn) => {
                if self.release(now, leaf, conn).is_some() {
                    actions.push(Action::Close(conn));
                }
            }
            Input::Unruly(leaf) => self.kill(leaf, Answer::Crashed, &mut actions),
            Input::Ended { leaf, untouched } => self.ended(now, leaf, untouched, &mut actions),
            Input::Short(idle) => self.give_back(now, idle, &mut actions),
            Input::Drain => self.drain(&mut actions),
            Input::Stop(deadline) => {
                self.drain(&mut actions);
                self.stop = Some(self.stop.map_or(deadline, |known| known.min(deadline)));
            }
            Input::Tick => {}
        }
        self.expire(now, &mut actions);
        self.settle(now, &mut actions);
        if self.keeping.learns() {
            let busy = self.is_busy();
            if self.keeping.note(now, busy) {
                // Those that were kept for a request were kept for this one.
                for leaf in self.leaves.values_mut().filter(|_| busy) {
                    leaf.kept_until = None;
                }
                self.expire(now, &mut actions);
            }
            self.look_ahead(now, &mut actions);
        }
        actions
    }

    /// When [`Input::Tick`] is due at the latest; `None` while nothing depends on time.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let rules = &self.rules;
        let of_leaves = self.leaves.values().flat_map(|leaf| {
            let of_stage = match leaf.stage {
                Stage::Starting { deadline, .. } | Stage::Leaving { deadline } => Some(deadline),
                Stage::Ready if leaf.held.is_none() => {
                    let end = leaf.end(&self.keeping);
                    let freeze = leaf.idle_since + rules.freeze_after;
                    Some(if leaf.frozen { end } else { freeze.min(end) })
                }
                Stage::Ready | Stage::Dying { .. } => None,
            };
            let of_request = match leaf.stage {
                Stage::Dying { .. } => None,
                _ => leaf.held.map(|held| held.request.deadline()),
            };
            [of_stage, of_request]
        });
        let of_queue = self
            .queue
            .iter()
            .map(|waiting| waiting.since + rules.timeout)
            .min();
        let of_stop = self.stop.filter(|_| {
            !self.queue.is_empty() || self.leaves.values().any(|leaf| !leaf.is_dying())
        });
        let of_pause = self.no_fork_before.filter(|_| !self.queue.is_empty());
        of_leaves
            .flatten()
            .chain(of_queue)
            .chain(of_stop)
            .chain(of_pause)
            .chain(self.keeping.next())
            .min()
    }

    /// What there is now.
    #[must_use]
    pub fn census(&self) -> Census {
        let starting = self
            .leaves
            .values()
            .filter(|leaf| leaf.is_starting())
            .count();
        Census {
            leaves: self.leaves.len(),
            starting,
            idle: self.idle.len(),
            frozen: self.leaves.values().filter(|leaf| leaf.frozen).count(),
            queued: self.queue.len(),
        }
    }

    /// Whether nobody waits and no leaf is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty() && self.queue.is_empty()
    }

    /// Ends leaves that are idle for so long, and makes none ahead.
    fn give_back(&mut self, now: Instant, idle: Duration, actions: &mut Vec<Action>) {
        self.keeping.forgo();
        // One that is not even frozen yet would only be forked again.
        let idle = idle.max(self.rules.freeze_after);
        for leaf in self.idle.clone() {
            let since = self.leaves.get(&leaf).map(|state| state.idle_since);
            if since.is_some_and(|since| since + idle <= now) {
                self.end(now, leaf, actions);
            }
        }
    }

    /// Whether a request is under way, or waits.
    fn is_busy(&self) -> bool {
        let of_leaf = |held: Held| !matches!(held.request, Request::Between { .. });
        !self.queue.is_empty()
            || self
                .leaves
                .values()
                .any(|leaf| leaf.held.is_some_and(of_leaf))
    }

    /// Has a leaf there for a request that is expected.
    fn look_ahead(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(until) = self.keeping.due(now) else {
            return;
        };
        let last = self.idle.last().and_then(|leaf| self.leaves.get_mut(leaf));
        if let Some(idle) = last {
            idle.kept_until = Some(until);
        } else if self.leaves.len() < self.rules.instances
            && self.no_fork_before.is_none()
            && self.census().starting == 0
        {
            self.fork(now, Some(until), actions);
        }
    }

    fn stage_mut(&mut self, leaf: Leaf) -> Option<&mut Stage> {
        self.leaves.get_mut(&leaf).map(|state| &mut state.stage)
    }

    /// The request that `leaf` holds on `conn`, unless its word no longer counts.
    fn held_mut(&mut self, leaf: Leaf, conn: Conn) -> Option<&mut Held> {
        let state = self.leaves.get_mut(&leaf)?;
        if matches!(state.stage, Stage::Starting { .. } | Stage::Dying { .. }) {
            return None;
        }
        state.held.as_mut().filter(|held| held.waited.conn == conn)
    }

    /// A leaf that is not ready yet is told when it is, which is soon enough: it reads no request before.
    fn drain(&mut self, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.draining, true) {
            self.keeping.stop();
            let ready = self
                .leaves
                .iter()
                .filter(|(_, leaf)| matches!(leaf.stage, Stage::Ready));
            actions.extend(ready.map(|(name, _)| Action::Drain(*name)));
        }
    }

    fn ready(&mut self, now: Instant, leaf: Leaf, actions: &mut Vec<Action>) {
        let Some(state) = self.leaves.get_mut(&leaf) else {
            return;
        };
        let Stage::Starting { there, .. } = state.stage else {
            return;
        };
        self.quick_start =
            there.is_some_and(|there| now.saturating_duration_since(there) <= QUICK_START);
        self.failures = 0;
        self.no_fork_before = None;
        state.stage = Stage::Ready;
        state.started = true;
        if self.draining {
            actions.push(Action::Drain(leaf));
        }
        if state.held.is_none() {
            self.rest(now, leaf);
        }
    }

    /// The leaf has nothing to do from now on.
    fn rest(&mut self, now: Instant, leaf: Leaf) {
        for (name, state) in &mut self.leaves {
            state.next = *name == leaf;
        }
        if let Some(state) = self.leaves.get_mut(&leaf) {
            state.idle_since = now;
        }
        self.idle.push(leaf);
    }

    fn began(&mut self, now: Instant, leaf: Leaf, conn: Conn, actions: &mut Vec<Action>) {
        let timeout = self.rules.timeout;
        let Some(held) = self.held_mut(leaf, conn) else {
            return;
        };
        match held.request {
            Request::Handed { deadline } => held.request = Request::UnderWay { deadline },
            Request::Between { .. } => {
                held.request = Request::UnderWay {
                    deadline: now + timeout,
                };
                actions.push(Action::Mark(conn));
            }
            Request::UnderWay { .. } => {}
        }
        if let Some(state) = self.leaves.get_mut(&leaf) {
            state.used = true;
        }
    }

    fn done(&mut self, now: Instant, leaf: Leaf, conn: Conn, actions: &mut Vec<Action>) {
        let between = now + self.rules.park_after + BETWEEN_REQUESTS;
        let reuse = self.rules.reuse;
        let Some(held) = self.held_mut(leaf, conn) else {
            return;
        };
        if !matches!(held.request, Request::UnderWay { .. }) {
            return;
        }
        held.request = Request::Between { deadline: between };
        if reuse == Reuse::Always {
            actions.push(Action::Mark(conn));
        } else if let Some(stage) = self.stage_mut(leaf)
            && !matches!(stage, Stage::Leaving { .. })
        {
            *stage = Stage::Leaving {
                deadline: now + EXIT,
            };
        }
    }

    fn parked(&mut self, now: Instant, leaf: Leaf, conn: Conn, actions: &mut Vec<Action>) {
        let Some(held) = self.held_mut(leaf, conn) else {
            return;
        };
        if matches!(held.request, Request::UnderWay { .. }) {
            // The request was taken and not answered: only the end of the leaf makes sure that
            // nobody else writes to the connection.
            self.kill(leaf, Answer::Crashed, actions);
        } else if self.release(now, leaf, conn).is_some() {
            actions.push(Action::Watch(conn));
        }
    }

    /// Takes the connection from the leaf, which becomes idle if it may serve another.
    fn release(&mut self, now: Instant, leaf: Leaf, conn: Conn) -> Option<Held> {
        self.held_mut(leaf, conn)?;
        let state = self.leaves.get_mut(&leaf)?;
        let held = state.held.take();
        if matches!(state.stage, Stage::Ready) {
            if state.used && self.rules.reuse == Reuse::Never {
                state.stage = Stage::Leaving {
                    deadline: now + EXIT,
                };
            } else {
                self.rest(now, leaf);
            }
        }
        held
    }

    fn kill(&mut self, leaf: Leaf, verdict: Answer, actions: &mut Vec<Action>) {
        let Some(state) = self.leaves.get_mut(&leaf) else {
            return;
        };
        if state.is_dying() {
            return;
        }
        state.stage = Stage::Dying { verdict };
        state.frozen = false;
        self.idle.retain(|idle| *idle != leaf);
        actions.push(Action::Kill(leaf));
    }

    fn ended(&mut self, now: Instant, leaf: Leaf, untouched: bool, actions: &mut Vec<Action>) {
        let Some(state) = self.leaves.remove(&leaf) else {
            return;
        };
        self.idle.retain(|idle| *idle != leaf);
        // Of one that nobody waits for, nobody has to be told.
        if !state.started && self.stop.is_none() && state.kept_until.is_none() {
            self.failures += 1;
            let doublings = self.failures.saturating_sub(2).min(10);
            let pause = if self.failures == 1 {
                Duration::ZERO
            } else {
                (PAUSE.0 * (1 << doublings)).min(PAUSE.1)
            };
            self.no_fork_before = Some(now + pause);
        }
        if let Some(held) = state.held {
            let conn = held.waited.conn;
            let verdict = match state.stage {
                Stage::Dying { verdict } => verdict,
                _ => Answer::Crashed,
            };
            match held.request {
                // The client may be sending its next request at this moment.
                Request::Between { .. } if matches!(state.stage, Stage::Ready) => {
                    actions.push(if untouched {
                        Action::Watch(conn)
                    } else {
                        Action::Answer(conn, verdict)
                    });
                }
                Request::Between { .. } => actions.push(Action::Close(conn)),
                Request::Handed { .. }
                    if untouched
                        && verdict == Answer::Crashed
                        && held.waited.tries < MOST_TRIES =>
                {
                    self.queue.push_front(held.waited);
                }
                Request::Handed { .. } | Request::UnderWay { .. } => {
                    actions.push(Action::Answer(conn, verdict));
                }
            }
        }
        let hope = self.leaves.values().any(|leaf| !leaf.is_dying());
        if self.failures >= u32::from(MOST_TRIES) && !hope {
            actions.extend(
                self.queue
                    .drain(..)
                    .map(|w| Action::Answer(w.conn, Answer::Unstartable)),
            );
        }
    }

    /// Does what deadlines demand.
    fn expire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.stop.is_some_and(|stop| stop <= now) {
            actions.extend(
                self.queue
                    .drain(..)
                    .map(|w| Action::Answer(w.conn, Answer::Stopping)),
            );
            for leaf in self.leaves.keys().copied().collect::<Vec<_>>() {
                self.kill(leaf, Answer::Stopping, actions);
            }
        }
        let timeout = self.rules.timeout;
        self.queue.retain(|waiting| {
            let late = waiting.since + timeout <= now;
            if late {
                actions.push(Action::Answer(waiting.conn, Answer::TimedOut));
            }
            !late
        });
        for leaf in self.leaves.keys().copied().collect::<Vec<_>>() {
            self.expire_leaf(now, leaf, actions);
        }
    }

    fn expire_leaf(&mut self, now: Instant, leaf: Leaf, actions: &mut Vec<Action>) {
        let Some(state) = self.leaves.get_mut(&leaf) else {
            return;
        };
        if state.is_dying() {
            return;
        }
        if state
            .held
            .is_some_and(|held| held.request.deadline() <= now)
        {
            self.kill(leaf, Answer::TimedOut, actions);
            return;
        }
        match state.stage {
            Stage::Starting { deadline, .. } | Stage::Leaving { deadline } if deadline <= now => {
                self.kill(leaf, Answer::Crashed, actions);
            }
            Stage::Ready if state.held.is_none() => {
                if state.end(&self.keeping) <= now {
                    self.end(now, leaf, actions);
                } else if !state.frozen && state.idle_since + self.rules.freeze_after <= now {
                    state.frozen = true;
                    actions.push(Action::Freeze(leaf));
                }
            }
            _ => {}
        }
    }

    /// Asks an idle leaf to exit.
    fn end(&mut self, now: Instant, leaf: Leaf, actions: &mut Vec<Action>) {
        let Some(state) = self.leaves.get_mut(&leaf) else {
            return;
        };
        if std::mem::take(&mut state.frozen) {
            actions.push(Action::Thaw(leaf));
        }
        state.stage = Stage::Leaving {
            deadline: now + EXIT,
        };
        self.idle.retain(|idle| *idle != leaf);
        actions.push(Action::End(leaf));
    }

    /// Brings those who wait and those who could serve together.
    fn settle(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while !self.queue.is_empty()
            && let Some(leaf) = self.idle.pop().or_else(|| self.soon_ready())
            && let Some(waiting) = self.queue.pop_front()
        {
            self.hand_over(now, leaf, waiting, actions);
        }

        let mut unserved = self.queue.len();
        for (leaf, state) in &mut self.leaves {
            let Some(held) = &mut state.held else {
                unserved = unserved.saturating_sub(usize::from(state.is_starting()));
                continue;
            };
            let between = matches!(
                (state.stage, held.request),
                (Stage::Ready, Request::Between { .. })
            );
            if between && (unserved > 0 || self.draining) {
                // To take it back is quicker than a fork, and keeps an open but quiet connection from
                // occupying a leaf.
                if !held.park_asked {
                    held.park_asked = true;
                    actions.push(Action::Park(*leaf, held.waited.conn));
                }
                unserved = unserved.saturating_sub(1);
            }
        }
        if self.no_fork_before.is_some_and(|until| until <= now) {
            self.no_fork_before = None;
        }
        let mut starting = self.census().starting;
        while unserved > 0
            && self.no_fork_before.is_none()
            && starting < self.rules.forks_at_once
            && self.leaves.len() < self.rules.instances
        {
            self.fork(now, None, actions);
            starting += 1;
            unserved -= 1;
        }
        let held = self
            .leaves
            .values()
            .filter(|state| matches!(state.stage, Stage::Ready))
            .filter_map(|state| state.held);
        let asked = held
            .filter(|held| held.park_asked && !matches!(held.request, Request::Between { .. }))
            .count();
        unserved = if self.rules.reuse == Reuse::Always {
            unserved.saturating_sub(asked)
        } else {
            0
        };
        for (leaf, state) in &mut self.leaves {
            // Those who wait take turns with those whose connection never falls silent.
            if unserved > 0
                && matches!(state.stage, Stage::Ready)
                && let Some(held) = &mut state.held
                && !held.park_asked
            {
                held.park_asked = true;
                actions.push(Action::Park(*leaf, held.waited.conn));
                unserved -= 1;
            }
        }
        let room =
            self.rules.queue + usize::from(self.queue.front().is_some_and(|first| first.tries > 0));
        while self.queue.len() > room
            && let Some(last) = self.queue.pop_back()
        {
            actions.push(Action::Answer(last.conn, Answer::Overloaded));
        }
        if self.stop.is_some() && self.queue.is_empty() {
            for leaf in self.idle.clone() {
                self.end(now, leaf, actions);
            }
        }
    }

    /// A leaf that will have its handler imported in a moment and nothing to do then.
    fn soon_ready(&self) -> Option<Leaf> {
        let soon = |state: &LeafState| {
            matches!(state.stage, Stage::Starting { there: Some(_), .. }) && state.held.is_none()
        };
        if !self.quick_start {
            return None;
        }
        self.leaves
            .iter()
            .find(|(_, state)| soon(state))
            .map(|(leaf, _)| *leaf)
    }

    fn hand_over(
        &mut self,
        now: Instant,
        leaf: Leaf,
        mut waiting: Waiting,
        actions: &mut Vec<Action>,
    ) {
        let Some(state) = self.leaves.get_mut(&leaf) else {
            self.queue.push_front(waiting);
            return;
        };
        waiting.tries = waiting.tries.saturating_add(1);
        if std::mem::take(&mut state.frozen) {
            actions.push(Action::Thaw(leaf));
        }
        let request = Request::Handed {
            deadline: now + self.rules.timeout,
        };
        state.kept_until = None;
        state.held = Some(Held {
            waited: waiting,
            request,
            park_asked: false,
        });
        actions.push(Action::HandOver(waiting.conn, leaf));
    }

    fn fork(&mut self, now: Instant, kept_until: Option<Instant>, actions: &mut Vec<Action>) {
        let leaf = Leaf(self.next_leaf);
        self.next_leaf += 1;
        let stage = Stage::Starting {
            deadline: now + self.rules.ready_within,
            there: None,
        };
        let state = LeafState {
            stage,
            held: None,
            started: false,
            used: false,
            idle_since: now,
            next: false,
            kept_until,
            frozen: false,
        };
        self.leaves.insert(leaf, state);
        actions.push(Action::Fork(leaf));
    }
}

impl LeafState {
    /// When it ends if it stays idle.
    fn end(&self, keeping: &Keeping) -> Instant {
        keeping.end(self.idle_since, self.next, self.kept_until)
    }

    fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. })
    }

    fn is_dying(&self) -> bool {
        matches!(self.stage, Stage::Dying { .. })
    }
}

impl Request {
    fn deadline(self) -> Instant {
        match self {
            Request::Handed { deadline }
            | Request::UnderWay { deadline }
            | Request::Between { deadline } => deadline,
        }
    }
}

#[cfg(test)]
mod tests;
