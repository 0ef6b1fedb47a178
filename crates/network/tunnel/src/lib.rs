//! How the API server reaches nodes that only dial out.
//!
//! An agent opens one connection to the server and upgrades it; then the roles turn around: over that connection the
//! agent is an HTTP/2 server and the API server its client. Each stream is a CONNECT whose authority says where it
//! leads: `kubelet:10250` (the node's kubelet API) or an address as the node sees it, a pod's for instance. HTTP/2 gives
//! flow control a stream, and pings that notice a dead peer. Upstream counterpart: apiserver-network-proxy (Konnectivity).
pub mod agent;
mod linger;
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
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt, Empty, Full};
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use sampan_drivers::tunnel::Stream;
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

    /// Whichever of two connections of a node ends, it is reached over the other.
    #[tokio::test]
    async fn a_node_connected_twice() {
        for newer_ends in [true, false] {
            let nodes = Arc::new(super::Nodes::default());
            let mut ends = Vec::new();
            for name in ["older", "newer"] {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let serving = tokio::spawn(super::serve(far, move |mut stream| async move {
                    stream.write_all(name.as_bytes()).await.unwrap();
                }));
                let keeper = nodes.clone();
                ends.push((serving, tokio::spawn(async move { keeper.hold("n1", near).await })));
                while says(&nodes).await.as_deref() != Some(name) {
                    tokio::task::yield_now().await;
                }
            }
            let (serving, held) = ends.remove(usize::from(newer_ends));
            serving.abort();
            held.await.unwrap();
            assert_eq!(says(&nodes).await.as_deref(), Some(if newer_ends { "older" } else { "newer" }));
            ends[0].0.abort();
            ends.remove(0).1.await.unwrap();
            assert!(nodes.names().is_empty());
        }
    }

    async fn says(nodes: &super::Nodes) -> Option<String> {
        let mut stream = nodes.dial("n1", Target::Kubelet).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    /// A node whose kubelet is `kubelet`, connected.
    async fn connected<F, Fut>(kubelet: F) -> Box<dyn Stream>
    where
        F: Fn(Box<dyn Stream>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let nodes = Arc::new(super::Nodes::default());
        tokio::spawn(super::serve(far, kubelet));
        let keeper = nodes.clone();
        tokio::spawn(async move { keeper.hold("n1", near).await });
        loop {
            match nodes.dial("n1", Target::Kubelet).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    const SIZE: usize = 4 << 20;

    /// More than fits into any window, to one who reads slowly, and closed at once.
    #[tokio::test]
    async fn what_was_said_before_the_end_arrives() {
        let mut stream = connected(|mut stream| async move {
            stream.write_all(&vec![7; SIZE]).await.unwrap();
            stream.shutdown().await.unwrap();
        })
        .await;
        let (mut got, mut buffer) = (0, vec![0; 100_000]);
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                count => got += count,
            }
        }
        assert_eq!(got, SIZE);
    }

    /// The same as HTTP/1 with `Connection: close`: the client flushes while it reads, and must be let.
    #[tokio::test]
    async fn the_end_of_a_large_answer_arrives() {
        for pause_ms in [0, 5] {
            let stream = connected(|stream| async move {
                let service = service_fn(|_| async {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![7; SIZE]))))
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                served.await.unwrap();
            })
            .await;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let request = Request::get("/").header("host", "n1").header("connection", "close");
            let answer = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
            let (mut got, mut body) = (0, answer.into_body());
            while let Some(frame) = body.frame().await {
                got += frame.unwrap_or_else(|e| panic!("after {got} bytes: {e}")).into_data().unwrap().len();
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            }
            assert_eq!(got, SIZE);
        }
    }

    /// Whoever goes on writing to one who has said all still gets to read that.
    #[tokio::test]
    async fn words_to_one_who_left_do_no_harm() {
        let mut stream = connected(|mut stream| async move {
            stream.write_all(&vec![7; SIZE]).await.unwrap();
        })
        .await;
        let (mut got, mut buffer) = (0, vec![0; 100_000]);
        loop {
            stream.write_all(b"still there?").await.unwrap();
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                count => got += count,
            }
        }
        assert_eq!(got, SIZE);
    }
}
