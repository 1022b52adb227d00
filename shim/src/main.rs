//! `containerd-shim-sock-v1`: started by containerd, one for each pod.

use std::time::Duration;

use containerd_shim::Config;
use sock_shim::role::installer;
use sock_shim::serve;
use sock_shim::service::Service;

fn main() {
    // As runc and crun have it (features.md of the OCI runtime specification).
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "features")
    {
        match sock_shim::features::json() {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("containerd-shim-sock-v1: features: {error}");
                std::process::exit(1);
            }
        }
        return;
    }
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "cache")
    {
        let arguments: Vec<_> = std::env::args_os().skip(2).collect();
        match installer::entry::answer(&arguments) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1);
            }
        }
        return;
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
    let local = tokio::task::LocalSet::new();
    let outcome = local.block_on(&runtime, run());
    // Tasks that still wait for what will not come do not hold the process.
    runtime.shutdown_background();
    if let Err(e) = outcome {
        eprintln!("containerd-shim-sock-v1: {e}");
        std::process::exit(1);
    }
}

async fn run() -> Result<(), containerd_shim::Error> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&arguments)?;
    if serve::is_for_version_2(&flags) {
        println!("{}", serve::start_version_2(&flags).await?);
        return Ok(());
    }
    if !flags.socket.is_empty() && flags.action.is_empty() {
        return serve::serve(&flags).await;
    }
    let config = Config {
        no_setup_logger: true,
        no_reaper: true,
        ..Config::default()
    };
    containerd_shim::asynchronous::run::<Service>("io.containerd.sock.v1", Some(config)).await;
    Ok(())
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
