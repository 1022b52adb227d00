//! Containers on this machine's kernel: as root, without containerd.
//!
//! The tests run one after the other on the main thread, since [`sock_sandbox::launch`] forks a process that must have
//! no other.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that cannot go on says where"
)]

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use sock_sandbox::cgroup::{Cgroup, Expendable, Hierarchies, Location, OomWatch};
use sock_sandbox::root::{Root, RootMount};
use sock_sandbox::{
    ExecPlan, HolderKind, Launched, Outer, Plan, Program, Progress, Stdio, UserMapping, exec,
    launch,
};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests: &[(&str, fn())] = &[
        ("a_program_runs_and_its_status_is_told", status_is_told),
        ("a_container_sees_itself_alone", sees_itself_alone),
        (
            "a_user_without_privileges_stays_one",
            user_without_privileges,
        ),
        ("paths_are_masked_and_read_only", paths_are_masked),
        ("a_link_of_the_image_leads_no_mount_out", links_stay_inside),
        (
            "a_root_whose_mounts_are_shared_is_not_mounted_outside",
            shared_root,
        ),
        (
            "a_recursive_read_only_mount_is_so_to_the_last",
            recursive_read_only,
        ),
        ("a_profile_forbids_a_system_call", profile_forbids),
        ("hooks_run_at_their_points_and_places", hooks_at_points),
        (
            "a_label_is_not_written_to_what_an_image_has_at_proc",
            label_needs_proc,
        ),
        ("a_missing_program_is_named", missing_program),
        ("exec_joins_the_container_and_its_cgroup", exec_joins),
        ("a_terminal_is_the_containers_own", terminal),
        ("a_cgroup_limits_freezes_and_kills", cgroup),
        (
            "a_cgroup_of_version_2_says_which_devices_are_opened",
            devices_of_version_2,
        ),
        (
            "an_end_for_want_of_memory_is_known_when_its_cgroup_is_gone",
            out_of_memory,
        ),
        (
            "a_cgroup_that_others_have_removed_in_part_can_be_entered",
            removed_in_part,
        ),
        (
            "a_suspended_process_does_not_run_and_can_be_killed",
            suspended,
        ),
        (
            "what_nobody_needs_is_killed_first_for_want_of_memory",
            expendable,
        ),
        (
            "a_holder_keeps_namespaces_and_shows_no_file_of_the_host",
            holder,
        ),
        ("a_holder_is_traced_by_nobody_of_its_pod", traced_holder),
        (
            "a_holder_of_descendants_outlives_its_signal",
            holder_of_descendants,
        ),
        (
            "a_user_namespace_cannot_lift_a_read_only_mount",
            locked_flags,
        ),
        (
            "a_nested_user_namespace_belongs_to_nobody_who_runs",
            nested_namespaces,
        ),
        ("a_holder_waits_for_what_is_nested_in_it", last_descendant),
        (
            "a_container_may_have_users_of_its_own_that_are_nobody_on_the_host",
            users_of_its_own,
        ),
        ("an_image_may_have_a_hundred_layers", many_layers),
        ("a_container_is_scheduled_as_it_says", scheduled),
        ("an_abandoned_child_ends", abandoned),
    ];
    let trials = tests.iter().map(|(name, test)| {
        let test = *test;
        Trial::test(*name, move || {
            // A failed assertion unwinds only as far as this.
            std::panic::catch_unwind(test).map_err(|e| {
                let text = e
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| e.downcast_ref::<&str>().map(|s| (*s).to_string()));
                Failed::from(text.unwrap_or_else(|| "panicked".into()))
            })
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// A root file system of busybox, removed at the end.
struct Image(tempfile::TempDir);

impl Image {
    fn new() -> Self {
        assert!(
            Path::new("/bin/busybox").exists(),
            "these tests need /bin/busybox: install busybox-static"
        );
        let root = tempfile::tempdir().unwrap();
        for directory in ["bin", "proc", "sys", "dev", "tmp", "etc", "data"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.path().join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "id", "ls", "mount", "sleep", "hostname", "touch", "tty", "stat",
            "readlink", "dd", "unshare", "true",
        ] {
            std::os::unix::fs::symlink("busybox", root.path().join("bin").join(applet)).unwrap();
        }
        std::os::unix::fs::chown(root.path(), Some(0), Some(0)).unwrap();
        fs::set_permissions(
            root.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        Self(root)
    }
    fn root(&self) -> Root {
        Root::Mounts {
            target: self.0.path().into(),
            mounts: Vec::new(),
        }
    }
}

/// A specification like containerd's, with `script` for a shell.
fn spec(script: &str) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "hostname": "inside",
        "root": {"path": "rootfs"},
        "process": {
            "cwd": "/", "args": ["sh", "-c", script], "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0}, "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid"]}
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}]}
    })
}

fn parsed(spec: &Value) -> Spec {
    serde_json::from_value(spec.clone()).unwrap()
}

fn pipe() -> (fs::File, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (reader.into(), writer)
}

fn plan(spec: &Spec, root: Root, program: Program) -> Plan<'_> {
    Plan {
        spec,
        root,
        program,
        stdio: Stdio::default(),
        extra: Vec::new(),
        mapping: None,
        outer: None,
        nodev_root: false,
        identity: None,
        cgroups: Vec::new(),
    }
}

/// Brings a child to its program.
fn go(child: &Launched) -> Result<Option<OwnedFd>, String> {
    go_in(child, &[])
}

/// The same, once it has moved itself into a cgroup.
fn go_in(child: &Launched, entrances: &[OwnedFd]) -> Result<Option<OwnedFd>, String> {
    child.proceed_in(entrances).unwrap();
    let terminal = match child.wait_progress().unwrap() {
        Progress::Created(made) => made.terminal,
        Progress::Failed(e) => return Err(e.to_string()),
        Progress::Started => return Err("ended early".into()),
        Progress::Mounted => return Err("no hook asks for that".into()),
    };
    child.start().unwrap();
    match child.wait_progress().unwrap() {
        Progress::Started => Ok(terminal),
        Progress::Failed(e) => Err(e.to_string()),
        Progress::Created(_) | Progress::Mounted => Err("created twice".into()),
    }
}

fn hooks_at_points() {
    let image = Image::new();
    let seen = tempfile::tempdir().unwrap();
    let seen_at = seen.path().display().to_string();
    let hook =
        |script: String| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 10}]);
    let root = image.0.path().display().to_string();
    // In the container's mounts, before they are its root: its /data is below the root, and files of the host are there.
    let outside = format!("ls {root}/data >{seen_at}/outside && echo $$ >>{seen_at}/outside");
    let inside = "/bin/busybox touch /tmp/hook && exit 0".to_owned();
    let mut spec = spec("ls /tmp; exit 0");
    spec["hooks"] = json!({
        "prestart": hook("exit 1".into()), "createContainer": hook(outside), "startContainer": hook(inside),
    });
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/etc", "options": ["rbind", "ro"],
    }));
    let spec: Spec = serde_json::from_value(spec).unwrap();
    let (mut out, theirs) = pipe();
    let mut plan = plan(&spec, image.root(), Program::Specified);
    plan.stdio.stdout = Some(theirs);
    plan.identity = Some(sock_sandbox::hook::Identity {
        id: "c".into(),
        bundle: "/".into(),
    });
    let child = launch(plan).unwrap();
    child.proceed().unwrap();
    assert!(matches!(child.wait_progress().unwrap(), Progress::Mounted));
    assert!(!seen.path().join("outside").exists(), "it waits");
    // The caller runs those of the host.
    assert!(go(&child).unwrap().is_none());
    assert_eq!(wait(child.pid), 0);
    let outside = fs::read_to_string(seen.path().join("outside")).unwrap();
    assert!(outside.contains("passwd"), "{outside}");
    let number: i32 = outside.lines().last().unwrap().parse().unwrap();
    assert!(number < 10, "in the container's PID namespace: {number}");
    let mut said = String::new();
    out.read_to_string(&mut said).unwrap();
    assert!(said.lines().any(|line| line == "hook"), "{said}");
}

fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: a child of this process that has not been waited for.
    unsafe { libc::kill(pid, signal) };
}

/// Runs a specification to its end; its status and what it wrote.
fn run(image: &Image, spec: &Value) -> (i32, String) {
    run_on(image.root(), spec)
}

fn run_on(root: Root, spec: &Value) -> (i32, String) {
    let spec = parsed(spec);
    let (mut reader, writer) = pipe();
    let mut plan = plan(&spec, root, Program::Specified);
    let own = i32::try_from(std::process::id()).unwrap();
    let own = Cgroup::of_process(&Hierarchies::detect().unwrap(), own).unwrap();
    plan.cgroups = own.version_1_directories();
    plan.stdio.stderr = Some(writer.try_clone().unwrap());
    plan.stdio.stdout = Some(writer);
    let child = launch(plan).unwrap();
    if let Err(e) = go(&child) {
        wait(child.pid);
        return (-1, e);
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (wait(child.pid), text)
}

fn status_is_told() {
    let image = Image::new();
    assert_eq!(run(&image, &spec("echo out; exit 7")), (7, "out\n".into()));
    let spec = parsed(&spec("sleep 100"));
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    go(&child).unwrap();
    kill(child.pid, libc::SIGKILL);
    assert_eq!(wait(child.pid), 128 + 9);
}

fn sees_itself_alone() {
    let image = Image::new();
    let (status, text) = run(
        &image,
        &spec(
            "echo pid $$; hostname; ls /proc | grep -c '^[0-9]*$' || true; ls /sys/class/net; ls /; readlink /proc/self/ns/net",
        ),
    );
    assert_eq!(status, 0, "{text}");
    assert!(text.starts_with("pid 1\ninside\n"), "{text}");
    assert!(text.contains("\nlo\n"), "{text}");
    assert!(!text.contains("eth"), "{text}");
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    assert!(!text.contains(&*ours.to_string_lossy()), "{text}");
}

fn user_without_privileges() {
    let image = Image::new();
    let mut wanted = spec(
        "id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; touch /etc/x 2>&1; ulimit -n",
    );
    wanted["process"]["user"] = json!({"uid": 1234, "gid": 2345, "additionalGids": [3456]});
    wanted["process"]["capabilities"] = json!({});
    wanted["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
    let (_, text) = run(&image, &wanted);
    assert!(text.starts_with("1234\n2345\n2345 3456\n"), "{text}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            text.contains(&format!("{set}:\t0000000000000000")),
            "{text}"
        );
    }
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    assert!(text.contains("Permission denied"), "{text}");
    assert!(text.ends_with("77\n"), "{text}");
}

fn paths_are_masked() {
    let image = Image::new();
    let mut wanted = spec(
        "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; echo 1 2>&1 >/proc/sys/kernel/domainname; touch /x 2>&1; ls /nosuch 2>&1; true",
    );
    wanted["linux"]["maskedPaths"] =
        json!(["/proc/keys", "/sys/firmware", "/proc/of-another-kernel"]);
    wanted["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    wanted["root"]["readonly"] = json!(true);
    let (status, text) = run(&image, &wanted);
    assert_eq!(status, 0, "{text}");
    assert!(text.starts_with("0\n0\n"), "{text}");
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
}

fn links_stay_inside() {
    let image = Image::new();
    let outside = tempfile::tempdir().unwrap();
    let target = image.0.path().join("trap");
    std::os::unix::fs::symlink(outside.path(), &target).unwrap();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("seen"), "").unwrap();
    let mut wanted = spec("ls /trap/sub");
    wanted["mounts"].as_array_mut().unwrap().push(json!({"destination": "/trap/sub", "type": "bind", "source": source.path(), "options": ["rbind", "ro"]}));
    let (status, text) = run(&image, &wanted);
    assert_eq!((status, text.as_str()), (0, "seen\n"));
    assert_eq!(
        fs::read_dir(outside.path()).unwrap().count(),
        0,
        "a directory was made outside of the root"
    );
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&*outside.path().to_string_lossy())
    );
}

/// A tmpfs of the host's that is shared, until the end.
struct Shared(PathBuf);

impl Shared {
    fn new(at: &Path) -> Shared {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(at, MountPropagationFlags::SHARED).unwrap();
        Shared(at.into())
    }

    fn mounts_below(&self) -> usize {
        let below = format!("{}/", self.0.display());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        points.filter(|point| point.starts_with(&below)).count()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

fn shared_root() {
    let image = Image::new();
    let place = tempfile::tempdir().unwrap();
    let host = Shared::new(place.path());
    let (target, volume) = (place.path().join("rootfs"), place.path().join("volume"));
    for directory in [&target, &volume] {
        fs::create_dir(directory).unwrap();
    }
    let volume = Shared::new(&volume);
    let before = host.mounts_below();
    fs::create_dir(volume.0.join("inner")).unwrap();
    let mut wanted = spec("mount -t tmpfs inner /data/inner && touch /data/inner/seen && cat");
    wanted["linux"]["rootfsPropagation"] = json!("rshared");
    for kind in ["bounding", "effective", "permitted"] {
        wanted["process"]["capabilities"][kind] = json!(["CAP_SYS_ADMIN"]);
    }
    wanted["mounts"].as_array_mut().unwrap().push(json!({"destination": "/data", "type": "bind", "source": volume.0, "options": ["rbind", "rshared"]}));
    let wanted = parsed(&wanted);
    let bind = RootMount {
        kind: "bind".into(),
        source: image.0.path().to_string_lossy().into(),
        options: vec!["rbind".into()],
    };
    let root = Root::Mounts {
        target,
        mounts: vec![bind],
    };
    let (stdin, writer) = pipe();
    let (mut reader, stdout) = pipe();
    let mut plan = plan(&wanted, root, Program::Specified);
    plan.stdio.stdin = Some(stdin.into());
    plan.stdio.stderr = Some(stdout);
    let child = launch(plan).unwrap();
    go(&child).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while !volume.0.join("inner/seen").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let below = host.mounts_below();
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!((wait(child.pid), text.as_str()), (0, ""));
    assert_eq!(
        below,
        before + 1,
        "the container's own mount, and not its root"
    );
    rustix::mount::unmount(volume.0.join("inner"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn recursive_read_only() {
    let image = Image::new();
    let place = tempfile::tempdir().unwrap();
    let volume = Shared::new(place.path());
    fs::create_dir(volume.0.join("inner")).unwrap();
    let _inner = Shared::new(&volume.0.join("inner"));
    for (option, refused) in [("ro", 1), ("rro", 2)] {
        let mut wanted = spec("touch /data/a /data/inner/b 2>&1; true");
        wanted["mounts"].as_array_mut().unwrap().push(json!({"destination": "/data", "type": "bind", "source": volume.0, "options": ["rbind", "rprivate", option]}));
        let (status, text) = run(&image, &wanted);
        let count = text.matches("Read-only file system").count();
        assert_eq!((status, count), (0, refused), "{option}: {text}");
    }
}

fn profile_forbids() {
    let image = Image::new();
    let mut wanted = spec("touch /tmp/a && mount -t tmpfs x /tmp 2>&1; chmod 700 /tmp 2>&1");
    wanted["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71}]});
    std::os::unix::fs::symlink("busybox", image.0.path().join("bin/chmod")).unwrap();
    let (status, text) = run(&image, &wanted);
    assert_eq!(status, 1, "{text}");
    assert!(
        text.contains("Protocol error"),
        "error number 71 is not told: {text}"
    );
}

fn label_needs_proc() {
    let image = Image::new();
    for (key, file) in [
        ("apparmorProfile", "proc/self/attr/apparmor/exec"),
        ("selinuxLabel", "proc/self/attr/exec"),
    ] {
        let mut wanted = spec("true");
        wanted["process"][key] = json!("a_label");
        // A volume of the pod's author in its place.
        wanted["mounts"][0] = json!({"destination": "/proc", "type": "tmpfs", "source": "tmpfs"});
        let (status, text) = run(&image, &wanted);
        assert_eq!(status, -1, "{text}");
        assert!(text.contains("/proc is no proc file system"), "{text}");
        assert!(!image.0.path().join(file).exists());
        wanted = spec("true");
        assert_eq!(run(&image, &wanted).0, 0);
    }
}

fn missing_program() {
    let image = Image::new();
    let mut wanted = spec("");
    wanted["process"]["args"] = json!(["nosuch"]);
    let (status, text) = run(&image, &wanted);
    assert_eq!(status, -1);
    assert_eq!(text, "exec: \"nosuch\": executable file not found in $PATH");
    wanted["process"]["args"] = json!([]);
    let spec = parsed(&wanted);
    let e = launch(plan(&spec, image.root(), Program::Specified)).unwrap_err();
    assert!(e.to_string().contains("process.args"), "{e}");
}

/// A cgroup of its own for a test, removed at the end.
struct TestCgroup(Cgroup);

impl TestCgroup {
    fn new(name: &str, pid: i32, resources: &Value) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let location =
            Location::parse(&format!("/sock-test-{}/{name}", std::process::id())).unwrap();
        let resources = serde_json::from_value(resources.clone()).unwrap();
        let made = runtime.block_on(Cgroup::create(
            &Hierarchies::detect().unwrap(),
            &location,
            pid,
            Some(&resources),
        ));
        let (cgroup, _) = made.unwrap();
        cgroup.add(pid).unwrap();
        Self(cgroup)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let end = Instant::now() + Duration::from_secs(5);
        while self.0.remove().is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        let parent = Location::parse(&format!("/sock-test-{}", std::process::id())).unwrap();
        for hierarchies in [Hierarchies::detect().unwrap(), version_2()] {
            let _ = Cgroup::at(&hierarchies, &parent).remove();
        }
    }
}

fn exec_joins() {
    let image = Image::new();
    let spec = parsed(&spec("sleep 100"));
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    let cgroup = TestCgroup::new("exec", child.pid, &json!({}));
    go(&child).unwrap();
    // The shell becomes it.
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read(format!("/proc/{}/cmdline", child.pid)).unwrap() != b"sleep\x00100\x00" {
        assert!(Instant::now() < end, "the program does not get there");
        std::thread::sleep(Duration::from_millis(1));
    }
    let process = serde_json::from_value(json!({"cwd": "/tmp", "args": ["sh", "-c", "pwd; hostname; cat /proc/1/cmdline; cat >&2; grep -vc /exec$ /proc/self/cgroup; exit 3"], "env": ["PATH=/bin"], "user": {"uid": 5, "gid": 5}})).unwrap();
    // Version 2 is there beside version 1, without controllers and without this cgroup.
    let hierarchies = fs::read_to_string("/proc/self/cgroup").unwrap();
    let elsewhere = hierarchies.lines().count() - cgroup.0.entrances().unwrap().len();
    let (mut reader, writer) = pipe();
    let (input, input_writer) = pipe();
    rustix::io::write(&input_writer, b"typed").unwrap();
    drop(input_writer);
    let other = exec(ExecPlan {
        target: child.pid,
        process: &process,
        linux: None,
        seccomp: None,
        stdio: Stdio {
            stdin: Some(input.into()),
            stdout: Some(writer.try_clone().unwrap()),
            stderr: Some(writer),
        },
        extra: Vec::new(),
    })
    .unwrap();
    go_in(&other, &cgroup.0.entrances().unwrap()).unwrap();
    assert!(cgroup.0.processes().unwrap().contains(&child.pid));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(
        text.replace('\0', " "),
        format!("/tmp\ninside\nsleep 100 typed{elsewhere}\n"),
        "an exec sees the container, and is in its cgroup"
    );
    assert_eq!(wait(other.pid), 3);
    kill(child.pid, libc::SIGKILL);
    assert_eq!(wait(child.pid), 137);
}

fn terminal() {
    let image = Image::new();
    let mut wanted = spec("tty; stat -c %u $(tty); exit 4");
    wanted["process"]["terminal"] = json!(true);
    wanted["process"]["user"] = json!({"uid": 42, "gid": 42});
    let spec = parsed(&wanted);
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    let master = go(&child).unwrap().expect("no terminal was passed");
    let mut text = Vec::new();
    let mut buffer = [0; 256];
    while let Ok(n) = rustix::io::read(&master, &mut buffer) {
        text.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(String::from_utf8_lossy(&text), "/dev/pts/0\r\n42\r\n");
    assert_eq!(wait(child.pid), 4);
}

/// User and system time of a process and of the children that it has waited for (proc_pid_stat(5)).
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    let times = fields.skip(11).take(4);
    times.map(|n| n.parse::<u64>().unwrap()).sum()
}

/// Waits until it has run since it had used `before`.
fn runs_on(pid: i32, before: u64) {
    let end = Instant::now() + Duration::from_secs(10);
    while ticks(pid) == before {
        assert!(Instant::now() < end, "the process does not go on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn cgroup() {
    let image = Image::new();
    // Two megabytes of text.
    let spec = parsed(&spec(
        "a=12345678; for _ in 1 2 3 4 5 6 7 8 9 a b c d e f g h i; do a=$a$a; done; while :; do :; done",
    ));
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    let cgroup = TestCgroup::new(
        "limits",
        child.pid,
        &json!({"memory": {"limit": 32 << 20}, "cpu": {"shares": 512}, "pids": {"limit": 10}}),
    );
    go(&child).unwrap();
    let memory = cgroup.0.controller("memory").unwrap();
    let file = if cgroup.0.unified() {
        "memory.max"
    } else {
        "memory.limit_in_bytes"
    };
    assert_eq!(
        fs::read_to_string(memory.join(file)).unwrap().trim(),
        (32 << 20).to_string()
    );
    let end = Instant::now() + Duration::from_secs(10);
    while cgroup.0.own_memory().unwrap() < 2 << 20 {
        assert!(Instant::now() < end, "{:?}", cgroup.0.own_memory());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(cgroup.0.own_memory().unwrap() < 32 << 20);
    cgroup.0.freeze().unwrap();
    let before = ticks(child.pid);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(ticks(child.pid), before, "a frozen process ran");
    cgroup.0.thaw().unwrap();
    runs_on(child.pid, before);
    cgroup.0.freeze().unwrap();
    cgroup.0.kill().unwrap();
    assert_eq!(wait(child.pid), 137, "a frozen process is killed");
    let directory = memory.to_path_buf();
    drop(cgroup);
    assert!(!directory.exists(), "the cgroup is left");
}

/// As systemd does on version 1, where a scope is in hierarchies that it does not manage.
/// The hierarchy of version 2, also where version 1 has the controllers.
fn version_2() -> Hierarchies {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let second = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let second: Vec<&str> = second.collect();
    let init = fs::read_to_string("/proc/1/cgroup").unwrap();
    Hierarchies::parse(&second.join("\n"), &init).unwrap()
}

fn devices_of_version_2() {
    let hierarchies = version_2();
    let image = Image::new();
    std::os::unix::fs::symlink("busybox", image.0.path().join("bin/mknod")).unwrap();
    // No driver has these numbers: who may open one learns that.
    let mut wanted = spec(
        "for n in 7 8; do mknod /data/$n c 240 $n; cat /data/$n; done; echo >/data/7; cat /dev/null && echo null; \
         until [ -e /data/go ]; do sleep 0.01; done; cat /data/8",
    );
    wanted["process"]["capabilities"] =
        json!({"bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"]});
    let spec = parsed(&wanted);
    let (mut reader, writer) = pipe();
    let mut plan = plan(&spec, image.root(), Program::Specified);
    plan.stdio.stderr = Some(writer.try_clone().unwrap());
    plan.stdio.stdout = Some(writer);
    let child = launch(plan).unwrap();
    let rules = |minor: i64| -> oci_spec::runtime::LinuxResources {
        serde_json::from_value(json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 240, "minor": minor, "access": "r"},
        ]}))
        .unwrap()
    };
    let location = Location::parse(&format!("/sock-test-{}/devices", std::process::id())).unwrap();
    let made = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(Cgroup::create(
            &hierarchies,
            &location,
            child.pid,
            Some(&rules(7)),
        ));
    let (cgroup, entrances) = made.unwrap();
    let cgroup = TestCgroup(cgroup);
    go_in(&child, &entrances).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let mut text = [0; 4096];
    let mut length = 0;
    while !text[..length].ends_with(b"null\n") {
        assert!(Instant::now() < end);
        length += reader.read(&mut text[length..]).unwrap();
    }
    assert_eq!(
        String::from_utf8_lossy(&text[..length]),
        "cat: can't open '/data/7': No such device or address\n\
         cat: can't open '/data/8': Operation not permitted\n\
         sh: can't create /data/7: Operation not permitted\nnull\n"
    );
    // Other rules take the place of these.
    cgroup.0.update(&rules(8)).unwrap();
    fs::write(image.0.path().join("data/go"), "").unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!(
        rest,
        "cat: can't open '/data/8': No such device or address\n"
    );
    wait(child.pid);
}

fn out_of_memory() {
    // The kernel says of the cgroup's end what it says of an end of memory: one must not be taken for the other.
    for (script, expected) in [
        (
            "dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null",
            true,
        ),
        ("sleep 100", false),
    ] {
        let image = Image::new();
        let spec = parsed(&spec(script));
        let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
        let limit = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        let cgroup = TestCgroup::new("oom", child.pid, &limit);
        let watch = OomWatch::new(&cgroup.0).unwrap();
        go(&child).unwrap();
        if !expected {
            assert_eq!(watch.killed(), Some(false));
            kill(child.pid, libc::SIGKILL);
        }
        assert_eq!(wait(child.pid), 137);
        let end = Instant::now() + Duration::from_secs(5);
        while cgroup.0.remove().is_err() {
            assert!(Instant::now() < end, "the cgroup cannot be removed");
            std::thread::sleep(Duration::from_millis(1));
        }
        let end = Instant::now() + Duration::from_secs(1);
        let mut killed = watch.killed();
        while killed.is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
            killed = watch.killed();
        }
        assert_eq!(killed.unwrap_or(false), expected);
    }
}

fn removed_in_part() {
    let image = Image::new();
    let spec = parsed(&spec("while :; do :; done"));
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    let cgroup = TestCgroup::new("part", child.pid, &json!({}));
    go(&child).unwrap();
    let leaf = cgroup.0.leaf("leaf-0").unwrap();
    let entrances = leaf.entrances().unwrap();
    assert!(leaf.are_current(&entrances));
    let other = ["devices", "perf_event", "cpuset", "blkio", "cpu"];
    let other = other.iter().find_map(|name| cgroup.0.controller(name));
    if let (false, Some(directory)) = (cgroup.0.unified(), other) {
        let parent = directory.parent().unwrap();
        fs::write(parent.join("cgroup.procs"), child.pid.to_string()).unwrap();
        fs::remove_dir(directory).unwrap();
        assert!(!leaf.are_current(&entrances));
        let anew = leaf.entrances().unwrap();
        assert_eq!(anew.len(), entrances.len());
        assert!(leaf.are_current(&anew));
    }
    leaf.remove_leaf("leaf-0").unwrap();
    kill(child.pid, libc::SIGKILL);
    assert_eq!(wait(child.pid), 137);
}

/// With children that come and go, as a handler may have them.
fn suspended() {
    let image = Image::new();
    let spec = parsed(&spec("while :; do /bin/true; done"));
    let child = launch(plan(&spec, image.root(), Program::Specified)).unwrap();
    let cgroup = TestCgroup::new("suspended", child.pid, &json!({}));
    go(&child).unwrap();
    let unified = cgroup.0.unified();
    let state = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().unwrap_or_default().chars().next()
    };
    let is_dead = |pid: i32| state(pid).is_none_or(|state| "ZX".contains(state));
    // Stopped; or kept by the freezer of version 2, where it sleeps. The latter says so also of one that has waited for its
    // child (vfork(2)) and is on its way back from there: it runs until it would leave the kernel (`wait_for_vfork_done`,
    // kernel/fork.c).
    let rests = |pid: i32| match state(pid) {
        Some('R') => false,
        Some('T') => true,
        _ => unified || is_dead(pid),
    };
    // One that was about to end when it was suspended does.
    let living = || -> Vec<i32> {
        let all = cgroup.0.processes().unwrap().into_iter();
        all.filter(|pid| !is_dead(*pid)).collect()
    };
    for _ in 0..20 {
        cgroup.0.suspend().unwrap();
        // One that is in the middle of a system call, or of its end, gets to the end of that.
        let end = Instant::now() + Duration::from_secs(10);
        while !cgroup.0.processes().unwrap().into_iter().all(rests) {
            assert!(Instant::now() < end, "a suspended process does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        // What it does on its way out of the kernel is counted to it still.
        let mut before = ticks(child.pid);
        loop {
            std::thread::sleep(Duration::from_millis(15));
            let now = ticks(child.pid);
            if std::mem::replace(&mut before, now) == now {
                break;
            }
            assert!(Instant::now() < end, "a suspended process ran");
        }
        let processes = living();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(ticks(child.pid), before, "a suspended process ran");
        assert_eq!(living(), processes);
        cgroup.0.resume().unwrap();
        runs_on(child.pid, before);
    }
    // Nobody need resume it for that: whoever has suspended it may be gone.
    cgroup.0.suspend().unwrap();
    kill(child.pid, libc::SIGKILL);
    assert_eq!(wait(child.pid), 137, "a suspended process is killed");
    cgroup.0.kill().unwrap();
}

/// Of two that have not enough memory together the kernel takes the larger, which is the one that works.
fn expendable() {
    for offered in [false, true] {
        let image = Image::new();
        let start = |script: &str| {
            let spec = parsed(&spec(script));
            launch(plan(&spec, image.root(), Program::Specified)).unwrap()
        };
        let idle = start("exec dd if=/dev/zero of=/dev/null bs=40M 2>/dev/null");
        let limit = json!({"memory": {"limit": 96 << 20, "swap": 96 << 20}});
        let cgroup = TestCgroup::new("expendable", idle.pid, &limit);
        go(&idle).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while resident(idle.pid) < 40 << 20 {
            assert!(Instant::now() < end, "it does not take its memory");
            std::thread::sleep(Duration::from_millis(1));
        }
        cgroup.0.suspend().unwrap();
        fs::write(format!("/proc/{}/oom_score_adj", idle.pid), "10").unwrap();
        let score = || {
            let text = fs::read_to_string(format!("/proc/{}/oom_score_adj", idle.pid)).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        Expendable::make(&cgroup.0).unwrap().end().unwrap();
        assert_eq!(score(), 10, "it is as it was");
        let expendable = offered.then(|| Expendable::make(&cgroup.0).unwrap());
        assert_eq!(score(), if offered { 1000 } else { 10 });
        let busy = start("exec dd if=/dev/zero of=/dev/null bs=70M count=3 2>/dev/null");
        cgroup.0.add(busy.pid).unwrap();
        // On version 2 it would be frozen here as well.
        if cgroup.0.unified() {
            cgroup.0.resume().unwrap();
        }
        go(&busy).unwrap();
        assert_eq!(wait(busy.pid), if offered { 0 } else { 137 });
        kill(idle.pid, if offered { 0 } else { libc::SIGKILL });
        assert_eq!(wait(idle.pid), 137);
        if let Some(expendable) = expendable {
            // One that has ended is passed over.
            expendable.end().unwrap();
        }
    }
}

/// Bytes that a process has in memory.
fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
    kib.map_or(0, |kib| kib.trim().parse::<u64>().unwrap() << 10)
}

fn holder() {
    let mut wanted = spec("");
    wanted["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    wanted["process"]["capabilities"] = json!({});
    let spec = parsed(&wanted);
    let child = launch(plan(&spec, Root::Empty, Program::Holder(HolderKind::Pod))).unwrap();
    go(&child).unwrap();
    let proc = PathBuf::from(format!("/proc/{}", child.pid));
    assert!(
        fs::read_link(proc.join("exe"))
            .unwrap()
            .to_string_lossy()
            .starts_with("/memfd:sock-holder")
    );
    assert_eq!(
        fs::read_dir(proc.join("root")).unwrap().count(),
        0,
        "its root is not empty"
    );
    assert_eq!(
        fs::read_dir(proc.join("fd")).unwrap().count(),
        0,
        "it holds descriptors"
    );
    assert_ne!(
        fs::read_link(proc.join("ns/pid")).unwrap(),
        fs::read_link("/proc/self/ns/pid").unwrap()
    );
    let status = fs::read_to_string(proc.join("status")).unwrap();
    assert!(
        status.contains("CapEff:\t0000000000000000") && status.contains("Uid:\t65535"),
        "{status}"
    );
    let rss: u64 = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(rss <= 64, "a holder of {rss} kB");
    // What is written to its file would reach every pod.
    let exe = fs::OpenOptions::new().write(true).open(proc.join("exe"));
    assert!(exe.is_err() || exe.unwrap().set_len(0).is_err());
    kill(child.pid, libc::SIGTERM);
    assert_eq!(wait(child.pid), 0);
}

/// A pod whose containers share a PID namespace has the sandbox's holder in it, under the pod's user, and no filter on it:
/// who traced it would have none either.
fn traced_holder() {
    let mut wanted = spec("");
    wanted["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let all = json!(["CAP_DAC_OVERRIDE", "CAP_CHOWN"]);
    wanted["process"]["capabilities"] =
        json!({"bounding": all, "effective": all, "permitted": all});
    let spec = parsed(&wanted);
    let child = launch(plan(&spec, Root::Empty, Program::Holder(HolderKind::Pod))).unwrap();
    go(&child).unwrap();
    let traced = |holder: libc::pid_t| {
        // SAFETY: the child makes system calls with numbers and ends.
        unsafe {
            let tracer = libc::fork();
            if tracer == 0 {
                libc::setresgid(1000, 1000, 1000);
                libc::setresuid(1000, 1000, 1000);
                libc::_exit(match libc::ptrace(libc::PTRACE_SEIZE, holder, 0, 0) {
                    0 => 0,
                    _ => *libc::__errno_location(),
                })
            }
            wait(tracer)
        }
    };
    // SAFETY: the child sleeps until it is killed.
    let ordinary = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::setresgid(1000, 1000, 1000);
            libc::setresuid(1000, 1000, 1000);
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
            loop {
                libc::pause();
            }
        }
        pid
    };
    let mut tries = 0;
    while traced(ordinary) != 0 {
        tries += 1;
        assert!(tries < 500, "the tracer traces nobody");
        std::thread::sleep(Duration::from_millis(2));
    }
    kill(ordinary, libc::SIGKILL);
    wait(ordinary);
    // It has begun once it waits for a signal.
    while !fs::read_to_string(format!("/proc/{}/stat", child.pid))
        .unwrap()
        .contains(") S ")
    {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(traced(child.pid), libc::EPERM, "a holder is traced");
    let status = fs::read_to_string(format!("/proc/{}/status", child.pid)).unwrap();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let none = format!("{set}:\t0000000000000000");
        assert!(status.contains(&none), "{status}");
    }
    kill(child.pid, libc::SIGTERM);
    assert_eq!(wait(child.pid), 0);
}

fn holder_of_descendants() {
    let spec = parsed(&spec(""));
    let child = launch(plan(
        &spec,
        Root::Empty,
        Program::Holder(HolderKind::Descendants),
    ))
    .unwrap();
    go(&child).unwrap();
    // A process whose parent ends becomes the holder's.
    let image = Image::new();
    let mut inner = self::spec("sleep 0.4 >/dev/null 2>&1 & exit 0");
    inner["linux"]["namespaces"] = json!([{"type": "pid", "path": format!("/proc/{}/ns/pid", child.pid)}, {"type": "mount"}, {"type": "network"}]);
    let (status, text) = run(&image, &inner);
    assert_eq!(status, 0, "{text}");
    kill(child.pid, libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(100));
    let mut status = 0;
    // SAFETY: asks after a child of this process.
    let ended = unsafe { libc::waitpid(child.pid, &raw mut status, libc::WNOHANG) };
    assert_eq!(ended, 0, "it did not wait for its descendant");
    assert_eq!(wait(child.pid), 0);
}

/// The first of a container's users, as the host has them.
const FIRST: u32 = 1_000_000;

fn users_of_its_own() {
    let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    let mapped = |spec: &mut Value, namespaces: Value| {
        spec["linux"] =
            json!({"namespaces": namespaces, "uidMappings": mapping, "gidMappings": mapping});
    };
    let mut held = spec("");
    held["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    mapped(
        &mut held,
        json!([{"type": "user"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]),
    );
    held["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "7"});
    let held = parsed(&held);
    let pod = launch(plan(&held, Root::Empty, Program::Holder(HolderKind::Pod))).unwrap();
    go(&pod).unwrap();
    let joined = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{}/ns/{file}", pod.pid)});
    let namespaces = json!([
        joined("user", "user"), joined("network", "net"), joined("ipc", "ipc"), joined("uts", "uts"),
        {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
    ]);

    // As a snapshotter gives it: the layers are as on any host, what the container writes is its root's.
    let (image, written, volume) = (
        Image::new(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let (upper, work) = (written.path().join("upper"), written.path().join("work"));
    let target = written.path().join("root");
    fs::create_dir(&target).unwrap();
    for directory in [&upper, &work] {
        fs::create_dir(directory).unwrap();
        std::os::unix::fs::chown(directory, Some(FIRST), Some(FIRST)).unwrap();
    }
    fs::set_permissions(&upper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let file = volume.path().join("file");
    fs::write(&file, "").unwrap();
    std::os::unix::fs::chown(&file, Some(7), Some(8)).unwrap();
    let script = "id -u; cat /proc/self/uid_map; stat -c %u:%g / /bin/busybox /volume /volume/file /scratch /mail /dev /dev/null /made/for /volume/made /dev/disk; \
        touch /volume/new /bin/new && hostname other && hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; mount -o remount,rw /sealed || echo sealed";
    let mut inside = spec(script);
    mapped(&mut inside, namespaces);
    // Of the node, not of the pod.
    inside["linux"]["devices"] = json!([{"path": "/dev/disk", "type": "b", "major": 240, "minor": 1, "uid": 0, "gid": 0, "fileMode": 0o660}]);
    inside["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]});
    inside["process"]["rlimits"] =
        json!([{"type": "RLIMIT_NOFILE", "soft": 1_000_000, "hard": 1_000_000}]);
    let path = volume.path().to_string_lossy().into_owned();
    let more = json!([
        {"destination": "/volume", "type": "bind", "source": path, "options": ["rbind", "rw"], "uidMappings": mapping, "gidMappings": mapping},
        {"destination": "/made/for", "type": "bind", "source": path, "options": ["rbind", "ro", "idmap"]},
        {"destination": "/volume/made/in", "type": "bind", "source": path, "options": ["rbind", "ro", "idmap"]},
        {"destination": "/sealed", "type": "bind", "source": path, "options": ["rbind", "ro"]},
        {"destination": "/nested", "type": "bind", "source": path, "options": ["rbind", "rw"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        {"destination": "/mail", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "uid=3", "gid=4"]},
    ]);
    let mounts = inside["mounts"].as_array_mut().unwrap();
    mounts.extend(more.as_array().unwrap().iter().cloned());
    let root = || Root::Mounts {
        target: target.clone(),
        mounts: vec![RootMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("uidmap=0:{FIRST}:65536"),
                format!("gidmap=0:{FIRST}:65536"),
                format!("lowerdir={}", image.0.path().display()),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ],
        }],
    };
    let (status, text) = run_on(root(), &inside);
    let map = text.lines().nth(1).unwrap_or_default();
    let map: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(map, ["0", "1000000", "65536"], "{text}");
    let rest: Vec<&str> = text.lines().skip(2).collect();
    assert_eq!(
        rest,
        [
            "0:0",
            "0:0",
            "0:0",
            "7:8",
            "0:0",
            "3:4",
            "0:0",
            "0:0",
            "0:0",
            "0:0",
            "65534:65534",
            "other",
            "7",
            "mount: permission denied (are you root?)",
            "sealed"
        ],
        "{text}"
    );
    assert_eq!(status, 0, "{text}");
    let owner = |path: &Path| std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).unwrap());
    assert_eq!(owner(&volume.path().join("new")), 0);
    assert_eq!(owner(&volume.path().join("made/in")), 0);
    assert_eq!(owner(&upper.join("bin/new")), FIRST);
    assert_eq!(owner(&upper.join("made/for")), FIRST);

    // Its working directory would be made where the pod's root may make nothing.
    inside["process"]["cwd"] = json!("/nested/work");
    let (_, error) = run_on(root(), &inside);
    assert!(error.contains("Permission denied"), "{error}");
    assert!(!volume.path().join("work").exists());
    inside["process"]["cwd"] = json!("/");

    // As containerd 2 has it: the user namespace is there before the sandbox, and what the sandbox makes is to belong to it.
    let mut second = held.clone();
    let namespaces = json!([joined("user", "user"), joined("network", "net"), {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    let linux = second.linux_mut().as_mut().unwrap();
    linux.set_namespaces(serde_json::from_value(namespaces).unwrap());
    linux.set_sysctl(None);
    let other = launch(plan(&second, Root::Empty, Program::Holder(HolderKind::Pod))).unwrap();
    go(&other).unwrap();
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    let of_pod = sock_sandbox::namespace::of_process(pod.pid, "user").unwrap();
    for kind in ["ipc", "uts", "mnt"] {
        let namespace = sock_sandbox::namespace::of_process(other.pid, kind).unwrap();
        // SAFETY: NS_GET_USERNS (ioctl_ns(2)) returns a new descriptor.
        let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), 0xb701) };
        assert!(owner >= 0, "{kind}");
        // SAFETY: just made.
        let owner = unsafe { OwnedFd::from_raw_fd(owner) };
        assert_eq!(inode(&owner), inode(&of_pod), "{kind}");
    }
    kill(other.pid, libc::SIGKILL);
    assert_eq!(wait(other.pid), 137);

    inside["process"]["user"] = json!({"uid": 65536, "gid": 0});
    let spec = parsed(&inside);
    let error = launch(plan(&spec, root(), Program::Specified)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("process.user.uid: 65536 is not mapped"),
        "{error}"
    );
    kill(pod.pid, libc::SIGKILL);
    assert_eq!(wait(pod.pid), 137);
}

fn scheduled() {
    let image = Image::new();
    for applet in ["ionice", "uname", "grep"] {
        std::os::unix::fs::symlink("busybox", image.0.path().join("bin").join(applet)).unwrap();
    }
    let mut wanted = spec("ionice; uname -m; cat /proc/self/stat");
    wanted["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    wanted["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    wanted["linux"]["personality"] = json!({"domain": "LINUX32"});
    let (status, text) = run(&image, &wanted);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("best-effort: prio 6"), "{text}");
    assert_eq!(lines.next(), Some("i686"), "{text}");
    // nice and policy (proc_pid_stat(5)).
    let stat: Vec<&str> = lines.next().unwrap().split(' ').collect();
    assert_eq!((status, stat[18], stat[40]), (0, "5", "3"), "{text}");
    wanted["process"]["ioPriority"]["priority"] = json!(9);
    let (_, error) = run(&image, &wanted);
    assert!(
        error.starts_with("process.ioPriority.priority: 9 "),
        "{error}"
    );
}

fn many_layers() {
    // More options than mount(2) takes: it takes a page of them.
    let (image, layers) = (Image::new(), tempfile::tempdir().unwrap());
    let mut lower = vec![image.0.path().to_path_buf()];
    for number in 0..100 {
        let layer = layers.path().join(format!("{number}-{}", "x".repeat(60)));
        fs::create_dir_all(layer.join("data")).unwrap();
        fs::write(layer.join("data").join(number.to_string()), "").unwrap();
        lower.push(layer);
    }
    let lower: Vec<String> = lower
        .iter()
        .map(|l| l.to_string_lossy().into_owned())
        .collect();
    let target = layers.path().join("root");
    fs::create_dir(&target).unwrap();
    let root = Root::Mounts {
        target,
        mounts: vec![RootMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![format!("lowerdir={}", lower.join(":")), "ro".into()],
        }],
    };
    let mut wanted = spec("set -- /data/*; echo $#");
    wanted["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| m["destination"] == "/proc");
    let (status, text) = run_on(root, &wanted);
    assert_eq!((status, &*text), (0, "100\n"));
}

const USER: u32 = 1_234_567;
const OWNER: u32 = 2_000_000_000;

/// A holder of namespaces that belong to a user namespace of their own.
fn held_namespaces(outer: Option<Outer>) -> Launched {
    held_namespaces_by(HolderKind::Pod, outer)
}

fn held_namespaces_by(kind: HolderKind, outer: Option<Outer>) -> Launched {
    let mut held = spec("");
    held["process"]["user"] = json!({"uid": USER, "gid": USER});
    held["process"]["capabilities"] = json!({});
    held["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    let held = parsed(&held);
    let mut plan = plan(&held, Root::Empty, Program::Holder(kind));
    plan.mapping = Some(UserMapping {
        uid: USER,
        gid: USER,
        owner: Some(OWNER),
    });
    plan.outer = outer;
    let holder = launch(plan).unwrap();
    go(&holder).unwrap();
    holder
}

fn last_descendant() {
    // One that waits for its last descendant waits for a holder that was nested in its namespaces.
    let open = |pid: i32, kind: &str| sock_sandbox::namespace::of_process(pid, kind).unwrap();
    let outer = held_namespaces_by(HolderKind::Descendants, None);
    let nested = held_namespaces_by(
        HolderKind::Descendants,
        Some(Outer {
            owner: OWNER,
            user: open(outer.pid, "user"),
            pid: open(outer.pid, "pid"),
        }),
    );
    kill(outer.pid, libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(100));
    let mut status = 0;
    // SAFETY: asks after a child of this process.
    let ended = unsafe { libc::waitpid(outer.pid, &raw mut status, libc::WNOHANG) };
    assert_eq!(ended, 0, "it did not wait for what is nested in it");
    kill(nested.pid, libc::SIGTERM);
    assert_eq!(wait(outer.pid), 0);
}

fn nested_namespaces() {
    let open = |pid: i32, kind: &str| sock_sandbox::namespace::of_process(pid, kind).unwrap();
    let outermost = held_namespaces(None);
    let mut all = vec![outermost];
    for _ in 0..3 {
        let outer = all.last().unwrap().pid;
        let nested = held_namespaces(Some(Outer {
            owner: OWNER,
            user: open(outer, "user"),
            pid: open(outer, "pid"),
        }));
        let status = fs::read_to_string(format!("/proc/{}/status", nested.pid)).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            let rest = line.split_whitespace().skip(1);
            rest.map(str::to_owned).collect::<Vec<_>>()
        };
        // One number in each namespace from here inwards, PID 1 in its own.
        assert_eq!(field("NSpid:").len(), all.len() + 2, "{status}");
        assert_eq!(field("NSpid:").last().unwrap(), "1");
        assert_eq!(field("Uid:")[0], USER.to_string());
        assert_eq!(field("Groups:"), Vec::<String>::new(), "{status}");
        let user = open(nested.pid, "user");
        // NS_GET_PARENT and NS_GET_OWNER_UID (ioctl_ns(2)).
        // SAFETY: the first returns a new descriptor, the second writes a number.
        let (parent, owner) = unsafe {
            let parent = libc::ioctl(user.as_raw_fd(), 0xb702);
            let mut owner: libc::uid_t = 0;
            assert_eq!(libc::ioctl(user.as_raw_fd(), 0xb704, &raw mut owner), 0);
            assert!(parent >= 0);
            (OwnedFd::from_raw_fd(parent), owner)
        };
        assert_eq!(owner, OWNER);
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(&parent), inode(&open(outer, "user")));
        all.push(nested);
    }
    // The end of the outermost PID namespace is the end of all within, which belong to the holder next to them.
    kill(all[0].pid, libc::SIGKILL);
    assert_eq!(wait(all[0].pid), 128 + libc::SIGKILL);
    for holder in &all[1..] {
        let mut ended = [rustix::event::PollFd::new(
            &holder.pidfd,
            rustix::event::PollFlags::IN,
        )];
        assert_eq!(rustix::event::poll(&mut ended, None).unwrap(), 1);
        // SAFETY: asks after a process that is no child of this one.
        let reaped = unsafe { libc::waitpid(holder.pid, std::ptr::null_mut(), 0) };
        assert_eq!(reaped, -1);
    }
    let outer = Outer {
        owner: OWNER,
        user: fs::File::open("/proc/self/ns/user").unwrap().into(),
        pid: fs::File::open("/proc/self/ns/pid").unwrap().into(),
    };
    let spec = parsed(&spec("true"));
    let mut plan = plan(&spec, Root::Empty, Program::Specified);
    plan.outer = Some(outer);
    let error = launch(plan).unwrap_err().to_string();
    assert!(error.contains("can be nested"), "{error}");
}

fn locked_flags() {
    let user = USER;
    let holder = held_namespaces(None);

    let image = Image::new();
    let packages = tempfile::tempdir().unwrap();
    fs::set_permissions(
        packages.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    // NS_GET_USERNS (ioctl_ns(2)): whose a container's namespaces are.
    let joined = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{}/ns/{file}", holder.pid)});
    let mut held = spec("");
    held["process"]["user"] = json!({"uid": user, "gid": user});
    held["linux"]["namespaces"] = json!([joined("user", "user"), joined("pid", "pid"), {"type": "mount"}, {"type": "cgroup"}]);
    let held = parsed(&held);
    let inside = launch(plan(&held, image.root(), Program::Holder(HolderKind::Pod))).unwrap();
    go(&inside).unwrap();
    for kind in ["mnt", "cgroup"] {
        let namespace = sock_sandbox::namespace::of_process(inside.pid, kind).unwrap();
        // SAFETY: returns a new descriptor.
        let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), 0xb701) };
        assert!(owner >= 0, "{kind}");
        // SAFETY: just made.
        let owner = unsafe { OwnedFd::from_raw_fd(owner) };
        let own = sock_sandbox::namespace::of_process(holder.pid, "user").unwrap();
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(
            inode(&owner),
            inode(&own),
            "the {kind} namespace is another's"
        );
    }
    kill(inside.pid, libc::SIGKILL);
    wait(inside.pid);
    let all = json!(["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]);
    let mut wanted = spec(
        "id -u; grep CapEff /proc/self/status; touch /data/before 2>&1; mount -o remount,rw,bind /data 2>&1; touch /data/after 2>&1; mount -t tmpfs mine /tmp && echo own mounts are its own",
    );
    wanted["process"]["user"] = json!({"uid": user, "gid": user});
    wanted["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all, "inheritable": all, "ambient": all});
    wanted["mounts"].as_array_mut().unwrap().push(json!({"destination": "/data", "type": "bind", "source": packages.path(), "options": ["bind", "ro", "nosuid", "nodev"]}));
    let join = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{}/ns/{file}", holder.pid)});
    wanted["linux"]["namespaces"] = json!([join("user", "user"), join("pid", "pid"), join("network", "net"), join("ipc", "ipc"), join("uts", "uts"), {"type": "mount"}]);
    let (_, text) = run(&image, &wanted);
    assert!(
        text.starts_with(&format!("{user}\nCapEff:\t0000000000240000\n")),
        "{text}"
    );
    assert_eq!(
        text.matches("Read-only file system").count(),
        2,
        "it wrote to a read-only mount: {text}"
    );
    assert!(
        text.contains("permission denied")
            || text.contains("Operation not permitted")
            || text.contains("Permission denied"),
        "it lifted a locked flag: {text}"
    );
    assert!(
        text.contains("own mounts are its own"),
        "it has no capability where it should: {text}"
    );
    assert_eq!(fs::read_dir(packages.path()).unwrap().count(), 0);
    kill(holder.pid, libc::SIGKILL);
    wait(holder.pid);
}

fn abandoned() {
    let image = Image::new();
    let spec = parsed(&spec("echo must not run >/data/ran"));
    let root = Root::Mounts {
        target: image.0.path().into(),
        mounts: vec![RootMount {
            kind: "bind".into(),
            source: image.0.path().to_string_lossy().into(),
            options: vec!["rbind".into(), "rw".into()],
        }],
    };
    let child = launch(plan(&spec, root, Program::Specified)).unwrap();
    child.proceed().unwrap();
    let made = child.wait_progress().unwrap();
    assert!(matches!(&made, Progress::Created(made) if made.terminal.is_none()));
    let pid = child.pid;
    let mut ready = [rustix::event::PollFd::new(
        &child.pidfd,
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(
        rustix::event::poll(
            &mut ready,
            Some(&rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0
            })
        )
        .unwrap(),
        0
    );
    let _ = child.channel().as_fd();
    drop(child);
    assert_eq!(wait(pid), 1);
    assert!(!image.0.path().join("data/ran").exists());
}
