//! How the API server reaches nodes that only dial out.
//!
//! An agent opens one connection to the server and upgrades it; then the roles turn around: over that connection the
//! agent is an HTTP/2 server and the API server its client. Each stream is a CONNECT whose authority says where it
//! leads: `kubelet:10250` (the node's kubelet API) or an address as the node sees it, a pod's for instance. HTTP/2 gives
//! flow control a stream, and pings that notice a dead peer. Upstream counterpart: apiserver-network-proxy (Konnectivity).
pub mod agent;
pub mod server;

pub use agent::serve;
pub use server::Nodes;

use std::time::Duration;

/// The protocol's name in the `Upgrade` header.
pub const PROTOCOL: &str = "sampan-tunnel/1";
/// Where agents connect on the API server's port.
pub const PATH: &str = "/v1-sampan/connect";
/// The authority that leads to the kubelet's API.
pub(crate) const KUBELET: &str = "kubelet:10250";
/// Both ends ping an idle connection so often, and give it up when no answer comes in [`PING_TIMEOUT`].
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(20);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams at a time through one node.
pub(crate) const MAX_STREAMS: u32 = 1024;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sampan_drivers::{Dialer, Target};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn streams_lead_to_the_kubelet_and_to_addresses() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let nodes = Arc::new(super::Nodes::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"from tcp").await.unwrap();
        });
        tokio::spawn(super::serve(far, |mut stream| async move {
            let mut question = [0; 4];
            stream.read_exact(&mut question).await.unwrap();
            stream.write_all(b"from kubelet").await.unwrap();
            stream.shutdown().await.unwrap();
        }));
        let keeper = nodes.clone();
        tokio::spawn(async move { keeper.hold("n1", near).await });
        let mut stream = loop {
            match nodes.dial("n1", Target::Kubelet).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        stream.write_all(b"ping").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "from kubelet");
        let mut stream = nodes.dial("n1", Target::Tcp(address)).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "from tcp");
        let refused = nodes.dial("n1", Target::Tcp("127.0.0.1:1".parse().unwrap())).await;
        assert!(refused.err().unwrap().to_string().contains("refused"));
        assert!(nodes.dial("n2", Target::Kubelet).await.is_err(), "a node that never connected");
    }

    /// More than fits into any window, to one who reads slowly, and closed at once.
    #[tokio::test]
    async fn what_was_said_before_the_end_arrives() {
        const SIZE: usize = 4 << 20;
        let (near, far) = tokio::io::duplex(64 * 1024);
        let nodes = Arc::new(super::Nodes::default());
        tokio::spawn(super::serve(far, |mut stream| async move {
            stream.write_all(&vec![7; SIZE]).await.unwrap();
            stream.shutdown().await.unwrap();
        }));
        let keeper = nodes.clone();
        tokio::spawn(async move { keeper.hold("n1", near).await });
        let mut stream = loop {
            match nodes.dial("n1", Target::Kubelet).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let (mut got, mut buffer) = (0, vec![0; 100_000]);
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                count => got += count,
            }
        }
        assert_eq!(got, SIZE);
    }
}
