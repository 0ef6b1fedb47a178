//! Where this node looks for images: other nodes, reached directly or through the server.
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use futures::future::BoxFuture;
use http::{Method, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use sampan_image::{Body, ImageError, Mirror, MirrorSource, Reference, Registries};
use sampan_pki::LiveCertificate;
use sampan_world::clock;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{Holder, Membership, PATH, PORT, Rendezvous, Trust, ask, wire};

/// How long the server may take to find who has something.
const QUESTION: Duration = Duration::from_secs(8);
const HOLDERS_MAX_BYTES: usize = 16 * 1024;
/// What could not be reached directly is not tried again for so long.
const UNREACHABLE: Duration = Duration::from_secs(300);
const UNREACHABLE_MAX: usize = 256;

/// The other nodes, as a mirror of registries.
pub struct Peers {
    registries: Registries,
    enabled: watch::Receiver<bool>,
    rendezvous: Arc<dyn Rendezvous>,
    direct: Option<Arc<Direct>>,
}

struct Direct {
    own: Arc<LiveCertificate>,
    trust: Trust,
    unreachable: Mutex<HashMap<IpAddr, tokio::time::Instant>>,
}

impl Peers {
    pub fn new(registries: Registries, membership: &Membership) -> Self {
        let (own, trust) = (membership.own.clone(), membership.trust.clone());
        let direct = Some(Arc::new(Direct { own, trust, unreachable: Mutex::default() }));
        let (enabled, rendezvous) = (membership.enabled.clone(), membership.rendezvous.clone());
        Self { registries, enabled, rendezvous, direct }
    }

    /// Through the server only: for the server itself.
    pub fn through_tunnels(
        registries: Registries,
        enabled: watch::Receiver<bool>,
        rendezvous: Arc<dyn Rendezvous>,
    ) -> Self {
        Self { registries, enabled, rendezvous, direct: None }
    }
}

#[async_trait]
impl Mirror for Peers {
    fn covers(&self, registry: &str) -> bool {
        *self.enabled.borrow() && self.registries.shares(registry)
    }

    async fn sources(&self, reference: &Reference, path: &str) -> Vec<Box<dyn MirrorSource>> {
        let uri = format!("/v2/{}/{path}?ns={}", reference.repository, reference.registry);
        let asked = tokio::time::timeout(QUESTION, self.rendezvous.holders(&uri)).await;
        let holders = match asked {
            Ok(Ok(holders)) => holders,
            Ok(Err(error)) => {
                tracing::debug!(image = %reference, "the server can't say who has it: {error:#}");
                return Vec::new();
            }
            Err(_) => return Vec::new(),
        };
        let mut sources: Vec<Box<dyn MirrorSource>> = Vec::new();
        let mut through_the_server: Vec<Box<dyn MirrorSource>> = Vec::new();
        for Holder { node, address } in holders {
            let reached = Arc::<AtomicBool>::default();
            let address = address.map(|ip| SocketAddr::new(ip, PORT));
            if let (Some(direct), Some(address)) = (self.direct.clone(), address) {
                let (node, uri, reached) = (node.clone(), uri.clone(), reached.clone());
                sources.push(Box::new(Near { direct, node, address, uri, reached }));
            }
            let (rendezvous, uri) = (self.rendezvous.clone(), uri.clone());
            through_the_server.push(Box::new(Far { rendezvous, node, uri, reached }));
        }
        sources.extend(through_the_server);
        sources
    }
}

impl Direct {
    fn is_worth_trying(&self, address: &IpAddr) -> bool {
        let tried = self.unreachable.lock().get(address).copied();
        tried.is_none_or(|at| clock::monotonic().duration_since(at) > UNREACHABLE)
    }

    fn note(&self, address: IpAddr) {
        let mut unreachable = self.unreachable.lock();
        if unreachable.len() >= UNREACHABLE_MAX {
            unreachable.clear();
        }
        unreachable.insert(address, clock::monotonic());
    }
}

/// A node on the same network.
struct Near {
    direct: Arc<Direct>,
    node: String,
    address: SocketAddr,
    uri: String,
    /// Whether the node was asked; then the server asks it no better.
    reached: Arc<AtomicBool>,
}

#[async_trait]
impl MirrorSource for Near {
    fn name(&self) -> &str {
        &self.node
    }

    async fn get(&self, offset: u64) -> Result<Response<Body>, ImageError> {
        if !self.direct.is_worth_trying(&self.address.ip()) {
            return Err(ImageError::Unavailable(format!("{}: not reached a moment ago", self.address)));
        }
        let unavailable = |e: anyhow::Error| ImageError::Unavailable(format!("{e:#}"));
        let trust = (self.direct.trust)().map_err(unavailable)?;
        let config = wire::client_config(self.direct.own.clone(), trust).map_err(unavailable)?;
        let stream = wire::dial(&config, &self.node, self.address).await.map_err(|error| {
            if let wire::DialError::Unreachable { .. } = error {
                self.direct.note(self.address.ip());
            }
            ImageError::Unavailable(error.to_string())
        })?;
        self.reached.store(true, Ordering::Relaxed);
        judge(&self.node, ask(stream, &self.address.to_string(), Method::GET, &self.uri, offset).await)
    }
}

/// A node that the server reaches.
struct Far {
    rendezvous: Arc<dyn Rendezvous>,
    node: String,
    uri: String,
    reached: Arc<AtomicBool>,
}

#[async_trait]
impl MirrorSource for Far {
    fn name(&self) -> &str {
        &self.node
    }

    async fn get(&self, offset: u64) -> Result<Response<Body>, ImageError> {
        if self.reached.load(Ordering::Relaxed) {
            return Err(ImageError::Unavailable(format!("{}: was asked directly", self.node)));
        }
        judge(&self.node, self.rendezvous.get(&self.node, &self.uri, offset).await)
    }
}

fn judge(node: &str, answer: Result<Response<Incoming>>) -> Result<Response<Body>, ImageError> {
    let response = answer.map_err(|e| ImageError::Unavailable(format!("{node}: {e:#}")))?;
    let status = response.status();
    match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
            Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
        }
        StatusCode::NOT_FOUND => Err(ImageError::NotFound(format!("{node} has it no more"))),
        _ => Err(ImageError::Unavailable(format!("{node}: {status}"))),
    }
}

/// A TLS connection to the server.
pub type Stream = tokio_rustls::client::TlsStream<TcpStream>;

/// The server, over the network.
pub struct Remote {
    /// Connects to it, as this node.
    pub dial: Box<dyn Fn() -> BoxFuture<'static, Result<Stream>> + Send + Sync>,
    /// `HOST:PORT`
    pub host: String,
}

impl Remote {
    async fn ask(&self, uri: &str, offset: u64) -> Result<Response<Incoming>> {
        ask((self.dial)().await?, &self.host, Method::GET, uri, offset).await
    }
}

#[async_trait]
impl Rendezvous for Remote {
    async fn holders(&self, uri: &str) -> Result<Vec<Holder>> {
        let response = self.ask(&format!("{PATH}holders{uri}"), 0).await?;
        let status = response.status();
        let body = http_body_util::Limited::new(response.into_body(), HOLDERS_MAX_BYTES).collect().await;
        let bytes = body.map_err(|e| anyhow::anyhow!("the server's answer: {e}"))?.to_bytes();
        if status != StatusCode::OK {
            bail!("the server answered {status}: {}", String::from_utf8_lossy(&bytes));
        }
        serde_json::from_slice(&bytes).context("the server's answer")
    }

    async fn get(&self, node: &str, uri: &str, offset: u64) -> Result<Response<Incoming>> {
        self.ask(&format!("{PATH}nodes/{node}{uri}"), offset).await
    }
}
