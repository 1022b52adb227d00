//! Puts sock on a node: checks the host, copies the files, tells containerd of the runtime, labels the node.

#![forbid(unsafe_code)]

mod cgroup_moves;
mod check;
mod containerd;
mod host;
mod install;
mod payload;
mod readiness;
mod registration;
mod sweep;
mod uninstall;
mod zygote_memory;

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: sock-node run | check | uninstall";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();

    let outcome: Result<(), Box<dyn std::error::Error>> = match words.as_slice() {
        ["run"] => install::run().map_err(Into::into),
        ["check"] => check::print(&host::Host::from_environment()).map_err(Into::into),
        ["uninstall"] => uninstall::run().map_err(Into::into),
        [host::ENTER, program, rest @ ..] => host::enter(program, rest).map_err(Into::into),
        [cgroup_moves::INSIDE, wanted] => cgroup_moves::inside(wanted).map_err(Into::into),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
