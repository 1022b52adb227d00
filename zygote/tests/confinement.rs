//! What a leaf is and is not: its namespaces, root, cgroup, capabilities, descriptors and sockets.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use serde_json::Value;
use sock_zygote::{Event, FunctionRoot};
use support::{
    Container, Function, Pool, Running, USER, children, connection, reply, shim, until,
    zygote_setup,
};

const PROBE: &str = r#"
import ctypes, os, socket, threading

def lines(path):
    with open(path) as f:
        return f.read().split("\n")

def status(event):
    fields = dict(line.split(":\t", 1) for line in lines("/proc/self/status") if ":\t" in line)
    return {k: fields[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Uid", "Threads")}

def where(event):
    return {
        "pid": os.getpid(), "processes": [int(p) for p in os.listdir("/proc") if p.isdigit()],
        "hostname": socket.gethostname(), "cwd": os.getcwd(), "env": dict(os.environ),
        "root": sorted(os.listdir("/")), "marker": os.path.exists("/zygote-marker"),
        "mine": open("/mine").read(), "fds": sorted(int(n) for n in os.listdir("/proc/self/fd")),
        "links": {n: os.readlink("/proc/self/ns/" + n) for n in ("mnt", "pid", "net", "ipc", "uts", "user")},
        "mounts": open("/proc/self/mountinfo").read(),
    }

def attempt(what):
    try:
        what()
        return "allowed"
    except OSError as error:
        return os.strerror(error.errno)

def attempts(event):
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *args):
        def run():
            if libc.syscall(number, *args) < 0:
                raise OSError(ctypes.get_errno(), "")
        return run
    return {
        "kcore": attempt(lambda: open("/proc/kcore", "rb").read(1) or (_ for _ in ()).throw(OSError(2, ""))),
        "sysctl": attempt(lambda: open("/proc/sys/kernel/hostname", "w").write("x")),
        "usr": attempt(lambda: open("/usr/x", "w")),
        "mount": attempt(call(165, b"none", b"/tmp", b"tmpfs", 0, 0)),
        "chroot": attempt(call(161, b"/tmp")),
        "raw": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
        "ping": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)),
        "netfilter": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)),
        "x32": attempt(call(0x40000000 | 41, 2, 1, 0)),
    }

def fetch(event):
    with socket.create_connection(("127.0.0.1", int(event["query"]["port"])), timeout=5) as s:
        owner = os.fstat(s.fileno()).st_uid
        s.sendall(b"hi")
        return {"got": s.recv(100).decode(), "owner": owner, "inheritable": os.get_inheritable(s.fileno()),
                "interfaces": [name for _, name in socket.if_nameindex()], "addrinfo": len(socket.getaddrinfo("127.0.0.1", 80))}

def handler(event, context):
    return globals()[event["path"][1:]](event)
"#;

async fn start() -> (Pool, Function) {
    let image = Container::new(&[("/zygote-marker", "zygote")], &[]);
    let pool = Pool::start(image, &zygote_setup(&["socket", "ctypes"]))
        .await
        .unwrap();
    let container = Container::new(
        &[
            ("/srv/function/app.py", PROBE),
            ("/mine", "the function's file"),
        ],
        &[],
    );
    let function = Function::in_container(&pool, container);
    (pool, function)
}

async fn ask(leaf: &Running, path: &str) -> Value {
    let (mut client, served) = connection();
    leaf.leaf.serve(1, served.as_fd()).unwrap();
    drop(served);
    write!(
        client,
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    until(&leaf.leaf, |e| matches!(e, Event::Closed { .. })).await;
    let answer = reply(&mut client);
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn a_leaf_has_no_capability_and_both_filters() {
    shim(async {
        let (pool, mut function) = start().await;
        // One instruction: allow (BPF_RET | BPF_K, SECCOMP_RET_ALLOW).
        function.setup.seccomp = [
            6u16.to_ne_bytes().to_vec(),
            vec![0, 0],
            0x7fff_0000_u32.to_ne_bytes().to_vec(),
        ]
        .concat();
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let status = ask(&leaf, "/status").await;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set}");
        }
        assert_eq!(status["NoNewPrivs"], "1");
        assert_eq!(status["Seccomp"], "2");
        assert_eq!(status["Seccomp_filters"], "2");
        assert_eq!(status["Threads"], "1");
        assert_eq!(status["Uid"], format!("{USER}\t{USER}\t{USER}\t{USER}"));
    });
}

#[test]
fn a_leaf_sees_the_function_and_not_the_zygote() {
    shim(async {
        let (pool, function) = start().await;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let seen = ask(&leaf, "/where").await;
        assert_eq!(seen["pid"], 1);
        assert_eq!(seen["processes"], serde_json::json!([1]));
        assert_eq!(seen["hostname"], "pod-7");
        assert_eq!(seen["cwd"], "/srv/function");
        assert_eq!(
            seen["env"],
            serde_json::json!({"GREETING": "hello", "HOME": "/tmp", "LANG": "C.UTF-8"})
        );
        assert_eq!(seen["marker"], false);
        assert_eq!(seen["mine"], "the function's file");
        // /dev/null, the two streams, the control channel and its duplicate, the connection, the listing itself.
        assert!(
            seen["fds"].as_array().unwrap().len() <= 7,
            "{}",
            seen["fds"]
        );
        assert!(
            !seen["mounts"].as_str().unwrap().contains("zygote"),
            "{}",
            seen["mounts"]
        );
        for kind in ["mnt", "pid", "net", "ipc", "uts"] {
            let zygotes = fs::read_link(format!("/proc/{}/ns/{kind}", pool.process.pid())).unwrap();
            assert_ne!(seen["links"][kind], zygotes.display().to_string(), "{kind}");
        }
    });
}

#[test]
fn a_leaf_is_in_the_cgroup_given_and_nothing_else_is() {
    shim(async {
        let (pool, function) = start().await;
        let _leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let members = function.cgroup.members();
        assert_eq!(members.len(), 1);
        assert!(children(pool.process.pid()).contains(&members[0]));
    });
}

#[test]
fn what_a_leaf_may_not_do_fails() {
    shim(async {
        let (pool, function) = start().await;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let seen = ask(&leaf, "/attempts").await;
        for (what, outcome) in seen.as_object().unwrap() {
            assert_ne!(outcome, "allowed", "{what}");
        }
        assert_eq!(seen["sysctl"], "Read-only file system");
        assert_eq!(seen["usr"], "Read-only file system");
        assert_eq!(seen["raw"], "Operation not permitted");
        assert_eq!(seen["ping"], "Protocol not supported");
        assert_eq!(seen["x32"], "Function not implemented");
    });
}

#[test]
fn a_socket_of_a_leaf_is_in_the_network_of_the_shim() {
    shim(async {
        let (pool, function) = start().await;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = std::thread::spawn(move || {
            let (mut stream, from) = listener.accept().unwrap();
            stream
                .write_all(format!("from {}", from.ip()).as_bytes())
                .unwrap();
        });
        let seen = ask(&leaf, &format!("/fetch?port={port}")).await;
        peer.join().unwrap();
        assert_eq!(seen["got"], "from 127.0.0.1");
        assert_eq!(seen["owner"], USER);
        assert_eq!(seen["inheritable"], false);
        assert_eq!(seen["interfaces"], serde_json::json!(["lo"]));
        assert!(seen["addrinfo"].as_u64().unwrap() > 0);
    });
}

#[test]
fn without_interception_there_is_no_network() {
    shim(async {
        let (pool, mut function) = start().await;
        function.setup.intercept_sockets = false;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut client, served) = connection();
        leaf.leaf.serve(1, served.as_fd()).unwrap();
        write!(
            client,
            "GET /fetch?port={} HTTP/1.1\r\n\r\n",
            listener.local_addr().unwrap().port()
        )
        .unwrap();
        until(&leaf.leaf, |e| matches!(e, Event::Done { status: 500, .. })).await;
        assert!(reply(&mut client).text().contains("unreachable"));
    });
}

#[test]
fn a_secret_is_nowhere_in_the_zygote() {
    shim(async {
        let (pool, mut function) = start().await;
        let secret = format!("secret-{:?}", std::time::Instant::now()).replace(' ', "");
        function.setup.env.push(("TOKEN".into(), secret.clone()));
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(ask(&leaf, "/where").await["env"]["TOKEN"], *secret);
        let member = function.cgroup.members()[0];
        assert!(
            holds(member, secret.as_bytes()),
            "the scan does not find what is there"
        );
        assert!(!holds(pool.process.pid(), secret.as_bytes()));
    });
}

fn holds(pid: i32, needle: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines()
        .filter(|line| line.contains(" rw"))
        .any(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).unwrap());
            let mut bytes = vec![0u8; usize::try_from(end - start).unwrap()];
            memory.read_exact_at(&mut bytes, start).is_ok()
                && bytes.windows(needle.len()).any(|w| w == needle)
        })
}

#[test]
fn the_end_of_a_zygote_ends_no_leaf() {
    shim(async {
        let (pool, function) = start().await;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        pool.process.kill();
        assert!(pool.zygote.ended().await.is_closed());
        assert!(pool.channel.fork(true).await.unwrap_err().is_closed());
        assert_eq!(ask(&leaf, "/where").await["pid"], 1);
    });
}

#[test]
fn the_end_of_a_pools_channel_ends_the_zygote_and_its_spares_but_no_leaf() {
    shim(async {
        let image = Container::new(&[], &[]);
        let mut setup = zygote_setup(&["socket"]);
        setup.spares = 2;
        let pool = Pool::start(image, &setup).await.unwrap();
        let function = Function::new(&pool, PROBE, &[]);
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let Pool {
            process,
            zygote,
            channel,
            image: _image,
            ..
        } = pool;
        drop(zygote);
        assert!(channel.ended().await.is_closed());
        for _ in 0..200 {
            if children(process.holder) == function.cgroup.members() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        // What the zygote has left behind is the holder's now.
        assert_eq!(children(process.holder), function.cgroup.members());
        assert_eq!(ask(&leaf, "/status").await["NoNewPrivs"], "1");
    });
}

#[test]
fn a_zygote_cannot_lift_the_flags_of_a_functions_root() {
    shim(async {
        let (pool, function) = start().await;
        let tree = function.root.clone_tree().unwrap();
        // SAFETY: the child only makes system calls and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = as_the_zygote_would(&pool.process.user_namespace, &tree);
            // SAFETY: ends the child.
            unsafe { libc::_exit(code) }
        }
        let mut status = 0;
        // SAFETY: waits for the child just forked.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(
            libc::WEXITSTATUS(status),
            0,
            "the step with that number was allowed"
        );
    });
}

/// Attaches the tree with all capabilities in the zygote's user namespace and tries to write below
/// `/usr`, to clear each flag, and to take a mount away from above what it covers.
fn as_the_zygote_would(user: &OwnedFd, tree: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    // SAFETY: system calls on numbers and constants.
    unsafe {
        if libc::setns(user.as_raw_fd(), libc::CLONE_NEWUSER) != 0
            || libc::unshare(libc::CLONE_NEWNS) != 0
        {
            return 90;
        }
        let flag = libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            4,
        );
        if flag != 0 || libc::fchdir(tree.as_raw_fd()) != 0 || libc::chroot(c".".as_ptr()) != 0 {
            return 91;
        }
        for (number, attribute) in [
            (1, libc::MOUNT_ATTR_RDONLY),
            (2, libc::MOUNT_ATTR_NOSUID),
            (3, libc::MOUNT_ATTR_NODEV),
        ] {
            let change = libc::mount_attr {
                attr_set: 0,
                attr_clr: attribute,
                propagation: 0,
                userns_fd: 0,
            };
            let size = size_of::<libc::mount_attr>();
            if libc::syscall(
                libc::SYS_mount_setattr,
                libc::AT_FDCWD,
                c"/usr".as_ptr(),
                0,
                &raw const change,
                size,
            ) == 0
            {
                return number;
            }
        }
        if libc::mount(
            std::ptr::null(),
            c"/usr".as_ptr(),
            std::ptr::null(),
            libc::MS_REMOUNT | libc::MS_BIND,
            std::ptr::null(),
        ) == 0
        {
            return 4;
        }
        if libc::umount2(c"/usr".as_ptr(), libc::MNT_DETACH) == 0 {
            return 5;
        }
        if libc::open(c"/usr/x".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600) >= 0 {
            return 6;
        }
    }
    0
}

#[test]
fn a_connection_queued_behind_the_setup_is_answered() {
    shim(async {
        let (pool, function) = start().await;
        let (mut client, served) = connection();
        write!(client, "GET /status HTTP/1.1\r\n\r\n").unwrap();
        let leaf = function
            .leaf(&pool.channel, true, Some((7, served.as_fd())))
            .await
            .unwrap();
        until(&leaf.leaf, |e| {
            matches!(
                e,
                Event::Done {
                    conn: 7,
                    status: 200,
                    ..
                }
            )
        })
        .await;
        assert_eq!(reply(&mut client).status, 200);
        let _: &TcpStream = &client;
    });
}

/// Each helper is a copy of the process and holds whatever another thread has open.
#[test]
fn roots_are_prepared_by_many_threads_at_once() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let container = Container::new(&[], &[]);
        let (prepared, all) = std::sync::mpsc::channel();
        for _ in 0..4 {
            let mounts = container.mounts.try_clone().unwrap();
            let user = pool.process.user_namespace.try_clone().unwrap();
            let prepared = prepared.clone();
            std::thread::spawn(move || {
                for _ in 0..50 {
                    FunctionRoot::prepare(mounts.as_fd(), user.as_fd()).unwrap();
                    prepared.send(()).unwrap();
                }
            });
        }
        for _ in 0..4 * 50 {
            all.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    });
}

/// Where a leaf comes from makes no difference to what it may see of the kernel.
#[test]
fn a_spare_is_masked_as_any_leaf_and_no_more() {
    const REPORT: &str = "
def handler(event, context):
    mounts = [line.split() for line in open('/proc/self/mountinfo')]
    return sorted([m[4], m[5].split(',')[0], m[m.index('-') + 1]] for m in mounts if m[4].startswith(('/proc', '/sys/')))
";
    shim(async {
        let mut setup = zygote_setup(&[]);
        setup.spares = 1;
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let mut function = Function::new(&pool, REPORT, &[]);
        let mut seen = Vec::new();
        for unmasked in [false, true] {
            if unmasked {
                function
                    .setup
                    .masked_paths
                    .retain(|path| path != "/proc/keys");
            }
            for fresh in [true, false] {
                let leaf = loop {
                    let leaf = function.leaf(&pool.channel, fresh, None).await.unwrap();
                    // A spare has made its namespaces before it was told of a Function.
                    let made = leaf.phases.iter().any(|phase| phase.name == "namespaces");
                    if made == fresh {
                        break leaf;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                };
                seen.push(ask(&leaf, "/").await);
            }
        }
        assert_eq!(seen[0], seen[1]);
        assert_eq!(seen[2], seen[3]);
        let is_masked = |mounts: &Value| mounts.to_string().contains("/proc/keys");
        assert!(is_masked(&seen[0]) && !is_masked(&seen[2]), "{seen:?}");
    });
}
