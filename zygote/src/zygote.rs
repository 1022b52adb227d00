//! Speaking with a zygote: as the shim of its pool, and as the shim of a Function.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::sockopt::set_socket_passcred;
use serde::de::DeserializeOwned;
use sock_zygote_protocol::{
    self as protocol, FromZygote, ModuleImport, Received, ToZygote, ZygoteSetup,
};
use tokio::sync::Notify;

use crate::channel::Channel;
use crate::descend::Newborn;
use crate::error::{Error, Result};
use crate::leaf::Arrived;

/// What a zygote reported when it had imported everything.
#[derive(Debug, Clone)]
pub struct Warm {
    /// Microseconds of all imports.
    pub import_micros: u64,
    /// Each of them, in order.
    pub modules: Vec<ModuleImport>,
}

/// The channel of a pool's shim to its zygote. The zygote ends when this is dropped.
#[derive(Debug)]
pub struct Zygote(Channel);

impl Zygote {
    /// Tells a zygote that was just started what to be, and waits until it is.
    ///
    /// # Errors
    /// [`Error::Refused`] with the module at fault; [`Error::Wire`] when it ends before that.
    pub async fn configure(control: OwnedFd, setup: &ZygoteSetup) -> Result<(Zygote, Warm)> {
        Zygote::configure_over(Channel::new(control, "zygote")?, setup).await
    }

    /// The same over the channel of a zygote that was forked from another ([`crate::Entering::entered`]).
    ///
    /// # Errors
    /// As above.
    pub async fn configure_over(channel: Channel, setup: &ZygoteSetup) -> Result<(Zygote, Warm)> {
        channel.send(&ToZygote::Configure(setup.clone()), &[])?;
        match channel.receive::<FromZygote>(0).await?.message {
            FromZygote::Ready {
                import_micros,
                modules,
            } => Ok((
                Zygote(channel),
                Warm {
                    import_micros,
                    modules,
                },
            )),
            FromZygote::Refused { module, message } => Err(Error::Refused { module, message }),
            other => Err(Error::Unexpected {
                peer: "zygote",
                said: name(&other),
                expected: "Ready",
            }),
        }
    }

    /// Makes another channel on which leaves can be asked for, and returns the asker's end.
    ///
    /// # Errors
    /// [`Error::Wire`], also when the zygote is gone.
    pub fn attach(&self) -> Result<OwnedFd> {
        let (ours, theirs) = protocol::pair().map_err(|source| Error::Wire {
            peer: "zygote",
            source,
        })?;
        self.0.send(&ToZygote::Attach, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Waits for the zygote's end. Cancel safe.
    pub async fn ended(&self) -> Error {
        loop {
            match self.0.receive::<FromZygote>(0).await {
                // Nothing is asked on this channel that would have an answer.
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    }
}

/// How a leaf came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkOrigin {
    /// A spare was taken.
    pub spare: bool,
    /// From the request read by the zygote to the leaf there, in microseconds.
    pub micros: u64,
}

/// The channel of a Function's shim to a zygote.
#[derive(Debug)]
pub struct ZygoteChannel {
    channel: Channel,
    answers: Mutex<Answers>,
    heard: Notify,
}

#[derive(Debug, Default)]
struct Answers {
    next: u64,
    /// `None` while the zygote has not answered.
    open: HashMap<u64, Option<Result<ForkOrigin, String>>>,
}

impl ZygoteChannel {
    /// `socket` is what [`Zygote::attach`] made.
    ///
    /// # Errors
    /// When the runtime cannot watch the descriptor.
    pub fn new(socket: OwnedFd) -> Result<ZygoteChannel> {
        let channel = Channel::new(socket, "zygote")?;
        Ok(ZygoteChannel {
            channel,
            answers: Mutex::default(),
            heard: Notify::new(),
        })
    }

    /// Asks for a leaf and waits until it exists. Several may be under way at once. With `fresh` no
    /// spare is taken. The second value is how it came to be, if the zygote has said so already
    /// (its word comes beside the leaf's and is not waited for).
    ///
    /// When the future is dropped, the leaf finds its channel closed and ends.
    ///
    /// # Errors
    /// [`Error::ForkFailed`]; [`Error::Wire`] when the zygote is gone ([`Error::is_closed`]).
    pub async fn fork(&self, fresh: bool) -> Result<(Arrived, Option<ForkOrigin>)> {
        match self.fork_once(fresh).await? {
            Some(leaf) => Ok(leaf),
            // A spare can be killed (for want of memory, say) while it is handed out.
            None if !fresh => self.fork_once(true).await?.ok_or_else(ended_at_once),
            None => Err(ended_at_once()),
        }
    }

    /// `None` if there was a leaf and it ended before it said a word.
    async fn fork_once(&self, fresh: bool) -> Result<Option<(Arrived, Option<ForkOrigin>)>> {
        let request = |ticket| ToZygote::Fork { ticket, fresh };
        match self.ask("leaf", request).await? {
            Some((control, hello, origin)) => {
                Ok(Some((Arrived::new(control, hello).await?, origin)))
            }
            None => Ok(None),
        }
    }

    /// Asks for a process that is to become a zygote with more packages, and waits until it exists. It costs no spare.
    ///
    /// # Errors
    /// As of [`ZygoteChannel::fork`]. A zygote of a release that knows no such request drops the channel.
    pub async fn fork_zygote(&self) -> Result<Newborn> {
        let request = |ticket| ToZygote::ForkZygote { ticket };
        match self.ask("zygote", request).await? {
            Some((control, hello, _)) => Newborn::new(control, hello),
            None => Err(ended_at_once()),
        }
    }

    /// Asks for a child and waits for its first word: its channel, the word, and how it came to be if the zygote has said
    /// so. `None` if it ended before.
    async fn ask<M: DeserializeOwned>(
        &self,
        peer: &'static str,
        request: impl FnOnce(u64) -> ToZygote,
    ) -> Result<Option<(Channel, Received<M>, Option<ForkOrigin>)>> {
        let (ours, theirs) = protocol::pair().map_err(|source| Error::Wire {
            peer: "zygote",
            source,
        })?;
        // Before the child can speak: credentials are added when a packet is sent.
        set_socket_passcred(&ours, true)
            .map_err(Error::system("ask for credentials (SO_PASSCRED)"))?;
        let control = Channel::new(ours, peer)?;
        let ticket = Ticket::open(self);
        self.channel
            .send(&request(ticket.number), &[theirs.as_fd()])?;
        drop(theirs);
        let hello = tokio::select! {
            biased;
            hello = control.receive::<M>(0) => hello,
            error = self.failure(ticket.number) => return Err(error),
        };
        match hello {
            Ok(hello) => {
                let answers = self.answers();
                let answer = answers.open.get(&ticket.number).and_then(|a| a.clone());
                Ok(Some((control, hello, answer.and_then(Result::ok))))
            }
            // Either the zygote dropped the child's end and says why, or there is a child no more.
            Err(error) if error.is_closed() => self.answer(ticket.number).await.map(|_| None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the zygote's end. Cancel safe.
    pub async fn ended(&self) -> Error {
        loop {
            if let Err(error) = self.hear().await {
                return error;
            }
        }
    }

    /// Reads answers until that for `ticket` is there, or the zygote is gone.
    async fn answer(&self, ticket: u64) -> Result<ForkOrigin> {
        loop {
            let heard = self.heard.notified();
            if let Some(Some(answer)) = self.answers().open.get(&ticket) {
                return answer.clone().map_err(Error::ForkFailed);
            }
            tokio::select! {
                () = heard => {}
                result = self.hear() => result?,
            }
        }
    }

    /// Never ends if the zygote has forked: the leaf speaks then.
    async fn failure(&self, ticket: u64) -> Error {
        match self.answer(ticket).await {
            Ok(_) => std::future::pending().await,
            Err(error) => error,
        }
    }

    async fn hear(&self) -> Result<()> {
        let (ticket, answer) = match self.channel.receive::<FromZygote>(0).await?.message {
            FromZygote::Forked {
                ticket,
                spare,
                micros,
            } => (ticket, Ok(ForkOrigin { spare, micros })),
            FromZygote::ForkFailed { ticket, message } => (ticket, Err(message)),
            other => {
                return Err(Error::Unexpected {
                    peer: "zygote",
                    said: name(&other),
                    expected: "Forked",
                });
            }
        };
        // An answer nobody waits for is dropped: a zygote cannot make this table grow.
        if let Some(open) = self.answers().open.get_mut(&ticket) {
            *open = Some(answer);
        }
        self.heard.notify_waiters();
        Ok(())
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended_at_once() -> Error {
    Error::ForkFailed("the leaf ended before it said a word".into())
}

/// An entry of the table of answers, removed when the asker no longer cares.
struct Ticket<'a> {
    channel: &'a ZygoteChannel,
    number: u64,
}

impl<'a> Ticket<'a> {
    fn open(channel: &'a ZygoteChannel) -> Ticket<'a> {
        let mut answers = channel.answers();
        let number = answers.next;
        answers.next = answers.next.wrapping_add(1);
        answers.open.insert(number, None);
        Ticket { channel, number }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.channel.answers().open.remove(&self.number);
    }
}

pub(crate) fn name(message: &FromZygote) -> &'static str {
    match message {
        FromZygote::Ready { .. } => "Ready",
        FromZygote::Refused { .. } => "Refused",
        FromZygote::Forked { .. } => "Forked",
        FromZygote::ForkFailed { .. } => "ForkFailed",
        FromZygote::Hello => "Hello",
        FromZygote::Entered => "Entered",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::io::{dup, ioctl_fionbio, ioctl_fionread};
    use rustix::net::sockopt::set_socket_send_buffer_size;

    use super::*;

    #[test]
    fn a_zygote_that_never_stops_talking_lets_others_have_their_turn() {
        let (ours, theirs) = protocol::pair().unwrap();
        ioctl_fionbio(&theirs, true).unwrap();
        // Room for more than a task hears in one turn.
        set_socket_send_buffer_size(&theirs, 1 << 20).unwrap();
        let noise = FromZygote::Forked {
            ticket: u64::MAX,
            spare: true,
            micros: 0,
        };
        while protocol::send(&theirs, &noise, &[]).is_ok() {}
        let said = dup(&ours).unwrap();
        let all = ioctl_fionread(&said).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async {
            let channel = ZygoteChannel::new(ours).unwrap();
            let asking = tokio::task::spawn_local(async move { channel.answer(7).await.err() });
            let other = tokio::task::spawn_local(async move {
                loop {
                    tokio::task::yield_now().await;
                    let left = ioctl_fionread(&said).unwrap();
                    if left < all {
                        return left;
                    }
                }
            });
            assert!(other.await.unwrap() > 0, "all was heard in one turn");
            asking.abort();
        });
    }
}
