//! How much memory the zygotes of a node may hold together, as its administrator wants it.
//!
//! The pools' shims read it and go by it (`shim/src/import_tier.rs`); where nothing is said they have a share of their own.

use std::fs;
use std::path::PathBuf;

use crate::host::Host;
use crate::payload;

/// What the environment says it with.
pub const VARIABLE: &str = "SOCK_ZYGOTE_MEMORY";
/// In bytes.
const FILE: &str = "/run/sock/zygote-memory";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "environment variable {VARIABLE}: {0:?}: give a share of the node's memory, such as 25%, or a size, such as 2Gi; without it \
         zygotes may hold a quarter"
    )]
    Invalid(String),
    #[error("{path}: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Payload(#[from] payload::Error),
    #[error("/proc/meminfo does not say how much memory there is")]
    Unknown,
}

/// A share of all memory, or a size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// In thousandths of a hundredth.
    Share(u64),
    /// In bytes.
    Size(u64),
}

impl Limit {
    /// As the environment says.
    ///
    /// # Errors
    /// It says what is neither.
    pub fn from_environment() -> Result<Option<Limit>, Error> {
        match std::env::var(VARIABLE) {
            Ok(text) if !text.is_empty() => parse(&text).map(Some).ok_or(Error::Invalid(text)),
            _ => Ok(None),
        }
    }

    fn bytes(self, meminfo: &str) -> Option<u64> {
        match self {
            Limit::Size(bytes) => Some(bytes),
            Limit::Share(share) => {
                let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
                let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
                u64::try_from(u128::from(kib) * 1024 * u128::from(share) / 100_000).ok()
            }
        }
    }
}

/// A number with one of the suffixes that Kubernetes has for memory, or a part of a hundred.
fn parse(text: &str) -> Option<Limit> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = thousandths(number)?;
    if unit == "%" {
        return (number <= 100_000).then_some(Limit::Share(number));
    }
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    number
        .checked_mul(factor)
        .map(|number| Limit::Size(number / 1000))
}

/// Of a decimal number with at most three places.
fn thousandths(number: &str) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let part = (part.len() <= 3).then(|| format!("{part:0<3}"))?;
    format!("{whole}{part}")
        .parse()
        .ok()
        .filter(|_| !whole.is_empty())
}

/// Tells the node's shims, if they are not told so already.
///
/// # Errors
/// The file cannot be written.
pub fn tell(host: &Host, limit: Option<Limit>) -> Result<(), Error> {
    let path = host.path(FILE);
    let failed = |source| Error::Write {
        path: path.clone(),
        source,
    };
    let Some(limit) = limit else {
        return match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        };
    };
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = limit.bytes(&meminfo).ok_or(Error::Unknown)?.to_string();
    if fs::read_to_string(&path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    payload::write(&path, 0o644, bytes.as_bytes())?;
    tracing::info!(bytes, "zygotes may hold so much");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn shares_and_sizes_are_what_kubernetes_takes_them_for() {
        for (text, limit) in [
            ("25%", Limit::Share(25_000)),
            ("2.5%", Limit::Share(2500)),
            ("0", Limit::Size(0)),
            ("1.5Gi", Limit::Size(3 << 29)),
            ("512Mi", Limit::Size(512 << 20)),
            ("2G", Limit::Size(2_000_000_000)),
            ("4096", Limit::Size(4096)),
        ] {
            assert_eq!(parse(text), Some(limit), "{text}");
        }
        for text in [
            "101%",
            "%",
            "Gi",
            "-1Gi",
            "1 Gi",
            "1Xi",
            "1.2.3",
            ".5",
            "1.2345",
            "99999999999Gi",
            "nan",
            "much",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        let meminfo = "MemTotal:       1000 kB\nMemFree: 1 kB\n";
        assert_eq!(Limit::Share(25_000).bytes(meminfo), Some(256_000));
        assert_eq!(Limit::Share(25_000).bytes(""), None);
        assert_eq!(Limit::Size(7).bytes(""), Some(7));
    }

    #[test]
    fn shims_are_told_and_told_no_more() -> Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let host = Host::at(root.path(), Path::new("/proc"));
        let file = root.path().join("run/sock/zygote-memory");
        tell(&host, None)?;
        tell(&host, Some(Limit::Size(5)))?;
        assert_eq!(fs::read_to_string(&file)?, "5");
        tell(&host, Some(Limit::Size(6)))?;
        assert_eq!(fs::read_to_string(&file)?, "6");
        tell(&host, None)?;
        assert!(!file.exists());
        Ok(())
    }
}
