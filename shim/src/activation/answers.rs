//! The three answers that the shim gives itself: 429 when too many wait, 502 when a leaf ended before
//! it answered or none can be started, 504 when a request took too long.

use std::time::{Duration, Instant, SystemTime};

use super::decide::Answer;
use super::end::End;

impl Answer {
    /// HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Answer::Overloaded => 429,
            Answer::Crashed | Answer::Unstartable | Answer::Stopping => 502,
            Answer::TimedOut => 504,
        }
    }

    fn reason(self) -> &'static str {
        match self.status() {
            429 => "Too Many Requests",
            502 => "Bad Gateway",
            _ => "Gateway Timeout",
        }
    }

    /// What the client reads. `end` is how the leaf ended that had its request.
    pub(super) fn error(self, end: Option<End>) -> String {
        let text = match self {
            Answer::Crashed => {
                return format!(
                    "the function's process {} before it answered",
                    end.unwrap_or(End::Unknown)
                );
            }
            Answer::Overloaded => "too many requests wait for an instance of this function",
            Answer::Unstartable => "the function's process could not be started",
            Answer::Stopping => "this instance of the function is stopping",
            Answer::TimedOut => "the function did not answer in time",
        };
        text.to_owned()
    }

    /// The whole response. The connection ends with it, since nobody is left to read from it.
    #[must_use]
    pub fn render(self, error: &str, request_id: &str, now: SystemTime) -> Vec<u8> {
        let body = serde_json::json!({
            "error": error, "type": self.reason().replace(' ', ""), "requestId": request_id,
        })
        .to_string();
        let retry = if self == Answer::Overloaded {
            "Retry-After: 1\r\n"
        } else {
            ""
        };
        format!(
            "HTTP/1.1 {} {}\r\nDate: {}\r\nContent-Type: application/json\r\nX-Request-Id: {request_id}\r\nContent-Length: {}\r\n{retry}Connection: close\r\n\r\n{body}",
            self.status(),
            self.reason(),
            httpdate::fmt_http_date(now),
            body.len(),
        )
        .into_bytes()
    }
}

/// Between lines about [`Overloads`].
const OVERLOADS: Duration = Duration::from_secs(1);

/// Requests for which there was no room. A client that does not heed `Retry-After` would fill the log with them, so only one
/// a second gets a line.
#[derive(Debug, Default)]
pub(super) struct Overloads {
    last: Option<Instant>,
    /// Since that one.
    silent: u64,
}

impl Overloads {
    /// Counts one. If it gets a line: how many before it got none.
    pub(super) fn count(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + OVERLOADS) {
            self.silent += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.silent))
    }
}

/// A name for one request, in the form that leaves use: 128 random bits in hex.
#[must_use]
pub fn request_id() -> String {
    let mut bytes = [0u8; 16];
    // The pool is ready long before a pod runs, and short reads do not happen below 256 bytes (getrandom(2)).
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes
        .iter()
        .fold(String::with_capacity(32), |mut id, byte| {
            id.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
            id.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
            id
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_is_a_complete_response() {
        for answer in [
            Answer::Overloaded,
            Answer::Crashed,
            Answer::Unstartable,
            Answer::TimedOut,
            Answer::Stopping,
        ] {
            let bytes = answer.render(&answer.error(None), "abc", SystemTime::UNIX_EPOCH);
            let text = String::from_utf8(bytes).expect("text");
            let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
            assert!(
                head.starts_with(&format!("HTTP/1.1 {} ", answer.status())),
                "{head}"
            );
            assert!(
                head.contains("\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n"),
                "{head}"
            );
            assert!(
                head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
                "{head}"
            );
            assert!(head.ends_with("\r\nConnection: close"), "{head}");
            assert_eq!(
                head.contains("\r\nRetry-After: 1\r\n"),
                answer == Answer::Overloaded
            );
            let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(body["requestId"], "abc");
            assert!(
                body["error"]
                    .as_str()
                    .is_some_and(|error| !error.is_empty())
            );
        }
    }

    #[test]
    fn one_overload_a_second_gets_a_line() {
        let mut overloads = Overloads::default();
        let start = Instant::now();
        let lines: Vec<_> = [0, 1, 999, 1000, 1001, 5000]
            .map(|millis| overloads.count(start + Duration::from_millis(millis)))
            .into();
        assert_eq!(lines, [Some(0), None, None, Some(2), None, Some(1)]);
    }

    #[test]
    fn request_ids_differ() {
        let (a, b) = (request_id(), request_id());
        assert_eq!((a.len(), b.len()), (32, 32));
        assert_ne!(a, b);
    }
}
