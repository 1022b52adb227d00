//! Decides what a PackageSet asks for, or what it lacks.

use sock_crds::PackageSet;

use super::dereference::Found;
use crate::condition::Finding;
use crate::contract::Version;

/// What is to be kept warm.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Text of the requirements file.
    pub requirements: String,
    /// The version that it makes, with image and imports.
    pub version: Version,
}

/// Reads the requirements; the error is the condition that says what to mend.
pub fn validate(set: &PackageSet, found: &Found) -> Result<Wanted, Finding> {
    let requirements = requirements(set, found)?;
    let version = Version::new(
        &set.spec.image,
        &requirements,
        &set.spec.imports,
        set.spec.warm_up.as_deref().unwrap_or_default(),
    );
    Ok(Wanted {
        requirements,
        version,
    })
}

fn requirements(set: &PackageSet, found: &Found) -> Result<String, Finding> {
    let Some(requirements) = &set.spec.requirements else {
        return Ok(String::new());
    };
    if let Some(lines) = &requirements.lines {
        return Ok(lines
            .iter()
            .flat_map(|line| [line.as_str(), "\n"])
            .collect());
    }
    let Some(reference) = &requirements.config_map_key_ref else {
        return Ok(String::new());
    };
    let missing = |reason, message| Err(Finding::no("RequirementsFound", reason, message));
    let Some(config_map) = &found.config_map else {
        return missing(
            "ConfigMapMissing",
            format!(
                "ConfigMap {} does not exist: create it with key {}",
                reference.name, reference.key
            ),
        );
    };
    match config_map
        .data
        .as_ref()
        .and_then(|data| data.get(&reference.key))
    {
        Some(text) => Ok(text.clone()),
        None => missing(
            "KeyMissing",
            format!(
                "ConfigMap {} has no key {} in its data",
                reference.name, reference.key
            ),
        ),
    }
}
