//! Requests to many addresses, some of them more popular than others, as fast as they are answered: how many are, and how long each takes.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::micros;
use super::rate::repeated;
use crate::http::{Connection, Request};
use crate::workload::draw::Zipf;

/// Clients that each send one request after the other, on new connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mix {
    /// Of pods, the most popular first.
    pub addresses: Vec<SocketAddr>,
    /// What each of them is asked.
    pub request: Request,
    /// How many at once.
    pub clients: usize,
    /// For how long, after every address was asked once.
    pub seconds: usize,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Answers in each second.
    pub counts: Vec<u64>,
    /// Microseconds of each request, from before its connection was made until its whole answer was there.
    pub took: Vec<u64>,
}

/// Sends the same requests to the same addresses each time.
///
/// # Errors
/// If an answer is wrong.
pub fn run(mix: &Mix) -> Result<Outcome> {
    for (number, address) in mix.addresses.iter().enumerate() {
        once(*address, &mix.request, number)?;
    }
    let popularity = Zipf::new(mix.addresses.len());
    let took = Mutex::new(Vec::new());
    let counts = repeated(mix.clients, mix.seconds, |number| {
        let mut random = StdRng::seed_from_u64(number as u64);
        let address = mix.addresses[popularity.draw(&mut random)];
        let micros = once(address, &mix.request, number)?;
        took.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(micros);
        Ok(())
    })?;
    let took = took.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Outcome { counts, took })
}

/// Microseconds that one request took.
fn once(address: SocketAddr, request: &Request, number: usize) -> Result<u64> {
    let request = request.number(number);
    let begin = Instant::now();
    let answer = Connection::open(address)?.ask(&request);
    let took = micros(begin.elapsed());
    answer
        .and_then(|answer| request.check(&answer))
        .with_context(|| address.to_string())?;
    Ok(took)
}
