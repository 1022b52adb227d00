//! What idle leaves hold, given back while the node has little memory left. Sooner, and so in a moment's want, the kernel takes it
//! itself (`sock_sandbox::cgroup::Expendable`); this is before kubelet evicts a whole pod for it.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use sock_policy::pressure::idle_while_short;

use super::decide::Input;
use super::driver::Driver;

/// Between looks while there is enough, and while there is not. Nobody looks while no leaf is frozen.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(1));
/// Memory is short when less than one part of so many is available.
const PARTS: u64 = 20;

/// Looks at `meminfo` (proc_meminfo(5)) as long as leaves are frozen, for ever.
pub(super) async fn watch(driver: Rc<Driver>, meminfo: &Path) {
    loop {
        driver.froze.notified().await;
        let mut looks = 0;
        while driver.census().frozen > 0 {
            tokio::time::sleep(if looks == 0 {
                LOOK_EVERY.0
            } else {
                LOOK_EVERY.1
            })
            .await;
            let text = std::fs::read_to_string(meminfo).unwrap_or_default();
            if !is_short(&text) {
                looks = 0;
                continue;
            }
            looks += 1;
            let idle = idle_while_short(looks);
            tracing::info!(?idle, "memory is short: leaves idle for longer end");
            driver.input(Input::Short(idle));
        }
    }
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
    available < total / PARTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_short_when_little_of_it_is_available() {
        let text =
            |available: &str| format!("MemTotal:       24000000 kB\nMemFree: 1 kB\n{available}\n");
        assert!(is_short(&text("MemAvailable:    1199999 kB")));
        assert!(!is_short(&text("MemAvailable:    1200000 kB")));
        assert!(!is_short(&text("")));
        assert!(!is_short(""));
        let here = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        assert!(
            here.contains("MemTotal:") && here.contains("MemAvailable:"),
            "{here}"
        );
    }
}
