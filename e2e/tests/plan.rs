//! `kubectl sock plan` on a cluster: what it proposes is applied, and is what it said.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sock_e2e::{
    Client, MINUTE, Namespace, Node, built, in_namespace, kubectl_with, manifest, program, until,
    workers,
};

/// Says what was imported before the handler was.
const WHAT: &str = "
import sys
BEFORE = sorted({'numpy', 'pandas', 'scipy', 'joblib'} & set(sys.modules))

def handler(event, context):
    return BEFORE
";

/// What `kubectl sock` prints, and what it says beside that.
fn kubectl_sock(arguments: &[&str]) -> Result<(String, String)> {
    let done = program(&built("kubectl-sock", "sock-plan")?, arguments)?.output()?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.success(),
        "kubectl sock: {}: {said}",
        done.status
    );
    Ok((String::from_utf8_lossy(&done.stdout).into_owned(), said))
}

/// Two sets of which none has all packages of the other, and one without packages.
fn sets(node: &Node) -> Vec<Value> {
    let science: Vec<&str> = include_str!("../images/requirements-science.txt")
        .lines()
        .filter(|line| line.contains("=="))
        .collect();
    let of = |name: &str, packages: &[&str], imports: &[&str]| {
        let lines: Vec<&str> = science
            .iter()
            .filter(|line| {
                packages
                    .iter()
                    .any(|name| line.starts_with(&format!("{name}==")))
            })
            .copied()
            .collect();
        let set = manifest::package_set_of(name, &lines, imports);
        manifest::only_on(&node.name, set)
    };
    let pandas = ["numpy", "pandas", "python-dateutil", "tzdata"];
    vec![
        of(
            "tables",
            &[&pandas[..], &["joblib", "cloudpickle"]].concat(),
            &["pandas", "joblib"],
        ),
        of(
            "curves",
            &[&pandas[..], &["scipy"]].concat(),
            &["pandas", "scipy.stats"],
        ),
        manifest::only_on(&node.name, manifest::package_set("plain", &["json"])),
    ]
}

/// What each PackageSet extends.
fn extends(namespace: &Namespace) -> Result<BTreeMap<String, Option<String>>> {
    let list = namespace.get(&["packagesets"])?;
    let items = list["items"].as_array().context("a list")?.iter();
    items
        .map(|set| {
            let name = set["metadata"]["name"].as_str().context("a name")?;
            let above = set["spec"]["extends"]["name"].as_str();
            Ok((name.to_owned(), above.map(str::to_owned)))
        })
        .collect()
}

#[test]
fn a_plan_is_measured_applied_and_then_the_same() {
    in_namespace("plan", |namespace| {
        let mut nodes = workers()?.into_iter();
        let (node, other) = nodes.next().zip(nodes.next()).context("two nodes")?;
        let mut objects = sets(&node);
        for (name, set) in [("what", "tables"), ("curve", "curves"), ("none", "plain")] {
            objects.push(manifest::function(name, set, WHAT));
        }
        namespace.apply(&objects)?;
        for name in ["what", "curve", "none"] {
            namespace.wait_for(&format!("function/{name}"), "Ready", 4 * MINUTE)?;
        }
        let folder = tempfile::tempdir()?;
        let costs = folder.path().join("costs.json");
        let costs = costs.to_str().context("a path")?;
        let plan = |more: &[&str]| {
            let arguments = ["plan", "--namespace", &namespace.name, "--costs", costs];
            kubectl_sock(&[&arguments[..], more].concat()).map(|(printed, _)| printed)
        };

        let picture = plan(&[])?;
        ensure!(
            picture.contains("+ ") && picture.contains("shared-pandas-numpy"),
            "{picture}"
        );
        ensure!(
            picture.contains("~ ├─ curves") && picture.contains("~ └─ tables"),
            "{picture}"
        );
        let functions = namespace.get(&["functions"])?;
        ensure!(
            functions["items"]
                .as_array()
                .is_some_and(|all| all.len() == 3),
            "a Function that measured is left: {functions}"
        );

        kubectl_with(&["apply", "--filename=-"], &plan(&["--output", "yaml"])?)?;
        let shared = Some("shared-pandas-numpy".to_owned());
        let expected = BTreeMap::from([
            ("curves".to_owned(), shared.clone()),
            ("plain".to_owned(), None),
            ("shared-pandas-numpy".to_owned(), None),
            ("tables".to_owned(), shared),
        ]);
        let now = extends(namespace)?;
        ensure!(now == expected, "{now:?}");
        for set in expected.keys() {
            // Of the generation that was applied, not of the one before.
            until(&format!("{set} is warm as applied"), 3 * MINUTE, || {
                let set = namespace.get(&["packageset", set])?;
                let generation = &set["metadata"]["generation"];
                let conditions = set["status"]["conditions"].as_array();
                let ready = conditions.into_iter().flatten().any(|one| {
                    one["type"] == "Ready"
                        && one["status"] == "True"
                        && one["observedGeneration"] == *generation
                });
                Ok(
                    (ready && set["status"]["digest"] == set["status"]["readyDigest"])
                        .then_some(()),
                )
            })?;
        }
        let pools = namespace.pools_of("curves")?;
        let zygote = node.zygote_of(pools.first().context("a pool")?)?;
        ensure!(
            zygote.status("NSpid")?.split_whitespace().count() == 3,
            "it does not descend from another: {zygote:?}"
        );
        let mut client = Client::on(&other)?;
        for (function, imported) in [
            ("what", &["joblib", "numpy", "pandas"][..]),
            ("curve", &["numpy", "pandas", "scipy"]),
            ("none", &[]),
        ] {
            let pod = namespace.pod_of(function)?;
            let address = pod["status"]["podIP"].as_str().context("status.podIP")?;
            until(
                &format!("{function} runs on the new zygote"),
                2 * MINUTE,
                || {
                    let said = client.get(address, 8080, "/")?.json()?;
                    Ok((said == json!(imported)).then_some(()))
                },
            )?;
        }

        let again = plan(&[])?;
        ensure!(again.contains("Nothing is to be changed."), "{again}");
        let small = plan(&["--memory", "90Mi"])?;
        ensure!(
            small.contains("not ahead)") && small.contains("\nas it is "),
            "{small}"
        );
        let error = plan(&["--memory", "1Mi"])
            .err()
            .context("1 MiB is enough")?;
        ensure!(
            format!("{error:#}").contains("--memory: 1 MiB are not enough"),
            "{error:#}"
        );
        Ok(())
    });
}

#[test]
fn what_cannot_be_measured_is_said_and_the_rest_is_planned() {
    in_namespace("unplanned", |namespace| {
        let mut nodes = workers()?.into_iter();
        let node = nodes.next().context("a node")?;
        let plain = manifest::only_on(&node.name, manifest::package_set("plain", &["json"]));
        let hash = "0".repeat(64);
        let never = manifest::package_set_of(
            "never",
            &[&format!("no-such-package==1.0 --hash=sha256:{hash}")],
            &["nothing"],
        );
        namespace.apply(&[plain, manifest::only_on(&node.name, never)])?;
        namespace.wait_for("packageset/plain", "Ready", 2 * MINUTE)?;
        let (picture, said) = kubectl_sock(&["plan", "--namespace", &namespace.name])?;
        ensure!(picture.contains("  plain"), "{picture}");
        ensure!(
            said.starts_with(&format!("left out: {}/never: ", namespace.name))
                && said.contains("it is not ready"),
            "{said}"
        );
        let error = kubectl_sock(&["plan", "--namespace", "default"])
            .err()
            .context("a plan of nothing")?;
        ensure!(
            format!("{error:#}").contains("namespace default has no PackageSets"),
            "{error:#}"
        );
        Ok(())
    });
}
