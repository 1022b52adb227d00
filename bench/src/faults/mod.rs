//! What faults cost: each is injected into steady traffic, again and again, and every request is
//! accounted for until all is whole again.
//!
//! Whole means: every pod is ready, and the container that had to be replaced is; every pod has answered, each of
//! those whose leaves serve one request by a fork of a zygote that lives; and from then on nothing failed for
//! a second.

mod account;
mod inject;
mod stage;
mod traffic;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

pub use inject::{ALL, Fault};

use self::inject::Injected;
use self::stage::{CLEAN_MICROS, FRESH, Pod, Stage};
use crate::cluster;
use crate::measure::millis;
use crate::node::now;
use crate::node::traffic::{Fate, Request};
use crate::progress::Progress;
use crate::stats::Samples;
use crate::table::table;

const WHOLE_WITHIN: Duration = Duration::from_secs(420);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// Of each fault.
    pub rounds: usize,
    /// Which.
    pub faults: Vec<Fault>,
    /// How long the API server stays away.
    pub away: Duration,
    /// Where the rounds go.
    pub out: PathBuf,
}

/// One injection.
#[derive(Debug, Serialize)]
struct Round {
    /// Requests that were sent while it lasted, from the fault until all was whole.
    requests: usize,
    /// Sent and never answered, that the hit pod may have been serving when it was hit.
    lost_served: usize,
    /// Sent and never answered, all others.
    lost: usize,
    /// Answered with another status, by the answer.
    answered: BTreeMap<String, usize>,
    /// Not sent, since nobody took the connection.
    unsent: usize,
    /// Answered with what belongs to another request.
    wrong: usize,
    /// Failed although they began after the fault.
    later: usize,
    /// Until every pod was ready.
    ready_millis: f64,
    /// Until all was whole.
    whole_millis: f64,
    /// What the client or Kubernetes said.
    words: Vec<String>,
}

/// All rounds of one fault.
#[derive(Debug, Serialize)]
struct Report {
    fault: &'static str,
    rounds: Vec<Round>,
    /// Things on the nodes that were not there before, by kind.
    left: BTreeMap<String, usize>,
    /// What of these kinds is there and was not before.
    new: Vec<String>,
    /// Rounds that ended otherwise.
    failed: Vec<String>,
}

/// Injects, prints, and writes what came of it.
///
/// # Errors
/// If the cluster cannot be prepared, or a fault not be injected, or what it broke does not come back.
pub fn run(options: &Options) -> Result<()> {
    let progress = Progress::start();
    progress.step("two Functions of two pods each");
    let mut stage = Stage::set()?;
    let result = inject_all(options, &mut stage, &progress);
    progress.step("removing what was made");
    stage.strike()?;
    let reports = result?;
    println!("\n{}", overview(&reports));
    if let Some(directory) = options.out.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(&options.out, serde_json::to_string_pretty(&reports)? + "\n")
        .with_context(|| options.out.display().to_string())?;
    eprintln!("written: {}", options.out.display());
    let failed = reports
        .iter()
        .map(|report| report.failed.len())
        .sum::<usize>();
    if failed > 0 {
        bail!("{failed} rounds did not end whole");
    }
    Ok(())
}

fn inject_all(options: &Options, stage: &mut Stage, progress: &Progress) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    stage.steady()?;
    stage.fall_silent()?;
    progress.step("counting what is on the nodes");
    let before = account::settled(&stage.workers)?;
    for &fault in &options.faults {
        let mut report = Report {
            fault: fault.name(),
            rounds: Vec::new(),
            left: BTreeMap::new(),
            new: Vec::new(),
            failed: Vec::new(),
        };
        let rounds = options.rounds;
        for round in 0..rounds {
            let pods = stage.steady()?;
            match one(stage, fault, &pods, round, options.away) {
                Ok(made) => {
                    progress.step(&format!(
                        "{} {} of {rounds}: {}",
                        fault.name(),
                        round + 1,
                        words(&made)
                    ));
                    report.rounds.push(made);
                }
                Err(error) => {
                    progress.step(&format!(
                        "{} {} of {rounds}: {error:#}",
                        fault.name(),
                        round + 1
                    ));
                    report.failed.push(format!("{error:#}"));
                }
            }
        }
        stage.steady()?;
        stage.fall_silent()?;
        (report.left, report.new) = account::left(&stage.workers, &before)?;
        if !report.left.is_empty() {
            progress.step(&format!("left by {}: {:?}", fault.name(), report.left));
        }
        reports.push(report);
        // What has been made can be read if a later fault is interrupted.
        std::fs::create_dir_all(options.out.parent().unwrap_or(&options.out))?;
        std::fs::write(&options.out, serde_json::to_string_pretty(&reports)?)?;
    }
    Ok(reports)
}

fn one(
    stage: &mut Stage,
    fault: Fault,
    pods: &[Pod],
    round: usize,
    away: Duration,
) -> Result<Round> {
    stage.traffic.forget(now().saturating_sub(2 * CLEAN_MICROS));
    let injected = fault.inject(stage, pods, round, away)?;
    let (ready, whole) = recover(stage, &injected, round)?;
    let made = judge(stage, &injected, ready, whole);
    if let Some(pod) = &injected.worn {
        let arguments = [
            "delete",
            "pod",
            "-n",
            &pod.namespace,
            &pod.name,
            "--wait=true",
        ];
        cluster::kubectl(&arguments)?;
    }
    Ok(made)
}

/// Waits until all is whole. Returns when every pod was ready, and when all was whole.
fn recover(stage: &mut Stage, injected: &Injected, round: usize) -> Result<(u64, u64)> {
    let deadline = Instant::now() + WHOLE_WITHIN;
    let mut probed = !injected.renewal.operator;
    let (mut ready, mut pods): (Option<u64>, Vec<Pod>) = (None, Vec::new());
    let mut first = true;
    loop {
        let looked = now();
        let found = if probed {
            stage.look(&injected.renewal)
        } else {
            stage::change_probe(round).and_then(|()| {
                probed = true;
                stage.look(&injected.renewal)
            })
        };
        let state = match found {
            Ok(found) => {
                // Nothing had changed at the first look: nothing was ever away.
                ready = ready.or(Some(if first { injected.over } else { looked }));
                pods = found;
                None
            }
            Err(error) => {
                ready = None;
                Some(error)
            }
        };
        first = false;
        if let Some(ready) = ready
            && let Some(whole) = whole(stage, injected, &pods, ready)
        {
            return Ok((ready, whole));
        }
        if Instant::now() > deadline {
            let message = format!("not whole within {} s", WHOLE_WITHIN.as_secs());
            let failures: Vec<Request> = stage.failures(now() - CLEAN_MICROS).take(5).collect();
            return Err(state
                .unwrap_or_else(|| anyhow::anyhow!("{failures:?}"))
                .context(message));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// When all was whole, if a second of it has passed.
fn whole(stage: &Stage, injected: &Injected, pods: &[Pod], ready: u64) -> Option<u64> {
    let requests = stage.traffic.since(injected.at);
    let after = |request: &&Request| request.began >= injected.over;
    let mut whole = ready;
    for pod in pods.iter().filter(|pod| pod.function.is_some()) {
        let mut answers = requests
            .iter()
            .filter(after)
            .filter(|request| match &request.fate {
                // A leaf that serves many requests outlives its zygote.
                Fate::Served { pod: by, zygote } if pod.function.as_deref() == Some(FRESH) => {
                    let lives = |zygote| !injected.renewal.zygotes.contains(zygote);
                    *by == pod.name && zygote.as_ref().is_some_and(lives)
                }
                Fate::Served { pod: by, .. } => *by == pod.name,
                _ => false,
            });
        whole = whole.max(answers.next()?.ended);
    }
    let failures = requests.iter().filter(|request| !request.fate.is_good());
    whole = failures.map(|request| request.ended).fold(whole, u64::max);
    // Requests that are under way have not told yet: the second begins to count when most of them have.
    (now() > whole + CLEAN_MICROS + CLEAN_MICROS / 5).then_some(whole)
}

fn judge(stage: &Stage, injected: &Injected, ready: u64, whole: u64) -> Round {
    let requests = stage.traffic.since(injected.at);
    let since = |time: u64| millis(time.saturating_sub(injected.over));
    let mut made = Round {
        requests: requests.len(),
        lost_served: 0,
        lost: 0,
        answered: BTreeMap::new(),
        unsent: 0,
        wrong: 0,
        later: 0,
        ready_millis: since(ready),
        whole_millis: since(whole),
        words: injected.seen.iter().cloned().collect(),
    };
    for request in requests {
        let before = request.began <= injected.at;
        let served = request.began <= injected.gone
            && injected.served.as_ref().is_some_and(|pod| {
                request.target.starts_with("service ") || request.target.ends_with(pod.as_str())
            });
        let word = match request.fate {
            Fate::Served { .. } => continue,
            Fate::Refused { status, error } => {
                let answer = format!("{status} {error}");
                *made.answered.entry(answer).or_default() += 1;
                None
            }
            Fate::Unsent(word) => {
                made.unsent += 1;
                Some(word)
            }
            Fate::Lost(word) => {
                *(if served {
                    &mut made.lost_served
                } else {
                    &mut made.lost
                }) += 1;
                Some(word)
            }
            Fate::Wrong(word) => {
                made.wrong += 1;
                Some(word)
            }
        };
        made.later += usize::from(!before);
        if let Some(word) = word {
            let kind = request.target.split(' ').next().unwrap_or_default();
            let after = millis(request.began.saturating_sub(injected.at));
            let word = format!("{kind}, sent {after:.0} ms after: {word}");
            if made.words.len() < 12 {
                made.words.push(word);
            }
        }
    }
    made
}

/// A round in a line.
fn words(round: &Round) -> String {
    let mut text = format!("whole after {:.1} s", round.whole_millis / 1000.0);
    for (count, what) in [
        (round.lost_served, "lost that it was serving"),
        (round.lost, "lost"),
        (round.answered.values().sum(), "answered by an error"),
        (round.unsent, "not sent"),
        (round.wrong, "answered wrongly"),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text + &format!(" (of {})", round.requests)
}

fn overview(reports: &[Report]) -> String {
    let rows: Vec<Vec<String>> = reports.iter().map(row).collect();
    table(
        &[
            "fault",
            "rounds",
            "lost p50",
            "max",
            "served by it p50",
            "max",
            "error p50",
            "max",
            "not sent p50",
            "max",
            "whole p50 s",
            "max s",
            "left",
        ],
        &rows,
    )
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests of seconds")]
fn row(report: &Report) -> Vec<String> {
    let mut cells = vec![report.fault.to_owned(), report.rounds.len().to_string()];
    let mut add = |values: Vec<f64>, places: usize| {
        for percent in [50, 100] {
            let cell = Samples::new(values.clone()).map_or_else(
                || "-".to_owned(),
                |samples| format!("{:.places$}", samples.percentile(percent)),
            );
            cells.push(cell);
        }
    };
    let all = |of: &dyn Fn(&Round) -> usize| {
        report
            .rounds
            .iter()
            .map(|round| of(round) as f64)
            .collect::<Vec<_>>()
    };
    add(all(&|round| round.lost), 0);
    add(all(&|round| round.lost_served), 0);
    add(all(&|round| round.answered.values().sum()), 0);
    add(all(&|round| round.unsent), 0);
    add(
        report
            .rounds
            .iter()
            .map(|round| round.whole_millis / 1000.0)
            .collect(),
        1,
    );
    cells.push(report.left.values().sum::<usize>().to_string());
    cells
}
