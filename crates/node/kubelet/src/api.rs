//! The kubelet's HTTP API, served on streams that come through the node's tunnel.
//!
//! Upstream counterparts: pkg/kubelet/server/server.go, k8s.io/cri-streaming. Who asks was authorised by the API server
//! before: nothing else reaches these streams. Upgrades of exec, attach and port-forward come as the client made them,
//! so both WebSocket and SPDY end here (`remote_command`, `port_forward`), each on one task that ends with its stream.
//!
//! Below `/v2/` lie the images that other nodes may have ([`Api::lend_images`]).
//!
//! Deliberately not here: checkpoints, the node's own log files, profiling, cAdvisor's and the probes' metrics.
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use sampan_drivers::Runtime;
use sampan_drivers::tunnel::Stream;
use serde_json::json;

use query::Query;
use remote_command::{Command, Options};

pub use pods::Pods;

mod channels;
pub(crate) mod log_file;
mod logs;
mod multiplex;
mod pods;
mod port_forward;
mod query;
mod remote_command;
mod spdy;
mod stats;
mod websocket;

const BUFFER_BYTES: usize = 64 * 1024;
const RUN_OUTPUT_BYTES: usize = 1024 * 1024;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;
/// Answers what other nodes ask below `/v2/`.
pub type ImageLender = Arc<
    dyn Fn(
            Request<()>,
        ) -> Pin<Box<dyn Future<Output = Response<UnsyncBoxBody<Bytes, std::io::Error>>> + Send>>
        + Send
        + Sync,
>;
/// Builds images for whoever asks at [`BUILD`], streaming both ways.
pub type ImageBuilder = Arc<
    dyn Fn(
            Request<Incoming>,
        ) -> Pin<Box<dyn Future<Output = Response<UnsyncBoxBody<Bytes, std::io::Error>>> + Send>>
        + Send
        + Sync,
>;
/// Not upstream's: where images are built.
pub const BUILD: &str = "/sampan/build";
/// What a connection does after it was upgraded.
type Session = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub code: u16,
    pub message: String,
}

impl Refused {
    fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, message)
    }

    /// As text: what clients of exec, attach and port-forward show.
    fn text(self) -> Answer {
        let mut response = Response::new(full(self.message));
        *response.status_mut() = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        content_type(&mut response, "text/plain; charset=utf-8");
        Answer::plain(response)
    }

    /// As a Status, for what the API server hands on as its own answer.
    fn status(self) -> Answer {
        let reason = match self.code {
            400 => "BadRequest",
            404 => "NotFound",
            405 => "MethodNotAllowed",
            422 => "Invalid",
            _ => "InternalError",
        };
        let status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": reason,
            "code": self.code,
        });
        let mut answer = Self { message: status.to_string(), ..self }.text();
        content_type(&mut answer.response, "application/json");
        answer
    }
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

fn content_type(response: &mut Response<Body>, value: &'static str) {
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
}

/// A response, and what follows it on the same connection.
struct Answer {
    response: Response<Body>,
    session: Option<Session>,
}

impl Answer {
    fn plain(response: Response<Body>) -> Self {
        Self { response, session: None }
    }

    fn typed(bytes: impl Into<Bytes>, media_type: &'static str) -> Self {
        let mut response = Response::new(full(bytes));
        content_type(&mut response, media_type);
        Self::plain(response)
    }

    /// Switches protocols; `session` has the connection from then on.
    fn upgrade<F>(
        request: &mut Request<Incoming>,
        response: Response<Body>,
        session: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let upgrade = hyper::upgrade::on(request);
        let session = async move {
            match upgrade.await {
                Ok(upgraded) => session(TokioIo::new(upgraded)).await,
                Err(error) => tracing::debug!(%error, "upgrading"),
            }
        };
        Self { response, session: Some(Box::pin(session)) }
    }
}

/// The protocol that the request wants to switch to.
fn upgrade_of(headers: &HeaderMap) -> Option<&str> {
    let connection = headers.get(header::CONNECTION)?.to_str().ok()?.to_ascii_lowercase();
    if !connection.split(',').any(|word| word.trim() == "upgrade") {
        return None;
    }
    headers.get(header::UPGRADE)?.to_str().ok()
}

struct Shared {
    pods: Arc<dyn Pods>,
    runtime: Arc<dyn Runtime>,
    rates: stats::Rates,
    lender: OnceLock<ImageLender>,
    builder: OnceLock<ImageBuilder>,
}

/// The API; clones are the same one.
#[derive(Clone)]
pub struct Api(Arc<Shared>);

impl Api {
    pub fn new(lookup: Arc<dyn Pods>, runtime: Arc<dyn Runtime>) -> Self {
        let (rates, lender, builder) = (stats::Rates::default(), OnceLock::new(), OnceLock::new());
        Self(Arc::new(Shared { pods: lookup, runtime, rates, lender, builder }))
    }

    /// Lets other nodes have images from this one, through the API server.
    pub fn lend_images(&self, lender: ImageLender) {
        let _ = self.0.lender.set(lender);
    }

    /// Lets images be built on this node, through the API server.
    pub fn build_images(&self, builder: ImageBuilder) {
        let _ = self.0.builder.set(builder);
    }

    fn pods(&self) -> &dyn Pods {
        self.0.pods.as_ref()
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.0.runtime
    }

    /// Serves one connection until it ends; dropping the future ends what it does.
    pub async fn serve(self, stream: Box<dyn Stream>) {
        let session: Arc<Mutex<Option<Session>>> = Arc::default();
        let service = service_fn(|mut request| {
            let (api, session) = (self.clone(), session.clone());
            async move {
                let builder = api.0.builder.get().filter(|_| request.uri().path() == BUILD);
                if let (Some(builder), &Method::POST) = (builder, request.method()) {
                    return Ok(builder(request).await);
                }
                let answer = api.answer(&mut request).await;
                *session.lock() = answer.session;
                Ok::<_, Infallible>(answer.response)
            }
        });
        let connection = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "kubelet API connection ended");
        }
        let session = session.lock().take();
        if let Some(session) = session {
            session.await;
        }
    }

    async fn answer(&self, request: &mut Request<Incoming>) -> Answer {
        let path = request.uri().path().to_string();
        if let (true, Some(lender)) = (path.starts_with("/v2/"), self.0.lender.get()) {
            let mut asked = Request::new(());
            (*asked.method_mut(), *asked.uri_mut()) = (request.method().clone(), request.uri().clone());
            *asked.headers_mut() = request.headers().clone();
            return Answer::plain(lender(asked).await);
        }
        let query = Query::parse(request.uri().query());
        let parts: Vec<String> = path.split('/').skip(1).map(query::decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        match parts.as_slice() {
            ["containerLogs", namespace, pod, container] => {
                self.container_logs(request, (namespace, pod, container), &query).await
            }
            [verb @ ("exec" | "attach" | "run"), namespace, pod, rest @ .., container] if rest.len() < 2 => {
                let target = (*namespace, *pod, rest.first().copied(), *container);
                let answer = match *verb {
                    "run" => self.run(request, target, &query).await,
                    verb => self.remote_command(request, verb, target, &query),
                };
                answer.unwrap_or_else(Refused::text)
            }
            ["portForward", namespace, pod, rest @ ..] if rest.len() < 2 => {
                let uid = rest.first().copied();
                self.port_forward(request, (namespace, pod, uid), &query).unwrap_or_else(Refused::text)
            }
            _ if !matches!(*request.method(), Method::GET | Method::HEAD) => {
                Refused::new(404, "404 page not found").text()
            }
            parts => self.read(parts, &query).await,
        }
    }

    async fn read(&self, parts: &[&str], query: &Query) -> Answer {
        let (pods, runtime) = (self.pods(), self.runtime().as_ref());
        match parts {
            ["healthz"] | ["healthz", "ping" | "syncloop" | "log"] => {
                Answer::typed("ok", "text/plain; charset=utf-8")
            }
            ["pods"] => {
                let items: Vec<_> = pods.pods();
                let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
                Answer::typed(list.to_string(), "application/json")
            }
            ["stats", "summary"] => {
                let only = query.flag("only_cpu_and_memory");
                match stats::summary(pods, runtime, &self.0.rates, only).await {
                    Ok(summary) => Answer::typed(summary.to_string(), "application/json"),
                    Err(error) => Refused::new(500, error.to_string()).text(),
                }
            }
            ["metrics"] => Answer::typed(stats::metrics(pods, runtime).await, METRICS),
            ["metrics", "resource"] => Answer::typed(stats::resource_metrics(runtime).await, METRICS),
            ["configz"] => Answer::typed(pods.configuration().to_string(), "application/json"),
            _ => Refused::new(404, "404 page not found").text(),
        }
    }

    /// The container that is meant, running.
    fn running(
        &self,
        (namespace, pod, uid, container): (&str, &str, Option<&str>, &str),
    ) -> Result<crate::kubelet::ContainerRef, Refused> {
        let found =
            self.pods().pod(namespace, pod).filter(|p| uid.is_none() || p.metadata.uid.as_deref() == uid);
        found.ok_or_else(|| Refused::new(404, "pod does not exist"))?;
        let found = self.pods().container(namespace, pod, container, false).ok();
        found
            .filter(|c| c.is_running)
            .ok_or_else(|| Refused::new(500, format!("container not found ({container:?})")))
    }

    fn remote_command(
        &self,
        request: &mut Request<Incoming>,
        verb: &str,
        target: (&str, &str, Option<&str>, &str),
        query: &Query,
    ) -> Result<Answer, Refused> {
        let flag = |name: &str| matches!(query.get(name), "1" | "true");
        let mut options = Options::parse(flag).map_err(Refused::bad_request)?;
        let container = self.running(target)?;
        let command = if verb == "exec" {
            let command: Vec<String> = query.all("command").map(str::to_string).collect();
            if command.is_empty() {
                return Err(Refused::bad_request("you must specify at least 1 command to run"));
            }
            Command::Exec { container_id: container.id, command }
        } else {
            options.stderr &= !container.tty;
            Command::Attach { container_id: container.id, tty: container.tty }
        };
        let runtime = self.runtime().clone();
        if websocket::is_wanted(request.headers()) {
            let supported = &remote_command::WEBSOCKET_PROTOCOLS;
            let (protocol, response) = logs::websocket_protocol(request.headers(), supported)?;
            return Ok(Answer::upgrade(request, response, move |io| {
                remote_command::websocket(io, runtime, command, options, protocol)
            }));
        }
        let (protocol, response) = spdy_protocol(request.headers(), &remote_command::SPDY_PROTOCOLS)?;
        Ok(Answer::upgrade(request, response, move |io| {
            remote_command::spdy(io, runtime, command, options, protocol)
        }))
    }

    async fn run(
        &self,
        request: &Request<Incoming>,
        target: (&str, &str, Option<&str>, &str),
        query: &Query,
    ) -> Result<Answer, Refused> {
        if request.method() != Method::POST {
            return Err(Refused::new(405, "405: Method Not Allowed"));
        }
        let container = self.running(target)?;
        let command: Vec<String> = query.get("cmd").split(' ').map(str::to_string).collect();
        let result =
            self.runtime().exec_sync(&container.id, &command, Duration::ZERO, RUN_OUTPUT_BYTES).await;
        match result {
            Ok((out, err, 0)) => Ok(Answer::typed([out, err].concat(), "text/plain; charset=utf-8")),
            Ok((_, _, code)) => Err(Refused::new(500, format!("command terminated with exit code {code}"))),
            Err(error) => Err(Refused::new(500, error.to_string())),
        }
    }

    fn port_forward(
        &self,
        request: &mut Request<Incoming>,
        (namespace, name, uid): (&str, &str, Option<&str>),
        query: &Query,
    ) -> Result<Answer, Refused> {
        let is_websocket = websocket::is_wanted(request.headers());
        let offered = websocket::protocols(request.headers());
        let is_tunnel = is_websocket && offered.iter().any(|p| p.starts_with(port_forward::TUNNEL_PREFIX));
        let ports = if is_websocket && !is_tunnel { ports(query)? } else { Vec::new() };
        let found = self.pods().pod(namespace, name);
        let found = found.ok_or_else(|| Refused::new(404, "pod does not exist"))?;
        let found_uid = found.metadata.uid.clone().unwrap_or_default();
        if uid.is_some_and(|uid| uid != found_uid) {
            return Err(Refused::new(404, "pod not found"));
        }
        let sandbox_id = self.pods().sandbox_id(namespace, name);
        let sandbox_id = sandbox_id.ok_or_else(|| {
            let full_name = format!("{name}_{namespace}");
            Refused::new(500, format!("pod not found ({full_name:?})"))
        })?;
        let runtime = self.runtime().clone();
        let pod = port_forward::Pod { runtime, sandbox_id, name: name.to_string(), uid: found_uid };
        if is_tunnel {
            let supported = format!("{}{}", port_forward::TUNNEL_PREFIX, port_forward::PROTOCOL);
            let (_, response) = logs::websocket_protocol(request.headers(), &[&supported])?;
            return Ok(Answer::upgrade(request, response, move |io| port_forward::tunnelled(io, pod)));
        }
        if is_websocket {
            let supported = &port_forward::WEBSOCKET_PROTOCOLS;
            let (protocol, response) = logs::websocket_protocol(request.headers(), supported)?;
            return Ok(Answer::upgrade(request, response, move |io| {
                port_forward::channels(io, pod, ports, protocol)
            }));
        }
        let (_, response) = spdy_protocol(request.headers(), &[port_forward::PROTOCOL])?;
        Ok(Answer::upgrade(request, response, move |io| port_forward::spdy(io, pod)))
    }
}

const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

fn ports(query: &Query) -> Result<Vec<u16>, Refused> {
    let values: Vec<&str> = query.all("port").collect();
    if values.is_empty() {
        return Err(Refused::bad_request("query parameter \"port\" is required"));
    }
    if values.iter().any(|value| value.is_empty()) {
        return Err(Refused::bad_request("query parameter \"port\" cannot be empty"));
    }
    let ports = values.into_iter().flat_map(|value| value.split(',')).map(port_forward::parse_port);
    let ports: Vec<u16> = ports.collect::<Result<_, _>>().map_err(Refused::bad_request)?;
    if ports.len() > port_forward::PORTS_MAX {
        return Err(Refused::bad_request(format!("more than {} ports", port_forward::PORTS_MAX)));
    }
    Ok(ports)
}

const STREAM_PROTOCOL: &str = "X-Stream-Protocol-Version";

/// Which of the protocols is spoken within SPDY, and the answer that says so.
fn spdy_protocol(headers: &HeaderMap, supported: &[&str]) -> Result<(String, Response<Body>), Refused> {
    let is_spdy = upgrade_of(headers).is_some_and(|protocol| protocol.eq_ignore_ascii_case("SPDY/3.1"));
    if !is_spdy {
        return Err(Refused::bad_request("Upgrade request required"));
    }
    let values = headers.get_all(STREAM_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let offered: Vec<&str> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
    if offered.is_empty() {
        let why = format!("unable to upgrade: header {STREAM_PROTOCOL} does not exist in request");
        return Err(Refused::bad_request(why));
    }
    let Some(chosen) = offered.iter().find(|protocol| supported.contains(protocol)) else {
        let why = format!(
            "unable to upgrade: unable to negotiate protocol: client supports [{}], server accepts [{}]",
            offered.join(" "),
            supported.join(" ")
        );
        return Err(Refused::new(403, why));
    };
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("Connection", "Upgrade")
        .header("Upgrade", "SPDY/3.1")
        .header(STREAM_PROTOCOL, *chosen)
        .body(full(Bytes::new()))
        .map_err(|error| Refused::new(500, error.to_string()))?;
    Ok((chosen.to_string(), response))
}

#[cfg(test)]
mod tests;
