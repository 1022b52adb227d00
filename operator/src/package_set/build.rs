//! Builds what belongs to a PackageSet: a ConfigMap with the requirements and the DaemonSet of the
//! pool of its version.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{
    DaemonSet, DaemonSetSpec, DaemonSetUpdateStrategy, RollingUpdateDaemonSet,
};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EnvVarSource, PodSpec,
    PodTemplateSpec, SecretKeySelector, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use sock_crds::{Index, PackageSet};

use super::validate::Wanted;
use crate::contract::{
    INSTALL_USER, NODE_LABEL, POOL_LABEL, RUNTIME_CLASS, STATUS_PORT, VERSION_LABEL, Version,
    annotation, child, container, container_security, labels, pod_security, sha256, short,
};

/// What belongs to a PackageSet.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// The requirements file; immutable, one for each content.
    pub requirements: ConfigMap,
    /// The pool.
    pub pool: DaemonSet,
}

/// Name of the DaemonSet of a version.
pub fn pool_name(set: &PackageSet, version: &Version) -> String {
    format!("{}-{}", set.name_any(), short(&version.digest))
}

/// Builds it all for a tenant, which is the UID of a namespace.
pub fn build(set: &PackageSet, tenant: &str, wanted: &Wanted) -> Children {
    let name = set.name_any();
    let labels = labels(POOL_LABEL, &name, "pool");
    let version = short(&wanted.version.digest);
    let mut of_version = labels.clone();
    of_version.insert(VERSION_LABEL.to_owned(), version.to_owned());
    let requirements = format!(
        "{name}-requirements-{}",
        short(&sha256(&[&wanted.requirements]))
    );
    Children {
        requirements: ConfigMap {
            metadata: child(set, requirements.clone(), labels.clone()),
            immutable: Some(true),
            data: Some([("requirements.txt".to_owned(), wanted.requirements.clone())].into()),
            ..ConfigMap::default()
        },
        pool: DaemonSet {
            // One for each version: the former serves until nobody runs on it any more.
            metadata: child(set, pool_name(set, &wanted.version), of_version.clone()),
            spec: Some(DaemonSetSpec {
                selector: LabelSelector {
                    match_labels: Some(
                        [
                            (POOL_LABEL.to_owned(), name),
                            (VERSION_LABEL.to_owned(), version.to_owned()),
                        ]
                        .into(),
                    ),
                    ..LabelSelector::default()
                },
                // What changes nothing of a version, such as its resources: a pod with the new ones starts beside the
                // old one, which ends when the new one is warm.
                update_strategy: Some(DaemonSetUpdateStrategy {
                    type_: Some("RollingUpdate".into()),
                    rolling_update: Some(RollingUpdateDaemonSet {
                        max_surge: Some(IntOrString::Int(1)),
                        max_unavailable: Some(IntOrString::Int(0)),
                    }),
                }),
                revision_history_limit: Some(2),
                template: PodTemplateSpec {
                    metadata: Some(ObjectMeta {
                        labels: Some(of_version),
                        annotations: Some(annotations(set, tenant, wanted)),
                        ..ObjectMeta::default()
                    }),
                    spec: Some(pod(set, tenant, &requirements)),
                },
                ..DaemonSetSpec::default()
            }),
            ..DaemonSet::default()
        },
    }
}

fn annotations(set: &PackageSet, tenant: &str, wanted: &Wanted) -> BTreeMap<String, String> {
    let list = |names: &[String]| serde_json::Value::from(names).to_string();
    [
        (annotation::TENANT, tenant.to_owned()),
        (annotation::PACKAGE_SET, set.name_any()),
        (annotation::LOCK, wanted.version.lock.clone()),
        (annotation::DIGEST, wanted.version.digest.clone()),
        (annotation::INSTALLER, container::INSTALL.to_owned()),
        (annotation::ZYGOTE, container::ZYGOTE.to_owned()),
        (annotation::IMPORTS, list(&set.spec.imports)),
        (annotation::SPARES, set.spec.spares.to_string()),
        (
            annotation::ACCEPTED_THREADS,
            list(&set.spec.accepted_threads),
        ),
        (
            annotation::WARM_UP,
            set.spec.warm_up.clone().unwrap_or_default(),
        ),
        (annotation::IMAGE, wanted.version.image.clone()),
        (annotation::STATUS_PORT, STATUS_PORT.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into_iter()
    .chain(wanted.version.ancestors_annotation())
    .chain(
        wanted
            .is_extended
            .then(|| (annotation::EXTENDED.to_owned(), "true".to_owned())),
    )
    .collect()
}

/// Where packages come from, for the installer alone: the credentials are in no zygote.
fn index(index: &Index) -> Vec<EnvVar> {
    let mut variables = vec![EnvVar {
        name: "SOCK_INDEX_URL".into(),
        value: Some(index.url.clone()),
        value_from: None,
    }];
    for (name, key) in [
        ("SOCK_INDEX_USERNAME", "username"),
        ("SOCK_INDEX_PASSWORD", "password"),
    ] {
        variables.extend(index.secret_ref.as_ref().map(|secret| EnvVar {
            name: name.into(),
            value: None,
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: secret.name.clone(),
                    key: key.into(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
        }));
    }
    variables
}

fn pod(set: &PackageSet, tenant: &str, requirements: &str) -> PodSpec {
    // The DaemonSet controller picks nodes by the template alone, which the RuntimeClass does not reach.
    let mut node_selector = set.spec.node_selector.clone();
    node_selector.insert(NODE_LABEL.0.to_owned(), NODE_LABEL.1.to_owned());

    let index: Vec<EnvVar> = set.spec.index.iter().flat_map(index).collect();
    let resources = set
        .spec
        .resources
        .as_ref()
        .map(sock_crds::Resources::requirements);
    let container = |name: &str, command: &[&str]| Container {
        name: name.to_owned(),
        image: Some(set.spec.image.clone()),
        command: Some(command.iter().map(|&word| word.to_owned()).collect()),
        resources: resources.clone(),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    };
    let install = Container {
        env: Some(index).filter(|env| !env.is_empty()),
        security_context: Some(SecurityContext {
            run_as_user: Some(INSTALL_USER),
            ..container_security()
        }),
        volume_mounts: Some(vec![VolumeMount {
            name: "requirements".into(),
            mount_path: "/etc/sock".into(),
            read_only: Some(true),
            ..VolumeMount::default()
        }]),
        ..container(
            container::INSTALL,
            &["python3", "-I", "/opt/sock/python/install.py"],
        )
    };
    let zygote = Container {
        security_context: Some(container_security()),
        ports: Some(vec![ContainerPort {
            name: Some("status".into()),
            container_port: STATUS_PORT.into(),
            protocol: Some("TCP".into()),
            ..ContainerPort::default()
        }]),
        ..container(
            container::ZYGOTE,
            &["python3", "/opt/sock/python/zygote.py"],
        )
    };

    PodSpec {
        runtime_class_name: Some(RUNTIME_CLASS.into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security(tenant)),
        node_selector: Some(node_selector),
        tolerations: Some(set.spec.tolerations.clone())
            .filter(|tolerations| !tolerations.is_empty()),
        init_containers: Some(vec![install]),
        containers: vec![zygote],
        volumes: Some(vec![Volume {
            name: "requirements".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: requirements.to_owned(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        }]),
        termination_grace_period_seconds: Some(10),
        ..PodSpec::default()
    }
}
