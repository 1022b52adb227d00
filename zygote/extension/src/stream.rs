//! A connection as hyper sees it: bytes in and out, without blocking, and where its request stands.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::{Buf, Bytes};
use hyper::rt::{Read, ReadBufCursor, Write};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

/// Where the request of a connection stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Between requests. `Some` if a head has begun to come in.
    Idle(Option<Instant>),
    /// From the head read to the answer known.
    Serving(Instant),
    /// The answer is known and may not be written whole.
    Answered { began: Instant, status: u16 },
}

/// The state that hyper's side, the service and the loop share.
pub struct Shared {
    fd: OwnedFd,
    pub stage: Cell<Stage>,
    /// Requests that have begun.
    pub requests: Cell<u64>,
    /// The last read, or write, found nothing, or no room.
    starved: Cell<bool>,
    blocked: Cell<bool>,
    /// Reading is over: what is in the socket belongs to whoever gets it next.
    muted: Cell<bool>,
    /// Bytes that hyper wanted to send while there was no request to answer.
    unasked: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Shared {
    pub fn new(fd: OwnedFd) -> Rc<Shared> {
        Rc::new(Shared {
            fd,
            stage: Cell::new(Stage::Idle(None)),
            requests: Cell::new(0),
            starved: Cell::new(true),
            blocked: Cell::new(false),
            muted: Cell::new(false),
            unasked: Cell::new(false),
            waiting: RefCell::new(None),
        })
    }

    /// What to wait for in poll(2).
    pub fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.starved.get() && !self.muted.get());
        flags.set(PollFlags::OUT, self.blocked.get());
        flags
    }

    /// An answer that is written: its begin and status, once.
    pub fn written(&self) -> Option<(Instant, u16)> {
        match self.stage.get() {
            Stage::Answered { began, status } if !self.blocked.get() => {
                self.stage.set(Stage::Idle(None));
                if let Some(waker) = self.waiting.take() {
                    waker.wake();
                }
                Some((began, status))
            }
            _ => None,
        }
    }

    /// Waits until no earlier answer is being written. A pipelined request must not begin before.
    pub fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        if matches!(self.stage.get(), Stage::Idle(_)) {
            return Poll::Ready(());
        }
        self.waiting.replace(Some(cx.waker().clone()));
        Poll::Pending
    }

    /// From here on nothing is read from the socket.
    pub fn mute(&self, muted: bool) {
        self.muted.set(muted);
    }

    /// Whether hyper has answered a malformed head by itself; those bytes were not sent.
    pub fn take_unasked(&self) -> bool {
        self.unasked.take()
    }

    /// Sends what the socket takes at once.
    pub fn send_now(&self, bytes: &[u8]) {
        // A client that sent no request and reads no answer has nothing to complain of.
        let _ = send(&self.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    /// The end for both sides, also of the shim's duplicate, which a close would not end.
    pub fn shutdown(&self) {
        // Fails if the client has reset the connection.
        let _ = shutdown(&self.fd, Shutdown::Write);
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// hyper's side.
pub struct Stream {
    shared: Rc<Shared>,
    /// Bytes that were read before this connection object was made.
    prefix: Bytes,
}

impl Stream {
    pub fn new(shared: Rc<Shared>, prefix: Bytes) -> Stream {
        Stream { shared, prefix }
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        let shared = &self.shared;
        if shared.muted.get() {
            return Poll::Pending;
        }
        loop {
            // SAFETY: the slice is only written to, by read(2).
            let space = unsafe { buf.as_mut() };
            let result = rustix::net::recv(&shared.fd, space, rustix::net::RecvFlags::DONTWAIT)
                .map(|(init, _)| init.0.len());
            match result {
                Ok(n) => {
                    shared.starved.set(false);
                    if n > 0 && shared.stage.get() == Stage::Idle(None) {
                        shared.stage.set(Stage::Idle(Some(Instant::now())));
                    }
                    // SAFETY: read(2) has initialised that many bytes.
                    unsafe { buf.advance(n) };
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    shared.starved.set(true);
                    return Poll::Pending;
                }
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

impl Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let shared = &self.shared;
        if matches!(shared.stage.get(), Stage::Idle(_)) {
            shared.unasked.set(true);
            return Poll::Ready(Ok(bytes.len()));
        }
        loop {
            match send(&shared.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => {
                    shared.blocked.set(false);
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    shared.blocked.set(true);
                    return Poll::Pending;
                }
                Err(errno) => {
                    shared.blocked.set(false);
                    return Poll::Ready(Err(errno.into()));
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The loop does that, after what hyper may have left unsaid.
        Poll::Ready(Ok(()))
    }
}
