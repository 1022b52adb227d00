//! Packets from whoever holds the other end of a channel: a zygote and a leaf run a tenant's code.
//!
//! The first byte says what is expected, the second how many descriptors come with the packet, the rest is the packet. It goes
//! through a real channel. No descriptor may be left open, whatever came.

#![no_main]

use std::fmt::Debug;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sock_zygote_protocol::{
    Attached, Error, FromLeaf, FromZygote, LeafSetup, MAX_FDS, MAX_MESSAGE, ToLeaf, ToZygote, pair,
    receive, send,
};

/// More than a packet may have, and fewer than the kernel sends.
const MOST_SENT: usize = MAX_FDS + 8;

/// The number that the next descriptor would get: it grows when one is left open.
fn next_descriptor(any: impl AsFd) -> i32 {
    rustix::io::dup(any).expect("a descriptor").as_raw_fd()
}

fn deliver(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::DONTWAIT,
    )
    .expect("room for one packet");
}

fn expect<M: Serialize + DeserializeOwned + PartialEq + Debug>(
    bytes: &[u8],
    descriptors: usize,
    credentials: bool,
) {
    let (ours, theirs) = pair().expect("a channel");
    set_socket_passcred(&ours, credentials).expect("credentials");
    let before = next_descriptor(&ours);
    deliver(&theirs, bytes, &vec![theirs.as_fd(); descriptors]);
    match receive::<M>(&ours) {
        Ok(received) => {
            assert!(bytes.len() <= MAX_MESSAGE && descriptors <= MAX_FDS);
            assert_eq!(received.fds.len(), descriptors);
            assert_eq!(received.credentials.is_some(), credentials);
            // What was understood can be said again, in no more bytes.
            send(&theirs, &received.message, &[]).expect("a message");
            let again = receive::<M>(&ours).expect("the same message");
            assert_eq!(again.message, received.message);
        }
        Err(Error::Closed) => assert!(bytes.is_empty()),
        Err(Error::TooLarge) => assert!(bytes.len() > MAX_MESSAGE || descriptors > MAX_FDS),
        Err(Error::Malformed(_)) => {}
        Err(Error::Io(errno)) => panic!("{errno}"),
    }
    assert_eq!(next_descriptor(&ours), before, "a descriptor is left open");
}

fuzz_target!(|input: &[u8]| {
    let [kind, descriptors, packet @ ..] = input else {
        return;
    };
    let descriptors = usize::from(descriptors & 0x7f) % (MOST_SENT + 1);
    let expect_of = match kind % 6 {
        0 => expect::<FromZygote>,
        1 => expect::<FromLeaf>,
        2 => expect::<ToLeaf>,
        3 => expect::<ToZygote>,
        4 => expect::<Attached>,
        _ => expect::<LeafSetup>,
    };
    expect_of(packet, descriptors, input[1] & 0x80 != 0);
});
