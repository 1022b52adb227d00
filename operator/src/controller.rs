//! What the controllers have in common: watches that go on whatever happens to them, a queue of bounded width, and
//! when to try again.
//!
//! What a watch tells is only a reason to look: the resource itself is read anew, since what the watch last told of it
//! may be older than what was written because of it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll};
use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::ResourceExt as _;
use kube::api::Api;
use kube::core::object::HasStatus;
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use kube::runtime::controller::Action;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::runtime::{Config, WatchStreamExt as _, applier, watcher};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sock_crds::Condition;
use tokio::time::timeout;

use crate::cluster::{Context, Error};
use crate::condition::{Finding, conditions};

/// Resources that are reconciled at once. More would only wait for the API server, which many operators share.
pub const AT_ONCE: u16 = 16;

/// A reconciliation is a dozen calls of milliseconds; one that takes longer would keep others from their turn.
const LONGEST: Duration = Duration::from_secs(60);

/// Time until the first repetition after a failure; it doubles with each failure more.
const FIRST: Duration = Duration::from_secs(1);

/// The longest time between two attempts: whoever mends the cause waits no longer for it to be seen.
const LAST: Duration = Duration::from_secs(60);

/// A resource that the operator reconciles.
pub trait Reconciled:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: Clone + Default + PartialEq + Serialize + Sync>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// Label of what belongs to it; its value is the name.
    const LABEL: &'static str;

    /// When to look at what no watch tells of.
    const AGAIN: Duration;

    /// The conditions of a status.
    fn conditions(status: &Self::Status) -> &Vec<Condition>;

    /// The conditions of a status, to be changed.
    fn conditions_mut(status: &mut Self::Status) -> &mut Vec<Condition>;

    /// Reconciles it, and returns what the status already says to have failed.
    fn steps(&self, context: &Context)
    -> impl Future<Output = Result<Option<Error>, Error>> + Send;
}

/// The watches of one controller.
pub struct Watches<K: Reconciled> {
    context: Arc<Context>,
    store: Store<K>,
    queue: SelectAll<BoxStream<'static, ObjectRef<K>>>,
}

impl<K: Reconciled> Watches<K> {
    /// Watches the resource itself.
    pub fn new(context: Arc<Context>) -> Self {
        let (store, mut writer) = reflector::store();
        let events = events::<K>(&context, watcher::Config::default())
            .inspect(move |event| writer.apply_watcher_event(event));
        let mut queue = SelectAll::new();
        queue.push(by_itself(events, store.clone(), Arc::clone(&context)).boxed());
        Self {
            context,
            store,
            queue,
        }
    }

    /// Watches what belongs to it and has its label.
    #[must_use]
    pub fn owns<C>(self) -> Self
    where
        C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let config = watcher::Config::default().labels(K::LABEL);
        self.related(config, |_, child: &C| {
            owner::<K>(child.meta()).into_iter().collect()
        })
    }

    /// Watches what it may name, of which some may belong to it.
    #[must_use]
    pub fn names<C>(self, names: impl Fn(&K, &str) -> bool + Send + 'static) -> Self
    where
        C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        self.related(watcher::Config::default(), move |store, named: &C| {
            let (namespace, name) = (named.namespace(), named.name_any());
            let all = store.state();
            let names = all
                .iter()
                .filter(|one| one.namespace() == namespace && names(one, &name))
                .map(|one| ObjectRef::from_obj(&**one));
            names.chain(owner::<K>(named.meta())).collect()
        })
    }

    /// Watches for the end of what a manager has made, for those of the namespace that it concerns.
    #[must_use]
    pub fn goes<C>(mut self, manager: &str, concerns: fn(&K) -> bool) -> Self
    where
        C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let config =
            watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={manager}"));
        let store = self.store.clone();
        let queue = events::<C>(&self.context, config).flat_map(move |event| {
            let concerned = |namespace: Option<String>| {
                let state = store.state();
                let concerned = state.iter().filter(|one| {
                    (namespace.is_none() || one.namespace() == namespace) && concerns(one)
                });
                concerned.map(|one| ObjectRef::from_obj(&**one)).collect()
            };
            stream::iter(match event {
                Event::Init | Event::InitApply(_) | Event::Apply(_) => Vec::new(),
                Event::InitDone => concerned(None),
                Event::Delete(object) => concerned(object.namespace()),
            })
        });
        self.queue.push(queue.boxed());
        self
    }

    /// Watches others of its kind: those that it names, and those that name it.
    #[must_use]
    pub fn names_its_kind(self, named: fn(&K) -> Option<&str>) -> Self {
        self.related(watcher::Config::default(), move |store, other: &K| {
            let (namespace, name) = (other.namespace(), other.name_any());
            let all = store.state();
            let naming = all
                .iter()
                .filter(|one| one.namespace() == namespace && named(one) == Some(&name))
                .map(|one| ObjectRef::from_obj(&**one));
            let named = named(other).and_then(|name| {
                let namespace = namespace.as_deref()?;
                Some(ObjectRef::new(name).within(namespace))
            });
            naming.chain(named).collect()
        })
    }

    fn related<C>(
        mut self,
        config: watcher::Config,
        concerns: impl Fn(&Store<K>, &C) -> Vec<ObjectRef<K>> + Send + 'static,
    ) -> Self
    where
        C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let store = self.store.clone();
        let mut is_first = true;
        let queue = events::<C>(&self.context, config).flat_map(move |event| {
            stream::iter(match event {
                Event::Init | Event::InitApply(_) => Vec::new(),
                // What was deleted while nobody watched is in no list. The first time all are looked at anyway.
                Event::InitDone if std::mem::take(&mut is_first) => Vec::new(),
                Event::InitDone => all(&store),
                Event::Apply(object) | Event::Delete(object) => concerns(&store, &object),
            })
        });
        self.queue.push(queue.boxed());
        self
    }

    /// Reconciles until it is dropped.
    pub async fn run(self) {
        applier(
            |object, context| Box::pin(reconcile::<K>(object, context)),
            retry::<K>,
            self.context,
            self.store,
            self.queue.map(Ok::<_, Infallible>),
            Config::default().concurrency(AT_ONCE),
        )
        .for_each(|outcome| async move {
            if let Err(error) = outcome {
                tracing::debug!(%error, kind = %K::kind(&()), "reconcile");
            }
        })
        .await;
    }
}

/// The events of one watch. Each watch has a backoff of its own, so that one that fails does not keep others waiting.
fn events<C>(context: &Context, config: watcher::Config) -> impl Stream<Item = Event<C>> + use<C>
where
    C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut begins = false;
    watcher(Api::<C>::all(context.client.clone()), config)
        // It says that it begins before it has asked for anything. That must not end the backoff, so it is told with
        // what comes of it.
        .flat_map(move |event| {
            let is_init = matches!(event, Ok(Event::Init));
            let begun = !is_init && event.is_ok() && std::mem::take(&mut begins);
            begins |= is_init;
            let init = begun.then_some(Ok(Event::Init));
            stream::iter(init.into_iter().chain((!is_init).then_some(event)))
        })
        .default_backoff()
        .filter_map(|event| async {
            event
                .inspect_err(|error| tracing::warn!(%error, kind = %C::kind(&()), "watch"))
                .ok()
        })
}

/// Everything that is cached.
fn all<K: Reconciled>(store: &Store<K>) -> Vec<ObjectRef<K>> {
    let all = store.state();
    all.iter().map(|one| ObjectRef::from_obj(&**one)).collect()
}

/// Whether a resource is another one now: what the operator writes into its status is no reason to look again.
fn form(meta: &ObjectMeta) -> (Option<String>, Option<i64>, bool) {
    (
        meta.uid.clone(),
        meta.generation,
        meta.deletion_timestamp.is_some(),
    )
}

fn by_itself<K: Reconciled>(
    events: impl Stream<Item = Event<K>>,
    store: Store<K>,
    context: Arc<Context>,
) -> impl Stream<Item = ObjectRef<K>> {
    let mut forms = HashMap::new();
    events.flat_map(move |event| {
        stream::iter(match event {
            Event::Init | Event::InitApply(_) => Vec::new(),
            // Only now they are in the store.
            Event::InitDone => {
                let present = store.state();
                forms = present
                    .iter()
                    .map(|one| (ObjectRef::from_obj(&**one), form(one.meta())))
                    .collect();
                context.retain(|uid| {
                    present
                        .iter()
                        .any(|one| one.meta().uid.as_deref() == Some(uid))
                });
                all(&store)
            }
            Event::Apply(object) => {
                let reference = ObjectRef::from_obj(&object);
                let form = form(object.meta());
                let before = forms.insert(reference.clone(), form.clone());
                if before.as_ref() == Some(&form) {
                    Vec::new()
                } else {
                    vec![reference]
                }
            }
            Event::Delete(object) => {
                forms.remove(&ObjectRef::from_obj(&object));
                context.forget(&object.uid().unwrap_or_default());
                Vec::new()
            }
        })
    })
}

/// Whose an object is: its controller's, if that is of this kind, or the one that its label names.
fn owner<K: Reconciled>(meta: &ObjectMeta) -> Option<ObjectRef<K>> {
    let mut owners = meta.owner_references.iter().flatten();
    let controller = owners
        .find(|owner| owner.controller == Some(true) && owner.kind == K::kind(&()))
        .map(|owner| owner.name.as_str());
    let label = || Some(meta.labels.as_ref()?.get(K::LABEL)?.as_str());
    let name = controller.or_else(label)?;
    Some(ObjectRef::new(name).within(meta.namespace.as_deref()?))
}

async fn reconcile<K: Reconciled>(cached: Arc<K>, context: Arc<Context>) -> Result<Action, Error> {
    let measure = context.metrics.reconciling(kind::<K>());
    let outcome = timeout(LONGEST, look::<K>(&cached, &context))
        .await
        .unwrap_or(Err(Error::Slow(LONGEST)));
    measure.done(outcome.is_ok());
    outcome
}

fn kind<K: Reconciled>() -> &'static str {
    // The kinds of this crate are literals.
    match K::kind(&()) {
        std::borrow::Cow::Borrowed(kind) => kind,
        std::borrow::Cow::Owned(_) => "",
    }
}

async fn look<K: Reconciled>(cached: &K, context: &Context) -> Result<Action, Error> {
    let (namespace, name) = (cached.namespace().unwrap_or_default(), cached.name_any());
    let Some(object) = context.get::<K>(&namespace, &name).await? else {
        return Ok(Action::await_change());
    };
    if object.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let uid = object.uid().unwrap_or_default();
    if let Some(wait) = context.rests(&uid) {
        return Ok(Action::requeue(wait));
    }
    match object.steps(context).await {
        Ok(None) => {
            context.succeeded(&uid);
            Ok(Action::requeue(K::AGAIN))
        }
        Ok(Some(failure)) => Err(failure),
        Err(failure) => {
            if context.tells_of(&object, &failure)
                && let Err(error) = tell(&object, &failure, context).await
            {
                tracing::warn!(%error, kind = kind::<K>(), name, namespace, "report a failure");
            }
            Err(failure)
        }
    }
}

/// Says of a resource that it could not be looked at; whatever else was said of it still holds.
async fn tell<K: Reconciled>(object: &K, failure: &Error, context: &Context) -> Result<(), Error> {
    let mut status = object.status().cloned().unwrap_or_default();
    let finding = Finding::no("Ready", failure.reason(), failure.to_string());
    let ready = conditions(
        &[finding],
        K::conditions(&status),
        object.meta().generation,
        Timestamp::now(),
    );
    let all = K::conditions_mut(&mut status);
    all.retain(|condition| condition.type_ != "Ready");
    all.splice(..0, ready);
    context.report(object, status).await
}

fn retry<K: Reconciled>(object: Arc<K>, error: &Error, context: Arc<Context>) -> Action {
    let uid = object.uid().unwrap_or_default();
    let failures = context.failed(&uid);
    let wait = pause(failures, error.after());
    if error.after().is_some() {
        context.rest(&uid, wait);
    }
    let (name, namespace) = (object.name_any(), object.namespace());
    if error.is_passing() && failures == 1 {
        tracing::info!(kind = kind::<K>(), name, namespace, ?wait, "{error}");
    } else {
        tracing::warn!(kind = kind::<K>(), name, namespace, ?wait, "{error}");
    }
    Action::requeue(wait)
}

/// How long to wait after so many failures in a row, if the API server wants to be left alone for `after`.
fn pause(failures: u32, after: Option<Duration>) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
    let own = FIRST.saturating_mul(doubled).min(LAST);
    own.max(after.unwrap_or_default().min(LAST * 5))
}

/// Metadata is enough of what only tells that something has changed.
pub type Meta<K> = PartialObjectMeta<K>;
