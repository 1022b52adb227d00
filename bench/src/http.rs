//! A client for HTTP/1.1 that adds as little as possible to what it measures: blocking sockets, one
//! write for a request, answers of a known length.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// More than any timeout of a Function under test: a request that takes this long is lost.
const PATIENCE: Duration = Duration::from_secs(90);

/// What is asked, and which answer is right. `{n}` stands for the number of the request, so that the
/// answer to another one is not taken for right.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// `GET`, `POST`.
    pub method: String,
    /// With the query.
    pub path: String,
    /// Empty for none.
    #[serde(default)]
    pub body: String,
    /// The body of the right answer: compared as JSON if it is JSON, else as text.
    pub expect: String,
    /// Which part of a JSON body that is (RFC 6901), for servers that wrap what a handler returns; empty for all of it.
    #[serde(default)]
    pub part: String,
}

/// A request with its number put in.
#[derive(Debug)]
pub struct Numbered {
    bytes: Vec<u8>,
    expect: String,
    part: String,
}

impl Request {
    /// The `n`-th of its kind.
    #[must_use]
    pub fn number(&self, n: usize) -> Numbered {
        let put = |text: &str| text.replace("{n}", &n.to_string());
        let (path, body) = (put(&self.path), put(&self.body));
        let mut bytes = format!("{} {path} HTTP/1.1\r\nhost: sock-bench\r\n", self.method);
        if !body.is_empty() {
            bytes += &format!("content-length: {}\r\n", body.len());
        }
        bytes += "\r\n";
        bytes += &body;
        Numbered {
            bytes: bytes.into_bytes(),
            expect: put(&self.expect),
            part: self.part.clone(),
        }
    }
}

impl Numbered {
    /// # Errors
    /// Says what came instead of the right answer.
    pub fn check(&self, answer: &Answer) -> Result<()> {
        let body = String::from_utf8_lossy(&answer.body);
        let value = serde_json::from_str::<serde_json::Value>;
        let right = match (value(&self.expect), value(&body)) {
            (Ok(expected), Ok(got)) => got.pointer(&self.part) == Some(&expected),
            _ => self.expect == body,
        };
        if answer.status != 200 || !right {
            bail!(
                "status {}, body {body:?} instead of {:?}",
                answer.status,
                self.expect
            );
        }
        Ok(())
    }
}

/// What was answered.
#[derive(Debug)]
pub struct Answer {
    /// Of the status line.
    pub status: u16,
    /// All of it.
    pub body: Vec<u8>,
    /// The server takes no further request on this connection.
    pub last: bool,
}

/// A connection, used for one request after the other.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// # Errors
    /// What `connect(2)` says.
    pub fn open(address: SocketAddr) -> std::io::Result<Connection> {
        Connection::over(TcpStream::connect_timeout(&address, PATIENCE)?, PATIENCE)
    }

    /// Over this stream, with patience for each piece of an answer.
    ///
    /// # Errors
    /// What `setsockopt(2)` says.
    pub fn over(stream: TcpStream, answer: Duration) -> std::io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(answer))?;
        Ok(Connection {
            stream,
            buffer: Vec::with_capacity(16 * 1024),
        })
    }

    /// Sends and waits for the whole answer.
    ///
    /// # Errors
    /// If the connection ends early, or what comes is no answer of a known length.
    pub fn ask(&mut self, request: &Numbered) -> Result<Answer> {
        self.send(request).context("sending")?;
        self.receive()
    }

    /// Whether the server has closed it, or said something unasked.
    pub fn is_over(&mut self) -> bool {
        if !self.buffer.is_empty() || self.stream.set_nonblocking(true).is_err() {
            return true;
        }
        let silent = matches!(self.stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
        !silent || self.stream.set_nonblocking(false).is_err()
    }

    /// Sends a request.
    ///
    /// # Errors
    /// If the connection has ended: then the server has not got the whole of it.
    pub fn send(&mut self, request: &Numbered) -> std::io::Result<()> {
        self.stream.write_all(&request.bytes)
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// If the connection ends early, or what comes is no answer of a known length.
    pub fn receive(&mut self) -> Result<Answer> {
        let Head {
            status,
            head,
            length,
            last,
        } = loop {
            if let Some(head) = head(&self.buffer)? {
                break head;
            }
            self.more().context("waiting for the head of the answer")?;
        };
        while self.buffer.len() < head + length {
            self.more().context("waiting for the rest of the answer")?;
        }
        let rest = self.buffer.split_off(head + length);
        let body = std::mem::replace(&mut self.buffer, rest).split_off(head);
        Ok(Answer { status, body, last })
    }

    fn more(&mut self) -> Result<()> {
        let mut bytes = [0; 16 * 1024];
        match self.stream.read(&mut bytes)? {
            0 => bail!("the connection ended after {} bytes", self.buffer.len()),
            count => self.buffer.extend_from_slice(&bytes[..count]),
        }
        Ok(())
    }
}

/// What the head of an answer says.
struct Head {
    status: u16,
    /// Bytes until the body.
    head: usize,
    /// Bytes of the body.
    length: usize,
    last: bool,
}

/// `None` until the head is complete.
fn head(bytes: &[u8]) -> Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes).context("head of the answer")?
    else {
        return Ok(None);
    };
    let status = response.code.context("an answer without a status")?;
    let value = |name: &str| {
        let mut headers = response.headers.iter();
        headers
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value.trim_ascii())
    };
    let length = value("content-length")
        .with_context(|| format!("an answer with status {status} and without content-length"))?;
    Ok(Some(Head {
        status,
        head,
        length: std::str::from_utf8(length)?.parse()?,
        last: value("connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close")),
    }))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn request() -> Request {
        Request {
            method: "POST".to_owned(),
            path: "/?request={n}".to_owned(),
            body: "{\"n\":\"{n}\"}".to_owned(),
            expect: "{\"n\": \"{n}\"}".to_owned(),
            part: String::new(),
        }
    }

    #[test]
    fn an_answer_in_pieces_is_put_together_and_the_next_one_kept_apart() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let served = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut got = vec![0; request().number(7).bytes.len()];
            stream.read_exact(&mut got).unwrap();
            for piece in [
                "HTTP/1.1 200 OK\r\nContent-Le",
                "ngth: 9\r\n\r\n{\"n\":",
                "\"7\"}HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n",
            ] {
                stream.write_all(piece.as_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
            String::from_utf8(got).unwrap()
        });
        let mut connection = Connection::open(address).unwrap();
        let seventh = request().number(7);
        let answer = connection.ask(&seventh).unwrap();
        seventh.check(&answer).unwrap();
        let next = connection.ask(&request().number(8)).unwrap();
        assert_eq!(next.status, 204);
        let sent = served.join().unwrap();
        assert!(sent.starts_with("POST /?request=7 HTTP/1.1\r\n"), "{sent}");
        assert!(sent.ends_with("\r\n\r\n{\"n\":\"7\"}"), "{sent}");
    }

    #[test]
    fn the_answer_to_another_request_is_wrong() {
        let answer = |status, body: &str| Answer {
            status,
            body: body.as_bytes().to_vec(),
            last: false,
        };
        let seventh = request().number(7);
        assert!(seventh.check(&answer(200, "{\"n\":\"8\"}")).is_err());
        assert!(seventh.check(&answer(500, "{\"n\":\"7\"}")).is_err());
        assert!(seventh.check(&answer(200, "")).is_err());
    }

    #[test]
    fn a_part_of_an_answer_may_be_what_counts() {
        let wrapped = Request {
            part: "/result".to_owned(),
            ..request()
        };
        let answer = |body: &str| Answer {
            status: 200,
            body: body.as_bytes().to_vec(),
            last: false,
        };
        let seventh = wrapped.number(7);
        let right = r#"{"id": 1, "result": {"n": "7"}}"#;
        seventh.check(&answer(right)).unwrap();
        assert!(seventh.check(&answer(r#"{"n": "7"}"#)).is_err());
        assert!(request().number(7).check(&answer(right)).is_err());
    }

    #[test]
    fn a_connection_that_ends_within_an_answer_is_an_error() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let served = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut got = vec![0; request().number(1).bytes.len()];
            stream.read_exact(&mut got).unwrap();
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")
                .unwrap();
        });
        let mut connection = Connection::open(address).unwrap();
        let error = connection.ask(&request().number(1)).unwrap_err();
        assert!(
            format!("{error:#}").contains("the connection ended"),
            "{error:#}"
        );
        served.join().unwrap();
    }
}
