//! How the API server reaches into nodes: only over connections that nodes opened themselves.
use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

/// What a stream through a node leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The node's kubelet API (HTTP/1.1).
    Kubelet,
    /// A TCP address as the node sees it: a pod's, or a service's.
    Tcp(std::net::SocketAddr),
}

/// A byte stream both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("node {node} is not connected to this server")]
    NotConnected { node: String },
    #[error("node {node}: {message}")]
    Failed { node: String, message: String },
}

/// Opens streams to nodes.
#[async_trait]
pub trait Dialer: Send + Sync {
    async fn dial(&self, node: &str, target: Target) -> Result<Box<dyn Stream>, DialError>;
}
