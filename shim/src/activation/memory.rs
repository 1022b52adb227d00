//! What idle leaves hold, given back while the node has little memory left. Sooner, and so in a moment's want, the kernel takes it
//! itself (`sock_sandbox::cgroup::Expendable`); this is before kubelet evicts a whole pod for it.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use sock_policy::pressure::idle_while_short;

use super::decide::Input;
use super::driver::Driver;

/// Between looks while there is enough, and while there is not. Nobody looks while no leaf is frozen. All pods look at the same moments,
/// the multiples of these of the machine's own clock: who begins sooner would end leaves that are younger than another's.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(1));
/// Memory is short when less than one part of so many is available, and less than a size in KiB that is enough for any node.
const SHORT: (u64, u64) = (20, 1 << 20);

/// Looks at `meminfo` (proc_meminfo(5)) as long as leaves are frozen, for ever.
pub(super) async fn watch(driver: Rc<Driver>, meminfo: PathBuf) {
    loop {
        driver.froze.notified().await;
        let mut looks = 0;
        while driver.census().frozen > 0 {
            let every = match looks {
                0 => LOOK_EVERY.0,
                _ => LOOK_EVERY.1,
            };
            tokio::time::sleep(until_next(now(), every)).await;
            let text = std::fs::read_to_string(&meminfo).unwrap_or_default();
            if !is_short(&text) {
                looks = 0;
                continue;
            }
            looks += 1;
            let idle = idle_while_short(looks);
            tracing::debug!(?idle, "memory is short: leaves idle for longer end");
            driver.input(Input::Short(idle));
        }
    }
}

/// Since the machine has started.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(now).unwrap_or_default()
}

/// Until the next multiple of a time, which is none of itself.
fn until_next(now: Duration, every: Duration) -> Duration {
    let (now, every) = (now.as_nanos(), every.as_nanos().max(1));
    Duration::from_nanos(u64::try_from(every - now % every).unwrap_or(u64::MAX))
}

/// Whether little of all memory is available. Where the kernel does not say there is enough.
fn is_short(meminfo: &str) -> bool {
    let kib = |key: &str| -> Option<u64> {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        value.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let (Some(total), Some(available)) = (kib("MemTotal:"), kib("MemAvailable:")) else {
        return false;
    };
    available < (total / SHORT.0).min(SHORT.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_looks_at_the_same_moments() {
        let seconds = Duration::from_secs;
        let next = |now: Duration| now + until_next(now, seconds(3));
        for now in [3.0, 3.1, 5.999_999] {
            assert_eq!(next(Duration::from_secs_f64(now)), seconds(6));
        }
        assert!(now() > Duration::ZERO);
    }

    #[test]
    fn memory_is_short_when_little_of_it_is_available() {
        let text =
            |available: &str| format!("MemTotal:       24000000 kB\nMemFree: 1 kB\n{available}\n");
        assert!(is_short(&text("MemAvailable:    1048575 kB")));
        assert!(!is_short(&text("MemAvailable:    1048576 kB")));
        let small =
            |available: u32| format!("MemTotal: 1000000 kB\nMemAvailable: {available} kB\n");
        assert!(is_short(&small(49_999)) && !is_short(&small(50_000)));
        assert!(!is_short(&text("")));
        assert!(!is_short(""));
        let here = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        assert!(
            here.contains("MemTotal:") && here.contains("MemAvailable:"),
            "{here}"
        );
    }
}
