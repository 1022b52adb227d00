//! The import tier: which of the node's zygotes go on, and which end until they are asked for.
//!
//! Zygotes of a node share a budget of memory. Each pool's shim keeps an account of its own zygote at `/run/sock/zygotes/SANDBOX`, in
//! JSON: what it costs and what it is worth. All shims look at the same moments, read all accounts, come to the same list
//! ([`sock_policy::pressure::zygotes`]), and each ends its own if that is in it. There is no daemon that has to know of all, be asked,
//! or be there. An account that is wrong or missing costs speed.
//!
//! A node that is idle costs a look at two files every few seconds for each pool: accounts are written when they change, and read
//! when one was written.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use sock_policy::Rate;
use sock_policy::pressure::{self, Zygote};
use sock_policy::rate::decayed;
use sock_sandbox::cgroup::Cgroup;
use sock_zygote::Count;

use crate::children::has_ended;
use crate::memory::{Memory, now, until_next};

/// Accounts.
const ACCOUNTS: &str = "/run/sock/zygotes";
/// What zygotes may hold, in bytes, as the node installer was told.
const BUDGET: &str = "/run/sock/zygote-memory";
/// Of the node's memory, where it was not: one part of so many.
const SHARE: u64 = 4;

/// All look at the multiples of this of the machine's own clock.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// From the writing of accounts to the reading: everybody reads what everybody has written.
const DECIDE_AFTER: Duration = Duration::from_secs(1);
/// Forks of so long ago count half.
const HALF_LIFE: Duration = Duration::from_secs(180);
/// Its Functions are busy for so long after a fork.
const BUSY_FOR: Duration = Duration::from_secs(60);
/// Between two looks whether one may come back.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Before one comes back that has ended because memory was short.
const AWAY_FOR: Duration = Duration::from_secs(120);

/// What a zygote costs and what it is worth. Times are seconds since the machine has started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Account {
    tenant: String,
    digest: String,
    /// DIGEST of the zygote that it was forked from.
    parent: Option<String>,
    import_micros: u64,
    bytes: u64,
    forks_per_second: f64,
    /// When that was so.
    at: f64,
    is_alive: bool,
    busy_until: f64,
    has_leaves: bool,
}

impl Account {
    fn is_kept(&self, now: f64) -> bool {
        self.has_leaves || self.busy_until > now
    }

    fn weighed(&self, all: &[Account], now: f64) -> Zygote {
        let is_parent = |other: &Account| {
            other.tenant == self.tenant && Some(&other.digest) == self.parent.as_ref()
        };
        // Two pools of one version stand side by side while nodes or spares change.
        let parent = all.iter().position(|o| is_parent(o) && o.is_alive);
        let passed = Duration::try_from_secs_f64(now - self.at).unwrap_or_default();
        Zygote {
            parent: parent.or_else(|| all.iter().position(is_parent)),
            import_seconds: self.import_micros as f64 / 1e6,
            forks_per_second: decayed(self.forks_per_second, passed, HALF_LIFE),
            bytes: self.bytes,
            is_alive: self.is_alive,
            is_kept: self.is_kept(now),
        }
    }
}

/// Where the node says what there is.
#[derive(Debug, Clone)]
struct Node {
    accounts: PathBuf,
    budget: PathBuf,
    memory: Memory,
}

/// A pool's part in it, from its first zygote to its end.
#[derive(Debug)]
pub struct Membership {
    node: Node,
    /// Name of its account.
    name: String,
    account: RefCell<Account>,
    /// As it was written last.
    written: RefCell<Option<Account>>,
    leaves: Count,
    forks: RefCell<Rate>,
    /// When an account, and the budget, was last written, as of the last look that led to nothing.
    seen: Cell<Option<Written>>,
    /// Until when it stays away, if memory was short.
    away_until: Cell<Option<Instant>>,
}

/// When accounts and the budget were last written.
type Written = (SystemTime, Option<SystemTime>);

/// What of a zygote is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Of its container.
    pub cgroup: &'a Cgroup,
    /// Its process.
    pub pid: i32,
}

impl Subject<'_> {
    /// Whether it has children that are no spares: leaves, which are in the cgroups of their own pods. One that has ended is none, whether or not its
    /// parent, a tenant's code, has asked for its status.
    fn has_leaves(&self) -> bool {
        let path = format!("/proc/{0}/task/{0}/children", self.pid);
        let children = fs::read_to_string(path).unwrap_or_default();
        if children.trim().is_empty() {
            return false;
        }
        let own = self.cgroup.processes().unwrap_or_default();
        let mut children = children.split_whitespace().filter_map(|c| c.parse().ok());
        children.any(|child: i32| !own.contains(&child) && !has_ended(child))
    }
}

impl Membership {
    /// Of the pool whose sandbox is called `name`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(name: &str, tenant: &str, digest: &str) -> Result<Membership, sock_zygote::Error> {
        let node = Node {
            accounts: ACCOUNTS.into(),
            budget: BUDGET.into(),
            memory: Memory::default(),
        };
        Self::at(node, name, tenant, digest)
    }

    fn at(
        node: Node,
        name: &str,
        tenant: &str,
        digest: &str,
    ) -> Result<Membership, sock_zygote::Error> {
        let account = Account {
            tenant: tenant.to_owned(),
            digest: digest.to_owned(),
            ..Account::default()
        };
        Ok(Membership {
            node,
            name: name.to_owned(),
            account: RefCell::new(account),
            written: RefCell::default(),
            leaves: Count::new()?,
            forks: RefCell::new(Rate::new(HALF_LIFE, Instant::now())),
            seen: Cell::default(),
            away_until: Cell::default(),
        })
    }

    /// What leaves of its zygotes are counted with.
    #[must_use]
    pub fn leaves(&self) -> &Count {
        &self.leaves
    }

    /// A zygote is about to be, forked from that of `parent` if there is one: others count with it from here on.
    pub fn starts(&self, parent: Option<String>) {
        let mut account = self.account.borrow_mut();
        account.is_alive = true;
        account.parent = parent;
        // Longer than imports take, and then whoever has waited for it has yet to find it.
        account.busy_until = (now() + 3 * BUSY_FOR).as_secs_f64();
        drop(account);
        self.write();
    }

    /// It is warm: it took this long to import what its parent had not.
    pub fn begins(&self, import_micros: u64) {
        let mut account = self.account.borrow_mut();
        account.import_micros = import_micros;
        account.busy_until = (now() + BUSY_FOR).as_secs_f64();
        drop(account);
        self.write();
    }

    /// Returns when the zygote is one of those to end.
    pub async fn is_to_end(&self, subject: Subject<'_>) {
        loop {
            tokio::time::sleep(until_next(now(), LOOK_EVERY)).await;
            self.measure(subject);
            tokio::time::sleep(DECIDE_AFTER).await;
            let time = now().as_secs_f64();
            let short = self.node.memory.shortage();
            if self.account.borrow().is_kept(time) {
                self.seen.set(None);
                continue;
            }
            let written = self.node.last_written();
            if short.is_none() && written.is_some() && self.seen.get() == written {
                continue;
            }
            let (weighed, own) = self.all(time);
            if pressure::zygotes(&weighed, self.node.budget(&weighed, short)).contains(&own) {
                self.away_until
                    .set(short.map(|_| Instant::now() + AWAY_FOR));
                return;
            }
            self.seen.set(written);
        }
    }

    /// It has ended for that.
    pub fn rests(&self) {
        let forks = self.forks.borrow().per_second(Instant::now());
        let mut account = self.account.borrow_mut();
        account.is_alive = false;
        account.has_leaves = false;
        account.busy_until = 0.0;
        account.forks_per_second = forks;
        account.at = now().as_secs_f64();
        drop(account);
        self.write();
    }

    /// It is asked for while it is not there: whether it may be. Asked at most once a second, whatever is asked of it.
    pub fn may_begin(&self, asked: &mut Option<Instant>) -> bool {
        let time = Instant::now();
        if asked.is_some_and(|last| time < last + ASK_EVERY) {
            return false;
        }
        *asked = Some(time);
        let forks = {
            let mut forks = self.forks.borrow_mut();
            forks.happened(time);
            forks.per_second(time)
        };
        {
            let mut account = self.account.borrow_mut();
            account.forks_per_second = forks;
            account.at = now().as_secs_f64();
        }
        self.write();
        let bytes = self.account.borrow().bytes;
        let is_away = self.away_until.get().is_some_and(|until| time < until);
        if is_away || self.node.memory.shortage().is_some() || !self.node.memory.has_room_for(bytes)
        {
            return false;
        }
        let (weighed, own) = self.all(now().as_secs_f64());
        pressure::may_begin(&weighed, own, self.node.budget(&weighed, None))
    }

    fn measure(&self, subject: Subject<'_>) {
        let new = self.leaves.take();
        let time = now().as_secs_f64();
        let mut account = self.account.borrow_mut();
        if new > 0 {
            let mut forks = self.forks.borrow_mut();
            forks.happened_times(new, Instant::now());
            account.forks_per_second = forks.per_second(Instant::now());
            account.at = time;
            account.busy_until = time + BUSY_FOR.as_secs_f64();
        }
        account.has_leaves = subject.has_leaves();
        if let Some(bytes) = subject.cgroup.own_memory() {
            // What changes by a page has not changed.
            if bytes.abs_diff(account.bytes) > account.bytes / 16 {
                account.bytes = bytes;
            }
        }
        drop(account);
        self.write();
    }

    /// Writes the account, if it has changed.
    fn write(&self) {
        let account = self.account.borrow();
        if self.written.borrow().as_ref() == Some(&*account) {
            return;
        }
        match self.node.write(&self.name, &account) {
            Ok(()) => *self.written.borrow_mut() = Some(account.clone()),
            Err(error) => {
                tracing::warn!(path = %self.node.accounts.display(), %error, "other pools do not know of this zygote");
            }
        }
    }

    /// All zygotes that the node has accounts of, in an order that is the same for everybody, and the place of its own.
    fn all(&self, now: f64) -> (Vec<Zygote>, usize) {
        let mut all = self.node.read();
        all.retain(|(name, _)| *name != self.name);
        let own = all.partition_point(|(name, _)| *name < self.name);
        all.insert(own, (self.name.clone(), self.account.borrow().clone()));
        let all: Vec<Account> = all.into_iter().map(|(_, account)| account).collect();
        (all.iter().map(|one| one.weighed(&all, now)).collect(), own)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        forget_in(&self.node.accounts, &self.name);
    }
}

/// After a crash of a shim: there is no zygote of this sandbox any more.
pub fn forget(sandbox: &str) {
    forget_in(Path::new(ACCOUNTS), sandbox);
}

fn forget_in(accounts: &Path, name: &str) {
    for name in [name.to_owned(), unfinished(name)] {
        let _ = fs::remove_file(accounts.join(name));
    }
    // With the last.
    let _ = fs::remove_dir(accounts);
}

fn unfinished(name: &str) -> String {
    format!(".{name}")
}

impl Node {
    /// What zygotes may hold: less than they do while memory is short by so many bytes.
    fn budget(&self, all: &[Zygote], short: Option<u64>) -> u64 {
        let told = fs::read_to_string(&self.budget).ok();
        let told = told.and_then(|text| text.trim().parse().ok());
        let budget = told.unwrap_or_else(|| self.memory.total() / SHARE);
        let Some(short) = short else { return budget };
        let living = all.iter().filter(|zygote| zygote.is_alive);
        let used = living.fold(0_u64, |sum, zygote| sum.saturating_add(zygote.bytes));
        budget.min(used.saturating_sub(short.max(1)))
    }

    fn last_written(&self) -> Option<Written> {
        let time = |path: &Path| fs::metadata(path).ok()?.modified().ok();
        Some((time(&self.accounts)?, time(&self.budget)))
    }

    /// Appears at once and whole. Changes the time of the directory.
    fn write(&self, name: &str, account: &Account) -> io::Result<()> {
        let text = serde_json::to_vec(account)?;
        let new = self.accounts.join(unfinished(name));
        // The last pool's end may remove the directory in between.
        let mut tries = 0..10;
        loop {
            fs::create_dir_all(&self.accounts)?;
            let written =
                fs::write(&new, &text).and_then(|()| fs::rename(&new, self.accounts.join(name)));
            match written {
                Err(e) if e.kind() == io::ErrorKind::NotFound && tries.next().is_some() => {}
                other => return other,
            }
        }
    }

    /// By name. What another release has written may be left out.
    fn read(&self) -> Vec<(String, Account)> {
        let entries = fs::read_dir(&self.accounts).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let finished = names.filter(|name| !name.starts_with('.'));
        let mut all: Vec<_> = finished
            .filter_map(|name| {
                let bytes = fs::read(self.accounts.join(&name)).ok()?;
                Some((name, serde_json::from_slice(&bytes).ok()?))
            })
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    struct There(tempfile::TempDir);

    impl There {
        fn new(budget: u64) -> There {
            let there = There(tempfile::tempdir().unwrap());
            fs::write(there.0.path().join("budget"), budget.to_string()).unwrap();
            there.available(10_000);
            there
        }

        fn available(&self, mib: u64) {
            let text = format!("MemTotal: 20480000 kB\nMemAvailable: {} kB\n", mib * 1024);
            fs::write(self.0.path().join("meminfo"), text).unwrap();
        }

        fn node(&self) -> Node {
            Node {
                accounts: self.0.path().join("accounts"),
                budget: self.0.path().join("budget"),
                memory: Memory::at(self.0.path().join("meminfo"), self.0.path().join("none")),
            }
        }

        fn pool(&self, name: &str, parent: Option<&str>, mib: u64, forks: f64) -> Membership {
            let pool = Membership::at(self.node(), name, "tenant", name).unwrap();
            pool.starts(parent.map(str::to_owned));
            pool.begins(1_000_000);
            {
                let mut account = pool.account.borrow_mut();
                account.bytes = mib * MIB;
                account.forks_per_second = forks;
                account.at = now().as_secs_f64();
                account.busy_until = 0.0;
            }
            pool.write();
            pool
        }

        /// Names of those that end by themselves, as each of them sees it.
        fn to_end<'a>(&self, pools: &[&'a Membership]) -> Vec<&'a str> {
            let time = now().as_secs_f64();
            let ends = |pool: &&&Membership| {
                let (all, own) = pool.all(time);
                let short = pool.node.memory.shortage();
                pressure::zygotes(&all, pool.node.budget(&all, short)).contains(&own)
            };
            pools.iter().filter(ends).map(|p| p.name.as_str()).collect()
        }
    }

    #[test]
    fn all_come_to_the_same_list_and_each_ends_its_own() {
        let there = There::new(250 * MIB);
        let base = there.pool("c", None, 100, 0.0);
        let busy = there.pool("a", Some("c"), 100, 5.0);
        let idle = there.pool("b", Some("c"), 100, 0.01);
        let pools = [&base, &busy, &idle];
        assert_eq!(there.to_end(&pools), ["b"]);
        idle.rests();
        assert_eq!(there.to_end(&pools), [""; 0]);
        // Memory of the node is short by so much more than the idle one had.
        there.available(850);
        assert_eq!(there.to_end(&pools), ["c", "a"]);
        there.available(950);
        assert_eq!(there.to_end(&pools), ["a"]);
    }

    #[test]
    fn who_rests_comes_back_where_there_is_room_and_no_want() {
        let there = There::new(150 * MIB);
        let resting = there.pool("a", None, 100, 0.0);
        resting.rests();
        let other = there.pool("b", None, 100, 1.0);
        let asked = &mut None;
        assert!(!resting.may_begin(asked));
        // Not every question is one.
        drop(other);
        assert!(!resting.may_begin(asked));
        assert!(resting.may_begin(&mut None));
        // Not if it would be short with it, nor soon after it was.
        there.available(2050);
        assert!(!resting.may_begin(&mut None));
        there.available(2150);
        assert!(resting.may_begin(&mut None));
        there.available(100);
        assert!(!resting.may_begin(&mut None));
        there.available(10_000);
        resting.away_until.set(Some(Instant::now() + AWAY_FOR));
        assert!(!resting.may_begin(&mut None));
    }

    #[test]
    fn who_is_asked_for_often_takes_the_place_of_another() {
        let there = There::new(150 * MIB);
        let resting = there.pool("a", None, 100, 0.0);
        resting.rests();
        let _other = there.pool("b", None, 100, 0.02);
        let asks = (0..100).take_while(|_| !resting.may_begin(&mut None));
        let asks = asks.count();
        assert!((2..60).contains(&asks), "{asks}");
    }

    #[test]
    fn a_child_that_has_ended_is_no_leaf_and_one_that_runs_is() {
        let script = "sleep 0 & exec sleep 1000";
        let mut parent = std::process::Command::new("sh")
            .args(["-c", script])
            .spawn()
            .unwrap();
        let own = i32::try_from(parent.id()).unwrap();
        let hierarchies = sock_sandbox::cgroup::Hierarchies::detect().unwrap();
        let elsewhere = sock_sandbox::cgroup::Location::Path("sock-test-nobody".into());
        let cgroup = Cgroup::at(&hierarchies, &elsewhere);
        let subject = Subject {
            cgroup: &cgroup,
            pid: own,
        };
        let end = Instant::now() + Duration::from_secs(10);
        while subject.has_leaves() {
            assert!(Instant::now() < end, "a zombie is taken for a leaf");
            std::thread::yield_now();
        }
        parent.kill().unwrap();
        parent.wait().unwrap();
        let script = "sleep 1000 & echo $!; wait";
        let mut parent = std::process::Command::new("sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(parent.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        let pid = i32::try_from(parent.id()).unwrap();
        assert!(
            Subject {
                cgroup: &cgroup,
                pid
            }
            .has_leaves()
        );
        // SAFETY: a child of the child, by its number, which nobody else can have while its parent waits.
        unsafe { libc::kill(line.trim().parse().unwrap(), libc::SIGKILL) };
        parent.wait().unwrap();
    }

    #[test]
    fn nothing_is_left_and_nothing_strange_is_believed() {
        let there = There::new(0);
        let pool = there.pool("a", None, 100, 1.0);
        let accounts = there.node().accounts;
        for (name, text) in [("b", "{}"), ("c", ""), (".d", "x"), ("e", "{\"tenant\": 1")] {
            fs::write(accounts.join(name), text).unwrap();
        }
        assert_eq!(there.to_end(&[&pool]), ["a"]);
        for name in ["b", "c", ".d", "e"] {
            fs::remove_file(accounts.join(name)).unwrap();
        }
        drop(pool);
        assert!(!accounts.exists());
    }

    #[test]
    fn a_share_of_the_memory_is_the_budget_of_a_node_that_was_told_none() {
        let there = There::new(7);
        assert_eq!(there.node().budget(&[], None), 7);
        fs::remove_file(there.0.path().join("budget")).unwrap();
        assert_eq!(there.node().budget(&[], None), 5000 * MIB);
    }
}
