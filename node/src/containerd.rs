//! containerd on the node: where it is, how it is configured, and how it learns of the runtime `sock`.
//!
//! What is to be written is decided by pure functions over the texts of the configuration; the rest reads, writes,
//! lets containerd itself check the result, and restarts it.

use std::fs;
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, Item, TableLike, Value};

use crate::host::{self, Host};
use crate::payload;

/// Name of the runtime, as a RuntimeClass's handler names it.
pub const RUNTIME: &str = "sock";

/// Late in the order in which a directory of drop-ins is read.
const FILE: &str = "99-sock.toml";

/// Stands on the host from before the configuration is changed until containerd was restarted for it, also when the
/// installer is killed in between. It is gone after a reboot, after which containerd has read everything.
///
/// Times would not do: those of a file and of a process differ when the clock is set.
const RESTART_DUE: &str = "/run/sock/containerd-restart-due";

const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no process of the host is named containerd: sock needs containerd 2.0 or later as the node's runtime"
    )]
    NotRunning,
    #[error("{path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not TOML: {source}; mend it, containerd cannot read it either")]
    Syntax {
        path: PathBuf,
        source: Box<toml_edit::TomlError>,
    },
    #[error("{path}: {field} is {value}, which no containerd 2 knows")]
    Value {
        path: PathBuf,
        field: &'static str,
        value: String,
    },
    #[error(transparent)]
    Write(#[from] payload::Error),
    #[error(transparent)]
    Host(#[from] host::Error),
    #[error(
        "containerd reads the new configuration, but sees no runtime sock in it; it was taken back"
    )]
    Ignored,
    #[error("containerd refuses the new configuration, it was taken back: {0}")]
    Refused(host::Error),
    #[error(
        "containerd (process {0}) is no unit of systemd: restart it by hand, so that it reads {FILE}"
    )]
    NoUnit(u32),
    #[error(
        "{0} lost the import of {FILE} that was written into it: something generates that file; \
         add the import to its template"
    )]
    Overwritten(PathBuf),
    #[error(
        "containerd does not run after its restart; see `journalctl -u containerd` on the node"
    )]
    Gone,
}

/// The running containerd of a host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Process {
    /// Its number in the host's PID namespace.
    pub pid: u32,
    /// Its program, as a path of the host.
    pub program: PathBuf,
    /// Its configuration, as a path of the host.
    pub config: PathBuf,
    /// The unit of systemd that it runs in.
    pub unit: Option<String>,
}

impl Process {
    /// Finds containerd among the host's processes.
    ///
    /// A containerd inside of a container lives in another mount namespace than PID 1 and is none of ours.
    pub fn find(host: &Host) -> Result<Self, Error> {
        let processes = host.processes();
        let namespace = |pid: &str| fs::read_link(processes.join(pid).join("ns/mnt")).ok();
        let of_host = namespace("1");
        let mut found: Vec<u32> = fs::read_dir(processes)
            .map_err(|source| Error::Read {
                path: processes.to_owned(),
                source,
            })?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid: &u32| {
                let pid = pid.to_string();
                fs::read_to_string(processes.join(&pid).join("comm"))
                    .is_ok_and(|name| name.trim() == "containerd")
                    && namespace(&pid) == of_host
            })
            .collect();
        found.sort_unstable();
        let pid = *found.first().ok_or(Error::NotRunning)?;

        let directory = processes.join(pid.to_string());
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
        };
        let program = fs::read_link(directory.join("exe")).map_err(|source| Error::Read {
            path: directory.join("exe"),
            source,
        })?;
        Ok(Self {
            pid,
            program,
            config: config_path(&read("cmdline")?),
            unit: unit(&read("cgroup")?),
        })
    }
}

/// The configuration that a command line names, arguments separated by NUL.
pub(crate) fn config_path(command_line: &str) -> PathBuf {
    let mut arguments = command_line.split('\0');
    while let Some(argument) = arguments.next() {
        let value = match argument {
            "-c" | "--config" | "-config" => arguments.next(),
            _ => ["--config=", "-config=", "-c="]
                .iter()
                .find_map(|option| argument.strip_prefix(option)),
        };
        if let Some(value) = value {
            return value.into();
        }
    }
    DEFAULT_CONFIG.into()
}

/// The service that a process belongs to, from its `/proc/PID/cgroup`.
pub(crate) fn unit(cgroups: &str) -> Option<String> {
    cgroups
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            (controllers.is_empty() || controllers == "name=systemd").then_some(path)
        })
        .flat_map(|path| path.split('/').rev())
        .find(|part| part.ends_with(".service"))
        .map(str::to_owned)
}

/// What has to be on the disk so that containerd knows the runtime.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Plan {
    pub(crate) drop_in: PathBuf,
    pub(crate) drop_in_text: String,
    /// The main configuration with an import added; none if it reads the drop-in already.
    pub(crate) main: Option<String>,
}

pub(crate) fn plan(config: &Path, text: Option<&str>) -> Result<Plan, Error> {
    let mut document = parse(config, text.unwrap_or_default())?;
    let version = match document.get("version") {
        // containerd 2 takes a file without a version, or with 1, over into its own version before it merges.
        None | Some(Item::Value(Value::Integer(_))) => document
            .get("version")
            .and_then(Item::as_integer)
            .unwrap_or_default(),
        Some(other) => {
            return Err(Error::Value {
                path: config.to_owned(),
                field: "version",
                value: other.to_string(),
            });
        }
    };
    let plugin = match version {
        2 => "io.containerd.grpc.v1.cri",
        0 | 1 | 3.. => "io.containerd.cri.v1.runtime",
        _ => {
            return Err(Error::Value {
                path: config.to_owned(),
                field: "version",
                value: version.to_string(),
            });
        }
    };
    // Drop-ins are merged as they stand: one in another version than the main file would keep either from being
    // migrated.
    let version = version.max(2) + i64::from(version < 2);
    let drop_in_text = format!(
        "# Written by sock's node installer.\nversion = {version}\n\n\
         [plugins.\"{plugin}\".containerd.runtimes.{RUNTIME}]\n\
         runtime_type = \"io.containerd.sock.v1\"\n\
         runtime_path = \"/opt/sock/bin/containerd-shim-sock-v1\"\n\
         pod_annotations = [\"sock.dev/*\"]\n\
         container_annotations = [\"sock.dev/*\"]\n"
    );

    // Where containerd reads no list, none is put in its place.
    if let Some(other) = document.get("imports").filter(|item| !item.is_array()) {
        return Err(Error::Value {
            path: config.to_owned(),
            field: "imports",
            value: other.to_string().trim().to_owned(),
        });
    }
    let directory = config.parent().unwrap_or(Path::new("/"));
    let imported = imports(&document).find_map(|pattern| place(directory, pattern));
    if let Some(drop_in) = imported {
        return Ok(Plan {
            drop_in,
            drop_in_text,
            main: None,
        });
    }
    let drop_in = directory.join("conf.d").join(FILE);
    if text.is_none() {
        document.insert("version", toml_edit::value(version));
    }
    let entry = drop_in.to_string_lossy().into_owned();
    match document.get_mut("imports").and_then(Item::as_array_mut) {
        Some(array) => array.push(entry),
        None => {
            document.insert("imports", toml_edit::value(Array::from_iter([entry])));
        }
    }
    Ok(Plan {
        drop_in,
        drop_in_text,
        main: Some(document.to_string()),
    })
}

fn parse(path: &Path, text: &str) -> Result<DocumentMut, Error> {
    text.parse().map_err(|source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

fn imports(document: &DocumentMut) -> impl Iterator<Item = &str> {
    document
        .get("imports")
        .and_then(Item::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

/// Where the drop-in has to lie so that an import reads it: relative ones start at the main file's directory, and a
/// `*` in the last part stands for any characters (containerd's `resolveImports`).
fn place(directory: &Path, import: &str) -> Option<PathBuf> {
    let import = directory.join(import);
    let (parent, name) = (import.parent()?, import.file_name()?.to_str()?);
    if parent.to_str()?.contains('*') {
        return None;
    }
    let reads = match name.split_once('*') {
        Some((start, end)) => {
            !end.contains('*')
                && FILE.len() >= start.len() + end.len()
                && FILE.starts_with(start)
                && FILE.ends_with(end)
        }
        None => name == FILE,
    };
    reads.then(|| parent.join(FILE))
}

/// The main configuration without the import of the drop-in; none if it has none.
pub(crate) fn without_import(config: &Path, text: &str) -> Result<Option<String>, Error> {
    let mut document = parse(config, text)?;
    let entry = config
        .parent()
        .unwrap_or(Path::new("/"))
        .join("conf.d")
        .join(FILE);
    let Some(array) = document.get_mut("imports").and_then(Item::as_array_mut) else {
        return Ok(None);
    };
    let before = array.len();
    array.retain(|import| import.as_str().map(Path::new) != Some(&entry));
    if array.len() == before {
        return Ok(None);
    }
    let is_empty = array.is_empty();
    // A list with a comment over it was there before.
    let has_comment = document.key("imports").is_some_and(|key| {
        let prefix = key.leaf_decor().prefix();
        prefix
            .and_then(|prefix| prefix.as_str())
            .is_some_and(|prefix| prefix.contains('#'))
    });
    if is_empty && !has_comment {
        document.remove("imports");
    }
    Ok(Some(document.to_string()))
}

/// Whether a dump of containerd's configuration has the runtime, whatever plugin holds it.
pub(crate) fn knows_runtime(dump: &str) -> bool {
    let Ok(document) = dump.parse::<DocumentMut>() else {
        return false;
    };
    document
        .get("plugins")
        .and_then(Item::as_table_like)
        .is_some_and(|plugins| {
            plugins.iter().any(|(_, plugin)| {
                runtimes(plugin).is_some_and(|runtimes| {
                    runtimes
                        .get(RUNTIME)
                        .and_then(|runtime| runtime.get("runtime_type"))
                        .and_then(Item::as_str)
                        == Some("io.containerd.sock.v1")
                })
            })
        })
}

fn runtimes(plugin: &Item) -> Option<&dyn TableLike> {
    plugin.get("containerd")?.get("runtimes")?.as_table_like()
}

/// Configures and restarts containerd, and remembers what it did so as not to do it in circles.
#[derive(Debug, Default)]
pub struct Configurator {
    /// The main configuration that an import was added to last.
    edited: Option<String>,
}

impl Configurator {
    /// Makes the configuration name the runtime; true if containerd has to be restarted to know it, or what it can do:
    /// `features`, which containerd asks for when it starts.
    pub fn configure(
        &mut self,
        host: &Host,
        process: &Process,
        features: &str,
    ) -> Result<bool, Error> {
        self.write(host, process, features, || verify(host, process))
    }

    fn write(
        &mut self,
        host: &Host,
        process: &Process,
        features: &str,
        verify: impl FnOnce() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let due = host.path(RESTART_DUE);
        let was_due = due.exists();
        let main = host.path(&process.config);
        let text = read_if_there(&main)?;
        let mut plan = plan(&process.config, text.as_deref())?;
        let features = features.trim().replace('\n', " ");
        plan.drop_in_text = format!(
            "{}\n# What the runtime can do, for containerd reads that only when it starts:\n# {features}\n",
            plan.drop_in_text
        );
        let drop_in = host.path(&plan.drop_in);
        if let (Some(_), Some(before)) = (&plan.main, &self.edited)
            && text.as_deref().unwrap_or_default() == before
        {
            return Err(Error::Overwritten(process.config.clone()));
        }

        let before = read_if_there(&drop_in)?;
        if before.as_deref() == Some(&plan.drop_in_text) && plan.main.is_none() {
            return Ok(was_due);
        }

        make_parent(&due)?;
        payload::write(&due, 0o600, b"")?;
        // An import of a file that is not there keeps containerd from starting: the drop-in first.
        make_parent(&drop_in)?;
        payload::write(&drop_in, 0o644, plan.drop_in_text.as_bytes())?;
        if let Some(new) = &plan.main {
            if let Some(old) = &text {
                let backup = backup(&main);
                if !backup.exists() {
                    payload::write(&backup, 0o644, old.as_bytes())?;
                }
            }
            payload::write(&main, 0o644, new.as_bytes())?;
            self.edited = Some(text.clone().unwrap_or_default());
        }

        if let Err(error) = verify() {
            restore(
                &main,
                text.as_deref().filter(|_| plan.main.is_some()),
                plan.main.is_some(),
            )?;
            restore(&drop_in, before.as_deref(), true)?;
            if !was_due {
                Self::restarted(host)?;
            }
            return Err(error);
        }
        Ok(true)
    }

    /// After a restart: the configuration that is there was read.
    pub fn restarted(host: &Host) -> Result<(), Error> {
        let path = host.path(RESTART_DUE);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Read { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Takes the runtime out of the configuration; true if something was there.
    pub fn remove(host: &Host, process: &Process) -> Result<bool, Error> {
        let main = host.path(&process.config);
        let mut changed = false;
        let text = read_if_there(&main)?;
        // Where the drop-in lies is decided by the imports as they are, ours included.
        let drop_in = host.path(plan(&process.config, text.as_deref())?.drop_in);
        if let Some(text) = text
            && let Some(new) = without_import(&process.config, &text)?
        {
            payload::write(&main, 0o644, new.as_bytes())?;
            changed = true;
            let backup = backup(&main);
            if read_if_there(&backup)?.as_deref() == Some(&new) {
                fs::remove_file(&backup).map_err(|source| Error::Read {
                    path: backup,
                    source,
                })?;
            }
        }
        if drop_in.exists() {
            fs::remove_file(&drop_in).map_err(|source| Error::Read {
                path: drop_in,
                source,
            })?;
            changed = true;
        }
        Ok(changed)
    }
}

fn make_parent(path: &Path) -> Result<(), Error> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    fs::create_dir_all(parent).map_err(|source| Error::Read {
        path: parent.to_owned(),
        source,
    })
}

fn backup(main: &Path) -> PathBuf {
    let mut name = main.as_os_str().to_owned();
    name.push(".before-sock");
    name.into()
}

fn restore(path: &Path, text: Option<&str>, touched: bool) -> Result<(), Error> {
    match text {
        Some(text) => Ok(payload::write(path, 0o644, text.as_bytes())?),
        None if touched => fs::remove_file(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        }),
        None => Ok(()),
    }
}

fn verify(host: &Host, process: &Process) -> Result<(), Error> {
    let (program, config) = (
        process.program.to_string_lossy(),
        process.config.to_string_lossy(),
    );
    let dump = host
        .run(&program, &["--config", &config, "config", "dump"])
        .map_err(Error::Refused)?;
    if knows_runtime(&dump) {
        Ok(())
    } else {
        Err(Error::Ignored)
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Restarts containerd by systemd; its containers run on.
pub fn restart(host: &Host, process: &Process) -> Result<(), Error> {
    let unit = process.unit.as_deref().ok_or(Error::NoUnit(process.pid))?;
    host.run("systemctl", &["restart", unit])?;
    match Process::find(host) {
        Ok(new) if new.pid != process.pid => Ok(()),
        _ => Err(Error::Gone),
    }
}

/// containerd's version, as the program itself says it.
pub fn version(host: &Host, process: &Process) -> Result<Version, Error> {
    Ok(Version::parse(
        &host.run(&process.program.to_string_lossy(), &["--version"])?,
    ))
}

/// A version of containerd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Version {
    /// Major and minor number; none if the text has none, as with builds from a work tree.
    pub number: Option<(u32, u32)>,
    /// The text they were read from.
    pub text: String,
}

impl Version {
    /// Reads what `containerd --version` prints: program, package, version, revision.
    pub fn parse(output: &str) -> Self {
        let text = output
            .split_ascii_whitespace()
            .nth(2)
            .unwrap_or(output.trim())
            .to_owned();
        let mut parts = text.trim_start_matches('v').splitn(3, '.');
        let number = parts
            .next()
            .and_then(|major| major.parse().ok())
            .zip(parts.next().and_then(|minor| {
                let digits: String = minor.chars().take_while(char::is_ascii_digit).collect();
                digits.parse().ok()
            }));
        Self { number, text }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND: &str = r#"# explicitly use v2 config format
version = 2

[proxy_plugins]
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
"#;

    #[test]
    fn a_main_file_without_imports_gets_one_and_keeps_the_rest() {
        let plan = plan(Path::new("/etc/containerd/config.toml"), Some(KIND)).unwrap();
        assert_eq!(
            plan.drop_in,
            Path::new("/etc/containerd/conf.d/99-sock.toml")
        );
        let main = plan.main.unwrap();
        assert!(main.starts_with(
            "# explicitly use v2 config format\nversion = 2\nimports = [\"/etc/containerd/conf.d/99-sock.toml\"]\n"
        ), "{main}");
        assert!(
            main.ends_with(&KIND[KIND.find("[proxy_plugins]").unwrap()..]),
            "{main}"
        );
    }

    #[test]
    fn the_drop_in_has_the_version_of_the_main_file() {
        for (main, version, plugin) in [
            ("version = 2\n", "version = 2", "io.containerd.grpc.v1.cri"),
            (
                "version = 3\n",
                "version = 3",
                "io.containerd.cri.v1.runtime",
            ),
            (
                "version = 4\n",
                "version = 4",
                "io.containerd.cri.v1.runtime",
            ),
            ("", "version = 3", "io.containerd.cri.v1.runtime"),
            (
                "version = 1\n",
                "version = 3",
                "io.containerd.cri.v1.runtime",
            ),
        ] {
            let text = plan(Path::new("/c/config.toml"), Some(main))
                .unwrap()
                .drop_in_text;
            assert!(text.contains(version), "{main:?}: {text}");
            assert!(text.contains(plugin), "{main:?}: {text}");
            assert!(knows_runtime(&text));
        }
    }

    #[test]
    fn imports_that_are_there_are_used() {
        for (imports, drop_in) in [
            (
                r#"["/etc/containerd/conf.d/*.toml"]"#,
                "/etc/containerd/conf.d/99-sock.toml",
            ),
            (
                r#"["certs.toml", "config-v3.toml.d/*.toml"]"#,
                "/etc/containerd/config-v3.toml.d/99-sock.toml",
            ),
            (
                r#"["/etc/containerd/conf.d/99-sock.toml"]"#,
                "/etc/containerd/conf.d/99-sock.toml",
            ),
        ] {
            let main = format!("version = 3\nimports = {imports}\n");
            let plan = plan(Path::new("/etc/containerd/config.toml"), Some(&main)).unwrap();
            assert_eq!((plan.drop_in.to_str().unwrap(), plan.main), (drop_in, None));
        }
    }

    #[test]
    fn an_import_of_other_files_is_kept() {
        let main = "version = 3\nimports = [\"/etc/containerd/other.toml\"]\n";
        let plan = plan(Path::new("/etc/containerd/config.toml"), Some(main)).unwrap();
        assert_eq!(
            plan.main.unwrap(),
            "version = 3\nimports = [\"/etc/containerd/other.toml\", \"/etc/containerd/conf.d/99-sock.toml\"]\n"
        );
    }

    #[test]
    fn without_a_main_file_one_is_made() {
        let plan = plan(Path::new("/etc/containerd/config.toml"), None).unwrap();
        assert_eq!(
            plan.main.unwrap(),
            "version = 3\nimports = [\"/etc/containerd/conf.d/99-sock.toml\"]\n"
        );
    }

    #[test]
    fn an_import_is_taken_back_to_the_byte() {
        let config = Path::new("/etc/containerd/config.toml");
        for main in [
            KIND,
            "version = 3\nimports = [\"/etc/containerd/other.toml\"]\n",
        ] {
            let with = plan(config, Some(main)).unwrap().main.unwrap();
            assert_eq!(without_import(config, &with).unwrap().unwrap(), main);
        }
        assert_eq!(without_import(config, KIND).unwrap(), None);
    }

    #[test]
    fn imports_that_are_no_list_are_named_and_not_replaced() {
        for imports in ["\"conf.d/*.toml\"", "1", "{ a = 1 }"] {
            let main = format!("version = 3\nimports = {imports}\n");
            let error = plan(Path::new("/c/config.toml"), Some(&main)).unwrap_err();
            assert!(error.to_string().contains("imports is"), "{error}");
        }
    }

    fn list(text: &str) -> Vec<String> {
        let document: DocumentMut = text.parse().unwrap();
        imports(&document).map(str::to_owned).collect()
    }

    proptest! {
        #[test]
        fn a_main_file_gains_one_import_and_nothing_else(
            version in prop::option::of(2..5i64),
            given in prop::option::of(prop::collection::vec(r"[a-z/.*]{0,12}", 0..4)),
            comment in prop::option::of("# [a-z ]{0,9}"),
            tables in prop::collection::vec(("[a-c]{1,3}", "[a-z]{1,4}", any::<i64>()), 0..4),
        ) {
            let config = Path::new("/etc/containerd/config.toml");
            let mut text = comment.map(|c| c + "\n").unwrap_or_default();
            version.iter().for_each(|v| text += &format!("version = {v}\n"));
            given.iter().for_each(|list| text += &format!("imports = {list:?}\n"));
            let names: std::collections::BTreeMap<_, _> = tables.iter().map(|(n, k, v)| (n, (k, v))).collect();
            names.iter().for_each(|(name, (key, value))| text += &format!("\n[{name}]\n{key} = {value} # kept\n"));
            let made = plan(config, Some(&text)).unwrap();
            prop_assert_eq!(made.drop_in.file_name().unwrap(), FILE);
            prop_assert!(knows_runtime(&made.drop_in_text));
            if let Some(main) = made.main {
                let mut expected = list(&text);
                expected.push(made.drop_in.to_str().unwrap().to_owned());
                prop_assert_eq!(list(&main), expected);
                let again = plan(config, Some(&main)).unwrap();
                prop_assert_eq!((again.drop_in, again.main), (made.drop_in, None));
                let back = without_import(config, &main).unwrap().unwrap();
                // An empty list goes with the last import, unless the file's first comment stands over it.
                let goes = given == Some(vec![]) && (version.is_some() || !text.starts_with('#'));
                let before = if goes { text.replace("imports = []\n", "") } else { text };
                prop_assert_eq!(back, before);
            }
        }

        #[test]
        fn no_text_of_the_host_is_a_panic(text in r#"\PC{0,60}|([a-z]{0,3}[=.:/"\[\]{}#\n0 ]){0,20}"#) {
            let _ = plan(Path::new("/etc/containerd/config.toml"), Some(&text));
            let _ = without_import(Path::new("/etc/containerd/config.toml"), &text);
            let _ = (knows_runtime(&text), config_path(&text), Version::parse(&text));
            prop_assert!(unit(&text).is_none_or(|unit| unit.ends_with(".service") && !unit.contains('/')));
        }
    }

    #[test]
    fn broken_toml_is_an_error_with_its_line() {
        // A parser that gave up by a panic at the second one: a value made up for `=` has no place in the text.
        for text in ["version = 3\n[plugins\n", "=={\n."] {
            let error = plan(Path::new("/c/config.toml"), Some(text)).unwrap_err();
            let said = error.to_string();
            assert!(
                said.starts_with("/c/config.toml is not TOML: TOML parse error at line"),
                "{said}"
            );
        }
    }

    #[test]
    fn a_version_of_the_wrong_kind_is_named() {
        for value in ["\"2\"", "-1"] {
            let error = plan(
                Path::new("/c/config.toml"),
                Some(&format!("version = {value}\n")),
            )
            .unwrap_err();
            assert!(error.to_string().contains(value), "{error}");
        }
    }

    #[test]
    fn the_command_line_names_the_configuration() {
        for (line, path) in [
            ("/usr/bin/containerd\0", DEFAULT_CONFIG),
            (
                "containerd\0-c\0/var/k3s/config.toml\0-a\0/run/s\0",
                "/var/k3s/config.toml",
            ),
            ("containerd\0--config=/c.toml\0", "/c.toml"),
        ] {
            assert_eq!(config_path(line), Path::new(path));
        }
    }

    #[test]
    fn the_unit_is_found_in_either_cgroup_version() {
        assert_eq!(
            unit("0::/system.slice/containerd.service\n").unwrap(),
            "containerd.service"
        );
        assert_eq!(
            unit("12:memory:/docker/ab\n1:name=systemd:/docker/ab/system.slice/k3s.service\n")
                .unwrap(),
            "k3s.service"
        );
        assert_eq!(unit("0::/\n"), None);
    }

    #[test]
    fn versions_are_read() {
        for (output, number) in [
            (
                "containerd github.com/containerd/containerd/v2 v2.2.9 abc",
                Some((2, 2)),
            ),
            ("containerd containerd.io 1.7.12 71909c1", Some((1, 7))),
            (
                "containerd github.com/containerd/containerd/v2 2.0.0-rc.1",
                Some((2, 0)),
            ),
            (
                "containerd github.com/containerd/containerd/v2 abcdef",
                None,
            ),
        ] {
            assert_eq!(Version::parse(output).number, number, "{output}");
        }
    }

    #[test]
    fn the_containerd_of_a_container_is_none_of_the_host() {
        let processes = tempfile::tempdir().unwrap();
        let process = |pid: &str, namespace: &str, command: &str| {
            let directory = processes.path().join(pid);
            fs::create_dir_all(directory.join("ns")).unwrap();
            std::os::unix::fs::symlink(namespace, directory.join("ns/mnt")).unwrap();
            std::os::unix::fs::symlink("/usr/bin/containerd", directory.join("exe")).unwrap();
            fs::write(directory.join("comm"), command).unwrap();
            fs::write(directory.join("cmdline"), "containerd\0").unwrap();
            fs::write(
                directory.join("cgroup"),
                "0::/system.slice/containerd.service\n",
            )
            .unwrap();
        };
        process("1", "mnt:[1]", "systemd\n");
        process("12", "mnt:[2]", "containerd\n");
        let host = Host::at(Path::new("/nowhere"), processes.path());
        assert!(matches!(Process::find(&host), Err(Error::NotRunning)));

        process("34", "mnt:[1]", "containerd\n");
        let found = Process::find(&host).unwrap();
        assert_eq!(found.pid, 34);
    }

    #[test]
    fn containerd_is_restarted_once_for_a_change_and_until_it_succeeds() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path(), Path::new("/nowhere"));
        let process = Process {
            pid: 34,
            program: "/usr/bin/containerd".into(),
            config: DEFAULT_CONFIG.into(),
            unit: None,
        };
        let turn = || Configurator::default().write(&host, &process, "{}", || Ok(()));
        assert!(turn().unwrap());
        assert!(turn().unwrap(), "the restart failed");
        Configurator::restarted(&host).unwrap();
        assert!(!turn().unwrap());

        let drop_in = host.path("/etc/containerd/conf.d").join(FILE);
        let clock_was_ahead = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
        fs::File::open(&drop_in)
            .unwrap()
            .set_modified(clock_was_ahead)
            .unwrap();
        assert!(!turn().unwrap());

        let told = || Configurator::default().write(&host, &process, "{\"more\": 1}", || Ok(()));
        assert!(told().unwrap(), "containerd asks when it starts");
        Configurator::restarted(&host).unwrap();
        assert!(!told().unwrap());

        fs::write(&drop_in, "version = 3\n").unwrap();
        let refused = Configurator::default().write(&host, &process, "{}", || Err(Error::Ignored));
        assert!(matches!(refused, Err(Error::Ignored)));
        assert!(
            !host.path(RESTART_DUE).exists(),
            "what was taken back needs no restart"
        );
        assert!(turn().unwrap());
    }
}
