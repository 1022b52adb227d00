//! What measuring a PackageSet's imports says: the output of `measure.py`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What each installed package costs to import.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Report {
    /// Version of the interpreter.
    pub python: String,
    /// All imports together, in microseconds.
    pub micros: u64,
    /// By name in its normal form (PEP 503).
    pub packages: BTreeMap<String, Package>,
    /// Names of the packages that importing this module loads, by module.
    pub imports: BTreeMap<String, Vec<String>>,
}

impl Report {
    /// Names of the packages that importing a module loads: one of those that were measured, or a package's own.
    pub fn loaded_by<'a>(&'a self, module: &'a str) -> impl Iterator<Item = &'a str> {
        let own = self
            .packages
            .iter()
            .filter(move |(_, package)| package.modules.iter().any(|own| own == module));
        let own = own.flat_map(|(name, package)| std::iter::once(name).chain(&package.loads));
        let measured = self.imports.get(module).into_iter().flatten();
        measured.chain(own).map(String::as_str)
    }
}

/// What one package costs: its own modules, and those of the standard library that it was the first to import.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Package {
    /// As installed.
    pub version: String,
    /// Names of packages that must be installed beside it.
    pub requires: Vec<String>,
    /// Its modules that were loaded, those without a dot in their names.
    pub modules: Vec<String>,
    /// Names of the other packages that importing them loads.
    pub loads: Vec<String>,
    /// Time in microseconds.
    pub micros: u64,
    /// Memory that no file stands for, in KiB.
    pub kib: u64,
}

/// What `measure.py` prints.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The packages could not be measured, and why.
    Failed {
        /// In words, with the module.
        error: String,
    },
    /// They were.
    Measured(Report),
}

impl Answer {
    /// # Errors
    /// Why nothing was measured.
    pub fn report(self) -> Result<Report, String> {
        match self {
            Self::Failed { error } => Err(error),
            Self::Measured(report) => Ok(report),
        }
    }
}
