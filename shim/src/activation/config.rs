//! What a Function's pod is told by annotations (`docs/design.md`, "Annotations"). Only the operator
//! may write them; they are checked all the same, since they become paths and limits.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use sock_zygote_protocol::LeafSetup;

use super::decide::{IdlePolicy, Reuse, Rules};

const PREFIX: &str = "sock.dev/";
/// Connections that wait while every leaf is busy.
const QUEUE: usize = 100;
/// Leaves in the making. A zygote forks one after the other; beyond a few they only compete.
const FORKS_AT_ONCE: usize = 4;
/// From the fork to the imported handler.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// A connection that falls silent is taken back from its leaf after this.
const PARK_AFTER: Duration = Duration::from_millis(200);
/// Kubernetes' own limit for names.
const LONGEST_NAME: usize = 253;

/// An annotation that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// It must be there.
    #[error("annotation {PREFIX}{name} is missing: {remedy}")]
    Missing {
        /// Without the prefix.
        name: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Its value is not of the form that it must have.
    #[error("annotation {PREFIX}{name}: {value:?} is not allowed: {remedy}")]
    Invalid {
        /// Without the prefix.
        name: &'static str,
        /// As it was given, shortened.
        value: String,
        /// What is allowed.
        remedy: &'static str,
    },
    /// It does not go together with the others.
    #[error("annotation {PREFIX}{name} cannot stand beside {PREFIX}function: {remedy}")]
    Conflict {
        /// Without the prefix.
        name: &'static str,
        /// What to do.
        remedy: &'static str,
    },
}

/// Where the Function's zygote is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZygoteName {
    /// Name of the PackageSet, for messages.
    pub package_set: String,
    /// UID of the namespace.
    pub tenant: String,
    /// Hash of image and requirements: the node cache.
    pub lock: String,
    /// Hash of lock and imports: the zygote.
    pub digest: String,
}

impl ZygoteName {
    /// The annotations that every pod of a PackageSet has, a pool's too.
    ///
    /// # Errors
    /// One is missing or not of its form.
    pub fn from_annotations<S: std::hash::BuildHasher>(
        annotations: &HashMap<String, String, S>,
    ) -> Result<ZygoteName, AnnotationError> {
        let need = |name: &'static str| {
            let remedy = "let the operator make the pod, from a PackageSet or a Function";
            let value = annotations.get(&format!("{PREFIX}{name}"));
            value
                .map(String::as_str)
                .ok_or(AnnotationError::Missing { name, remedy })
        };
        Ok(ZygoteName {
            package_set: checked("package-set", need("package-set")?, is_name, NAME)?,
            tenant: checked("tenant", need("tenant")?, is_hash, HASH)?,
            lock: checked("lock", need("lock")?, is_hash, HASH)?,
            digest: checked("digest", need("digest")?, is_hash, HASH)?,
        })
    }

    /// Where the pools' brokers listen, below `root` (`/run/sock/pools`).
    #[must_use]
    pub fn pools(&self, root: &Path) -> PathBuf {
        root.join(&self.tenant).join(&self.digest)
    }
}

/// A zygote that may stand in for one that is not there: its packages are a part of that one's.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ancestor {
    /// As in [`ZygoteName`].
    pub digest: String,
    /// As in [`ZygoteName`].
    pub lock: String,
}

/// Eight zygotes deep is a tree at most.
const MOST_ANCESTORS: usize = 7;

impl Ancestor {
    /// What a PackageSet extends, nearest first.
    ///
    /// # Errors
    /// The annotation is there and not of its form.
    pub fn from_annotations<S: std::hash::BuildHasher>(
        annotations: &HashMap<String, String, S>,
    ) -> Result<Vec<Ancestor>, AnnotationError> {
        const NAME: &str = "ancestors";
        let Some(text) = annotations.get(&format!("{PREFIX}{NAME}")) else {
            return Ok(Vec::new());
        };
        let remedy = r#"give a JSON list of at most 7 of {"digest": "...", "lock": "..."}, both of the characters 0-9, a-f and hyphen"#;
        let list: Option<Vec<Ancestor>> = serde_json::from_str(text).ok();
        list.filter(|list| {
            list.len() <= MOST_ANCESTORS
                && list
                    .iter()
                    .all(|one| is_hash(&one.digest) && is_hash(&one.lock))
        })
        .ok_or_else(|| invalid(NAME, text, remedy))
    }

    /// Where its pools' brokers listen, below `root` (`/run/sock/pools`).
    #[must_use]
    pub fn pools(&self, tenant: &str, root: &Path) -> PathBuf {
        root.join(tenant).join(&self.digest)
    }
}

/// A Function as its pod sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionConfig {
    /// Name of the container whose handler is served.
    pub container: String,
    /// Name of the Function.
    pub name: String,
    /// `module.attribute`.
    pub handler: String,
    /// The zygote, unless the Function asks for none.
    pub zygote: Option<ZygoteName>,
    /// Those that stand in for it, nearest first.
    pub ancestors: Vec<Ancestor>,
    /// TCP port.
    pub port: u16,
    /// Of one request.
    pub timeout: Duration,
    /// What becomes of a leaf after a request.
    pub reuse: Reuse,
    /// Most leaves at once.
    pub instances: usize,
    /// An idle leaf is frozen after this.
    pub freeze_after: Duration,
    /// An idle leaf is ended after this, unless something else was learned.
    pub end_after: Duration,
    /// Whether anything is learned.
    pub idle_policy: IdlePolicy,
}

impl FunctionConfig {
    /// Reads the annotations of a pod. `None` when it is not a Function's.
    ///
    /// # Errors
    /// The first annotation at fault, with its value and what to do.
    pub fn from_annotations<S: std::hash::BuildHasher>(
        annotations: &HashMap<String, String, S>,
    ) -> Result<Option<FunctionConfig>, AnnotationError> {
        let get = |name: &str| {
            annotations
                .get(&format!("{PREFIX}{name}"))
                .map(String::as_str)
        };
        let Some(container) = get("function") else {
            return Ok(None);
        };
        for name in [
            "zygote",
            "installer",
            "imports",
            "spares",
            "accepted-threads",
            "warm-up",
            "image",
            "extended",
            "status-port",
        ] {
            if get(name).is_some() {
                let remedy = "a pod is either a pool or a Function's";
                return Err(AnnotationError::Conflict { name, remedy });
            }
        }
        let need = |name, remedy| get(name).ok_or(AnnotationError::Missing { name, remedy });
        let operator = "let the operator make the pod, from a Function";
        Ok(Some(FunctionConfig {
            container: checked("function", container, is_name, NAME)?,
            name: checked(
                "function-name",
                need("function-name", operator)?,
                is_name,
                NAME,
            )?,
            handler: checked(
                "handler",
                need("handler", operator)?,
                is_handler,
                "give module.attribute, both of letters, digits and underscores, such as app.handler",
            )?,
            zygote: match get("digest") {
                None => None,
                Some(_) => Some(ZygoteName::from_annotations(annotations)?),
            },
            ancestors: Ancestor::from_annotations(annotations)?,
            port: number(
                "port",
                get("port"),
                8080,
                1..=65535,
                "give a TCP port from 1 to 65535",
            )?,
            timeout: Duration::from_secs(number(
                "timeout-seconds",
                get("timeout-seconds"),
                60,
                1..=900,
                "give whole seconds from 1 to 900",
            )?),
            reuse: match get("reuse") {
                None | Some("Always") => Reuse::Always,
                Some("Never") => Reuse::Never,
                Some(other) => return Err(invalid("reuse", other, "give Always or Never")),
            },
            instances: number(
                "instances",
                get("instances"),
                8,
                1..=256,
                "give a number from 1 to 256",
            )?,
            freeze_after: millis("freeze-after-ms", get("freeze-after-ms"), 1_000)?,
            end_after: millis("end-after-ms", get("end-after-ms"), 60_000)?,
            idle_policy: match get("idle-policy") {
                None | Some("Fixed") => IdlePolicy::Fixed,
                Some("Learned") => IdlePolicy::Learned,
                Some(other) => return Err(invalid("idle-policy", other, "give Fixed or Learned")),
            },
        }))
    }

    /// The limits that follow.
    #[must_use]
    pub fn rules(&self) -> Rules {
        Rules {
            instances: self.instances,
            forks_at_once: FORKS_AT_ONCE,
            queue: QUEUE,
            reuse: self.reuse,
            timeout: self.timeout,
            ready_within: READY_WITHIN,
            freeze_after: self.freeze_after,
            end_after: self.end_after,
            idle_policy: self.idle_policy,
            park_after: PARK_AFTER,
        }
    }

    /// Writes what the annotations decide into what a leaf is told.
    pub fn complete(&self, setup: &mut LeafSetup) {
        setup.handler.clone_from(&self.handler);
        setup.function.clone_from(&self.name);
        setup.single_request = self.reuse == Reuse::Never;
        setup.park_after_ms = u64::try_from(PARK_AFTER.as_millis()).unwrap_or(u64::MAX);
        setup.timeout_seconds = u32::try_from(self.timeout.as_secs()).unwrap_or(u32::MAX);
    }
}

const NAME: &str = "give a name of lower case letters, digits, dots and hyphens, at most 253 long";
const HASH: &str = "give 1 to 64 of the characters 0-9, a-f and hyphen";

fn invalid(name: &'static str, value: &str, remedy: &'static str) -> AnnotationError {
    let shown = value.chars().take(100).collect();
    AnnotationError::Invalid {
        name,
        value: shown,
        remedy,
    }
}

fn checked(
    name: &'static str,
    value: &str,
    allowed: fn(&str) -> bool,
    remedy: &'static str,
) -> Result<String, AnnotationError> {
    if allowed(value) {
        Ok(value.to_owned())
    } else {
        Err(invalid(name, value, remedy))
    }
}

fn number<T: FromStr + PartialOrd>(
    name: &'static str,
    value: Option<&str>,
    default: T,
    allowed: std::ops::RangeInclusive<T>,
    remedy: &'static str,
) -> Result<T, AnnotationError> {
    let Some(value) = value else {
        return Ok(default);
    };
    let plain = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    value
        .parse()
        .ok()
        .filter(|number| plain && allowed.contains(number))
        .ok_or_else(|| invalid(name, value, remedy))
}

fn millis(
    name: &'static str,
    value: Option<&str>,
    default: u64,
) -> Result<Duration, AnnotationError> {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    number(
        name,
        value,
        default,
        0..=DAY,
        "give whole milliseconds from 0 to 86400000 (a day)",
    )
    .map(Duration::from_millis)
}

fn is_name(value: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    let outer = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = value.as_bytes();
    bytes.len() <= LONGEST_NAME
        && outer(bytes.first())
        && outer(bytes.last())
        && bytes.iter().all(|b| inner(*b))
}

fn is_hash(value: &str) -> bool {
    (1..=64).contains(&value.len())
        && value
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b) || b == b'-')
}

fn is_handler(value: &str) -> bool {
    let word = |word: &str| {
        !word.is_empty()
            && !word.starts_with(|c: char| c.is_ascii_digit())
            && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    value.len() <= LONGEST_NAME && value.contains('.') && value.split('.').all(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let base = [
            ("function", "function"),
            ("function-name", "predict"),
            ("handler", "app.handler"),
        ];
        base.iter()
            .chain(pairs)
            .map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned()))
            .collect()
    }

    fn read(pairs: &[(&str, &str)]) -> Result<FunctionConfig, AnnotationError> {
        FunctionConfig::from_annotations(&annotations(pairs))
            .map(|config| config.expect("a Function"))
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let config = read(&[]).expect("valid");
        assert_eq!(
            config,
            FunctionConfig {
                container: "function".into(),
                name: "predict".into(),
                handler: "app.handler".into(),
                zygote: None,
                ancestors: Vec::new(),
                port: 8080,
                timeout: Duration::from_secs(60),
                reuse: Reuse::Always,
                instances: 8,
                freeze_after: Duration::from_secs(1),
                end_after: Duration::from_secs(60),
                idle_policy: IdlePolicy::Fixed,
            }
        );
    }

    #[test]
    fn another_pod_is_not_a_function() {
        let none = HashMap::from([("sock.dev/zygote".to_owned(), "zygote".to_owned())]);
        assert_eq!(FunctionConfig::from_annotations(&none), Ok(None));
    }

    #[test]
    fn the_pools_directory_is_made_of_tenant_and_digest() {
        let config = read(&[
            ("digest", "ab12"),
            ("lock", "cd34"),
            ("tenant", "6b1c0f3e-0000-4000-8000-000000000000"),
            ("package-set", "science"),
        ])
        .expect("valid");
        let zygote = config.zygote.expect("a zygote");
        assert_eq!(
            zygote.pools(Path::new("/run/sock/pools")),
            Path::new("/run/sock/pools/6b1c0f3e-0000-4000-8000-000000000000/ab12")
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_the_remedy() {
        let cases: [(&[(&str, &str)], &str); 9] = [
            (
                &[("port", "0")],
                r#"annotation sock.dev/port: "0" is not allowed: give a TCP port from 1 to 65535"#,
            ),
            (
                &[("port", "+80")],
                r#"annotation sock.dev/port: "+80" is not allowed: give a TCP port from 1 to 65535"#,
            ),
            (
                &[("timeout-seconds", "901")],
                "give whole seconds from 1 to 900",
            ),
            (&[("reuse", "never")], "give Always or Never"),
            (&[("instances", "257")], "give a number from 1 to 256"),
            (&[("handler", "app")], "give module.attribute"),
            (
                &[("digest", "../../etc")],
                r#"annotation sock.dev/package-set is missing"#,
            ),
            (
                &[
                    ("digest", "../x"),
                    ("lock", "a"),
                    ("tenant", "a"),
                    ("package-set", "a"),
                ],
                r#"annotation sock.dev/digest: "../x" is not allowed: give 1 to 64"#,
            ),
            (
                &[("zygote", "z")],
                "annotation sock.dev/zygote cannot stand beside sock.dev/function",
            ),
        ];
        for (pairs, expected) in cases {
            let error = read(pairs).expect_err("invalid").to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut missing = annotations(&[]);
        missing.remove("sock.dev/handler");
        let error = FunctionConfig::from_annotations(&missing)
            .expect_err("invalid")
            .to_string();
        assert!(
            error.contains("annotation sock.dev/handler is missing"),
            "{error}"
        );
    }

    const NAMES: [&str; 21] = [
        "tenant",
        "package-set",
        "lock",
        "digest",
        "installer",
        "zygote",
        "imports",
        "spares",
        "accepted-threads",
        "warm-up",
        "status-port",
        "function",
        "function-name",
        "handler",
        "port",
        "timeout-seconds",
        "reuse",
        "instances",
        "freeze-after-ms",
        "end-after-ms",
        "idle-policy",
    ];

    #[test]
    fn ancestors_are_few_and_of_the_form_of_digests() {
        let read = |text: &str| {
            let annotations = HashMap::from([("sock.dev/ancestors".to_owned(), text.to_owned())]);
            Ancestor::from_annotations(&annotations)
        };
        let one = r#"{"digest": "0a", "lock": "1b"}"#;
        let list = |n: usize| format!("[{}]", vec![one; n].join(","));
        assert_eq!(read(&list(7)).expect("seven").len(), 7);
        assert_eq!(read("[]").expect("none"), []);
        for wrong in [
            list(8),
            one.to_owned(),
            r#"[{"digest": "../x", "lock": "1b"}]"#.into(),
            r#"[{"digest": "0a", "lock": ""}]"#.into(),
            r#"[{"digest": "0a"}]"#.into(),
            "x".repeat(200_000),
        ] {
            let error = read(&wrong).expect_err("wrong").to_string();
            assert!(
                error.contains("sock.dev/ancestors") && error.len() < 400,
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic_or_pass_its_limits(
            values in prop::collection::hash_map(prop::sample::select(&NAMES[..]), "[ -~]{0,12}|[0-9]{1,25}|[a-f0-9-]{1,70}|\\PC{0,300}|.{0,5}", 0..20),
        ) {
            let pairs: Vec<(&str, &str)> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
            let read = FunctionConfig::from_annotations(&annotations(&pairs));
            if let Err(error) = &read {
                prop_assert!(error.to_string().len() < 800);
            }
            if let Ok(Some(config)) = read {
                prop_assert!(config.end_after <= Duration::from_secs(24 * 60 * 60));
                prop_assert!(config.freeze_after <= Duration::from_secs(24 * 60 * 60));
                prop_assert!(config.handler.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.'));
                prop_assert!((1..=256).contains(&config.instances));
                prop_assert!((1..=900).contains(&config.timeout.as_secs()));
                prop_assert!(config.port > 0);
                if let Some(zygote) = config.zygote {
                    let root = Path::new("/run/sock/pools");
                    let path = zygote.pools(root);
                    prop_assert_eq!(path.components().count(), root.components().count() + 2);
                    prop_assert!(!path.to_string_lossy().contains(".."));
                }
            }
        }
    }
}
