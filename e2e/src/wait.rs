//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Long enough for anything that a quiet cluster does; what hangs fails within it.
pub const MINUTE: Duration = Duration::from_secs(60);

/// Asking is a program that starts: much faster would only keep the machine from what is waited for.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks until there is an answer.
///
/// # Errors
/// There is none in time; what was said last is in the error.
pub fn until<T>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        let answer = ask();
        if let Ok(Some(found)) = answer {
            return Ok(found);
        }
        if Instant::now() > deadline {
            let message = format!("not within {} s: {what}", within.as_secs());
            return match answer {
                Err(error) => Err(error).context(message),
                Ok(_) => bail!(message),
            };
        }
        std::thread::sleep(PAUSE);
    }
}
