//! Steady requests to several addresses, whatever becomes of the earlier ones, and what became of each.
//!
//! Every line of standard input is a list of [`Target`]s, which replaces the one before; the end of the
//! input ends the traffic. Every finished request is a line of standard output, a [`Request`].

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::ports::Ports;
use super::{micros, now};
use crate::http;

/// Two transmissions of a first packet: whoever does not answer by then is not there.
const CONNECTED_WITHIN: Duration = Duration::from_secs(2);
/// Longer than a Function under test may take.
const ANSWERED_WITHIN: Duration = Duration::from_secs(40);

/// Where requests go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Stands for it in the answers.
    pub name: String,
    /// Of a pod or a Service.
    pub address: SocketAddr,
    /// Between two requests.
    pub every_millis: u64,
    /// Connections are used again.
    pub kept: bool,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its target's name.
    pub target: String,
    /// Microseconds since 1970.
    pub began: u64,
    /// When its fate was known.
    pub ended: u64,
    /// That.
    pub fate: Fate,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// The right answer.
    Served {
        /// The pod that answered.
        pod: String,
        /// The zygote that its leaf came from, if it came from one.
        zygote: Option<String>,
    },
    /// Another status, with the reason in its body.
    Refused {
        /// Not 200.
        status: u16,
        /// What the body says.
        error: String,
    },
    /// It was not sent: nobody was there to take it.
    Unsent(String),
    /// It was sent, and the connection ended, or nothing came for long.
    Lost(String),
    /// The answer is not the one to this request.
    Wrong(String),
}

impl Fate {
    /// Whether all is well.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Fate::Served { .. })
    }
}

/// What the handler answers.
#[derive(Deserialize)]
struct Body {
    request: String,
    pod: String,
    zygote: Option<String>,
}

/// What the requests share.
struct Client {
    /// Connections that can be used again.
    idle: Mutex<HashMap<SocketAddr, Vec<http::Connection>>>,
    ports: Ports,
}

/// Sends until the end of standard input.
///
/// # Errors
/// If a line is no list of targets, or the kernel does not tell which local ports there are.
pub fn run() -> Result<()> {
    let targets: Arc<Mutex<Vec<Target>>> = Arc::default();
    let shown = Arc::clone(&targets);
    let client = Arc::new(Client::of_host()?);
    std::thread::spawn(move || send(&shown, &client));
    for line in std::io::stdin().lock().lines() {
        *lock(&targets) = serde_json::from_str(&line?)?;
    }
    Ok(())
}

impl Client {
    fn of_host() -> Result<Client> {
        Ok(Client {
            idle: Mutex::default(),
            ports: Ports::of_host()?,
        })
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends what is due, each request in a thread of its own: none waits for another.
fn send(targets: &Mutex<Vec<Target>>, client: &Arc<Client>) {
    let mut due: HashMap<String, Instant> = HashMap::new();
    let mut number = 0;
    loop {
        let begin = Instant::now();
        let now = lock(targets).clone();
        due.retain(|name, _| now.iter().any(|target| target.name == *name));
        for (index, target) in now.into_iter().enumerate() {
            let every = Duration::from_millis(target.every_millis);
            // Targets take turns.
            let first =
                begin + every.mul_f64(f64::from(u8::try_from(index % 8).unwrap_or(0)) / 8.0);
            let due = due.entry(target.name.clone()).or_insert(first);
            while *due <= begin {
                *due += every;
                number += 1;
                let (target, client) = (target.clone(), Arc::clone(client));
                std::thread::spawn(move || tell(&one(&target, number, &client)));
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn tell(request: &Request) {
    let Ok(mut line) = serde_json::to_vec(request) else {
        return;
    };
    line.push(b'\n');
    let mut output = std::io::stdout().lock();
    // Whoever asked may be gone.
    let _ = output.write_all(&line).and_then(|()| output.flush());
}

fn one(target: &Target, number: usize, client: &Client) -> Request {
    let (began, begin) = (now(), Instant::now());
    let fate = fate(target, number, client);
    Request {
        target: target.name.clone(),
        began,
        ended: began + micros(begin.elapsed()),
        fate,
    }
}

fn fate(target: &Target, number: usize, client: &Client) -> Fate {
    let request = http::Request {
        method: "GET".to_owned(),
        path: "/?request={n}".to_owned(),
        body: String::new(),
        expect: String::new(),
        part: String::new(),
    };
    let open = || {
        let stream = client.ports.connect(target.address, CONNECTED_WITHIN)?;
        http::Connection::over(stream, ANSWERED_WITHIN)
    };
    let kept = kept(target, client).map_or_else(open, Ok);
    let mut connection = match kept {
        Ok(connection) => connection,
        Err(error) => return Fate::Unsent(error.to_string()),
    };
    if let Err(error) = connection.send(&request.number(number)) {
        return Fate::Unsent(error.to_string());
    }
    let answer = match connection.receive() {
        Ok(answer) => answer,
        Err(error) => return Fate::Lost(format!("{error:#}")),
    };
    let fate = judge(&answer, number);
    if target.kept && !answer.last {
        lock(&client.idle)
            .entry(target.address)
            .or_default()
            .push(connection);
    }
    fate
}

/// A connection that is still good.
fn kept(target: &Target, client: &Client) -> Option<http::Connection> {
    if !target.kept {
        return None;
    }
    loop {
        let mut connection = lock(&client.idle).get_mut(&target.address)?.pop()?;
        if !connection.is_over() {
            return Some(connection);
        }
    }
}

fn judge(answer: &http::Answer, number: usize) -> Fate {
    let text = || String::from_utf8_lossy(&answer.body).into_owned();
    if answer.status != 200 {
        let said: Option<serde_json::Value> = serde_json::from_slice(&answer.body).ok();
        let error = said.and_then(|said| said["error"].as_str().map(str::to_owned));
        return Fate::Refused {
            status: answer.status,
            error: error.unwrap_or_else(text),
        };
    }
    match serde_json::from_slice::<Body>(&answer.body) {
        Ok(body) if body.request == number.to_string() => Fate::Served {
            pod: body.pod,
            zygote: body.zygote,
        },
        _ => Fate::Wrong(text()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn target(address: SocketAddr, kept: bool) -> Target {
        Target {
            name: "t".to_owned(),
            address,
            every_millis: 1,
            kept,
        }
    }

    /// Answers one connection with each of these, one a request, then ends it.
    fn server(answers: &'static [&'static str]) -> SocketAddr {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            for answer in answers {
                let _ = stream.read(&mut [0; 4096]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        address
    }

    #[test]
    fn every_fate_has_its_name() {
        let fate = |answers| {
            let client = Client::of_host().unwrap();
            fate(&target(server(answers), false), 7, &client)
        };
        assert_eq!(
            fate(&[
                "HTTP/1.1 200 OK\r\ncontent-length: 44\r\n\r\n{\"request\": \"7\", \"pod\": \"p\", \"zygote\": null}"
            ]),
            Fate::Served {
                pod: "p".to_owned(),
                zygote: None
            }
        );
        assert!(matches!(
            fate(&[
                "HTTP/1.1 200 OK\r\ncontent-length: 44\r\n\r\n{\"request\": \"8\", \"pod\": \"p\", \"zygote\": null}"
            ]),
            Fate::Wrong(_)
        ));
        assert_eq!(
            fate(&["HTTP/1.1 502 Bad Gateway\r\ncontent-length: 14\r\n\r\n{\"error\": \"e\"}"]),
            Fate::Refused {
                status: 502,
                error: "e".to_owned()
            }
        );
        assert!(matches!(
            fate(&["HTTP/1.1 200 OK\r\ncontent-le"]),
            Fate::Lost(_)
        ));
        assert!(matches!(fate(&[""]), Fate::Lost(_)));
    }

    #[test]
    fn what_nobody_listens_for_is_not_sent() {
        let gone = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let fate = fate(&target(gone, false), 1, &Client::of_host().unwrap());
        assert!(matches!(fate, Fate::Unsent(_)), "{fate:?}");
    }

    #[test]
    fn a_kept_connection_is_used_again_until_the_server_says_it_is_the_last() {
        let address = server(&[
            "HTTP/1.1 502 B\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 502 B\r\ncontent-length: 2\r\nConnection: close\r\n\r\n{}",
        ]);
        let client = Client::of_host().unwrap();
        for left in [1, 0] {
            let fate = fate(&target(address, true), 1, &client);
            assert!(matches!(fate, Fate::Refused { .. }), "{fate:?}");
            assert_eq!(
                lock(&client.idle).values().map(Vec::len).sum::<usize>(),
                left
            );
        }
    }
}
