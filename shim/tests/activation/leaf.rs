//! The leaf's side: this test binary started again.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use sock_zygote::protocol::{self, FromLeaf, LeafExtras, LeafSetup, ToLeaf};

/// Set by whoever starts it: where a file appears when `/held` may answer.
pub const RELEASE: &str = "SOCK_TEST_RELEASE";

#[test]
#[ignore = "no test: the process that the others start as their leaf"]
fn leaf_process() {
    if std::env::var_os(RELEASE).is_none() {
        return;
    }
    // A test that fails leaves nothing behind that would hold its runner's output open.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let mut leaf = Leaf {
        control: std::io::stdin().as_fd().try_clone_to_owned().expect("dup"),
        waiting: VecDeque::new(),
        compiled: String::new(),
        draining: false,
    };
    leaf.run();
    std::process::exit(0);
}

struct Leaf {
    control: OwnedFd,
    waiting: VecDeque<(ToLeaf, Vec<OwnedFd>)>,
    /// What it was told that another has compiled.
    compiled: String,
    draining: bool,
}

enum After {
    Next,
    Ended,
}

impl Leaf {
    fn say(&self, message: &FromLeaf) {
        if protocol::send(&self.control, message, &[]).is_err() {
            std::process::exit(0);
        }
    }

    fn hear(&mut self) -> (ToLeaf, Vec<OwnedFd>) {
        if let Some(waiting) = self.waiting.pop_front() {
            return waiting;
        }
        match protocol::receive::<ToLeaf>(&self.control) {
            Ok(received) => (received.message, received.fds),
            Err(_) => std::process::exit(0),
        }
    }

    fn run(&mut self) {
        self.say(&FromLeaf::Hello);
        let (ToLeaf::Setup { .. }, fds) = self.hear() else {
            panic!("Setup must come first")
        };
        let (setup, extras) = read_setup(&fds[0]);
        let env = |name: &str| {
            setup
                .env
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.as_str())
        };
        let failed = |message: &str| FromLeaf::Failed {
            message: message.to_owned(),
            traceback: String::new(),
        };
        // An interpreter is told to intercept nothing.
        if env("SCRIPT") == Some("FailConfinement") && setup.intercept_sockets {
            self.say(&failed("move_mount: Operation not permitted"));
            return;
        }
        self.say(&FromLeaf::Confined { phases: Vec::new() });
        match env("SCRIPT") {
            Some("FailImport") => {
                self.say(&failed(
                    "app.py:3: ModuleNotFoundError: No module named 'pandsa'",
                ));
                return;
            }
            Some("DieOnImport") => return,
            _ => {}
        }
        let ready = FromLeaf::Ready { import_micros: 17 };
        if extras.keep_compiled {
            let compiled = memory_file(b"compiled by the first");
            protocol::send(&self.control, &ready, &[compiled.as_fd()]).expect("sent");
        } else {
            self.say(&ready);
        }
        self.compiled = String::from_utf8(extras.compiled).expect("text");
        loop {
            match self.hear() {
                (ToLeaf::Serve { conn }, mut fds) => {
                    let ended = self.serve(conn, fds.remove(0), &setup);
                    if setup.single_request && matches!(ended, After::Ended) {
                        return;
                    }
                }
                (ToLeaf::Exit, _) => return,
                (ToLeaf::Park { conn }, _) => self.draining |= conn == ToLeaf::DRAIN,
                (ToLeaf::Setup { .. }, _) => panic!("Setup comes once"),
            }
        }
    }

    /// Serves until the connection ends, is parked, or the only request is done.
    fn serve(&mut self, conn: u64, socket: OwnedFd, setup: &LeafSetup) -> After {
        let mut park = false;
        loop {
            if !self.readable(
                &socket,
                Duration::from_millis(setup.park_after_ms),
                &mut park,
            ) {
                drop(socket);
                self.say(&FromLeaf::Parked { conn });
                return After::Next;
            }
            let Some(path) = read_request(&socket) else {
                let _ = shutdown(&socket, Shutdown::Write);
                drop(socket);
                self.say(&FromLeaf::Closed { conn });
                return After::Next;
            };
            self.say(&FromLeaf::Began { conn });
            match path.as_str() {
                "/slow" => std::thread::sleep(Duration::from_millis(150)),
                "/held" => {
                    let release = std::env::var(RELEASE).expect("set");
                    while !std::path::Path::new(&release).exists() {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
                "/hang" => loop {
                    std::thread::sleep(Duration::from_secs(60));
                },
                "/crash" => std::process::abort(),
                "/partial" => {
                    write_all(
                        &socket,
                        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
                    );
                    std::process::abort();
                }
                "/giveback" => {
                    self.say(&FromLeaf::Parked { conn });
                    loop {
                        std::thread::sleep(Duration::from_secs(60));
                    }
                }
                "/nonsense" => {
                    let _ = send(&self.control, &[0xff; 40], SendFlags::empty());
                    loop {
                        std::thread::sleep(Duration::from_secs(60));
                    }
                }
                "/heir" => {
                    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty())
                        .expect("inheritable");
                    Command::new("/bin/sleep").arg("60").spawn().expect("sleep");
                    std::process::abort();
                }
                _ => {}
            }
            let body = match path.as_str() {
                "/compiled" => self.compiled.clone(),
                _ => std::process::id().to_string(),
            };
            while self.control_has_something() {
                let mut park = false;
                self.receive(&mut park);
            }
            let connection = if self.draining { "close" } else { "keep-alive" };
            let head = format!(
                "HTTP/1.1 200 OK\r\nConnection: {connection}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            write_all(&socket, head.as_bytes());
            self.say(&FromLeaf::Done {
                conn,
                status: 200,
                micros: 1,
            });
            if self.draining {
                let _ = shutdown(&socket, Shutdown::Write);
                drop(socket);
                self.say(&FromLeaf::Closed { conn });
                return After::Ended;
            }
            if setup.single_request {
                drop(socket);
                self.say(&FromLeaf::Parked { conn });
                return After::Ended;
            }
        }
    }

    fn control_has_something(&self) -> bool {
        let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(1)
    }

    fn receive(&mut self, park: &mut bool) {
        match protocol::receive::<ToLeaf>(&self.control) {
            Ok(received) => match received.message {
                ToLeaf::Park {
                    conn: ToLeaf::DRAIN,
                } => self.draining = true,
                ToLeaf::Park { .. } => *park = true,
                message => self.waiting.push_back((message, received.fds)),
            },
            Err(_) => std::process::exit(0),
        }
    }

    /// Waits for bytes, and meanwhile for the wish to have the connection back.
    fn readable(&mut self, socket: &OwnedFd, patience: Duration, park: &mut bool) -> bool {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let wait = if *park { Duration::ZERO } else { left };
            let wait = Timespec::try_from(wait).expect("a short time");
            let mut fds = [
                PollFd::new(socket, PollFlags::IN),
                PollFd::new(&self.control, PollFlags::IN),
            ];
            let _ = poll(&mut fds, Some(&wait));
            let (bytes, message) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if bytes {
                return true;
            }
            if message {
                self.receive(park);
            } else if *park || left.is_zero() {
                return false;
            }
        }
    }
}

fn memory_file(text: &[u8]) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = std::fs::File::from(memfd_create("compiled", flags).expect("memory"));
    file.write_all(text).expect("written");
    file.into()
}

fn read_setup(file: &OwnedFd) -> (LeafSetup, LeafExtras) {
    let len = usize::try_from(rustix::fs::fstat(file).expect("stat").st_size).expect("a size");
    let mut bytes = vec![0; len];
    let n = rustix::io::pread(file, &mut bytes, 0).expect("read");
    assert_eq!(n, len);
    LeafSetup::from_bytes(&bytes).expect("a setup")
}

/// The path of the next request, its head read; the body stays where it is.
fn read_request(socket: &OwnedFd) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match recv(socket, &mut byte, RecvFlags::DONTWAIT) {
            Ok((_, 1)) => head.push(byte[0]),
            Err(rustix::io::Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], None);
            }
            _ => return None,
        }
    }
    let text = String::from_utf8(head).ok()?;
    text.split(' ').nth(1).map(str::to_owned)
}

fn write_all(socket: &OwnedFd, bytes: &[u8]) {
    let file: BorrowedFd<'_> = socket.as_fd();
    let mut stream = std::fs::File::from(file.try_clone_to_owned().expect("dup"));
    stream.write_all(bytes).expect("a small answer fits");
}
