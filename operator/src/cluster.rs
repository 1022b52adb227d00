//! What both controllers do with the API server: apply, own, tell.

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::condition::find;
use crate::contract::{FIELD_MANAGER, is_child};
use crate::metrics::Metrics;
use sock_crds::Condition;

/// What a step of reconciling may fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{step} {kind} {name}: {source}")]
    Api {
        step: &'static str,
        kind: String,
        name: String,
        source: Box<kube::Error>,
    },
    #[error(
        "{kind} {name} exists and does not belong to this resource: delete it, or choose another name"
    )]
    Taken { kind: String, name: String },
    #[error("{0} has no namespace")]
    NoNamespace(String),
}

impl Error {
    /// One word for it, for a condition.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Taken { .. } => "NameTaken",
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.is_forbidden() => "Forbidden",
                kube::Error::Api(status) if status.is_invalid() => "Refused",
                _ => "ApiServerError",
            },
            Self::NoNamespace(_) => "NoNamespace",
        }
    }
}

/// What reconciling needs beside the resource.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// Writes events.
    pub recorder: Recorder,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Makes an error of the API say which step it hit, and on what.
pub fn at<K: Resource<DynamicType = ()>>(
    step: &'static str,
    name: &str,
) -> impl FnOnce(kube::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Api {
        step,
        kind: K::kind(&()).into_owned(),
        name,
        source: Box::new(source),
    }
}

impl Context {
    /// The objects of one kind in a namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// An object, if it is there.
    pub async fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        self.api::<K>(namespace)
            .get_opt(name)
            .await
            .map_err(at::<K>("get", name))
    }

    /// The objects with a label.
    pub async fn list<K>(&self, namespace: &str, label: &str, value: &str) -> Result<Vec<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let selector = ListParams::default().labels(&format!("{label}={value}"));
        Ok(self
            .api::<K>(namespace)
            .list(&selector)
            .await
            .map_err(at::<K>("list", value))?
            .items)
    }

    /// The UID of a namespace; none if it is going away.
    pub async fn namespace_uid(&self, name: &str) -> Result<Option<String>, Error> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace = namespaces
            .get_opt(name)
            .await
            .map_err(at::<Namespace>("get", name))?;
        Ok(namespace
            .filter(|namespace| namespace.metadata.deletion_timestamp.is_none())
            .and_then(|it| it.uid()))
    }

    /// Applies an object that belongs to `owner`, and refuses to take over one that does not.
    pub async fn apply<K>(&self, owner: &str, object: &K) -> Result<K, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug
            + Serialize,
    {
        let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
        let api = self.api::<K>(&namespace);
        let there = api
            .get_metadata_opt(&name)
            .await
            .map_err(at::<K>("get", &name))?;
        if let Some(there) = there
            && !is_child(&there.metadata, Some(owner))
        {
            return Err(Error::Taken {
                kind: K::kind(&()).into_owned(),
                name,
            });
        }
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(&name, &parameters, &Patch::Apply(object))
            .await
            .map_err(at::<K>("apply", &name))
    }

    /// Deletes the objects with a label that belong to `owner` and that nothing needs any more.
    pub async fn prune<K>(
        &self,
        owner: &str,
        namespace: &str,
        (label, value): (&str, &str),
        needed: impl Fn(&str) -> bool,
    ) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let api = self.api::<K>(namespace);
        let selector = ListParams::default().labels(&format!("{label}={value}"));
        for object in api
            .list_metadata(&selector)
            .await
            .map_err(at::<K>("list", value))?
        {
            let name = object.metadata.name.clone().unwrap_or_default();
            if is_child(&object.metadata, Some(owner)) && !needed(&name) {
                match api.delete(&name, &DeleteParams::default()).await {
                    Err(kube::Error::Api(status)) if status.is_not_found() => {}
                    outcome => {
                        outcome.map_err(at::<K>("delete", &name))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Applies the status of a resource.
    pub async fn apply_status<K, S>(&self, object: &K, status: &S) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
        S: Serialize,
    {
        let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
        let patch = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": { "name": name, "uid": object.meta().uid },
            "status": status,
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        match self
            .api::<K>(&namespace)
            .patch_status(&name, &parameters, &Patch::Apply(&patch))
            .await
        {
            // Deleted meanwhile: nobody reads that status any more.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            outcome => outcome
                .map(|_| ())
                .map_err(at::<K>("apply the status of", &name)),
        }
    }

    /// Publishes an event when the condition `Ready` has got another reason or message.
    pub async fn tell<K>(&self, object: &K, before: &[Condition], after: &[Condition])
    where
        K: Resource<DynamicType = ()>,
    {
        let Some(event) = event(before, after) else {
            return;
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, "publish an event");
        }
    }
}

/// The event that a change of the condition `Ready` is worth.
fn event(before: &[Condition], after: &[Condition]) -> Option<Event> {
    let now = find(after, "Ready")?;
    if let Some(then) = find(before, "Ready")
        && (&then.status, &then.reason) == (&now.status, &now.reason)
        && (now.status != "False" || then.message == now.message)
    {
        return None;
    }
    Some(Event {
        type_: if now.status == "False" && !now.reason.starts_with("Waiting") {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: now.reason.clone(),
        // The API server takes 1 kB at most.
        note: Some(now.message.chars().take(1000).collect()),
        action: "Reconcile".into(),
        secondary: None,
    })
}
