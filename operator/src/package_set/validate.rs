//! Decides what a PackageSet asks for, or what it lacks.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use sock_crds::{Ancestor, PackageSet};
use sock_lock::Lock;

use super::dereference::{Found, MOST_ANCESTORS};
use crate::condition::{Finding, find};
use crate::contract::{Version, annotation};

/// What is to be kept warm.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Text of the requirements file.
    pub requirements: String,
    /// The version that it makes, with image and imports.
    pub version: Version,
    /// Whether its zygotes have children.
    pub is_extended: bool,
}

/// Reads the requirements and looks at what it extends; the error is the condition that says what to mend.
pub fn validate(set: &PackageSet, found: &Found) -> Result<Wanted, Finding> {
    let lock = Lock {
        image: set.spec.image.clone(),
        requirements: requirements(set, found.config_map.as_ref())?,
    };
    let warm_up = set.spec.warm_up.as_deref().unwrap_or_default();
    let version = Version::new(
        &lock,
        &set.spec.imports,
        warm_up,
        ancestors(set, &lock, found)?,
    );
    Ok(Wanted {
        requirements: lock.requirements,
        is_extended: found.is_extended || was_extended(found, &version),
        version,
    })
}

/// A zygote that might have children and has none any more is not made anew for that.
fn was_extended(found: &Found, version: &Version) -> bool {
    let templates = found.pools.iter().filter_map(|pool| pool.spec.as_ref());
    templates
        .filter_map(|spec| spec.template.metadata.as_ref()?.annotations.as_ref())
        .any(|annotations| {
            annotations.get(annotation::DIGEST) == Some(&version.digest)
                && annotations.contains_key(annotation::EXTENDED)
        })
}

/// The versions that the zygote descends from: those that are ready, so that it is made anew only when there is something to
/// be made from.
fn ancestors(set: &PackageSet, lock: &Lock, found: &Found) -> Result<Vec<Ancestor>, Finding> {
    let Some(extends) = &set.spec.extends else {
        return Ok(Vec::new());
    };
    let name = &extends.name;
    let refused = |reason, problem: String| {
        let message = format!("spec.extends: {problem}");
        Err(Finding::no("ParentReady", reason, message))
    };
    let Some(parent) = found.ancestors.first() else {
        let problem = format!("PackageSet {name} does not exist in this namespace: create it");
        return refused("PackageSetMissing", problem);
    };
    let line: Vec<String> = found.ancestors.iter().map(ResourceExt::name_any).collect();
    let whole: Vec<String> = [set.name_any()].into_iter().chain(line.clone()).collect();
    let again = |at: &usize| whole[..*at].contains(&whole[*at]);
    if let Some(at) = (1..whole.len()).find(again) {
        let problem = format!(
            "{} comes back to {}: name PackageSets that extend each other in one direction",
            whole[..at].join(" extends "),
            whole[at]
        );
        return refused("Cycle", problem);
    }
    if line.len() > MOST_ANCESTORS {
        let problem = format!(
            "PackageSet {name} has {MOST_ANCESTORS} ancestors already, which is as many as there may be"
        );
        return refused("TooDeep", problem);
    }
    let status = parent.status.clone().unwrap_or_default();
    let (Some(digest), Some(ready)) = (status.ready_digest, status.ready_lock) else {
        let problem = match find(&status.conditions, "Ready") {
            Some(ready) => format!("PackageSet {name}: {}", ready.message),
            None => format!("PackageSet {name} has not been looked at yet"),
        };
        return refused("WaitingForParent", problem);
    };
    // What a former version of it held is known to the nodes, which look themselves.
    let theirs = requirements(parent, found.parent_config_map.as_ref());
    let theirs = theirs.ok().map(|requirements| Lock {
        image: parent.spec.image.clone(),
        requirements,
    });
    if let Some(theirs) = theirs.filter(|theirs| theirs.digest() == ready)
        && let Err(error) = lock.holds(&theirs)
    {
        let problem = format!(
            "PackageSet {name} cannot be extended: {error}: give this one the same image, and every package of that one in the same version"
        );
        return refused("NotContained", problem);
    }
    let nearest = Ancestor {
        digest,
        lock: ready,
    };
    // That version may still have had more.
    let further = status.ready_ancestors.into_iter();
    let all = [nearest].into_iter().chain(further);
    Ok(all.take(MOST_ANCESTORS).collect())
}

fn requirements(set: &PackageSet, config_map: Option<&ConfigMap>) -> Result<String, Finding> {
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
            let Some(config_map) = config_map else {
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
    match sock_lock::requirements(&text) {
        Ok(_) => Ok(text),
        Err(error) => refused("RequirementsInvalid", format!("{place}, {error}")),
    }
}
