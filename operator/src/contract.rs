//! The words that operator, shim and containers agree on: see `docs/design.md`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, PodSecurityContext, SeccompProfile, SecurityContext,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt as _};
use sha2::{Digest as _, Sha256};
use sock_crds::Ancestor;
use sock_lock::Lock;
pub use sock_lock::sha256;

/// Who applies the fields that the operator owns.
pub const FIELD_MANAGER: &str = "sock-operator";

/// The RuntimeClass of every pod that the operator has made.
pub const RUNTIME_CLASS: &str = "sock";

/// Label of a node that has the runtime.
pub const NODE_LABEL: (&str, &str) = ("sock.dev/node", "ready");

/// Label of a Function's pods and of what else belongs to it; its value is the Function's name.
pub const FUNCTION_LABEL: &str = "sock.dev/function";

/// Label of a PackageSet's pods and of what else belongs to it; its value is the PackageSet's name.
pub const POOL_LABEL: &str = "sock.dev/pool";

/// Label of a pool and of its pods; its value is the first digits of the version's digest.
pub const VERSION_LABEL: &str = "sock.dev/version";

/// Where a Function's code lies in its container.
pub const CODE_DIRECTORY: &str = "/srv/function";

/// Port that a Function's shim listens on.
pub const FUNCTION_PORT: i32 = 8080;

/// Port that a pool's shim tells its state on.
pub const STATUS_PORT: u16 = 9464;

/// The user that installs packages; no zygote and no leaf has it.
pub const INSTALL_USER: i64 = 65531;

/// Names of the containers.
pub mod container {
    /// Installs the packages, in a pool.
    pub const INSTALL: &str = "install";
    /// Is the zygote, in a pool.
    pub const ZYGOTE: &str = "zygote";
    /// Runs the handler, in a Function's pod.
    pub const FUNCTION: &str = "function";
}

/// Annotations that the shim reads.
pub mod annotation {
    pub const TENANT: &str = "sock.dev/tenant";
    pub const PACKAGE_SET: &str = "sock.dev/package-set";
    pub const LOCK: &str = "sock.dev/lock";
    pub const DIGEST: &str = "sock.dev/digest";
    pub const INSTALLER: &str = "sock.dev/installer";
    pub const ZYGOTE: &str = "sock.dev/zygote";
    pub const IMPORTS: &str = "sock.dev/imports";
    pub const SPARES: &str = "sock.dev/spares";
    pub const ACCEPTED_THREADS: &str = "sock.dev/accepted-threads";
    pub const WARM_UP: &str = "sock.dev/warm-up";
    pub const IMAGE: &str = "sock.dev/image";
    pub const ANCESTORS: &str = "sock.dev/ancestors";
    pub const EXTENDED: &str = "sock.dev/extended";
    pub const STATUS_PORT: &str = "sock.dev/status-port";
    pub const FUNCTION: &str = "sock.dev/function";
    pub const FUNCTION_NAME: &str = "sock.dev/function-name";
    pub const HANDLER: &str = "sock.dev/handler";
    pub const PORT: &str = "sock.dev/port";
    pub const TIMEOUT_SECONDS: &str = "sock.dev/timeout-seconds";
    pub const REUSE: &str = "sock.dev/reuse";
    pub const INSTANCES: &str = "sock.dev/instances";
    pub const FREEZE_AFTER_MS: &str = "sock.dev/freeze-after-ms";
    pub const END_AFTER_MS: &str = "sock.dev/end-after-ms";
    pub const IDLE_POLICY: &str = "sock.dev/idle-policy";
    /// Digest of a ConfigMap's files: a change of them replaces the pods. The shim does not read it.
    pub const SOURCE: &str = "sock.dev/source";
}

/// What a pool or a Function runs on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Version {
    /// SHA-256 of [`Version::lock`], warm-up, imports, and the digest of what it extends: what a zygote is.
    pub digest: String,
    /// Digest of the lock, which is image and requirements: what is installed.
    pub lock: String,
    /// The image.
    pub image: String,
    /// What it extends, nearest first.
    pub ancestors: Vec<Ancestor>,
}

impl Version {
    /// The version that a lock, imports, warm-up and ancestors make.
    pub fn new(lock: &Lock, imports: &[String], warm_up: &str, ancestors: Vec<Ancestor>) -> Self {
        let image = lock.image.clone();
        let lock = lock.digest();
        let mut parts = vec![lock.as_str(), warm_up];
        parts.extend(imports.iter().map(String::as_str));
        let alone = sha256(&parts);
        let digest = match ancestors.first() {
            Some(parent) => sha256(&[&alone, &parent.digest]),
            None => alone,
        };
        Self {
            digest,
            lock,
            image,
            ancestors,
        }
    }

    /// [`Version::ancestors`] as an annotation; none without any.
    pub fn ancestors_annotation(&self) -> Option<(String, String)> {
        let text = serde_json::to_string(&self.ancestors).ok()?;
        (!self.ancestors.is_empty()).then(|| (annotation::ANCESTORS.to_owned(), text))
    }
}

/// The first digits of a digest, for names.
pub fn short(digest: &str) -> &str {
    digest.get(..10).unwrap_or(digest)
}

/// The user of a tenant: one for each namespace, above every user that images and hosts use.
pub fn tenant_user(namespace_uid: &str) -> i64 {
    let hash = Sha256::digest(namespace_uid);
    let first = hash
        .iter()
        .take(8)
        .fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    1_000_000_000 + i64::try_from(first % 1_000_000_000).unwrap_or_default()
}

/// The security context of a pod of a tenant, which restricted Pod Security admits.
pub fn pod_security(namespace_uid: &str) -> PodSecurityContext {
    let user = tenant_user(namespace_uid);
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(user),
        run_as_group: Some(user),
        fs_group: Some(user),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".into(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

/// The security context of its containers.
pub fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".into()]),
            add: None,
        }),
        ..SecurityContext::default()
    }
}

/// Labels of everything that belongs to a resource.
pub fn labels(kind_label: &str, name: &str, component: &str) -> BTreeMap<String, String> {
    [
        (kind_label, name),
        ("app.kubernetes.io/name", name),
        ("app.kubernetes.io/component", component),
        ("app.kubernetes.io/managed-by", FIELD_MANAGER),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Metadata of something that belongs to `owner`.
pub fn child<K>(owner: &K, name: String, labels: BTreeMap<String, String>) -> ObjectMeta
where
    K: Resource<DynamicType = ()>,
{
    ObjectMeta {
        name: Some(name),
        namespace: owner.namespace(),
        labels: Some(labels),
        owner_references: owner
            .controller_owner_ref(&())
            .map(|reference| vec![reference]),
        ..ObjectMeta::default()
    }
}

/// Whether `object` is controlled by the owner with this UID.
pub fn is_child(object: &ObjectMeta, owner_uid: Option<&str>) -> bool {
    let controller = |reference: &&OwnerReference| reference.controller == Some(true);
    let found = object.owner_references.iter().flatten().find(controller);
    found.is_some_and(|reference| Some(reference.uid.as_str()) == owner_uid)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_version_changes_with_each_of_its_parts() {
        let imports = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let version = |image: &str, requirements: &str, names: &[&str], warm_up: &str| {
            let lock = Lock {
                image: image.into(),
                requirements: requirements.into(),
            };
            Version::new(&lock, &imports(names), warm_up, Vec::new())
        };
        let base = version("python:3.11", "six==1.0\n", &["six"], "");
        let image = version("python:3.12", "six==1.0\n", &["six"], "");
        let requirements = version("python:3.11", "six==1.1\n", &["six"], "");
        let imported = version("python:3.11", "six==1.0\n", &["six", "json"], "");
        let warmed = version("python:3.11", "six==1.0\n", &["six"], "import six");
        let lock = Lock {
            image: "python:3.11".into(),
            requirements: "six==1.0\n".into(),
        };
        let extending = |digest: &str| {
            let parent = Ancestor {
                digest: digest.into(),
                lock: "1b".into(),
            };
            Version::new(&lock, &imports(&["six"]), "", vec![parent])
        };
        assert_eq!(base.lock, extending("0a").lock);
        assert_ne!(base.digest, extending("0a").digest);
        assert_ne!(extending("0b").digest, extending("0a").digest);
        assert_ne!(base.lock, image.lock);
        assert_ne!(base.lock, requirements.lock);
        assert_eq!(base.lock, imported.lock);
        assert_ne!(base.digest, imported.digest);
        assert_eq!(base.lock, warmed.lock);
        assert_ne!(base.digest, warmed.digest);
        assert!(
            base.digest.len() == 64 && base.digest.bytes().all(|byte| byte.is_ascii_hexdigit())
        );
    }

    #[test]
    fn a_tenant_keeps_its_user() {
        // int(sha256(uid)[:16], 16) % 10**9 + 10**9
        assert_eq!(
            tenant_user("6f0b1f2e-0000-4000-8000-000000000001"),
            1_805_342_219
        );
    }
}
