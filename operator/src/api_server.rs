//! An API server in memory, for tests: as many of the real one's rules as the controllers and the election rely on.
//!
//! Resource versions and what they refuse, server-side apply with an owner of each field, generations, preconditions,
//! watches. A test acts as another client ([`Server::put`], [`Server::edit`], [`Server::remove`]), steps between a
//! read and a write ([`Server::before`]), refuses calls, leaves them without an answer, and closes, expires or holds
//! back watches.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use hyper::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

/// The namespace of whatever a test does not say otherwise of.
pub const NAMESPACE: &str = "shop";

/// UID of [`NAMESPACE`].
pub const TENANT: &str = "6f0b1f2e-0000-4000-8000-000000000001";

/// Plural of its kind, namespace, name.
type Key = (String, String, String);

/// Path of a field inside an object; lists are one field.
type Path = Vec<String>;

/// One call, as the server saw it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which client made it.
    pub from: String,
    /// As RBAC has it, but `apply` for a patch that applies.
    pub verb: &'static str,
    /// As in `deployments/hello`, or `functions/hello/status`.
    pub what: String,
}

/// What becomes of a call that a rule is made for.
enum Fate {
    /// It is answered by this status; seconds in the header `Retry-After`.
    Refused(u16, Value, Option<u64>),
    /// It is never answered.
    Lost,
    /// Something happens first, and then it is served.
    After(Box<dyn FnOnce(&Server) + Send>),
}

struct Rule {
    verb: &'static str,
    what: String,
    /// How often it still applies.
    times: usize,
    fate: Fate,
}

/// What happened to an object; neither for a bookmark.
struct Change {
    version: u64,
    plural: String,
    before: Option<Value>,
    after: Option<Value>,
}

#[derive(Default)]
struct Store {
    objects: BTreeMap<Key, Value>,
    /// Fields by their manager.
    managers: BTreeMap<Key, BTreeMap<String, BTreeSet<Path>>>,
    version: u64,
    uids: u64,
    history: Vec<Change>,
    /// Watches must begin at this version or later.
    oldest: u64,
    /// Watches of an earlier epoch are closed.
    epoch: u64,
    /// Plurals whose watches tell nothing for now.
    held: BTreeSet<&'static str>,
    /// Clients whose calls do not arrive for now.
    cut: BTreeSet<String>,
    calls: Vec<Call>,
    rules: Vec<Rule>,
    /// Calls being served, and the most there were at once.
    busy: (usize, usize),
}

/// The server; clones are the same one.
#[derive(Clone)]
pub struct Server {
    store: Arc<Mutex<Store>>,
    changed: watch::Sender<()>,
}

/// What a path and a query name.
struct Target {
    plural: String,
    namespace: String,
    name: String,
    subresource: String,
    query: BTreeMap<String, String>,
    metadata_only: bool,
}

impl Server {
    /// A server with the namespace [`NAMESPACE`].
    pub fn new() -> Self {
        let server = Self {
            store: Arc::default(),
            changed: watch::Sender::new(()),
        };
        server.put(json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE, "uid": TENANT },
        }));
        server
    }

    /// A client; `name` tells its calls from those of others.
    pub fn client(&self, name: &str) -> Client {
        let (server, name) = (self.clone(), name.to_owned());
        let service = tower::service_fn(move |request| {
            let (server, name) = (server.clone(), name.clone());
            async move { Ok::<_, Infallible>(server.serve(&name, request).await) }
        });
        Client::new(service, "default")
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    fn change<T>(&self, act: impl FnOnce(&mut Store) -> T) -> T {
        let outcome = act(&mut self.lock());
        self.changed.send_replace(());
        outcome
    }

    /// An object, if it is there.
    pub fn get(&self, plural: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&key(plural, name)).cloned()
    }

    /// The names of the objects of a kind.
    pub fn names(&self, plural: &str) -> Vec<String> {
        let store = self.lock();
        let names = store.objects.keys().filter(|key| key.0 == plural);
        names.map(|key| key.2.clone()).collect()
    }

    /// Another client makes an object, or writes it anew.
    pub fn put(&self, mut object: Value) {
        let plural = format!("{}s", object["kind"].as_str().unwrap().to_lowercase());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let key = key(&plural, &name);
        if !key.1.is_empty() {
            object["metadata"]["namespace"] = json!(NAMESPACE);
        }
        self.change(|store| store.update(key, |there| *there = object));
    }

    /// Another client changes an object that is there.
    pub fn edit(&self, plural: &str, name: &str, edit: impl FnOnce(&mut Value)) {
        let key = key(plural, name);
        assert!(self.lock().objects.contains_key(&key), "no {key:?}");
        self.change(|store| store.update(key, edit));
    }

    /// Another client deletes an object that is there.
    pub fn remove(&self, plural: &str, name: &str) {
        self.change(|store| store.remove(&key(plural, name)));
    }

    /// Calls of the next `times` are answered by this status, in the API server's words.
    pub fn refuse(&self, verb: &'static str, what: &str, times: usize, code: u16, message: &str) {
        self.rule(
            verb,
            what,
            times,
            Fate::Refused(code, status(code, message), None),
        );
    }

    /// The next `times` such calls are answered by 429, to be tried again after so many seconds.
    pub fn throttle(&self, verb: &'static str, what: &str, times: usize, seconds: u64) {
        let message = "Too many requests, please try again later.";
        let fate = Fate::Refused(429, json!(message), Some(seconds));
        self.rule(verb, what, times, fate);
    }

    /// The next such calls get no answer.
    pub fn lose(&self, verb: &'static str, what: &str, times: usize) {
        self.rule(verb, what, times, Fate::Lost);
    }

    /// Something happens just before the next such call is served.
    pub fn before(&self, verb: &'static str, what: &str, act: impl FnOnce(&Self) + Send + 'static) {
        self.rule(verb, what, 1, Fate::After(Box::new(act)));
    }

    fn rule(&self, verb: &'static str, what: &str, times: usize, fate: Fate) {
        self.lock().rules.push(Rule {
            verb,
            what: what.to_owned(),
            times,
            fate,
        });
    }

    /// Takes back every rule.
    pub fn relent(&self) {
        self.lock().rules.clear();
    }

    /// Closes all watches, as the real one does every few minutes.
    pub fn close_watches(&self) {
        self.change(|store| store.epoch += 1);
    }

    /// Forgets the past: a watch that begins before now gets 410 Gone.
    pub fn compact(&self) {
        self.change(|store| {
            store.history.clear();
            store.oldest = store.version;
        });
    }

    /// Tells all watches how far they are.
    pub fn bookmark(&self) {
        self.change(|store| {
            store.version += 1;
            let plurals: BTreeSet<String> = store.objects.keys().map(|key| key.0.clone()).collect();
            for plural in plurals {
                store.history.push(Change {
                    version: store.version,
                    plural,
                    before: None,
                    after: None,
                });
            }
        });
    }

    /// Watches of this kind tell nothing until they are let go: the caches of clients grow stale.
    pub fn hold(&self, plural: &'static str) {
        self.change(|store| store.held.insert(plural));
    }

    /// Watches of this kind go on.
    pub fn let_go(&self, plural: &'static str) {
        self.change(|store| store.held.remove(plural));
    }

    /// Calls of this client do not arrive, and its watches tell nothing.
    pub fn cut(&self, client: &str) {
        self.change(|store| store.cut.insert(client.to_owned()));
    }

    /// Whether calls of this client do not arrive.
    pub fn is_cut(&self, client: &str) -> bool {
        self.lock().cut.contains(client)
    }

    /// Calls of this client arrive again, those that it still waits for among them.
    pub fn mend(&self, client: &str) {
        self.change(|store| store.cut.remove(client));
    }

    /// What was called since the last look.
    pub fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    /// What was written since the last look, as in `apply deployments/hello`; not leases.
    pub fn writes(&self) -> Vec<String> {
        let writes = self.calls().into_iter().filter(Call::writes);
        writes
            .map(|call| format!("{} {}", call.verb, call.what))
            .collect()
    }

    /// The most calls that were served at once; watches do not count.
    pub fn most_busy(&self) -> usize {
        self.lock().busy.1
    }

    async fn arrives(&self, client: &str) {
        let mut changed = self.changed.subscribe();
        while self.lock().cut.contains(client) {
            changed.changed().await.unwrap();
        }
    }

    async fn serve(
        &self,
        client: &str,
        request: Request<Body>,
    ) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let (head, body) = request.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let header = |name| {
            head.headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
        };
        let target = Target::parse(
            head.uri.path(),
            head.uri.query().unwrap_or_default(),
            header(ACCEPT).contains("as=PartialObjectMetadata"),
        );
        let watches = target.query.get("watch").is_some_and(|it| it == "true");
        let verb = match (&head.method, target.name.is_empty()) {
            (&Method::GET, _) if watches => "watch",
            (&Method::GET, true) => "list",
            (&Method::GET, false) => "get",
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            (&Method::PATCH, _) if header(CONTENT_TYPE).contains("apply-patch") => "apply",
            (&Method::PATCH, _) => "patch",
            (&Method::DELETE, _) => "delete",
            (method, _) => panic!("{method} {}", head.uri),
        };
        self.arrives(client).await;
        let fate = {
            let mut store = self.lock();
            store.busy.0 += usize::from(!watches);
            store.busy.1 = store.busy.1.max(store.busy.0);
            store.calls.push(Call {
                from: client.to_owned(),
                verb,
                what: target.what(),
            });
            store.fate(verb, &target.what())
        };
        // Others get to call as well before this one is answered.
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        self.lock().busy.0 -= usize::from(!watches);
        match fate {
            Some(Fate::Refused(code, status, after)) => return answer(code, &status, after),
            Some(Fate::Lost) => std::future::pending().await,
            Some(Fate::After(act)) => act(self),
            None => {}
        }
        if watches {
            return Response::new(self.watch(client.to_owned(), target));
        }
        let outcome = self.change(|store| store.serve(verb, &target, body));
        // The answer may get lost as well.
        self.arrives(client).await;
        match outcome {
            Ok((code, object)) => answer(code, &object, None),
            Err(status) => answer(
                u16::try_from(status["code"].as_u64().unwrap()).unwrap(),
                &status,
                None,
            ),
        }
    }

    fn watch(&self, client: String, target: Target) -> UnsyncBoxBody<Bytes, Infallible> {
        let begin: u64 = target.query["resourceVersion"].parse().unwrap();
        let epoch = self.lock().epoch;
        let changed = self.changed.subscribe();
        let first = (self.clone(), changed, Some(begin));
        let (client, target) = (Arc::new(client), Arc::new(target));
        let lines = stream::unfold(first, move |(server, mut changed, position)| {
            let (client, target) = (Arc::clone(&client), Arc::clone(&target));
            async move {
                let mut position = position?;
                loop {
                    changed.mark_unchanged();
                    let step = server.lock().tell(&client, &target, epoch, position);
                    match step {
                        Tell::Close => return None,
                        Tell::Line(line, next) => {
                            let line = Bytes::from(format!("{line}\n"));
                            return Some((Ok(Frame::data(line)), (server, changed, next)));
                        }
                        Tell::Nothing(next) => {
                            position = next;
                            changed.changed().await.unwrap();
                        }
                    }
                }
            }
        });
        StreamBody::new(lines).boxed_unsync()
    }
}

/// What a watch has to say next, and from which version it goes on.
enum Tell {
    Line(Value, Option<u64>),
    Nothing(u64),
    Close,
}

impl Call {
    /// Whether it changes something other than a Lease.
    pub fn writes(&self) -> bool {
        !matches!(self.verb, "get" | "list" | "watch") && !self.what.starts_with("leases")
    }
}

impl Target {
    fn parse(path: &str, query: &str, metadata_only: bool) -> Self {
        let mut words = path.trim_start_matches('/').split('/');
        if words.next() == Some("apis") {
            words.next();
        }
        words.next();
        let words: Vec<&str> = words.collect();
        let (namespace, rest) = match words.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let word = |at: usize| rest.get(at).copied().unwrap_or_default().to_owned();
        let decode = |text: &str| {
            let text = text.replace("%3D", "=").replace("%2F", "/");
            text.replace("%21", "!")
        };
        Self {
            plural: word(0),
            namespace: namespace.to_owned(),
            name: word(1),
            subresource: word(2),
            query: query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .map(|(key, value)| (key.to_owned(), decode(value)))
                .collect(),
            metadata_only,
        }
    }

    fn what(&self) -> String {
        let words = [&self.plural, &self.name, &self.subresource];
        let words: Vec<&str> = words.into_iter().map(String::as_str).collect();
        words.join("/").trim_end_matches('/').to_owned()
    }

    fn key(&self, name: &str) -> Key {
        (self.plural.clone(), self.namespace.clone(), name.to_owned())
    }

    /// Whether an object is one of those that were asked for.
    fn selects(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let label =
            self.query
                .get("labelSelector")
                .is_none_or(|selector| match selector.split_once('=') {
                    Some((label, value)) => metadata["labels"][label] == value,
                    None => metadata["labels"].get(selector).is_some(),
                });
        let field = self.query.get("fieldSelector").is_none_or(|selector| {
            let Some((path, value)) = selector.split_once("!=") else {
                panic!("this server knows no field selector like {selector}");
            };
            object.pointer(&format!("/{}", path.replace('.', "/"))) != Some(&json!(value))
        });
        label && field && (self.namespace.is_empty() || metadata["namespace"] == *self.namespace)
    }

    /// An object as it was asked for.
    fn show(&self, object: &Value) -> Value {
        if self.metadata_only {
            json!({
                "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"],
            })
        } else {
            object.clone()
        }
    }
}

type Outcome = Result<(u16, Value), Value>;

impl Store {
    fn fate(&mut self, verb: &str, what: &str) -> Option<Fate> {
        let at = self.rules.iter().position(|rule| {
            let name = rule.what.strip_suffix('*');
            rule.verb == verb && name.map_or(rule.what == what, |name| what.starts_with(name))
        })?;
        let rule = &mut self.rules[at];
        rule.times -= 1;
        if rule.times == 0 {
            return Some(self.rules.remove(at).fate);
        }
        match &rule.fate {
            Fate::Refused(code, status, after) => {
                Some(Fate::Refused(*code, status.clone(), *after))
            }
            Fate::Lost => Some(Fate::Lost),
            Fate::After(_) => panic!("{verb} {what}: only once"),
        }
    }

    fn tell(&self, client: &str, target: &Target, epoch: u64, position: u64) -> Tell {
        if self.held.contains(target.plural.as_str()) || self.cut.contains(client) {
            return Tell::Nothing(position);
        }
        if epoch != self.epoch {
            return Tell::Close;
        }
        if position < self.oldest {
            let gone = status(410, "too old resource version");
            return Tell::Line(json!({ "type": "ERROR", "object": gone }), None);
        }
        let begin = self.history.partition_point(|it| it.version <= position);
        for change in &self.history[begin..] {
            if change.plural != target.plural {
                continue;
            }
            let selects = |object: &&Value| target.selects(object);
            let (word, object) = match (
                change.before.as_ref().filter(selects),
                change.after.as_ref().filter(selects),
            ) {
                (None, Some(after)) => ("ADDED", target.show(after)),
                (Some(_), Some(after)) => ("MODIFIED", target.show(after)),
                (Some(before), None) => {
                    let mut last = before.clone();
                    last["metadata"]["resourceVersion"] = json!(change.version.to_string());
                    ("DELETED", target.show(&last))
                }
                (None, None) if change.before.is_none() && change.after.is_none() => (
                    "BOOKMARK",
                    json!({ "apiVersion": "v1", "kind": "Bookmark",
                            "metadata": { "resourceVersion": change.version.to_string() } }),
                ),
                (None, None) => continue,
            };
            let line = json!({ "type": word, "object": object });
            return Tell::Line(line, Some(change.version));
        }
        Tell::Nothing(self.version)
    }

    fn serve(&mut self, verb: &str, target: &Target, body: Value) -> Outcome {
        let key = target.key(&target.name);
        let missing = || status(404, &format!("{} not found", target.what()));
        match verb {
            "list" => {
                let items = self
                    .objects
                    .iter()
                    .filter(|(key, object)| key.0 == target.plural && target.selects(object));
                let items: Vec<Value> = items.map(|(_, object)| target.show(object)).collect();
                Ok((
                    200,
                    json!({ "apiVersion": "v1", "kind": "List", "items": items,
                            "metadata": { "resourceVersion": self.version.to_string() } }),
                ))
            }
            "get" => {
                let object = self.objects.get(&key).ok_or_else(missing)?;
                Ok((200, target.show(object)))
            }
            "create" => {
                let key = target.key(body["metadata"]["name"].as_str().unwrap());
                self.has_room(&key)?;
                if self.objects.contains_key(&key) {
                    let mut taken = status(409, &format!("{} already exists", key.2));
                    taken["reason"] = json!("AlreadyExists");
                    return Err(taken);
                }
                self.update(key.clone(), |object| *object = body);
                Ok((201, self.objects[&key].clone()))
            }
            "update" | "patch" => {
                let there = self.objects.get(&key).ok_or_else(missing)?;
                is_met(there, &body["metadata"])?;
                self.update(key.clone(), |object| {
                    if verb == "update" {
                        *object = body;
                    } else {
                        merge(object, body);
                    }
                });
                Ok((200, self.objects[&key].clone()))
            }
            "apply" => {
                self.apply(key.clone(), target, &body)?;
                Ok((200, self.objects[&key].clone()))
            }
            "delete" => {
                let there = self.objects.get(&key).ok_or_else(missing)?;
                is_met(there, &body["preconditions"])?;
                self.remove(&key);
                let done = json!({ "apiVersion": "v1", "kind": "Status", "status": "Success" });
                Ok((200, done))
            }
            _ => unreachable!("{verb}"),
        }
    }

    /// Whether an object may be made in its namespace.
    fn has_room(&self, key: &Key) -> Result<(), Value> {
        let namespace = ("namespaces".to_owned(), String::new(), key.1.clone());
        match self.objects.get(&namespace) {
            Some(there) if there["metadata"]["deletionTimestamp"].is_null() => Ok(()),
            Some(_) => {
                let message = format!(
                    "{} \"{}\" is forbidden: unable to create new content in namespace {} because it is being terminated",
                    key.0, key.2, key.1
                );
                let mut refusal = status(403, &message);
                refusal["details"] = json!({ "causes": [{ "reason": "NamespaceTerminating" }] });
                Err(refusal)
            }
            // Leases of the operator's own namespace, which no test looks at.
            None if key.0 == "leases" => Ok(()),
            None => Err(status(404, &format!("namespaces \"{}\" not found", key.1))),
        }
    }

    /// Server-side apply: fields that the manager no longer applies go, unless somebody else has them too.
    fn apply(&mut self, key: Key, target: &Target, body: &Value) -> Result<(), Value> {
        let part = target.subresource.as_str();
        let there = self.objects.get(&key);
        match there {
            Some(there) => is_met_by_apply(there, &body["metadata"])?,
            None if !part.is_empty() => {
                return Err(status(404, &format!("{} not found", target.what())));
            }
            None => {
                if let Some(uid) = body["metadata"]["uid"].as_str() {
                    let message =
                        format!("uid mismatch: {uid} was specified, and no object was found");
                    return Err(status(409, &message));
                }
                self.has_room(&key)?;
            }
        }
        let mut object = there.cloned().unwrap_or_else(|| {
            json!({ "apiVersion": body["apiVersion"], "kind": body["kind"],
                    "metadata": { "name": key.2, "namespace": key.1 } })
        });
        let mut wanted = BTreeMap::new();
        leaves(&managed(body, part), &mut Vec::new(), &mut wanted);
        let manager = format!("{} {part}", target.query["fieldManager"]);
        let force = target.query.get("force").is_some_and(|it| it == "true");
        let mut managers = self.managers.get(&key).cloned().unwrap_or_default();
        for (other, fields) in managers.iter_mut().filter(|(name, _)| **name != manager) {
            let changed = |path: &Path| {
                wanted
                    .get(path)
                    .is_some_and(|value| at(&object, path) != Some(value))
            };
            if let Some(path) = fields.iter().find(|path| changed(path))
                && !force
            {
                let message = format!(
                    "Apply failed with 1 conflict: conflict with \"{other}\": .{}",
                    path.join(".")
                );
                return Err(status(409, &message));
            }
            fields.retain(|path| !changed(path));
        }
        let former = managers.remove(&manager).unwrap_or_default();
        for path in former.iter().filter(|path| !wanted.contains_key(*path)) {
            if !managers.values().any(|fields| fields.contains(path)) {
                unset(&mut object, path);
            }
        }
        for (path, value) in &wanted {
            set(&mut object, path, value.clone());
        }
        managers.insert(manager, wanted.into_keys().collect());
        self.commit(key, object, managers);
        Ok(())
    }

    /// A write that is no apply: whoever makes it owns what it changes.
    fn update(&mut self, key: Key, edit: impl FnOnce(&mut Value)) {
        let before = self.objects.get(&key).cloned().unwrap_or_default();
        let mut object = before.clone();
        edit(&mut object);
        let fields = |object: &Value| {
            let mut fields = BTreeMap::new();
            for part in ["", "status"] {
                leaves(&managed(object, part), &mut Vec::new(), &mut fields);
            }
            fields
        };
        let (old, new) = (fields(&before), fields(&object));
        let is_same = |path: &Path| old.get(path) == new.get(path);
        let mut managers = self.managers.get(&key).cloned().unwrap_or_default();
        for fields in managers.values_mut() {
            fields.retain(is_same);
        }
        let changed = new.keys().filter(|path| !is_same(path)).cloned();
        managers
            .entry("somebody ".to_owned())
            .or_default()
            .extend(changed);
        self.commit(key, object, managers);
    }

    fn remove(&mut self, key: &Key) {
        let before = self.objects.remove(key).unwrap();
        self.managers.remove(key);
        self.version += 1;
        self.history.push(Change {
            version: self.version,
            plural: key.0.clone(),
            before: Some(before),
            after: None,
        });
    }

    /// Keeps an object, if it is another than before.
    fn commit(&mut self, key: Key, mut object: Value, managers: BTreeMap<String, BTreeSet<Path>>) {
        let before = self.objects.get(&key).cloned();
        let entries = managers.iter().filter(|(_, fields)| !fields.is_empty());
        let entries: Vec<Value> = entries
            .map(|(manager, fields)| {
                let (name, part) = manager.split_once(' ').unwrap();
                let mut tree = json!({});
                for path in fields {
                    let path: Path = path.iter().map(|word| format!("f:{word}")).collect();
                    set(&mut tree, &path, json!({}));
                }
                let operation = if name == "somebody" { "Update" } else { "Apply" };
                let mut entry = json!({
                    "manager": name, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": tree,
                });
                if !part.is_empty() {
                    entry["subresource"] = json!(part);
                }
                entry
            })
            .collect();
        let old = before.clone().unwrap_or_default();
        object["metadata"]["managedFields"] = json!(entries);
        object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
        if object["metadata"]["uid"].is_null() {
            self.uids += 1;
            object["metadata"]["uid"] = json!(format!("u-{}", self.uids));
        }
        // Those of the core group have none.
        if !matches!(key.0.as_str(), "services" | "configmaps" | "pods") {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(0);
            let changed = object["spec"] != old["spec"] || before.is_none();
            object["metadata"]["generation"] = json!(generation + i64::from(changed));
        }
        if before.as_ref() == Some(&object) {
            return;
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.managers.insert(key.clone(), managers);
        self.objects.insert(key.clone(), object.clone());
        self.history.push(Change {
            version: self.version,
            plural: key.0,
            before,
            after: Some(object),
        });
    }
}

/// The part of an object whose fields have managers: its status, or all but that.
fn managed(object: &Value, part: &str) -> Value {
    if !part.is_empty() {
        return json!({ part: object[part] });
    }
    let mut rest = object.clone();
    let Some(fields) = rest.as_object_mut() else {
        return Value::Null;
    };
    for key in ["apiVersion", "kind", "status"] {
        fields.remove(key);
    }
    if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.retain(|key, _| {
            matches!(
                key.as_str(),
                "labels" | "annotations" | "ownerReferences" | "finalizers"
            )
        });
    }
    rest
}

fn leaves(value: &Value, path: &mut Path, found: &mut BTreeMap<Path, Value>) {
    match value {
        Value::Null => {}
        // A selector is one field: the API server says so in its schemas.
        Value::Object(fields)
            if !fields.is_empty() && path.last().is_none_or(|it| it != "selector") =>
        {
            for (key, field) in fields {
                path.push(key.clone());
                leaves(field, path, found);
                path.pop();
            }
        }
        leaf => {
            found.insert(path.clone(), leaf.clone());
        }
    }
}

fn at<'a>(value: &'a Value, path: &Path) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

fn set(value: &mut Value, path: &[String], leaf: Value) {
    let Some((key, rest)) = path.split_first() else {
        *value = leaf;
        return;
    };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    set(&mut value[key.as_str()], rest, leaf);
}

fn unset(value: &mut Value, path: &[String]) {
    let Some((key, rest)) = path.split_first() else {
        return;
    };
    if let Some(fields) = value.as_object_mut() {
        if rest.is_empty() {
            fields.remove(key);
        } else if let Some(field) = fields.get_mut(key) {
            unset(field, rest);
        }
    }
}

/// RFC 7396.
fn merge(value: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *value = patch;
        return;
    };
    for (key, field) in patch {
        if field.is_null() {
            value.as_object_mut().unwrap().remove(&key);
        } else {
            merge(&mut value[key.as_str()], field);
        }
    }
}

/// Whether an object is the one, and in the version, that a call expects.
fn is_met(there: &Value, expected: &Value) -> Result<(), Value> {
    for key in ["resourceVersion", "uid"] {
        if let Some(expected) = expected[key].as_str()
            && there["metadata"][key] != expected
        {
            return Err(status(
                409,
                &format!("the object has been modified: {key} is not {expected}"),
            ));
        }
    }
    Ok(())
}

/// The same for an apply, which takes another UID for an attempt to change it.
fn is_met_by_apply(there: &Value, expected: &Value) -> Result<(), Value> {
    is_met(
        there,
        &json!({ "resourceVersion": expected["resourceVersion"] }),
    )?;
    is_met(there, &json!({ "uid": expected["uid"] })).map_err(|_| {
        let message = "metadata.uid: Invalid value: field is immutable";
        status(422, message)
    })
}

fn key(plural: &str, name: &str) -> Key {
    let namespace = if plural == "namespaces" {
        ""
    } else {
        NAMESPACE
    };
    (plural.to_owned(), namespace.to_owned(), name.to_owned())
}

fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message,
    })
}

fn answer(
    code: u16,
    body: &Value,
    after: Option<u64>,
) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    // Throttled calls are answered by plain text.
    let text = body
        .as_str()
        .map_or_else(|| body.to_string(), str::to_owned);
    let mut response = Response::builder().status(code);
    if let Some(after) = after {
        response = response.header(RETRY_AFTER, after);
    }
    response
        .body(Full::new(Bytes::from(text)).boxed_unsync())
        .unwrap()
}
