//! The Kubernetes client of an agent: one HTTP/2 connection to its server carries every request and watch.
//!
//! Upstream counterpart: client-go's transport (HTTP/2 with ReadIdleTimeout 30 s and PingTimeout 15 s). What stays
//! true: a wire that was cut is noticed by a ping, not by TCP's retransmissions, so watches begin anew within 45 s; after
//! the certificate was renewed new requests go over a new connection, and the old one ends with the last of its watches.
//! Deliberately different: kubelet cuts the old connections.
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http::{Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::client::Body;
use kube::client::middleware::BaseUriLayer;
use sampan_pki::LiveCertificate;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tower::{BoxError, Service, ServiceBuilder, service_fn};

use crate::join::{self, Membership};

const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The connections to the server, and what they say of the node's certificate.
pub struct Transport {
    connector: Connector,
    current: RwLock<Client<Connector, Body>>,
    on_refused: Box<dyn Fn() + Send + Sync>,
}

impl Transport {
    /// `on_refused` is called when the server does not accept the node's certificate.
    pub fn new(
        membership: Arc<Membership>,
        own: Arc<LiveCertificate>,
        on_refused: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let connector = Connector { membership, own };
        let current = RwLock::new(connections(connector.clone()));
        Arc::new(Self { connector, current, on_refused: Box::new(on_refused) })
    }

    pub fn client(self: &Arc<Self>) -> Result<kube::Client> {
        let base: Uri = self.connector.membership.server.parse()?;
        let transport = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let transport = transport.clone();
            async move {
                let client = transport.current.read().unwrap_or_else(PoisonError::into_inner).clone();
                let response = client.request(request).await.map_err(BoxError::from)?;
                if response.status() == StatusCode::UNAUTHORIZED {
                    (transport.on_refused)();
                }
                Ok::<_, BoxError>(response)
            }
        });
        let service = ServiceBuilder::new().layer(BaseUriLayer::new(base)).service(service);
        Ok(kube::Client::new(service, "default"))
    }

    /// Has new requests go over a new connection, which presents the present certificate.
    pub fn connect_anew(&self) {
        let next = connections(self.connector.clone());
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
    }
}

fn connections(connector: Connector) -> Client<Connector, Body> {
    Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector)
}

#[derive(Clone)]
struct Connector {
    membership: Arc<Membership>,
    own: Arc<LiveCertificate>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Wire>;
    // anyhow's errors are no std errors
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { membership, own } = self.clone();
        Box::pin(async move {
            let trusted = membership.trusted();
            let connecting = join::connect(&membership.server, Some(&trusted), Some(own), Some(b"h2"));
            match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(stream) => Ok(TokioIo::new(Wire(stream?))),
                Err(_) => Err(format!("connecting to {}: no answer in time", membership.server).into()),
            }
        })
    }
}

/// A TLS stream that tells the connection pool what it is.
pub struct Wire(TlsStream<TcpStream>);

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new().negotiated_h2()
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
