//! Logging of the shim: into containerd's own log by the `log` FIFO of the bundle, where containerd reads it.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

/// Starts logging. `SOCK_LOG` (a filter of `tracing_subscriber`) wins over containerd's debug switch.
pub fn init(bundle: &Path, id: &str, debug: bool) {
    let filter = std::env::var("SOCK_LOG")
        .ok()
        .and_then(|f| EnvFilter::try_new(f).ok());
    let filter =
        filter.unwrap_or_else(|| EnvFilter::new(if debug { "debug,zbus=info" } else { "info" }));
    // Opened for both directions, so that a containerd that is gone makes no write fail; non-blocking, so that one that
    // does not read stops nothing: the line is lost.
    let Ok(fifo) = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(bundle.join("log"))
    else {
        return;
    };
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Mutex::new(fifo))
        .try_init();
    tracing::debug!(id, "shim started");
}
