//! Requests: drawn from published distributions, or recorded.

use std::collections::BTreeMap;
use std::io::BufRead;

use anyhow::{Context as _, Result, bail};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rand_distr::{Distribution as _, Exp1, LogNormal, StandardNormal};

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Since the beginning, in seconds.
    pub at: f64,
    /// How long it takes.
    pub seconds: f64,
}

/// A Function.
#[derive(Clone, Debug, Default)]
pub struct Function {
    /// Its requests, in order.
    pub arrivals: Vec<Request>,
}

/// Functions over some days.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Each with its requests.
    pub functions: Vec<Function>,
    /// All of it.
    pub seconds: f64,
}

const DAY: f64 = 86_400.0;
/// Invocations a day, and the share of applications that have no more ("Serverless in the Wild", ATC '20, figure 5: 45% at most
/// one an hour, 81% at most one a minute). The few above a hundred thousand are left out: for them no policy matters.
const RATES: [(f64, f64); 5] = [
    (0.0, 1.0),
    (0.45, 24.0),
    (0.81, 1440.0),
    (0.97, 20_000.0),
    (1.0, 100_000.0),
];
/// Execution times: a log-normal distribution of averages (section 3.4, figure 7), in seconds.
const EXECUTION: (f64, f64) = (-0.38, 2.36);
/// Around the average of a Function: most have executions of about the same length.
const AROUND: f64 = 0.4;
/// A Function's default limit.
const LONGEST: f64 = 60.0;

/// How requests follow each other (figure 6: a fifth of all applications have equal times between them, most are burstier
/// than at random).
#[derive(Clone, Copy)]
enum Pattern {
    Timer,
    Random,
    Bursts,
}

/// Draws a trace.
pub fn generated(functions: usize, days: usize, seed: u64) -> Trace {
    let mut random = StdRng::seed_from_u64(seed);
    let seconds = days as f64 * DAY;
    let functions = (0..functions).map(|_| function(&mut random, seconds));
    Trace {
        functions: functions.collect(),
        seconds,
    }
}

fn function(random: &mut StdRng, seconds: f64) -> Function {
    let rate = rate(random.random::<f64>()) / DAY;
    let pattern = match random.random::<f64>() {
        share if share < 0.2 => Pattern::Timer,
        share if share < 0.45 => Pattern::Random,
        _ => Pattern::Bursts,
    };
    let times = match pattern {
        Pattern::Timer => timer(random, rate, seconds),
        Pattern::Random => at_random(random, rate, seconds),
        Pattern::Bursts => bursts(random, rate, seconds),
    };
    Function {
        arrivals: with_executions(random, times),
    }
}

fn with_executions(random: &mut StdRng, mut times: Vec<f64>) -> Vec<Request> {
    times.sort_by(f64::total_cmp);
    let normal: f64 = StandardNormal.sample(random);
    let average = (EXECUTION.0 + EXECUTION.1 * normal).exp();
    let around = LogNormal::new(0.0, AROUND).ok();
    let requests = times.into_iter().map(|at| {
        let factor = around.map_or(1.0, |around| around.sample(random));
        let seconds = (average * factor).clamp(0.001, LONGEST);
        Request { at, seconds }
    });
    requests.collect()
}

/// Invocations a day of the application at this share of all: between the points it rises evenly by its logarithm.
fn rate(share: f64) -> f64 {
    let above = RATES
        .iter()
        .position(|(at, _)| *at >= share)
        .unwrap_or(RATES.len() - 1);
    let (low, high) = (RATES[above.max(1) - 1], RATES[above.max(1)]);
    let part = (share - low.0) / (high.0 - low.0);
    (low.1.ln() + part * (high.1.ln() - low.1.ln())).exp()
}

fn timer(random: &mut StdRng, rate: f64, seconds: f64) -> Vec<f64> {
    let period = 1.0 / rate;
    let first = random.random::<f64>() * period;
    // A scheduler's own delay.
    let times = std::iter::successors(Some(first), |at| Some(at + period));
    times
        .take_while(|at| *at < seconds)
        .map(|at| at + 0.2 * random.random::<f64>())
        .collect()
}

/// More by day than by night (figure 4: the valley is at about half of the peak).
fn by_day(at: f64) -> f64 {
    1.0 - 0.33 * (std::f64::consts::TAU * at / DAY).cos()
}

fn at_random(random: &mut StdRng, rate: f64, seconds: f64) -> Vec<f64> {
    // By thinning (Lewis and Shedler, 1979).
    let most = 1.33 * rate;
    let mut at = 0.0;
    let mut times = Vec::new();
    loop {
        let step: f64 = Exp1.sample(random);
        at += step / most;
        if at >= seconds {
            return times;
        }
        if random.random::<f64>() * 1.33 < by_day(at) {
            times.push(at);
        }
    }
}

/// Sessions at random, each with requests some seconds apart.
fn bursts(random: &mut StdRng, rate: f64, seconds: f64) -> Vec<f64> {
    let size = 2.0 + 30.0 * random.random::<f64>().powi(2);
    let apart = 0.2 + 20.0 * random.random::<f64>().powi(2);
    let mut times = Vec::new();
    for begin in at_random(random, rate / size, seconds) {
        let mut at = begin;
        loop {
            times.push(at);
            let step: f64 = Exp1.sample(random);
            at += step * apart;
            if at >= seconds || random.random::<f64>() < 1.0 / size {
                break;
            }
        }
    }
    times
}

/// Minutes of a day.
const MINUTES: usize = 1440;

/// Reads days as the Azure Functions Trace 2019 has them: one file a day with a head, and a line for each function with owner,
/// application, function and trigger, and then its invocations in each minute. Within a minute they are spread at random;
/// execution times are drawn, since that trace keeps them elsewhere.
///
/// # Errors
/// A line that is not of that kind, with its number.
pub fn recorded(days: Vec<(String, impl BufRead)>, seed: u64) -> Result<Trace> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut functions: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let seconds = days.len() as f64 * DAY;
    for (day, (name, lines)) in days.into_iter().enumerate() {
        for (index, line) in lines.lines().enumerate().skip(1) {
            let number = index + 1;
            let line = line.with_context(|| format!("{name}, line {number}"))?;
            let fields: Vec<&str> = line.trim_end().split(',').collect();
            let Some((about, minutes)) = fields.split_at_checked(4) else {
                bail!(
                    "{name}, line {number}: {} fields, where owner, application, function, trigger and {MINUTES} numbers are due",
                    fields.len()
                );
            };
            if minutes.len() != MINUTES {
                bail!(
                    "{name}, line {number}: {} minutes, where a day has {MINUTES}",
                    minutes.len()
                );
            }
            let times = functions.entry(about[..3].join(",")).or_default();
            for (minute, count) in minutes.iter().enumerate() {
                let count: u32 = count.parse().with_context(|| {
                    format!(
                        "{name}, line {number}, minute {}: {count:?} is no number of invocations",
                        minute + 1
                    )
                })?;
                let begin = day as f64 * DAY + minute as f64 * 60.0;
                times.extend((0..count).map(|_| begin + 60.0 * random.random::<f64>()));
            }
        }
    }
    let functions = functions.into_values().map(|times| Function {
        arrivals: with_executions(&mut random, times),
    });
    Ok(Trace {
        functions: functions.collect(),
        seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_that_were_published() {
        assert!((rate(0.45) - 24.0).abs() < 1e-6 && (rate(0.81) - 1440.0).abs() < 1e-6);
        assert!((rate(0.0) - 1.0).abs() < 1e-9 && (rate(1.0) - 100_000.0).abs() < 1e-4);
        let trace = generated(1500, 1, 7);
        let share = |most: f64| {
            let below = |one: &&Function| one.arrivals.len() as f64 <= most;
            trace.functions.iter().filter(below).count() as f64 / 1500.0
        };
        assert!((share(24.0) - 0.45).abs() < 0.07, "{}", share(24.0));
        assert!((share(1440.0) - 0.81).abs() < 0.05, "{}", share(1440.0));
    }

    #[test]
    fn requests_are_in_order_and_the_same_for_the_same_seed() {
        let (one, same, other) = (
            generated(50, 1, 1),
            generated(50, 1, 1),
            generated(50, 1, 2),
        );
        let all = |trace: &Trace| -> Vec<f64> {
            let all = trace.functions.iter().flat_map(|one| &one.arrivals);
            all.map(|request| request.at).collect()
        };
        assert_eq!(all(&one), all(&same));
        assert_ne!(all(&one), all(&other));
        for function in &one.functions {
            let times = &function.arrivals;
            assert!(times.windows(2).all(|pair| pair[0].at <= pair[1].at));
            assert!(times.iter().all(|one| one.at >= 0.0 && one.at < DAY + 1.0));
        }
    }

    fn line(about: &str, counts: &[(usize, u32)]) -> String {
        let mut minutes = vec![0; MINUTES];
        for (minute, count) in counts {
            minutes[*minute] = *count;
        }
        let minutes: Vec<String> = minutes.iter().map(u32::to_string).collect();
        format!("{about},{}\n", minutes.join(","))
    }

    #[test]
    fn a_recorded_trace_is_read_day_by_day() {
        let days = [
            (
                "d01".to_owned(),
                "head\n".to_owned()
                    + &line("o,a,f,http", &[(0, 2), (1439, 1)])
                    + &line("o,a,g,timer", &[(5, 1)]),
            ),
            (
                "d02".to_owned(),
                "head\n".to_owned() + &line("o,a,f,http", &[(1, 3)]),
            ),
        ];
        let days = days
            .iter()
            .map(|(name, text)| (name.clone(), text.as_bytes()));
        let trace = recorded(days.collect(), 1).unwrap();
        assert_eq!(trace.functions.len(), 2);
        let times: Vec<f64> = trace.functions[0]
            .arrivals
            .iter()
            .map(|one| one.at)
            .collect();
        assert_eq!(times.len(), 6);
        assert!(times[..2].iter().all(|at| *at < 60.0));
        assert!((DAY - 60.0..DAY).contains(&times[2]));
        assert!(
            times[3..]
                .iter()
                .all(|at| (DAY + 60.0..DAY + 120.0).contains(at))
        );
        assert!((trace.seconds - 2.0 * DAY).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_trace_is_named_with_its_line() {
        for (text, words) in [
            ("head\no,a,f\n".to_owned(), "d01, line 2: 3 fields"),
            (
                "head\no,a,f,http,1,2\n".to_owned(),
                "d01, line 2: 2 minutes",
            ),
            (
                "head\n".to_owned() + &line("o,a,f,http", &[]).replacen(",0,", ",x,", 1),
                "line 2, minute 1: \"x\" is no number",
            ),
        ] {
            let error = recorded(vec![("d01".to_owned(), text.as_bytes())], 1).unwrap_err();
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
    }
}
