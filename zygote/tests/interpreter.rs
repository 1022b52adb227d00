//! The cold way: a plain interpreter in the container becomes the same leaf, without a fork.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::net::sockopt::set_socket_passcred;
use sock_zygote::protocol::{self, LeafExtras};
use sock_zygote::{Arrived, Event, SealedSetup, SetupFds};
use support::{Container, connection, leaf_setup, reply, shim, until};

const APP: &str = "import os\ndef handler(event, context):\n    return {'env': os.environ['GREETING'], 'uid': os.getuid(), 'up': os.path.exists('/srv/function/app.py')}\n";

fn start(container: &Container) -> (Child, std::os::fd::OwnedFd) {
    let (ours, theirs) = protocol::pair().unwrap();
    set_socket_passcred(&ours, true).unwrap();
    let (mounts, control) = (container.mounts.as_raw_fd(), theirs.as_raw_fd());
    let mut command = Command::new(support::python());
    command
        .arg("/opt/sock/python/interpreter.py")
        .env_clear()
        .env("SOCK_CONTROL_FD", "3");
    // SAFETY: system calls only, between fork and exec.
    unsafe {
        command.pre_exec(move || {
            match libc::setns(mounts, libc::CLONE_NEWNS)
                | libc::dup2(control, 3)
                | libc::chdir(c"/".as_ptr())
            {
                3 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    (command.spawn().unwrap(), ours)
}

#[test]
fn a_plain_interpreter_serves_like_a_forked_leaf() {
    shim(async {
        let container = Container::new(&[("/srv/function/app.py", APP)], &[]);
        let (mut child, control) = start(&container);
        let mut setup = leaf_setup();
        (setup.uid, setup.gid, setup.intercept_sockets) = (0, 0, false);
        let sealed = SealedSetup::new(&setup, &LeafExtras::default()).unwrap();
        let confining = Arrived::interpreter(control)
            .await
            .unwrap()
            .setup(&sealed, &SetupFds::default())
            .unwrap();
        let (mut client, served) = connection();
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        confining.queue(1, served.as_fd()).unwrap();
        let (loading, _, listener) = confining.confined(None, None).await.unwrap();
        assert!(listener.is_none());
        let (leaf, _, _) = loading.ready(false).await.unwrap();
        until(&leaf, |e| *e == Event::Parked { conn: 1 }).await;
        assert_eq!(
            reply(&mut client).text(),
            r#"{"env": "hello", "uid": 0, "up": true}"#
        );
        leaf.exit().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
    });
}

#[test]
fn an_interpreter_of_the_wrong_user_is_refused() {
    shim(async {
        let container = Container::new(&[("/srv/function/app.py", APP)], &[]);
        let (mut child, control) = start(&container);
        let mut setup = leaf_setup();
        setup.intercept_sockets = false;
        let sealed = SealedSetup::new(&setup, &LeafExtras::default()).unwrap();
        let confining = Arrived::interpreter(control)
            .await
            .unwrap()
            .setup(&sealed, &SetupFds::default())
            .unwrap();
        let error = confining.confined(None, None).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the leaf runs as user 0:0 where 1234567890:1234567890 is due"
        );
        assert_eq!(child.wait().unwrap().code(), Some(1));
    });
}
