//! The Kubernetes client of an agent: one HTTP/2 connection to its server carries every request and watch.
//!
//! Upstream counterpart: client-go's transport (HTTP/2 with ReadIdleTimeout 30 s and PingTimeout 15 s). What stays
//! true: a wire that was cut is noticed by a ping, not by TCP's retransmissions, so watches begin anew within 45 s; a
//! certificate that was renewed is used from the next connection on.
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http::Uri;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::client::Body;
use kube::client::middleware::BaseUriLayer;
use sampan_pki::LiveCertificate;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tower::{BoxError, ServiceBuilder, service_fn};

use crate::join::{self, Membership};

const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub fn new(membership: Arc<Membership>, own: Arc<LiveCertificate>) -> Result<kube::Client> {
    let base: Uri = membership.server.parse()?;
    let connector = service_fn(move |_: Uri| {
        let (membership, own) = (membership.clone(), own.clone());
        Box::pin(async move {
            let authority = Some(membership.authority_pem.as_str());
            let connecting = join::connect(&membership.server, authority, Some(own), Some(b"h2"));
            match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(stream) => Ok(TokioIo::new(Wire(stream?))),
                Err(_) => anyhow::bail!("connecting to {}: no answer in time", membership.server),
            }
        })
    });
    // anyhow's errors are no std errors
    let connector = ServiceBuilder::new().map_err(BoxError::from).service(connector);
    let client: Client<_, Body> = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector);
    let service = ServiceBuilder::new().layer(BaseUriLayer::new(base)).service(client);
    Ok(kube::Client::new(service, "default"))
}

/// A TLS stream that tells the connection pool what it is.
struct Wire(TlsStream<TcpStream>);

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
