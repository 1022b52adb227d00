//! Whatever bytes arrive, decoding ends in a message or an error, and descriptors are never lost.

#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::RwLock;

use proptest::prelude::*;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send as send_bytes, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sock_zygote_protocol::{
    Attached, Error, FdRole, FromLeaf, FromZygote, LeafSetup, MAX_FDS, MAX_MESSAGE, ModuleImport,
    Phase, Rlimit, ToLeaf, ToZygote, ZygoteFd, ZygoteSetup, pair, receive, send,
};

/// Tests run beside each other, and descriptors are counted for all: who counts them is alone.
static DESCRIPTORS: RwLock<()> = RwLock::new(());

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What was understood can be said again, and is understood as the same.
fn understood<M: Serialize + DeserializeOwned + PartialEq + Debug>(
    bytes: &[u8],
) -> Result<(), TestCaseError> {
    if let Ok(message) = postcard::from_bytes::<M>(bytes) {
        let again = postcard::to_stdvec(&message).unwrap();
        prop_assert!(again.len() <= bytes.len());
        prop_assert_eq!(postcard::from_bytes::<M>(&again).unwrap(), message);
    }
    Ok(())
}

/// Through a channel and back.
fn travels<M: Serialize + DeserializeOwned + PartialEq + Debug>(
    message: &M,
) -> Result<(), TestCaseError> {
    let _shared = DESCRIPTORS.read();
    let (ours, theirs) = pair().unwrap();
    send(&theirs, message, &[]).unwrap();
    prop_assert_eq!(&receive::<M>(&ours).unwrap().message, message);
    Ok(())
}

fn from_leaf() -> impl Strategy<Value = FromLeaf> {
    let phases = prop::collection::vec((".*", any::<u64>()), 0..6);
    prop_oneof![
        Just(FromLeaf::Hello),
        phases.prop_map(|list| FromLeaf::Confined {
            phases: list
                .into_iter()
                .map(|(name, micros)| Phase { name, micros })
                .collect()
        }),
        any::<u64>().prop_map(|import_micros| FromLeaf::Ready { import_micros }),
        (".*", ".*").prop_map(|(message, traceback)| FromLeaf::Failed { message, traceback }),
        any::<u64>().prop_map(|conn| FromLeaf::Began { conn }),
        any::<(u64, u16, u64)>().prop_map(|(conn, status, micros)| FromLeaf::Done {
            conn,
            status,
            micros
        }),
        any::<u64>().prop_map(|conn| FromLeaf::Parked { conn }),
        any::<u64>().prop_map(|conn| FromLeaf::Closed { conn }),
    ]
}

fn from_zygote() -> impl Strategy<Value = FromZygote> {
    let modules = prop::collection::vec((".*", any::<u64>()), 0..6);
    prop_oneof![
        (any::<u64>(), modules).prop_map(|(import_micros, list)| FromZygote::Ready {
            import_micros,
            modules: list
                .into_iter()
                .map(|(name, micros)| ModuleImport { name, micros })
                .collect()
        }),
        (".*", ".*").prop_map(|(module, message)| FromZygote::Refused { module, message }),
        any::<(u64, bool, u64)>().prop_map(|(ticket, spare, micros)| FromZygote::Forked {
            ticket,
            spare,
            micros
        }),
        (any::<u64>(), ".*")
            .prop_map(|(ticket, message)| FromZygote::ForkFailed { ticket, message }),
        Just(FromZygote::Hello),
        Just(FromZygote::Entered),
    ]
}

fn to_zygote() -> impl Strategy<Value = ToZygote> {
    let names = || prop::collection::vec(".*", 0..6);
    prop_oneof![
        (names(), names(), any::<u32>(), names(), ".*").prop_map(
            |(imports, path, spares, accepted_threads, warm_up)| ToZygote::Configure(ZygoteSetup {
                imports,
                path,
                spares,
                accepted_threads,
                warm_up
            })
        ),
        Just(ToZygote::Attach),
        any::<(u64, bool)>().prop_map(|(ticket, fresh)| ToZygote::Fork { ticket, fresh }),
        any::<u64>().prop_map(|ticket| ToZygote::ForkZygote { ticket }),
        prop::collection::vec(
            prop::sample::select(vec![ZygoteFd::Entry, ZygoteFd::Pid, ZygoteFd::User]),
            0..6
        )
        .prop_map(|fds| ToZygote::Enter { fds }),
    ]
}

proptest! {
    #[test]
    fn every_message_arrives_as_it_was_sent(leaf in from_leaf(), zygote in from_zygote(), to in to_zygote(), conn in any::<u64>(), (uid, gid) in any::<(u32, u32)>(), profile in ".*") {
        travels(&leaf)?;
        travels(&zygote)?;
        travels(&to)?;
        travels(&ToLeaf::Serve { conn })?;
        travels(&ToLeaf::Park { conn })?;
        travels(&Attached { uid, gid, profile })?;
    }

    #[test]
    fn whatever_is_understood_can_be_said_again(tag in 0u8..9, rest in prop::collection::vec(prop_oneof![0u8..8, any::<u8>()], 0..64)) {
        let bytes = [&[tag], &rest[..]].concat();
        understood::<FromZygote>(&bytes)?;
        understood::<FromLeaf>(&bytes)?;
        understood::<ToLeaf>(&bytes)?;
        understood::<ToZygote>(&bytes)?;
        // What another release has ended before its last field is said again with that, as nothing.
        let ends = postcard::from_bytes::<(u32, u32)>(&bytes).is_ok()
            && postcard::from_bytes::<(u32, u32, String)>(&bytes).is_err();
        let unsaid: &[u8] = if ends { &[0] } else { &[] };
        understood::<Attached>(&[&bytes[..], unsaid].concat())?;
        understood::<LeafSetup>(&bytes)?;
    }

    #[test]
    fn arbitrary_bytes_are_an_answer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 1..4096)) {
        let _shared = DESCRIPTORS.read();
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
    let _shared = DESCRIPTORS.read();
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
    let _shared = DESCRIPTORS.read();
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

/// As a peer sends that keeps to no limit of ours.
fn send_with(socket: &OwnedFd, bytes: &[u8], descriptors: usize) {
    let fds = vec![socket.as_fd(); descriptors];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

#[test]
fn no_descriptor_comes_beyond_the_limit_even_where_there_is_room_for_it() {
    let _alone = DESCRIPTORS.write();
    let hello = postcard::to_stdvec(&FromLeaf::Hello).unwrap();
    for credentials in [false, true] {
        let (ours, theirs) = pair().unwrap();
        set_socket_passcred(&ours, credentials).unwrap();
        for descriptors in [0, 1, MAX_FDS, MAX_FDS + 1, MAX_FDS + 8, MAX_FDS + 9, 253] {
            let before = open_descriptors();
            send_with(&theirs, &hello, descriptors);
            match receive::<FromLeaf>(&ours) {
                Ok(received) => {
                    assert!(descriptors <= MAX_FDS, "{descriptors} came through");
                    assert_eq!(received.fds.len(), descriptors);
                    assert_eq!(received.credentials.is_some(), credentials);
                }
                Err(error) => assert!(
                    matches!(error, Error::TooLarge) && descriptors > MAX_FDS,
                    "{error}"
                ),
            }
            assert_eq!(open_descriptors(), before);
        }
    }
}

#[test]
fn descriptors_of_a_refused_packet_are_closed() {
    let _alone = DESCRIPTORS.write();
    let (ours, theirs) = pair().unwrap();
    let before = open_descriptors();
    for _ in 0..16 {
        // A boolean is no ToZygote: the tag 1 is Attach, so the trailing string makes it malformed for ToLeaf.
        send(&theirs, &u64::MAX, &[theirs.as_fd(), theirs.as_fd()]).unwrap();
        assert!(matches!(receive::<ToLeaf>(&ours), Err(Error::Malformed(_))));
    }
    assert_eq!(open_descriptors(), before);
}
