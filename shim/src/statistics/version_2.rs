//! The statistics of version 2 (Documentation/admin-guide/cgroup-v2.rst): `io.containerd.cgroups.v2.Metrics`.

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use sock_sandbox::cgroup::Cgroup;

use super::{Files, device, pairs};

const UNLIMITED: u64 = u64::MAX;

pub(super) fn metrics(cgroup: &Cgroup) -> Metrics {
    of(&Files::of(cgroup, ""))
}

fn of(files: &Files) -> Metrics {
    let mut rdma = RdmaStat::new();
    rdma.current = files.rdma("rdma.current", rdma_entry);
    rdma.limit = files.rdma("rdma.max", rdma_entry);
    let mut pids = PidsStat::new();
    pids.current = files.number("pids.current", UNLIMITED);
    pids.limit = files.number("pids.max", UNLIMITED);
    let mut metrics = Metrics::new();
    metrics.pids = Some(pids).into();
    metrics.cpu = Some(cpu(files)).into();
    metrics.memory = Some(memory(files)).into();
    metrics.rdma = Some(rdma).into();
    metrics.io = Some(io(files)).into();
    metrics.hugetlb = huge_pages(files);
    metrics.memory_events = Some(memory_events(files)).into();
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

/// Microseconds.
fn cpu(files: &Files) -> CPUStat {
    let stat = files.table("cpu.stat");
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(&files.text("cpu.pressure")).into(),
        ..CPUStat::new()
    }
}

fn memory(files: &Files) -> MemoryStat {
    let stat = files.table("memory.stat");
    let get = |key| stat.get(key);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // Since Linux 5.9 apart for anonymous memory and for files. The message has no place for the two, so that containerd's
        // own shim says nothing here.
        workingset_refault: get("workingset_refault")
            + get("workingset_refault_anon")
            + get("workingset_refault_file"),
        workingset_activate: get("workingset_activate")
            + get("workingset_activate_anon")
            + get("workingset_activate_file"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current", UNLIMITED),
        usage_limit: files.number("memory.max", UNLIMITED),
        max_usage: files.number("memory.peak", UNLIMITED),
        swap_usage: files.number("memory.swap.current", UNLIMITED),
        swap_limit: files.number("memory.swap.max", UNLIMITED),
        swap_max_usage: files.number("memory.swap.peak", UNLIMITED),
        psi: pressure(&files.text("memory.pressure")).into(),
        ..MemoryStat::new()
    }
}

fn memory_events(files: &Files) -> MemoryEvents {
    let events = files.table("memory.events");
    MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::new()
    }
}

/// Lines `8:16 rbytes=1 wbytes=2 rios=3 wios=4 …` (cgroup-v2.rst, "IO Interface Files").
fn io(files: &Files) -> IOStat {
    let entry = |line: &str| {
        let (of, values) = line.split_once(' ')?;
        let (major, minor) = device(of)?;
        let value = |key| {
            let found = pairs(values).find(|(name, _)| *name == key);
            found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
        };
        Some(IOEntry {
            major,
            minor,
            rbytes: value("rbytes"),
            wbytes: value("wbytes"),
            rios: value("rios"),
            wios: value("wios"),
            ..IOEntry::new()
        })
    };
    let text = files.text("io.stat");
    IOStat {
        usage: text.lines().filter_map(entry).collect(),
        psi: pressure(&files.text("io.pressure")).into(),
        ..IOStat::new()
    }
}

fn huge_pages(files: &Files) -> Vec<HugeTlbStat> {
    let sizes = files.sizes_of_huge_pages().into_iter();
    sizes
        .map(|pagesize| {
            let name = |file: &str| format!("hugetlb.{pagesize}.{file}");
            HugeTlbStat {
                current: files.number(&name("current"), UNLIMITED),
                max: files.number(&name("max"), UNLIMITED),
                failcnt: files.table(&name("events")).get("max"),
                pagesize: pagesize.clone(),
                ..HugeTlbStat::new()
            }
        })
        .collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same of `full` (Documentation/accounting/psi.rst). None where the
/// kernel does not account pressure.
fn pressure(text: &str) -> Option<PSIStats> {
    let line = |kind| {
        let values = text
            .lines()
            .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let value = |key| Some(pairs(values).find(|(name, _)| *name == key)?.1);
        let average = |key| {
            value(key)
                .and_then(|value| value.parse().ok())
                .unwrap_or(0.0)
        };
        Some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: value("total")
                .and_then(|value| value.parse().ok())
                .unwrap_or(0),
            ..PSIData::new()
        })
    };
    let some = line("some")?;
    Some(PSIStats {
        some: Some(some).into(),
        full: line("full").into(),
        ..PSIStats::new()
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::files;
    use super::*;

    #[test]
    fn everything_is_read_from_the_files_of_the_kernel() -> std::io::Result<()> {
        let (_directory, files) = files(&[
            ("pids.current", "4\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 900\nuser_usec 600\nsystem_usec 300\nnr_periods 5\nnr_throttled 2\nthrottled_usec 70\nnr_bursts 1\nburst_usec 3\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.10 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n",
            ),
            ("memory.current", "5000\n"),
            ("memory.max", "50000\n"),
            ("memory.peak", "7000\n"),
            ("memory.swap.current", "0\n"),
            ("memory.swap.max", "max\n"),
            (
                "memory.stat",
                "anon 4096\nfile 512\nworkingset_refault_anon 2\nworkingset_refault_file 3\npgfault 88\n",
            ),
            (
                "memory.events",
                "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
            ),
            (
                "io.stat",
                "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n8:0\n",
            ),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 6\n"),
        ])?;
        let metrics = of(&files);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (4, UNLIMITED));
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.cpu.throttled_usec),
            (900, 70)
        );
        assert_eq!(
            (metrics.cpu.psi.some.total, metrics.cpu.psi.full.total),
            (12345, 99)
        );
        assert!((metrics.cpu.psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        let memory = &metrics.memory;
        assert_eq!(
            (memory.usage, memory.usage_limit, memory.max_usage),
            (5000, 50000, 7000)
        );
        assert_eq!(
            (memory.swap_limit, memory.anon, memory.pgfault),
            (UNLIMITED, 4096, 88)
        );
        assert_eq!(memory.workingset_refault, 5);
        assert!(memory.psi.is_none());
        assert_eq!(
            (
                metrics.memory_events.oom_kill,
                metrics.memory_events.oom_group_kill
            ),
            (4, 5)
        );
        let [entry] = &metrics.io.usage[..] else {
            panic!("{:?}", metrics.io.usage)
        };
        assert_eq!(
            (entry.major, entry.minor, entry.wbytes, entry.rios),
            (8, 16, 314_773_504, 192)
        );
        let [huge] = &metrics.hugetlb[..] else {
            panic!("{:?}", metrics.hugetlb)
        };
        assert_eq!((huge.max, huge.failcnt), (UNLIMITED, 6));
        Ok(())
    }
}
