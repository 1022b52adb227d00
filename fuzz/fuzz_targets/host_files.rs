//! Files of the host and of the kernel, and those that the shim has left for its own successor. The first byte says which.

#![no_main]
// The node installer is a program without a library: these are its modules as they stand.
#![allow(dead_code)]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use sock_sandbox::cgroup::{Cgroup, Hierarchies, Location};
use sock_shim::{crash, role::zygote};
use toml_edit::{DocumentMut, Item, Value};

#[path = "../../node/src/containerd.rs"]
mod containerd;
#[path = "../../node/src/host.rs"]
mod host;
#[path = "../../node/src/payload.rs"]
mod payload;

fn cgroups(text: &str) {
    let (mounts, init) = text.split_once("\n\n").unwrap_or((text, ""));
    let Ok(hierarchies) = Hierarchies::parse(mounts, init) else {
        return;
    };
    let location = Location::parse("/pod/container").expect("a path");
    let cgroup = Cgroup::at(&hierarchies, &location);
    let directories = cgroup.version_1_directories();
    assert!(hierarchies.unified() == directories.is_empty());
    let points: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    for directory in directories
        .iter()
        .map(|(_, directory)| directory.as_path())
        .chain(cgroup.controller("memory"))
    {
        let descends = |below: &Path| {
            below.ends_with("pod/container")
                && below
                    .components()
                    .all(|c| matches!(c, Component::Normal(_)))
        };
        assert!(
            points
                .iter()
                .any(|point| directory.strip_prefix(point).is_ok_and(descends)),
            "{directory:?}"
        );
    }
}

fn imports(text: &str) -> Vec<String> {
    let document: DocumentMut = text.parse().expect("TOML");
    let list = document.get("imports").and_then(Item::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn configuration(text: &str) {
    let config = Path::new("/etc/containerd/config.toml");
    let _ = containerd::knows_runtime(text);
    let Ok(plan) = containerd::plan(config, Some(text)) else {
        return;
    };
    assert_eq!(plan.drop_in.file_name().expect("a name"), "99-sock.toml");
    assert!(containerd::knows_runtime(&plan.drop_in_text));
    let Some(main) = plan.main else {
        return;
    };
    let mut expected = imports(text);
    expected.push(plan.drop_in.to_str().expect("text").to_owned());
    assert_eq!(imports(&main), expected);
    let again = containerd::plan(config, Some(&main)).expect("still a configuration");
    assert_eq!((again.main, again.drop_in), (None, plan.drop_in.clone()));
    let without = containerd::without_import(config, &main).expect("still a configuration");
    let without = without.expect("the import");
    expected.pop();
    assert_eq!(imports(&without), expected);
    // Nothing else has changed: what is left after the imports are gone is the same on both sides.
    let rest = |text: &str| {
        let mut document: DocumentMut = text.parse().expect("TOML");
        document.remove("imports");
        document.to_string().split_whitespace().collect::<String>()
    };
    assert_eq!(rest(text), rest(&without));
}

fuzz_target!(|input: &[u8]| {
    let [kind, bytes @ ..] = input else {
        return;
    };
    let text = String::from_utf8_lossy(bytes);
    match kind {
        b'g' => cgroups(&text),
        b't' => configuration(&text),
        b's' => {
            let _ = zygote::started(bytes);
        }
        b'h' => assert!(zygote::recorded(&text).is_none_or(|(pid, _)| pid > 1)),
        b'j' => {
            let lines = bytes.iter().filter(|b| **b == b'\n').count();
            assert!(crash::parse(bytes).len() <= lines);
        }
        b'v' => {
            let _ = containerd::Version::parse(&text);
        }
        b'l' => {
            let _ = containerd::config_path(&text);
        }
        b'u' => assert!(containerd::unit(&text).is_none_or(|unit| unit.ends_with(".service"))),
        _ => {}
    }
});
