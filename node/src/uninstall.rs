//! Takes everything off a node that the installer put there.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroup_moves;
use crate::containerd::{self, Configurator, Process};
use crate::host::Host;
use crate::payload::{self, PAYLOAD};
use crate::readiness::Readiness;
use crate::registration::{self, Registration};

/// The node cache and whatever else sock keeps on a node.
const STATE: [&str; 2] = ["/var/lib/sock", "/run/sock"];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{0} sandboxes of sock still run on this node: delete the pods with runtimeClassName sock first"
    )]
    InUse(usize),
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
    #[error(transparent)]
    Registration(#[from] registration::Error),
    #[error(transparent)]
    CgroupMoves(#[from] cgroup_moves::Error),
    #[error(transparent)]
    Payload(#[from] payload::Error),
    #[error("remove {path}: {source}")]
    Remove {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{step}: {source}")]
    System {
        step: &'static str,
        source: std::io::Error,
    },
}

/// Undoes the installation, then stays, so that a DaemonSet does not start it over and over.
pub fn run() -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::System {
            step: "start the event loop",
            source,
        })?;
    runtime.block_on(async {
        let host = Host::from_environment();
        let registration = Registration::connect().await?;
        // Without the label no new pod comes here while the rest is undone.
        registration.label(None).await?;
        undo(&host)?;
        let mut readiness = Readiness::default();
        readiness.open().await.map_err(|source| Error::System {
            step: "open the port that the readiness probe asks for",
            source,
        })?;
        tracing::info!("sock is off this node");
        std::future::pending().await
    })
}

fn undo(host: &Host) -> Result<(), Error> {
    let sandboxes = shims(host);
    if sandboxes > 0 {
        return Err(Error::InUse(sandboxes));
    }
    let process = Process::find(host)?;
    if Configurator::remove(host, &process)? {
        tracing::info!(config = %process.config.display(), "restarting containerd");
        containerd::restart(host, &process)?;
    }
    if cgroup_moves::favor(host, false)? {
        tracing::info!("cgroups are mounted without favordynmods");
    }
    payload::unlink(host)?;
    for path in [PAYLOAD].iter().chain(&STATE) {
        let path = host.path(path);
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::Remove { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Shims of sock, and what they have started from their own program for the sandboxes that they hold.
fn shims(host: &Host) -> usize {
    let processes = host.processes();
    let namespace = |process: &Path| fs::read_link(process.join("ns/pid")).ok();
    let of_host = namespace(&processes.join("1"));
    let Ok(entries) = fs::read_dir(processes) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        // A container may have a program of any name.
        .filter(|process| namespace(process) == of_host)
        .filter(|process| fs::read_link(process.join("exe")).is_ok_and(|exe| is_shim(&exe)))
        .count()
}

/// A shim runs from a mount of its own that is attached nowhere, so that its path is that of the file below it; an upgrade
/// may have replaced the file since (proc_pid_exe(5)).
fn is_shim(exe: &Path) -> bool {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    matches!(
        &*name,
        "containerd-shim-sock-v1" | "containerd-shim-sock-v1 (deleted)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_is_known_wherever_its_program_lies() {
        for exe in [
            "/containerd-shim-sock-v1",
            "/opt/sock/bin/containerd-shim-sock-v1",
            "/opt/sock/bin/containerd-shim-sock-v1 (deleted)",
        ] {
            assert!(is_shim(Path::new(exe)), "{exe}");
        }
        for exe in [
            "/usr/bin/containerd-shim-runc-v2",
            "/containerd-shim-sock-v10",
            "/",
        ] {
            assert!(!is_shim(Path::new(exe)), "{exe}");
        }
    }
}
