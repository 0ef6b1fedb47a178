//! HTTP to registries: one hyper client for the common case, one more for each host with TLS settings of its own.
//!
//! rustls with ring. Connections are kept for a few seconds only: an idle node holds none.
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::registries::Tls;

/// What is sent, or what comes: a few bytes, a file's part, or another registry's answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

pub(crate) type HttpClient = Client<HttpsConnector<HttpConnector>, Body>;

const IDLE: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Transport {
    /// By host; the empty one is for hosts without settings. Bounded by what registries.yaml lists.
    clients: Mutex<HashMap<String, HttpClient>>,
}

impl Transport {
    pub(crate) fn client(&self, host: &str, tls: Option<&Tls>) -> Result<HttpClient, String> {
        let key = if tls.is_some() { host } else { "" };
        if let Some(client) = self.clients.lock().get(key) {
            return Ok(client.clone());
        }
        let config = tls_config(tls.unwrap_or(&Tls::default()))?;
        let mut http = HttpConnector::new();
        http.set_connect_timeout(Some(CONNECT));
        http.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(2)
            .pool_timer(TokioTimer::new())
            .build(connector);
        self.clients.lock().insert(key.to_string(), client.clone());
        Ok(client)
    }
}

fn tls_config(tls: &Tls) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = if tls.insecure_skip_verify {
        builder.dangerous().with_custom_certificate_verifier(sampan_pki::unverified::any_server(provider))
    } else {
        let mut roots = RootCertStore::empty();
        for certificate in rustls_native_certs::load_native_certs().certs {
            // Systems carry certificates that rustls doesn't take; the others still serve.
            let _ = roots.add(certificate);
        }
        if let Some(path) = &tls.ca_file {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|e| format!("{}: {e}", path.display()))?;
            }
        }
        builder.with_root_certificates(roots)
    };
    match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|e| format!("{}: {e}", key.display()))?;
            builder.with_client_auth_cert(certificates(cert)?, key).map_err(|e| e.to_string())
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = |e| format!("{}: {e}", path.display());
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(read)?.collect();
    certificates.map_err(read)
}
