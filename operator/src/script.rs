//! An API server for tests that expects certain calls in a certain order, and keeps what it was sent.

use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::cluster::Context;
use crate::metrics::Metrics;

/// A call that is expected, and its answer.
pub struct Call {
    method: Method,
    path: &'static str,
    status: StatusCode,
    answer: Answer,
}

enum Answer {
    Json(Value),
    /// What was sent, with this status: what the server makes of an apply.
    Sent(Value),
}

/// An object is read and is there.
pub fn get(path: &'static str, object: Value) -> Call {
    Call {
        method: Method::GET,
        path,
        status: StatusCode::OK,
        answer: Answer::Json(object),
    }
}

/// An object is read and is not there.
pub fn missing(path: &'static str) -> Call {
    refused(Method::GET, path, 404, "NotFound")
}

/// A list is read.
pub fn list(path: &'static str, items: &[Value]) -> Call {
    get(
        path,
        json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items }),
    )
}

/// An object is applied.
pub fn apply(path: &'static str) -> Call {
    applied(path, json!({}))
}

/// An object is applied, and has this status.
pub fn applied(path: &'static str, status: Value) -> Call {
    Call {
        method: Method::PATCH,
        path,
        status: StatusCode::OK,
        answer: Answer::Sent(status),
    }
}

/// The status of this object is applied.
pub fn report(path: &'static str, object: &impl serde::Serialize) -> Call {
    let answer = Answer::Json(serde_json::to_value(object).unwrap());
    Call {
        method: Method::PATCH,
        path,
        status: StatusCode::OK,
        answer,
    }
}

/// An event is published.
pub fn event(path: &'static str) -> Call {
    Call {
        method: Method::POST,
        path,
        status: StatusCode::CREATED,
        answer: Answer::Sent(json!({})),
    }
}

/// An object is deleted.
pub fn delete(path: &'static str) -> Call {
    Call {
        method: Method::DELETE,
        path,
        status: StatusCode::OK,
        answer: Answer::Json(json!({ "apiVersion": "v1", "kind": "Status", "status": "Success" })),
    }
}

/// A call is refused.
pub fn refused(method: Method, path: &'static str, code: u16, reason: &str) -> Call {
    Call {
        method,
        path,
        status: StatusCode::from_u16(code).unwrap(),
        answer: Answer::Json(json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason,
        })),
    }
}

/// A context whose API server expects exactly these calls; the task ends with the bodies that it was sent.
pub fn server(calls: Vec<Call>) -> (Arc<Context>, JoinHandle<Vec<Value>>) {
    let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let client = Client::new(service, "default");
    let context = Context {
        recorder: Recorder::new(
            client.clone(),
            Reporter {
                controller: "test".into(),
                instance: None,
            },
        ),
        client,
        metrics: Arc::new(Metrics::new()),
    };
    let task = tokio::spawn(async move {
        let mut sent = Vec::new();
        for call in calls {
            let Some((request, send)) = handle.next_request().await else {
                panic!("{} {} was not called", call.method, call.path)
            };
            let (head, body) = request.into_parts();
            let path = head.uri.path_and_query().unwrap().as_str();
            assert!(
                head.method == call.method && (head.uri.path() == call.path || path == call.path),
                "{} {path} was called, {} {} expected",
                head.method,
                call.method,
                call.path
            );
            let bytes = body.collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let answer = match call.answer {
                Answer::Json(answer) => answer,
                Answer::Sent(status) => {
                    let mut object = body.clone();
                    if status != json!({}) {
                        object["status"] = status;
                    }
                    object
                }
            };
            if head.method != Method::GET {
                sent.push(body);
            }
            let response = Response::builder()
                .status(call.status)
                .header("content-type", "application/json");
            send.send_response(
                response
                    .body(Body::from(serde_json::to_vec(&answer).unwrap()))
                    .unwrap(),
            );
        }
        if let Some((request, _)) = handle.next_request().await {
            panic!(
                "{} {} was called, nothing more expected",
                request.method(),
                request.uri()
            );
        }
        sent
    });
    (Arc::new(context), task)
}
