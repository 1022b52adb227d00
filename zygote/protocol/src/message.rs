//! The messages. See `docs/design.md`, "How a fork goes", for who says what when.

use serde::{Deserialize, Deserializer, Serialize};

/// To a zygote. The first message on its first channel is [`ToZygote::Configure`], sent by the shim of
/// its pool; that channel alone may `Attach` others. A Function's shim speaks on an attached channel
/// and may only `Fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToZygote {
    /// What to import and how many spares to keep.
    Configure(ZygoteSetup),
    /// One descriptor: a channel on which another shim will ask for leaves.
    Attach,
    /// One descriptor: the leaf's end of its control channel. Answered by `Forked` or `ForkFailed`.
    Fork {
        /// Chosen by the asker and repeated in the answer.
        ticket: u64,
        /// Fork now even if a spare is there.
        fresh: bool,
    },
    /// One descriptor: the child's end of its control channel. The child is to become a zygote with more packages. Answered
    /// as `Fork` is; the child itself says [`FromZygote::Hello`] and waits for `Enter`.
    ForkZygote {
        /// As in `Fork`.
        ticket: u64,
    },
    /// To such a child: the descriptors are named by `fds`, in order; the first is always a sealed memory file with the
    /// postcard form of [`ZygoteEntry`]. Answered by [`FromZygote::Entered`]; `Configure` follows.
    Enter {
        /// What each descriptor of this message is.
        fds: Vec<ZygoteFd>,
    },
}

/// What a descriptor of [`ToZygote::Enter`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteFd {
    /// Sealed memory file with a [`ZygoteEntry`].
    Entry,
    /// PID namespace, nested in the parent's, in which the zygote is born.
    Pid,
    /// User namespace, nested in the parent's. Owns all that follow.
    User,
    /// Mount namespace with the root of its container.
    Mount,
    /// Network namespace.
    Network,
    /// IPC namespace.
    Ipc,
    /// UTS namespace.
    Uts,
    /// Cgroup namespace.
    CgroupNamespace,
    /// See [`FdRole::Cgroup`].
    Cgroup,
    /// Becomes descriptor 1.
    Stdout,
    /// Becomes descriptor 2.
    Stderr,
}

/// What a zygote that was forked from another must know of its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZygoteEntry {
    /// The whole environment, `(name, value)`.
    pub env: Vec<(String, String)>,
}

/// What a zygote is to become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZygoteSetup {
    /// Modules to import, in this order.
    pub imports: Vec<String>,
    /// Directories put at the front of `sys.path`.
    pub path: Vec<String>,
    /// Leaves to keep forked ahead of need.
    pub spares: u32,
    /// Modules whose threads are accepted although a fork may not carry them over.
    pub accepted_threads: Vec<String>,
    /// Python code to run once after the imports: what packages do at their first use is then done.
    pub warm_up: String,
}

/// From a zygote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromZygote {
    /// Everything is imported and leaves can be forked.
    Ready {
        /// Time of all imports, in microseconds.
        import_micros: u64,
        /// Time of each, in order.
        modules: Vec<ModuleImport>,
    },
    /// It cannot serve as a zygote and ends now.
    Refused {
        /// The module at fault, empty if none is to blame.
        module: String,
        /// One line for a person: what is wrong and what to do.
        message: String,
    },
    /// The leaf exists and owns its control channel.
    Forked {
        /// From the request.
        ticket: u64,
        /// Whether a spare was taken.
        spare: bool,
        /// From the request read to the leaf there, in microseconds.
        micros: u64,
    },
    /// There is no leaf; the control channel is closed.
    ForkFailed {
        /// From the request.
        ticket: u64,
        /// One line for a person.
        message: String,
    },
    /// From a child that is to become a zygote: it exists, and is in its parent's namespaces still. The kernel adds its
    /// credentials (`SO_PASSCRED`).
    Hello,
    /// It is in its container and waits for `Configure`; it is another process than the one that said `Hello`. The kernel
    /// adds its credentials.
    Entered,
}

/// One import of a zygote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleImport {
    /// Its name.
    pub name: String,
    /// Its time with everything it pulled in, in microseconds.
    pub micros: u64,
}

/// From the broker of a pool to a Function's shim that connected, with two descriptors: the shim's end
/// of a channel to the zygote, and the zygote's user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The only user mapped in that namespace, as the host numbers it.
    pub uid: u32,
    /// The only group, likewise.
    pub gid: u32,
    /// Name of the seccomp profile that the zygote is held to, by which shims know if it is that of their pod. Empty from a
    /// release that does not tell; one that does not know it reads what comes before.
    #[serde(deserialize_with = "if_there")]
    pub profile: String,
}

/// Right behind [`Attached`], with one descriptor: an eventfd to which the shim adds each leaf that it gets from the zygote. A release
/// that knows nothing of it does not read so far, or closes the connection instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Counted {
    /// Leaves.
    Leaves,
}

/// The last field of a message that another release may end before.
fn if_there<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(T::deserialize(deserializer).unwrap_or_default())
}

/// To a leaf, on its control channel, from the shim of its Function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLeaf {
    /// Answers `Hello`. The descriptors are named by `fds`, in order; the first is always the sealed
    /// memory file with the postcard form of [`LeafSetup`] and [`LeafExtras`].
    Setup {
        /// What each descriptor of this message is.
        fds: Vec<FdRole>,
    },
    /// One descriptor: an accepted connection with bytes to read. May be queued behind `Setup`.
    Serve {
        /// Chosen by the shim; names the connection from here on.
        conn: u64,
    },
    /// Hand the connection back if it is idle at a request boundary: answered by `Parked`, or by
    /// nothing while a request is under way (the next `Done` is then followed by `Parked`).
    Park {
        /// From `Serve`, or [`ToLeaf::DRAIN`].
        conn: u64,
    },
    /// Finish what is under way and exit with status 0.
    Exit,
}

impl ToLeaf {
    /// `Park` of this connection, which never is one: the pod stops. Every answer from here on says that it is the last on
    /// its connection (`Connection: close`; RFC 9112, 9.6), so that no client sends another request into the end.
    ///
    /// Not a message of its own: leaves of a release that knows none pass over a connection that they do not have.
    pub const DRAIN: u64 = u64::MAX;
}

/// What a descriptor of [`ToLeaf::Setup`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FdRole {
    /// Sealed memory file with a [`LeafSetup`].
    Setup,
    /// Detached mount tree that becomes the root directory (`open_tree(2)` with `OPEN_TREE_CLONE`).
    Root,
    /// Empty network namespace to join.
    Network,
    /// `cgroup.procs` (version 2) or `tasks` (version 1): write `0` to it. Several may come. On version 1
    /// a process of one thread that moves itself through `tasks` spares the kernel the global lock
    /// and its grace period (`cgroup_procs_write_start`, kernel/cgroup/cgroup.c, 5.15): 35 µs for 10 ms.
    Cgroup,
    /// Becomes descriptor 1.
    Stdout,
    /// Becomes descriptor 2.
    Stderr,
}

/// All a leaf must know of its Function. The same bytes serve every leaf of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafSetup {
    /// `module.attribute` of the handler.
    pub handler: String,
    /// Directories put at the front of `sys.path`, the Function's code first.
    pub path: Vec<String>,
    /// The whole environment, `(name, value)`.
    pub env: Vec<(String, String)>,
    /// Working directory inside the root.
    pub cwd: String,
    /// Host name of the pod.
    pub hostname: String,
    /// Name of the Function, for the handler's context.
    pub function: String,
    /// Its namespace, likewise.
    pub namespace: String,
    /// Name of the pod, likewise.
    pub pod: String,
    /// User and group that the leaf must already be. A check, not an order: the namespace maps no other.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// Paths below the root to hide (OCI `maskedPaths`); those that do not exist are passed over.
    pub masked_paths: Vec<String>,
    /// Paths below the root to make read-only (OCI `readonlyPaths`).
    pub readonly_paths: Vec<String>,
    /// Soft and hard limits; what may not be raised is left as it is.
    pub rlimits: Vec<Rlimit>,
    /// The pod's seccomp profile: `struct sock_filter` in native byte order, 8 bytes each. Empty: none.
    pub seccomp: Vec<u8>,
    /// `socket(2)` of the Internet families and netlink goes to the shim by seccomp notification.
    pub intercept_sockets: bool,
    /// End after the first request, keeping nothing for another.
    pub single_request: bool,
    /// Give an idle keep-alive connection back after this many milliseconds.
    pub park_after_ms: u64,
    /// Largest request body, in bytes (413 beyond).
    pub max_body: u64,
    /// Threads that numeric libraries may use; 0 leaves them alone.
    pub threads: u32,
    /// Time limit of a request in seconds, for the handler's context (the shim enforces it).
    pub timeout_seconds: u32,
}

/// What stands behind a [`LeafSetup`] in its file. Shims and zygotes of different releases meet while a node is
/// upgraded: whoever does not know this part does not look at it, and where it is missing the defaults hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafExtras {
    /// Send the handler's module, as the interpreter has compiled it, with `Ready`.
    pub keep_compiled: bool,
    /// What another leaf of the pod has sent; empty if there is nothing. To be used if it is of the same file and for the
    /// same Python.
    pub compiled: Vec<u8>,
}

impl LeafSetup {
    /// Both, as they stand in the file.
    ///
    /// # Errors
    /// None that is known: the form takes everything that fits into memory.
    pub fn to_bytes(&self, extras: &LeafExtras) -> Result<Vec<u8>, postcard::Error> {
        let mut bytes = postcard::to_stdvec(self)?;
        bytes.extend(postcard::to_stdvec(extras)?);
        Ok(bytes)
    }

    /// Reads what [`LeafSetup::to_bytes`] has written, of this or another release.
    ///
    /// # Errors
    /// When it is no such thing.
    pub fn from_bytes(bytes: &[u8]) -> Result<(LeafSetup, LeafExtras), postcard::Error> {
        let (setup, rest) = postcard::take_from_bytes(bytes)?;
        let extras = if rest.is_empty() {
            LeafExtras::default()
        } else {
            postcard::from_bytes(rest)?
        };
        Ok((setup, extras))
    }
}

/// One resource limit, by its number in `setrlimit(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// From a leaf, in this order: `Hello`, `Confined`, `Ready` (or `Failed` in place of either), and
/// then for every connection `Began`/`Done` pairs, ended by `Parked` or `Closed`. A `Closed` without
/// `Done` is a request whose answer did not get through whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLeaf {
    /// It exists; the kernel adds its credentials (`SO_PASSCRED`).
    Hello,
    /// It has its root, cgroup, namespaces, and no capability. One descriptor if sockets are
    /// intercepted: the seccomp listener.
    Confined {
        /// Where the time went.
        phases: Vec<Phase>,
    },
    /// The handler is imported. One descriptor if [`LeafExtras::keep_compiled`] asked for it and the handler was compiled: a
    /// memory file with what the extras of others may hold.
    Ready {
        /// Time of that import in microseconds.
        import_micros: u64,
    },
    /// It could not get there, and exits.
    Failed {
        /// The line a person needs: the last of the traceback, with file and line number.
        message: String,
        /// The whole traceback, as far as it fits; also written to standard error.
        traceback: String,
    },
    /// The head of a request was read.
    Began {
        /// From `Serve`.
        conn: u64,
    },
    /// The answer was written.
    Done {
        /// From `Serve`.
        conn: u64,
        /// HTTP status.
        status: u16,
        /// From `Began` to the answer written, in microseconds.
        micros: u64,
    },
    /// The connection is idle at a request boundary and the leaf has closed its own descriptor of it.
    Parked {
        /// From `Serve`.
        conn: u64,
    },
    /// The connection ended; the leaf has shut it down and closed its descriptor.
    Closed {
        /// From `Serve`.
        conn: u64,
    },
}

/// A named step and its duration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// `mount`, `proc`, `cgroup`, ...
    pub name: String,
    /// Microseconds.
    pub micros: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_with_and_without_a_profile_read_each_other() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Before {
            uid: u32,
            gid: u32,
        }

        let attached = Attached {
            uid: 70_000,
            gid: 3,
            profile: "ab".into(),
        };
        let before = Before {
            uid: 70_000,
            gid: 3,
        };
        let bytes = postcard::to_stdvec(&attached).expect("bytes");
        assert_eq!(postcard::from_bytes(&bytes), Ok(attached.clone()));
        assert_eq!(postcard::from_bytes::<Before>(&bytes), Ok(before));
        let bytes = &bytes[..bytes.len() - 3];
        let untold = Attached {
            profile: String::new(),
            ..attached
        };
        assert_eq!(postcard::from_bytes(bytes), Ok(untold));
        assert!(postcard::from_bytes::<Attached>(&bytes[..2]).is_err());
    }

    #[test]
    fn releases_with_and_without_extras_read_each_other() {
        let setup = LeafSetup {
            handler: "app.handler".into(),
            path: vec!["/srv/function".into()],
            env: vec![("NAME".into(), "value".into())],
            cwd: "/".into(),
            hostname: "pod".into(),
            function: "function".into(),
            namespace: "team".into(),
            pod: "pod".into(),
            uid: 1,
            gid: 2,
            masked_paths: vec![],
            readonly_paths: vec![],
            rlimits: vec![],
            seccomp: vec![1, 2, 3],
            intercept_sockets: true,
            single_request: false,
            park_after_ms: 3,
            max_body: 4,
            threads: 5,
            timeout_seconds: 6,
        };
        let extras = LeafExtras {
            keep_compiled: true,
            compiled: vec![7; 100],
        };
        let bytes = setup.to_bytes(&extras).expect("bytes");
        assert_eq!(
            LeafSetup::from_bytes(&bytes).expect("it is whole"),
            (setup.clone(), extras)
        );
        assert_eq!(
            postcard::from_bytes::<LeafSetup>(&bytes).expect("it is whole"),
            setup
        );
        let before = postcard::to_stdvec(&setup).expect("it is whole");
        let alone = (setup, LeafExtras::default());
        assert_eq!(LeafSetup::from_bytes(&before).expect("it is whole"), alone);
        assert!(LeafSetup::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    }
}
