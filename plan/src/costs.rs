//! The file that keeps what was measured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sock_plan::report::Report;

/// Reports by what they are of.
#[derive(Debug)]
pub struct Costs {
    path: Option<PathBuf>,
    reports: BTreeMap<String, Report>,
}

impl Costs {
    /// Reads the file: the given one, or one in the user's cache; a file that is not there is empty.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn open(given: Option<&Path>) -> Result<Costs> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let cache = variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
        let path = match given {
            Some(path) => Some(path.to_owned()),
            None => cache.map(|cache| cache.join("kubectl-sock/costs.json")),
        };
        let text = match path.as_deref().map(std::fs::read) {
            None => None,
            Some(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
            Some(read) => Some(read.with_context(|| shown(path.as_deref()))?),
        };
        let reports = match text {
            None => BTreeMap::new(),
            Some(text) => serde_json::from_slice(&text).with_context(|| {
                format!(
                    "{} holds no measurements: remove it",
                    shown(path.as_deref())
                )
            })?,
        };
        Ok(Costs { path, reports })
    }

    /// What is known.
    pub fn get(&self, of: &str) -> Option<&Report> {
        self.reports.get(of)
    }

    /// Keeps a report, at once in the file too.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(&mut self, of: String, report: Report) -> Result<()> {
        self.reports.insert(of, report);
        let Some(path) = &self.path else {
            return Ok(());
        };
        let write = || -> Result<()> {
            let folder = path
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            std::fs::create_dir_all(folder)?;
            // Of two that plan at once the later one wins, and neither reads half a file.
            let file = tempfile::NamedTempFile::new_in(folder)?;
            serde_json::to_writer(&file, &self.reports)?;
            file.persist(path)?;
            Ok(())
        };
        write().with_context(|| shown(Some(path)))
    }
}

fn shown(path: Option<&Path>) -> String {
    path.unwrap_or(Path::new("")).display().to_string()
}
