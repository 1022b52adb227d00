//! What the runtime can do, for those who ask before they use it: containerd, and through it kubelet, which tells it in a node's
//! `status.runtimeHandlers` and refuses pods that need more.

use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use oci_spec::runtime::{
    ApparmorBuilder, CgroupBuilder, Features, FeaturesBuilder, IDMapBuilder, LinuxFeatureBuilder,
    LinuxNamespaceType as Namespace, MountExtensionsBuilder, SeccompBuilder, SelinuxBuilder,
};
use oci_spec::{OciSpecError, runtime::LinuxSeccompAction as Action};

/// As containerd names the form of what follows (typeurl).
const KIND: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// Points of a container's life at which programs are run that its specification names.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];
/// Versions of the OCI runtime specification.
const VERSIONS: (&str, &str) = ("1.0.0", "1.3.0");

/// The answer to containerd's question (`-info`).
///
/// # Errors
/// It cannot be written down.
pub fn runtime_info(name: &str) -> Result<RuntimeInfo, OciSpecError> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    let features = Any {
        type_url: KIND.to_owned(),
        value: serde_json::to_vec(&features()?).map_err(OciSpecError::SerDe)?,
        ..Any::default()
    };
    Ok(RuntimeInfo {
        name: name.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..RuntimeInfo::default()
    })
}

/// The same for people and for those who compare.
///
/// # Errors
/// It cannot be written down.
pub fn json() -> Result<String, OciSpecError> {
    serde_json::to_string(&features()?).map_err(OciSpecError::SerDe)
}

/// As features.md of the OCI runtime specification has it.
fn features() -> Result<Features, OciSpecError> {
    let seccomp = SeccompBuilder::default()
        .enabled(true)
        .actions([
            Action::ScmpActKill,
            Action::ScmpActKillThread,
            Action::ScmpActKillProcess,
            Action::ScmpActTrap,
            Action::ScmpActErrno,
            Action::ScmpActTrace,
            Action::ScmpActLog,
            Action::ScmpActAllow,
        ])
        .build()?;
    let cgroup = CgroupBuilder::default()
        .v1(true)
        .v2(true)
        .systemd(true)
        .build()?;
    let idmap = IDMapBuilder::default().enabled(true).build()?;
    let linux = LinuxFeatureBuilder::default()
        .namespaces([
            Namespace::Cgroup,
            Namespace::Ipc,
            Namespace::Mount,
            Namespace::Network,
            Namespace::Pid,
            Namespace::User,
            Namespace::Uts,
        ])
        .cgroup(cgroup)
        .seccomp(seccomp)
        .apparmor(ApparmorBuilder::default().enabled(true).build()?)
        .selinux(SelinuxBuilder::default().enabled(true).build()?)
        .mount_extensions(MountExtensionsBuilder::default().idmap(idmap).build()?)
        .build()?;
    FeaturesBuilder::default()
        .oci_version_min(VERSIONS.0)
        .oci_version_max(VERSIONS.1)
        .hooks(HOOKS.map(str::to_owned).to_vec())
        .mount_options(sock_sandbox::root::mount_options())
        .linux(linux)
        .build()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_containerd_looks_for_is_told_in_its_words() {
        let info = runtime_info("io.containerd.sock.v1").unwrap();
        assert_eq!(info.features.type_url, KIND);
        let told: Value = serde_json::from_slice(&info.features.value).unwrap();
        let options = told["mountOptions"].as_array().unwrap();
        assert!(options.contains(&"rro".into()));
        let namespaces = told["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.contains(&"pid".into()) && namespaces.contains(&"user".into()));
        assert_eq!(told["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert_eq!(told["linux"]["seccomp"]["actions"][4], "SCMP_ACT_ERRNO");
    }
}
