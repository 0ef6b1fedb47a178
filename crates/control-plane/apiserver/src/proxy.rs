//! Requests passed on to kubelets, pods and services over the connections that nodes have opened.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/util/proxy, k8s.io/apiserver/pkg/endpoints/handlers/namespace of
//! connecters. The request goes out as HTTP/1.1 with its headers; an upgrade (exec, attach, port-forward) makes the
//! two connections one, byte by byte.
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use sampan_drivers::Target;

use crate::body::{self, Body, BoxError};
use crate::call::Call;
use crate::status::{Result, Status};

/// Where a proxied request goes.
pub struct Destination {
    pub node: String,
    pub target: Target,
    /// The `Host` header.
    pub host: String,
    /// Path and query as the destination sees them.
    pub path: String,
}

/// Headers that belong to one connection.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];

/// Sends the request there and its answer back.
pub async fn forward(call: &Call, to: Destination, body: Body) -> Result<Response<Body>> {
    let dialer = call.server.config.dialer.as_ref();
    let dialer = dialer.ok_or_else(|| Status::unavailable("this server reaches no nodes"))?;
    let stream = dialer.dial(&to.node, to.target.clone()).await.map_err(|error| match to.target {
        Target::Kubelet => Status::new(500, "", format!("error dialing backend: {error}")),
        Target::Tcp(_) => Status::unavailable(format!("error trying to reach service: {error}")),
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Status::unavailable(format!("error trying to reach service: {error}")))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "proxied connection ended");
        }
    });
    // A log over a WebSocket is a plain log for the kubelet.
    let upgrade = wanted_upgrade(&call.parts.headers).filter(|_| call.info.subresource != "log");
    let mut request = Request::new(body);
    *request.method_mut() = call.parts.method.clone();
    *request.uri_mut() = to.path.parse::<Uri>().map_err(|e| Status::bad_request(e.to_string()))?;
    *request.headers_mut() = passed_on(&call.parts.headers, upgrade.as_ref());
    if let Ok(host) = HeaderValue::from_str(&to.host) {
        request.headers_mut().insert(header::HOST, host);
    }
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| Status::unavailable(format!("error trying to reach service: {error}")))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(join(call, response));
    }
    let (mut parts, body) = response.into_parts();
    for name in &HOP_BY_HOP {
        parts.headers.remove(name);
    }
    Ok(Response::from_parts(parts, body.map_err(|e| Box::new(e) as BoxError).boxed_unsync()))
}

fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let connection = headers.get(header::CONNECTION)?.to_str().ok()?.to_ascii_lowercase();
    connection
        .split(',')
        .any(|word| word.trim() == "upgrade")
        .then(|| headers.get(header::UPGRADE).cloned())?
}

fn passed_on(headers: &HeaderMap, upgrade: Option<&HeaderValue>) -> HeaderMap {
    let mut passed = headers.clone();
    for name in &HOP_BY_HOP {
        passed.remove(name);
    }
    passed.remove(header::UPGRADE);
    passed.remove(header::AUTHORIZATION);
    // The size of the body is the body's own to say.
    passed.remove(header::CONTENT_LENGTH);
    passed.remove("keep-alive");
    if upgrade.is_none() {
        let of_sockets: Vec<_> =
            passed.keys().filter(|name| name.as_str().starts_with("sec-websocket-")).cloned().collect();
        for name in of_sockets {
            passed.remove(name);
        }
    }
    if let Some(upgrade) = upgrade {
        passed.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        passed.insert(header::UPGRADE, upgrade.clone());
    }
    passed
}

/// Answers the client's upgrade and copies both ways from then on.
fn join(call: &Call, mut response: Response<hyper::body::Incoming>) -> Response<Body> {
    let backend = hyper::upgrade::on(&mut response);
    let client = call.parts.extensions.get::<hyper::upgrade::OnUpgrade>().cloned();
    let shutdown = call.server.shutdown.clone();
    let mut answer = Response::new(body::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in response.headers() {
        if *name != header::TRANSFER_ENCODING && *name != header::CONTENT_LENGTH {
            answer.headers_mut().append(name, value.clone());
        }
    }
    tokio::spawn(async move {
        let Some(client) = client else { return };
        let (Ok(client), Ok(backend)) = (client.await, backend.await) else { return };
        let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
        tokio::select! {
            copied = tokio::io::copy_bidirectional(&mut client, &mut backend) => {
                if let Err(error) = copied {
                    tracing::debug!(%error, "upgraded connection ended");
                }
            }
            () = shutdown.cancelled() => {}
        }
    });
    answer
}
