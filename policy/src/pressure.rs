//! What ends when there is too little memory.

use std::time::Duration;

/// What is idle for longer ends at the first look.
const LONGEST: Duration = Duration::from_secs(60 * 60);

/// How long leaves may have been idle when memory is short at the so many-th look in a row, from 1 on: a quarter of what it was at
/// the look before.
///
/// Every pod of a node looks for itself. As all begin at about the same time, what was used least recently ends first, of whichever pod,
/// and nobody has to know of all; it is over when enough has ended.
#[must_use]
pub fn idle_while_short(looks: u32) -> Duration {
    LONGEST / 4_u32.saturating_pow(looks.saturating_sub(1))
}

/// A zygote, or one that has ended and is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zygote {
    /// The one it descends from, by its place in the list.
    pub parent: Option<usize>,
    /// Time of its imports that its parent has not made, in seconds.
    pub import_seconds: f64,
    /// Forks of its own leaves, for each second; of one that has ended, how often it is asked for.
    pub forks_per_second: f64,
    /// What it was the first to write to, in bytes. Descendants may read it too: it is free when none of them is left.
    pub bytes: u64,
    /// It has not ended.
    pub is_alive: bool,
    /// Its Functions are busy, or its leaves would keep its memory anyway.
    pub is_kept: bool,
}

/// The zygotes to end so that those left have at most `budget` bytes: places in the list, in the order in which to end them.
///
/// What one is worth is the time of imports that leaves would need without it: those between it and its nearest living ancestor,
/// for each fork of its own and of descendants that have ended before it. It costs its memory. The one that is worth least for what it costs
/// goes first; its leaves come from that ancestor then, which is worth more for it. While it has descendants it shares its memory with them,
/// so their turn comes before its own.
#[must_use]
pub fn zygotes(all: &[Zygote], budget: u64) -> Vec<usize> {
    let mut alive: Vec<bool> = all.iter().map(|zygote| zygote.is_alive).collect();
    let mut ended = Vec::new();
    loop {
        let living = all.iter().zip(&alive).filter(|(_, alive)| **alive);
        let used = living.fold(0_u64, |sum, (zygote, _)| sum.saturating_add(zygote.bytes));
        if used <= budget {
            return ended;
        }
        let demand = demand(all, &alive);
        let is_shared = is_shared(all, &alive);
        let density = |place: usize| {
            let worth = demand[place] * import_seconds(all, &alive, place);
            worth / all[place].bytes.max(1) as f64
        };
        let worst = (0..all.len())
            .filter(|place| alive[*place] && !is_shared[*place])
            .filter(|place| !all[*place].is_kept && all[*place].bytes > 0)
            .min_by(|a, b| density(*a).total_cmp(&density(*b)).then(b.cmp(a)));
        let Some(worst) = worst else { return ended };
        alive[worst] = false;
        ended.push(worst);
    }
}

/// Who comes back has to be worth this many times what would have to end for it, or two would take turns for ever.
const MARGIN: f64 = 2.0;

/// Whether a zygote that has ended may come back: there is room within `budget` bytes, or there would be if those ended that are worth
/// clearly less. It is forked from its ancestors, so those of them that have ended come back with it and need room as well.
#[must_use]
pub fn may_begin(all: &[Zygote], place: usize, budget: u64) -> bool {
    let mut after = all.to_vec();
    if place >= all.len() {
        return false;
    }
    let gone: Vec<usize> = line(all, place).filter(|one| !all[*one].is_alive).collect();
    for one in gone {
        after[one].is_alive = true;
    }
    after[place].is_alive = true;
    after[place].is_kept = false;
    after[place].forks_per_second /= MARGIN;
    !zygotes(&after, budget).contains(&place)
}

/// Forks for each second that each living zygote has to make: its own, and those of descendants that are gone.
fn demand(all: &[Zygote], alive: &[bool]) -> Vec<f64> {
    let mut demand = vec![0.0; all.len()];
    for (place, zygote) in all.iter().enumerate() {
        if let Some(place) = line(all, place).find(|place| alive[*place]) {
            demand[place] += zygote.forks_per_second;
        }
    }
    demand
}

/// Which zygotes have descendants that live.
fn is_shared(all: &[Zygote], alive: &[bool]) -> Vec<bool> {
    let mut shared = vec![false; all.len()];
    for place in (0..all.len()).filter(|place| alive[*place]) {
        for above in line(all, place).skip(1).filter(|above| *above != place) {
            shared[above] = true;
        }
    }
    shared
}

/// What stands between a zygote and its nearest living ancestor.
fn import_seconds(all: &[Zygote], alive: &[bool], place: usize) -> f64 {
    let mut line = line(all, place);
    let own = line.next().map_or(0.0, |place| all[place].import_seconds);
    let gone = line.take_while(|place| !alive[*place]);
    own + gone.map(|place| all[place].import_seconds).sum::<f64>()
}

/// A zygote and those above it. A list that comes back to itself ends.
fn line(all: &[Zygote], place: usize) -> impl Iterator<Item = usize> + '_ {
    let next = |place: &usize| all[*place].parent.filter(|parent| *parent < all.len());
    std::iter::successors(Some(place), next).take(all.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zygote(
        parent: Option<usize>,
        import_seconds: f64,
        forks_per_second: f64,
        mib: u64,
    ) -> Zygote {
        Zygote {
            parent,
            import_seconds,
            forks_per_second,
            bytes: mib << 20,
            is_alive: true,
            is_kept: false,
        }
    }

    #[test]
    fn what_was_used_last_stays_longest() {
        let times: Vec<Duration> = (1..=12).map(idle_while_short).collect();
        assert_eq!(times[0], LONGEST);
        assert!(
            times.is_sorted_by(|sooner, later| sooner > later),
            "{times:?}"
        );
        // The usual minute is reached in five looks, and a second in seven.
        assert!(times[3] < Duration::from_secs(60) && times[6] < Duration::from_secs(1));
        assert!(idle_while_short(u32::MAX) < Duration::from_millis(1));
    }

    #[test]
    fn what_is_asked_for_rarely_and_costs_much_goes_first() {
        let all = [
            zygote(None, 0.1, 0.0, 20),
            zygote(Some(0), 1.0, 5.0, 100),
            zygote(Some(0), 1.0, 0.01, 100),
            zygote(Some(1), 0.2, 1.0, 5),
        ];
        assert_eq!(zygotes(&all, u64::MAX), []);
        assert_eq!(zygotes(&all, 220 << 20), [2]);
        // What its descendants share with it would not be free.
        assert_eq!(zygotes(&all, 110 << 20), [2, 3, 1]);
    }

    #[test]
    fn an_ancestor_is_worth_what_its_descendants_were() {
        let all = [
            zygote(None, 1.0, 0.0, 50),
            zygote(Some(0), 0.1, 1.0, 50),
            zygote(Some(0), 0.1, 1.0, 50),
            zygote(None, 0.3, 1.0, 50),
        ];
        // Two forks a second, of 1 s each, that were its descendants'.
        assert_eq!(zygotes(&all, 50 << 20), [2, 1, 3]);
        let gone = [false, true, true, true];
        assert!((demand(&all, &[true, false, true, true])[0] - 1.0).abs() < 1e-9);
        assert!((import_seconds(&all, &gone, 1) - 1.1).abs() < 1e-9);
    }

    #[test]
    fn what_has_ended_comes_back_where_there_is_room_or_it_is_worth_more() {
        let gone = |forks| Zygote {
            is_alive: false,
            ..zygote(None, 1.0, forks, 100)
        };
        let all = |forks| [gone(forks), zygote(None, 1.0, 1.0, 100)];
        assert_eq!(zygotes(&all(9.0), 100 << 20), []);
        assert!(may_begin(&all(0.1), 0, 200 << 20));
        assert!(!may_begin(&all(1.9), 0, 100 << 20));
        assert!(may_begin(&all(2.1), 0, 100 << 20));
        let [one, other] = all(100.0);
        let busy = Zygote {
            is_kept: true,
            ..other
        };
        assert!(!may_begin(&[one, busy], 0, 100 << 20));
        // With it its ancestors would have to come.
        let family = |parent| {
            [
                gone(0.0),
                Zygote {
                    parent,
                    ..gone(5.0)
                },
            ]
        };
        assert!(may_begin(&family(None), 1, 100 << 20));
        assert!(!may_begin(&family(Some(0)), 1, 199 << 20));
        assert!(may_begin(&family(Some(0)), 1, 200 << 20));
        assert!(!may_begin(&[], 0, 0));
    }

    #[test]
    fn what_is_kept_stays_though_there_is_no_room() {
        let busy = Zygote {
            is_kept: true,
            ..zygote(None, 1.0, 1.0, 100)
        };
        assert_eq!(zygotes(&[busy, zygote(None, 1.0, 1.0, 100)], 0), [1]);
    }

    proptest! {
        #[test]
        fn what_is_left_fits_and_nobody_ends_twice_or_before_its_descendants(list in prop::collection::vec((prop::option::of(0usize..12), 0.0f64..3.0, 0.0f64..50.0, 0u64..200, any::<bool>(), any::<bool>()), 0..12), budget in 0u64..1500) {
            let all: Vec<Zygote> = list.into_iter().map(|(parent, seconds, forks, mib, is_kept, is_alive)| Zygote { is_kept, is_alive, ..zygote(parent, seconds, forks, mib) }).collect();
            let ended = zygotes(&all, budget << 20);
            let mut alive: Vec<bool> = all.iter().map(|one| one.is_alive).collect();
            for place in &ended {
                prop_assert!(alive[*place] && !all[*place].is_kept);
                prop_assert!(!is_shared(&all, &alive)[*place]);
                alive[*place] = false;
            }
            let used: u64 = all.iter().zip(&alive).filter(|(_, alive)| **alive).map(|(one, _)| one.bytes).sum();
            let shared = is_shared(&all, &alive);
            let more = (0..all.len()).any(|place| alive[place] && !shared[place] && !all[place].is_kept && all[place].bytes > 0);
            prop_assert!(used <= budget << 20 || !more);
        }

        #[test]
        fn who_may_come_back_stays(list in prop::collection::vec((prop::option::of(0usize..8), 0.0f64..3.0, 0.0f64..50.0, 1u64..200, any::<bool>()), 1..8), budget in 0u64..900) {
            let mut all: Vec<Zygote> = list.into_iter().map(|(parent, seconds, forks, mib, is_kept)| Zygote { is_kept, ..zygote(parent, seconds, forks, mib) }).collect();
            all[0].is_alive = false;
            if may_begin(&all, 0, budget << 20) {
                // All others live, so it comes alone.
                all[0].is_alive = true;
                all[0].is_kept = false;
                prop_assert!(!zygotes(&all, budget << 20).contains(&0));
            }
        }
    }
}
