//! Scopes of systemd, made over the system bus, or over systemd's private socket where no bus runs (a kind node).
//!
//! On the private socket systemd signs its answers with a name that is not a unique one, and they cannot be parsed as D-Bus
//! demands. There the call is sent without asking for an answer; whether it was heard shows in the process's cgroup.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use zbus::Variant;

use super::limits::weight;
use crate::{Error, Result};

const BUS: &str = "/run/dbus/system_bus_socket";
const PRIVATE: &str = "/run/systemd/private";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// A way to speak to systemd.
enum Manager {
    Bus(zbus::Connection),
    Private(zbus::Connection),
}

impl Manager {
    async fn connect() -> Result<Self> {
        if let Ok(stream) = UnixStream::connect(BUS) {
            let connection = zbus::connection::Builder::unix_stream(stream).build().await;
            return Ok(Self::Bus(
                connection.map_err(|e| failed("connect", BUS, e))?,
            ));
        }
        let stream = UnixStream::connect(PRIVATE).map_err(|e| failed("connect", PRIVATE, e))?;
        let connection = zbus::connection::Builder::unix_stream(stream)
            .p2p()
            .build()
            .await;
        Ok(Self::Private(
            connection.map_err(|e| failed("connect", PRIVATE, e))?,
        ))
    }

    async fn call<B: serde::Serialize + zbus::zvariant::DynamicType>(
        &self,
        method: &'static str,
        unit: &str,
        body: &B,
    ) -> Result<()> {
        let result = match self {
            Self::Bus(bus) => bus
                .call_method(
                    Some("org.freedesktop.systemd1"),
                    OBJECT,
                    Some(MANAGER),
                    method,
                    body,
                )
                .await
                .map(drop),
            Self::Private(socket) => {
                let message = zbus::message::Message::method_call(OBJECT, method)
                    .interface(MANAGER)
                    .with_flags(zbus::message::Flags::NO_REPLY_EXPECTED)
                    .build(body);
                match message {
                    Ok(message) => socket.send(&message).await,
                    Err(e) => Err(e),
                }
            }
        };
        result.map_err(|e| failed(method, unit, e))
    }
}

/// `a-b.slice` lies in `a.slice/a-b.slice` (systemd.slice(5)).
pub(super) fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if name == "-" {
        return path;
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    path
}

fn failed(step: &'static str, unit: &str, reason: impl ToString) -> Error {
    Error::Systemd {
        step,
        unit: unit.into(),
        reason: reason.to_string(),
    }
}

/// Starts a transient scope with `pid` in it and waits until it is there.
pub(super) async fn start_scope(
    slice: &str,
    unit: &str,
    pid: i32,
    resources: Option<&LinuxResources>,
    unified: bool,
) -> Result<()> {
    let manager = Manager::connect().await?;
    let pids = [u32::try_from(pid).map_err(|e| failed("process number", unit, e))?];
    let mut properties: Vec<(&str, Variant<'_>)> = vec![
        ("Description", Variant::from("container of sock")),
        ("Slice", Variant::from(slice)),
        ("PIDs", Variant::from(&pids[..])),
        ("DefaultDependencies", Variant::from(false)),
        ("Delegate", Variant::from(true)),
        ("MemoryAccounting", Variant::from(true)),
        ("CPUAccounting", Variant::from(true)),
        ("TasksAccounting", Variant::from(true)),
        (
            if unified {
                "IOAccounting"
            } else {
                "BlockIOAccounting"
            },
            Variant::from(true),
        ),
    ];
    // Limits go to systemd too, or its next reload would write its own defaults over ours.
    if let Some(memory) = resources.and_then(|r| r.memory().as_ref())
        && let Some(limit) = memory.limit().filter(|l| *l > 0)
    {
        properties.push((
            if unified { "MemoryMax" } else { "MemoryLimit" },
            Variant::from(limit.unsigned_abs()),
        ));
    }
    if let Some(cpu) = resources.and_then(|r| r.cpu().as_ref()) {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            properties.push(if unified {
                ("CPUWeight", Variant::from(weight(shares)))
            } else {
                ("CPUShares", Variant::from(shares))
            });
        }
        if let (Some(quota), Some(period)) = (
            cpu.quota().filter(|q| *q > 0),
            cpu.period().filter(|p| *p > 0),
        ) {
            let per_second = quota.unsigned_abs().saturating_mul(1_000_000) / period;
            // systemd keeps hundredths of a percent: round up, or the limit is below what was asked.
            properties.push((
                "CPUQuotaPerSecUSec",
                Variant::from(per_second.div_ceil(10_000) * 10_000),
            ));
        }
    }
    if let Some(pids) = resources
        .and_then(|r| r.pids().as_ref())
        .map(oci_spec::runtime::LinuxPids::limit)
        .filter(|l| *l > 0)
    {
        properties.push(("TasksMax", Variant::from(pids.unsigned_abs())));
    }
    let auxiliary: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
    let body = (unit, "replace", &properties, &auxiliary);
    if let Err(e) = manager.call("StartTransientUnit", unit, &body).await {
        // The scope of a container of that name that failed is still remembered.
        if !e.to_string().contains("UnitExists") && !e.to_string().contains("already") {
            return Err(e);
        }
        manager.call("ResetFailedUnit", unit, &(unit,)).await?;
        manager.call("StartTransientUnit", unit, &body).await?;
    }
    wait_for_scope(unit, pid).await
}

/// The call returns when the job is queued; the process has moved when `/proc/PID/cgroup` says so.
async fn wait_for_scope(unit: &str, pid: i32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    let path = format!("/proc/{pid}/cgroup");
    let mut pause = Duration::from_micros(200);
    loop {
        let text = std::fs::read_to_string(&path)
            .map_err(|e| failed("wait for", unit, format!("{path}: {e}")))?;
        let there = |line: &str| line.ends_with(unit);
        // On version 1 systemd moves the process in its own hierarchy last.
        let moved = text
            .lines()
            .any(|l| (l.contains(":name=systemd:") || l.starts_with("0::")) && there(l));
        if moved {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(failed(
                "wait for",
                unit,
                "the process was not moved within 30 s",
            ));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::slice_path;
    use std::path::Path;

    #[test]
    fn a_slice_is_found_below_its_parents() {
        assert_eq!(
            slice_path("a-b-c.slice"),
            Path::new("a.slice/a-b.slice/a-b-c.slice")
        );
        assert_eq!(slice_path("-.slice"), Path::new(""));
    }
}
