//! What surrounds activation: processes in place of cgroups, an interpreter, a zygote, and clients.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt::set_socket_passcred;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getrlimit, kill_process_group, set_child_subreaper,
    setrlimit, waitpgid,
};
use sock_shim::activation::decide::{IdlePolicy, Reuse};
use sock_shim::activation::zygotes::ForkError;
use sock_shim::activation::{
    Activation, Forked, FunctionConfig, Interpreter, LeafCgroup, LeafCgroups, Local, Output,
    Shortage, StartError, Streams, Surroundings, Zygote, ZygoteName, Zygotes,
};
use sock_zygote::protocol::{self, LeafExtras, LeafSetup};
use sock_zygote::{Arrived, SealedSetup, SetupFds};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// What goes wrong in a leaf before it serves.
#[derive(Debug, Clone, Copy)]
pub enum Script {
    FailConfinement,
    FailImport,
    DieOnImport,
}

pub struct Pod {
    pub config: FunctionConfig,
    pub pool_within: Duration,
    setup: LeafSetup,
    processes: Rc<Processes>,
    zygotes: Option<Rc<Stable>>,
    directory: tempfile::TempDir,
}

/// Runs a test on a runtime like the shim's.
pub fn in_pod<F: Future<Output = ()>>(test: impl FnOnce(Pod) -> F) {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: most,
            maximum: most,
        },
    )
    .expect("enough descriptors");
    // What a leaf leaves behind comes to this process to be reaped.
    set_child_subreaper(Some(rustix::process::getpid())).expect("subreaper");
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let done = timeout(Duration::from_secs(60), test(Pod::new())).await;
        assert!(done.is_ok(), "the test hangs");
    });
}

impl Pod {
    fn new() -> Pod {
        let directory = tempfile::tempdir().expect("a directory");
        let processes = Rc::new(Processes {
            directory: directory.path().to_owned(),
            live: RefCell::default(),
            cgroups: Cell::new(0),
            most: Cell::new(0),
            stuck: Cell::new(false),
        });
        Pod {
            config: FunctionConfig {
                container: "function".into(),
                name: "test".into(),
                handler: "app.handler".into(),
                zygote: None,
                ancestors: Vec::new(),
                port: 0,
                timeout: Duration::from_secs(20),
                reuse: Reuse::Always,
                instances: 4,
                freeze_after: Duration::from_secs(1),
                end_after: Duration::from_secs(60),
                idle_policy: IdlePolicy::Fixed,
            },
            pool_within: Duration::from_secs(5),
            setup: setup(),
            processes,
            zygotes: None,
            directory,
        }
    }

    fn meminfo(&self) -> PathBuf {
        self.directory.path().join("meminfo")
    }

    /// A leaf that is frozen does not go on, until this is said of none.
    pub fn stuck(&self, stuck: bool) {
        self.processes.stuck.set(stuck);
    }

    /// What the kernel says from now on of the memory that is available, of a million KiB.
    pub fn available(&self, kib: u32) {
        let text = format!("MemTotal: 1000000 kB\nMemAvailable: {kib} kB\n");
        std::fs::write(self.meminfo(), text).expect("a file");
    }

    pub async fn start(&self) -> Activation {
        self.try_start().await.expect("a start")
    }

    pub async fn try_start(&self) -> Result<Activation, StartError> {
        let processes = Rc::clone(&self.processes);
        let surroundings = Surroundings {
            zygotes: self
                .zygotes
                .clone()
                .map(|zygotes| zygotes as Rc<dyn Zygotes>),
            interpreter: Rc::new(Starter(Rc::clone(&processes))),
            cgroups: Rc::new(Cgroups(processes)),
            output: Rc::new(output()),
            setup: self.setup.clone(),
            oom_score_adj: None,
            pool_within: self.pool_within,
            meminfo: self.meminfo(),
        };
        Activation::start(&self.config, surroundings).await
    }

    pub async fn connect(&self, activation: &Activation) -> TcpStream {
        connect(activation.port()).await
    }

    pub fn script(&mut self, script: Script) {
        self.setup.env = vec![("SCRIPT".into(), format!("{script:?}"))];
    }

    /// Lets `/held` answer.
    pub fn release(&self) {
        std::fs::write(self.directory.path().join("release"), "").expect("write");
    }

    pub async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < end, "waited in vain until {what}");
            sleep(Duration::from_millis(2)).await;
        }
    }

    pub fn most_processes(&self) -> usize {
        self.processes.most.get()
    }

    pub fn nothing_is_left(&self) {
        assert_eq!(
            self.processes.live.borrow_mut().len(),
            0,
            "processes are left"
        );
        assert_eq!(self.processes.cgroups.get(), 0, "cgroups are left");
    }

    pub fn expect_zygote(&mut self) {
        let name = || "0a".to_owned();
        self.config.zygote = Some(ZygoteName {
            package_set: "science".into(),
            tenant: name(),
            lock: name(),
            digest: name(),
        });
        if self.zygotes.is_none() {
            let setup = Rc::new(RefCell::new(None));
            let processes = Rc::clone(&self.processes);
            self.zygotes = Some(Rc::new(Stable {
                processes,
                zygote: RefCell::new(None),
                setup,
                plain: RefCell::new(None),
                extras: RefCell::new(LeafExtras {
                    keep_compiled: true,
                    ..LeafExtras::default()
                }),
            }));
        }
    }

    pub fn with_zygote(&mut self) {
        self.expect_zygote();
        self.stable().appear(&self.config, &self.setup);
    }

    pub fn zygote_after(&self, time: Duration) -> JoinHandle<()> {
        let (stable, config, setup) = (self.stable(), self.config.clone(), self.setup.clone());
        tokio::task::spawn_local(async move {
            sleep(time).await;
            stable.appear(&config, &setup);
        })
    }

    pub fn end_zygote(&self) {
        self.stable().zygote.replace(None);
    }

    fn stable(&self) -> Rc<Stable> {
        self.zygotes.clone().expect("a pod with a PackageSet")
    }
}

/// What leaves print is not looked at here.
fn output() -> Output {
    let null = || {
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
        OwnedFd::from(null.expect("/dev/null"))
    };
    Output::new(null(), null(), rustix::process::getuid().as_raw()).expect("an output")
}

fn setup() -> LeafSetup {
    LeafSetup {
        handler: String::new(),
        path: Vec::new(),
        env: Vec::new(),
        cwd: "/".into(),
        hostname: "pod".into(),
        function: String::new(),
        namespace: "default".into(),
        pod: "pod".into(),
        uid: 0,
        gid: 0,
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        rlimits: Vec::new(),
        seccomp: Vec::new(),
        intercept_sockets: true,
        single_request: false,
        park_after_ms: 0,
        max_body: 1 << 20,
        threads: 0,
        timeout_seconds: 0,
    }
}

/// The processes of all leaves. Each leads a process group, which stands for its cgroup.
struct Processes {
    directory: PathBuf,
    live: RefCell<Vec<(String, Pid)>>,
    cgroups: Cell<usize>,
    most: Cell<usize>,
    /// No frozen leaf goes on.
    stuck: Cell<bool>,
}

impl Processes {
    fn directory(&self, cgroup: &str) -> PathBuf {
        self.directory.join(cgroup)
    }

    #[allow(clippy::zombie_processes, reason = "`alive` reaps it with its group")]
    fn spawn(&self, cgroup: &str, control: OwnedFd) {
        use std::os::unix::process::CommandExt;
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "leaf::leaf_process", "--nocapture"])
            .env(super::leaf::RELEASE, self.directory.join("release"))
            .stdin(Stdio::from(control))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("a process");
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process number");
        std::fs::write(
            self.directory(cgroup).join("cgroup.procs"),
            child.id().to_string(),
        )
        .expect("write");
        let mut live = self.live.borrow_mut();
        live.push((cgroup.to_owned(), pid));
        self.most.set(self.most.get().max(live.len()));
    }

    fn signal(&self, cgroup: &str, signal: Signal) {
        for (_, pid) in self.live.borrow().iter().filter(|(name, _)| name == cgroup) {
            let _ = kill_process_group(*pid, signal);
        }
    }
}

/// Whether a process of the group runs. Reaps those that do not.
fn alive(group: Pid) -> bool {
    loop {
        match waitpgid(group, WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

struct Cgroups(Rc<Processes>);

impl LeafCgroups for Cgroups {
    fn make(&self, name: &str) -> sock_sandbox::Result<Rc<dyn LeafCgroup>> {
        self.0.cgroups.set(self.0.cgroups.get() + 1);
        std::fs::create_dir_all(self.0.directory(name)).expect("a directory");
        Ok(Rc::new(Group {
            name: name.to_owned(),
            processes: Rc::clone(&self.0),
        }))
    }
}

struct Group {
    name: String,
    processes: Rc<Processes>,
}

impl LeafCgroup for Group {
    fn entrances(&self) -> sock_sandbox::Result<Vec<OwnedFd>> {
        Ok(Vec::new())
    }

    fn directory(&self) -> Option<PathBuf> {
        Some(self.processes.directory(&self.name))
    }

    fn freeze(&self) -> sock_sandbox::Result<()> {
        self.processes.signal(&self.name, Signal::STOP);
        Ok(())
    }

    fn thaw(&self) -> sock_sandbox::Result<()> {
        if self.processes.stuck.get() {
            return Err(sock_sandbox::Error::Child("stuck".into()));
        }
        self.processes.signal(&self.name, Signal::CONT);
        Ok(())
    }

    fn kill(&self) -> sock_sandbox::Result<()> {
        self.processes.signal(&self.name, Signal::KILL);
        Ok(())
    }

    fn shortage(&self) -> Option<Shortage> {
        None
    }

    fn is_empty(&self) -> sock_sandbox::Result<bool> {
        let mut live = self.processes.live.borrow_mut();
        // The leader may be gone and have left children in its group.
        live.retain(|(name, pid)| *name != self.name || alive(*pid));
        Ok(!live.iter().any(|(name, _)| *name == self.name))
    }

    fn remove(&self) -> sock_sandbox::Result<()> {
        self.processes.cgroups.set(self.processes.cgroups.get() - 1);
        Ok(())
    }
}

fn name(cgroup: &dyn LeafCgroup) -> String {
    let directory = cgroup.directory().expect("a name");
    directory
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned()
}

struct Starter(Rc<Processes>);

impl Interpreter for Starter {
    fn start<'a>(
        &'a self,
        control: OwnedFd,
        cgroup: &'a dyn LeafCgroup,
        _streams: &'a Streams,
    ) -> Local<'a, anyhow::Result<()>> {
        self.0.spawn(&name(cgroup), control);
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Where a zygote may be.
struct Stable {
    processes: Rc<Processes>,
    zygote: RefCell<Option<Rc<Stand>>>,
    setup: Rc<RefCell<Option<SealedSetup>>>,
    plain: RefCell<Option<LeafSetup>>,
    extras: RefCell<LeafExtras>,
}

impl Stable {
    fn appear(&self, config: &FunctionConfig, setup: &LeafSetup) {
        let mut setup = setup.clone();
        config.complete(&mut setup);
        self.plain.replace(Some(setup));
        self.seal();
        let (processes, setup) = (Rc::clone(&self.processes), Rc::clone(&self.setup));
        self.zygote
            .replace(Some(Rc::new(Stand { processes, setup })));
    }

    fn seal(&self) {
        if let Some(setup) = &*self.plain.borrow() {
            let sealed = SealedSetup::new(setup, &self.extras.borrow()).expect("a setup");
            self.setup.replace(Some(sealed));
        }
    }
}

impl Zygotes for Stable {
    fn attach(&self) -> Local<'_, Option<Rc<dyn Zygote>>> {
        let zygote = self
            .zygote
            .borrow()
            .clone()
            .map(|zygote| zygote as Rc<dyn Zygote>);
        Box::pin(std::future::ready(zygote))
    }

    fn tell_leaves(&self, extras: &LeafExtras) -> Result<(), sock_zygote::Error> {
        self.extras.replace(extras.clone());
        self.seal();
        Ok(())
    }
}

/// A zygote that starts processes.
struct Stand {
    processes: Rc<Processes>,
    setup: Rc<RefCell<Option<SealedSetup>>>,
}

impl Zygote for Stand {
    fn fork<'a>(
        &'a self,
        cgroup: &'a dyn LeafCgroup,
        _streams: &'a Streams,
    ) -> Local<'a, Result<Forked, ForkError>> {
        Box::pin(async move {
            let (ours, theirs) = protocol::pair().expect("a pair");
            set_socket_passcred(&ours, true).expect("credentials");
            self.processes.spawn(&name(cgroup), theirs);
            let arrived = Arrived::interpreter(ours).await?;
            let setup = self.setup.borrow();
            let setup = setup.as_ref().expect("a setup");
            Ok(Forked {
                leaf: arrived.setup(setup, &SetupFds::default())?,
                origin: None,
            })
        })
    }

    fn serve_sockets(&self, _listener: OwnedFd) -> Local<'static, ()> {
        unreachable!("the scripted leaf has no listener")
    }

    fn give_up(&self) {}
}

pub async fn connect(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("a connection")
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
    /// Process number of the leaf that answered, as it says; 0 for the shim.
    pub leaf: u32,
}

impl Answer {
    /// Whether the client is told that no other answer comes on this connection.
    pub fn is_last(&self) -> bool {
        self.head
            .to_lowercase()
            .contains("\r\nconnection: close\r\n")
    }
}

pub async fn send(client: &mut TcpStream, path: &str) {
    send_with_body(client, path, b"").await;
}

pub async fn send_with_body(client: &mut TcpStream, path: &str, body: &[u8]) {
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes()).await.expect("send");
    client.write_all(body).await.expect("send");
}

pub async fn get(client: &mut TcpStream, path: &str) -> Answer {
    send(client, path).await;
    answer(client).await
}

/// Reads one response by its Content-Length.
pub async fn answer(client: &mut TcpStream) -> Answer {
    let read = async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.expect("a head"));
        }
        let head = String::from_utf8(head).expect("text");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "))
            .expect("a length");
        let mut body = vec![0; length.parse().expect("a number")];
        client.read_exact(&mut body).await.expect("a body");
        (head, String::from_utf8(body).expect("text"))
    };
    let (head, body) = timeout(Duration::from_secs(20), read)
        .await
        .expect("an answer in time");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect("a status");
    let leaf = body.parse().unwrap_or(0);
    Answer {
        status,
        head,
        body,
        leaf,
    }
}
