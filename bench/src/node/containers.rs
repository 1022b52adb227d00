//! Lives of containers: by `ctr`, as people have them, and by a shim alone, asked as containerd asks it.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, Mount, ShutdownRequest, StartRequest,
    WaitRequest,
};
use containerd_shim_protos::{Client, TaskClient};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ttrpc::context::{Context, with_timeout};

use super::rate::repeated;
use super::{micros, output};

/// containerd's own namespace of what is made here.
const NAMESPACE: &str = "sock-bench";
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// Bundles and the image's files.
const WORK: &str = "/run/sock-bench";
/// Longest that a shim may take to answer, in nanoseconds.
const PATIENCE: i64 = 10_000_000_000;

/// One after the other by `ctr run --rm`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Runs {
    /// Each in turn: what `ctr` is told of the runtime.
    pub runtimes: Vec<Vec<String>>,
    /// The image, which the node has.
    pub image: String,
    /// Of each runtime.
    pub times: usize,
}

/// The same, several at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Starts {
    /// What `ctr` is told of the runtime.
    pub runtime: Vec<String>,
    /// The image, which the node has.
    pub image: String,
    /// How many at once.
    pub at_once: usize,
    /// For how long.
    pub seconds: usize,
}

/// One after the other by shims.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Lives {
    /// Programs, each in turn.
    pub shims: Vec<PathBuf>,
    /// The image, which the node has.
    pub image: String,
    /// Of each shim.
    pub times: usize,
}

/// What a shim took, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Life {
    /// From the start of its program to its answer to `Start`.
    pub start: u64,
    /// From `Kill` of the container's process to the answer to `Delete`.
    pub stop: u64,
}

/// The steps of a container's start with what each took, in microseconds; those within another are indented.
pub type Profile = Vec<(String, u64)>;

fn ctr(arguments: &[&str]) -> Result<()> {
    let ended = Command::new("ctr")
        .args(["--namespace", "k8s.io"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("running ctr")?;
    ensure!(
        ended.status.success(),
        "ctr {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&ended.stderr).trim()
    );
    Ok(())
}

fn once(runtime: &[String], image: &str, id: &str) -> Result<()> {
    let mut arguments = vec!["run", "--rm"];
    arguments.extend(runtime.iter().map(String::as_str));
    arguments.extend([image, id, "true"]);
    ctr(&arguments)
}

/// Microseconds of each, by runtime.
///
/// # Errors
/// If one of them fails.
pub fn runs(runs: &Runs) -> Result<Vec<Vec<u64>>> {
    let mut took = vec![Vec::with_capacity(runs.times); runs.runtimes.len()];
    // The first of each finds caches cold.
    for time in 0..=runs.times {
        for (runtime, took) in runs.runtimes.iter().zip(&mut took) {
            let begin = Instant::now();
            once(runtime, &runs.image, &format!("sock-bench-{time}"))?;
            if time > 0 {
                took.push(micros(begin.elapsed()));
            }
        }
    }
    Ok(took)
}

/// How many ended in each second.
///
/// # Errors
/// If one of them fails.
pub fn starts(starts: &Starts) -> Result<Vec<u64>> {
    repeated(starts.at_once, starts.seconds, |number| {
        once(
            &starts.runtime,
            &starts.image,
            &format!("sock-bench-{number}"),
        )
    })
}

/// Of the first shim, which says what it does.
///
/// # Errors
/// If it does not answer, refuses, or says nothing.
pub fn profiles(lives: &Lives) -> Result<Vec<Profile>> {
    let image = Image::mounted(&lives.image)?;
    let shim = lives.shims.first().context("a shim")?;
    let life = |time| Ok(life(shim, &image, &format!("profile-{time}"), true)?.1);
    // The first finds caches cold.
    life(0)?;
    (1..=lives.times).map(life).collect()
}

/// Of each shim.
///
/// # Errors
/// If one of them does not answer, or refuses.
pub fn lives(lives: &Lives) -> Result<Vec<Vec<Life>>> {
    let image = Image::mounted(&lives.image)?;
    let mut found = vec![Vec::with_capacity(lives.times); lives.shims.len()];
    for time in 0..=lives.times {
        for (shim, found) in lives.shims.iter().zip(&mut found) {
            let (life, _) = life(shim, &image, &format!("life-{time}"), false)
                .with_context(|| shim.display().to_string())?;
            if time > 0 {
                found.push(life);
            }
        }
    }
    Ok(found)
}

/// The files of an image, until it is dropped.
struct Image(PathBuf);

impl Image {
    fn mounted(name: &str) -> Result<Image> {
        // containerd remembers for a while what was mounted where.
        let at = Path::new(WORK).join(format!("image-{}", std::process::id()));
        fs::create_dir_all(&at)?;
        let path = at.to_str().context("a path")?;
        ctr(&["images", "mount", name, path])?;
        Ok(Image(at))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let path = self.0.display().to_string();
        if let Err(error) = ctr(&["images", "unmount", "--rm", &path]) {
            eprintln!("{path} stays: {error:#}");
        }
        // Nothing is in it any more.
        let _ = fs::remove_dir_all(WORK);
    }
}

/// A container that does nothing, and its bundle.
fn bundle(id: &str) -> Result<PathBuf> {
    let bundle = Path::new(WORK).join(id);
    for part in ["rootfs", "upper", "work"] {
        fs::create_dir_all(bundle.join(part))?;
    }
    let mut spec: Value = serde_json::from_str(&output("ctr", &["oci", "spec"])?)?;
    spec["process"]["args"] = json!(["/bin/sleep", "600"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
    fs::write(bundle.join("config.json"), spec.to_string())?;
    Ok(bundle)
}

fn life(shim: &Path, image: &Image, id: &str, traced: bool) -> Result<(Life, Profile)> {
    let bundle = bundle(id)?;
    let run = |action: &str| {
        let mut command = Command::new(shim);
        command
            .args(["-namespace", NAMESPACE, "-id", id, "-address", CONTAINERD])
            .args(["-publish-binary", "/usr/local/bin/containerd"])
            .arg("-bundle")
            .arg(&bundle)
            .arg(action)
            .current_dir(&bundle)
            .env("TTRPC_ADDRESS", format!("{CONTAINERD}.ttrpc"))
            .env("GRPC_ADDRESS", CONTAINERD)
            .env("NAMESPACE", NAMESPACE)
            .env("MAX_SHIM_VERSION", "2")
            .stdin(Stdio::null());
        if traced {
            command.env("SOCK_LOG", "debug");
        }
        command
    };
    let mut rootfs = Mount::new();
    "overlay".clone_into(&mut rootfs.type_);
    "overlay".clone_into(&mut rootfs.source);
    let part = |name: &str| bundle.join(name).display().to_string();
    rootfs.options = vec![
        format!("lowerdir={}", image.0.display()),
        format!("upperdir={}", part("upper")),
        format!("workdir={}", part("work")),
    ];
    let mut create = CreateTaskRequest::new();
    id.clone_into(&mut create.id);
    create.bundle = bundle.display().to_string();
    create.rootfs = vec![rootfs];

    // containerd reads a shim's log here.
    let log = bundle.join("log");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::RWXU)?;
    let mut log = File::options().read(true).write(true).open(&log)?;

    let begin = Instant::now();
    let started = run("start").stderr(Stdio::inherit()).output()?;
    let answered = micros(begin.elapsed());
    ensure!(started.status.success(), "start: {}", started.status);
    let address = address(&String::from_utf8_lossy(&started.stdout))?;
    let task = TaskClient::new(Client::connect(&address).context(address)?);
    let stopped = (|| {
        task.create(context(), &create).context("Create")?;
        let created = micros(begin.elapsed());
        let mut start = StartRequest::new();
        id.clone_into(&mut start.id);
        task.start(context(), &start).context("Start")?;
        let start = micros(begin.elapsed());

        let begin = Instant::now();
        let mut kill = KillRequest::new();
        id.clone_into(&mut kill.id);
        kill.signal = libc::SIGKILL.unsigned_abs();
        task.kill(context(), &kill).context("Kill")?;
        let mut wait = WaitRequest::new();
        id.clone_into(&mut wait.id);
        task.wait(context(), &wait).context("Wait")?;
        let mut delete = DeleteRequest::new();
        id.clone_into(&mut delete.id);
        task.delete(context(), &delete).context("Delete")?;
        let stop = micros(begin.elapsed());
        let times = [answered, created, start];
        let profile = if traced {
            profile(times, &said(&mut log)?)?
        } else {
            Profile::new()
        };
        Ok((Life { start, stop }, profile))
    })();
    let mut shutdown = ShutdownRequest::new();
    id.clone_into(&mut shutdown.id);
    // It ends before it answers.
    let _ = task.shutdown(context(), &shutdown);
    run("delete").stdout(Stdio::null()).status()?;
    // What a shim has mounted for the whole node to see, where it does.
    let _ = rustix::mount::unmount(bundle.join("rootfs"), rustix::mount::UnmountFlags::DETACH);
    fs::remove_dir_all(&bundle).with_context(|| bundle.display().to_string())?;
    stopped
}

/// What is in a pipe now.
fn said(log: &mut File) -> Result<String> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    fcntl_setfl(&*log, fcntl_getfl(&*log)? | OFlags::NONBLOCK)?;
    let mut bytes = Vec::new();
    match log.read_to_end(&mut bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error.into()),
        _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

/// Of a start: when its program, `Create` and `Start` had been answered, and what the shim said.
fn profile([answered, created, started]: [u64; 3], said: &str) -> Result<Profile> {
    let line = |of: &str| {
        let mut lines = said.lines();
        lines
            .find(|line| line.contains(of))
            .with_context(|| format!("the shim did not say {of:?}: {said}"))
    };
    let row = |depth: usize, name: &str, micros| (format!("{}{name}", "  ".repeat(depth)), micros);
    let steps = |line: &str, list: &str, depth: usize| {
        let steps = crate::trace::listed(line, list)?;
        anyhow::Ok(
            steps
                .into_iter()
                .map(move |(name, micros)| row(depth, &name, micros)),
        )
    };
    let create = line("created (microseconds)")?;
    let own: Profile = steps(create, "steps", 1)?.collect();
    let known: u64 = own.iter().map(|(_, micros)| micros).sum();
    let mut profile = vec![
        row(
            0,
            "the program makes the socket, starts the server, answers",
            answered,
        ),
        row(0, "Create", created - answered),
        row(
            1,
            "the server is loaded, the request read",
            (created - answered).saturating_sub(known),
        ),
    ];
    for step in own {
        let is_child = step.0.trim() == "the child";
        profile.push(step);
        if is_child {
            profile.extend(steps(create, "child", 2)?);
        }
    }
    profile.push(row(0, "Start", started - created));
    profile.extend(steps(line("started (microseconds)")?, "steps", 1)?);
    profile.push(row(0, "all", started));
    Ok(profile)
}

fn context() -> Context {
    let mut context = with_timeout(PATIENCE);
    context.add(
        "containerd-namespace-ttrpc".to_owned(),
        NAMESPACE.to_owned(),
    );
    context
}

/// What a shim says to `start`: an address, or a document with one.
fn address(reply: &str) -> Result<String> {
    let reply = reply.trim();
    if !reply.starts_with('{') {
        return Ok(reply.to_owned());
    }
    let document: Value = serde_json::from_str(reply)?;
    let address = document["address"].as_str();
    Ok(address.context("the reply has no address")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_the_steps_of_shim_and_child() {
        let said = concat!(
            "T DEBUG shim: shim started id=\"a\"\n",
            "T DEBUG shim: created (microseconds) container=\"a\" steps=[(\"clone\", 300), (\"the child\", 500)] ",
            "child=[(\"mounts\", 400)]\n",
            "T DEBUG shim: started (microseconds) container=\"a\" steps=[(\"the program runs\", 700)]\n",
        );
        let found = profile([1000, 3000, 4000], said).unwrap();
        let found: Vec<(&str, u64)> = found.iter().map(|(name, took)| (&**name, *took)).collect();
        assert_eq!(
            found,
            [
                (
                    "the program makes the socket, starts the server, answers",
                    1000
                ),
                ("Create", 2000),
                ("  the server is loaded, the request read", 1200),
                ("  clone", 300),
                ("  the child", 500),
                ("    mounts", 400),
                ("Start", 1000),
                ("  the program runs", 700),
                ("all", 4000),
            ]
        );
        assert!(profile([1, 2, 3], "nothing").is_err());
    }

    #[test]
    fn both_forms_of_a_reply_have_an_address() {
        let document = r#"{"version":3,"address":"unix:///run/a","protocol":"ttrpc"}"#;
        for reply in [document, "unix:///run/a\n"] {
            assert_eq!(address(reply).ok().as_deref(), Some("unix:///run/a"));
        }
        assert!(address("{}").is_err());
    }
}
