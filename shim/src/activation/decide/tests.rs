use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

fn rules() -> Rules {
    Rules {
        instances: 2,
        forks_at_once: 4,
        queue: 3,
        reuse: Reuse::Always,
        timeout: 10 * SECOND,
        ready_within: 30 * SECOND,
        freeze_after: SECOND,
        end_after: 60 * SECOND,
        idle_policy: IdlePolicy::Fixed,
        park_after: 100 * MILLI,
    }
}

/// A dispatcher with a clock that the test moves.
struct Bench {
    dispatcher: Dispatcher,
    now: Instant,
}

impl Bench {
    fn new(rules: Rules) -> Self {
        Bench {
            dispatcher: Dispatcher::new(rules),
            now: Instant::now(),
        }
    }

    fn say(&mut self, input: Input) -> Vec<Action> {
        self.dispatcher.apply(self.now, input)
    }

    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.say(Input::Tick)
    }

    /// A leaf that took long to import its handler and is idle now.
    fn idle_leaf(&mut self) -> Leaf {
        let leaf = match self.say(Input::Wanted)[..] {
            [Action::Fork(leaf)] => leaf,
            ref other => panic!("{other:?}"),
        };
        assert_eq!(self.say(Input::There(leaf)), []);
        self.now += SECOND;
        assert_eq!(self.say(Input::Ready(leaf)), []);
        leaf
    }

    /// A leaf with the connection, its request read.
    fn busy_leaf(&mut self, conn: Conn) -> Leaf {
        let leaf = self.idle_leaf();
        assert_eq!(
            self.say(Input::Readable(conn)),
            [Action::HandOver(conn, leaf)]
        );
        assert_eq!(self.say(Input::Began(leaf, conn)), []);
        leaf
    }
}

fn ended(leaf: Leaf) -> Input {
    Input::Ended {
        leaf,
        untouched: false,
    }
}

const A: Conn = Conn(1);
const B: Conn = Conn(2);
const C: Conn = Conn(3);

#[test]
fn an_activation_without_leaves_forks_and_is_served_when_the_leaf_is_ready() {
    let mut bench = Bench::new(rules());
    assert_eq!(bench.say(Input::Readable(A)), [Action::Fork(Leaf(0))]);
    assert_eq!(bench.say(Input::There(Leaf(0))), []);
    assert_eq!(
        bench.say(Input::Ready(Leaf(0))),
        [Action::HandOver(A, Leaf(0))]
    );
}

#[test]
fn a_connection_goes_ahead_of_a_handler_that_imports_quickly() {
    let mut bench = Bench::new(Rules {
        reuse: Reuse::Never,
        ..rules()
    });
    bench.say(Input::Readable(A));
    bench.say(Input::There(Leaf(0)));
    bench.now += 2 * MILLI;
    bench.say(Input::Ready(Leaf(0)));
    assert_eq!(bench.say(Input::Readable(B)), [Action::Fork(Leaf(1))]);
    assert_eq!(
        bench.say(Input::There(Leaf(1))),
        [Action::HandOver(B, Leaf(1))]
    );
    assert_eq!(bench.say(Input::Ready(Leaf(1))), []);
}

#[test]
fn a_connection_sent_ahead_is_served_by_another_leaf_if_the_first_never_gets_ready() {
    let mut bench = Bench::new(Rules {
        reuse: Reuse::Never,
        ..rules()
    });
    bench.say(Input::Readable(A));
    bench.say(Input::There(Leaf(0)));
    bench.say(Input::Ready(Leaf(0)));
    bench.say(Input::Readable(B));
    bench.say(Input::There(Leaf(1)));
    let actions = bench.say(Input::Ended {
        leaf: Leaf(1),
        untouched: true,
    });
    assert_eq!(actions, [Action::Fork(Leaf(2))]);
    assert_eq!(
        bench.say(Input::There(Leaf(2))),
        [Action::HandOver(B, Leaf(2))]
    );
    assert_eq!(
        bench.say(Input::Ended {
            leaf: Leaf(2),
            untouched: true
        }),
        [Action::Answer(B, Answer::Crashed)],
        "a connection is not offered for ever"
    );
}

#[test]
fn the_leaf_used_last_is_taken_first() {
    let mut bench = Bench::new(rules());
    bench.say(Input::Readable(A));
    bench.say(Input::Readable(B));
    for leaf in [Leaf(0), Leaf(1)] {
        bench.now += SECOND / 2;
        bench.say(Input::There(leaf));
        bench.now += SECOND / 2;
        bench.say(Input::Ready(leaf));
    }
    for (leaf, conn) in [(Leaf(1), B), (Leaf(0), A)] {
        bench.say(Input::Began(leaf, conn));
        bench.say(Input::Done(leaf, conn));
        assert_eq!(bench.say(Input::Parked(leaf, conn)), [Action::Watch(conn)]);
    }
    assert_eq!(
        bench.say(Input::Readable(C)),
        [Action::HandOver(C, Leaf(0))]
    );
}

#[test]
fn an_idle_leaf_is_frozen_then_thawed_for_a_request_and_ended_at_last() {
    let mut bench = Bench::new(rules());
    let leaf = bench.idle_leaf();
    assert_eq!(bench.after(999 * MILLI), []);
    assert_eq!(bench.after(MILLI), [Action::Freeze(leaf)]);
    assert_eq!(
        bench.say(Input::Readable(A)),
        [Action::Thaw(leaf), Action::HandOver(A, leaf)]
    );
    bench.say(Input::Began(leaf, A));
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Closed(leaf, A)), [Action::Close(A)]);
    assert_eq!(bench.after(SECOND), [Action::Freeze(leaf)]);
    assert_eq!(
        bench.after(59 * SECOND),
        [Action::Thaw(leaf), Action::End(leaf)]
    );
    assert_eq!(
        bench.after(EXIT),
        [Action::Kill(leaf)],
        "it does not exit by itself"
    );
    assert_eq!(bench.say(ended(leaf)), []);
    assert!(bench.dispatcher.is_empty());
    assert_eq!(bench.dispatcher.next_deadline(), None);
}

fn learned() -> Rules {
    Rules {
        idle_policy: IdlePolicy::Learned,
        ..rules()
    }
}

impl Bench {
    /// Lets time pass tick by tick, as the driver does, each leaf doing at once what it is told. Yields what was to be done
    /// and when, in milliseconds from here.
    fn pass(&mut self, time: Duration) -> Vec<(u128, Action)> {
        let (begin, end) = (self.now, self.now + time);
        let mut done = Vec::new();
        while let Some(next) = self.dispatcher.next_deadline().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            let mut todo: VecDeque<Action> = self.say(Input::Tick).into();
            while let Some(action) = todo.pop_front() {
                done.push((self.now.duration_since(begin).as_millis(), action));
                todo.extend(match action {
                    Action::Fork(leaf) => {
                        self.say(Input::There(leaf));
                        self.say(Input::Ready(leaf))
                    }
                    Action::End(leaf) => self.say(ended(leaf)),
                    _ => Vec::new(),
                });
            }
        }
        self.now = end;
        done
    }

    /// One request at this moment, which takes none of the time. Yields whether a leaf was there.
    fn request(&mut self, conn: Conn) -> bool {
        let mut actions = self.say(Input::Readable(conn));
        let cold = match actions[..] {
            [Action::Fork(leaf)] => Some(leaf),
            _ => None,
        };
        if let Some(leaf) = cold {
            actions = self.say(Input::There(leaf));
            actions.extend(self.say(Input::Ready(leaf)));
        }
        let Some(Action::HandOver(_, leaf)) = actions.last().copied() else {
            panic!("{actions:?}");
        };
        for input in [Input::Began(leaf, conn), Input::Done(leaf, conn)] {
            self.say(input);
        }
        assert_eq!(self.say(Input::Closed(leaf, conn)), [Action::Close(conn)]);
        cold.is_none()
    }
}

#[test]
fn a_leaf_is_made_ahead_of_the_request_that_is_expected_and_not_kept_until_then() {
    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    // Known by now.
    bench.request(A);
    let done = bench.pass(599 * SECOND);
    let [
        (ended, Action::End(_)),
        (made, Action::Fork(ahead)),
        (frozen, Action::Freeze(_)),
    ] = done[..]
    else {
        panic!("{done:?}");
    };
    assert_eq!((ended, frozen), (1_000, made + 1_000));
    assert!((300_000..600_000).contains(&made), "{done:?}");
    bench.now += SECOND;
    assert_eq!(
        bench.say(Input::Readable(B)),
        [Action::Thaw(ahead), Action::HandOver(B, ahead)]
    );
}

#[test]
fn a_leaf_that_was_made_in_vain_ends_and_is_the_last() {
    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    bench.request(A);
    let done = bench.pass(24 * 3600 * SECOND);
    let forks = done.iter().filter(|(_, a)| matches!(a, Action::Fork(_)));
    let ends = done.iter().filter(|(_, a)| matches!(a, Action::End(_)));
    assert_eq!((forks.count(), ends.count()), (1, 2), "{done:?}");
    assert!(bench.dispatcher.is_empty());
    assert_eq!(bench.dispatcher.next_deadline(), None);
}

#[test]
fn requests_that_come_soon_keep_their_leaf_and_give_it_up_sooner() {
    let mut bench = Bench::new(learned());
    bench.request(A);
    for n in 0..60 {
        // Some come at once, and none after more than three seconds.
        bench.pass(50 * MILLI * (1 + u32::try_from(n * n % 60).expect("small")));
        assert!(bench.request(Conn(10 + n)), "after {n} requests");
    }
    let done = bench.pass(60 * SECOND);
    let [
        (1_000, Action::Freeze(_)),
        (thawed, Action::Thaw(_)),
        (_, Action::End(_)),
    ] = done[..]
    else {
        panic!("{done:?}");
    };
    assert!((2_500..10_000).contains(&thawed), "{done:?}");
}

#[test]
fn what_is_not_known_is_kept_as_long_as_is_said() {
    let mut bench = Bench::new(learned());
    bench.request(A);
    let done = bench.pass(100 * SECOND);
    assert_eq!(done.last().map(|(at, _)| *at), Some(60_000), "{done:?}");
}

#[test]
fn the_wait_for_the_first_request_says_nothing() {
    let mut bench = Bench::new(learned());
    bench.idle_leaf();
    bench.pass(200 * MILLI);
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    bench.request(A);
    let done = bench.pass(599 * SECOND);
    assert!(
        matches!(
            done[..],
            [(1_000, Action::End(_)), (_, Action::Fork(_)), ..]
        ),
        "{done:?}"
    );
}

/// Two requests at once, each of a leaf of its own, and their end.
fn two_at_once(bench: &mut Bench) {
    for conn in [A, B] {
        bench.say(Input::Readable(conn));
    }
    let both: Vec<Leaf> = bench.dispatcher.leaves.keys().copied().collect();
    for leaf in &both {
        bench.say(Input::There(*leaf));
        bench.say(Input::Ready(*leaf));
    }
    for (leaf, held) in both
        .iter()
        .map(|leaf| (*leaf, bench.dispatcher.leaves[leaf].held))
        .collect::<Vec<_>>()
    {
        let conn = held.expect("both serve").waited.conn;
        for input in [
            Input::Began(leaf, conn),
            Input::Done(leaf, conn),
            Input::Closed(leaf, conn),
        ] {
            bench.say(input);
        }
    }
}

#[test]
fn leaves_for_requests_that_come_at_once_end_as_is_said() {
    let mut bench = Bench::new(learned());
    for n in 0..30 {
        bench.request(Conn(n));
        bench.pass(if n % 3 == 0 {
            1200 * SECOND
        } else {
            SECOND / 10
        });
    }
    two_at_once(&mut bench);
    let done = bench.pass(61 * SECOND);
    let ended: Vec<u128> = done
        .iter()
        .filter(|(_, action)| matches!(action, Action::End(_)))
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(ended, [60_000], "one is kept for the next: {done:?}");
}

#[test]
fn the_end_of_the_one_used_last_is_none_of_those_below_it() {
    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    two_at_once(&mut bench);
    let done = bench.pass(61 * SECOND);
    let ended: Vec<u128> = done
        .iter()
        .filter(|(_, action)| matches!(action, Action::End(_)))
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(ended, [1_000, 60_000], "{done:?}");
}

#[test]
fn one_that_is_there_for_an_expected_request_is_not_ended_sooner_for_that() {
    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(5 * SECOND);
    }
    two_at_once(&mut bench);
    let done = bench.pass(61 * SECOND);
    let ended: Vec<u128> = done
        .iter()
        .filter(|(_, action)| matches!(action, Action::End(_)))
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(ended, [1_000, 60_000], "{done:?}");
}

#[test]
fn nobody_looks_ahead_while_the_pod_stops_or_handlers_fail() {
    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    bench.request(A);
    bench.pass(2 * SECOND);
    bench.say(Input::Drain);
    assert_eq!(bench.pass(3600 * SECOND), []);

    let mut bench = Bench::new(learned());
    for n in 0..9 {
        bench.request(Conn(n));
        bench.pass(600 * SECOND);
    }
    bench.request(A);
    bench.pass(2 * SECOND);
    let next = bench.dispatcher.next_deadline().expect("one is made ahead");
    bench.now = next;
    let [Action::Fork(leaf)] = bench.say(Input::Tick)[..] else {
        panic!("nothing is made ahead");
    };
    assert_eq!(bench.say(ended(leaf)), [], "it could not be started");
    assert_eq!(bench.pass(24 * 3600 * SECOND), [], "and is not tried again");
    // Who comes then is not told of that.
    let [Action::Fork(leaf)] = bench.say(Input::Readable(B))[..] else {
        panic!("nothing is forked");
    };
    let [Action::Fork(_)] = bench.say(ended(leaf))[..] else {
        panic!("it is not tried twice");
    };
}

#[test]
fn what_is_idle_longest_ends_first_while_memory_is_short() {
    let mut bench = Bench::new(rules());
    bench.say(Input::Readable(A));
    bench.say(Input::Readable(B));
    for leaf in [Leaf(0), Leaf(1)] {
        bench.now += SECOND / 2;
        bench.say(Input::There(leaf));
        bench.now += SECOND / 2;
        bench.say(Input::Ready(leaf));
    }
    for (leaf, conn) in [(Leaf(0), A), (Leaf(1), B)] {
        bench.now += SECOND;
        bench.say(Input::Began(leaf, conn));
        bench.say(Input::Done(leaf, conn));
        assert_eq!(bench.say(Input::Closed(leaf, conn)), [Action::Close(conn)]);
    }
    bench.after(10 * SECOND);
    assert_eq!(bench.say(Input::Short(12 * SECOND)), []);
    assert_eq!(
        bench.say(Input::Short(11 * SECOND)),
        [Action::Thaw(Leaf(0)), Action::End(Leaf(0))]
    );
    // One that is not frozen yet is left alone, and so is one that serves.
    assert_eq!(bench.dispatcher.census().idle, 1);
    let [Action::Thaw(_), Action::HandOver(C, Leaf(1))] = bench.say(Input::Readable(C))[..] else {
        panic!("{:?}", bench.dispatcher);
    };
    assert_eq!(bench.say(Input::Short(Duration::ZERO)), []);
}

#[test]
fn a_request_beyond_its_time_is_answered_only_after_its_leaf_is_gone() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    assert_eq!(bench.after(10 * SECOND - MILLI), []);
    assert_eq!(bench.after(MILLI), [Action::Kill(leaf)]);
    assert_eq!(bench.say(Input::Done(leaf, A)), [], "too late");
    assert_eq!(
        bench.say(ended(leaf)),
        [Action::Answer(A, Answer::TimedOut)]
    );
}

#[test]
fn a_further_request_on_the_connection_has_its_own_time() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    bench.after(9 * SECOND);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Began(leaf, A)), [Action::Mark(A)]);
    assert_eq!(bench.after(9 * SECOND), []);
    assert_eq!(bench.after(SECOND), [Action::Kill(leaf)]);
    assert_eq!(
        bench.say(ended(leaf)),
        [Action::Answer(A, Answer::TimedOut)]
    );
}

#[test]
fn a_leaf_that_ends_in_a_request_leaves_its_connection_to_be_answered() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    assert_eq!(bench.say(ended(leaf)), [Action::Answer(A, Answer::Crashed)]);
}

#[test]
fn a_connection_outlives_a_leaf_that_ends_between_requests() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    assert_eq!(bench.say(Input::Done(leaf, A)), [Action::Mark(A)]);
    let untouched = Input::Ended {
        leaf,
        untouched: true,
    };
    assert_eq!(bench.say(untouched), [Action::Watch(A)]);
    assert_eq!(bench.say(Input::Readable(A)), [Action::Fork(Leaf(1))]);
}

#[test]
fn a_leaf_that_ends_with_a_request_that_it_has_not_told_of_leaves_it_to_be_answered() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(ended(leaf)), [Action::Answer(A, Answer::Crashed)]);
}

#[test]
fn a_leaf_that_exits_after_its_only_request_takes_its_connection_along() {
    let mut bench = Bench::new(Rules {
        reuse: Reuse::Never,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(ended(leaf)), [Action::Close(A)]);
}

#[test]
fn what_nobody_has_read_is_given_to_another_leaf() {
    let mut bench = Bench::new(rules());
    let leaf = bench.idle_leaf();
    assert_eq!(bench.say(Input::Readable(A)), [Action::HandOver(A, leaf)]);
    assert_eq!(
        bench.say(Input::Ended {
            leaf,
            untouched: true
        }),
        [Action::Fork(Leaf(1))]
    );
}

#[test]
fn the_queue_is_bounded_and_refuses_the_youngest() {
    let mut bench = Bench::new(Rules {
        instances: 1,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    assert_eq!(
        bench.say(Input::Readable(Conn(10))),
        [Action::Park(leaf, A)]
    );
    for conn in 11..13 {
        assert_eq!(bench.say(Input::Readable(Conn(conn))), []);
    }
    assert_eq!(
        bench.say(Input::Readable(Conn(13))),
        [Action::Answer(Conn(13), Answer::Overloaded)]
    );
    bench.say(Input::Done(leaf, A));
    assert_eq!(
        bench.say(Input::Parked(leaf, A)),
        [
            Action::Watch(A),
            Action::HandOver(Conn(10), leaf),
            Action::Park(leaf, Conn(10))
        ]
    );
}

#[test]
fn who_waits_too_long_is_told() {
    let mut bench = Bench::new(Rules {
        instances: 1,
        timeout: 10 * SECOND,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    bench.after(5 * SECOND);
    bench.say(Input::Readable(B));
    bench.say(Input::Done(leaf, A));
    bench.say(Input::Began(leaf, A));
    assert_eq!(
        bench.after(10 * SECOND),
        [Action::Answer(B, Answer::TimedOut), Action::Kill(leaf)]
    );
}

#[test]
fn a_quiet_open_connection_yields_its_leaf_instead_of_causing_a_fork() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Readable(B)), [Action::Park(leaf, A)]);
    assert_eq!(
        bench.say(Input::Parked(leaf, A)),
        [Action::Watch(A), Action::HandOver(B, leaf)]
    );
}

#[test]
fn a_connection_that_goes_on_instead_of_parking_causes_the_fork_after_all() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Readable(B)), [Action::Park(leaf, A)]);
    assert_eq!(
        bench.say(Input::Began(leaf, A)),
        [Action::Mark(A), Action::Fork(Leaf(1))]
    );
}

#[test]
fn without_reuse_every_request_has_a_leaf_of_its_own_within_the_limit() {
    let mut bench = Bench::new(Rules {
        reuse: Reuse::Never,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Readable(B)), [Action::Fork(Leaf(1))]);
    assert_eq!(bench.say(Input::Readable(C)), [], "two leaves exist");
    assert_eq!(bench.say(Input::Parked(leaf, A)), [Action::Watch(A)]);
    assert_eq!(bench.say(ended(leaf)), [Action::Fork(Leaf(2))]);
    assert_eq!(
        bench.say(Input::Ready(Leaf(1))),
        [Action::HandOver(B, Leaf(1))]
    );
}

#[test]
fn a_leaf_that_does_not_exit_after_its_only_request_is_killed() {
    let mut bench = Bench::new(Rules {
        reuse: Reuse::Never,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Done(leaf, A));
    assert_eq!(bench.say(Input::Closed(leaf, A)), [Action::Close(A)]);
    assert_eq!(bench.after(EXIT), [Action::Kill(leaf)]);
}

#[test]
fn leaves_that_never_get_ready_are_tried_twice_and_then_with_pauses() {
    let mut bench = Bench::new(rules());
    assert_eq!(bench.say(Input::Readable(A)), [Action::Fork(Leaf(0))]);
    assert_eq!(bench.say(ended(Leaf(0))), [Action::Fork(Leaf(1))]);
    assert_eq!(
        bench.say(ended(Leaf(1))),
        [Action::Answer(A, Answer::Unstartable)]
    );
    assert_eq!(bench.say(Input::Readable(B)), []);
    assert_eq!(bench.dispatcher.next_deadline(), Some(bench.now + PAUSE.0));
    assert_eq!(bench.after(PAUSE.0), [Action::Fork(Leaf(2))]);
    assert_eq!(
        bench.after(30 * SECOND)[..1],
        [Action::Answer(B, Answer::TimedOut)]
    );
}

#[test]
fn a_leaf_cannot_speak_for_a_connection_it_does_not_hold() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Readable(B));
    for input in [
        Input::Began(leaf, B),
        Input::Done(leaf, B),
        Input::Parked(leaf, B),
        Input::Closed(leaf, B),
    ] {
        assert_eq!(bench.say(input), [], "{input:?}");
        assert_eq!(bench.say(Input::Closed(Leaf(77), A)), []);
    }
    assert_eq!(
        bench.say(Input::Closed(leaf, A)),
        [Action::Close(A), Action::HandOver(B, leaf)]
    );
}

#[test]
fn a_request_given_back_unanswered_ends_the_leaf() {
    let mut bench = Bench::new(rules());
    let leaf = bench.busy_leaf(A);
    assert_eq!(bench.say(Input::Parked(leaf, A)), [Action::Kill(leaf)]);
    assert_eq!(bench.say(ended(leaf)), [Action::Answer(A, Answer::Crashed)]);
}

#[test]
fn every_leaf_hears_of_the_end_before_it_serves_again() {
    let mut bench = Bench::new(rules());
    let busy = bench.busy_leaf(A);
    let [Action::Fork(starting)] = bench.say(Input::Readable(B))[..] else {
        panic!("a leaf is started")
    };
    assert_eq!(bench.say(Input::Drain), [Action::Drain(busy)]);
    assert_eq!(bench.say(Input::Drain), []);
    bench.say(Input::There(starting));
    assert_eq!(
        bench.say(Input::Ready(starting)),
        [Action::Drain(starting), Action::HandOver(B, starting)]
    );
    assert_eq!(
        bench.say(Input::Done(busy, A)),
        [Action::Mark(A), Action::Park(busy, A)],
        "one that has not heard of it in time gives the connection back"
    );
    assert_eq!(bench.say(Input::Parked(busy, A)), [Action::Watch(A)]);
    assert_eq!(bench.say(Input::Readable(A)), [Action::HandOver(A, busy)]);
    assert_eq!(
        bench.say(Input::Stop(bench.now + SECOND)),
        [],
        "they know it already"
    );
    bench.say(Input::Began(busy, A));
    assert_eq!(
        bench.say(Input::Closed(busy, A)),
        [Action::Close(A), Action::End(busy)]
    );
}

#[test]
fn a_stop_lets_requests_finish_and_ends_the_leaves() {
    let mut bench = Bench::new(Rules {
        instances: 1,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    assert_eq!(bench.say(Input::Readable(B)), [Action::Park(leaf, A)]);
    assert_eq!(
        bench.say(Input::Stop(bench.now + 5 * SECOND)),
        [Action::Drain(leaf)]
    );
    bench.say(Input::Done(leaf, A));
    assert_eq!(
        bench.say(Input::Parked(leaf, A)),
        [Action::Watch(A), Action::HandOver(B, leaf)]
    );
    bench.say(Input::Began(leaf, B));
    assert_eq!(
        bench.say(Input::Done(leaf, B)),
        [Action::Mark(B), Action::Park(leaf, B)]
    );
    assert_eq!(
        bench.say(Input::Parked(leaf, B)),
        [Action::Watch(B), Action::End(leaf)]
    );
    bench.say(ended(leaf));
    assert!(bench.dispatcher.is_empty());
}

#[test]
fn a_stop_whose_time_is_over_answers_everyone() {
    let mut bench = Bench::new(Rules {
        instances: 1,
        ..rules()
    });
    let leaf = bench.busy_leaf(A);
    bench.say(Input::Readable(B));
    bench.say(Input::Stop(bench.now + SECOND));
    assert_eq!(
        bench.after(SECOND),
        [Action::Answer(B, Answer::Stopping), Action::Kill(leaf)]
    );
    assert_eq!(
        bench.say(ended(leaf)),
        [Action::Answer(A, Answer::Stopping)]
    );
}

/// What a driver would see: where each connection is, what each leaf was told.
struct World {
    bench: Bench,
    rules: Rules,
    /// Given to the dispatcher and not given back.
    inside: BTreeSet<Conn>,
    /// With the driver, silent.
    watched: BTreeSet<Conn>,
    gone: BTreeSet<Conn>,
    leaves: BTreeMap<Leaf, Sim>,
    next_conn: u64,
    forked: BTreeSet<Leaf>,
    served: BTreeSet<Leaf>,
}

#[derive(Default, Clone, Copy, Debug)]
struct Sim {
    there: bool,
    ready: bool,
    holds: Option<Conn>,
    began: bool,
    requests: u32,
    exit_asked: bool,
    killed: bool,
    frozen: bool,
    drained: bool,
}

impl World {
    fn new(rules: Rules) -> Self {
        World {
            bench: Bench::new(rules.clone()),
            rules,
            inside: BTreeSet::new(),
            watched: BTreeSet::new(),
            gone: BTreeSet::new(),
            leaves: BTreeMap::new(),
            next_conn: 0,
            forked: BTreeSet::new(),
            served: BTreeSet::new(),
        }
    }

    fn say(&mut self, input: Input) {
        let actions = self.bench.say(input);
        for action in actions {
            self.perform(input, action);
        }
        let next = self.bench.dispatcher.next_deadline();
        assert!(
            next.is_none_or(|next| next > self.bench.now),
            "what is due after {input:?} is not done: {:?}",
            self.bench.dispatcher
        );
        let census = self.bench.dispatcher.census();
        assert!(census.leaves <= self.rules.instances, "{census:?}");
        assert!(census.starting <= self.rules.forks_at_once, "{census:?}");
        assert!(census.queued <= self.rules.queue + 1, "{census:?}");
        let held: BTreeSet<Conn> = self.leaves.values().filter_map(|leaf| leaf.holds).collect();
        assert_eq!(
            census.queued + held.intersection(&self.inside).count(),
            self.inside.len(),
            "a connection is lost after {input:?}"
        );
    }

    fn perform(&mut self, input: Input, action: Action) {
        match action {
            Action::Fork(leaf) => {
                assert!(self.forked.insert(leaf), "a name was used twice");
                self.leaves.insert(leaf, Sim::default());
            }
            Action::HandOver(conn, leaf) => {
                assert!(self.inside.contains(&conn));
                assert!(
                    !self.leaves.values().any(|other| other.holds == Some(conn)),
                    "held twice"
                );
                if self.rules.reuse == Reuse::Never {
                    assert!(
                        !self.served.contains(&leaf),
                        "a leaf without reuse saw a second request"
                    );
                }
                let sim = self.leaves.get_mut(&leaf).expect("a leaf that is there");
                assert!(
                    sim.there
                        && !sim.killed
                        && !sim.exit_asked
                        && !sim.frozen
                        && sim.holds.is_none(),
                    "{sim:?}"
                );
                sim.holds = Some(conn);
                sim.began = false;
            }
            Action::Mark(conn) => assert!(self.inside.contains(&conn)),
            Action::Park(leaf, conn) => assert_eq!(self.leaves[&leaf].holds, Some(conn)),
            Action::Drain(leaf) => {
                let sim = self.leaves.get_mut(&leaf).expect("a leaf that is there");
                assert!(sim.ready && !std::mem::replace(&mut sim.drained, true));
            }
            Action::Watch(conn) => {
                assert!(self.inside.remove(&conn) && self.watched.insert(conn));
            }
            Action::Answer(conn, _) | Action::Close(conn) => {
                assert!(
                    self.inside.remove(&conn),
                    "answered twice: {conn:?} after {input:?}"
                );
                assert!(self.gone.insert(conn));
                let writer = self.leaves.values().any(|leaf| leaf.holds == Some(conn));
                assert!(!writer, "a leaf could still write to {conn:?}");
            }
            Action::Freeze(leaf) => {
                let sim = self.leaves.get_mut(&leaf).expect("a leaf that is there");
                assert!(sim.holds.is_none() && !sim.frozen);
                sim.frozen = true;
            }
            Action::Thaw(leaf) => {
                let sim = self.leaves.get_mut(&leaf).expect("a leaf that is there");
                assert!(std::mem::take(&mut sim.frozen));
            }
            Action::End(leaf) => {
                let sim = self.leaves.get_mut(&leaf).expect("a leaf that is there");
                assert!(!sim.frozen && sim.holds.is_none());
                sim.exit_asked = true;
            }
            Action::Kill(leaf) => {
                self.leaves
                    .get_mut(&leaf)
                    .expect("a leaf that is there")
                    .killed = true
            }
        }
    }

    fn pick(&self, choice: usize) -> Option<(Leaf, Sim)> {
        let n = self.leaves.len();
        (n > 0).then(|| {
            self.leaves
                .iter()
                .nth(choice % n)
                .map(|(leaf, sim)| (*leaf, *sim))
        })?
    }

    fn end_leaf(&mut self, leaf: Leaf, untouched: bool) {
        let Some(sim) = self.leaves.remove(&leaf) else {
            return;
        };
        self.say(Input::Ended {
            leaf,
            // An answered request leaves the connection as untouched as one that nobody has read.
            untouched: untouched && (!sim.began || sim.requests % 2 == 1),
        });
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Connect => {
                let conn = Conn(self.next_conn);
                self.next_conn += 1;
                self.inside.insert(conn);
                self.say(Input::Readable(conn));
            }
            Step::Resume(choice) => {
                if let Some(conn) = self
                    .watched
                    .iter()
                    .nth(choice % self.watched.len().max(1))
                    .copied()
                {
                    self.watched.remove(&conn);
                    self.inside.insert(conn);
                    self.say(Input::Readable(conn));
                }
            }
            Step::Drain => self.say(Input::Drain),
            Step::Short(millis) => self.say(Input::Short(Duration::from_millis(millis))),
            Step::Advance(millis) => {
                self.bench.now += Duration::from_millis(millis);
                self.say(Input::Tick);
            }
            Step::Forward(choice) => self.forward(choice),
            Step::End(choice, untouched) => {
                if let Some((leaf, _)) = self.pick(choice) {
                    self.end_leaf(leaf, untouched);
                }
            }
            Step::Lie(choice, conn, kind) => {
                if let Some((leaf, sim)) = self.pick(choice) {
                    let conn = Conn(conn % (self.next_conn + 1));
                    if sim.holds != Some(conn) {
                        let lies = [Input::Began, Input::Done, Input::Parked, Input::Closed];
                        self.say(lies[kind % 4](leaf, conn));
                    }
                }
            }
        }
    }

    /// Lets one leaf take its next step.
    fn forward(&mut self, choice: usize) {
        let Some((leaf, sim)) = self.pick(choice) else {
            return;
        };
        if sim.frozen {
            return;
        }
        if sim.killed || (sim.exit_asked && sim.holds.is_none()) {
            self.end_leaf(leaf, false);
            return;
        }
        let mut after = sim;
        let input = if !sim.there {
            after.there = true;
            Input::There(leaf)
        } else if !sim.ready {
            after.ready = true;
            Input::Ready(leaf)
        } else if let Some(conn) = sim.holds {
            if !sim.began {
                self.served.insert(leaf);
                after.began = true;
                Input::Began(leaf, conn)
            } else if sim.requests % 2 == 0 {
                after.requests += 1;
                Input::Done(leaf, conn)
            } else {
                after.requests += 1;
                after.holds = None;
                after.exit_asked |= self.rules.reuse == Reuse::Never;
                if choice.is_multiple_of(3) {
                    Input::Closed(leaf, conn)
                } else {
                    Input::Parked(leaf, conn)
                }
            }
        } else {
            return;
        };
        self.leaves.insert(leaf, after);
        self.say(input);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Connect,
    Drain,
    Short(u64),
    Resume(usize),
    Advance(u64),
    Forward(usize),
    End(usize, bool),
    Lie(usize, u64, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Connect),
        1 => Just(Step::Drain),
        1 => (0..4_000u64).prop_map(Step::Short),
        4 => any::<usize>().prop_map(Step::Resume),
        4 => (0..4_000u64).prop_map(Step::Advance),
        24 => any::<usize>().prop_map(Step::Forward),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(leaf, untouched)| Step::End(leaf, untouched)),
        2 => (any::<usize>(), any::<u64>(), any::<usize>()).prop_map(|(l, c, k)| Step::Lie(l, c, k)),
    ];
    prop::collection::vec(step, 0..200)
}

fn worlds() -> impl Strategy<Value = Rules> {
    (
        1..5usize,
        1..4usize,
        0..6usize,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(instances, forks_at_once, queue, reuse, learned)| Rules {
            instances,
            forks_at_once,
            queue,
            reuse: if reuse { Reuse::Always } else { Reuse::Never },
            idle_policy: if learned {
                IdlePolicy::Learned
            } else {
                IdlePolicy::Fixed
            },
            ..rules()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_connection_is_lost_or_answered_twice_and_no_limit_is_passed(rules in worlds(), steps in steps()) {
        let mut world = World::new(rules);
        for step in steps {
            world.step(step);
        }
    }

    #[test]
    fn whoever_waits_is_served_when_leaves_finish(rules in worlds(), steps in steps()) {
        let mut world = World::new(Rules { timeout: Duration::from_secs(100_000), ..rules });
        for step in steps {
            world.step(step);
        }
        for round in 0..10_000 {
            if world.inside.is_empty() {
                break;
            }
            let next = world.bench.dispatcher.next_deadline();
            world.step(Step::Forward(round));
            if round % 8 == 0 && let Some(next) = next {
                world.bench.now = world.bench.now.max(next.min(world.bench.now + SECOND));
                world.say(Input::Tick);
            }
        }
        prop_assert!(world.inside.is_empty(), "{:?} still wait: {:?}", world.inside, world.bench.dispatcher);
    }

    #[test]
    fn a_stop_comes_to_its_end_whatever_leaves_do(rules in worlds(), steps in steps()) {
        let mut world = World::new(rules);
        for step in steps {
            world.step(step);
        }
        let deadline = world.bench.now + 5 * SECOND;
        world.say(Input::Stop(deadline));
        world.bench.now = deadline;
        world.say(Input::Tick);
        for leaf in world.leaves.keys().copied().collect::<Vec<_>>() {
            prop_assert!(world.leaves[&leaf].killed);
            world.end_leaf(leaf, true);
        }
        prop_assert!(world.bench.dispatcher.is_empty() && world.inside.is_empty());
        prop_assert_eq!(world.bench.dispatcher.next_deadline(), None);
    }
}
