//! The node cache: what PackageSets of a tenant have in common is there once, and what is not what was installed is installed anew.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sock_e2e::{Client, MINUTE, Namespace, Node, get, in_namespace, manifest, until, workers};

fn name(pod: &Value) -> Result<&str> {
    pod["metadata"]["name"].as_str().context("metadata.name")
}

fn installed(namespace: &Namespace, set: &str) -> Result<String> {
    let pool = namespace.pool_of(set)?;
    namespace.kubectl(&["logs", name(&pool)?, "--container=install"])
}

/// Where the packages of a PackageSet are on its nodes.
fn packages(namespace: &Namespace, set: &str) -> Result<String> {
    let pool = namespace.pool_of(set)?;
    let of = |key: &str| {
        let value = pool["metadata"]["annotations"][key].as_str();
        value.with_context(|| key.to_owned())
    };
    Ok(format!(
        "/var/lib/sock/cache/{}/{}/site-packages",
        of("sock.dev/tenant")?,
        of("sock.dev/lock")?
    ))
}

/// Of the files that are larger than a page: how many there are, and how many of them are another PackageSet's as well.
fn shared(node: &Node, from: &str, with: &str) -> Result<(u32, u32)> {
    let script = r#"cd "$1" && find . -type f -size +4096c | while read -r file; do
        if [ "$file" -ef "$2/$file" ]; then echo same; else echo own; fi
    done | sort | uniq -c"#;
    let text = node.shell(script, &[from, with])?;
    let count = |word: &str| -> u32 {
        let line = text.lines().find_map(|line| line.trim().strip_suffix(word));
        line.and_then(|number| number.trim().parse().ok())
            .unwrap_or(0)
    };
    let (same, own) = (count("same"), count("own"));
    Ok((same + own, same))
}

#[test]
fn what_package_sets_have_in_common_is_there_once() {
    in_namespace("cache", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let set = |name: &str, packages: &[&str]| {
            let set = manifest::package_set_of(name, &manifest::requirements(packages), &["numpy"]);
            manifest::only_on(&node.name, set)
        };
        // Two that want the same at the same time, and one that wants more.
        namespace.apply(&[set("one", &["numpy"]), set("same", &["numpy"])])?;
        namespace.apply(&[set("more", &["numpy", "tzdata"])])?;
        for name in ["one", "same", "more"] {
            namespace.wait_for(&format!("packageset/{name}"), "Ready", 3 * MINUTE)?;
        }
        let one = packages(namespace, "one")?;
        ensure!(one == packages(namespace, "same")?);
        let uv = "Installed 1 package";
        let logs = [installed(namespace, "one")?, installed(namespace, "same")?];
        let times = logs.iter().filter(|log| log.contains(uv)).count();
        ensure!(times == 1, "installed {times} times: {logs:?}");
        let more = packages(namespace, "more")?;
        let (files, same) = shared(&node, &one, &more)?;
        ensure!(files > 100 && same * 100 > files * 98, "{same} of {files}");
        Ok(())
    });
}

#[test]
fn an_entry_that_was_altered_is_installed_anew() {
    in_namespace("altered", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (other, node) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let set =
            manifest::package_set_of("numbers", &manifest::requirements(&["numpy"]), &["numpy"]);
        let set = manifest::only_on(&node.name, set);
        let code = "import numpy\n\ndef handler(event, context):\n    return {'poisoned': hasattr(numpy, 'POISON'), 'sum': int(numpy.arange(4).sum())}\n";
        namespace.serve("sums", &[set, manifest::function("sums", "numbers", code)])?;
        let before = namespace.pool_of("numbers")?;
        let packages = packages(namespace, "numbers")?;
        let script = r#"cd "$1" && sha256sum numpy/__init__.py && rm -f numpy/__pycache__/__init__.*.pyc && echo 'POISON = 1' >>numpy/__init__.py"#;
        let sum = node.shell(script, &[&packages])?;
        namespace.kubectl(&["delete", "pod", name(&before)?])?;
        let now = until("another pool is ready", 3 * MINUTE, || {
            let Ok(now) = namespace.pool_of("numbers") else {
                return Ok(None);
            };
            let is_ready = now["status"]["containerStatuses"][0]["ready"] == true;
            Ok((is_ready && name(&now)? != name(&before)?).then_some(now))
        })?;
        let log = namespace.kubectl(&["logs", name(&now)?, "--container=install"])?;
        ensure!(
            log.contains("installing anew") && log.contains("numpy/__"),
            "{log}"
        );
        ensure!(node.shell(r#"cd "$1" && sha256sum numpy/__init__.py"#, &[&packages])? == sum);
        let zygote = node.zygote_of(&now)?;
        let seen =
            r#"grep -c POISON "/proc/$1/root/opt/sock/site-packages/numpy/__init__.py" || true"#;
        ensure!(node.shell(seen, &[&zygote.pid.to_string()])?.trim() == "0");
        let pod = namespace.pod_of("sums")?;
        let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
        let said = Client::on(&other)?.get(address, 8080, "/")?.json()?;
        ensure!(said["sum"] == 6, "{said}");
        // It was there before, and has what was put aside.
        let there = "ls /opt/sock/site-packages/numpy/__init__.py";
        namespace.kubectl(&["exec", name(&pod)?, "--", "sh", "-c", there])?;
        Ok(())
    });
}

#[test]
fn what_the_cache_cannot_take_is_no_success() {
    in_namespace("untaken", |namespace| {
        let node = workers()?.into_iter().next().context("a node")?;
        let own = get(&["namespace", &namespace.name])?;
        let uid = own["metadata"]["uid"].as_str().context("metadata.uid")?;
        let hinder =
            r#"mkdir -p -m 711 "/var/lib/sock/cache/$1" && touch "/var/lib/sock/cache/$1/.files""#;
        node.shell(hinder, &[uid])?;
        let set =
            manifest::package_set_of("numbers", &manifest::requirements(&["numpy"]), &["numpy"]);
        namespace.apply(&[manifest::only_on(&node.name, set)])?;
        until("the PackageSet says why", 2 * MINUTE, || {
            let message =
                namespace.message_of("packageset/numbers", "Installed", "False", MINUTE)?;
            Ok(message
                .contains("not taken into the node cache")
                .then_some(()))
        })?;
        node.shell(r#"rm "/var/lib/sock/cache/$1/.files""#, &[uid])?;
        namespace.wait_for("packageset/numbers", "Ready", 3 * MINUTE)
    });
}
