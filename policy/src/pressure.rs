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

/// A zygote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zygote {
    /// The one it descends from, by its place in the list.
    pub parent: Option<usize>,
    /// Time of its imports that its parent has not made, in seconds.
    pub import_seconds: f64,
    /// Forks of its own leaves, for each second.
    pub forks_per_second: f64,
    /// What it shares with nobody, in bytes.
    pub unique_bytes: u64,
    /// Its Functions are busy, or somebody has asked that it be kept.
    pub is_kept: bool,
}

/// The zygotes to end so that those left have at most `budget` bytes that they share with nobody: places in the list, in the order
/// in which to end them.
///
/// What one is worth is the time of imports that leaves would need without it: those between it and its nearest living ancestor,
/// for each fork of its own and of descendants that have ended before it. It costs its memory. The one that is worth least for what it costs
/// goes first; its leaves come from that ancestor then, which is worth more for it.
#[must_use]
pub fn zygotes(all: &[Zygote], budget: u64) -> Vec<usize> {
    let mut alive = vec![true; all.len()];
    let mut ended = Vec::new();
    loop {
        let used: u64 = all
            .iter()
            .zip(&alive)
            .filter(|(_, alive)| **alive)
            .map(|(one, _)| one.unique_bytes)
            .sum();
        if used <= budget {
            return ended;
        }
        let demand = demand(all, &alive);
        let density = |place: usize| {
            let worth = demand[place] * import_seconds(all, &alive, place);
            worth / all[place].unique_bytes.max(1) as f64
        };
        let worst = (0..all.len())
            .filter(|place| alive[*place] && !all[*place].is_kept && all[*place].unique_bytes > 0)
            .min_by(|a, b| density(*a).total_cmp(&density(*b)).then(b.cmp(a)));
        let Some(worst) = worst else { return ended };
        alive[worst] = false;
        ended.push(worst);
    }
}

/// Forks for each second that each living zygote has to make: its own, and those of descendants that are gone.
fn demand(all: &[Zygote], alive: &[bool]) -> Vec<f64> {
    let mut demand = vec![0.0; all.len()];
    for (place, zygote) in all.iter().enumerate() {
        if let Some(place) = ancestors(all, place).find(|place| alive[*place]) {
            demand[place] += zygote.forks_per_second;
        }
    }
    demand
}

/// What stands between a zygote and its nearest living ancestor.
fn import_seconds(all: &[Zygote], alive: &[bool], place: usize) -> f64 {
    let mut line = ancestors(all, place);
    let own = line.next().map_or(0.0, |place| all[place].import_seconds);
    let gone = line.take_while(|place| !alive[*place]);
    own + gone.map(|place| all[place].import_seconds).sum::<f64>()
}

/// A zygote and those above it. A list that comes back to itself ends.
fn ancestors(all: &[Zygote], place: usize) -> impl Iterator<Item = usize> + '_ {
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
            unique_bytes: mib << 20,
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
        // The root serves nobody by itself as long as its children live.
        assert_eq!(zygotes(&all, 220 << 20), [0]);
        assert_eq!(zygotes(&all, 150 << 20), [0, 2]);
    }

    #[test]
    fn an_ancestor_is_worth_what_its_descendants_were() {
        let all = [
            zygote(None, 1.0, 0.0, 50),
            zygote(Some(0), 0.1, 1.0, 50),
            zygote(Some(0), 0.1, 1.0, 50),
        ];
        // Idle itself, it goes first; were it to go after one of the others, it would be worth that one's forks.
        assert_eq!(zygotes(&all, 100 << 20), [0]);
        let kept = Zygote {
            is_kept: true,
            ..all[0]
        };
        assert_eq!(zygotes(&[kept, all[1], all[2]], 60 << 20), [2, 1]);
        assert!((demand(&all, &[true, false, true])[0] - 1.0).abs() < 1e-9);
        assert!((import_seconds(&all, &[false, true, true], 1) - 1.1).abs() < 1e-9);
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
        fn what_is_left_fits_and_nobody_ends_twice(list in prop::collection::vec((prop::option::of(0usize..12), 0.0f64..3.0, 0.0f64..50.0, 0u64..200, any::<bool>()), 0..12), budget in 0u64..1500) {
            let all: Vec<Zygote> = list.into_iter().map(|(parent, seconds, forks, mib, is_kept)| Zygote { is_kept, ..zygote(parent, seconds, forks, mib) }).collect();
            let ended = zygotes(&all, budget << 20);
            let mut once = ended.clone();
            once.sort_unstable();
            once.dedup();
            prop_assert_eq!(once.len(), ended.len());
            prop_assert!(ended.iter().all(|place| !all[*place].is_kept));
            let left = |kept: bool| -> u64 { all.iter().enumerate().filter(|(place, one)| !ended.contains(place) && (kept || !one.is_kept)).map(|(_, one)| one.unique_bytes).sum() };
            prop_assert!(left(true) <= budget << 20 || left(false) == 0);
        }
    }
}
