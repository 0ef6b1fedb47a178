//! The HTTPS client for registries behind this one and for object stores: rustls with the system's authorities.
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

const CONNECT: Duration = Duration::from_secs(10);
/// Connections are kept for a few seconds only: an idle registry holds none.
const IDLE: Duration = Duration::from_secs(5);

pub(crate) type HttpClient<B> = Client<HttpsConnector<HttpConnector>, B>;

/// A client that trusts the certificates in `ca_file` (PEM) too.
pub(crate) fn client<B>(ca_file: Option<&Path>) -> Result<HttpClient<B>, String>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_native_certs::load_native_certs().certs {
        // systems carry certificates that rustls doesn't take; the others still serve
        let _ = roots.add(certificate);
    }
    if let Some(path) = ca_file {
        let failed = |e: String| format!("{}: {e}", path.display());
        for certificate in CertificateDer::pem_file_iter(path).map_err(|e| failed(e.to_string()))? {
            let certificate = certificate.map_err(|e| failed(e.to_string()))?;
            roots.add(certificate).map_err(|e| failed(e.to_string()))?;
        }
    }
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut http = HttpConnector::new();
    http.set_connect_timeout(Some(CONNECT));
    http.enforce_http(false);
    http.set_nodelay(true);
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(http);
    Ok(Client::builder(TokioExecutor::new())
        .pool_idle_timeout(IDLE)
        .pool_timer(TokioTimer::new())
        .build(connector))
}
