//! Device files where the kernel cannot be told which ones a container may open.
//!
//! Version 1 of cgroups has a controller for that, version 2 takes a program, which is not loaded everywhere. Where it is not, a
//! container that may not open every device anyway (a privileged one may) can make no device file, and those of its image are none:
//! what is left are the devices that the runtime puts into `/dev`.

use std::collections::HashSet;

use oci_spec::runtime::{
    Capability, LinuxCapabilities, LinuxDeviceCgroup, LinuxDeviceType, Process, Spec,
};
use sock_sandbox::cgroup::devices_can_be_guarded;

fn rules(spec: &Spec) -> &[LinuxDeviceCgroup] {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    resources
        .and_then(|r| r.devices().as_deref())
        .unwrap_or_default()
}

/// Whether the container's cgroup is going to keep all other devices from it.
#[must_use]
pub fn are_guarded(unified: bool, spec: &Spec) -> bool {
    devices_can_be_guarded(unified, rules(spec))
}

/// Whether the specification leaves the choice of devices to the container.
#[must_use]
pub fn all_allowed(spec: &Spec) -> bool {
    // Rules are applied in order; the last that speaks of all devices counts.
    rules(spec)
        .iter()
        .rfind(|r| r.typ().unwrap_or(LinuxDeviceType::A) == LinuxDeviceType::A)
        .is_some_and(LinuxDeviceCgroup::allow)
}

/// Takes the capability to make device files from a process.
pub fn forbid_making(process: &mut Process) {
    let Some(sets) = process.capabilities().clone() else {
        return;
    };
    process.set_capabilities(Some(without_mknod(sets)));
}

fn without_mknod(mut sets: LinuxCapabilities) -> LinuxCapabilities {
    let strip = |set: &Option<HashSet<Capability>>| {
        set.clone()
            .map(|s| s.into_iter().filter(|c| *c != Capability::Mknod).collect())
    };
    let (bounding, effective, permitted) = (
        strip(sets.bounding()),
        strip(sets.effective()),
        strip(sets.permitted()),
    );
    let (inheritable, ambient) = (strip(sets.inheritable()), strip(sets.ambient()));
    sets.set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted)
        .set_inheritable(inheritable)
        .set_ambient(ambient);
    sets
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(rules: serde_json::Value) -> Spec {
        serde_json::from_value(
            json!({"ociVersion": "1.1.0", "linux": {"resources": {"devices": rules}}}),
        )
        .unwrap()
    }

    #[test]
    fn only_a_rule_for_all_devices_leaves_the_choice() {
        assert!(!all_allowed(&spec(
            json!([{"allow": false, "access": "rwm"}])
        )));
        assert!(all_allowed(&spec(
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}])
        )));
        assert!(!all_allowed(&spec(
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "r"}])
        )));
        assert!(!all_allowed(&Spec::default()));
    }

    #[test]
    fn a_process_keeps_its_other_capabilities() {
        let mut process: Process =
            serde_json::from_value(json!({"cwd": "/", "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": ["CAP_MKNOD", "CAP_CHOWN"], "effective": ["CAP_MKNOD"]}}))
            .unwrap();
        forbid_making(&mut process);
        let sets = process.capabilities().clone().unwrap();
        assert_eq!(
            sets.bounding().clone().unwrap(),
            HashSet::from([Capability::Chown])
        );
        assert_eq!(sets.effective().clone().unwrap(), HashSet::new());
    }
}
