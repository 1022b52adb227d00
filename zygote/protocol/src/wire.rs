//! Packets with descriptors over `SOCK_SEQPACKET`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest packet in bytes. A seqpacket send of this size fits the default `wmem_default` twice.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors in one packet.
pub const MAX_FDS: usize = 32;
/// Most that the kernel passes (unix(7)).
const SCM_MAX_FD: usize = 253;

/// Why a packet did not get through.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer closed its end.
    #[error("the peer closed the channel")]
    Closed,
    /// More bytes than [`MAX_MESSAGE`], or more descriptors than [`MAX_FDS`].
    #[error("a packet of more than {MAX_MESSAGE} bytes or {MAX_FDS} descriptors")]
    TooLarge,
    /// The bytes are no message of this protocol.
    #[error("undecodable packet: {0}")]
    Malformed(#[from] postcard::Error),
    /// `sendmsg(2)`, `recvmsg(2)` or `socketpair(2)` failed.
    #[error("channel: {0}")]
    Io(#[from] Errno),
}

impl Error {
    /// Whether a non-blocking channel has nothing now, or no room now.
    #[must_use]
    pub fn would_block(&self) -> bool {
        matches!(self, Error::Io(e) if *e == Errno::AGAIN)
    }
}

/// Sender of a packet as the kernel saw it, translated into the receiver's namespaces. Present when
/// `SO_PASSCRED` is set. A process with capabilities over its own namespaces can name any process it
/// sees there: check what the number refers to before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process number, 0 when the sender is not visible from here.
    pub pid: i32,
    /// Real user.
    pub uid: u32,
}

/// One packet.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// Its descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Who sent it, if the socket asks for that.
    pub credentials: Option<Credentials>,
}

/// A connected pair of channels, close-on-exec and blocking.
///
/// # Errors
/// [`Error::Io`] when the process is out of descriptors.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message with descriptors.
///
/// # Errors
/// [`Error::TooLarge`] before anything is sent; [`Error::Closed`] when the peer is gone.
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let bytes = postcard::to_stdvec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(Error::TooLarge);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::TooLarge);
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Closed),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Size in bytes of the packet that is next, for which this waits like `recvmsg(2)`; 0 at the end of the stream.
fn waiting(socket: impl AsFd) -> Result<usize, Error> {
    let mut none = [0u8; 0];
    loop {
        match recv(&socket, &mut none[..], RecvFlags::PEEK | RecvFlags::TRUNC) {
            Ok((_, size)) => return Ok(size),
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(Error::Closed),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Receives one message. Descriptors of a packet that is refused are closed.
///
/// # Errors
/// [`Error::Closed`] at the end of the stream, [`Error::Malformed`] and [`Error::TooLarge`] for what a
/// well-behaved peer does not send.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> Result<Received<M>, Error> {
    // As large as the packet: in a forked process, each page of a larger buffer would be a fault.
    let mut bytes = vec![0u8; waiting(&socket)?.min(MAX_MESSAGE)];
    // Room for all that the kernel passes: what finds none is closed by the kernel within the call.
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(Error::Closed),
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    let mut credentials = None;
    for part in control.drain() {
        match part {
            RecvAncillaryMessage::ScmRights(got) => fds.extend(got),
            RecvAncillaryMessage::ScmCredentials(c) => {
                credentials = Some(Credentials {
                    pid: c.pid.as_raw_pid(),
                    uid: c.uid.as_raw(),
                });
            }
            _ => {}
        }
    }
    if fds.len() > MAX_FDS
        || got
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(Error::TooLarge);
    }
    if got.bytes == 0 {
        return Err(Error::Closed);
    }
    Ok(Received {
        message: postcard::from_bytes(&bytes[..got.bytes])?,
        fds,
        credentials,
    })
}
