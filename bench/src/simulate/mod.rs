//! Days of requests, decided on in seconds: what different policies for idle leaves cost, and what they spare.

mod replay;
mod trace;

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use sock_policy::{BreakEven, Fixed, HybridHistogram, Idle};

use crate::stats::Samples;
use crate::table::table;
use replay::{Replayed, replay};
use trace::Trace;

/// What is simulated.
#[derive(Debug)]
pub struct Options {
    /// Days of a generated trace.
    pub days: usize,
    /// Functions of a generated trace.
    pub functions: usize,
    /// Of its random numbers.
    pub seed: u64,
    /// Recorded days in place of it, one a file.
    pub traces: Vec<PathBuf>,
    /// Where the figures go.
    pub out: PathBuf,
}

/// What a start takes, in milliseconds: about the medians of docs/performance.md, for pandas and scikit-learn.
const WARM: f64 = 0.11;
const FORKED: f64 = 10.0;
const INTERPRETER: f64 = 1548.0;
/// Memory of a leaf that it shares with nobody, and of an interpreter with the same packages, in MB.
const LEAF: f64 = 3.0;
const WHOLE: f64 = 120.0;

/// How idle leaves are dealt with.
struct Policy {
    name: &'static str,
    /// What a start takes where there is no leaf, in milliseconds.
    start: f64,
    /// Of a leaf, in MB.
    memory: f64,
    make: fn() -> Box<dyn Idle>,
}

const MINUTE: Duration = Duration::from_secs(60);

const POLICIES: [Policy; 8] = [
    Policy {
        name: "a leaf for each request",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(Fixed(Duration::ZERO)),
    },
    Policy {
        name: "kept 1 min (default)",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(Fixed(MINUTE)),
    },
    Policy {
        name: "kept 10 min",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(Fixed(10 * MINUTE)),
    },
    Policy {
        name: "hybrid histogram",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(HybridHistogram::new(MINUTE)),
    },
    Policy {
        name: "break-even, worth 2 min",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(BreakEven::new(2 * MINUTE)),
    },
    Policy {
        name: "break-even, worth 10 min",
        start: FORKED,
        memory: LEAF,
        make: || Box::new(BreakEven::new(10 * MINUTE)),
    },
    Policy {
        name: "no zygote, kept 10 min",
        start: INTERPRETER,
        memory: WHOLE,
        make: || Box::new(Fixed(10 * MINUTE)),
    },
    Policy {
        name: "no zygote, hybrid histogram",
        start: INTERPRETER,
        memory: WHOLE,
        make: || Box::new(HybridHistogram::new(10 * MINUTE)),
    },
];

/// One line of the report.
#[derive(Debug, Serialize)]
struct Figures {
    policy: &'static str,
    /// Of all requests, those that no leaf was there for.
    cold_share: f64,
    /// The same of each Function's requests: a quarter of them have more.
    cold_share_of_functions_p75: f64,
    /// Memory of leaves, over time: GB times hours.
    memory_gb_hours: f64,
    /// Of that, while they did nothing.
    idle_gb_hours: f64,
    /// Of all starts, in milliseconds.
    start_mean: f64,
    start_p99: f64,
}

fn figures(policy: &Policy, trace: &Trace) -> Option<Figures> {
    let each: Vec<Replayed> = trace
        .functions
        .iter()
        .map(|function| replay(function, trace.seconds, &mut *(policy.make)()))
        .collect();
    let requests: f64 = each.iter().map(|one| one.requests as f64).sum();
    let cold: f64 = each.iter().map(|one| one.cold as f64).sum();
    let shares = each
        .iter()
        .filter(|one| one.requests > 0)
        .map(|one| one.cold as f64 / one.requests as f64);
    let shares = Samples::new(shares.collect())?;
    let cold_share = cold / requests;
    let hours = |seconds: f64| seconds * policy.memory / 1000.0 / 3600.0;
    Some(Figures {
        policy: policy.name,
        cold_share,
        cold_share_of_functions_p75: shares.percentile(75),
        memory_gb_hours: hours(each.iter().map(|one| one.busy + one.idle).sum()),
        idle_gb_hours: hours(each.iter().map(|one| one.idle).sum()),
        start_mean: cold_share * policy.start + (1.0 - cold_share) * WARM,
        start_p99: if cold_share > 0.01 {
            policy.start
        } else {
            WARM
        },
    })
}

/// Replays a trace under every policy.
///
/// # Errors
/// A trace cannot be read, or holds no request.
pub fn run(options: &Options) -> Result<()> {
    let begin = Instant::now();
    let trace = if options.traces.is_empty() {
        trace::generated(options.functions, options.days, options.seed)
    } else {
        let days = options.traces.iter().map(|path| {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            Ok((path.display().to_string(), BufReader::new(file)))
        });
        trace::recorded(days.collect::<Result<Vec<_>>>()?, options.seed)?
    };
    let requests: usize = trace.functions.iter().map(|one| one.arrivals.len()).sum();
    eprintln!(
        "{} Functions, {requests} requests in {:.1} days",
        trace.functions.len(),
        trace.seconds / 86_400.0
    );
    let all: Option<Vec<Figures>> = POLICIES
        .iter()
        .map(|policy| {
            eprintln!("{:4.1}s  {}", begin.elapsed().as_secs_f64(), policy.name);
            figures(policy, &trace)
        })
        .collect();
    let all = all.context("the trace holds no request")?;
    let head = [
        "policy",
        "cold, % of requests",
        "of a Function's, p75",
        "memory, GB h",
        "of it idle",
        "start mean, ms",
        "p99",
    ];
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|one| {
            vec![
                one.policy.to_owned(),
                format!("{:.2}", 100.0 * one.cold_share),
                format!("{:.1}", 100.0 * one.cold_share_of_functions_p75),
                format!("{:.2}", one.memory_gb_hours),
                format!("{:.2}", one.idle_gb_hours),
                format!("{:.2}", one.start_mean),
                format!("{:.2}", one.start_p99),
            ]
        })
        .collect();
    print!("{}", table(&head, &rows));
    let text = serde_json::to_string_pretty(&serde_json::json!({
        "functions": trace.functions.len(), "requests": requests, "days": trace.seconds / 86_400.0,
        "policies": all,
    }))?;
    std::fs::write(&options.out, text + "\n")
        .with_context(|| format!("write {}", options.out.display()))
}
