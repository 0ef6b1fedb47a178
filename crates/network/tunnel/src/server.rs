//! The server's end: the connected nodes, and streams through them.
use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use sampan_drivers::tunnel::Stream;
use sampan_drivers::{DialError, Dialer, Target};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{KUBELET, PING_INTERVAL, PING_TIMEOUT};

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections of one node that are known at a time.
const MAX_CONNECTIONS: usize = 4;

struct Connected {
    number: u64,
    sender: SendRequest<Empty<Bytes>>,
}

/// The nodes that are connected to this server.
#[derive(Default)]
pub struct Nodes {
    /// A node's connections, oldest first.
    connected: Mutex<HashMap<String, Vec<Connected>>>,
}

impl Nodes {
    /// Holds a node's connection until it ends. A newer connection of the same node takes its place: the older is broken
    /// and has not noticed, or it is the one that the node leaves in a moment. While the newer lasts, that is: a node that
    /// reaches this server by two names leaves either.
    pub async fn hold<S>(&self, node: &str, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let handshake = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await;
        let (sender, connection) = match handshake {
            Ok(made) => made,
            Err(error) => return tracing::warn!(node, %error, "the node's tunnel did not start"),
        };
        let number = sampan_world::random::u64();
        let _connected = Held::new(self, node, number, sender);
        if let Err(error) = connection.await {
            tracing::debug!(node, %error, "the node's tunnel ended");
        }
    }

    /// The names of the connected nodes.
    pub fn names(&self) -> Vec<String> {
        self.connected.lock().keys().cloned().collect()
    }
}

/// A connection that streams can go through for as long as this lives, also when nobody waits for its end.
struct Held<'a> {
    nodes: &'a Nodes,
    node: &'a str,
    number: u64,
}

impl<'a> Held<'a> {
    fn new(nodes: &'a Nodes, node: &'a str, number: u64, sender: SendRequest<Empty<Bytes>>) -> Self {
        let mut connected = nodes.connected.lock();
        let own = connected.entry(node.to_string()).or_default();
        if own.len() >= MAX_CONNECTIONS {
            own.remove(0);
        }
        own.push(Connected { number, sender });
        tracing::info!(node, "node connected");
        Self { nodes, node, number }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut connected = self.nodes.connected.lock();
        let Some(own) = connected.get_mut(self.node) else { return };
        own.retain(|c| c.number != self.number);
        if own.is_empty() {
            connected.remove(self.node);
            tracing::info!(node = self.node, "node disconnected");
        }
    }
}

#[async_trait]
impl Dialer for Nodes {
    async fn dial(&self, node: &str, target: Target) -> Result<Box<dyn Stream>, DialError> {
        let newest_first: Vec<_> = {
            let connected = self.connected.lock();
            connected.get(node).into_iter().flatten().rev().map(|c| c.sender.clone()).collect()
        };
        let failed = |message: String| DialError::Failed { node: node.to_string(), message };
        let mut last = DialError::NotConnected { node: node.to_string() };
        for sender in newest_first {
            match tokio::time::timeout(DIAL_TIMEOUT, connect(sender, &target)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(Failure::Refused(message))) => return Err(failed(message)),
                // it ends at this moment; nothing was said over it yet, so another may do
                Ok(Err(Failure::Broken(error))) => last = failed(error.to_string()),
                Err(_) => return Err(failed(format!("no answer within {} s", DIAL_TIMEOUT.as_secs()))),
            }
        }
        Err(last)
    }
}

/// Why there is no stream.
enum Failure {
    /// The node says so.
    Refused(String),
    /// Its connection is of no use.
    Broken(hyper::Error),
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        Self::Broken(error)
    }
}

async fn connect(mut sender: SendRequest<Empty<Bytes>>, target: &Target) -> Result<Box<dyn Stream>, Failure> {
    let authority = match target {
        Target::Kubelet => KUBELET.to_string(),
        Target::Tcp(address) => address.to_string(),
    };
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .body(Empty::new())
        .map_err(|e| Failure::Refused(e.to_string()))?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        let body = response.into_body().collect().await?.to_bytes();
        return Err(Failure::Refused(String::from_utf8_lossy(&body).into_owned()));
    }
    Ok(Box::new(TokioIo::new(hyper::upgrade::on(response).await?)))
}
