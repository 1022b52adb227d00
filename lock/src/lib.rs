//! A lock: an image and the requirements that are installed beside what it has. Operator and shim speak of the same by its
//! digest, and each can tell by itself whether one lock holds another.

mod requirements;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use requirements::{Requirement, RequirementError, logical_lines, requirements};

/// What is installed, in full.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lock {
    /// The image, as the PackageSet names it.
    pub image: String,
    /// Text of the requirements file.
    pub requirements: String,
}

/// Why a lock does not hold another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NotWithin {
    /// They are for different images.
    Image {
        /// Of the one that should hold the other.
        here: String,
        /// Of the other.
        there: String,
    },
    /// A package of the other is missing, or has another version.
    Package {
        /// As the other has it: `name==version`, with its marker.
        wanted: String,
        /// The versions that there are instead, if any.
        found: Vec<String>,
    },
    /// The requirements of either cannot be read.
    Unreadable(RequirementError),
}

impl fmt::Display for NotWithin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image { here, there } => write!(f, "its image is {there}, not {here}"),
            Self::Package { wanted, found } if found.is_empty() => {
                write!(f, "its package {wanted} is not among the requirements")
            }
            Self::Package { wanted, found } => write!(
                f,
                "its package {wanted} is among the requirements as {}",
                found.join(", ")
            ),
            Self::Unreadable(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NotWithin {}

impl Lock {
    /// SHA-256 of both, in hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> String {
        sha256(&[&self.image, &self.requirements])
    }

    /// Whether every package of `other` is here, in the same version and for the same machines, beside the same image: then
    /// a process that has imported packages of `other` holds nothing that is not of this lock too (SOCK, ATC '18,
    /// section 4.2).
    ///
    /// # Errors
    /// The first thing that is not.
    pub fn holds(&self, other: &Lock) -> Result<(), NotWithin> {
        if self.image != other.image {
            return Err(NotWithin::Image {
                here: self.image.clone(),
                there: other.image.clone(),
            });
        }
        let mut here: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for requirement in requirements(&self.requirements).map_err(NotWithin::Unreadable)? {
            let versions = here.entry(requirement.name.clone()).or_default();
            versions.push(shown(&requirement));
        }
        for wanted in requirements(&other.requirements).map_err(NotWithin::Unreadable)? {
            let found = here.get(&wanted.name).cloned().unwrap_or_default();
            let wanted = shown(&wanted);
            if !found.contains(&wanted) {
                return Err(NotWithin::Package { wanted, found });
            }
        }
        Ok(())
    }
}

fn shown(requirement: &Requirement) -> String {
    let marker = requirement.marker.as_ref();
    let marker = marker.map_or_else(String::new, |marker| format!(" ; {marker}"));
    format!("{}=={}{marker}", requirement.name, requirement.version)
}

/// SHA-256 of texts in hexadecimal digits, with their lengths, so that no two lists of texts are confounded.
#[must_use]
pub fn sha256<T: AsRef<[u8]>>(texts: &[T]) -> String {
    use std::fmt::Write as _;

    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.as_ref().len() as u64).to_be_bytes());
        hash.update(text);
    }
    let mut hex = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing into a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lock(lines: &[&str]) -> Lock {
        let hash = "0".repeat(64);
        let lines = lines
            .iter()
            .map(|line| format!("{line} --hash=sha256:{hash}\n"));
        Lock {
            image: "python:3.13".into(),
            requirements: lines.collect(),
        }
    }

    #[test]
    fn a_lock_holds_another_whose_every_package_it_has() {
        let small = lock(&["NumPy==2.3.1", "six==1.0 ; os_name == 'x'"]);
        let large = lock(&[
            "pandas==3.0",
            "six==1.0 ; os_name == 'x'",
            "num.py==1",
            "numpy==2.3.1",
        ]);
        assert_eq!(large.holds(&small), Ok(()));
        assert_eq!(small.holds(&small), Ok(()));
        assert_eq!(small.holds(&lock(&[])), Ok(()));
        let missing = small.holds(&large).expect_err("pandas is missing");
        assert_eq!(
            missing.to_string(),
            "its package pandas==3.0 is not among the requirements"
        );
        let other = lock(&["numpy==2.3.2", "six==1.0"]);
        assert_eq!(
            other
                .holds(&small)
                .expect_err("another version")
                .to_string(),
            "its package numpy==2.3.1 is among the requirements as numpy==2.3.2"
        );
        let marked = lock(&["numpy==2.3.1", "six==1.0"]);
        assert!(marked.holds(&small).is_err(), "for other machines");
    }

    #[test]
    fn images_are_the_same_or_different() {
        let here = lock(&[]);
        let there = Lock {
            image: "python:3.12".into(),
            ..here.clone()
        };
        assert_eq!(
            here.holds(&there).expect_err("another image").to_string(),
            "its image is python:3.12, not python:3.13"
        );
    }

    #[test]
    fn texts_that_only_look_alike_have_different_digests() {
        assert_ne!(sha256(&["ab", "c"]), sha256(&["a", "bc"]));
    }

    proptest! {
        #[test]
        fn to_hold_is_to_have_each_line(all in prop::collection::btree_map("[a-z]{1,4}", "[0-9]{1,2}", 0..12), keep in prop::collection::vec(any::<bool>(), 12)) {
            let lines: Vec<String> = all.iter().map(|(name, version)| format!("{name}=={version}")).collect();
            let some: Vec<&str> = lines.iter().zip(&keep).filter(|(_, keep)| **keep).map(|(line, _)| line.as_str()).collect();
            let all: Vec<&str> = lines.iter().map(String::as_str).collect();
            prop_assert_eq!(lock(&all).holds(&lock(&some)), Ok(()));
            prop_assert_eq!(lock(&some).holds(&lock(&all)).is_ok(), some.len() == all.len());
        }
    }
}
