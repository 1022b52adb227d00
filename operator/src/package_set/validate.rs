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
    let refused = |reason, message| Err(Finding::no("RequirementsFound", reason, message));
    let (text, place) = match (&requirements.lines, &requirements.config_map_key_ref) {
        (Some(lines), _) => {
            let text = lines.iter().flat_map(|line| [line.as_str(), "\n"]);
            (text.collect::<String>(), "requirements.lines".to_owned())
        }
        (None, None) => return Ok(String::new()),
        (None, Some(reference)) => {
            let Some(config_map) = &found.config_map else {
                return refused(
                    "ConfigMapMissing",
                    format!(
                        "ConfigMap {} does not exist: create it with key {}",
                        reference.name, reference.key
                    ),
                );
            };
            let data = config_map.data.as_ref();
            let Some(text) = data.and_then(|data| data.get(&reference.key)) else {
                return refused(
                    "KeyMissing",
                    format!(
                        "ConfigMap {} has no key {} in its data",
                        reference.name, reference.key
                    ),
                );
            };
            (
                text.clone(),
                format!("ConfigMap {}, key {}", reference.name, reference.key),
            )
        }
    };
    match sock_crds::requirements(&text) {
        Ok(_) => Ok(text),
        Err(error) => refused("RequirementsInvalid", format!("{place}, {error}")),
    }
}
