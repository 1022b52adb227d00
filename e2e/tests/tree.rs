//! PackageSets that extend each other: zygotes forked from zygotes, and ancestors that stand in for them.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{Client, MINUTE, Namespace, Node, Process, in_namespace, manifest, until, workers};

/// Says what was imported before the handler was, and whether a zygote forked the process: PID 1 is a leaf's own.
const WHAT: &str = "
import os
import sys
import time
BEFORE = [name for name in ('numpy', 'pandas', 'scipy') if name in sys.modules]
import pandas

def handler(event, context):
    time.sleep(float(event['query'].get('seconds', 0)))
    return {'before': BEFORE, 'forked': os.getpid() == 1, 'sum': int(pandas.Series([1, 2, 3]).sum())}
";

/// Three PackageSets on a node, each with a package more than the one before, which it extends.
fn line(node: &Node) -> Vec<Value> {
    let set = |name: &str, packages: &[&str], imports: &[&str], parent: Option<&str>| {
        let set = manifest::package_set_of(name, &manifest::requirements(packages), imports);
        let mut set = manifest::only_on(&node.name, set);
        if let Some(parent) = parent {
            set["spec"]["extends"] = json!({"name": parent});
        }
        set
    };
    let pandas = ["numpy", "pandas", "python-dateutil", "tzdata"];
    let mut scipy = pandas.to_vec();
    scipy.push("scipy");
    vec![
        set("numpy", &["numpy"], &["numpy"], None),
        set("pandas", &pandas, &["pandas"], Some("numpy")),
        set("scipy", &scipy, &["scipy.stats"], Some("pandas")),
    ]
}

fn nodes() -> Result<(Node, Node)> {
    let mut nodes = workers()?.into_iter();
    nodes.next().zip(nodes.next()).context("two nodes")
}

/// Of the Function's only pod.
fn address(namespace: &Namespace) -> Result<String> {
    let pod = namespace.pod_of("what")?;
    let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
    Ok(address.to_owned())
}

fn zygote(namespace: &Namespace, node: &Node, set: &str) -> Result<Process> {
    node.zygote_of(&namespace.pool_of(set)?)
}

/// In KiB: all that a process sees, and what it shares with nobody.
fn memory(node: &Node, process: &Process) -> Result<(u64, u64)> {
    let script = r#"awk '$1 == "Rss:" { all = $2 } $1 ~ /^Private_/ { own += $2 } END { print all, own }' "/proc/$1/smaps_rollup""#;
    let text = node.shell(script, &[&process.pid.to_string()])?;
    let (all, own) = text.trim().split_once(' ').context("two numbers")?;
    Ok((all.parse()?, own.parse()?))
}

fn depth(process: &Process) -> Result<usize> {
    Ok(process.status("NSpid")?.split_whitespace().count())
}

#[test]
fn zygotes_descend_from_each_other_and_share_what_they_have() {
    in_namespace("tree", |namespace| {
        let (node, other) = nodes()?;
        let mut objects = line(&node);
        objects.push(manifest::function("what", "scipy", WHAT));
        namespace.serve("what", &objects)?;
        let mut client = Client::on(&other)?;
        let address = address(namespace)?;
        let said = client.get(&address, 8080, "/")?.json()?;
        ensure!(
            said == json!({"before": ["numpy", "pandas", "scipy"], "forked": true, "sum": 6}),
            "{said}"
        );
        let zygotes = ["numpy", "pandas", "scipy"]
            .map(|set| zygote(namespace, &node, set))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        for pair in zygotes.windows(2) {
            ensure!(
                depth(&pair[1])? == depth(&pair[0])? + 1,
                "its process namespace is not nested in its parent's: {pair:?}"
            );
            ensure!(pair[0].user_namespace != pair[1].user_namespace);
            ensure!(pair[0].network_namespace != pair[1].network_namespace);
            ensure!(pair[0].mount_namespace != pair[1].mount_namespace);
            // CAP_SYS_ADMIN and CAP_SYS_CHROOT over namespaces of its own, and nothing that it could get besides.
            ensure!(pair[1].capabilities()? == 0x24_0000);
            ensure!(pair[1].status("CapBnd")?.trim_start_matches('0').is_empty());
        }
        let (all, own) = memory(&node, &zygotes[1])?;
        ensure!(
            2 * own < all,
            "pandas shares too little with numpy: {own} of {all} KiB are its own"
        );
        Ok(())
    });
}

#[test]
fn an_ancestor_stands_in_for_a_zygote_that_is_gone_and_nobody_notices_the_end_of_an_ancestor() {
    in_namespace("line", |namespace| {
        let (node, other) = nodes()?;
        let mut objects = line(&node);
        let fresh = json!({"reuse": "Never"});
        objects.push(manifest::with(
            manifest::function("what", "scipy", WHAT),
            &fresh,
        ));
        namespace.serve("what", &objects)?;
        let mut client = Client::on(&other)?;
        let address = address(namespace)?;
        let before = |client: &mut Client| -> Result<Vec<String>> {
            let said = client.get(&address, 8080, "/")?.json()?;
            ensure!(said["forked"] == json!(true), "{said}");
            Ok(serde_json::from_value(said["before"].clone())?)
        };
        ensure!(before(&mut client)?.len() == 3);
        client.load("steady", &address, 8080, "/")?;

        // The zygote of the Function's own packages: what it forks next comes from the nearest ancestor.
        let killed = zygote(namespace, &node, "scipy")?;
        node.shell(r#"kill -9 "$1""#, &[&killed.pid.to_string()])?;
        until("an ancestor stands in", MINUTE, || {
            Ok((before(&mut client)? == ["numpy", "pandas"]).then_some(()))
        })?;
        until("the zygote is there again", 2 * MINUTE, || {
            Ok((before(&mut client)?.len() == 3).then_some(()))
        })?;
        let anew = zygote(namespace, &node, "scipy")?;
        ensure!(anew.pid != killed.pid);
        let parent = zygote(namespace, &node, "pandas")?;
        ensure!(depth(&anew)? == depth(&parent)? + 1, "it descends again");

        // The root of all: the others live on, and are made anew below the new one, one after the other. What they have forked
        // goes on, though its zygote ends, and that one's parent has ended before.
        client.open("long", &address, 8080)?;
        client.send("long", "/?seconds=45")?;
        let root = zygote(namespace, &node, "numpy")?;
        node.shell(r#"kill -9 "$1""#, &[&root.pid.to_string()])?;
        ensure!(before(&mut client)?.len() == 3);
        until("all descend from the new root", 4 * MINUTE, || {
            let Ok(all) = ["numpy", "pandas", "scipy"]
                .map(|set| zygote(namespace, &node, set))
                .into_iter()
                .collect::<Result<Vec<_>>>()
            else {
                return Ok(None);
            };
            let is_new =
                all[0].pid != root.pid && all[1].pid != parent.pid && all[2].pid != anew.pid;
            let below =
                depth(&all[1])? == depth(&all[0])? + 1 && depth(&all[2])? == depth(&all[1])? + 1;
            Ok((is_new && below).then_some(()))
        })?;
        until("the Function is forked from all of it", MINUTE, || {
            Ok((before(&mut client)?.len() == 3).then_some(()))
        })?;
        let long = client.receive("long")?;
        ensure!(long.text()?.contains("scipy"), "{long:?}");

        // Taken away: what descends from it goes on, and says so.
        namespace.kubectl(&["delete", "packageset", "numpy"])?;
        let message = namespace.message_of("packageset/pandas", "ParentReady", "False", MINUTE)?;
        ensure!(message.contains("numpy does not exist"), "{message}");
        ensure!(before(&mut client)?.len() == 3);
        let counts = client.stop("steady")?;
        ensure!(
            counts.len() == 1 && counts.contains_key("200"),
            "requests were lost: {counts:?}"
        );
        Ok(())
    });
}
