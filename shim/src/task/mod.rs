//! containerd's task API: one file a verb, or a few that belong together.
//!
//! ttrpc wants a service that may be called from any thread. [`TaskService`] is that and nothing else: each call
//! becomes a [`Job`] that runs on the one thread where the [`Pod`] lives.

mod create;
mod delete;
mod exec;
mod kill;
mod query;
mod start;

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim::api;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::shim_async::Task;
use containerd_shim::protos::ttrpc;
use containerd_shim::{TtrpcContext, TtrpcResult};
use tokio::sync::{mpsc, oneshot};

use crate::pod::Pod;

/// Why a call failed, in the codes that containerd tells apart.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    code: ttrpc::Code,
    message: String,
}

impl Failure {
    fn new(code: ttrpc::Code, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
    /// No such container or process, or it has ended.
    pub fn not_found(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::NOT_FOUND, message)
    }
    /// Not in this state.
    pub fn precondition(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::FAILED_PRECONDITION, message)
    }
    /// There already.
    pub fn exists(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::ALREADY_EXISTS, message)
    }
    /// The request is wrong.
    pub fn invalid(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::INVALID_ARGUMENT, message)
    }
    /// Not made.
    pub fn unimplemented(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::UNIMPLEMENTED, message)
    }
    /// Everything else.
    pub fn unknown(message: impl ToString) -> Self {
        Self::new(ttrpc::Code::UNKNOWN, message)
    }
}

impl From<sock_sandbox::Error> for Failure {
    fn from(e: sock_sandbox::Error) -> Self {
        match e {
            sock_sandbox::Error::Spec { .. } => Self::invalid(e),
            _ => Self::unknown(e),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::unknown(e)
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(f: Failure) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(f.code, f.message))
    }
}

/// A call, on its way to the pod's thread.
pub type Job = Box<dyn FnOnce(Rc<Pod>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Sends jobs.
#[derive(Clone)]
pub struct Jobs(mpsc::UnboundedSender<Job>);

impl Jobs {
    /// To whoever runs them.
    #[must_use]
    pub fn new(sender: mpsc::UnboundedSender<Job>) -> Self {
        Self(sender)
    }

    async fn run<Q, R, F>(
        &self,
        request: Q,
        verb: impl FnOnce(Rc<Pod>, Q) -> F + Send + 'static,
    ) -> TtrpcResult<R>
    where
        Q: Send + 'static,
        R: Send + 'static,
        F: Future<Output = Result<R, Failure>> + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |pod| {
            Box::pin(async move {
                let _ = answer.send(verb(pod, request).await);
            })
        });
        let gone =
            || ttrpc::Error::from(Failure::new(ttrpc::Code::UNAVAILABLE, "the shim is ending"));
        self.0.send(job).map_err(|_| gone())?;
        Ok(answered.await.map_err(|_| gone())??)
    }
}

/// The service that containerd calls.
#[derive(Clone)]
pub struct TaskService {
    jobs: Jobs,
}

impl TaskService {
    /// Sends its calls to these.
    #[must_use]
    pub fn new(jobs: Jobs) -> Self {
        Self { jobs }
    }
}

/// A time as containerd wants it.
#[must_use]
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut out = Timestamp::new();
    out.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    out.nanos = i32::try_from(since.subsec_nanos()).unwrap_or(0);
    out
}

macro_rules! verbs {
    ($($name:ident($request:ty) -> $response:ty = $path:path;)*) => {
        #[async_trait]
        impl Task for TaskService {
            $(async fn $name(&self, _: &TtrpcContext, request: $request) -> TtrpcResult<$response> {
                let result = self.jobs.run(request, $path).await;
                if let Err(e) = &result {
                    tracing::debug!(verb = stringify!($name), error = %e, "call failed");
                }
                result
            })*
        }
    };
}

verbs! {
    state(api::StateRequest) -> api::StateResponse = query::state;
    create(api::CreateTaskRequest) -> api::CreateTaskResponse = create::create;
    start(api::StartRequest) -> api::StartResponse = start::start;
    delete(api::DeleteRequest) -> api::DeleteResponse = delete::delete;
    pids(api::PidsRequest) -> api::PidsResponse = query::pids;
    pause(api::PauseRequest) -> api::Empty = kill::pause;
    resume(api::ResumeRequest) -> api::Empty = kill::resume;
    checkpoint(api::CheckpointTaskRequest) -> api::Empty = query::checkpoint;
    kill(api::KillRequest) -> api::Empty = kill::kill;
    exec(api::ExecProcessRequest) -> api::Empty = exec::exec;
    resize_pty(api::ResizePtyRequest) -> api::Empty = exec::resize;
    close_io(api::CloseIORequest) -> api::Empty = exec::close_io;
    update(api::UpdateTaskRequest) -> api::Empty = query::update;
    wait(api::WaitRequest) -> api::WaitResponse = query::wait;
    stats(api::StatsRequest) -> api::StatsResponse = query::stats;
    connect(api::ConnectRequest) -> api::ConnectResponse = query::connect;
    shutdown(api::ShutdownRequest) -> api::Empty = delete::shutdown;
}
