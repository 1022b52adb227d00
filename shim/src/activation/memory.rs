//! What idle leaves hold, given back while the node has little memory left. Sooner, and so in a moment's want, the kernel takes it
//! itself (`sock_sandbox::cgroup::Expendable`); this is before kubelet evicts a whole pod for it.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use sock_policy::pressure::idle_while_short;

use super::decide::Input;
use super::driver::Driver;
use crate::memory::{missing, now, until_next};

/// Between looks while there is enough, and while there is not. Nobody looks while no leaf is frozen. All pods look at the same moments,
/// the multiples of these of the machine's own clock: who begins sooner would end leaves that are younger than another's.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(1));

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
            if missing(&text).is_none() {
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
