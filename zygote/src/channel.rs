//! A `SOCK_SEQPACKET` channel on the asynchronous runtime.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::ioctl_fionbio;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sock_zygote_protocol::{self as protocol, Received};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::patience::bounded;

/// One end of a channel to a zygote, a leaf or a broker.
#[derive(Debug)]
pub struct Channel {
    socket: ManuallyDrop<AsyncFd<OwnedFd>>,
    peer: &'static str,
}

impl Channel {
    /// Watches `socket`, which becomes non-blocking. `peer` names the other end in errors.
    ///
    /// # Errors
    /// When the runtime cannot watch the descriptor.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O enabled.
    pub fn new(socket: OwnedFd, peer: &'static str) -> Result<Channel> {
        ioctl_fionbio(&socket, true)
            .map_err(Error::system("make the channel non-blocking (FIONBIO)"))?;
        Ok(Channel {
            socket: ManuallyDrop::new(watch(socket)?),
            peer,
        })
    }

    /// Sends at once or fails: these messages are few and small, and a peer that lets its queue fill
    /// is not waited for.
    ///
    /// # Errors
    /// [`Error::Wire`]; see [`Error::is_closed`].
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<()> {
        protocol::send(self.socket.get_ref(), message, fds).map_err(|e| self.wire(e))
    }

    /// The next message, with at most `most` descriptors. Cancel safe: a message is either returned or left in the channel.
    ///
    /// # Errors
    /// [`Error::Wire`]; see [`Error::is_closed`]. [`Error::Unexpected`] for more descriptors, which are closed: how long
    /// that takes is the sender's doing, but not for longer than a moment.
    pub async fn receive<M: DeserializeOwned>(&self, most: usize) -> Result<Received<M>> {
        // Readiness takes nothing of a task's budget: a peer that never stops talking must not stop the others.
        tokio::task::coop::consume_budget().await;
        loop {
            let mut ready = self.socket.readable().await.map_err(Error::Watch)?;
            let received = bounded(|| match protocol::receive(self.socket.get_ref()) {
                Ok(Received { fds, .. }) if fds.len() > most => {
                    drop(fds);
                    Ok(None)
                }
                Ok(received) => Ok(Some(received)),
                Err(error) => Err(error),
            });
            match received {
                Err(e) if e.would_block() => ready.clear_ready(),
                Err(e) => return Err(self.wire(e)),
                Ok(Some(received)) => return Ok(received),
                Ok(None) => {
                    return Err(Error::Unexpected {
                        peer: self.peer,
                        said: "something with a descriptor",
                        expected: "a message without",
                    });
                }
            }
        }
    }

    fn wire(&self, source: protocol::Error) -> Error {
        Error::Wire {
            peer: self.peer,
            source,
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // What lies in it unread may have descriptors, which are closed with it.
        // SAFETY: it is not used after this.
        bounded(|| unsafe { ManuallyDrop::drop(&mut self.socket) });
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Watches a descriptor for something to read.
pub(crate) fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open as long as it lives, and `AsyncFd` gives no mutable access to it here.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
        .map_err(|e| Error::Watch(e.into()))
}
