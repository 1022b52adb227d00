//! Whatever bytes arrive, decoding ends in a message or an error, and descriptors are never lost.

#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::net::{SendFlags, send as send_bytes};
use sock_zygote_protocol::{
    Error, FdRole, FromLeaf, FromZygote, LeafSetup, MAX_FDS, MAX_MESSAGE, Phase, Rlimit, ToLeaf,
    ToZygote, pair, receive, send,
};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_an_answer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 1..4096)) {
        let (ours, theirs) = pair().unwrap();
        for _ in 0..4 {
            send_bytes(&theirs, &bytes, SendFlags::empty()).unwrap();
        }
        let _ = receive::<ToZygote>(&ours);
        let _ = receive::<FromZygote>(&ours);
        let _ = receive::<ToLeaf>(&ours);
        let _ = receive::<FromLeaf>(&ours);
    }

    #[test]
    fn a_setup_survives_the_wire(
        handler in ".*", env in prop::collection::vec((".*", ".*"), 0..8), seccomp in prop::collection::vec(any::<u8>(), 0..64),
        (resource, soft, hard) in any::<(u32, u64, u64)>(), uid in any::<u32>(), flag in any::<bool>(),
    ) {
        let setup = LeafSetup {
            handler, path: vec!["/srv".into()], env, cwd: "/".into(), hostname: "h".into(), function: "f".into(),
            namespace: "n".into(), pod: "p".into(), uid, gid: uid, masked_paths: vec![], readonly_paths: vec![],
            rlimits: vec![Rlimit { resource, soft, hard }], seccomp, intercept_sockets: flag, single_request: !flag,
            park_after_ms: hard, max_body: soft, threads: resource, timeout_seconds: uid,
        };
        let bytes = postcard::to_stdvec(&setup).unwrap();
        prop_assert_eq!(postcard::from_bytes::<LeafSetup>(&bytes).unwrap(), setup);
    }
}

#[test]
fn messages_and_descriptors_arrive_together() {
    let (ours, theirs) = pair().unwrap();
    let message = ToLeaf::Setup {
        fds: vec![FdRole::Setup, FdRole::Root],
    };
    send(&theirs, &message, &[theirs.as_fd(), ours.as_fd()]).unwrap();
    let received = receive::<ToLeaf>(&ours).unwrap();
    assert_eq!(received.message, message);
    assert_eq!(received.fds.len(), 2);
}

#[test]
fn the_end_and_an_oversized_packet_are_told_apart() {
    let (ours, theirs) = pair().unwrap();
    let phases = vec![Phase {
        name: "x".repeat(MAX_MESSAGE),
        micros: 1,
    }];
    assert!(matches!(
        send(&theirs, &FromLeaf::Confined { phases }, &[]),
        Err(Error::TooLarge)
    ));
    let many = vec![theirs.as_fd(); MAX_FDS + 1];
    assert!(matches!(
        send(&theirs, &FromLeaf::Hello, &many),
        Err(Error::TooLarge)
    ));
    send_bytes(&theirs, &vec![0u8; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
    assert!(matches!(receive::<FromLeaf>(&ours), Err(Error::TooLarge)));
    drop(theirs);
    assert!(matches!(receive::<FromLeaf>(&ours), Err(Error::Closed)));
    assert!(matches!(
        send(&ours, &FromLeaf::Hello, &[]),
        Err(Error::Closed)
    ));
}

#[test]
fn descriptors_of_a_refused_packet_are_closed() {
    let (ours, theirs) = pair().unwrap();
    let before = open_descriptors();
    for _ in 0..16 {
        // A boolean is no ToZygote: the tag 1 is Attach, so the trailing string makes it malformed for ToLeaf.
        send(&theirs, &u64::MAX, &[theirs.as_fd(), theirs.as_fd()]).unwrap();
        assert!(matches!(receive::<ToLeaf>(&ours), Err(Error::Malformed(_))));
    }
    assert_eq!(open_descriptors(), before);
}
