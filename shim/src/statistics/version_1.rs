//! The statistics of version 1 (Documentation/admin-guide/cgroup-v1): `io.containerd.cgroups.v1.Metrics`.

use std::collections::HashMap;
use std::fs;

use containerd_shim::protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use sock_sandbox::cgroup::Cgroup;

use super::{Files, device};

const NANOSECONDS: u64 = 1_000_000_000;

pub(super) fn metrics(cgroup: &Cgroup) -> Metrics {
    let files = |controller| Files::of(cgroup, controller);
    let memory = files("memory");
    let rdma = cgroup.controller("rdma").map(|_| {
        let rdma = files("rdma");
        RdmaStat {
            current: rdma.rdma("rdma.current", rdma_entry),
            limit: rdma.rdma("rdma.max", rdma_entry),
            ..RdmaStat::new()
        }
    });
    let mut metrics = Metrics::new();
    metrics.hugetlb = huge_pages(&files("hugetlb"));
    metrics.pids = Some(pids(&files("pids"))).into();
    metrics.cpu = Some(cpu(&files("cpuacct"), &files("cpu"))).into();
    metrics.memory_oom_control = Some(oom_control(&memory)).into();
    metrics.memory = Some(memory_stat(&memory)).into();
    metrics.blkio = Some(block_io(&files("blkio"))).into();
    metrics.rdma = rdma.into();
    metrics
}

fn rdma_entry(device: String, hca_handles: u32, hca_objects: u32) -> RdmaEntry {
    RdmaEntry {
        device,
        hca_handles,
        hca_objects,
        ..RdmaEntry::new()
    }
}

fn huge_pages(files: &Files) -> Vec<HugetlbStat> {
    let sizes = files.sizes_of_huge_pages().into_iter();
    sizes
        .map(|pagesize| {
            let of = |file: &str| files.number(&format!("hugetlb.{pagesize}.{file}"), 0);
            HugetlbStat {
                usage: of("usage_in_bytes"),
                max: of("max_usage_in_bytes"),
                failcnt: of("failcnt"),
                pagesize: pagesize.clone(),
                ..HugetlbStat::new()
            }
        })
        .collect()
}

fn pids(files: &Files) -> PidsStat {
    PidsStat {
        current: files.number("pids.current", 0),
        // No limit is 0 to who reads version 1.
        limit: files.number("pids.max", 0),
        ..PidsStat::new()
    }
}

/// Nanoseconds.
fn cpu(accounting: &Files, scheduler: &Files) -> CPUStat {
    let split = accounting.table("cpuacct.stat");
    let ticks = NANOSECONDS / rustix::param::clock_ticks_per_second().max(1);
    let by_cpu = accounting.text("cpuacct.usage_percpu");
    let usage = CPUUsage {
        total: accounting.number("cpuacct.usage", 0),
        kernel: split.get("system") * ticks,
        user: split.get("user") * ticks,
        per_cpu: by_cpu
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect(),
        ..CPUUsage::new()
    };
    let stat = scheduler.table("cpu.stat");
    let throttling = Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Throttle::new()
    };
    CPUStat {
        usage: Some(usage).into(),
        throttling: Some(throttling).into(),
        ..CPUStat::new()
    }
}

fn oom_control(files: &Files) -> MemoryOomControl {
    let control = files.table("memory.oom_control");
    MemoryOomControl {
        oom_kill_disable: control.get("oom_kill_disable"),
        under_oom: control.get("under_oom"),
        oom_kill: control.get("oom_kill"),
        ..MemoryOomControl::new()
    }
}

fn memory_stat(files: &Files) -> MemoryStat {
    let entry = |of: &str| {
        let number = |file| files.number(&format!("memory.{of}{file}"), 0);
        let entry = MemoryEntry {
            limit: number("limit_in_bytes"),
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failcnt: number("failcnt"),
            ..MemoryEntry::new()
        };
        Some(entry).into()
    };
    let stat = files.table("memory.stat");
    let get = |key| stat.get(key);
    MemoryStat {
        cache: get("cache"),
        rss: get("rss"),
        rss_huge: get("rss_huge"),
        mapped_file: get("mapped_file"),
        dirty: get("dirty"),
        writeback: get("writeback"),
        pg_pg_in: get("pgpgin"),
        pg_pg_out: get("pgpgout"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: get("hierarchical_memory_limit"),
        hierarchical_swap_limit: get("hierarchical_memsw_limit"),
        total_cache: get("total_cache"),
        total_rss: get("total_rss"),
        total_rss_huge: get("total_rss_huge"),
        total_mapped_file: get("total_mapped_file"),
        total_dirty: get("total_dirty"),
        total_writeback: get("total_writeback"),
        total_pg_pg_in: get("total_pgpgin"),
        total_pg_pg_out: get("total_pgpgout"),
        total_pg_fault: get("total_pgfault"),
        total_pg_maj_fault: get("total_pgmajfault"),
        total_inactive_anon: get("total_inactive_anon"),
        total_active_anon: get("total_active_anon"),
        total_inactive_file: get("total_inactive_file"),
        total_active_file: get("total_active_file"),
        total_unevictable: get("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..MemoryStat::new()
    }
}

/// What passed is counted by the throttling that every kernel has, of all devices; how long it took only by a scheduler: BFQ, or
/// CFQ of older kernels.
fn block_io(files: &Files) -> BlkIOStat {
    let devices = std::cell::OnceCell::new();
    let entries = |names: &[&str]| {
        let texts = names
            .iter()
            .map(|name| files.text(&format!("blkio.{name}")));
        // One that has counted nothing says `Total 0` alone.
        let mut found = texts.map(|text| block_entries(&text));
        let found = found
            .find(|entries| !entries.is_empty())
            .unwrap_or_default();
        let named = found.into_iter().map(|mut entry| {
            let devices = devices.get_or_init(|| block_devices("/proc/partitions"));
            let known = devices.get(&(entry.major, entry.minor));
            entry.device = known.cloned().unwrap_or_default();
            entry
        });
        named.collect()
    };
    let scheduler = |of: &str| {
        let (bfq, cfq) = (format!("bfq.{of}_recursive"), format!("{of}_recursive"));
        entries(&[&bfq, &cfq])
    };
    let throttled = |of: &str| {
        let names = [
            format!("throttle.{of}_recursive"),
            format!("throttle.{of}"),
            format!("bfq.{of}_recursive"),
            format!("{of}_recursive"),
        ];
        entries(&names.each_ref().map(String::as_str))
    };
    BlkIOStat {
        io_service_bytes_recursive: throttled("io_service_bytes"),
        io_serviced_recursive: throttled("io_serviced"),
        io_queued_recursive: scheduler("io_queued"),
        io_service_time_recursive: scheduler("io_service_time"),
        io_wait_time_recursive: scheduler("io_wait_time"),
        io_merged_recursive: scheduler("io_merged"),
        io_time_recursive: scheduler("time"),
        sectors_recursive: scheduler("sectors"),
        ..BlkIOStat::new()
    }
}

/// Lines `8:0 Read 4096`, or `8:0 4096` of what has no kinds; the sum over all devices is left out.
fn block_entries(text: &str) -> Vec<BlkIOEntry> {
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (major, minor) = device(fields.next()?)?;
        let second = fields.next()?;
        let (op, value) = match fields.next() {
            Some(value) => (second, value),
            None => ("", second),
        };
        Some(BlkIOEntry {
            op: op.into(),
            major,
            minor,
            value: value.parse().ok()?,
            ..BlkIOEntry::new()
        })
    };
    text.lines().filter_map(entry).collect()
}

/// The names of devices by their numbers (`/proc/partitions`, proc_partitions(5)).
fn block_devices(partitions: &str) -> HashMap<(u64, u64), String> {
    let text = fs::read_to_string(partitions).unwrap_or_default();
    let device = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let number = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((number, format!("/dev/{}", fields.nth(1)?)))
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{directory, files};
    use super::*;

    #[test]
    fn processor_time_is_in_nanoseconds() -> std::io::Result<()> {
        let (_accounting, accounting) = files(&[
            ("cpuacct.usage", "12891712\n"),
            ("cpuacct.stat", "user 3\nsystem 1\n"),
            ("cpuacct.usage_percpu", "3409800 9481912 \n"),
        ])?;
        let (_scheduler, scheduler) = files(&[(
            "cpu.stat",
            "nr_periods 5\nnr_throttled 2\nthrottled_time 123456\n",
        )])?;
        let stat = cpu(&accounting, &scheduler);
        assert_eq!(stat.usage.total, 12_891_712);
        assert_eq!(stat.usage.per_cpu, [3_409_800, 9_481_912]);
        assert_eq!(stat.usage.user, 3 * stat.usage.kernel);
        // USER_HZ is 100 on every architecture that is built for.
        assert_eq!(stat.usage.kernel, 10_000_000);
        assert_eq!(stat.throttling.throttled_time, 123_456);
        assert_eq!(
            (stat.throttling.periods, stat.throttling.throttled_periods),
            (5, 2)
        );
        Ok(())
    }

    #[test]
    fn memory_has_its_limits_and_its_peaks() -> std::io::Result<()> {
        let (_directory, files) = files(&[
            ("memory.limit_in_bytes", "49999872\n"),
            ("memory.usage_in_bytes", "307200\n"),
            ("memory.max_usage_in_bytes", "3428352\n"),
            ("memory.failcnt", "7\n"),
            ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
            ("memory.kmem.usage_in_bytes", "249856\n"),
            (
                "memory.stat",
                "cache 4096\nrss 53248\nhierarchical_memsw_limit 9223372036854771712\ntotal_pgfault 992\n",
            ),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n",
            ),
        ])?;
        let stat = memory_stat(&files);
        assert_eq!(
            (
                stat.usage.limit,
                stat.usage.usage,
                stat.usage.max,
                stat.usage.failcnt
            ),
            (49_999_872, 307_200, 3_428_352, 7)
        );
        assert_eq!(stat.swap.limit, 9_223_372_036_854_771_712);
        assert_eq!(stat.hierarchical_swap_limit, 9_223_372_036_854_771_712);
        assert_eq!(
            (stat.kernel.usage, stat.cache, stat.rss, stat.total_pg_fault),
            (249_856, 4096, 53248, 992)
        );
        let control = oom_control(&files);
        assert_eq!(
            (
                control.oom_kill_disable,
                control.under_oom,
                control.oom_kill
            ),
            (0, 1, 2)
        );
        Ok(())
    }

    #[test]
    fn block_input_and_output_is_what_the_throttling_counts_or_else_a_scheduler()
    -> std::io::Result<()> {
        let throttled = "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\nTotal 4608\n";
        let (_one, one) = files(&[
            ("blkio.throttle.io_service_bytes_recursive", throttled),
            (
                "blkio.bfq.io_service_bytes_recursive",
                "8:16 Read 1\nTotal 1\n",
            ),
            ("blkio.bfq.time_recursive", "8:16 77\n"),
        ])?;
        let stat = block_io(&one);
        let seen: Vec<(&str, u64)> = stat
            .io_service_bytes_recursive
            .iter()
            .map(|entry| (entry.op.as_str(), entry.value))
            .collect();
        assert_eq!(seen, [("Read", 4096), ("Write", 512), ("Total", 4608)]);
        let time = &stat.io_time_recursive[0];
        assert_eq!(
            (time.op.as_str(), time.major, time.minor, time.value),
            ("", 8, 16, 77)
        );
        let (_two, two) = files(&[
            ("blkio.throttle.io_service_bytes_recursive", "Total 0\n"),
            ("blkio.io_service_bytes_recursive", "8:0 Read 1\nTotal 1\n"),
        ])?;
        assert_eq!(block_io(&two).io_service_bytes_recursive[0].value, 1);
        Ok(())
    }

    #[test]
    fn devices_have_their_names() -> std::io::Result<()> {
        let partitions = "major minor  #blocks  name\n\n 254        0  268435456 vda\n   7        0       4 loop0\n";
        let directory = directory(&[("partitions", partitions)])?;
        let devices = block_devices(
            directory
                .path()
                .join("partitions")
                .to_str()
                .unwrap_or_default(),
        );
        assert_eq!(devices[&(254, 0)], "/dev/vda");
        assert_eq!(devices.len(), 2);
        Ok(())
    }
}
