//! Decides how long the pools of former versions stay: as long as they can serve who has not moved on.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::{Resource as _, ResourceExt as _};
use sock_crds::{Ancestor, PackageSet};

use super::dereference::Found;
use super::validate::Wanted;
use crate::cluster::{Context, Error};
use crate::condition::Finding;
use crate::contract::{FUNCTION_LABEL, POOL_LABEL, Version, annotation, short};

/// The condition that says whether one pool is left.
pub const CONDITION: &str = "RolledOut";

/// Users that a message names.
const NAMED: usize = 3;

/// Who runs on a version, by its digest.
pub type Users = BTreeMap<String, BTreeSet<String>>;

/// The pool of another version than the one that the spec asks for, or one of that version that has been replaced.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Former {
    /// Name of the DaemonSet.
    pub pool: String,
    /// Digest of its version.
    pub digest: String,
    /// Why it stays; none if it does not.
    pub stays: Option<Stays>,
}

/// Why the pool of a former version stays.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Stays {
    /// It is what Functions run on until the present version is warm.
    Serves,
    /// These have pods that run on it.
    For(BTreeSet<String>),
}

/// The digest that a pool was made for.
pub fn digest(pool: &DaemonSet) -> Option<&str> {
    let metadata = pool.spec.as_ref()?.template.metadata.as_ref()?;
    let digest = metadata.annotations.as_ref()?.get(annotation::DIGEST)?;
    Some(digest)
}

/// Who beside the PackageSet's own pools runs on a version, or on something that was made from it. Nobody is asked as
/// long as there is no other version.
pub async fn users(
    set: &PackageSet,
    found: &Found,
    wanted: &Wanted,
    context: &Context,
) -> Result<Users, Error> {
    let is_other = |pool| digest(pool) != Some(&wanted.version.digest);
    if !found.pools.iter().any(is_other) {
        return Ok(Users::new());
    }
    let namespace = set.namespace().unwrap_or_default();
    let pods = context.list_pods(&namespace).await?;
    Ok(users_among(&pods, &set.name_any()))
}

fn users_among(pods: &[PartialObjectMeta<Pod>], name: &str) -> Users {
    let mut users = Users::new();
    for pod in pods {
        let (labels, annotations) = (pod.labels(), pod.annotations());
        let user = match (labels.get(FUNCTION_LABEL), labels.get(POOL_LABEL)) {
            (Some(function), _) => format!("Function {function}"),
            (None, Some(pool)) if pool != name => format!("PackageSet {pool}"),
            _ => continue,
        };
        let ancestors: Vec<Ancestor> = annotations
            .get(annotation::ANCESTORS)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let own = annotations.get(annotation::DIGEST).cloned();
        for digest in own
            .into_iter()
            .chain(ancestors.into_iter().map(|it| it.digest))
        {
            users.entry(digest).or_default().insert(user.clone());
        }
    }
    users
}

/// The pools beside the present one. `served` is the digest that Functions are given; `is_warm` whether the present pool
/// is warm on all its nodes.
pub fn former(
    pools: &[DaemonSet],
    present: &str,
    version: &Version,
    users: &Users,
    served: Option<&str>,
    is_warm: bool,
) -> Vec<Former> {
    let others = pools.iter().filter(|pool| pool.name_any() != present);
    let former = others.map(|pool| {
        let digest = digest(pool).unwrap_or_default();
        let is_served = !is_warm && served == Some(digest);
        // Who asks for the version of the present pool is served by that.
        let users = users.get(digest).filter(|_| digest != version.digest);
        let stays = is_served.then_some(Stays::Serves);
        Former {
            pool: pool.name_any(),
            digest: digest.to_owned(),
            stays: stays.or_else(|| users.cloned().map(Stays::For)),
        }
    });
    former.collect()
}

/// What the condition says of it.
pub fn finding(former: &[Former]) -> Finding {
    let stay = former
        .iter()
        .find_map(|one| Some((short(&one.digest), one.stays.as_ref()?)));
    match stay {
        None => Finding::yes(
            CONDITION,
            "RolledOut",
            "no pool of a former version is left",
        ),
        Some((version, Stays::Serves)) => Finding::no(
            CONDITION,
            "Warming",
            format!(
                "the pool of the former version {version} serves until the new one is warm on all nodes"
            ),
        ),
        Some((version, Stays::For(users))) => {
            let named: Vec<&str> = users.iter().take(NAMED).map(String::as_str).collect();
            let more = match users.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let message = format!(
                "the pool of the former version {version} stays until no pod runs on it any more: those of {}{more} do",
                named.join(", ")
            );
            Finding::no(CONDITION, "FormerVersionInUse", message)
        }
    }
}

/// Whether a PackageSet has pools of former versions, by what its status says.
pub fn has_former(set: &PackageSet) -> bool {
    let conditions = set.status.iter().flat_map(|status| &status.conditions);
    conditions
        .filter(|condition| condition.type_ == CONDITION)
        .any(|condition| condition.status == "False")
}

/// Deletes the pools that do not stay.
pub async fn retire(set: &PackageSet, former: &[Former], context: &Context) -> Result<(), Error> {
    if former.iter().all(|one| one.stays.is_some()) {
        return Ok(());
    }
    let goes = |name: &str| {
        former
            .iter()
            .any(|one| one.pool == name && one.stays.is_none())
    };
    context
        .prune::<DaemonSet>(
            set.meta().uid.as_deref().unwrap_or_default(),
            &set.namespace().unwrap_or_default(),
            (POOL_LABEL, &set.name_any()),
            |name| !goes(name),
        )
        .await
}
