//! The five capability sets of a process (capabilities(7)).

use std::str::FromStr;

use caps::{CapSet, Capability as Cap, CapsHashSet};
use oci_spec::runtime::{Capabilities, LinuxCapabilities};

use crate::{Error, Result};

fn parse(set: Option<&Capabilities>) -> Result<CapsHashSet> {
    set.into_iter()
        .flatten()
        .map(|c| {
            let name = format!("CAP_{}", c.to_string().trim_start_matches("CAP_"));
            Cap::from_str(&name).map_err(|_| {
                Error::spec(
                    "process.capabilities",
                    format!("{name} is not a capability this build knows"),
                )
            })
        })
        .collect()
}

fn apply(set: CapSet, wanted: &CapsHashSet) -> Result<()> {
    caps::set(None, set, wanted).map_err(|e| {
        Error::spec(
            "process.capabilities",
            format!("{set:?} cannot be set to {wanted:?}: {e}"),
        )
    })
}

/// Drops the bounding set to what the specification names. Needs `CAP_SETPCAP`, so it goes first.
/// What this process itself lacks cannot be given and is left out, as `--privileged` asks for everything.
pub(crate) fn bound(spec: Option<&LinuxCapabilities>) -> Result<()> {
    let wanted = parse(spec.and_then(|s| s.bounding().as_ref()))?;
    let have = caps::read(None, CapSet::Bounding).unwrap_or_default();
    for extra in have.difference(&wanted) {
        caps::drop(None, CapSet::Bounding, *extra).map_err(|e| {
            Error::spec(
                "process.capabilities",
                format!("bounding set keeps {extra}: {e}"),
            )
        })?;
    }
    Ok(())
}

/// Sets the other four sets: after the user was changed, with the permitted set kept until now.
pub(crate) fn settle(spec: Option<&LinuxCapabilities>) -> Result<()> {
    let have = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let wanted =
        |set| -> Result<CapsHashSet> { Ok(parse(set)?.intersection(&have).copied().collect()) };
    let permitted = wanted(spec.and_then(|s| s.permitted().as_ref()))?;
    let effective = wanted(spec.and_then(|s| s.effective().as_ref()))?;
    let inheritable = wanted(spec.and_then(|s| s.inheritable().as_ref()))?;
    let ambient = wanted(spec.and_then(|s| s.ambient().as_ref()))?;
    apply(CapSet::Effective, &CapsHashSet::new())?;
    apply(CapSet::Permitted, &permitted)?;
    apply(CapSet::Inheritable, &inheritable)?;
    apply(
        CapSet::Effective,
        &effective.intersection(&permitted).copied().collect(),
    )?;
    caps::clear(None, CapSet::Ambient).map_err(|e| {
        Error::spec(
            "process.capabilities",
            format!("ambient set cannot be cleared: {e}"),
        )
    })?;
    for cap in ambient {
        caps::raise(None, CapSet::Ambient, cap).map_err(|e| {
            Error::spec(
                "process.capabilities.ambient",
                format!("{cap} cannot be raised: {e}"),
            )
        })?;
    }
    Ok(())
}
