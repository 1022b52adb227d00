//! Decides on what a Function runs and where its code is, or what is lacking.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Toleration};
use kube::ResourceExt as _;
use sock_crds::{Function, PackageSet};

use super::dereference::Found;
use crate::condition::{Finding, find};
use crate::contract::{Version, annotation, is_child, sha256};

/// The packages that a Function's pods run on, and the nodes that have them.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The version that is ready.
    pub version: Version,
    /// Labels of the nodes.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of the nodes.
    pub tolerations: Vec<Toleration>,
}

/// Where the code is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Code {
    /// In the resource: the operator makes a ConfigMap of this file.
    Inline {
        /// Name of the file.
        file: String,
        /// What is in it.
        text: String,
    },
    /// In a ConfigMap of the user's.
    ConfigMap {
        /// Its name.
        name: String,
        /// Digest of its files.
        digest: String,
    },
}

/// What is known of a Function before anything is built.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Where it runs; none as long as no version of its packages is ready.
    pub placement: Option<Placement>,
    /// Its code; none if it lacks.
    pub code: Option<Code>,
    /// The condition `PackageSetReady`.
    pub packages: Finding,
    /// The condition `SourceFound`.
    pub source: Finding,
}

/// Judges a Function by what was found.
pub fn validate(function: &Function, found: &Found) -> Verdict {
    let (placement, packages) = placement(function, found);
    let (code, source) = match code(function, found.source.as_ref()) {
        Ok(code) => (
            Some(code),
            Finding::yes("SourceFound", "Found", "the code is there"),
        ),
        Err(finding) => (None, finding),
    };
    Verdict {
        placement,
        code,
        packages,
        source,
    }
}

/// Functions outlive their PackageSet: what a Deployment was last given is kept until there is something better.
fn placement(function: &Function, found: &Found) -> (Option<Placement>, Finding) {
    let name = &function.spec.package_set;
    let last = || {
        found
            .deployment
            .as_ref()
            .and_then(|deployment| last_placement(function, deployment))
    };
    let Some(set) = &found.package_set else {
        let last = last();
        let message = if last.is_some() {
            format!(
                "PackageSet {name} is gone: requests are answered by plain interpreters, slower, until it is made again"
            )
        } else {
            format!("PackageSet {name} does not exist in this namespace: create it")
        };
        return (
            last,
            Finding::no("PackageSetReady", "PackageSetMissing", message),
        );
    };
    let status = set.status.clone().unwrap_or_default();
    let ready = find(&status.conditions, "Ready");
    let Some(version) = ready_version(set) else {
        let message = match ready {
            Some(ready) => format!("PackageSet {name}: {}", ready.message),
            None => format!("PackageSet {name} has not been looked at yet"),
        };
        return (
            last(),
            Finding::no("PackageSetReady", "WaitingForPackageSet", message),
        );
    };
    let finding = match ready {
        Some(ready) if ready.status == "True" && status.digest == status.ready_digest => {
            Finding::yes(
                "PackageSetReady",
                "Warm",
                format!("PackageSet {name} is {}", ready.message),
            )
        }
        Some(ready) if status.digest != status.ready_digest => Finding::yes(
            "PackageSetReady",
            "FormerVersion",
            format!(
                "the former version serves until the new one is ready; PackageSet {name}: {}",
                ready.message
            ),
        ),
        Some(ready) => Finding::no(
            "PackageSetReady",
            "PackageSetNotWarm",
            format!(
                "where no zygote is warm, requests are answered by plain interpreters, slower; PackageSet {name}: {}",
                ready.message
            ),
        ),
        None => Finding::unknown(
            "PackageSetReady",
            "WaitingForPackageSet",
            format!("PackageSet {name} has no condition Ready"),
        ),
    };
    let placement = Placement {
        version,
        node_selector: set.spec.node_selector.clone(),
        tolerations: set.spec.tolerations.clone(),
    };
    (Some(placement), finding)
}

fn ready_version(set: &PackageSet) -> Option<Version> {
    let status = set.status.as_ref()?;
    Some(Version {
        digest: status.ready_digest.clone()?,
        lock: status.ready_lock.clone()?,
        image: status.ready_image.clone()?,
        ancestors: status.ready_ancestors.clone(),
    })
}

/// What a Deployment was given, if it was for the same PackageSet.
fn last_placement(function: &Function, deployment: &Deployment) -> Option<Placement> {
    if !is_child(&deployment.metadata, function.uid().as_deref()) {
        return None;
    }
    let template = &deployment.spec.as_ref()?.template;
    let annotations = template.metadata.as_ref()?.annotations.as_ref()?;
    let get = |key: &str| annotations.get(key).cloned();
    if get(annotation::PACKAGE_SET).as_ref() != Some(&function.spec.package_set) {
        return None;
    }
    let pod = template.spec.as_ref()?;
    Some(Placement {
        version: Version {
            digest: get(annotation::DIGEST)?,
            lock: get(annotation::LOCK)?,
            image: pod.containers.first()?.image.clone()?,
            ancestors: get(annotation::ANCESTORS)
                .and_then(|text| serde_json::from_str(&text).ok())
                .unwrap_or_default(),
        },
        node_selector: pod.node_selector.clone().unwrap_or_default(),
        tolerations: pod.tolerations.clone().unwrap_or_default(),
    })
}

fn code(function: &Function, config_map: Option<&ConfigMap>) -> Result<Code, Finding> {
    let handler = &function.spec.handler;
    let module = handler.split('.').next().unwrap_or(handler);
    let file = format!("{module}.py");
    let source = &function.spec.source;
    if let Some(text) = &source.inline {
        return Ok(Code::Inline {
            file,
            text: text.clone(),
        });
    }
    let missing = |reason, message| Err(Finding::no("SourceFound", reason, message));
    let Some(name) = source.config_map.as_ref().map(|source| &source.name) else {
        return missing(
            "NoSource",
            "source: set exactly one of inline and configMap".to_owned(),
        );
    };
    let Some(config_map) = config_map else {
        return missing(
            "ConfigMapMissing",
            format!("ConfigMap {name} does not exist: create it with key {file}"),
        );
    };
    let texts = config_map
        .data
        .iter()
        .flatten()
        .map(|(key, text)| (key, text.as_bytes()));
    let bytes = config_map
        .binary_data
        .iter()
        .flatten()
        .map(|(key, bytes)| (key, bytes.0.as_slice()));
    let files: BTreeMap<&String, &[u8]> = texts.chain(bytes).collect();
    if !files.contains_key(&file) {
        return missing(
            "KeyMissing",
            format!("ConfigMap {name} has no key {file}, which handler {handler} names"),
        );
    }
    let parts: Vec<&[u8]> = files
        .iter()
        .flat_map(|(key, content)| [key.as_bytes(), content])
        .collect();
    Ok(Code::ConfigMap {
        name: name.clone(),
        digest: sha256(&parts),
    })
}
