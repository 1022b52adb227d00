//! What a container is for, by the annotations that only the operator may set.
//!
//! Most are [`Role::Plain`]. The three that sock knows differ from an ordinary container in their mounts, in what their
//! first process is, and in when `Start` returns.

pub mod descent;
pub mod function;
pub mod installer;
pub mod profile;
pub mod zygote;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};
use sock_sandbox::Stdio;
use sock_zygote::protocol::ZygoteSetup;

use crate::activation::{Ancestor, ZygoteName};
use crate::task::Failure;
use crate::uses::Use;

/// What the node installer puts on the host, and where containers see it.
pub const PAYLOAD: &str = "/opt/sock";
/// Installed packages, by tenant and lock.
pub const CACHE: &str = "/var/lib/sock/cache";
/// Brokers, by tenant and digest.
pub const POOLS: &str = "/run/sock/pools";
/// Where a container sees its packages.
pub const SITE_PACKAGES: &str = "/opt/sock/site-packages";

/// Decided at a container's creation.
pub enum Role {
    /// The pod's sandbox: a holder, and no program.
    Sandbox,
    /// Any container.
    Plain,
    /// Installs a PackageSet's packages.
    Installer(installer::Installer),
    /// Is a PackageSet's zygote.
    Zygote(zygote::ZygoteContainer),
    /// Serves a Function's handler.
    Function(function::FunctionContainer),
}

/// containerd's words.
mod cri {
    pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
    pub const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
    pub const NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
}

impl Role {
    /// Decides, and changes the specification accordingly. With the role comes the use of the node cache, which lasts until the
    /// container's deletion.
    ///
    /// # Errors
    /// An annotation that is wrong, or that does not go with the rest of the pod.
    pub fn of(id: &str, spec: &mut Spec) -> Result<(Role, Option<Use>), Failure> {
        let annotations = spec.annotations().clone().unwrap_or_default();
        match annotations.get(cri::CONTAINER_TYPE).map(String::as_str) {
            Some("sandbox") => return Ok((Role::Sandbox, None)),
            Some("container") => {}
            _ => return Ok((Role::Plain, None)),
        }
        let name = annotations
            .get(cri::CONTAINER_NAME)
            .map(String::as_str)
            .unwrap_or_default();
        let is = |key: &str| {
            annotations
                .get(&format!("sock.dev/{key}"))
                .is_some_and(|n| n == name)
        };
        let known = ["installer", "zygote", "function"]
            .into_iter()
            .find(|key| is(key));
        let Some(known) = known else {
            return Ok((Role::Plain, None));
        };
        confined(spec)?;
        let used = match annotations.contains_key("sock.dev/lock") {
            true => {
                let name = ZygoteName::from_annotations(&annotations).map_err(Failure::invalid)?;
                let used = Use::begin(&name, id)?;
                let namespace = annotations.get(cri::NAMESPACE).map(String::as_str);
                let claimed = crate::tenants::claim(
                    Path::new(CACHE),
                    &name.tenant,
                    namespace.unwrap_or_default(),
                );
                if let Err(refused) = claimed {
                    used.end();
                    return Err(refused);
                }
                Some(used)
            }
            false => None,
        };
        let role = match known {
            "installer" => {
                installer::Installer::prepare(id, spec, &annotations).map(Role::Installer)
            }
            "zygote" => zygote::ZygoteContainer::prepare(spec, &annotations).map(Role::Zygote),
            _ => function::FunctionContainer::prepare(spec, &annotations).map(Role::Function),
        };
        if role.is_err()
            && let Some(used) = &used
        {
            used.end();
        }
        role.map(|role| (role, used))
    }

    /// After the end of the container's first process, before anybody is told, or where it did not come to that.
    pub fn finish(&self) {
        match self {
            Role::Installer(installer) => installer.finish(),
            Role::Zygote(zygote) => zygote.finish(),
            Role::Function(function) => function.finish(),
            Role::Sandbox | Role::Plain => {}
        }
    }
}

/// sock's containers hold what others must not reach, so they take no part in the host: the pod's author cannot have
/// them run as root, with capabilities, or in the host's namespaces.
fn confined(spec: &Spec) -> Result<(), Failure> {
    let refuse = |what: &str| {
        Err(Failure::invalid(format!(
            "a container with sock's annotations {what}"
        )))
    };
    let Some(process) = spec.process().as_ref() else {
        return refuse("has no process");
    };
    if process.user().uid() == 0 {
        return refuse("must not run as root: set securityContext.runAsUser");
    }
    if !process.no_new_privileges().unwrap_or(false) {
        return refuse(
            "must not gain privileges: set securityContext.allowPrivilegeEscalation to false",
        );
    }
    let bounding = process
        .capabilities()
        .as_ref()
        .and_then(|c| c.bounding().as_ref());
    if bounding.is_some_and(|b| !b.is_empty()) {
        return refuse(
            "must drop every capability: set securityContext.capabilities.drop to [ALL]",
        );
    }
    if spec.linux().as_ref().is_none_or(|l| l.seccomp().is_none()) {
        return refuse(
            "must have a seccomp profile: set securityContext.seccompProfile.type to RuntimeDefault",
        );
    }
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    if namespaces.is_some_and(|list| list.iter().any(|n| n.typ() == LinuxNamespaceType::User)) {
        return refuse(
            "has its own user namespace already: leave hostUsers unset for pods of PackageSets and Functions",
        );
    }
    for kind in [
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
    ] {
        if !namespaces.is_some_and(|list| list.iter().any(|n| n.typ() == kind)) {
            return refuse(&format!(
                "must not use the host's {kind} namespace: leave hostNetwork, hostPID and hostIPC unset"
            ));
        }
    }
    Ok(())
}

fn bind(source: &Path, destination: &str, writable: bool) -> Result<Mount, Failure> {
    let mut options = vec![
        "bind".to_string(),
        "nosuid".into(),
        "nodev".into(),
        "rprivate".into(),
    ];
    options.push(if writable { "rw" } else { "ro" }.into());
    MountBuilder::default()
        .typ("bind")
        .source(source)
        .destination(destination)
        .options(options)
        .build()
        .map_err(Failure::unknown)
}

/// Shows the payload, and the packages if they are installed.
fn add_payload(spec: &mut Spec, packages: Option<PathBuf>) -> Result<(), Failure> {
    if !Path::new(PAYLOAD).join("python").is_dir() {
        return Err(Failure::precondition(format!(
            "{PAYLOAD} is not on this node: see the pod of sock's node installer here"
        )));
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(bind(Path::new(PAYLOAD), PAYLOAD, false)?);
    if let Some(packages) = packages {
        mounts.push(bind(&packages, SITE_PACKAGES, false)?);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Whether this is a directory and no link to one. What the installer leaves is the tenant's: a link there would be
/// followed on the host, as root. Once its container has ended nobody can put one there any more.
fn is_real_directory(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|m| m.is_dir())
}

fn packages(name: &ZygoteName) -> Option<PathBuf> {
    let path = Path::new(CACHE)
        .join(&name.tenant)
        .join(&name.lock)
        .join("site-packages");
    is_real_directory(&path).then_some(path)
}

fn add_env(spec: &mut Spec, name: &str, value: &str) {
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.retain(|e| !e.starts_with(&format!("{name}=")));
        env.push(format!("{name}={value}"));
        process.set_env(Some(env));
    }
}

/// Standard output and error of a container whose first process writes nothing, for those who do.
fn output(streams: Stdio) -> Result<(OwnedFd, OwnedFd), Failure> {
    let null = || {
        std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .map(OwnedFd::from)
    };
    let stdout = streams.stdout.map_or_else(null, Ok)?;
    let stderr = streams.stderr.map_or_else(|| stdout.try_clone(), Ok)?;
    Ok((stdout, stderr))
}

/// A value as a message shows it.
fn shown(value: &str) -> String {
    const MOST: usize = 100;
    format!("{:?}", value.chars().take(MOST).collect::<String>())
}

/// Most modules in one list.
const MOST_MODULES: usize = 256;
/// Longest name of a module, in bytes.
const LONGEST_MODULE: usize = 200;

/// A JSON list of module names.
fn modules(annotations: &HashMap<String, String>, name: &str) -> Result<Vec<String>, Failure> {
    let Some(text) = annotations.get(&format!("sock.dev/{name}")) else {
        return Ok(Vec::new());
    };
    // What serde_json says of a wrong type repeats the value, however long it is.
    let list: Vec<String> = serde_json::from_str(text).map_err(|e| {
        Failure::invalid(format!(
            "annotation sock.dev/{name}: {}, line {}, column {}: give a JSON list of module names",
            shown(text),
            e.line(),
            e.column()
        ))
    })?;
    if list.len() > MOST_MODULES {
        return Err(Failure::invalid(format!(
            "annotation sock.dev/{name} names {} modules: give at most {MOST_MODULES}",
            list.len()
        )));
    }
    let module = |m: &String| {
        !m.is_empty()
            && m.len() <= LONGEST_MODULE
            && m.chars()
                .all(|c| c.is_alphanumeric() || c == '_' || c == '.')
    };
    match list.iter().find(|m| !module(m)) {
        Some(bad) => Err(Failure::invalid(format!(
            "annotation sock.dev/{name}: {} is not the name of a module",
            shown(bad)
        ))),
        None => Ok(list),
    }
}

/// Longest code that a zygote runs after its imports, in bytes.
const MOST_WARM_UP: usize = 8 << 10;

/// Python code of the PackageSet; empty where it has none.
fn warm_up(annotations: &HashMap<String, String>) -> Result<String, Failure> {
    match annotations.get("sock.dev/warm-up") {
        Some(code) if code.len() > MOST_WARM_UP => Err(Failure::invalid(format!(
            "annotation sock.dev/warm-up has {} bytes: give at most {MOST_WARM_UP}",
            code.len()
        ))),
        code => Ok(code.cloned().unwrap_or_default()),
    }
}

/// What the annotations say of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Which PackageSet it is of.
    pub name: ZygoteName,
    /// What the zygote is to become.
    pub setup: ZygoteSetup,
    /// What the PackageSet extends, if it does.
    pub parent: Option<Ancestor>,
    /// Whether others extend it.
    pub is_extended: bool,
    /// Where the shim answers `GET /status`.
    pub status_port: u16,
}

impl PoolConfig {
    /// Reads the annotations of a pool's pod. What they say fits into the one packet that a zygote is told it by.
    ///
    /// # Errors
    /// The first annotation at fault, with its value and what to do.
    pub fn from_annotations(annotations: &HashMap<String, String>) -> Result<Self, Failure> {
        let name = ZygoteName::from_annotations(annotations).map_err(Failure::invalid)?;
        let number =
            |key: &str, default: u16, allowed: std::ops::RangeInclusive<u16>| match annotations
                .get(&format!("sock.dev/{key}"))
            {
                None => Ok(default),
                Some(text) => {
                    let plain = text.bytes().all(|b| b.is_ascii_digit());
                    let number = text.parse().ok();
                    number
                        .filter(|n| plain && allowed.contains(n))
                        .ok_or_else(|| {
                            Failure::invalid(format!(
                                "annotation sock.dev/{key}: {}: give a number from {} to {}",
                                shown(text),
                                allowed.start(),
                                allowed.end()
                            ))
                        })
                }
            };
        let setup = ZygoteSetup {
            imports: modules(annotations, "imports")?,
            path: vec![SITE_PACKAGES.into()],
            spares: number("spares", 1, 0..=64)?.into(),
            accepted_threads: modules(annotations, "accepted-threads")?,
            warm_up: warm_up(annotations)?,
        };
        let names = setup.imports.iter().chain(&setup.accepted_threads);
        let length: usize = names.map(|name| name.len()).sum();
        if length > MOST_NAMES {
            return Err(Failure::invalid(format!(
                "annotations sock.dev/imports and sock.dev/accepted-threads name {length} bytes of modules: give at most {MOST_NAMES}"
            )));
        }
        let ancestors = Ancestor::from_annotations(annotations).map_err(Failure::invalid)?;
        Ok(Self {
            name,
            setup,
            parent: ancestors.into_iter().next(),
            is_extended: match annotations.get("sock.dev/extended").map(String::as_str) {
                None | Some("false") => false,
                Some("true") => true,
                Some(other) => {
                    return Err(Failure::invalid(format!(
                        "annotation sock.dev/extended: {}: give true or false",
                        shown(other)
                    )));
                }
            },
            status_port: number("status-port", 9464, 1..=65535)?,
        })
    }
}

/// All names of modules together, in bytes: with the warm-up and the lengths between them they fill most of a packet.
const MOST_NAMES: usize = 48 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sock_zygote::protocol::{MAX_MESSAGE, ToZygote};

    use super::*;

    fn pool(pairs: &[(&str, &str)]) -> Result<PoolConfig, Failure> {
        let base = [
            ("package-set", "science"),
            ("tenant", "0a"),
            ("lock", "1b"),
            ("digest", "2c"),
        ];
        let annotations = base
            .iter()
            .chain(pairs)
            .map(|(k, v)| (format!("sock.dev/{k}"), (*v).to_owned()))
            .collect();
        PoolConfig::from_annotations(&annotations)
    }

    fn packet(config: &PoolConfig) -> usize {
        let message = ToZygote::Configure(config.setup.clone());
        postcard::to_stdvec(&message).expect("a message").len()
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let config = pool(&[]).expect("valid");
        assert_eq!((config.setup.spares, config.status_port), (1, 9464));
    }

    #[test]
    fn as_much_as_a_package_set_may_say_fits_a_packet_or_is_refused_at_once() {
        let names = |n: usize| serde_json::json!(vec!["m".repeat(200); n]).to_string();
        let warm_up = "x".repeat(MOST_WARM_UP);
        for imports in [200, 256] {
            let said = pool(&[
                ("imports", &names(imports)),
                ("accepted-threads", &names(40)),
                ("warm-up", &warm_up),
            ]);
            match said {
                Ok(config) => assert!(packet(&config) <= MAX_MESSAGE),
                Err(error) => assert!(error.to_string().contains("modules"), "{error}"),
            }
        }
    }

    #[test]
    fn a_long_value_is_not_repeated() {
        let long = "x".repeat(200_000);
        let quoted = format!("\"{long}\"");
        let listed = format!("[\"{long}\"]");
        for (name, value) in [
            ("imports", &quoted),
            ("imports", &listed),
            ("accepted-threads", &long),
            ("spares", &long),
            ("status-port", &long),
            ("extended", &long),
            ("warm-up", &long),
            ("digest", &long),
        ] {
            let error = pool(&[(name, value)]).expect_err("invalid").to_string();
            assert!(error.contains(name) && error.len() < 400, "{}", error.len());
        }
    }

    #[test]
    fn numbers_are_plain_and_within_their_limits() {
        for (name, value) in [
            ("spares", "65"),
            ("spares", "+5"),
            ("spares", ""),
            ("status-port", "0"),
            ("status-port", "65536"),
        ] {
            let error = pool(&[(name, value)]).expect_err(value).to_string();
            assert!(error.contains("give a number from"), "{error}");
        }
    }

    const NAMES: [&str; 9] = [
        "tenant",
        "package-set",
        "lock",
        "digest",
        "imports",
        "spares",
        "accepted-threads",
        "warm-up",
        "status-port",
    ];

    proptest! {
        #[test]
        fn no_value_makes_a_pool_panic_or_pass_its_limits(
            values in prop::collection::hash_map(prop::sample::select(&NAMES[..]), r#"[ -~]{0,12}|[0-9]{1,25}|[a-f0-9-]{1,70}|\[("[a-z._é]{0,20}",? ?){0,40}\]|\PC{0,9}"#, 0..9),
            long in 0usize..300,
        ) {
            let mut pairs: Vec<(&str, &str)> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
            let imports = serde_json::json!(vec!["é".repeat(100); long]).to_string();
            if long > 0 {
                pairs.push(("imports", &imports));
            }
            match pool(&pairs) {
                Ok(config) => {
                    prop_assert!(config.setup.spares <= 64 && config.status_port > 0);
                    prop_assert!(packet(&config) <= MAX_MESSAGE);
                    let path = config.name.pools(Path::new(POOLS));
                    prop_assert_eq!(path.components().count(), Path::new(POOLS).components().count() + 2);
                }
                Err(error) => prop_assert!(error.to_string().len() < 800, "{}", error),
            }
        }
    }
}
