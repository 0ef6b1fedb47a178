//! Requests passed on to kubelets, pods and services over the connections that nodes have opened.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/util/proxy, k8s.io/apiserver/pkg/endpoints/handlers/namespace of
//! connecters. The request goes out as HTTP/1.1 with its headers; an upgrade (exec, attach, port-forward) makes the
//! two connections one, byte by byte. Answers of pods and services have their links rewritten, see [`rewrite`].
//! Deliberately different: what is asked of pods and services is asked for without compression, so that no answer has
//! to be unpacked for its links.
mod rewrite;

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use sampan_drivers::Target;
use sampan_drivers::tunnel::Stream;
use tokio_rustls::TlsConnector;

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
    /// Speaks TLS, with whatever certificate.
    pub tls: bool,
    /// What stands before the destination's paths in the API server's: where its links should lead.
    pub prefix: Option<String>,
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
    let unreachable = |error: &dyn std::fmt::Display| {
        Status::unavailable(format!("error trying to reach service: {error}"))
    };
    let stream: Box<dyn Stream> = match to.tls {
        true => Box::new(encrypt(stream, &to.target).await.map_err(|e| unreachable(&e))?),
        false => stream,
    };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
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
    let links = to.prefix.map(|prefix| rewrite::Links {
        prefix,
        hosts: [to.host, text(&call.parts.headers, header::HOST).to_string()],
    });
    if let Some(links) = &links {
        let path = request.uri().path().to_string();
        request.headers_mut().remove(header::ACCEPT_ENCODING);
        if let Ok(forwarded) = HeaderValue::from_str(&links.below(&path)) {
            request.headers_mut().insert("x-forwarded-uri", forwarded);
        }
    }
    let response = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(join(call, response));
    }
    let (mut parts, body) = response.into_parts();
    for name in &HOP_BY_HOP {
        parts.headers.remove(name);
    }
    let body = body.map_err(|e| Box::new(e) as BoxError).boxed_unsync();
    let Some(links) = links else { return Ok(Response::from_parts(parts, body)) };
    // Which pages may read this is the API server's to say.
    for name in ["credentials", "headers", "methods", "origin"] {
        parts.headers.remove(format!("access-control-allow-{name}"));
    }
    let location = parts.headers.get(header::LOCATION).and_then(|l| l.to_str().ok()).map(|l| links.url(l));
    if let Some(location) = location {
        if let Ok(location) = HeaderValue::from_str(&location) {
            parts.headers.insert(header::LOCATION, location);
        }
        return Ok(Response::from_parts(parts, body));
    }
    let kind = text(&parts.headers, header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
    if kind != "text/html" || parts.headers.contains_key(header::CONTENT_ENCODING) {
        return Ok(Response::from_parts(parts, body));
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(parts, rewrite::html(body, links)))
}

fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

async fn encrypt(
    stream: Box<dyn Stream>,
    to: &Target,
) -> std::io::Result<tokio_rustls::client::TlsStream<Box<dyn Stream>>> {
    let config = sampan_pki::unverified::client_config().map_err(std::io::Error::other)?;
    let name = match to {
        Target::Tcp(address) => ServerName::from(address.ip()),
        Target::Kubelet => ServerName::from(std::net::IpAddr::from(std::net::Ipv4Addr::LOCALHOST)),
    };
    TlsConnector::from(config).connect(name, stream).await
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
