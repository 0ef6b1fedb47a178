//! Listening: TCP, TLS, HTTP/1.1 and HTTP/2, an end that lets requests finish.
//!
//! Upstream counterpart: distribution's `registry/listener`, `registry.go`. The certificate is read again when its file
//! changes, so that renewing it needs no restart.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::Registry;

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: u32 = 1024;
const HANDSHAKE: Duration = Duration::from_secs(10);
const HEADERS: Duration = Duration::from_secs(30);
/// How long requests may take to end when the registry goes down.
const DRAIN: Duration = Duration::from_secs(20);
/// Bodies are read in pieces of up to this.
const READ_BYTES: usize = 128 << 10;
const WINDOW_BYTES: u32 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{file}: {message}")]
    File { file: String, message: String },
    #[error("TLS: {0}")]
    Config(String),
}

#[derive(Clone, Debug)]
pub struct TlsOptions {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients must show a certificate of one of these authorities.
    pub client_authorities: Vec<PathBuf>,
    /// Nothing older than TLS 1.3.
    pub only_tls13: bool,
}

fn file_error(path: &Path, message: impl ToString) -> TlsError {
    TlsError::File { file: path.display().to_string(), message: message.to_string() }
}

/// The certificate on disk, read again when the file changes.
#[derive(Debug)]
struct LiveCertificate {
    options: TlsOptions,
    current: Mutex<(Option<SystemTime>, Arc<CertifiedKey>)>,
}

impl LiveCertificate {
    fn load(options: &TlsOptions) -> Result<(Option<SystemTime>, Arc<CertifiedKey>), TlsError> {
        let modified = std::fs::metadata(&options.certificate).and_then(|m| m.modified()).ok();
        let failed = |e: rustls::pki_types::pem::Error| file_error(&options.certificate, e);
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(&options.certificate).map_err(failed)?.collect();
        let key = PrivateKeyDer::from_pem_file(&options.key).map_err(|e| file_error(&options.key, e))?;
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(chain.map_err(failed)?, key, &provider)
            .map_err(|e| file_error(&options.key, e))?;
        Ok((modified, Arc::new(certified)))
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let modified = std::fs::metadata(&self.options.certificate).and_then(|m| m.modified()).ok();
        let mut current = self.current.lock();
        if modified.is_some() && modified != current.0 {
            match LiveCertificate::load(&self.options) {
                Ok(loaded) => *current = loaded,
                // half of the pair may be replaced yet; the next connection tries again
                Err(error) => tracing::warn!(%error, "the new certificate can't be used; the old one is"),
            }
        }
        Some(current.1.clone())
    }
}

/// TLS as the options say.
pub fn tls(options: TlsOptions) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&rustls::SupportedProtocolVersion] =
        if options.only_tls13 { &[&rustls::version::TLS13] } else { rustls::ALL_VERSIONS };
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|e| TlsError::Config(e.to_string()))?;
    let builder = if options.client_authorities.is_empty() {
        builder.with_no_client_auth()
    } else {
        let mut roots = rustls::RootCertStore::empty();
        for path in &options.client_authorities {
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| file_error(path, e))? {
                let certificate = certificate.map_err(|e| file_error(path, e))?;
                roots.add(certificate).map_err(|e| file_error(path, e))?;
            }
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.map_err(|e| TlsError::Config(e.to_string()))?)
    };
    let current = Mutex::new(LiveCertificate::load(&options)?);
    let mut config = builder.with_cert_resolver(Arc::new(LiveCertificate { options, current }));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until `end` becomes true, then lets requests finish.
pub async fn serve(
    registry: Arc<Registry>,
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    mut end: watch::Receiver<bool>,
) {
    let acceptor = tls.map(TlsAcceptor::from);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX as usize));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut end) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or a peer that left at once: neither is worth going down for.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (registry, acceptor, end) = (registry.clone(), acceptor.clone(), end.clone());
        tokio::spawn(async move {
            connection(registry, acceptor, stream, peer, end).await;
            drop(place);
        });
    }
    drop(listener);
    let all = places.acquire_many(CONNECTIONS_MAX);
    drop(tokio::time::timeout(DRAIN, all).await);
}

async fn ended(end: &mut watch::Receiver<bool>) {
    // an end that can't come any more is one
    drop(end.wait_for(|ended| *ended).await);
}

async fn connection(
    registry: Arc<Registry>,
    acceptor: Option<TlsAcceptor>,
    stream: TcpStream,
    peer: SocketAddr,
    end: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let ended = match acceptor {
        None => talk(registry, stream, end).await,
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => talk(registry, stream, end).await,
            Ok(Err(e)) => Err(e.into()),
            Err(e) => Err(e.into()),
        },
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

async fn talk(
    registry: Arc<Registry>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut end: watch::Receiver<bool>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let registry = registry.clone();
        async move { Ok::<_, std::convert::Infallible>(registry.handle(request.map(Body::new)).await) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(READ_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .max_concurrent_streams(64)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES * 2);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        served = connection.as_mut() => served,
        () = ended(&mut end) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}
