//! Starts a zygote, forks leaves for a handler, calls it once each, and prints where the time goes.
//!
//! ```text
//! fork [--count N] [--spares N] [--imports a,b] [--packages DIR] [--python PATH] [--profile FILE] [--warm-up CODE] [HANDLER.py]
//! ```
//!
//! Needs root and `make extension`, no Kubernetes. A handler file defines `handler(event, context)`.

#![allow(clippy::unwrap_used, reason = "a tool for developers")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index into a table of times"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::{Container, Function, Pool, connection, reply, shim, until, zygote_setup};

const HELLO: &str =
    "def handler(event, context):\n    return {'hello': event['query'].get('name', 'world')}\n";

struct Options {
    count: usize,
    spares: u32,
    imports: Vec<String>,
    packages: Option<PathBuf>,
    python: String,
    profile: Option<PathBuf>,
    warm_up: String,
    handler: Option<PathBuf>,
}

fn options() -> Options {
    let mut options = Options {
        count: 300,
        spares: 0,
        imports: vec![],
        packages: None,
        python: support::python(),
        profile: None,
        warm_up: String::new(),
        handler: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--count" => options.count = value().parse().unwrap(),
            "--spares" => options.spares = value().parse().unwrap(),
            "--imports" => options.imports = value().split(',').map(Into::into).collect(),
            "--packages" => options.packages = Some(value().into()),
            "--python" => options.python = value(),
            "--warm-up" => options.warm_up = value(),
            "--profile" => options.profile = Some(value().into()),
            path => options.handler = Some(path.into()),
        }
    }
    options
}

fn main() {
    let options = options();
    shim(run(&options));
}

async fn run(options: &Options) {
    let source = options
        .handler
        .as_ref()
        .map_or(HELLO.into(), |path| std::fs::read_to_string(path).unwrap());
    let packages: Vec<(&Path, &str)> = options
        .packages
        .iter()
        .map(|dir| (dir.as_path(), "/opt/sock-packages"))
        .collect();
    let image = Container::new(&[], &packages);
    let imports: Vec<&str> = options.imports.iter().map(String::as_str).collect();
    let mut setup = zygote_setup(&imports);
    setup.spares = options.spares;
    setup.warm_up.clone_from(&options.warm_up);
    if options.packages.is_some() {
        setup.path = vec!["/opt/sock-packages".into()];
    }
    let pool = Pool::with_python(image, &setup, &options.python)
        .await
        .unwrap_or_else(|e| panic!("zygote: {e}"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", pool.process.pid())).unwrap();
    let rss = status
        .lines()
        .find(|l| l.starts_with("VmRSS"))
        .unwrap_or_default();
    println!(
        "zygote: imported in {:.1} ms, {rss}",
        pool.warm.import_micros as f64 / 1000.0
    );

    let mut function = Function::new(&pool, &source, &packages);
    function.setup.path[1] = "/opt/sock-packages".into();
    function.setup.single_request = true;
    function.extras.keep_compiled = true;
    function.setup.seccomp = options
        .profile
        .as_ref()
        .map(|path| std::fs::read(path).unwrap())
        .unwrap_or_default();
    let mut table: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut note = |name: &str, micros: f64| table.entry(name.into()).or_default().push(micros);
    let micros = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e6;
    for round in 0..options.count {
        let (mut client, served) = connection();
        client
            .write_all(b"GET /?name=sock HTTP/1.1\r\nhost: here\r\n\r\n")
            .unwrap();
        let running = function
            .leaf(
                &pool.channel,
                options.spares == 0,
                Some((1, served.as_fd())),
            )
            .await
            .unwrap();
        if let Some(compiled) = running.compiled {
            function.extras.compiled = compiled;
        }
        function.extras.keep_compiled = false;
        drop(served);
        let answer = reply(&mut client);
        let answered = Instant::now();
        assert_eq!(answer.status, 200, "{}", answer.text());
        if round == 0 {
            println!("answer: {}", answer.text());
        }
        let times = running.times;
        note("= fork to answer", micros(times.start, answered));
        note("1 setup, clone tree", micros(times.start, times.tree));
        note("2 fork until hello", micros(times.tree, times.hello));
        note(
            "3 hello until confined",
            micros(times.hello, times.confined),
        );
        note("4 import, ready", micros(times.confined, times.ready));
        note("5 ready until answer", micros(times.ready, answered));
        for phase in &running.phases {
            note(&format!("  3 {}", phase.name), phase.micros as f64);
        }
        note("  4 import", running.import_micros as f64);
        if let Some(origin) = running.origin {
            note(
                if origin.spare {
                    "  2 zygote (spare)"
                } else {
                    "  2 zygote (fork)"
                },
                origin.micros as f64,
            );
        }
        until(&running.leaf, |e| {
            matches!(e, sock_zygote::Event::Parked { .. })
        })
        .await;
        assert!(running.leaf.event().await.is_err());
        // Spares are replaced while it is quiet; without them it is to be quiet for the next as well.
        tokio::time::sleep(Duration::from_millis(if options.spares > 0 {
            25
        } else {
            5
        }))
        .await;
    }
    println!(
        "{:<28} {:>9} {:>9} {:>9}  (microseconds, {} requests)",
        "", "p50", "p99", "max", options.count
    );
    for (name, mut values) in table {
        values.sort_by(f64::total_cmp);
        let at = |p: f64| values[((values.len() - 1) as f64 * p) as usize];
        println!(
            "{name:<28} {:>9.0} {:>9.0} {:>9.0}",
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
}
