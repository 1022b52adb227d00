//! Builds what belongs to a Function: a ConfigMap with inline code, a Deployment and a Service.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment,
};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, PodSpec, PodTemplateSpec, Service,
    ServicePort, ServiceSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use sock_crds::{Function, IdlePolicy};

use super::validate::{Code, Placement, Verdict};
use crate::contract::{
    CODE_DIRECTORY, FUNCTION_LABEL, FUNCTION_PORT, RUNTIME_CLASS, annotation, child, container,
    container_security, labels, pod_security, sha256, short,
};

/// What belongs to a Function.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// Inline code; immutable, one for each content.
    pub code: Option<ConfigMap>,
    /// The pods; none as long as code or packages lack.
    pub deployment: Option<Deployment>,
    /// The address.
    pub service: Service,
}

/// Builds it all for a tenant, which is the UID of a namespace.
pub fn build(function: &Function, tenant: &str, verdict: &Verdict) -> Children {
    let name = function.name_any();
    let labels = labels(FUNCTION_LABEL, &name, "function");
    let code = match &verdict.code {
        Some(Code::Inline { file, text }) => Some(ConfigMap {
            metadata: child(function, code_name(&name, file, text), labels.clone()),
            immutable: Some(true),
            data: Some([(file.clone(), text.clone())].into()),
            ..ConfigMap::default()
        }),
        _ => None,
    };
    let deployment =
        verdict
            .placement
            .as_ref()
            .zip(verdict.code.as_ref())
            .map(|(placement, code)| Deployment {
                metadata: child(function, name.clone(), labels.clone()),
                spec: Some(DeploymentSpec {
                    replicas: Some(function.spec.replicas),
                    selector: selector(&name),
                    strategy: Some(DeploymentStrategy {
                        type_: Some("RollingUpdate".into()),
                        rolling_update: Some(RollingUpdateDeployment {
                            max_surge: Some(IntOrString::Int(1)),
                            max_unavailable: Some(IntOrString::Int(0)),
                        }),
                    }),
                    revision_history_limit: Some(2),
                    template: PodTemplateSpec {
                        metadata: Some(ObjectMeta {
                            labels: Some(labels.clone()),
                            annotations: Some(annotations(function, tenant, placement, code)),
                            ..ObjectMeta::default()
                        }),
                        spec: Some(pod(function, tenant, placement, code)),
                    },
                    ..DeploymentSpec::default()
                }),
                ..Deployment::default()
            });
    Children {
        code,
        deployment,
        service: service(function, labels),
    }
}

/// The selector of a Function's pods.
pub fn selector(name: &str) -> LabelSelector {
    LabelSelector {
        match_labels: Some([(FUNCTION_LABEL.to_owned(), name.to_owned())].into()),
        ..LabelSelector::default()
    }
}

fn code_name(name: &str, file: &str, text: &str) -> String {
    format!("{name}-code-{}", short(&sha256(&[file, text])))
}

fn service(function: &Function, labels: BTreeMap<String, String>) -> Service {
    let name = function.name_any();
    Service {
        metadata: child(function, name.clone(), labels),
        spec: Some(ServiceSpec {
            selector: selector(&name).match_labels,
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                port: 80,
                target_port: Some(IntOrString::String("http".into())),
                protocol: Some("TCP".into()),
                app_protocol: Some("http".into()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn annotations(
    function: &Function,
    tenant: &str,
    placement: &Placement,
    code: &Code,
) -> BTreeMap<String, String> {
    let spec = &function.spec;
    let mut annotations: BTreeMap<String, String> = [
        (annotation::TENANT, tenant.to_owned()),
        (annotation::PACKAGE_SET, spec.package_set.clone()),
        (annotation::LOCK, placement.version.lock.clone()),
        (annotation::DIGEST, placement.version.digest.clone()),
        (annotation::FUNCTION, container::FUNCTION.to_owned()),
        (annotation::FUNCTION_NAME, function.name_any()),
        (annotation::HANDLER, spec.handler.clone()),
        (annotation::PORT, FUNCTION_PORT.to_string()),
        (
            annotation::TIMEOUT_SECONDS,
            spec.timeout_seconds.to_string(),
        ),
        (annotation::REUSE, spec.reuse.word().to_owned()),
        (annotation::INSTANCES, spec.instances.to_string()),
        (
            annotation::FREEZE_AFTER_MS,
            spec.idle.freeze_after_ms.to_string(),
        ),
        (annotation::END_AFTER_MS, spec.idle.end_after_ms.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    // What everybody has is not said: that a later operator knows of it would replace every pod.
    if spec.idle.policy != IdlePolicy::default() {
        annotations.insert(
            annotation::IDLE_POLICY.to_owned(),
            spec.idle.policy.word().to_owned(),
        );
    }
    // Inline code changes the name of its ConfigMap, and so the template.
    annotations.extend(placement.version.ancestors_annotation());
    if let Code::ConfigMap { digest, .. } = code {
        annotations.insert(annotation::SOURCE.to_owned(), digest.clone());
    }
    annotations
}

fn pod(function: &Function, tenant: &str, placement: &Placement, code: &Code) -> PodSpec {
    let spec = &function.spec;
    let config_map = match code {
        Code::Inline { file, text } => code_name(&function.name_any(), file, text),
        Code::ConfigMap { name, .. } => name.clone(),
    };
    PodSpec {
        runtime_class_name: Some(RUNTIME_CLASS.into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security(tenant)),
        // The RuntimeClass adds the label of nodes that have the runtime.
        node_selector: Some(placement.node_selector.clone())
            .filter(|selector| !selector.is_empty()),
        tolerations: Some(placement.tolerations.clone())
            .filter(|tolerations| !tolerations.is_empty()),
        containers: vec![Container {
            name: container::FUNCTION.into(),
            image: Some(placement.version.image.clone()),
            command: Some(vec![
                "python3".into(),
                "/opt/sock/python/interpreter.py".into(),
            ]),
            env: Some(spec.env.clone()).filter(|env| !env.is_empty()),
            env_from: Some(spec.env_from.clone()).filter(|sources| !sources.is_empty()),
            resources: spec
                .resources
                .as_ref()
                .map(sock_crds::Resources::requirements),
            ports: Some(vec![ContainerPort {
                name: Some("http".into()),
                container_port: FUNCTION_PORT,
                protocol: Some("TCP".into()),
                ..ContainerPort::default()
            }]),
            security_context: Some(container_security()),
            volume_mounts: Some(vec![VolumeMount {
                name: "code".into(),
                mount_path: CODE_DIRECTORY.into(),
                read_only: Some(true),
                ..VolumeMount::default()
            }]),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            ..Container::default()
        }],
        volumes: Some(vec![Volume {
            name: "code".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: config_map,
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        }]),
        // Requests under way may finish; a pod without any ends at once.
        termination_grace_period_seconds: Some(i64::from(spec.timeout_seconds) + 5),
        ..PodSpec::default()
    }
}
