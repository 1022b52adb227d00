//! What leaves say, in any order and with any lie, to the state machine that decides about connections. Two bytes a step.

#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use sock_shim::activation::decide::{
    Action, Conn, Dispatcher, IdlePolicy, Input, Leaf, Reuse, Rules,
};

/// The shim around the state machine, as far as its promises go: a leaf that is killed ends, a connection is offered once.
struct Shim {
    dispatcher: Dispatcher,
    now: Instant,
    /// Leaves that exist, and whether they were killed.
    leaves: BTreeMap<Leaf, bool>,
    /// Connections that the state machine has to answer for.
    inside: BTreeSet<Conn>,
    watched: BTreeSet<Conn>,
    instances: usize,
    queue: usize,
}

impl Shim {
    fn say(&mut self, input: Input) {
        let actions = self.dispatcher.apply(self.now, input);
        assert!(actions.len() <= 64 + 4 * (self.inside.len() + self.leaves.len()));
        for action in actions {
            match action {
                Action::Fork(leaf) => assert_eq!(self.leaves.insert(leaf, false), None),
                Action::Kill(leaf) => assert_eq!(self.leaves.insert(leaf, true), Some(false)),
                Action::Answer(conn, _) | Action::Close(conn) => assert!(self.inside.remove(&conn)),
                Action::Watch(conn) => {
                    assert!(self.inside.remove(&conn));
                    self.watched.insert(conn);
                }
                Action::HandOver(conn, leaf) => {
                    assert!(self.inside.contains(&conn));
                    assert_eq!(self.leaves.get(&leaf), Some(&false));
                }
                Action::Mark(_)
                | Action::Park(..)
                | Action::Drain(_)
                | Action::Freeze(_)
                | Action::Thaw(_)
                | Action::End(_) => {}
            }
        }
        let census = self.dispatcher.census();
        assert_eq!(census.leaves, self.leaves.len());
        assert!(census.leaves <= self.instances && census.queued <= self.queue + 1);
        assert!(
            self.dispatcher
                .next_deadline()
                .is_none_or(|at| at > self.now)
        );
    }
}

fuzz_target!(|input: &[u8]| {
    let [instances, queue, steps @ ..] = input else {
        return;
    };
    let rules = Rules {
        instances: 1 + usize::from(instances & 7),
        forks_at_once: 1 + usize::from(instances >> 6),
        queue: usize::from(queue & 15),
        reuse: if instances & 8 == 0 {
            Reuse::Always
        } else {
            Reuse::Never
        },
        timeout: Duration::from_secs(60),
        ready_within: Duration::from_secs(30),
        freeze_after: Duration::from_secs(1),
        end_after: Duration::from_secs(60),
        idle_policy: if instances & 16 == 0 {
            IdlePolicy::Fixed
        } else {
            IdlePolicy::Learned
        },
        park_after: Duration::from_millis(200),
    };
    let mut shim = Shim {
        instances: rules.instances,
        queue: rules.queue,
        dispatcher: Dispatcher::new(rules),
        now: Instant::now(),
        leaves: BTreeMap::new(),
        inside: BTreeSet::new(),
        watched: BTreeSet::new(),
    };
    let mut next = 0;
    for step in steps.as_chunks::<2>().0.iter().take(2_000) {
        let [verb, which] = *step;
        // Any leaf may name any connection, also such that do not exist.
        let (leaf, conn) = (Leaf(u64::from(which >> 4)), Conn(u64::from(which & 15)));
        match verb % 16 {
            0 | 1 => {
                shim.inside.insert(Conn(next));
                shim.say(Input::Readable(Conn(next)));
                next += 1;
            }
            2 => {
                if let Some(conn) = shim.watched.pop_first() {
                    shim.inside.insert(conn);
                    shim.say(Input::Readable(conn));
                }
            }
            3 => shim.say(Input::There(leaf)),
            4 => shim.say(Input::Ready(leaf)),
            5 | 6 => shim.say(Input::Began(leaf, conn)),
            7 | 8 => shim.say(Input::Done(leaf, conn)),
            9 => shim.say(Input::Parked(leaf, conn)),
            10 => shim.say(Input::Closed(leaf, conn)),
            11 => shim.say(Input::Unruly(leaf)),
            12 => {
                let untouched = which & 1 == 0;
                let named = shim.leaves.keys().nth(usize::from(which >> 1)).copied();
                if let Some(leaf) = named {
                    shim.leaves.remove(&leaf);
                    shim.say(Input::Ended { leaf, untouched });
                }
            }
            13 => {
                shim.now += Duration::from_millis(50) * u32::from(which);
                shim.say(Input::Tick);
            }
            14 => shim.say(match which & 3 {
                0 => Input::Wanted,
                1 => Input::Drain,
                _ => Input::Short(Duration::from_millis(50) * u32::from(which)),
            }),
            _ => {
                let grace = Duration::from_secs(u64::from(which));
                shim.say(Input::Stop(shim.now + grace));
            }
        }
    }
    // Whatever was said, a stop comes to its end and everyone is answered.
    shim.say(Input::Stop(shim.now));
    for leaf in shim.leaves.keys().copied().collect::<Vec<_>>() {
        assert_eq!(shim.leaves.remove(&leaf), Some(true));
        shim.say(Input::Ended {
            leaf,
            untouched: false,
        });
    }
    assert!(shim.dispatcher.is_empty() && shim.inside.is_empty());
});
