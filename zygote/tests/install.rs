//! The installer with the real uv, against an index on loopback that answers as indexes do when something is wrong:
//! the last line that it says is the one that the author of a PackageSet reads.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Runs the installer's own code with its fixed paths moved into a directory of the test's.
const RUN: &str = "
import importlib.util, os, sys
payload, home = sys.argv[1:]
spec = importlib.util.spec_from_file_location('install', payload + '/python/install.py')
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)
install.UV = payload + '/bin/uv'
install.REQUIREMENTS = home + '/requirements.txt'
install.STAGING = home
install.TARGET = home + '/site-packages'
install.CACHE = home + '/.cache'
install.main()
";

fn payload() -> PathBuf {
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/payload/opt/sock");
    std::env::var_os("SOCK_PAYLOAD").map_or_else(|| target.into(), PathBuf::from)
}

/// An index: `/simple/` knows six, `/private/` wants `user` with `p w@ß`, `/broken/` fails.
fn index() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("its address"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let request = lines.next().unwrap_or_default();
            let authorization = lines.take_while(|line| !line.is_empty()).find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("authorization")
                    .then(|| value.to_owned())
            });
            let path = request.split(' ').nth(1).unwrap_or_default();
            let files = format!(
                "<a href='six-2.0-cp27-cp27m-win32.whl#sha256={HASH}'>six-2.0-cp27-cp27m-win32.whl</a>\
                 <a href='six-3.0.tar.gz#sha256={HASH}'>six-3.0.tar.gz</a>"
            );
            let (status, body) = match (path, authorization.as_deref()) {
                ("/simple/six/", _) | ("/private/six/", Some("Basic dXNlcjpwIHdAw58=")) => {
                    ("200 OK", files)
                }
                ("/private/six/", None) => ("401 Unauthorized", String::new()),
                ("/private/six/", Some(_)) => ("403 Forbidden", String::new()),
                ("/broken/six/", _) => ("500 Internal Server Error", String::new()),
                _ => ("404 Not Found", String::new()),
            };
            // A client that leaves early gets nothing.
            let _ = write!(
                &stream,
                "HTTP/1.1 {status}\r\nContent-Type: text/html\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    address
}

/// What the installer says last when it installs `requirement` from `index`.
fn last_line(index: &str, requirement: &str, credentials: Option<(&str, &str)>) -> String {
    let home = tempfile::tempdir().expect("a directory");
    let text = format!("{requirement} --hash=sha256:{HASH}\n");
    std::fs::write(home.path().join("requirements.txt"), text).expect("requirements");
    let mut command = Command::new("python3");
    command
        .args(["-c", RUN])
        .args([payload().as_path(), home.path()])
        .env("SOCK_INDEX_URL", index)
        .env_remove("SOCK_CACHED");
    if let Some((user, password)) = credentials {
        command
            .env("SOCK_INDEX_USERNAME", user)
            .env("SOCK_INDEX_PASSWORD", password);
    }
    let output = command.output().expect("python3");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(!said.contains("p w@ß"), "no password is said: {said}");
    said.trim_end()
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn the_last_line_says_what_to_mend() {
    let index = index();
    let public = format!("{index}/simple/");
    let private = format!("{index}/private/");
    for (url, requirement, credentials, expected) in [
        (
            &public,
            "nosuch==1.0",
            None,
            format!("sock install: requirement nosuch: not found in {public}"),
        ),
        (
            &public,
            "six==9.0",
            None,
            format!("sock install: requirement six==9.0: no such version in {public}"),
        ),
        (
            &public,
            "six==2.0",
            None,
            format!(
                "sock install: requirement six==2.0: {public} has no wheel for this Python and platform, and sources are not built"
            ),
        ),
        (
            &public,
            "six==3.0",
            None,
            format!(
                "sock install: requirement six==3.0: {public} has no wheel for this Python and platform, and sources are not built"
            ),
        ),
        (
            &private,
            "six==9.0",
            None,
            format!(
                "sock install: {private} wants credentials (401 Unauthorized): name a Secret with username and password in spec.index.secretRef"
            ),
        ),
        (
            &private,
            "six==9.0",
            Some(("user", "wrong")),
            format!(
                "sock install: {private} refuses access (403 Forbidden): check spec.index.url and the Secret of spec.index.secretRef"
            ),
        ),
        (
            &private,
            "six==9.0",
            Some(("user", "p w@ß")),
            format!("sock install: requirement six==9.0: no such version in {private}"),
        ),
    ] {
        assert_eq!(last_line(url, requirement, credentials), expected);
    }
}

#[test]
fn an_index_that_is_down_or_broken_is_named_with_the_reason() {
    let index = index();
    let broken = format!("{index}/broken/");
    let said = last_line(&broken, "six==2.0", None);
    assert!(
        said.starts_with(&format!("sock install: {broken} cannot be reached: "))
            && said.contains("500 Internal Server Error"),
        "{said}"
    );
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|free| free.local_addr())
        .expect("a port");
    let down = format!("http://{port}/simple/");
    let said = last_line(&down, "six==2.0", None);
    assert!(
        said.starts_with(&format!("sock install: {down} cannot be reached: "))
            && said.contains("refused"),
        "{said}"
    );
}
