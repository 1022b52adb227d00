//! What the cluster knows of this node: its runtimes, sock's label, and events.

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource as _};
use serde_json::json;

use crate::containerd::RUNTIME;

/// Label that pods of the RuntimeClass select nodes by.
pub const LABEL: &str = "sock.dev/node";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the environment has no NODE_NAME: the DaemonSet sets it from spec.nodeName")]
    NoName,
    #[error("{step} node {node}: {source}")]
    Api {
        step: &'static str,
        node: String,
        source: Box<kube::Error>,
    },
    #[error("no connection to the API server can be made: {0}")]
    Client(Box<kube::Error>),
}

/// This node, as the API server has it.
#[derive(Clone)]
pub struct Registration {
    nodes: Api<Node>,
    recorder: Recorder,
    name: String,
}

impl Registration {
    /// Connects with the pod's own account.
    pub async fn connect() -> Result<Self, Error> {
        let name = std::env::var("NODE_NAME").map_err(|_| Error::NoName)?;
        let client = Client::try_default()
            .await
            .map_err(|source| Error::Client(Box::new(source)))?;
        let reporter = Reporter {
            controller: "sock.dev/node".into(),
            instance: Some(name.clone()),
        };
        Ok(Self {
            nodes: Api::all(client.clone()),
            recorder: Recorder::new(client, reporter),
            name,
        })
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(kube::Error) -> Error {
        let node = self.name.clone();
        move |source| Error::Api {
            step,
            node,
            source: Box::new(source),
        }
    }

    /// The node as it is now.
    pub async fn node(&self) -> Result<Node, Error> {
        self.nodes.get(&self.name).await.map_err(self.failed("get"))
    }

    /// Gives the node sock's label with this value, or takes it away.
    pub async fn label(&self, value: Option<&str>) -> Result<(), Error> {
        let patch = json!({ "metadata": { "labels": { LABEL: value } } });
        self.nodes
            .patch_metadata(&self.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map_err(self.failed("label"))?;
        Ok(())
    }

    /// Tells those who look at the node why it is unfit.
    pub async fn warn(&self, reason: &str, note: &str) -> Result<(), Error> {
        let node = self.node().await?;
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            // The API server takes 1 kB at most.
            note: Some(note.chars().take(1000).collect()),
            action: "Install".into(),
            secondary: None,
        };
        self.recorder
            .publish(&event, &node.object_ref(&()))
            .await
            .map_err(self.failed("publish an event on"))
    }
}

/// Whether kubelet has seen the runtime in containerd.
pub fn offers_runtime(node: &Node) -> bool {
    node.status
        .iter()
        .flat_map(|status| status.runtime_handlers.iter().flatten())
        .any(|handler| handler.name.as_deref() == Some(RUNTIME))
}

/// The value of sock's label.
pub fn labelled(node: &Node) -> Option<&str> {
    node.metadata
        .labels
        .as_ref()?
        .get(LABEL)
        .map(String::as_str)
}
