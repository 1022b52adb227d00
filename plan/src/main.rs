//! `kubectl sock`: plans the tree of PackageSets of a cluster, or of a folder with requirements files.

#![forbid(unsafe_code)]

mod cluster;
mod costs;
mod folder;
mod given;
mod plan;
mod stop;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Looks after the PackageSets and Functions of sock.
#[derive(Debug, Parser)]
#[command(name = "kubectl sock", bin_name = "kubectl sock", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Proposes which PackageSets should extend which: a picture of the tree and what it saves, or YAML to apply.
    ///
    /// What importing each package costs is measured once: on the cluster by a Function that is there for a moment, for
    /// requirements files by the Python of this machine.
    Plan(Plan),
}

#[derive(Args, Debug)]
struct Plan {
    /// Requirements files, or folders with such (*.txt), to plan for instead of a cluster; each becomes a PackageSet.
    paths: Vec<PathBuf>,
    /// Namespace of the cluster; that of the context if left out.
    #[arg(short, long, conflicts_with = "paths")]
    namespace: Option<String>,
    /// All namespaces of the cluster.
    #[arg(short = 'A', long, conflicts_with_all = ["paths", "namespace"])]
    all_namespaces: bool,
    /// Context of the kubeconfig.
    #[arg(long, conflicts_with = "paths")]
    context: Option<String>,
    /// Memory of all zygotes of a node together, such as 2Gi; imports that spare least for their memory are given up.
    #[arg(long, value_name = "QUANTITY", value_parser = kib)]
    memory: Option<f64>,
    /// File that keeps what was measured.
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// Image of PackageSets that are made of requirements files.
    #[arg(long, default_value = "docker.io/library/python:3.13-slim-trixie")]
    image: String,
    /// Python that measures requirements files: of the version that the image has.
    #[arg(long, default_value = "python3")]
    python: String,
    /// Package index of requirements files.
    #[arg(long, value_name = "URL")]
    index: Option<String>,
    /// What to print.
    #[arg(short, long, value_enum, default_value_t = Output::Tree)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Output {
    /// A picture, and what it saves.
    Tree,
    /// PackageSets that are new or change, to apply.
    Yaml,
}

/// Reads a quantity of memory, and gives KiB.
fn kib(text: &str) -> Result<f64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        unit => return Err(format!("{unit} is no unit: give Mi, Gi, M or G")),
    };
    let number: f64 = digits
        .parse()
        .map_err(|_| "give a number and a unit, such as 512Mi or 2Gi")?;
    if !(number.is_finite() && number > 0.0) {
        return Err("give more than nothing".into());
    }
    Ok(number * factor / 1024.0)
}

fn main() -> ExitCode {
    let Command::Plan(plan) = Arguments::parse().command;
    match plan::run(&plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_kubernetes_writes_it() {
        assert_eq!(kib("2Gi"), Ok(2.0 * 1024.0 * 1024.0));
        assert_eq!(kib("1.5Mi"), Ok(1536.0));
        assert_eq!(kib("1024"), Ok(1.0));
        for wrong in ["", "Mi", "2 Gi", "-1Gi", "0", "1Xi", "nan", "infG"] {
            assert!(kib(wrong).is_err(), "{wrong}");
        }
    }
}
