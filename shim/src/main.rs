//! `containerd-shim-sock-v1`: started by containerd, one for each pod.

use std::time::Duration;

use containerd_shim::Config;
use sock_shim::service::Service;

fn main() {
    // `start` and `delete` enter no container.
    if std::env::args_os().any(|a| a == "-socket")
        && let Err(e) = sock_shim::reexec::from_read_only_mount()
    {
        eprintln!("containerd-shim-sock-v1: cannot run from a read-only mount: {e}");
        std::process::exit(1);
    }
    room_for_connections();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // The process must have one thread when it forks or changes namespaces: one that a library asks for during the
        // start of the server is not kept, and the first call waits for its end.
        .thread_keep_alive(Duration::from_millis(1))
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("containerd-shim-sock-v1: cannot start: {e}");
            std::process::exit(1);
        }
    };
    let config = Config {
        no_setup_logger: true,
        no_reaper: true,
        ..Config::default()
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(
        &runtime,
        containerd_shim::asynchronous::run::<Service>("io.containerd.sock.v1", Some(config)),
    );
    // Tasks that still wait for what will not come do not hold the process.
    runtime.shutdown_background();
}

/// A Function's pod holds a descriptor of every connection, parked ones too. Containers without limits of their own inherit
/// this, so it is not more than is needed.
fn room_for_connections() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const ENOUGH: u64 = 16 * 1024;
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|soft| soft < ENOUGH) {
        let soft = now.maximum.map_or(ENOUGH, |hard| hard.min(ENOUGH));
        // With fewer the oldest silent connections are closed sooner.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(soft),
                ..now
            },
        );
    }
}
