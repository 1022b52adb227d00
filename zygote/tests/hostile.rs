//! A zygote, or a leaf, whose code is hostile: whatever it sends, the shim neither stops nor believes it.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred, send, sendmsg};
use rustix::process::{Gid, Pid, Uid};
use sock_zygote::protocol::{
    self, FromLeaf, FromZygote, LeafExtras, ModuleImport, ToZygote, ZygoteEntry,
};
use sock_zygote::{Channel, EntryFds, Error, ForkOrigin, SealedSetup, Zygote, ZygoteChannel};
use support::{Cgroup, connection, shim, zygote_setup};

/// Far more than any of this takes on a busy machine, and far less than the tenant would like.
const SOON: Duration = Duration::from_secs(3);

/// A connection whose close waits for an hour: its peer reads nothing, and what was written cannot be delivered.
fn slow_to_close() -> (TcpStream, OwnedFd) {
    let (peer, mut socket) = connection();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    (peer, socket.into())
}

/// A leaf that was told of its Function.
fn told(arrived: sock_zygote::Arrived) -> sock_zygote::Confining {
    let setup =
        sock_zygote::SealedSetup::new(&support::leaf_setup(), &LeafExtras::default()).unwrap();
    arrived
        .setup(&setup, &sock_zygote::SetupFds::default())
        .unwrap()
}

/// How long work takes, and the longest that it keeps other tasks waiting.
async fn measured<T>(work: impl Future<Output = T>) -> (T, Duration, Duration) {
    let ticks = tokio::task::spawn_local(async {
        let (mut longest, mut last) = (Duration::ZERO, Instant::now());
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            longest = longest.max(last.elapsed());
            last = Instant::now();
            LONGEST.set(longest);
        }
    });
    tokio::task::yield_now().await;
    let begin = Instant::now();
    let result = work.await;
    let took = begin.elapsed();
    tokio::time::sleep(Duration::from_millis(20)).await;
    ticks.abort();
    (result, took, LONGEST.replace(Duration::ZERO))
}

thread_local! {
    static LONGEST: std::cell::Cell<Duration> = const { std::cell::Cell::new(Duration::ZERO) };
}

#[test]
fn the_connection_of_this_test_is_slow_to_close() {
    shim(async {
        let (_peer, socket) = slow_to_close();
        let (told, tell) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(socket);
            told.send(()).unwrap();
        });
        tell.recv_timeout(Duration::from_millis(500))
            .expect_err("it is closed at once, and the tests below show nothing");
    });
}

#[test]
fn a_descriptor_that_nobody_asked_for_is_closed_without_waiting() {
    shim(async {
        let (ours, theirs) = protocol::pair().unwrap();
        let channel = Channel::new(ours, "leaf").unwrap();
        let (_peer, socket) = slow_to_close();
        protocol::send(&theirs, &FromLeaf::Began { conn: 1 }, &[socket.as_fd()]).unwrap();
        drop(socket);
        let (received, _, gap) = measured(channel.receive::<FromLeaf>(0)).await;
        let error = received.err().unwrap();
        assert!(matches!(error, Error::Unexpected { .. }), "{error}");
        assert!(gap < SOON, "{gap:?}");

        // Even if there are more than any message has.
        let (_peer, socket) = slow_to_close();
        let fds = vec![socket.as_fd(); 200];
        send_raw(&theirs, &[0], &fds, None);
        drop(fds);
        drop(socket);
        let (received, _, gap) = measured(channel.receive::<FromLeaf>(0)).await;
        received.err().unwrap();
        assert!(gap < SOON, "{gap:?}");
    });
}

#[test]
fn a_channel_with_unread_descriptors_is_closed_without_waiting() {
    shim(async {
        let (ours, theirs) = protocol::pair().unwrap();
        let channel = Channel::new(ours, "leaf").unwrap();
        let mut peers = Vec::new();
        for conn in 0..5 {
            let (peer, socket) = slow_to_close();
            peers.push(peer);
            protocol::send(&theirs, &FromLeaf::Began { conn }, &[socket.as_fd()]).unwrap();
        }
        let ((), took, _) = measured(async { drop(channel) }).await;
        assert!(took < SOON, "{took:?}");
        for peer in peers {
            let _ = peer.shutdown(Shutdown::Both);
        }
    });
}

/// A packet of any bytes, descriptors and credentials.
fn send_raw(
    socket: &OwnedFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    credentials: Option<UCred>,
) -> usize {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253), ScmCredentials(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    if let Some(credentials) = credentials {
        assert!(control.push(SendAncillaryMessage::ScmCredentials(credentials)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap()
}

/// A zygote of which this test has the other end.
fn zygote() -> (ZygoteChannel, OwnedFd) {
    let (ours, theirs) = protocol::pair().unwrap();
    (ZygoteChannel::new(ours).unwrap(), theirs)
}

#[test]
fn what_is_no_answer_of_a_zygote_ends_the_conversation() {
    shim(async {
        let whole = postcard(&FromZygote::Forked {
            ticket: 0,
            spare: false,
            micros: u64::MAX,
        });
        let ready = postcard(&FromZygote::Ready {
            import_micros: 1,
            modules: vec![ModuleImport {
                name: "x".repeat(100),
                micros: 1,
            }],
        });
        let packets = [
            ("oversize", vec![0; protocol::MAX_MESSAGE + 1]),
            ("garbage", vec![0xff; 100]),
            ("truncated", whole[..whole.len() - 1].to_vec()),
            ("of another state", ready),
            // A vector of a length that no packet can have.
            (
                "a lie about a length",
                vec![0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f],
            ),
        ];
        for (what, packet) in packets {
            let (channel, theirs) = zygote();
            send(&theirs, &packet, SendFlags::NOSIGNAL).unwrap();
            let (forked, took, gap) = measured(channel.fork(true)).await;
            let error = forked.err().unwrap();
            assert!(
                matches!(error, Error::Wire { .. } | Error::Unexpected { .. }),
                "{what}: {error}"
            );
            assert!(took < SOON && gap < SOON, "{what}: {took:?} {gap:?}");
        }
    });
}

fn postcard(message: &FromZygote) -> Vec<u8> {
    let (ours, theirs) = protocol::pair().unwrap();
    protocol::send(&ours, message, &[]).unwrap();
    let mut bytes = vec![0; protocol::MAX_MESSAGE];
    let (got, _) =
        rustix::net::recv(&theirs, &mut bytes[..], rustix::net::RecvFlags::empty()).unwrap();
    bytes.truncate(got);
    bytes
}

#[test]
fn a_zygote_that_does_not_answer_keeps_nobody_else_waiting() {
    shim(async {
        let (channel, _theirs) = zygote();
        let limit = Duration::from_millis(300);
        let (forked, _, gap) = measured(tokio::time::timeout(limit, channel.fork(false))).await;
        assert!(forked.is_err(), "nobody has forked");
        assert!(gap < SOON, "{gap:?}");
    });
}

#[test]
fn a_zygote_that_answers_without_end_keeps_nobody_else_waiting() {
    shim(async {
        let (channel, theirs) = zygote();
        let flood = std::thread::spawn(move || {
            let mut sent: u64 = 0;
            for ticket in 1.. {
                let answer = FromZygote::Forked {
                    ticket,
                    spare: true,
                    micros: 0,
                };
                if protocol::send(&theirs, &answer, &[]).is_err() {
                    break;
                }
                sent += 1;
            }
            sent
        });
        let limit = Duration::from_secs(1);
        let (ended, _, gap) = measured(tokio::time::timeout(limit, async {
            tokio::join!(channel.ended(), channel.fork(false))
        }))
        .await;
        assert!(ended.is_err());
        assert!(gap < SOON, "{gap:?}");
        drop(channel);
        assert!(flood.join().unwrap() > 1000);
    });
}

#[test]
fn a_zygote_that_reads_nothing_is_told_nothing_more() {
    shim(async {
        let (ours, theirs) = protocol::pair().unwrap();
        let import = FromZygote::Ready {
            import_micros: 0,
            modules: vec![],
        };
        protocol::send(&theirs, &import, &[]).unwrap();
        let (zygote, _) = Zygote::configure(ours, &zygote_setup(&[])).await.unwrap();
        let (refused, took, _) =
            measured(async { (0..100_000).find_map(|_| zygote.attach().err()) }).await;
        assert!(refused.is_some(), "every request found room");
        assert!(took < 10 * SOON, "{took:?}");
    });
}

/// What a hostile zygote does with the leaf's end of a control channel.
async fn answered(
    hello: impl FnOnce(&OwnedFd) + Send + 'static,
) -> Result<(sock_zygote::Arrived, Option<ForkOrigin>, OwnedFd), Error> {
    let (channel, theirs) = zygote();
    let answering = std::thread::spawn(move || {
        let mut request = protocol::receive::<ToZygote>(&theirs).unwrap();
        let control = request.fds.pop().unwrap();
        hello(&control);
        (control, theirs)
    });
    let forked = tokio::time::timeout(SOON, channel.fork(true))
        .await
        .expect("an end");
    let (control, _theirs) = answering.join().unwrap();
    forked.map(|(arrived, origin)| (arrived, origin, control))
}

fn another_process() -> Child {
    Command::new("sleep")
        .arg("60")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_leaf_that_names_another_process_is_found_out() {
    shim(async {
        let mut victim = another_process();
        let pid = Pid::from_child(&victim);
        let named = UCred {
            pid,
            uid: Uid::ROOT,
            gid: Gid::ROOT,
        };
        let (arrived, _, control) = answered(move |control| {
            send_raw(control, &[0], &[], Some(named));
        })
        .await
        .unwrap();
        let confining = told(arrived);
        protocol::send(&control, &FromLeaf::Confined { phases: vec![] }, &[]).unwrap();
        let cgroup = Cgroup::new();
        let error = confining
            .confined(Some(&cgroup.0), Some(-900))
            .await
            .err()
            .unwrap();
        assert!(matches!(error, Error::Impostor { .. }), "{error}");
        victim.kill().unwrap();
        victim.wait().unwrap();
    });
}

#[test]
fn a_leaf_that_is_no_process_or_speaks_out_of_turn_is_none() {
    shim(async {
        let mut ended = another_process();
        ended.kill().unwrap();
        let pid = Pid::from_child(&ended);
        ended.wait().unwrap();
        let gone = UCred {
            pid,
            uid: Uid::ROOT,
            gid: Gid::ROOT,
        };
        // The kernel names no process that is not there.
        let (told, tell) = std::sync::mpsc::channel();
        let outcome = answered(move |control| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmCredentials(gone)));
            let sent = sendmsg(
                control,
                &[IoSlice::new(&[0])],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            );
            told.send(sent.is_err()).unwrap();
            rustix::net::shutdown(control, rustix::net::Shutdown::Both).unwrap();
        });
        let refused = tokio::time::timeout(Duration::from_millis(500), outcome).await;
        assert!(tell.recv().unwrap(), "a process that has ended was named");
        assert!(!matches!(refused, Ok(Ok(_))));

        let early = answered(|control| {
            protocol::send(control, &FromLeaf::Ready { import_micros: 0 }, &[]).unwrap();
        });
        let error = early.await.err().unwrap();
        assert!(matches!(error, Error::Unexpected { .. }), "{error}");
    });
}

/// A process that idles and has the number of one that has ended.
struct Successor(Pid);

impl Successor {
    /// Ends `former`, and takes its number.
    fn of(former: &mut Child) -> Successor {
        let pid = Pid::from_child(former);
        former.kill().unwrap();
        former.wait().unwrap();
        let number = pid.as_raw_nonzero().get();
        // SAFETY: plain numbers, for which 0 is "none"; clone3(2) reads the number that `set_tid` points to. The child, a copy
        // of one thread, makes only system calls; it lets go of the channels whose end others wait for.
        let made = unsafe {
            let mut how: libc::clone_args = std::mem::zeroed();
            how.exit_signal = u64::try_from(libc::SIGCHLD).unwrap();
            how.set_tid = std::ptr::from_ref(&number).expose_provenance() as u64;
            how.set_tid_size = 1;
            let made = libc::syscall(libc::SYS_clone3, &raw const how, size_of_val(&how));
            if made == 0 {
                libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
                loop {
                    libc::pause();
                }
            }
            made
        };
        assert_eq!(
            made,
            libc::c_long::from(number),
            "the number of a process that has ended is not to be had: {}",
            std::io::Error::last_os_error()
        );
        Successor(pid)
    }

    fn join(&self, cgroup: &Cgroup) {
        let number = self.0.as_raw_nonzero().to_string();
        std::fs::write(cgroup.0.join("cgroup.procs"), number).unwrap();
    }

    fn oom_score_adj(&self) -> i32 {
        let path = format!("/proc/{}/oom_score_adj", self.0.as_raw_nonzero());
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        rustix::process::kill_process(self.0, rustix::process::Signal::KILL).unwrap();
        let options = rustix::process::WaitOptions::empty();
        rustix::process::waitpid(Some(self.0), options).unwrap();
    }
}

/// What the shim makes of a first word that says it comes from `named`, and the child's end of its channel. What is done
/// `meanwhile` is done before the shim reads the word.
async fn named<T>(
    asked: impl Future<Output = T>,
    theirs: &OwnedFd,
    hello: &[u8],
    named: Pid,
    meanwhile: impl FnOnce(),
) -> (T, OwnedFd) {
    let named = UCred {
        pid: named,
        uid: Uid::ROOT,
        gid: Gid::ROOT,
    };
    // One after the other on this thread: the request is sent when the first is polled, and its answer is read when the
    // second has come to its end.
    tokio::join!(asked, async {
        let mut request = protocol::receive::<ToZygote>(theirs).unwrap();
        let control = request.fds.pop().unwrap();
        send_raw(&control, hello, &[], Some(named));
        meanwhile();
        control
    })
}

/// A preference for want of memory that no process of these tests has, unless the shim has given it that.
const SCORE: i32 = 777;

#[test]
fn whoever_has_the_number_of_a_leaf_that_has_ended_is_not_taken_for_it() {
    // When the number changes hands, if its new process is in the leaf's cgroup, whom the shim takes for the leaf, and if it
    // writes to the new process.
    let cases = [
        ("before the word is read", false, ("nobody", false)),
        // Whoever is named, it is a process of the pod, and will be killed as one.
        ("before the word is read", true, ("successor", true)),
        ("after that", false, ("leaf that has ended", false)),
        ("after that", true, ("leaf that has ended", false)),
    ];
    shim(async {
        for (when, is_member, expected) in cases {
            let (channel, theirs) = zygote();
            let mut leaf = another_process();
            let pid = Pid::from_child(&leaf);
            let mut successor = None;
            let (forked, control) = named(channel.fork(true), &theirs, &[0], pid, || {
                successor = when.starts_with("before").then(|| Successor::of(&mut leaf));
            })
            .await;
            let confining = told(forked.unwrap().0);
            let successor = successor.unwrap_or_else(|| Successor::of(&mut leaf));
            let cgroup = Cgroup::new();
            if is_member {
                successor.join(&cgroup);
            }
            assert_ne!(successor.oom_score_adj(), SCORE);
            protocol::send(&control, &FromLeaf::Confined { phases: vec![] }, &[]).unwrap();
            let taken = match confining.confined(Some(&cgroup.0), Some(SCORE)).await {
                Ok((leaf, ..)) if ended(leaf.pidfd()) => "leaf that has ended",
                Ok(_) => "successor",
                Err(Error::Impostor { .. }) => "nobody",
                Err(error) => panic!("{when}, {is_member}: {error}"),
            };
            let is_written_to = successor.oom_score_adj() == SCORE;
            assert_eq!((taken, is_written_to), expected, "{when}, {is_member}");
        }
    });
}

/// Whether the process of a pidfd has.
fn ended(pidfd: BorrowedFd<'_>) -> bool {
    let now = rustix::event::Timespec::default();
    let mut watched = [rustix::event::PollFd::from_borrowed_fd(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut watched, Some(&now)).unwrap() > 0
}

#[test]
fn whoever_has_the_number_of_a_zygotes_child_that_has_ended_is_not_taken_for_it() {
    shim(async {
        let hello = postcard(&FromZygote::Hello);
        // Of all processes of this test: what refuses is that the child has ended.
        let user = std::fs::File::open("/proc/self/ns/user").unwrap();
        let (channel, theirs) = zygote();
        let mut child = another_process();
        let pid = Pid::from_child(&child);
        let (newborn, control) = named(channel.fork_zygote(), &theirs, &hello, pid, || {}).await;
        let newborn = newborn.unwrap();
        newborn.namespaces(user.as_fd()).unwrap();
        let successor = Successor::of(&mut child);
        let error = newborn.namespaces(user.as_fd()).err().unwrap();
        assert!(matches!(error, Error::Impostor { .. }), "{error}");

        // On its way into its container it is whoever says that it is there.
        let mut child = another_process();
        let last = UCred {
            pid: Pid::from_child(&child),
            uid: Uid::ROOT,
            gid: Gid::ROOT,
        };
        let entry = SealedSetup::of_zygote(&ZygoteEntry { env: vec![] }).unwrap();
        let stderr = std::io::stderr();
        let fds = EntryFds {
            namespaces: vec![],
            cgroups: vec![],
            stdout: stderr.as_fd(),
            stderr: stderr.as_fd(),
        };
        let entering = newborn.enter(&entry, &fds).unwrap();
        send_raw(&control, &postcard(&FromZygote::Entered), &[], Some(last));
        let other = Successor::of(&mut child);
        let cgroup = Cgroup::new();
        let error = entering.entered(&cgroup.0, Some(SCORE)).await.err();
        assert!(matches!(error, Some(Error::Impostor { .. })), "{error:?}");
        for one in [successor, other] {
            assert_ne!(one.oom_score_adj(), SCORE);
        }
    });
}

#[test]
fn a_listener_that_is_none_is_refused_without_waiting() {
    shim(async {
        for slow in [false, true] {
            let (arrived, _, control) = answered(|control| {
                protocol::send(control, &FromLeaf::Hello, &[]).unwrap();
            })
            .await
            .unwrap();
            let confining = told(arrived);
            let (_peer, fd) = if slow {
                let (peer, socket) = slow_to_close();
                (Some(peer), socket)
            } else {
                (None, std::fs::File::open("/dev/null").unwrap().into())
            };
            let confined = FromLeaf::Confined { phases: vec![] };
            protocol::send(&control, &confined, &[fd.as_fd()]).unwrap();
            drop(fd);
            let (confined, _, gap) = measured(confining.confined(None, None)).await;
            let error = confined.err().unwrap();
            assert!(matches!(error, Error::Unexpected { .. }), "{error}");
            assert!(gap < SOON, "{gap:?}");
        }
    });
}

#[test]
fn compiled_code_that_is_no_memory_file_is_left_out_without_waiting() {
    let memory = |size: u64, text: &[u8]| -> OwnedFd {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = std::fs::File::from(memfd_create("code", flags).unwrap());
        file.set_len(size).unwrap();
        file.write_all(text).unwrap();
        file.into()
    };
    shim(async {
        let (silent, _writer) = rustix::pipe::pipe().unwrap();
        let (_peer, slow) = slow_to_close();
        let cases = [
            (silent, None),
            (slow, None),
            (memory(1 << 40, b""), None),
            (memory(0, b"code"), Some(b"code".to_vec())),
        ];
        for (fd, expected) in cases {
            let (arrived, _, control) = answered(|control| {
                protocol::send(control, &FromLeaf::Hello, &[]).unwrap();
            })
            .await
            .unwrap();
            let confining = told(arrived);
            let confined = FromLeaf::Confined { phases: vec![] };
            protocol::send(&control, &confined, &[]).unwrap();
            let (loading, _, _) = confining.confined(None, None).await.unwrap();
            let ready = FromLeaf::Ready { import_micros: 1 };
            protocol::send(&control, &ready, &[fd.as_fd()]).unwrap();
            drop(fd);
            let (ready, _, gap) = measured(loading.ready(true)).await;
            assert_eq!(ready.unwrap().2, expected);
            assert!(gap < SOON, "{gap:?}");
        }
    });
}
