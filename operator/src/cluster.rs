//! What both controllers do with the API server: apply, own, tell.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::condition::find;
use crate::connection;
use crate::contract::{FIELD_MANAGER, is_child, sha256, short};
use crate::controller::Reconciled;
use crate::metrics::Metrics;
use sock_crds::Condition;
use tokio::time::Instant;

/// What a step of reconciling may fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{step} {kind} {name}: {}", words(source))]
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
    #[error("the API server is too slow: nothing came of it in {} s", .0.as_secs())]
    Slow(Duration),
}

/// What the API server said, or why it said nothing.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        kube::Error::Service(source) => source.to_string(),
        other => other.to_string(),
    }
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
            Self::Slow(_) => "ApiServerError",
        }
    }

    /// Whether it may well be over in a moment: somebody else wrote or deleted at the same time, or the API server is
    /// busy, away or broken. What stays is that it refuses what it is asked for.
    pub fn is_passing(&self) -> bool {
        let Self::Api { source, .. } = self else {
            return matches!(self, Self::Slow(_));
        };
        let kube::Error::Api(status) = source.as_ref() else {
            return true;
        };
        // The next look at the namespace tells that it is going away.
        let terminating = status.details.iter().flat_map(|details| &details.causes);
        status.code >= 500
            || matches!(status.code, 404 | 409 | 429)
            || terminating
                .map(|cause| cause.reason.as_str())
                .any(|reason| reason == "NamespaceTerminating")
    }

    /// How long the API server wants to be left alone.
    pub fn after(&self) -> Option<Duration> {
        let Self::Api { source, .. } = self else {
            return None;
        };
        match source.as_ref() {
            kube::Error::Api(status) => status
                .details
                .as_ref()
                .map(|details| Duration::from_secs(details.retry_after_seconds.into()))
                .filter(|after| !after.is_zero()),
            kube::Error::Service(source) => match source.downcast_ref() {
                Some(connection::Error::Busy { after }) => Some(*after),
                _ => None,
            },
            _ => None,
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
    /// What is remembered of each resource, by its UID.
    memories: Mutex<HashMap<String, Memory>>,
}

/// What is remembered of a resource from one reconciliation to the next. Nothing is lost with it but some calls.
#[derive(Debug, Default)]
struct Memory {
    /// What was applied, and what the API server made of it, by kind and name.
    applied: HashMap<String, String>,
    /// Failures since the last success.
    failures: u32,
    /// Until then the API server wants to be left alone, whatever a watch tells.
    rests: Option<Instant>,
}

/// Failures of the kind that passes that are only logged.
const PASSED_OVER: u32 = 2;

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
    /// What reconciling needs, by a client that reads and writes.
    pub fn new(client: Client, instance: &str, metrics: Arc<Metrics>) -> Self {
        let reporter = Reporter {
            controller: "sock.dev/operator".into(),
            instance: Some(instance.to_owned()),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            metrics,
            memories: Mutex::default(),
        }
    }

    fn memories(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember<T>(&self, uid: &str, act: impl FnOnce(&mut Memory) -> T) -> T {
        act(self.memories().entry(uid.to_owned()).or_default())
    }

    /// Forgets a resource that is gone.
    pub fn forget(&self, uid: &str) {
        self.memories().remove(uid);
    }

    /// Forgets all resources but these.
    pub fn retain(&self, is_there: impl Fn(&str) -> bool) {
        self.memories().retain(|uid, _| is_there(uid));
    }

    /// Counts a failure and returns how many there have been in a row.
    pub fn failed(&self, uid: &str) -> u32 {
        self.remember(uid, |memory| {
            memory.failures = memory.failures.saturating_add(1);
            memory.failures
        })
    }

    /// Leaves a resource alone for a while.
    pub fn rest(&self, uid: &str, wait: Duration) {
        self.remember(uid, |memory| memory.rests = Some(Instant::now() + wait));
    }

    /// How long a resource is still to be left alone.
    pub fn rests(&self, uid: &str) -> Option<Duration> {
        let until = self.remember(uid, |memory| memory.rests)?;
        until
            .checked_duration_since(Instant::now())
            .filter(|it| !it.is_zero())
    }

    /// A resource was reconciled.
    pub fn succeeded(&self, uid: &str) {
        self.remember(uid, |memory| memory.failures = 0);
    }

    /// Whether a failure is to be said in the status: one that passes only when it does not pass.
    pub fn tells_of<K: Resource>(&self, object: &K, error: &Error) -> bool {
        let uid = object.uid().unwrap_or_default();
        !error.is_passing() || self.remember(&uid, |memory| memory.failures >= PASSED_OVER)
    }

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

    /// All objects of one kind in a namespace.
    pub async fn all<K>(&self, namespace: &str) -> Result<Vec<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let all = self.api::<K>(namespace).list(&ListParams::default()).await;
        Ok(all.map_err(at::<K>("list", namespace))?.items)
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

    /// The metadata of the pods that the operator's objects have made. Those that have ended for good run on nothing.
    pub async fn list_pods(&self, namespace: &str) -> Result<Vec<PartialObjectMeta<Pod>>, Error> {
        let selector = ListParams::default()
            .labels(&format!("app.kubernetes.io/managed-by={FIELD_MANAGER}"))
            .fields("status.phase!=Failed");
        self.list_metadata(namespace, &selector, FIELD_MANAGER)
            .await
    }

    /// The metadata of the objects that are selected; `what` says in an error which.
    async fn list_metadata<K>(
        &self,
        namespace: &str,
        selector: &ListParams,
        what: &str,
    ) -> Result<Vec<PartialObjectMeta<K>>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let list = self.api::<K>(namespace).list_metadata(selector).await;
        Ok(list.map_err(at::<K>("list", what))?.items)
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
    ///
    /// Returns what the API server made of it; nothing if it is there already as it was applied last, which is not
    /// written again.
    pub async fn apply<K>(&self, owner: &str, object: &K) -> Result<Option<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug
            + Serialize,
    {
        let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
        let key = format!("{} {name}", K::kind(&()));
        let api = self.api::<K>(&namespace);
        let there = api
            .get_metadata_opt(&name)
            .await
            .map_err(at::<K>("get", &name))?
            .map(|there| there.metadata);
        let mut object = object.clone();
        let mut parameters = PatchParams::apply(FIELD_MANAGER);
        if let Some(there) = &there {
            if !is_child(there, Some(owner)) {
                return Err(Error::Taken {
                    kind: K::kind(&()).into_owned(),
                    name,
                });
            }
            let same = self.remember(owner, |memory| {
                memory.applied.get(&key) == Some(&digest(&object, there))
            });
            if same {
                return Ok(None);
            }
            // Without force, an object that somebody else makes meanwhile is not taken from him: its fields conflict.
            parameters = parameters.force();
        }
        let intent = object.clone();
        // Another than the one that was looked at is a conflict: its version differs. That it is not to be made
        // again if it is gone is what the UID says.
        if let Some(there) = there {
            object.meta_mut().uid = there.uid;
            object.meta_mut().resource_version = there.resource_version;
        }
        let applied = api
            .patch(&name, &parameters, &Patch::Apply(&object))
            .await
            .map_err(at::<K>("apply", &name))?;
        self.remember(owner, |memory| {
            memory.applied.insert(key, digest(&intent, applied.meta()))
        });
        Ok(Some(applied))
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
        for object in self.list_metadata::<K>(namespace, &selector, value).await? {
            let name = object.metadata.name.clone().unwrap_or_default();
            if is_child(&object.metadata, Some(owner)) && !needed(&name) {
                let parameters = DeleteParams {
                    preconditions: Some(Preconditions {
                        uid: object.metadata.uid.clone(),
                        resource_version: None,
                    }),
                    ..DeleteParams::default()
                };
                self.remember(owner, |memory| {
                    memory.applied.remove(&format!("{} {name}", K::kind(&())))
                });
                match api.delete(&name, &parameters).await {
                    // Gone, or another by now.
                    Err(kube::Error::Api(status))
                        if status.is_not_found() || status.is_conflict() => {}
                    outcome => {
                        outcome.map_err(at::<K>("delete", &name))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Applies the status of a resource, as long as that is what it was when the status was decided on.
    async fn apply_status<K, S>(&self, object: &K, status: &S) -> Result<(), Error>
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
            "metadata": {
                "name": name, "uid": object.meta().uid, "resourceVersion": object.meta().resource_version,
            },
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

    /// Writes a status that is news, and publishes an event if its condition `Ready` is.
    pub async fn report<K: Reconciled>(&self, object: &K, after: K::Status) -> Result<(), Error> {
        let before = object.status().cloned().unwrap_or_default();
        if after == before {
            return Ok(());
        }
        self.apply_status(object, &after).await?;
        self.tell(object, K::conditions(&before), K::conditions(&after))
            .await;
        Ok(())
    }

    /// Publishes an event when the condition `Ready` has got another reason or message.
    async fn tell<K>(&self, object: &K, before: &[Condition], after: &[Condition])
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

/// What is applied to an object and what the API server says of it: its UID, and the fields that are ours. Whoever
/// changes or removes one of them takes it from us.
fn digest<K: Serialize>(intent: &K, there: &ObjectMeta) -> String {
    let entries = there.managed_fields.iter().flatten();
    let ours = entries.filter(|entry| {
        entry.manager.as_deref() == Some(FIELD_MANAGER)
            && entry.operation.as_deref() == Some("Apply")
            && entry.subresource.is_none()
    });
    let fields: Vec<_> = ours.map(|entry| &entry.fields_v1).collect();
    let uid = there.uid.as_deref().unwrap_or_default();
    sha256(&[
        json!(intent).to_string(),
        json!(fields).to_string(),
        uid.to_owned(),
    ])
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
    // Within minutes the recorder takes an event of the same type, reason and action for the same, whatever its note says, and
    // counts it: another message would not be seen.
    let message = sha256(std::slice::from_ref(&now.message));
    Some(Event {
        type_: if now.status == "False" && !now.reason.starts_with("Waiting") {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: now.reason.clone(),
        // The API server takes 1 kB at most.
        note: Some(now.message.chars().take(1000).collect()),
        action: format!("Reconcile-{}", short(&message)),
        secondary: None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::condition::{Finding, conditions};
    use k8s_openapi::jiff::Timestamp;

    #[test]
    fn another_message_is_another_event() {
        let failed = |message: &str| {
            let finding = Finding::no("Ready", "ZygoteFailed", message);
            conditions(&[finding], &[], Some(1), Timestamp::UNIX_EPOCH)
        };
        let first = event(&[], &failed("killed")).unwrap();
        let second = event(&failed("killed"), &failed("out of memory")).unwrap();
        assert_eq!(first.reason, second.reason);
        assert_ne!(first.action, second.action);
        assert!(event(&failed("killed"), &failed("killed")).is_none());
        let again = event(&[], &failed("killed")).unwrap();
        assert_eq!(first.action, again.action);
    }
}
