//! A zygote: what it refuses, what it keeps ahead, and what cannot harm it.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::{SendFlags, send};
use serde_json::Value;
use sock_zygote::protocol::{self, Attached, FromZygote, ToZygote, ZygoteSetup};
use sock_zygote::{Broker, Count, Error, Look, attach};
use support::{
    Container, Function, Pool, USER, answer, connection, image, packaged, reply, shim, zygote_setup,
};

const NUMBERS: &str = "
import random, ssl, os
def handler(event, context):
    return [random.random(), ssl.RAND_bytes(8).hex(), os.urandom(4).hex()]
";

/// What a handler answers whose zygote has imported a package of this source.
async fn answer_beside(setup: &ZygoteSetup, name: &str, source: &str, handler: &str) -> Value {
    let pool = Pool::start(image(name, source), setup).await.unwrap();
    let function = Function::new(&pool, handler, &[]);
    let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
    answer(&leaf).await
}

async fn refused(name: &str, source: &str, accepted: bool) -> Result<Pool, (String, String)> {
    let mut setup = packaged(&["json", name]);
    setup.accepted_threads = if accepted { vec![name.into()] } else { vec![] };
    match Pool::start(image(name, source), &setup).await {
        Ok(pool) => Ok(pool),
        Err(Error::Refused { module, message }) => Err((module, message)),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_module_that_starts_a_thread_is_named() {
    const SOURCE: &str = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True, name='ticker').start()\n";
    shim(async {
        let (module, message) = refused("ticking", SOURCE, false).await.err().unwrap();
        assert_eq!(module, "ticking");
        assert!(
            message.contains("1 thread ") && message.contains("ticker (time)"),
            "{message}"
        );
        let pool = refused("ticking", SOURCE, true).await.ok().unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        answer(&function.leaf(&pool.channel, true, None).await.unwrap()).await;
    });
}

/// Each mapping of a process: its line in `maps`, and KiB of it that are the process's own (proc_pid_smaps(5)).
fn mappings(pid: i32) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut all: Vec<(String, u64)> = Vec::new();
    for line in text.lines() {
        match line.split_once(':') {
            Some((name, value)) if !name.contains(' ') => {
                let kib = value.trim().trim_end_matches(" kB");
                if name == "Anonymous" {
                    all.last_mut().unwrap().1 = kib.parse().unwrap();
                }
            }
            _ => all.push((line.to_owned(), 0)),
        }
    }
    all
}

#[test]
fn leaves_have_from_the_fork_what_they_read_of_programs_and_few_mappings() {
    shim(async {
        let pool = Pool::start(
            Container::new(&[], &[]),
            &zygote_setup(&["json", "decimal"]),
        )
        .await
        .unwrap();
        let all = mappings(pool.process.pid());
        let run = |line: &str| line.contains(" r-xp ") && !line.ends_with(']');
        let libraries: Vec<_> = all.iter().filter(|(line, _)| run(line)).collect();
        let read = libraries.iter().filter(|(_, own)| *own > 0).count();
        assert!(
            read >= 3,
            "program, C library and extension: {libraries:#?}"
        );
        // Page tables of a mapping with a page of its own are copied, so there must be no more of these than need be.
        assert!(libraries.iter().all(|(_, own)| *own <= 8), "{libraries:#?}");
        let parted = all.windows(2).filter(|pair| {
            let [one, next] = [&pair[0], &pair[1]].map(|(line, _)| {
                let fields: Vec<_> = line.split_whitespace().collect();
                let number = |text| usize::from_str_radix(text, 16).unwrap();
                let (from, to) = fields[0].split_once('-').unwrap();
                let (from, to) = (number(from), number(to));
                (
                    fields[1].to_owned(),
                    from,
                    to,
                    number(fields[2]),
                    fields.get(5).map(|s| s.to_string()),
                )
            });
            one.0 == "r--p"
                && next.0 == "r-xp"
                && one.4 == next.4
                && one.2 == next.1
                && one.3 + one.2 - one.1 == next.3
        });
        assert_eq!(parted.count(), 0, "{all:#?}");
        let function = Function::new(&pool, NUMBERS, &[]);
        answer(&function.leaf(&pool.channel, true, None).await.unwrap()).await;
    });
}

#[test]
fn a_failing_import_is_named_with_its_line() {
    shim(async {
        let (module, message) = refused("broken", "import json\nimport missing_thing\n", false)
            .await
            .err()
            .unwrap();
        assert_eq!(module, "broken");
        assert_eq!(
            message,
            "ModuleNotFoundError: No module named 'missing_thing' (/packages/broken.py, line 2)"
        );
        let (_, message) = refused("typo", "def f(:\n  pass\n", false)
            .await
            .err()
            .unwrap();
        assert!(
            message.starts_with("SyntaxError: ")
                && message.ends_with("(/packages/typo.py, line 1)"),
            "{message}"
        );
    });
}

#[test]
fn imports_are_timed_one_by_one() {
    shim(async {
        let pool = Pool::start(
            Container::new(&[], &[]),
            &zygote_setup(&["decimal", "sqlite3"]),
        )
        .await
        .unwrap();
        let names: Vec<&str> = pool.warm.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["decimal", "sqlite3"]);
        assert!(pool.warm.import_micros >= pool.warm.modules.iter().map(|m| m.micros).sum());
    });
}

#[test]
fn leaves_draw_different_numbers() {
    shim(async {
        let mut setup = zygote_setup(&["random", "ssl"]);
        setup.spares = 1;
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        let mut seen = Vec::new();
        for fresh in [true, true, false, false] {
            let leaf = function.leaf(&pool.channel, fresh, None).await.unwrap();
            seen.extend(
                answer(&leaf)
                    .await
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(Value::to_string),
            );
        }
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
    });
}

#[test]
fn a_handler_that_cannot_be_loaded_is_explained() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&["statistics"]))
            .await
            .unwrap();
        let fails = async |source: &str, handler: &str| {
            let mut function = Function::new(&pool, source, &[]);
            function.setup.handler = handler.into();
            match function.leaf(&pool.channel, true, None).await {
                Err(Error::LeafFailed { message, .. }) => message,
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("{handler} was loaded"),
            }
        };
        assert_eq!(
            fails("x = 1\ny = x.z\n", "app.handler").await,
            "AttributeError: 'int' object has no attribute 'z' (/srv/function/app.py, line 2)"
        );
        assert_eq!(
            fails("x = 1", "app.handler").await,
            "handler 'app.handler': /srv/function/app.py defines no 'handler'"
        );
        assert_eq!(
            fails("x = 1", "app.x").await,
            "handler 'app.x': 'x' in /srv/function/app.py is a int, not a function"
        );
        assert!(
            fails("x = 1", "nope.x")
                .await
                .starts_with("handler 'nope.x': there is no module 'nope' in /srv/function")
        );
        assert!(
            fails("x = 1", "app")
                .await
                .contains("not of the form module.attribute")
        );
        assert!(
            fails("async def h(e, c): pass", "app.h")
                .await
                .contains("async")
        );
        assert!(
            fails("def f(:", "app.h")
                .await
                .ends_with("(/srv/function/app.py, line 1)")
        );
        assert!(
            fails("import sys; sys.exit(3)", "app.h")
                .await
                .contains("status 3")
        );
    });
}

#[test]
fn the_functions_module_wins_over_one_that_the_zygote_has_imported() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&["statistics"]))
            .await
            .unwrap();
        let source = "def handler(event, context):\n    return 'mine'\n";
        let container = Container::new(&[("/srv/function/statistics.py", source)], &[]);
        let mut function = Function::in_container(&pool, container);
        function.setup.handler = "statistics.handler".into();
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let (mut client, served) = connection();
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        leaf.leaf.serve(1, served.as_fd()).unwrap();
        assert_eq!(reply(&mut client).text(), "mine");
    });
}

#[test]
fn what_warms_up_runs_often_in_the_zygote_and_once_more_in_a_spare() {
    const COUNT: &str = "import sys\nsys.warmed = getattr(sys, 'warmed', 0) + 1\n";
    const REPORT: &str = "import sys\ndef handler(event, context):\n    return sys.warmed\n";
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.spares = 1;
        setup.warm_up = COUNT.into();
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, REPORT, &[]);
        let fresh = function.leaf(&pool.channel, true, None).await.unwrap();
        let in_zygote = answer(&fresh).await.as_u64().unwrap();
        // A code object is specialized at its eighth call at the latest.
        assert!(in_zygote >= 8, "{in_zygote}");
        while support::children(pool.process.pid()).len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let leaf = function.leaf(&pool.channel, false, None).await.unwrap();
        assert_eq!(answer(&leaf).await, in_zygote + 1);
    });
}

#[test]
fn hooks_of_packages_run_once_in_a_leaf_and_again_when_it_forks_itself() {
    const HOOKED: &str = "
import os
seen = []
for name in ['a', 'b']:
    os.register_at_fork(
        before=lambda name=name: seen.append('before ' + name),
        after_in_parent=lambda name=name: seen.append('parent ' + name),
        after_in_child=lambda name=name: seen.append('child ' + name),
    )
try:
    os.register_at_fork(before=1)
except TypeError:
    seen.append('refused')
";
    const REPORT: &str = "
import hooked, logging, os, random, threading
def handler(event, context):
    first = list(hooked.seen)
    hooked.seen.clear()
    read, write = os.pipe()
    state = random.getstate()
    child = os.fork()
    if child == 0:
        os.write(write, ','.join([*hooked.seen, str(random.getstate() != state)]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return [first, os.read(read, 1000).decode(), hooked.seen, threading.main_thread().native_id]
";
    shim(async {
        let setup = packaged(&["logging", "threading", "hooked"]);
        let expected = serde_json::json!([
            ["refused", "before b", "before a", "child a", "child b"],
            "before b,before a,child a,child b,True",
            ["before b", "before a", "parent a", "parent b"],
            1
        ]);
        let said = answer_beside(&setup, "hooked", HOOKED, REPORT).await;
        assert_eq!(said, expected);
    });
}

#[test]
fn hooks_that_draw_numbers_draw_different_ones() {
    const HOOKED: &str = "
import os, random
drawn = []
os.register_at_fork(after_in_child=lambda: drawn.append(random.gauss(0, 1)))
";
    const REPORT: &str = "
import hooked, random
def handler(event, context):
    return [hooked.drawn[0], random.gauss(0, 1)]
";
    shim(async {
        let setup = packaged(&["hooked"]);
        let pool = Pool::start(image("hooked", HOOKED), &setup).await.unwrap();
        let function = Function::new(&pool, REPORT, &[]);
        let mut drawn = Vec::new();
        for _ in 0..2 {
            let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
            let numbers = answer(&leaf).await;
            drawn.extend([numbers[0].clone(), numbers[1].clone()]);
        }
        assert_ne!(drawn[0], drawn[2]);
        assert_ne!(drawn[1], drawn[3]);
    });
}

#[test]
fn forks_of_a_warm_up_run_hooks_too() {
    const HOOKED: &str = "
import os
seen = []
os.register_at_fork(
    before=lambda: seen.append('before'),
    after_in_parent=lambda: seen.append('parent'),
    after_in_child=lambda: seen.append('child'),
)
";
    const WARM_UP: &str = "
import hooked, os, random
hooked.seen.clear()
read, write = os.pipe()
state = random.getstate()
child = os.fork()
if child == 0:
    os.write(write, ','.join([*hooked.seen, str(random.getstate() != state)]).encode())
    os._exit(0)
os.waitpid(child, 0)
hooked.said = [os.read(read, 1000).decode(), list(hooked.seen)]
";
    const REPORT: &str = "
import hooked
def handler(event, context):
    return hooked.said
";
    shim(async {
        let mut setup = packaged(&["hooked"]);
        setup.warm_up = WARM_UP.into();
        let expected = serde_json::json!(["before,child,True", ["before", "parent"]]);
        let said = answer_beside(&setup, "hooked", HOOKED, REPORT).await;
        assert_eq!(said, expected);
    });
}

/// What helps a zygote to be quick is no reason to refuse one.
#[test]
fn packages_that_are_in_the_way_of_what_is_prepared_are_served_all_the_same() {
    const ODD: &str = "
import random, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
random._inst = random.SystemRandom()
";
    // It holds whatever is open for longer than the zygote may take to start.
    const WARM_UP: &str = "
import os, time
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
";
    shim(async {
        let mut setup = packaged(&["odd"]);
        setup.warm_up = WARM_UP.into();
        let begin = std::time::Instant::now();
        let pool = Pool::start(image("odd", ODD), &setup).await.unwrap();
        assert!(begin.elapsed() < Duration::from_secs(15));
        let function = Function::new(&pool, NUMBERS, &[]);
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(answer(&leaf).await.as_array().map(Vec::len), Some(3));
    });
}

#[test]
fn a_finder_of_a_package_is_asked_for_the_handler() {
    const FINDER: &str = "
import importlib.machinery, importlib.util, sys
class Loader(importlib.machinery.SourceFileLoader):
    def get_data(self, path):
        return super().get_data(path).replace(b'plain', b'changed')
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'app':
            return importlib.util.spec_from_loader(name, Loader(name, '/srv/function/app.py'))
sys.meta_path.insert(0, Finder())
";
    shim(async {
        let setup = packaged(&["finder"]);
        let source = "def handler(event, context):\n    return ['plain']\n";
        let said = answer_beside(&setup, "finder", FINDER, source).await;
        assert_eq!(said, serde_json::json!(["changed"]));
    });
}

#[test]
fn a_hook_that_fails_is_told_and_ends_nothing() {
    const HOOKED: &str = "
import os
def fails():
    raise ValueError('not after a fork')
os.register_at_fork(after_in_child=fails)
";
    shim(async {
        let setup = packaged(&["hooked"]);
        let said = answer_beside(&setup, "hooked", HOOKED, NUMBERS).await;
        assert_eq!(said.as_array().map(Vec::len), Some(3));
    });
}

/// Python's view and the C library's are one.
#[test]
fn variables_are_those_of_the_function_also_for_its_programs() {
    const REPORT: &str = "
import os, subprocess
def programs():
    return sorted(subprocess.run(['/usr/bin/env'], capture_output=True, text=True).stdout.splitlines())
def handler(event, context):
    before = programs()
    own = sorted(f'{name}={value}' for name, value in os.environ.items())
    os.environ['ADDED'] = 'new'
    del os.environ['GONE']
    os.putenv('BEHIND', 'python')
    return [own == before, before, programs(), os.popen('echo $BEHIND').read()]
";
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let mut function = Function::new(&pool, REPORT, &[]);
        function.setup.env = vec![
            ("GONE".into(), "soon".into()),
            ("KEPT".into(), "grüß = x".into()),
        ];
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let expected = serde_json::json!([
            true,
            ["GONE=soon", "KEPT=grüß = x"],
            ["ADDED=new", "BEHIND=python", "KEPT=grüß = x"],
            "python\n"
        ]);
        assert_eq!(answer(&leaf).await, expected);
    });
}

/// A leaf imports the usual handler by itself; whatever it is, Python's own order holds.
#[test]
fn a_handlers_module_is_the_one_that_python_would_import() {
    const MAIN: &str = "
import inspect, sys
import helper
def handler(event, context):
    return [__name__, __file__, __package__, __spec__.name, __spec__.origin, __spec__.has_location,
            sys.modules[__name__].handler is handler, inspect.getsource(handler).startswith('def handler'), helper.main is sys.modules[__name__]]
";
    const HELPER: &str = "import app as main\n";
    const PACKAGE: &str = "def handler(event, context):\n    return [__file__]\n";
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let main = ("/srv/function/app.py", MAIN);
        let files = [main, ("/srv/function/helper.py", HELPER)];
        let function = Function::in_container(&pool, Container::new(&files, &[]));
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        let expected = serde_json::json!([
            "app",
            "/srv/function/app.py",
            "",
            "app",
            "/srv/function/app.py",
            true,
            true,
            true,
            true
        ]);
        assert_eq!(answer(&leaf).await, expected);
        let files = [main, ("/srv/function/app/__init__.py", PACKAGE)];
        let function = Function::in_container(&pool, Container::new(&files, &[]));
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(
            answer(&leaf).await,
            serde_json::json!(["/srv/function/app/__init__.py"])
        );
    });
}

#[test]
fn what_the_first_leaf_has_compiled_serves_the_others_until_the_file_changes() {
    let source = |word: &str| format!("def handler(event, context):\n    return ['{word}']\n");
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let mut function = Function::new(&pool, &source("first"), &[]);
        let file = function.container.path("/srv/function/app.py");
        function.extras.keep_compiled = true;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        function.extras.compiled = leaf.compiled.clone().unwrap();
        assert_eq!(answer(&leaf).await, serde_json::json!(["first"]));
        // The same file by all that is asked of it: only who does not read it says the same.
        let changed = std::fs::metadata(&file).unwrap().modified().unwrap();
        std::fs::write(&file, source("other")).unwrap();
        let again = std::fs::File::options().write(true).open(&file).unwrap();
        again.set_modified(changed).unwrap();
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(answer(&leaf).await, serde_json::json!(["first"]));
        assert_eq!(leaf.compiled, None, "nothing was compiled");
        again
            .set_modified(changed + Duration::from_nanos(1))
            .unwrap();
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(answer(&leaf).await, serde_json::json!(["other"]));
    });
}

/// To look for the thread pools of numeric libraries takes milliseconds, so the zygote does it, once all are loaded.
#[test]
fn thread_pools_of_what_only_the_warm_up_loads_are_looked_for_in_the_zygote() {
    const POOLS: &str = "
looked = 0
class Pool:
    num_threads = 1
    def set_num_threads(self, count):
        self.num_threads = count
class ThreadpoolController:
    def __init__(self):
        global looked
        looked += 1
        self.lib_controllers = pools
pools = [Pool()]
";
    const REPORT: &str = "
import threadpoolctl
# Before the leaf has its threads.
in_zygote = threadpoolctl.looked
def handler(event, context):
    return [in_zygote, threadpoolctl.looked, threadpoolctl.pools[0].num_threads]
";
    shim(async {
        let files = [
            ("/packages/numpy.py", ""),
            ("/packages/threadpoolctl.py", POOLS),
        ];
        let mut setup = packaged(&["json"]);
        setup.warm_up = "import numpy\n".into();
        let pool = Pool::start(Container::new(&files, &[]), &setup)
            .await
            .unwrap();
        let mut function = Function::new(&pool, REPORT, &[]);
        function.setup.threads = 3;
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(answer(&leaf).await, serde_json::json!([1, 1, 3]));
    });
}

#[test]
fn half_a_line_that_the_zygote_has_printed_is_not_printed_again_by_its_leaves() {
    const HALF: &str = "import sys\nsys.stdout.write('half a line')\n";
    // What is still in the buffer goes where the handler can read it.
    const REPORT: &str = "
import os, sys

def handler(event, context):
    read, write = os.pipe()
    os.set_blocking(read, False)
    before = os.dup(1)
    os.dup2(write, 1)
    sys.stdout.flush()
    os.dup2(before, 1)
    try:
        return [os.read(read, 1000).decode()]
    except BlockingIOError:
        return ['nothing']
";
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.warm_up = HALF.into();
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, REPORT, &[]);
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        assert_eq!(answer(&leaf).await, serde_json::json!(["nothing"]));
    });
}

#[test]
fn a_failing_warm_up_is_named_with_its_line() {
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.warm_up = "import json\njson.no_such_thing\n".into();
        let result = Pool::start(Container::new(&[], &[]), &setup).await;
        let Err(Error::Refused { module, message }) = result else {
            panic!("the zygote was not refused");
        };
        assert_eq!(module, "warmUp");
        assert_eq!(
            message,
            "AttributeError: module 'json' has no attribute 'no_such_thing' (<warmUp>, line 2)"
        );
    });
}

#[test]
fn spares_are_taken_and_replaced() {
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.spares = 2;
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        let ahead = || support::children(pool.process.pid()).len();
        for round in 0..3 {
            for _ in 0..200 {
                if ahead() == 2 + round {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(ahead(), 2 + round);
            let leaf = function.leaf(&pool.channel, false, None).await.unwrap();
            answer(&leaf).await;
            std::mem::forget(leaf);
        }
    });
}

#[test]
fn a_leaf_that_is_to_be_fresh_leaves_spares_alone() {
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.spares = 1;
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        while support::children(pool.process.pid()).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let spare = support::children(pool.process.pid());
        let leaf = function.leaf(&pool.channel, true, None).await.unwrap();
        answer(&leaf).await;
        let now = support::children(pool.process.pid());
        assert!(
            now.len() == 2 && now.contains(&spare[0]),
            "{spare:?}, then {now:?}"
        );
    });
}

#[test]
fn a_spare_that_was_killed_is_not_handed_out() {
    shim(async {
        let mut setup = zygote_setup(&["json"]);
        setup.spares = 1;
        let pool = Pool::start(Container::new(&[], &[]), &setup).await.unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        tokio::time::sleep(Duration::from_millis(50)).await;
        for pid in support::children(pool.process.pid()) {
            // SAFETY: takes numbers only.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        answer(&function.leaf(&pool.channel, false, None).await.unwrap()).await;
    });
}

#[test]
fn hostile_bytes_on_a_channel_end_that_channel_only() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        let (ours, theirs) = protocol::pair().unwrap();
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let attacks: [&dyn Fn(&OwnedFd); 7] = [
            &|c| assert!(send(c, &[0xff; 900], SendFlags::empty()).is_ok()),
            &|c| assert!(send(c, &vec![7u8; 70_000], SendFlags::empty()).is_ok()),
            &|c| assert!(send(c, b"", SendFlags::empty()).is_ok()),
            &|c| drop(protocol::send(c, &ToZygote::Attach, &[ours.as_fd()])),
            &|c| {
                drop(protocol::send(
                    c,
                    &ToZygote::Fork {
                        ticket: 1,
                        fresh: true,
                    },
                    &[],
                ))
            },
            &|c| {
                drop(protocol::send(
                    c,
                    &ToZygote::Fork {
                        ticket: 1,
                        fresh: true,
                    },
                    &[file.as_fd()],
                ))
            },
            &|c| {
                drop(protocol::send(
                    c,
                    &ToZygote::Fork {
                        ticket: 1,
                        fresh: true,
                    },
                    &[ours.as_fd(), theirs.as_fd()],
                ))
            },
        ];
        for (number, attack) in attacks.iter().enumerate() {
            let channel = pool.zygote.attach().unwrap();
            attack(&channel);
            let gone = sock_zygote::Channel::new(channel, "zygote")
                .unwrap()
                .receive::<FromZygote>(0)
                .await;
            assert!(gone.unwrap_err().is_closed(), "attack {number}");
        }
        // The shim's own channel is not that of a tenant, and survives nonsense too.
        answer(&function.leaf(&pool.channel, true, None).await.unwrap()).await;
    });
}

#[test]
fn a_leaf_survives_neither_nonsense_nor_a_lost_shim() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        // Nobody sets it up: it ends with its channel.
        let (arrived, _) = pool.channel.fork(true).await.unwrap();
        assert_eq!(support::children(pool.process.pid()).len(), 1);
        drop(arrived);
        for _ in 0..200 {
            if support::children(pool.process.pid()).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the leaf is still there");
    });
}

#[test]
fn many_forks_at_once_on_one_channel() {
    shim(async {
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&["json"]))
            .await
            .unwrap();
        let function = Function::new(&pool, NUMBERS, &[]);
        let fork =
            || async { answer(&function.leaf(&pool.channel, true, None).await.unwrap()).await };
        let (a, b, c, d) = tokio::join!(fork(), fork(), fork(), fork());
        assert!([&b, &c, &d].iter().all(|other| **other != a));
    });
}

#[test]
fn a_broker_leads_to_its_zygote_and_stale_sockets_go() {
    shim(async {
        let dir = tempfile::tempdir().unwrap();
        // As long as the names of a real pool: longer than sun_path.
        let dir = dir.path().join("t".repeat(64)).join("d".repeat(64));
        assert!(matches!(attach(&dir).await, Ok(Look::Nobody)));
        let pool = Pool::start(Container::new(&[], &[]), &zygote_setup(&[]))
            .await
            .unwrap();
        let stale = dir.join("stale.sock");
        let broker = Broker::listen(&dir.join(format!("{}.sock", "s".repeat(64)))).unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.parent().unwrap().join("x")).unwrap());
        std::fs::rename(dir.parent().unwrap().join("x"), &stale).unwrap();
        let attached = Attached {
            uid: USER,
            gid: USER,
            profile: "of the pool".into(),
        };
        let look = tokio::select! {
            asked = async { broker.refuse().await.unwrap(); std::future::pending().await } => asked,
            look = attach(&dir) => look.unwrap(),
        };
        assert!(matches!(look, Look::Resting), "{look:?}");
        let leaves = Count::new().unwrap();
        let found = tokio::select! {
            error = broker.serve(&pool.zygote, pool.process.user_namespace.as_fd(), &attached, &leaves) => panic!("{error}"),
            look = attach(&dir) => look.unwrap().found().unwrap(),
        };
        assert_eq!((found.uid, found.gid), (USER, USER));
        assert_eq!(found.profile, "of the pool");
        let function = Function::new(&pool, NUMBERS, &[]);
        answer(&function.leaf(&found.zygote, true, None).await.unwrap()).await;
        let theirs = found.leaves.unwrap();
        assert_eq!((leaves.take(), leaves.take()), (1, 0), "that it attached");
        theirs.add();
        theirs.add();
        assert_eq!((leaves.take(), leaves.take()), (2, 0));
        drop(broker);
        assert!(matches!(attach(&dir).await, Ok(Look::Nobody)));
    });
}
