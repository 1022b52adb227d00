//! What a container is for, by the annotations that only the operator may set.
//!
//! Most are [`Role::Plain`]. The three that sock knows differ from an ordinary container in their mounts, in what their
//! first process is, and in when `Start` returns.

pub mod function;
pub mod installer;
pub mod zygote;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};

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
                let name = crate::activation::ZygoteName::from_annotations(&annotations)
                    .map_err(Failure::invalid)?;
                Some(Use::begin(&name, id)?)
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

fn packages(name: &crate::activation::ZygoteName) -> Option<PathBuf> {
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

/// A JSON list of module names.
fn modules(annotations: &HashMap<String, String>, name: &str) -> Result<Vec<String>, Failure> {
    let Some(text) = annotations.get(&format!("sock.dev/{name}")) else {
        return Ok(Vec::new());
    };
    let list: Vec<String> = serde_json::from_str(text).map_err(|e| {
        Failure::invalid(format!(
            "annotation sock.dev/{name}: {e}: give a JSON list of module names"
        ))
    })?;
    let module = |m: &String| {
        !m.is_empty()
            && m.len() <= 200
            && m.chars()
                .all(|c| c.is_alphanumeric() || c == '_' || c == '.')
    };
    match list.iter().find(|m| !module(m)) {
        Some(bad) => Err(Failure::invalid(format!(
            "annotation sock.dev/{name}: {bad:?} is not the name of a module"
        ))),
        None => Ok(list),
    }
}

/// Longest code that a zygote runs after its imports, in bytes: it has to fit into one packet.
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
