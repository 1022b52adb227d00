//! Benchmarks of sock on a kind cluster, side by side with ordinary pods on runc.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cluster;
mod containers;
mod demo;
mod faults;
mod http;
mod measure;
mod node;
mod objects;
mod peers;
mod progress;
mod run;
mod simulate;
mod stats;
mod table;
mod tiers;
mod trace;
mod tree;
mod workload;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage:
  sock-bench run [--requests N] [--rounds N] [--out FILE] [--no-trace] [--keep]
      the figures, as a table and as JSON
  sock-bench containers [--out FILE]
      of these, what ordinary containers and pods cost
  sock-bench faults [--rounds N] [--only FAULT,FAULT] [--away SECONDS] [--out FILE]
      what each fault costs, and how long until all is whole again; it disturbs the whole cluster
  sock-bench tree [--out FILE] [--keep]
      the memory of zygotes that descend from one another, beside one that does not
  sock-bench tiers [--requests N] [--out FILE] [--keep]
      a request with all tiers of caches, and without one more of them each time
  sock-bench workload [--functions N] [--sets N] [--seconds N] [--seed N] [--memory QUANTITY] [--plan FILE] [--out FILE] [--keep]
      many Functions on many PackageSets: a tree of zygotes beside one zygote for each set, one for all, and none
  sock-bench simulate [--functions N] [--days N] [--seed N] [--trace FILE]... [--out FILE]
      days of requests under different policies for idle leaves; recorded days (Azure Functions Trace 2019) by --trace, one a file
  sock-bench demo NAMESPACE REQUESTS
      each Function of the namespace that the file REQUESTS has a request for, beside the same code on runc
  sock-bench node JOB
      a part of it, run on a node";

fn main() -> ExitCode {
    match command(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    match arguments.next().as_deref() {
        Some("run") => run::run(&options(arguments)?),
        Some("containers") => containers::run(&containers_options(arguments)?),
        Some("faults") => faults::run(&faults_options(arguments)?),
        Some("tree") => tree::run(&tree_options(arguments)?),
        Some("tiers") => tiers::run(&tiers_options(arguments)?),
        Some("workload") => workload::run(&workload_options(arguments)?),
        Some("simulate") => simulate::run(&simulate_options(arguments)?),
        Some("demo") => match (arguments.next(), arguments.next()) {
            (Some(namespace), Some(requests)) => demo::run(&namespace, requests.as_ref()),
            _ => bail!(USAGE),
        },
        Some("node") => node::run(&arguments.next().context(USAGE)?),
        _ => bail!(USAGE),
    }
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<run::Options> {
    let mut options = run::Options {
        requests: 300,
        rounds: 15,
        out: "target/bench.json".into(),
        trace: true,
        keep: false,
    };
    while let Some(option) = arguments.next() {
        let mut value = || value_of(&option, &mut arguments);
        match &*option {
            "--requests" => options.requests = count(&option, &value()?)?,
            "--rounds" => options.rounds = count(&option, &value()?)?,
            "--out" => options.out = value()?.into(),
            "--no-trace" => options.trace = false,
            "--keep" => options.keep = true,
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn faults_options(mut arguments: impl Iterator<Item = String>) -> Result<faults::Options> {
    let mut options = faults::Options {
        rounds: 20,
        faults: faults::ALL.to_vec(),
        away: Duration::from_secs(120),
        out: "target/faults.json".into(),
    };
    while let Some(option) = arguments.next() {
        let mut value = || value_of(&option, &mut arguments);
        match &*option {
            "--rounds" => options.rounds = count(&option, &value()?)?,
            "--only" => options.faults = value()?.split(',').map(fault).collect::<Result<_>>()?,
            "--away" => options.away = Duration::from_secs(count(&option, &value()?)? as u64),
            "--out" => options.out = value()?.into(),
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn containers_options(mut arguments: impl Iterator<Item = String>) -> Result<containers::Options> {
    let mut options = containers::Options {
        out: "target/containers.json".into(),
    };
    while let Some(option) = arguments.next() {
        match &*option {
            "--out" => options.out = value_of(&option, &mut arguments)?.into(),
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn tree_options(mut arguments: impl Iterator<Item = String>) -> Result<tree::Options> {
    let mut options = tree::Options {
        out: "target/tree.json".into(),
        keep: false,
    };
    while let Some(option) = arguments.next() {
        match &*option {
            "--out" => options.out = value_of(&option, &mut arguments)?.into(),
            "--keep" => options.keep = true,
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn tiers_options(mut arguments: impl Iterator<Item = String>) -> Result<tiers::Options> {
    let mut options = tiers::Options {
        requests: 200,
        out: "target/tiers.json".into(),
        keep: false,
    };
    while let Some(option) = arguments.next() {
        match &*option {
            "--requests" => {
                options.requests = count(&option, &value_of(&option, &mut arguments)?)?;
            }
            "--out" => options.out = value_of(&option, &mut arguments)?.into(),
            "--keep" => options.keep = true,
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn workload_options(mut arguments: impl Iterator<Item = String>) -> Result<workload::Options> {
    let mut options = workload::Options {
        functions: 60,
        sets: 30,
        seconds: 60,
        seed: 1,
        memory: None,
        plan: std::env::current_exe()?.with_file_name("kubectl-sock"),
        out: "target/bench.json".into(),
        keep: false,
    };
    while let Some(option) = arguments.next() {
        let mut value = || value_of(&option, &mut arguments);
        match &*option {
            "--functions" => options.functions = count(&option, &value()?)?,
            "--sets" => options.sets = count(&option, &value()?)?,
            "--seconds" => options.seconds = count(&option, &value()?)?,
            "--seed" => options.seed = count(&option, &value()?)? as u64,
            "--memory" => options.memory = Some(value()?),
            "--plan" => options.plan = value()?.into(),
            "--out" => options.out = value()?.into(),
            "--keep" => options.keep = true,
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn simulate_options(mut arguments: impl Iterator<Item = String>) -> Result<simulate::Options> {
    let mut options = simulate::Options {
        days: 3,
        functions: 1000,
        seed: 1,
        traces: Vec::new(),
        out: "target/simulate.json".into(),
    };
    while let Some(option) = arguments.next() {
        let mut value = || value_of(&option, &mut arguments);
        match &*option {
            "--days" => options.days = count(&option, &value()?)?,
            "--functions" => options.functions = count(&option, &value()?)?,
            "--seed" => options.seed = count(&option, &value()?)? as u64,
            "--trace" => options.traces.push(value()?.into()),
            "--out" => options.out = value()?.into(),
            _ => bail!("unknown option {option}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn value_of(option: &str, arguments: &mut impl Iterator<Item = String>) -> Result<String> {
    arguments
        .next()
        .with_context(|| format!("{option} needs a value"))
}

fn fault(name: &str) -> Result<faults::Fault> {
    let mut known = faults::ALL.iter().copied();
    let found = known.find(|fault| fault.name() == name);
    found.with_context(|| {
        let names: Vec<&str> = faults::ALL.iter().map(|fault| fault.name()).collect();
        format!("--only {name}: there are {}", names.join(", "))
    })
}

fn count(option: &str, value: &str) -> Result<usize> {
    match value.parse() {
        Ok(count @ 1..) => Ok(count),
        _ => bail!("{option} {value}: a number from 1 on"),
    }
}
