//! The PackageSets and Functions of a cluster, measured there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use sock_crds::{Function, PackageSet, PackageSetSpec};
use sock_plan::proposal::{PLANNED, Planned, wished_imports};
use sock_plan::report::{Answer, Report};
use sock_plan::shelf::Wish;
use tokio::time::{Instant, sleep};

use crate::Plan;
use crate::costs::Costs;
use crate::given::{Given, LeftOut, MEASURE, extras, key, pinned, shown};
use crate::stop::{Interrupted, Stop};

/// Label of Functions that measure.
const MEASURES: &str = "sock.dev/measures";
/// Bytes of an answer.
const MOST_ANSWER: usize = 8 << 20;
/// Until a Function is ready that measures.
const READY: Duration = Duration::from_secs(180);
/// Until it has measured: each package in an interpreter of its own.
const MEASURED: Duration = Duration::from_secs(900);

/// Reads all PackageSets, and measures those that nobody has measured yet.
///
/// # Errors
/// The cluster does not answer, or refuses.
pub async fn gather(plan: &Plan, costs: &mut Costs, stop: &mut Stop) -> Result<Given> {
    let client = stop
        .unless(connect(plan))
        .await
        .context("no connection to a cluster")?;
    read(&client, plan, costs, stop).await
}

async fn connect(plan: &Plan) -> Result<Client> {
    let config = match &plan.context {
        None => Config::infer().await?,
        Some(context) => {
            let options = KubeConfigOptions {
                context: Some(context.clone()),
                ..KubeConfigOptions::default()
            };
            Config::from_custom_kubeconfig(Kubeconfig::read()?, &options).await?
        }
    };
    let mut config = config;
    config.read_timeout = Some(MEASURED);
    Ok(Client::try_from(config)?)
}

async fn read(client: &Client, plan: &Plan, costs: &mut Costs, stop: &mut Stop) -> Result<Given> {
    let default = plan
        .namespace
        .clone()
        .unwrap_or_else(|| client.default_namespace().to_owned());
    let (sets, functions): (Api<PackageSet>, Api<Function>) = if plan.all_namespaces {
        (Api::all(client.clone()), Api::all(client.clone()))
    } else {
        (
            Api::namespaced(client.clone(), &default),
            Api::namespaced(client.clone(), &default),
        )
    };
    let lists = async {
        let sets = sets
            .list(&ListParams::default())
            .await
            .context("PackageSets")?;
        let functions = functions
            .list(&ListParams::default())
            .await
            .context("Functions")?;
        Ok((sets.items, functions.items))
    };
    let (sets, functions) = stop.unless(lists).await?;
    let mut users: BTreeMap<(String, String), usize> = BTreeMap::new();
    for function in functions {
        if !function.labels().contains_key(MEASURES) {
            let namespace = function.namespace().unwrap_or_default();
            *users
                .entry((namespace, function.spec.package_set))
                .or_default() += 1;
        }
    }
    let mut given = Given {
        running: true,
        ..Given::default()
    };
    if sets.is_empty() {
        match plan.all_namespaces {
            true => bail!("the cluster has no PackageSets"),
            false => {
                bail!("namespace {default} has no PackageSets: give another with -n, or -A for all")
            }
        }
    }
    given.taken = sets
        .iter()
        .map(|set| (set.namespace().unwrap_or_default(), set.name_any()))
        .collect::<BTreeSet<_>>();
    let count = sets.len();
    for (number, set) in sets.into_iter().enumerate() {
        let (namespace, name) = (set.namespace().unwrap_or_default(), set.name_any());
        let functions = users
            .get(&(namespace.clone(), name.clone()))
            .copied()
            .unwrap_or_default();
        if functions == 0
            && set
                .labels()
                .get(PLANNED)
                .is_some_and(|value| value == "true")
        {
            given.planned.push(Planned {
                namespace,
                name,
                spec: set.spec,
            });
            continue;
        }
        let tell = || eprintln!("measuring {namespace}/{name} ({} of {count})", number + 1);
        match wish(client, &set, functions, costs, stop, &tell).await {
            Ok(wish) => given.wishes.push(wish),
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => given.left_out.push(LeftOut {
                extends: set.spec.extends.map(|extends| extends.name),
                why: shown(&format!("{error:#}")),
                namespace,
                name,
            }),
        }
    }
    Ok(given)
}

async fn wish(
    client: &Client,
    set: &PackageSet,
    functions: usize,
    costs: &mut Costs,
    stop: &mut Stop,
    tell: &dyn Fn(),
) -> Result<Wish> {
    let namespace = set.namespace().unwrap_or_default();
    let text = stop.unless(text(client, &namespace, &set.spec)).await?;
    let requirements = pinned(&text)?;
    let spec = PackageSetSpec {
        imports: wished_imports(set.annotations(), &set.spec),
        ..set.spec.clone()
    };
    let key = key(&namespace, &spec.image, &text, &spec.imports);
    let report = match costs.get(&key) {
        Some(report) => report.clone(),
        // Without imports nothing is imported ahead, and without packages nothing that is not the image's.
        None if spec.imports.is_empty() || requirements.is_empty() => Report::default(),
        None => {
            is_ready(set)?;
            tell();
            let asked = json!({"imports": spec.imports, "extras": extras(&requirements)});
            let report = measure(client, &namespace, set, &asked, stop).await?;
            costs.keep(key, report.clone())?;
            report
        }
    };
    let annotations = set.annotations().iter();
    Ok(Wish {
        name: set.name_any(),
        spec,
        labels: set.labels().clone(),
        annotations: annotations
            .filter(|(name, _)| *name != "kubectl.kubernetes.io/last-applied-configuration")
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        namespace,
        requirements,
        now: Some(set.spec.clone()),
        functions,
        report,
    })
}

async fn text(client: &Client, namespace: &str, spec: &PackageSetSpec) -> Result<String> {
    let Some(requirements) = &spec.requirements else {
        return Ok(String::new());
    };
    if let Some(lines) = &requirements.lines {
        return Ok(lines.join("\n"));
    }
    let Some(from) = &requirements.config_map_key_ref else {
        return Ok(String::new());
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = maps
        .get(&from.name)
        .await
        .with_context(|| format!("ConfigMap {}", from.name))?;
    let mut data = map.data.unwrap_or_default();
    data.remove(&from.key)
        .with_context(|| format!("ConfigMap {} has no key {}", from.name, from.key))
}

/// Whether its Functions would run on what its spec says.
fn is_ready(set: &PackageSet) -> Result<()> {
    let ready = set
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|one| one.type_ == "Ready");
    match ready {
        // Of what it was before its last change, another lock would be measured.
        Some(ready) if ready.observed_generation != set.metadata.generation => {
            bail!("it was changed just now: try again when it is ready")
        }
        Some(ready) if ready.status == "True" => {}
        Some(ready) => bail!("it is not ready: {}", ready.message),
        None => bail!("it is not ready: nothing has looked at it yet"),
    }
    Ok(())
}

/// By a Function that is there for a moment: its leaf starts interpreters of their own, with what the PackageSet installed,
/// where its Functions run and with no more rights than they have.
async fn measure(
    client: &Client,
    namespace: &str,
    set: &PackageSet,
    asked: &Value,
    stop: &mut Stop,
) -> Result<Report> {
    let functions: Api<Function> = Api::namespaced(client.clone(), namespace);
    let spec = serde_json::from_value(json!({
        "packageSet": set.name_any(), "handler": "app.handler", "source": {"inline": MEASURE},
        "timeoutSeconds": MEASURED.as_secs(), "reuse": "Never", "instances": 1,
        "resources": set.spec.resources,
    }))?;
    let function = Function {
        metadata: ObjectMeta {
            generate_name: Some("sock-plan-".to_owned()),
            labels: Some(BTreeMap::from([(MEASURES.to_owned(), "true".to_owned())])),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    };
    let made = functions.create(&PostParams::default(), &function).await;
    let name = made
        .context("a Function that measures cannot be made")?
        .name_any();
    let answer = stop
        .unless(ask(client, &functions, namespace, &name, asked))
        .await;
    if let Err(error) = functions.delete(&name, &DeleteParams::default()).await {
        eprintln!("Function {name} of namespace {namespace} is left, delete it: {error}");
    }
    answer?.report().map_err(anyhow::Error::msg)
}

async fn ask(
    client: &Client,
    functions: &Api<Function>,
    namespace: &str,
    name: &str,
    asked: &Value,
) -> Result<Answer> {
    let deadline = Instant::now() + READY;
    loop {
        let function = functions.get(name).await?;
        let conditions = function
            .status
            .map(|status| status.conditions)
            .unwrap_or_default();
        match conditions.iter().find(|one| one.type_ == "Ready") {
            Some(ready) if ready.status == "True" => break,
            ready if Instant::now() > deadline => {
                let why = ready.map_or("nothing has looked at it", |ready| ready.message.as_str());
                bail!("the Function that measures is not ready: {why}");
            }
            _ => sleep(Duration::from_millis(300)).await,
        }
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = pods
        .list(&ListParams::default().labels(&format!("sock.dev/function={name}")))
        .await?;
    let pod = listed
        .items
        .first()
        .context("a pod of the Function that measures")?
        .name_any();
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:8080/proxy/");
    let request = http::Request::post(path).header("Content-Type", "application/json");
    let request = request.body(Body::from(serde_json::to_vec(asked)?))?;
    let response = client
        .send(request)
        .await
        .context("the Function that measures")?;
    let status = response.status();
    // It is a tenant's code that answers.
    let body = Limited::new(response.into_body(), MOST_ANSWER)
        .collect()
        .await;
    let body = body
        .map_err(|error| anyhow!("the Function that measures: {error}"))?
        .to_bytes();
    let said = || String::from_utf8_lossy(&body);
    if !status.is_success() {
        bail!("the Function that measures: {status}: {}", said());
    }
    serde_json::from_slice(&body)
        .map_err(|_| anyhow!("the Function that measures says: {}", said()))
}
