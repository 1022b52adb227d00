//! Twenty Functions under mixed load for `SOAK_SECONDS` (300), every answer checked, and then an account of what
//! shims, zygotes and nodes have kept. It looks at whole nodes, so nothing else may run beside it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, in_namespace, inventory_of_quiet, manifest, until,
    until_as_before, workers,
};

const FUNCTIONS: usize = 20;
/// Until tables, pools of memory and caches have the size that this load needs.
const WARM_UP: Duration = Duration::from_secs(30);
/// A shim's tables of connections and leaves grow with the most that there were at once, and stay.
const SHIM_KIB: u64 = 1024;
/// A zygote only forks; what it allocates for that is freed, in pieces that its allocator may keep.
const ZYGOTE_KIB: u64 = 2048;

fn code(index: usize, science: bool) -> String {
    let sum = if science {
        "int(numpy.frombuffer(body, dtype=numpy.uint8).sum(dtype=numpy.int64))"
    } else {
        "sum(body)"
    };
    let import = if science { "import numpy\n" } else { "" };
    let print = if index % 4 == 1 {
        "    print('request', event['query']['n'], 'x' * 200)\n"
    } else {
        ""
    };
    format!(
        "{import}
def handler(event, context):
{print}    if 'fail' in event['query']:
        raise ValueError('asked for')
    body = event['body']
    return {{'n': int(event['query']['n']), 'sum': {sum}, 'size': len(body)}}
"
    )
}

/// `kind node name-of-process-or-sandbox: kilobytes of its own, descriptors` of every shim of sock and every zygote.
fn kept(nodes: &[Node]) -> Result<BTreeMap<String, (u64, u64)>> {
    const SCRIPT: &str = r#"
for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    */containerd-shim-sock-v1\ *) kind=shim ;;
    python3\ */opt/sock/python/zygote.py*) kind=zygote ;;
    *) continue ;;
  esac
  own=$(awk '$1 == "Private_Dirty:" { print $2 }' "$each/smaps_rollup" 2>/dev/null)
  [ -n "$own" ] && echo "$kind ${each#/proc/} $own $(ls "$each/fd" | wc -l)"
done
"#;
    let mut all = BTreeMap::new();
    for node in nodes {
        for line in node.shell(SCRIPT, &[])?.lines() {
            let parts: Vec<&str> = line.split(' ').collect();
            let [kind, pid, own, descriptors] = parts[..] else {
                continue;
            };
            all.insert(
                format!("{kind} {} {pid}", node.name),
                (own.parse()?, descriptors.parse()?),
            );
        }
    }
    Ok(all)
}

fn until_idle(namespace: &Namespace) -> Result<()> {
    let pods = namespace.pods("sock.dev/function")?;
    until("no leaf is there", 2 * MINUTE, || {
        for pod in &pods {
            if !Node::of(pod)?.interpreters_of(pod)?.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
}

fn load(namespace: &Namespace, clients: &mut [Client], time: Duration) -> Result<u64> {
    let name = |index: usize| format!("f{index}");
    let count = clients.len();
    for index in 0..FUNCTIONS {
        let host = format!("{}.{}.svc.cluster.local", name(index), namespace.name);
        let how = json!({
            "kept": index % 3 == 0,
            "size": if index % 5 == 2 { 300_000 } else { 20 },
            "fail_every": if index % 4 == 3 { 10 } else { 0 },
        });
        clients[index % count].soak(&name(index), &host, 80, &how)?;
    }
    std::thread::sleep(time);
    let mut right = 0;
    for index in 0..FUNCTIONS {
        let counts = clients[index % count].stop(&name(index))?;
        let wrong: Vec<_> = counts
            .iter()
            .filter(|(answer, _)| *answer != "right")
            .collect();
        ensure!(wrong.is_empty(), "Function {}: {wrong:?}", name(index));
        let served = counts.get("right").copied().unwrap_or_default();
        ensure!(served > 0, "Function {} was not called", name(index));
        right += served;
    }
    Ok(right)
}

#[test]
fn many_functions_under_load_keep_nothing() -> Result<()> {
    let seconds = std::env::var("SOAK_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(300));
    let nodes = workers()?;
    let before = inventory_of_quiet(&nodes)?;
    in_namespace("soak", |namespace| {
        let mut objects: Vec<Value> = vec![
            manifest::package_set("plain", &["json"]),
            manifest::numpy("science"),
        ];
        for index in 0..FUNCTIONS {
            let numpy = index % 5 == 4;
            let set = if numpy { "science" } else { "plain" };
            let function = manifest::function(&format!("f{index}"), set, &code(index, numpy));
            let reuse = if index % 2 == 0 { "Always" } else { "Never" };
            let idle = json!({"freezeAfterMs": 300, "endAfterMs": 2000});
            objects.push(manifest::with(
                function,
                &json!({"reuse": reuse, "idle": idle}),
            ));
        }
        namespace.apply(&objects)?;
        for index in 0..FUNCTIONS {
            namespace.wait_for(&format!("function/f{index}"), "Ready", 5 * MINUTE)?;
            namespace.routed(&format!("f{index}"), &nodes[index % nodes.len()])?;
        }
        let mut clients = nodes.iter().map(Client::on).collect::<Result<Vec<_>>>()?;
        load(namespace, &mut clients, WARM_UP)?;
        until_idle(namespace)?;
        let first = kept(&nodes)?;
        ensure!(
            first
                .keys()
                .filter(|name| name.starts_with("shim "))
                .count()
                >= FUNCTIONS
                && first.keys().any(|name| name.starts_with("zygote ")),
            "the account is blind: {first:?}"
        );
        let right = load(namespace, &mut clients, time)?;
        until_idle(namespace)?;
        let last = kept(&nodes)?;
        eprintln!(
            "{right} requests in {} s, all answered rightly",
            time.as_secs()
        );
        let began_since = last
            .keys()
            .find(|name| name.starts_with("shim ") && !first.contains_key(*name));
        ensure!(began_since.is_none(), "a shim began anew: {began_since:?}");
        let pods = namespace.get(&["pods"])?;
        for pod in pods["items"].as_array().context("pods")? {
            for container in pod["status"]["containerStatuses"]
                .as_array()
                .into_iter()
                .flatten()
            {
                ensure!(
                    container["restartCount"] == 0,
                    "a zygote or a Function began anew: {pod}"
                );
            }
        }
        let mut most: BTreeMap<&str, i64> = BTreeMap::new();
        for (name, (memory, descriptors)) in &last {
            // A spare that was forked since is none of those that were there.
            let Some((memory_before, descriptors_before)) = first.get(name) else {
                continue;
            };
            let kind = name.split(' ').next().unwrap_or_default();
            let bound = if kind == "shim" { SHIM_KIB } else { ZYGOTE_KIB };
            ensure!(
                *memory <= memory_before + bound,
                "{name} grew from {memory_before} KiB to {memory} KiB"
            );
            ensure!(
                descriptors <= descriptors_before,
                "{name} had {descriptors_before} descriptors and has {descriptors}"
            );
            let grown = i64::try_from(*memory)? - i64::try_from(*memory_before)?;
            let most = most.entry(kind).or_insert(grown);
            *most = grown.max(*most);
        }
        eprintln!("most growth in KiB: {most:?}");
        Ok(())
    });
    until_as_before(&nodes, &before).context("after the soak")
}
