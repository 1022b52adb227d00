//! A node of the cluster, seen from inside: processes, cgroups, mounts.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{get, output, program};

/// Prints a line a process: number, program, namespaces, cgroups, status, arguments; parts end with a tab.
const DESCRIBE: &str = r#"
describe() {
  [ -r "/proc/$1/status" ] || return 0
  printf '%s\t%s\t' "$1" "$(readlink "/proc/$1/exe")"
  for each in user pid net mnt; do printf '%s\t' "$(readlink "/proc/$1/ns/$each")"; done
  printf '%s\t' "$(tr '\n' ';' <"/proc/$1/cgroup")"
  printf '%s\t' "$(grep -E '^(PPid|NSpid|Uid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters):' "/proc/$1/status" | tr '\t' ' ' | tr '\n' ';')"
  tr '\0\n\t' '   ' <"/proc/$1/cmdline"
  echo
}
"#;

/// How the name of the node that `e2e/guest/node` adds ends: a machine of its own, whose shell is a pod.
const GUEST: &str = "-guest";

/// A node of the cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Its name, which is also its container's if it is kind's.
    pub name: String,
}

/// A process on a node, as the node numbers it.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number in the node's PID namespace.
    pub pid: u32,
    /// The file it runs.
    pub exe: String,
    /// Its user namespace.
    pub user_namespace: String,
    /// Its PID namespace.
    pub pid_namespace: String,
    /// Its network namespace.
    pub network_namespace: String,
    /// Its mount namespace.
    pub mount_namespace: String,
    /// Its path in each cgroup hierarchy that accounts, by the hierarchy's controllers.
    pub cgroups: HashMap<String, String>,
    /// Lines of `/proc/PID/status`.
    pub status: HashMap<String, String>,
    /// Its arguments.
    pub arguments: String,
}

impl Process {
    /// Whether it is a Python interpreter.
    pub fn is_interpreter(&self) -> bool {
        Path::new(&self.exe)
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("python"))
    }

    /// Its path in the hierarchy that freezes.
    ///
    /// # Errors
    /// There is none.
    pub fn freezer(&self) -> Result<&str> {
        let found = self.cgroups.get("freezer").or_else(|| self.cgroups.get(""));
        let found = found.with_context(|| format!("a freezer for process {}", self.pid))?;
        Ok(found)
    }

    /// A line of its status.
    ///
    /// # Errors
    /// There is no such line.
    pub fn status(&self, name: &str) -> Result<&str> {
        let value = self.status.get(name).map(String::as_str);
        value.with_context(|| format!("{name} in the status of process {}", self.pid))
    }

    /// All capability sets in one number: zero only if each is empty.
    ///
    /// # Errors
    /// The status has no such lines.
    pub fn capabilities(&self) -> Result<u64> {
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
            .iter()
            .try_fold(0, |all, name| {
                Ok(all | u64::from_str_radix(self.status(name)?, 16)?)
            })
    }
}

/// The nodes that have sock, in the order of their names.
///
/// # Errors
/// `kubectl` fails.
pub fn workers() -> Result<Vec<Node>> {
    let list = get(&["nodes", "--selector=sock.dev/node=ready"])?;
    let items = list["items"].as_array().context("a list of nodes")?;
    let mut nodes: Vec<Node> = items
        .iter()
        .filter_map(|node| node["metadata"]["name"].as_str())
        .map(|name| Node {
            name: name.to_owned(),
        })
        .collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    if nodes.len() < 2 {
        bail!(
            "the tests need two nodes with sock, there are {}",
            nodes.len()
        );
    }
    Ok(nodes)
}

impl Node {
    /// The node of a pod.
    ///
    /// # Errors
    /// The pod is on no node yet.
    pub fn of(pod: &Value) -> Result<Node> {
        let name = pod["spec"]["nodeName"].as_str().context("spec.nodeName")?;
        Ok(Node {
            name: name.to_owned(),
        })
    }

    /// Another node than this one.
    ///
    /// # Errors
    /// There is none.
    pub fn other(&self) -> Result<Node> {
        let mut nodes = workers()?.into_iter();
        nodes.find(|node| node != self).context("a second node")
    }

    /// What a shell prints on the node; `$1` and so on are the arguments.
    ///
    /// # Errors
    /// It fails; what it said is in the error.
    pub fn shell(&self, script: &str, arguments: &[&str]) -> Result<String> {
        self.shell_with(script, arguments, None)
    }

    /// The same with standard input.
    ///
    /// # Errors
    /// It fails; what it said is in the error.
    pub fn shell_with(
        &self,
        script: &str,
        arguments: &[&str],
        input: Option<&str>,
    ) -> Result<String> {
        let (client, reach): (_, &[&str]) = if self.name.ends_with(GUEST) {
            let enter = "kube-system exec -i guest-shell -- nsenter -t 1 -m -u -i -n";
            ("kubectl", &["-n", enter])
        } else {
            ("docker", &["exec", "-i", &self.name])
        };
        let reach = reach.iter().flat_map(|part| part.split(' '));
        let mut all: Vec<&str> = reach.chain(["/bin/sh", "-c", script, "sh"]).collect();
        all.extend(arguments);
        output(&mut program(client, &all)?, input)
    }

    /// Puts a file of this machine at a path of the node, with the directories that it lies in.
    ///
    /// # Errors
    /// The file is missing, or the node does not answer.
    pub fn put(&self, file: &str, at: &str) -> Result<()> {
        ensure!(
            Path::new(file).is_file(),
            "{file} is missing: make test-images"
        );
        self.shell("mkdir -p \"$(dirname \"$1\")\"", &[at])?;
        let to = format!("{}:{at}", self.name);
        output(&mut program("docker", &["cp", file, &to])?, None)?;
        Ok(())
    }

    /// Processes by number; those that are gone are left out.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn processes(&self, pids: &[u32]) -> Result<Vec<Process>> {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let pids: Vec<&str> = pids.iter().map(String::as_str).collect();
        let script = format!("{DESCRIBE}\nfor pid in \"$@\"; do describe \"$pid\"; done");
        parse(&self.shell(&script, &pids)?)
    }

    /// Every process in the cgroups of a pod, in the hierarchies that account (see [`Process::cgroups`]).
    ///
    /// # Errors
    /// The node does not answer.
    pub fn processes_of(&self, pod: &Value) -> Result<Vec<Process>> {
        let uid = pod["metadata"]["uid"].as_str().context("metadata.uid")?;
        let script = format!(
            r#"{DESCRIBE}
            idle=$(awk '$3 == "cgroup" {{ one = 1 }} $3 == "cgroup2" && $2 ~ "^/sys/fs/cgroup" {{ two = $2 }} END {{ if (one) print two }}' /proc/mounts)
            for pid in $(find /sys/fs/cgroup -path "${{idle:-none}}" -prune -o -name cgroup.procs \( -path "*pod$1*" -o -path "*pod$2*" \) \
              -exec cat {{}} + 2>/dev/null | sort -un); do describe "$pid"; done"#
        );
        parse(&self.shell(&script, &[uid, &with_underscores(uid)])?)
    }

    /// The interpreters among them.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn interpreters_of(&self, pod: &Value) -> Result<Vec<Process>> {
        let mut processes = self.processes_of(pod)?;
        processes.retain(Process::is_interpreter);
        Ok(processes)
    }

    /// The zygote of a pool. What it forks lives one PID namespace deeper.
    ///
    /// # Errors
    /// The pool has none now.
    pub fn zygote_of(&self, pool: &Value) -> Result<Process> {
        let found = self.interpreters_of(pool)?.into_iter().filter_map(|one| {
            let depth = one.status("NSpid").ok()?.split_whitespace().count();
            Some((depth, one))
        });
        let found = found.min_by_key(|(depth, one)| (*depth, one.pid));
        found
            .map(|(_, one)| one)
            .context("a zygote in the pool's pod")
    }

    /// Whether an idle leaf is kept from running: its cgroup is frozen, or, on version 1, it is stopped.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn is_frozen(&self, process: &Process) -> Result<bool> {
        let script = r#"
            if [ -e "/sys/fs/cgroup/freezer$1/freezer.state" ]; then grep -c '^State:.T (stopped)' "/proc/$2/status"
            else grep -c 'frozen 1' "/sys/fs/cgroup$1/cgroup.events"; fi || true"#;
        let pid = process.pid.to_string();
        Ok(self.shell(script, &[process.freezer()?, &pid])?.trim() == "1")
    }

    /// Copies a program of the tests to the node, if it is not there, and returns its path.
    ///
    /// # Errors
    /// `docker cp` fails.
    pub fn install(&self, binary: &Path) -> Result<String> {
        let name = binary.file_name().context("a program's name")?;
        let path = format!("/usr/local/bin/{}", name.to_string_lossy());
        let from = binary.to_string_lossy();
        let to = format!("{}:{path}", self.name);
        output(&mut program("docker", &["cp", &from, &to])?, None)?;
        Ok(path)
    }
}

/// The UID of a pod as systemd's cgroup driver writes it.
fn with_underscores(uid: &str) -> String {
    uid.replace('-', "_")
}

/// Whether a path among cgroups is of the pod with this UID.
pub fn is_of_pod(path: &str, uid: &str) -> bool {
    path.contains(uid) || path.contains(&with_underscores(uid))
}

/// The lines of `/proc/PID/cgroup` whose hierarchies account: where version 1 has the controllers, the
/// `0::` line names one without, and membership there means nothing.
fn accounting(lines: &[&str]) -> HashMap<String, String> {
    let version_1 = lines.iter().any(|line| !line.starts_with("0::"));
    lines
        .iter()
        .filter(|line| !(version_1 && line.starts_with("0::")))
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
        })
        .collect()
}

fn parse(lines: &str) -> Result<Vec<Process>> {
    lines
        .lines()
        .map(|line| {
            let parts: Vec<&str> = line.splitn(9, '\t').collect();
            let [pid, exe, user, pids, net, mount, cgroups, status, arguments] = parts[..] else {
                bail!("a process is described by {line:?}");
            };
            let cgroups: Vec<&str> = cgroups.split_terminator(';').collect();
            let status = status
                .split(';')
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect();
            Ok(Process {
                pid: pid.parse()?,
                exe: exe.to_owned(),
                user_namespace: user.to_owned(),
                pid_namespace: pids.to_owned(),
                network_namespace: net.to_owned(),
                mount_namespace: mount.to_owned(),
                cgroups: accounting(&cgroups),
                status,
                arguments: arguments.trim().to_owned(),
            })
        })
        .collect()
}
