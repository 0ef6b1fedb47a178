//! The network side: TLS, HTTP/1.1 and HTTP/2 on one port, upgrades, graceful shutdown.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/server/secure_serving.go. Client certificates that the TLS layer has
//! verified travel with each request as [`PeerCertificates`].
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::access::PeerCertificates;
use crate::body::BoxError;
use crate::{Server, handler};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 4096;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long requests may take to end when the server goes down.
const DRAIN: Duration = Duration::from_secs(10);

/// Where a connection comes from; an extension of its requests.
#[derive(Clone, Copy, Debug)]
pub struct PeerAddress(pub std::net::SocketAddr);

/// Serves connections until the server is shut down, then waits for those under way.
pub async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
) -> std::io::Result<()> {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, or a peer that left at once: neither is worth going down for.
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = server.shutdown.cancelled() => break,
        };
        let (server, acceptor) = (server.clone(), acceptor.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(server, acceptor, stream, peer).await {
                tracing::debug!(%peer, %error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    let all = places.acquire_many(CONNECTIONS_MAX as u32);
    drop(tokio::time::timeout(DRAIN, all).await);
    Ok(())
}

async fn connection(
    server: Arc<Server>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: std::net::SocketAddr,
) -> Result<(), BoxError> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await??;
    let certificates = stream.get_ref().1.peer_certificates();
    let certificates = certificates.map(|chain| PeerCertificates(Arc::new(chain.to_vec())));
    let service = {
        let server = server.clone();
        hyper::service::service_fn(move |mut request: Request<Incoming>| {
            let server = server.clone();
            request.extensions_mut().insert(PeerAddress(peer));
            if let Some(certificates) = &certificates {
                request.extensions_mut().insert(certificates.clone());
            }
            async move {
                let request = request.map(|body| body.map_err(|e| Box::new(e) as BoxError).boxed_unsync());
                Ok::<_, std::convert::Infallible>(handler::handle(server, request).await)
            }
        })
    };
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(30)).keep_alive(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(250)
        .enable_connect_protocol();
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        served = connection.as_mut() => served,
        () = server.shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}
