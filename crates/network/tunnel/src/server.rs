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

struct Connected {
    /// Tells a newer connection of the same node from an older one that ends late.
    number: u64,
    sender: SendRequest<Empty<Bytes>>,
}

/// The nodes that are connected to this server.
#[derive(Default)]
pub struct Nodes {
    connected: Mutex<HashMap<String, Connected>>,
}

impl Nodes {
    /// Holds a node's connection until it ends. A newer connection of the same node takes its place.
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
        self.connected.lock().insert(node.to_string(), Connected { number, sender });
        tracing::info!(node, "node connected");
        if let Err(error) = connection.await {
            tracing::debug!(node, %error, "the node's tunnel ended");
        }
        let mut connected = self.connected.lock();
        if connected.get(node).is_some_and(|c| c.number == number) {
            connected.remove(node);
            tracing::info!(node, "node disconnected");
        }
    }

    /// The names of the connected nodes.
    pub fn names(&self) -> Vec<String> {
        self.connected.lock().keys().cloned().collect()
    }
}

#[async_trait]
impl Dialer for Nodes {
    async fn dial(&self, node: &str, target: Target) -> Result<Box<dyn Stream>, DialError> {
        let sender = self.connected.lock().get(node).map(|c| c.sender.clone());
        let Some(sender) = sender else { return Err(DialError::NotConnected { node: node.to_string() }) };
        let failed = |message: String| DialError::Failed { node: node.to_string(), message };
        match tokio::time::timeout(DIAL_TIMEOUT, connect(sender, &target)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(message)) => Err(failed(message)),
            Err(_) => Err(failed(format!("no answer within {} s", DIAL_TIMEOUT.as_secs()))),
        }
    }
}

async fn connect(mut sender: SendRequest<Empty<Bytes>>, target: &Target) -> Result<Box<dyn Stream>, String> {
    let authority = match target {
        Target::Kubelet => KUBELET.to_string(),
        Target::Tcp(address) => address.to_string(),
    };
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    sender.ready().await.map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    if response.status() != StatusCode::OK {
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        return Err(String::from_utf8_lossy(&body).into_owned());
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|e| e.to_string())?;
    Ok(Box::new(TokioIo::new(upgraded)))
}
