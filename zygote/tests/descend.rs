//! Zygotes forked from zygotes: what they share, what they do not, and that the end of one is not the end of the other.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::fd::AsFd as _;

use serde_json::{Value, json};
use sock_zygote::Error;
use support::{Child, Container, Function, Pool, image, packaged, shim, zygote_setup};

/// What a new leaf of a Function answers.
async fn answer(function: &Function, channel: &sock_zygote::ZygoteChannel, fresh: bool) -> Value {
    let leaf = function.leaf(channel, fresh, None).await.unwrap();
    support::answer(&leaf).await
}

/// In KiB, of the only process in the child's cgroup that has lived long enough to be it.
fn memory(child: &Child, field: &str) -> u64 {
    let info = fs::read_to_string(format!(
        "/proc/self/fdinfo/{}",
        std::os::fd::AsRawFd::as_raw_fd(&child.pidfd)
    ))
    .unwrap();
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let path = format!("/proc/{}/smaps_rollup", pid.unwrap().trim());
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_child_imports_what_is_missing_and_shares_the_rest() {
    const LARGE: &str = "data = b'x' * (64 << 20)\nnames = [str(i) for i in range(200000)]\n";
    const HANDLER: &str = "
import sys
before = sorted(m for m in ('large', 'decimal', 'sqlite3') if m in sys.modules)
def handler(event, context):
    import large
    return [before, len(large.data), large.names[-1]]
";
    shim(async {
        let parent = Pool::start(image("large", LARGE), &packaged(&["large"]))
            .await
            .unwrap();
        let child = Child::of(
            &parent.channel,
            parent.process.user_namespace.as_fd(),
            image("large", "raise SystemExit('it is imported again')"),
            &packaged(&["large", "decimal", "sqlite3"]),
        )
        .await
        .unwrap();
        let modules: Vec<_> = child.warm.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(modules, ["large", "decimal", "sqlite3"]);
        let function = child.function(HANDLER);
        for fresh in [true, false] {
            let said = answer(&function, &child.channel, fresh).await;
            assert_eq!(
                said,
                json!([["decimal", "large", "sqlite3"], 64 << 20, "199999"])
            );
        }
        // The parent knows nothing of what its child has imported.
        let function = Function::new(&parent, HANDLER, &[]);
        let said = answer(&function, &parent.channel, true).await;
        assert_eq!(said[0], json!(["large"]));
        let (all, own) = (memory(&child, "Rss:"), memory(&child, "Private_Dirty:"));
        assert!(all > 70 << 10 && own < 16 << 10, "{own} of {all} KiB");
    });
}

#[test]
fn a_tree_is_as_deep_as_it_is_asked_to_be_and_outlives_its_root() {
    const HANDLER: &str = "
import sys, os
def handler(event, context):
    return [[m for m in ('m0', 'm1', 'm2', 'm3') if m in sys.modules], os.getpid()]
";
    shim(async {
        let files: Vec<_> = (0..4)
            .map(|n| (format!("/packages/m{n}.py"), format!("n = {n}")))
            .collect();
        let files: Vec<_> = files
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_str()))
            .collect();
        let image = || Container::new(&files, &[]);
        let names = ["m0", "m1", "m2", "m3"];
        let root = Pool::start(image(), &packaged(&names[..1])).await.unwrap();
        let mut tree: Vec<Child> = Vec::new();
        for depth in 1..4 {
            let (channel, user) = match tree.last() {
                Some(parent) => (&parent.channel, parent.nested.user()),
                None => (&root.channel, root.process.user_namespace.as_fd()),
            };
            let child = Child::of(channel, user, image(), &packaged(&names[..=depth])).await;
            tree.push(child.unwrap());
        }
        root.process.kill();
        root.zygote.ended().await;
        for (depth, child) in tree.iter().enumerate() {
            let function = child.function(HANDLER);
            let said = answer(&function, &child.channel, true).await;
            assert_eq!(said, json!([&names[..=depth + 1], 1]));
        }
        // From the inside out: namespaces of the outer ones end with the inner ones in them.
        while tree.pop().is_some() {}
    });
}

#[test]
fn children_and_their_leaves_draw_their_own_numbers() {
    const NUMBERS: &str = "
import random, ssl, drawn
def handler(event, context):
    return [drawn.number, random.random(), ssl.RAND_bytes(8).hex()]
";
    const DRAWN: &str = "import random\nnumber = random.random()\n";
    shim(async {
        let parent = Pool::start(Container::new(&[], &[]), &zygote_setup(&["random", "ssl"]))
            .await
            .unwrap();
        let mut said = Vec::new();
        let mut children = Vec::new();
        for _ in 0..2 {
            let user = parent.process.user_namespace.as_fd();
            let child = Child::of(
                &parent.channel,
                user,
                image("drawn", DRAWN),
                &packaged(&["drawn"]),
            )
            .await
            .unwrap();
            let function = child.function(NUMBERS);
            for _ in 0..2 {
                said.push(answer(&function, &child.channel, true).await);
            }
            children.push(child);
        }
        assert_eq!(said[0][0], said[1][0]);
        assert_ne!(said[0][0], said[2][0], "two children drew the same");
        for kind in [1, 2] {
            let mut all: Vec<_> = said.iter().map(|s| s[kind].to_string()).collect();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), 4, "{said:?}");
        }
    });
}

#[test]
fn hooks_of_an_ancestors_package_run_in_each_child_and_each_leaf_once() {
    const HOOKED: &str = "
import os
calls = []
os.register_at_fork(before=lambda: calls.append('before'), after_in_child=lambda: calls.append('child'))
";
    const HANDLER: &str = "
import hooked, subprocess
def handler(event, context):
    own = list(hooked.calls)
    if __import__('os').fork() == 0:
        __import__('os')._exit(len(hooked.calls))
    return [own, __import__('os').waitstatus_to_exitcode(__import__('os').wait()[1])]
";
    shim(async {
        let parent = Pool::start(image("hooked", HOOKED), &packaged(&["hooked"]))
            .await
            .unwrap();
        // The scout of the parent's warm-up is a process of its own and leaves nothing.
        let child = Child::of(
            &parent.channel,
            parent.process.user_namespace.as_fd(),
            image("hooked", HOOKED),
            &packaged(&["hooked", "decimal"]),
        )
        .await
        .unwrap();
        let function = child.function(HANDLER);
        let said = answer(&function, &child.channel, true).await;
        assert_eq!(said, json!([["before", "child", "before", "child"], 6]));
    });
}

#[test]
fn an_import_of_a_child_that_fails_is_named_and_harms_nobody() {
    shim(async {
        let parent = Pool::start(Container::new(&[], &[]), &zygote_setup(&["json"]))
            .await
            .unwrap();
        let child = |source: &'static str| {
            let user = parent.process.user_namespace.as_fd();
            let setup = packaged(&["json", "broken"]);
            let channel = &parent.channel;
            async move { Child::of(channel, user, image("broken", source), &setup).await }
        };
        match child("import missing_thing\n").await.err() {
            Some(Error::Refused { module, message }) => {
                assert_eq!(module, "broken");
                assert!(
                    message
                        .contains("No module named 'missing_thing' (/packages/broken.py, line 1)"),
                    "{message}"
                );
            }
            other => panic!("{other:?}"),
        }
        match child("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n").await.err() {
            Some(Error::Refused { module, message }) => {
                assert!(module == "broken" && message.contains("1 thread "), "{message}");
            }
            other => panic!("{other:?}"),
        }
        assert!(
            child("import os\nos._exit(3)\n")
                .await
                .err()
                .unwrap()
                .is_closed()
        );
        let function = Function::new(&parent, "def handler(event, context):\n    return 1\n", &[]);
        assert_eq!(answer(&function, &parent.channel, true).await, json!(1));
    });
}

#[test]
fn a_process_of_other_namespaces_is_no_child() {
    shim(async {
        let setup = zygote_setup(&[]);
        let a = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let b = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let newborn = a.channel.fork_zygote().await.unwrap();
        let error = newborn.namespaces(b.process.user_namespace.as_fd()).err();
        assert!(
            matches!(error, Some(Error::Impostor { .. })),
            "it was taken for a child of another zygote: {error:?}"
        );
    });
}

/// What import-time code of a child tries against its parent and its siblings.
#[test]
fn a_hostile_child_reaches_neither_parent_nor_sibling() {
    const HOSTILE: &str = r#"
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
done = {}

def attempt(name, call):
    try:
        done[name] = str(call())
    except OSError as error:
        done[name] = "refused: " + error.strerror

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

attempt("sees", lambda: sorted(int(p) for p in os.listdir("/proc") if p.isdigit()))
attempt("parent", os.getppid)
attempt("kill all", lambda: os.kill(-1, 0) or "done")
attempt("holder's root", lambda: os.listdir("/proc/1/root"))
attempt("trace the holder", lambda: checked(libc.ptrace(16, 1, 0, 0)))
attempt("outer user namespace", lambda: checked(libc.ioctl(os.open("/proc/self/ns/user", os.O_RDONLY), 0xb702)))
attempt("outer processes", lambda: checked(libc.ioctl(os.open("/proc/self/ns/pid", os.O_RDONLY), 0xb702)))
attempt("become another user", lambda: checked(libc.setresuid(2000000000, 2000000000, 2000000000)))
attempt("descriptors", lambda: [os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in map(int, os.listdir("/proc/self/fd")) if fd > 3 and os.path.exists(f"/proc/self/fd/{fd}")])
attempt("capabilities", lambda: [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd"))])
attempt("abstract socket", lambda: checked(libc.socket(1, 1, 0)) and [line for line in open("/proc/net/unix") if "@" in line])
"#;
    const HANDLER: &str = "
import hostile
def handler(event, context):
    return hostile.done
";
    shim(async {
        let parent = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let user = parent.process.user_namespace.as_fd();
        let plain = zygote_setup(&[]);
        let sibling = Child::of(&parent.channel, user, Container::new(&[], &[]), &plain);
        let sibling = sibling.await.unwrap();
        let setup = packaged(&["ctypes", "hostile"]);
        let child = Child::of(&parent.channel, user, image("hostile", HOSTILE), &setup);
        let child = child.await.unwrap();
        let function = child.function(HANDLER);
        let said = answer(&function, &child.channel, true).await;
        let of = |name: &str| said[name].as_str().unwrap().to_owned();
        // Itself and its holder.
        assert_eq!(of("sees").split(',').count(), 2, "{said}");
        assert_eq!(of("parent"), "0", "{said}");
        for refused in [
            "holder's root",
            "trace the holder",
            "outer user namespace",
            "outer processes",
            "become another user",
        ] {
            assert!(of(refused).starts_with("refused"), "{refused}: {said}");
        }
        // CAP_SYS_ADMIN and CAP_SYS_CHROOT, over its own namespaces alone.
        assert_eq!(
            of("capabilities"),
            "['0000000000240000', '0000000000000000']",
            "{said}"
        );
        assert_eq!(of("abstract socket"), "[]", "{said}");
        let function = Function::new(&parent, "def handler(event, context):\n    return 1\n", &[]);
        assert_eq!(answer(&function, &parent.channel, true).await, json!(1));
        let function = sibling.function("def handler(event, context):\n    return 2\n");
        assert_eq!(answer(&function, &sibling.channel, true).await, json!(2));
    });
}
