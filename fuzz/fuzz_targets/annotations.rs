//! The annotations of a pod: they become paths, limits, and what a zygote is told. A line each, `name=value` without the prefix.

#![no_main]

use std::collections::HashMap;
use std::path::{Component, Path};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sock_shim::activation::{Ancestor, FunctionConfig, ZygoteName};
use sock_shim::role::PoolConfig;
use sock_zygote_protocol::{MAX_MESSAGE, ToZygote};

const ROOT: &str = "/run/sock/pools";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn check_name(name: &ZygoteName) {
    let pools = name.pools(Path::new(ROOT));
    let below: Vec<_> = pools
        .strip_prefix(ROOT)
        .expect("below the root")
        .components()
        .collect();
    assert!(below.len() == 2 && below.iter().all(|c| matches!(c, Component::Normal(_))));
    assert!(!name.lock.contains(['/', '.', '\0']));
}

fn check_ancestor(ancestor: &Ancestor) {
    for part in [&ancestor.digest, &ancestor.lock] {
        assert!(!part.is_empty() && part.len() <= 64);
        assert!(part.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'));
    }
}

fuzz_target!(|text: &str| {
    let annotations: HashMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("sock.dev/{name}"), value.to_owned()))
        .collect();

    match FunctionConfig::from_annotations(&annotations) {
        Ok(Some(config)) => {
            assert!((1..=256).contains(&config.instances) && config.port > 0);
            assert!((1..=900).contains(&config.timeout.as_secs()));
            assert!(config.freeze_after <= DAY && config.end_after <= DAY);
            assert!(config.handler.len() <= 253 && config.handler.contains('.'));
            let rules = config.rules();
            assert!(rules.instances == config.instances && rules.queue <= 100);
            config.zygote.iter().for_each(check_name);
            assert!(config.ancestors.len() <= 7);
            config.ancestors.iter().for_each(check_ancestor);
        }
        Ok(None) => assert!(!annotations.contains_key("sock.dev/function")),
        Err(error) => assert!(error.to_string().len() < 1500),
    }
    match PoolConfig::from_annotations(&annotations) {
        Ok(config) => {
            check_name(&config.name);
            config.parent.iter().for_each(check_ancestor);
            assert!(config.setup.spares <= 64 && config.status_port > 0);
            let message = ToZygote::Configure(config.setup);
            assert!(postcard::to_stdvec(&message).expect("a message").len() <= MAX_MESSAGE);
        }
        Err(error) => assert!(error.to_string().len() < 1500),
    }
});
