//! Where leaves come from: a zygote if one is there, the container's own interpreter if not.

use std::cell::{Cell, Ref, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use sock_sandbox::cgroup::{Cgroup, follow};
use sock_zygote::protocol::{LeafExtras, LeafSetup};
use sock_zygote::{
    Arrived, Attachment, Confining, ForkOrigin, FunctionRoot, Look, SealedSetup, SetupFds,
    inject_sockets,
};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::cgroups::LeafCgroup;
use super::output::Streams;

/// A future that stays on its thread, behind a pointer.
pub type Local<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Why a zygote yields no leaf.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The zygote or the way into the pod failed.
    #[error(transparent)]
    Zygote(#[from] sock_zygote::Error),
    /// The leaf's cgroup cannot be entered.
    #[error(transparent)]
    Cgroup(#[from] sock_sandbox::Error),
}

/// Finds zygotes of one kind.
pub trait Zygotes {
    /// One that lives, or `None`. Quick while the one found last still lives.
    fn attach(&self) -> Local<'_, Option<Rc<dyn Zygote>>>;
    /// Whether the last look has found only pools whose zygotes are not there at present.
    fn are_resting(&self) -> bool {
        false
    }
    /// What leaves are told from here on besides, where the first was told to send what it compiles.
    ///
    /// # Errors
    /// When it cannot be written to a memory file: what they were told before holds.
    fn tell_leaves(&self, extras: &LeafExtras) -> Result<(), sock_zygote::Error>;
}

/// A zygote that this pod's leaves can be forked from.
pub trait Zygote {
    /// A new leaf that has been told of its Function and is on its way into `cgroup`.
    fn fork<'a>(
        &'a self,
        cgroup: &'a dyn LeafCgroup,
        streams: &'a Streams,
    ) -> Local<'a, Result<Forked, ForkError>>;
    /// Makes the sockets that a leaf asks for on its seccomp listener, until the leaf is gone.
    fn serve_sockets(&self, listener: OwnedFd) -> Local<'static, ()>;
    /// It does not answer: no further leaf is asked of it for a while.
    fn give_up(&self);
}

/// A leaf just forked.
#[derive(Debug)]
pub struct Forked {
    /// To go on with.
    pub leaf: Confining,
    /// How it came to be, if the zygote said so by then.
    pub origin: Option<ForkOrigin>,
}

/// Starts the container's own command as a leaf.
pub trait Interpreter {
    /// Runs it in `cgroup` with `control` as descriptor 3. The shim kills it by its cgroup, and
    /// whoever implements this reaps it.
    fn start<'a>(
        &'a self,
        control: OwnedFd,
        cgroup: &'a dyn LeafCgroup,
        streams: &'a Streams,
    ) -> Local<'a, anyhow::Result<()>>;
}

/// What leaves of a pod are told: the same for all, but for what is added on the way.
#[derive(Debug)]
pub(super) struct Told {
    setup: LeafSetup,
    sealed: RefCell<SealedSetup>,
}

/// A seccomp profile that some zygotes are held to already.
#[derive(Debug, Clone)]
pub struct Profile {
    /// The zygotes' brokers tell it.
    pub name: String,
    /// What is left to do for a leaf of such a zygote, as in [`LeafSetup::seccomp`].
    pub rest: Vec<u8>,
}

impl Told {
    /// For the first leaf, which is to send what it compiles.
    pub(super) fn new(setup: LeafSetup) -> Result<Told, sock_zygote::Error> {
        let extras = LeafExtras {
            keep_compiled: true,
            ..LeafExtras::default()
        };
        let sealed = RefCell::new(SealedSetup::new(&setup, &extras)?);
        Ok(Told { setup, sealed })
    }

    /// From here on.
    pub(super) fn besides(&self, extras: &LeafExtras) -> Result<(), sock_zygote::Error> {
        self.sealed.replace(SealedSetup::new(&self.setup, extras)?);
        Ok(())
    }

    pub(super) fn sealed(&self) -> Ref<'_, SealedSetup> {
        self.sealed.borrow()
    }
}

/// What every leaf forked into this pod gets, whichever zygote it comes from.
#[derive(Debug)]
struct Pod {
    mounts: OwnedFd,
    told: Told,
    /// The same for leaves of zygotes that are held to the pod's seccomp profile already, and that profile's name.
    told_less: Option<(String, Told)>,
    user: (u32, u32),
}

impl Pod {
    /// What leaves of a zygote are told that is held to a profile.
    fn told(&self, profile: &str) -> &Told {
        match &self.told_less {
            Some((name, told)) if name == profile => told,
            _ => &self.told,
        }
    }
}

/// Where brokers of one digest listen.
pub struct Directory {
    path: PathBuf,
    /// Whether zygotes there may be used, once that is known.
    may_be_used: Cell<bool>,
    /// What was last said against it.
    reason: RefCell<String>,
    ask: Box<dyn Fn() -> Result<(), String>>,
}

impl Directory {
    /// Of the pod's own zygotes.
    #[must_use]
    pub fn own(path: PathBuf) -> Directory {
        Directory {
            path,
            may_be_used: Cell::new(true),
            reason: RefCell::default(),
            ask: Box::new(|| Ok(())),
        }
    }

    /// Of others, which `ask` says the pod may use, or why not. Asked until it agrees: what it goes by may come to be known later.
    #[must_use]
    pub fn of_others(path: PathBuf, ask: impl Fn() -> Result<(), String> + 'static) -> Directory {
        Directory {
            path,
            may_be_used: Cell::new(false),
            reason: RefCell::default(),
            ask: Box::new(ask),
        }
    }

    fn may_be_used(&self) -> bool {
        if !self.may_be_used.get() {
            match (self.ask)() {
                Ok(()) => self.may_be_used.set(true),
                Err(reason) if *self.reason.borrow() != reason => {
                    tracing::warn!(path = %self.path.display(), reason, "zygotes passed over");
                    self.reason.replace(reason);
                }
                Err(_) => {}
            }
        }
        self.may_be_used.get()
    }
}

/// The zygotes behind the broker sockets of some directories.
pub struct Pools {
    /// That of the pod's own zygotes, then those of its ancestors.
    directories: Vec<Directory>,
    pod: Rc<Pod>,
    /// Held while one is looked for, so that several forks at once prepare one root.
    attached: Mutex<Option<Found>>,
    /// The one given up last: its broker may go on as if nothing were amiss.
    given_up: GivenUp,
    container: Option<Rc<Container>>,
    resting: Cell<bool>,
}

/// Where leaves stay when their zygote's pod goes.
#[derive(Debug)]
struct Container {
    cgroup: Cgroup,
    init: i32,
}

/// A leaf that is on its way into the pod when its zygote ends is there by then.
const ARRIVED_WITHIN: Duration = Duration::from_secs(1);

impl Container {
    /// Takes leaves out of the scope of a zygote that is gone, before systemd ends all that is in it.
    async fn keep_leaves(&self) {
        for pause in [ARRIVED_WITHIN, Duration::ZERO] {
            let kept = self
                .cgroup
                .processes()
                .and_then(|leaves| follow(self.init, &leaves));
            if let Err(error) = kept {
                tracing::warn!(%error, "leaves of a zygote that is gone may be killed with its pod");
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// A zygote, by its place among the directories.
#[derive(Debug)]
struct Found {
    zygote: Rc<Attached>,
    rank: usize,
    /// When a nearer one was last looked for.
    looked: Instant,
}

/// While an ancestor stands in, what is asked for may be there any moment.
const LOOK_NEARER_AFTER: Duration = Duration::from_secs(1);

fn keep_leaves(container: Option<Rc<Container>>) {
    if let Some(container) = container {
        tokio::task::spawn_local(async move { container.keep_leaves().await });
    }
}

type GivenUp = Rc<RefCell<Option<(PathBuf, Instant)>>>;

/// A zygote that was given up is not tried again before this.
const GIVEN_UP_FOR: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Attached {
    attachment: Rc<Attachment>,
    root: FunctionRoot,
    /// The next leaf's, cloned ahead.
    tree: RefCell<Option<OwnedFd>>,
    pod: Rc<Pod>,
    listening: AbortHandle,
    abandoned: Cell<bool>,
    given_up: GivenUp,
    container: Option<Rc<Container>>,
}

impl Pools {
    /// Looks in `directories` for brokers, in their order. `mounts` is the mount namespace of the Function's container, `profile`
    /// the pod's, if zygotes may have it too.
    ///
    /// # Errors
    /// When the setup cannot be written to a memory file.
    pub fn new(
        directories: Vec<Directory>,
        mounts: OwnedFd,
        setup: &LeafSetup,
        profile: Option<Profile>,
    ) -> Result<Pools, ForkError> {
        let user = (setup.uid, setup.gid);
        let told_less = profile.map(|Profile { name, rest }| {
            let setup = LeafSetup {
                seccomp: rest,
                ..setup.clone()
            };
            Ok::<_, sock_zygote::Error>((name, Told::new(setup)?))
        });
        let pod = Rc::new(Pod {
            mounts,
            told: Told::new(setup.clone())?,
            told_less: told_less.transpose()?,
            user,
        });
        Ok(Pools {
            directories,
            pod,
            attached: Mutex::new(None),
            given_up: GivenUp::default(),
            container: None,
            resting: Cell::new(false),
        })
    }

    /// Keeps leaves in this container when their zygote ends. `init` is a process that is wholly in it.
    #[must_use]
    pub fn staying_in(self, cgroup: Cgroup, init: i32) -> Pools {
        let container = Some(Rc::new(Container { cgroup, init }));
        Pools { container, ..self }
    }

    async fn find(&self) -> Option<Rc<Attached>> {
        let mut attached = self.attached.lock().await;
        let mut nearer_than = self.directories.len();
        if let Some(found) = attached.as_mut().filter(|found| found.zygote.is_alive()) {
            if found.rank == 0 || found.looked.elapsed() < LOOK_NEARER_AFTER {
                return Some(Rc::clone(&found.zygote));
            }
            found.looked = Instant::now();
            nearer_than = found.rank;
        } else if let Some(before) = attached.take() {
            before.zygote.part();
        }
        self.resting.set(false);
        for (rank, directory) in self.directories[..nearer_than].iter().enumerate() {
            // Quick where there is none: a Function whose ancestors are gone too asks nobody.
            if !directory.path.is_dir() || !directory.may_be_used() {
                continue;
            }
            if let Some(zygote) = self.look_in(&directory.path).await {
                if rank > 0 {
                    tracing::info!(path = %directory.path.display(), "an ancestor's zygote stands in");
                }
                let found = Found {
                    zygote,
                    rank,
                    looked: Instant::now(),
                };
                // Nobody will hear of the end of the one before, whose leaves go on.
                if let Some(before) = attached.replace(found) {
                    before.zygote.part();
                }
                break;
            }
        }
        attached.as_ref().map(|found| Rc::clone(&found.zygote))
    }

    async fn look_in(&self, directory: &Path) -> Option<Rc<Attached>> {
        let found = match sock_zygote::attach(directory).await {
            Ok(Look::Found(found)) => *found,
            Ok(look) => {
                // An ancestor that rests says nothing of the pod's own pool, which may only just start.
                let own = self.directories.first();
                if own.is_some_and(|own| own.path == directory) {
                    self.resting.set(matches!(look, Look::Resting));
                }
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot look for a zygote");
                return None;
            }
        };
        if self
            .given_up
            .borrow()
            .as_ref()
            .is_some_and(|(path, when)| *path == found.path && when.elapsed() < GIVEN_UP_FOR)
        {
            return None;
        }
        if (found.uid, found.gid) != self.pod.user {
            tracing::warn!(
                path = %found.path.display(), zygote = found.uid, function = self.pod.user.0,
                "zygote passed over: it runs as another user than this pod"
            );
            return None;
        }
        match FunctionRoot::prepare(self.pod.mounts.as_fd(), found.user_namespace.as_fd()) {
            Ok(root) => Some(Rc::new(Attached::new(
                found,
                root,
                Rc::clone(&self.pod),
                Rc::clone(&self.given_up),
                self.container.clone(),
            ))),
            Err(error) => {
                tracing::warn!(path = %found.path.display(), %error, "zygote passed over: no root for its leaves");
                None
            }
        }
    }
}

impl Zygotes for Pools {
    fn attach(&self) -> Local<'_, Option<Rc<dyn Zygote>>> {
        Box::pin(async { self.find().await.map(|zygote| zygote as Rc<dyn Zygote>) })
    }

    fn are_resting(&self) -> bool {
        self.resting.get()
    }

    fn tell_leaves(&self, extras: &LeafExtras) -> Result<(), sock_zygote::Error> {
        if let Some((_, told)) = &self.pod.told_less {
            told.besides(extras)?;
        }
        self.pod.told.besides(extras)
    }
}

impl Attached {
    fn new(
        attachment: Attachment,
        root: FunctionRoot,
        pod: Rc<Pod>,
        given_up: GivenUp,
        container: Option<Rc<Container>>,
    ) -> Attached {
        let attachment = Rc::new(attachment);
        let watched = Rc::clone(&attachment);
        let keeper = container.clone();
        // Reads the zygote's answers beside the forks, and learns of its end while there are none.
        let listening = tokio::task::spawn_local(async move {
            let error = watched.zygote.ended().await;
            tracing::info!(path = %watched.path.display(), %error, "zygote is gone");
            keep_leaves(keeper);
        });
        Attached {
            attachment,
            root,
            tree: RefCell::new(None),
            pod,
            listening: listening.abort_handle(),
            abandoned: Cell::new(false),
            given_up,
            container,
        }
    }

    /// Another takes its place while it may live on.
    fn part(&self) {
        if !self.listening.is_finished() {
            keep_leaves(self.container.clone());
        }
    }

    fn is_alive(&self) -> bool {
        !self.abandoned.get() && !self.listening.is_finished()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Zygote for Attached {
    fn fork<'a>(
        &'a self,
        cgroup: &'a dyn LeafCgroup,
        streams: &'a Streams,
    ) -> Local<'a, Result<Forked, ForkError>> {
        Box::pin(async move {
            // The tree is cloned while the zygote forks: the first poll of `fork` sends the request.
            let prepare = async {
                let entrances = cgroup.entrances()?;
                let tree = match self.tree.take() {
                    Some(tree) => tree,
                    None => self.root.clone_tree()?,
                };
                Ok::<_, ForkError>((tree, entrances))
            };
            let fork = async { Ok(self.attachment.zygote.fork(false).await?) };
            let ((arrived, origin), (tree, entrances)): ((Arrived, _), _) =
                tokio::try_join!(biased; fork, prepare)?;
            if let Some(leaves) = &self.attachment.leaves {
                leaves.add();
            }
            let fds = SetupFds {
                root: Some(tree.as_fd()),
                network: Some(self.root.network()),
                cgroups: entrances.iter().map(AsFd::as_fd).collect(),
                stdout: Some(streams.stdout.as_fd()),
                stderr: Some(streams.stderr.as_fd()),
            };
            let told = self.pod.told(&self.attachment.profile);
            let leaf = arrived.setup(&told.sealed(), &fds)?;
            // While the leaf confines itself there is time; the next one may come from a spare and wait for nothing else.
            self.tree.replace(self.root.clone_tree().ok());
            Ok(Forked { leaf, origin })
        })
    }

    fn serve_sockets(&self, listener: OwnedFd) -> Local<'static, ()> {
        let (uid, gid) = (self.attachment.uid, self.attachment.gid);
        Box::pin(async move {
            if let Err(error) = inject_sockets(listener, uid, gid).await {
                tracing::warn!(%error, "a leaf gets no further sockets");
            }
        })
    }

    fn give_up(&self) {
        self.abandoned.set(true);
        self.given_up
            .replace(Some((self.attachment.path.clone(), Instant::now())));
    }
}
