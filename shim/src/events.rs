//! Events to containerd, in order, none dropped while it restarts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::util::timestamp;
use tokio::sync::Notify;

/// How many events wait for a containerd that is away before the oldest goes.
const LIMIT: usize = 4096;

struct Queue {
    waiting: RefCell<VecDeque<Envelope>>,
    filled: Notify,
    emptied: Notify,
}

/// The sender of events.
#[derive(Clone)]
pub struct Events {
    namespace: String,
    queue: Rc<Queue>,
}

impl Events {
    /// Sends to containerd's ttrpc socket at `address`.
    #[must_use]
    pub fn new(address: String, namespace: String) -> Self {
        let queue = Rc::new(Queue {
            waiting: RefCell::default(),
            filled: Notify::new(),
            emptied: Notify::new(),
        });
        tokio::task::spawn_local(send(queue.clone(), address));
        Self { namespace, queue }
    }

    /// Queues one.
    pub fn publish<E: Event + Message>(&self, event: E) {
        let mut envelope = Envelope::new();
        envelope.set_topic(event.topic());
        envelope.set_namespace(self.namespace.clone());
        if let Ok(now) = timestamp() {
            envelope.set_timestamp(now);
        }
        match any("containerd.events", &event) {
            Ok(any) => envelope.set_event(any),
            Err(e) => return tracing::error!(error = %e, "event lost"),
        }
        let mut waiting = self.queue.waiting.borrow_mut();
        if waiting.len() >= LIMIT {
            waiting.pop_front();
        }
        waiting.push_back(envelope);
        self.queue.filled.notify_one();
    }

    /// Waits until all are sent, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, async {
            while !self.queue.waiting.borrow().is_empty() {
                self.queue.emptied.notified().await;
            }
        })
        .await;
    }
}

/// A message of a package with its type. What the library has for it builds descriptors of all messages that the file of the
/// type knows of: a millisecond of the first start, and memory that every shim keeps.
///
/// # Errors
/// As protobuf's encoding.
pub(crate) fn any<M: Message>(
    package: &str,
    message: &M,
) -> Result<Any, containerd_shim::protos::protobuf::Error> {
    let mut any = Any::new();
    any.type_url = format!("{package}.{}", M::NAME);
    any.value = message.write_to_bytes()?;
    Ok(any)
}

async fn send(queue: Rc<Queue>, address: String) {
    let mut client: Option<EventsClient> = None;
    loop {
        let Some(envelope) = queue.waiting.borrow().front().cloned() else {
            queue.filled.notified().await;
            continue;
        };
        if client.is_none() {
            let target = if address.contains("://") {
                address.clone()
            } else {
                format!("unix://{address}")
            };
            match Client::connect(&target).await {
                Ok(c) => client = Some(EventsClient::new(c)),
                Err(e) => {
                    tracing::debug!(error = %e, "containerd is away");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            }
        }
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        let Some(connected) = &client else { continue };
        let context = containerd_shim::Context {
            timeout_nano: 5_000_000_000,
            ..Default::default()
        };
        match connected.forward(context, &request).await {
            Ok(_) => {
                queue.waiting.borrow_mut().pop_front();
                if queue.waiting.borrow().is_empty() {
                    queue.emptied.notify_waiters();
                }
            }
            Err(e) => {
                tracing::debug!(error = %e, "event not taken, trying again");
                client = None;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use containerd_shim::protos::cgroups::metrics::Metrics;
    use containerd_shim::protos::cgroups_v2::metrics::Metrics as Metrics2;
    use containerd_shim::protos::events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    };
    use containerd_shim::protos::protobuf::MessageFull;

    use super::*;

    fn same<M: MessageFull + Clone>(package: &str, message: &M) {
        let theirs = containerd_shim::util::convert_to_any(Box::new(message.clone())).unwrap();
        assert_eq!(any(package, message).unwrap(), theirs);
    }

    #[test]
    fn messages_are_wrapped_as_the_library_wraps_them() {
        let of = "containerd.events";
        let mut create = TaskCreate::new();
        "one".clone_into(&mut create.container_id);
        create.set_io(TaskIO::new());
        create.pid = 7;
        same(of, &create);
        same(of, &TaskStart::new());
        same(of, &TaskExecAdded::new());
        same(of, &TaskExecStarted::new());
        same(of, &TaskPaused::new());
        same(of, &TaskResumed::new());
        same(of, &TaskExit::new());
        same(of, &TaskDelete::new());
        same(of, &TaskOOM::new());
        same("io.containerd.cgroups.v1", &Metrics::new());
        same("io.containerd.cgroups.v2", &Metrics2::new());
    }
}
