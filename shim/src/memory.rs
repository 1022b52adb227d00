//! How much memory the node has left.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Memory is short when less than one part of so many is available, and less than a size in KiB that is enough for any node.
const SHORT: (u64, u64) = (20, 1 << 20);
/// Or when nobody got on for want of it for this part of the last ten seconds, in hundredths, and less than one part of so many is available:
/// a container that meets its own limit stalls alone.
const STALLED: (f64, u64) = (10.0, 7);

/// Where the kernel says so.
#[derive(Debug, Clone)]
pub struct Memory {
    meminfo: PathBuf,
    pressure: PathBuf,
}

impl Default for Memory {
    fn default() -> Self {
        Memory::at("/proc/meminfo".into(), "/proc/pressure/memory".into())
    }
}

impl Memory {
    /// In files like proc_meminfo(5) and `Documentation/accounting/psi.rst`.
    #[must_use]
    pub fn at(meminfo: PathBuf, pressure: PathBuf) -> Memory {
        Memory { meminfo, pressure }
    }

    /// By how many bytes it is short; `None` while there is enough. It can be short by none, if what there is is not found in time. Where the
    /// kernel does not say there is enough.
    #[must_use]
    pub fn shortage(&self) -> Option<u64> {
        let meminfo = read(&self.meminfo);
        let stalls = || {
            let (total, available) = (kib(&meminfo, "MemTotal:")?, kib(&meminfo, "MemAvailable:")?);
            (available < total / STALLED.1 && is_stalled(&read(&self.pressure))).then_some(0)
        };
        missing(&meminfo).or_else(stalls)
    }

    /// Whether so many bytes more can be used without its being short then, or nearly so. Where the kernel does not say they can.
    #[must_use]
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let meminfo = read(&self.meminfo);
        let room = || {
            let (total, available) = (kib(&meminfo, "MemTotal:")?, kib(&meminfo, "MemAvailable:")?);
            Some(available.saturating_sub(bytes >> 10) >= 2 * wanted(total))
        };
        room().unwrap_or(true)
    }

    /// All that there is, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        kib(&read(&self.meminfo), "MemTotal:").unwrap_or(0) << 10
    }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

fn kib(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// What should be available, of all that there is, in KiB.
fn wanted(total: u64) -> u64 {
    (total / SHORT.0).min(SHORT.1)
}

/// How many bytes should be available and are not, if so. Where the kernel does not say there are enough.
#[must_use]
pub fn missing(meminfo: &str) -> Option<u64> {
    let (total, available) = (kib(meminfo, "MemTotal:")?, kib(meminfo, "MemAvailable:")?);
    let wanted = wanted(total);
    (available < wanted).then(|| (wanted - available) << 10)
}

/// Whether all processes that had something to do waited for memory.
fn is_stalled(pressure: &str) -> bool {
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "));
    let average =
        full.and_then(|line| line.split(' ').find_map(|part| part.strip_prefix("avg10=")));
    average.is_some_and(|text| text.parse().is_ok_and(|part: f64| part >= STALLED.0))
}

/// Since the machine has started.
#[must_use]
pub fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(now).unwrap_or_default()
}

/// Until the next multiple of a time, which is none of itself.
#[must_use]
pub fn until_next(now: Duration, every: Duration) -> Duration {
    let (now, every) = (now.as_nanos(), every.as_nanos().max(1));
    Duration::from_nanos(u64::try_from(every - now % every).unwrap_or(u64::MAX))
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
        assert_eq!(missing(&text("MemAvailable:    1048575 kB")), Some(1024));
        assert_eq!(missing(&text("MemAvailable:    1048576 kB")), None);
        let small =
            |available: u32| format!("MemTotal: 1000000 kB\nMemAvailable: {available} kB\n");
        assert_eq!(missing(&small(49_990)), Some(10 << 10));
        assert_eq!(missing(&small(50_000)), None);
        assert_eq!(missing(&text("")), None);
        assert_eq!(missing(""), None);
        let here = Memory::default();
        assert!(here.total() > 64 << 20);
    }

    #[test]
    fn memory_is_short_when_everybody_waits_for_it() {
        let text = |some: f64, full: f64| {
            format!(
                "some avg10={some:.2} avg60=0.00 avg300=0.00 total=5\nfull avg10={full:.2} avg60=99.00 avg300=0.00 total=2\n"
            )
        };
        assert!(is_stalled(&text(50.0, 10.0)));
        assert!(!is_stalled(&text(50.0, 9.99)));
        assert!(!is_stalled("") && !is_stalled("full avg10=x"));
    }

    #[test]
    fn who_stalls_at_a_limit_of_its_own_takes_nothing_from_others() -> std::io::Result<()> {
        let there = tempfile::tempdir()?;
        let (meminfo, pressure) = (there.path().join("meminfo"), there.path().join("memory"));
        fs::write(
            &pressure,
            "full avg10=90.00 avg60=0.00 avg300=0.00 total=2\n",
        )?;
        let memory = Memory::at(meminfo.clone(), pressure);
        let with = |available: u64| {
            let text = format!("MemTotal: 70000000 kB\nMemAvailable: {available} kB\n");
            fs::write(&meminfo, text).map(|()| (memory.shortage(), memory.has_room_for(1 << 30)))
        };
        assert_eq!(with(10_000_000)?, (None, true));
        assert_eq!(with(9_999_999)?, (Some(0), true));
        assert_eq!(with(3 << 20)?, (Some(0), true));
        assert_eq!(with((3 << 20) - 1)?, (Some(0), false));
        assert_eq!(with((1 << 20) - 1)?.0, Some(1024));
        Ok(())
    }
}
