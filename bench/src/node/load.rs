//! Requests to one address, each timed from before its connection is made (or, on a kept one, from
//! before it is sent) until its whole answer is there.

use std::net::SocketAddr;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{micros, now};
use crate::http::{Connection, Request};

/// How connections are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Connections {
    /// A new one for every request.
    New,
    /// One for all.
    Kept,
    /// A new one for every request, and all requests at once.
    AtOnce,
}

/// What to send.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Load {
    /// Of a pod.
    pub address: SocketAddr,
    /// What is asked.
    pub request: Request,
    /// How connections are used.
    pub connections: Connections,
    /// Requests before the measured ones.
    pub warm_up: usize,
    /// Measured requests.
    pub requests: usize,
    /// Time between an answer and the next request.
    pub pause_millis: u64,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Microseconds since 1970.
    pub began: u64,
    /// Microseconds until its answer was complete.
    pub took: u64,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The requests that were answered rightly.
    pub samples: Vec<Sample>,
    /// What happened to the others.
    pub wrong: Vec<String>,
}

/// Sends the load.
///
/// # Errors
/// If a request before the measured ones is not answered rightly. What goes wrong after that is in
/// the outcome.
pub fn run(load: &Load) -> Result<Outcome> {
    let mut connection = None;
    for number in 0..load.warm_up {
        if let Err(error) = one(load, number, &mut connection) {
            bail!("request {number} to warm up: {error:#}");
        }
        pause(load);
    }
    let measured = load.warm_up..load.warm_up + load.requests;
    let results: Vec<Result<Sample>> = if load.connections == Connections::AtOnce {
        let together = Barrier::new(load.requests);
        std::thread::scope(|scope| {
            let threads: Vec<_> = measured
                .map(|number| {
                    let together = &together;
                    scope.spawn(move || {
                        together.wait();
                        one(load, number, &mut None)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| bail!("its thread panicked"))
                })
                .collect()
        })
    } else {
        measured
            .map(|number| {
                let result = one(load, number, &mut connection);
                pause(load);
                result
            })
            .collect()
    };
    let mut outcome = Outcome::default();
    for result in results {
        match result {
            Ok(sample) => outcome.samples.push(sample),
            Err(error) => outcome.wrong.push(format!("{error:#}")),
        }
    }
    Ok(outcome)
}

/// The answer to one request.
///
/// # Errors
/// If there is none, or its status is not 200.
pub fn call(load: &Load) -> Result<String> {
    let answer = Connection::open(load.address)?.ask(&load.request.number(0))?;
    let body = String::from_utf8(answer.body)?;
    if answer.status != 200 {
        bail!("status {}, body {body:?}", answer.status);
    }
    Ok(body)
}

fn pause(load: &Load) {
    std::thread::sleep(Duration::from_millis(load.pause_millis));
}

fn one(load: &Load, number: usize, kept: &mut Option<Connection>) -> Result<Sample> {
    let request = load.request.number(number);
    let began = now();
    let begin = Instant::now();
    let mut connection = match kept.take() {
        Some(connection) => connection,
        None => Connection::open(load.address)?,
    };
    let answer = connection.ask(&request)?;
    let took = micros(begin.elapsed());
    request.check(&answer)?;
    if load.connections == Connections::Kept {
        *kept = Some(connection);
    }
    Ok(Sample { began, took })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// Answers every request of every connection with its path, the request "/5" wrongly; returns
    /// the number of connections once `count` of them have ended.
    fn server(count: usize) -> (SocketAddr, std::thread::JoinHandle<()>) {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let connections: Vec<_> = (0..count)
                .map(|_| {
                    let (mut stream, _) = server.accept().unwrap();
                    std::thread::spawn(move || {
                        let mut bytes = [0; 1024];
                        loop {
                            let length = stream.read(&mut bytes).unwrap();
                            if length == 0 {
                                return;
                            }
                            let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
                            let path = text.split(' ').nth(1).unwrap();
                            let body = if path == "/5" { "no" } else { path };
                            let head = format!(
                                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                                body.len()
                            );
                            stream.write_all((head + body).as_bytes()).unwrap();
                        }
                    })
                })
                .collect();
            for connection in connections {
                connection.join().unwrap();
            }
        });
        (address, serving)
    }

    fn load(address: SocketAddr, connections: Connections) -> Load {
        let request = Request {
            method: "GET".to_owned(),
            path: "/{n}".to_owned(),
            body: String::new(),
            expect: "/{n}".to_owned(),
            part: String::new(),
        };
        Load {
            address,
            request,
            connections,
            warm_up: 2,
            requests: 6,
            pause_millis: 0,
        }
    }

    #[test]
    fn a_wrong_answer_is_reported_and_not_timed() {
        let (address, serving) = server(8);
        let outcome = run(&load(address, Connections::New)).unwrap();
        assert_eq!(outcome.samples.len(), 5);
        assert_eq!(outcome.wrong.len(), 1);
        assert!(outcome.wrong[0].contains("\"no\" instead of \"/5\""));
        serving.join().unwrap();
    }

    #[test]
    fn a_kept_connection_is_one() {
        let (address, serving) = server(2);
        let outcome = run(&load(address, Connections::Kept)).unwrap();
        assert_eq!((outcome.samples.len(), outcome.wrong.len()), (5, 1));
        serving.join().unwrap();
    }

    #[test]
    fn all_at_once_come_on_connections_of_their_own() {
        let (address, serving) = server(8);
        let outcome = run(&load(address, Connections::AtOnce)).unwrap();
        assert_eq!((outcome.samples.len(), outcome.wrong.len()), (5, 1));
        serving.join().unwrap();
    }

    #[test]
    fn a_wrong_answer_while_warming_up_ends_it() {
        let (address, serving) = server(6);
        let mut load = load(address, Connections::New);
        load.warm_up = 6;
        assert!(run(&load).is_err());
        serving.join().unwrap();
    }
}
