//! Joining: what an agent asks of a server, and the server's answer (`POST /v1-sampan/join`).
//!
//! The agent makes its own key; only a certificate request travels. A node's name belongs to whoever used it first: the
//! agent sends a password that it keeps on disk, and the server keeps the hash in a Secret, as K3s does.
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use sampan_pki::{JoinToken, LiveCertificate, Pair};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

pub const PATH: &str = "/v1-sampan/join";
/// The cluster's certificate authority, for anyone: agents hold it against their token's hash.
pub const AUTHORITY_PATH: &str = "/cacerts";
/// Answers here are small.
const MAX_BODY_BYTES: usize = 256 * 1024;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinRequest {
    pub node_name: String,
    pub node_password: String,
    /// PEM.
    pub certificate_request: String,
}

/// What a node must know of its cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinAnswer {
    /// PEM.
    pub certificate: String,
    pub cluster: Cluster,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    pub cluster_cidr: String,
    pub service_cidr: String,
    pub cluster_dns: String,
    pub cluster_domain: String,
}

/// A node that has joined: how it reaches its server.
pub struct Membership {
    pub server: String,
    pub authority_pem: String,
    pub pair: Pair,
    pub cluster: Cluster,
}

impl Membership {
    pub fn kubeconfig(&self) -> String {
        sampan_pki::kubeconfig::kubeconfig("sampan", &self.server, &self.authority_pem, &self.pair)
    }
}

/// Joins, or takes up an earlier membership from `folder` when the certificate is still good.
pub async fn join(folder: &Path, server: &str, token: Option<&str>, node_name: &str) -> Result<Membership> {
    let (authority_path, cluster_path) = (folder.join("server-ca.crt"), folder.join("cluster.json"));
    let stem = folder.join("client-kubelet");
    let known = (
        std::fs::read_to_string(&authority_path).ok(),
        Pair::load(&stem),
        std::fs::read(&cluster_path).ok().and_then(|bytes| serde_json::from_slice::<Cluster>(&bytes).ok()),
    );
    if let (Some(authority_pem), Some(pair), Some(cluster)) = known
        && !pair.needs_renewal(sampan_world::clock::now())
        && sampan_pki::certificate::certificates(&pair.certificate_pem)
            .ok()
            .and_then(|c| sampan_pki::certificate::subject(c.first()?))
            .is_some_and(|s| s.common_name == format!("system:node:{node_name}"))
    {
        return Ok(Membership { server: server.to_string(), authority_pem, pair, cluster });
    }
    let Some(token) = token else {
        bail!("joining {server} needs --token (see `sampan token create` on the server)")
    };
    let token = JoinToken::parse(token).context("--token")?;
    let authority_pem = fetch_authority(server).await?;
    if !token.trusts(&authority_pem).with_context(|| format!("the certificate authority of {server}"))? {
        bail!("{server} is not the server that the token was made for: its certificate authority differs");
    }
    let (key_pem, certificate_request) =
        sampan_pki::authority::new_request(&format!("system:node:{node_name}"))?;
    let request = JoinRequest {
        node_name: node_name.to_string(),
        node_password: node_password(folder)?,
        certificate_request,
    };
    let body = serde_json::to_vec(&request)?;
    let request = Request::post(PATH)
        .header(header::AUTHORIZATION, format!("Bearer {}", token.bearer()))
        .header(header::CONTENT_TYPE, "application/json");
    let (status, body) = send(server, Some(&authority_pem), request, body).await?;
    if status != StatusCode::OK {
        bail!("{server} refused to let node {node_name} join: {}", message(&body));
    }
    let answer: JoinAnswer =
        serde_json::from_slice(&body).with_context(|| format!("the answer of {server}"))?;
    let pair = Pair { certificate_pem: answer.certificate, key_pem };
    pair.save(&stem)?;
    sampan_world::files::write_atomic(&cluster_path, &serde_json::to_vec(&answer.cluster)?, 0o600)?;
    sampan_world::files::write_atomic(&authority_path, authority_pem.as_bytes(), 0o644)?;
    Ok(Membership { server: server.to_string(), authority_pem, pair, cluster: answer.cluster })
}

/// The secret that proves that this machine is the one that used the node's name first.
fn node_password(folder: &Path) -> Result<String> {
    let path = folder.join("node-password");
    if let Ok(text) = std::fs::read_to_string(&path) {
        return Ok(text.trim().to_string());
    }
    let mut bytes = [0; 16];
    sampan_world::random::fill(&mut bytes);
    let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    sampan_world::files::write_atomic(&path, text.as_bytes(), 0o600)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(text)
}

async fn fetch_authority(server: &str) -> Result<String> {
    let (status, body) = send(server, None, Request::get(AUTHORITY_PATH), Vec::new()).await?;
    if status != StatusCode::OK {
        bail!("{server}{AUTHORITY_PATH} answered {status}");
    }
    Ok(String::from_utf8(body)?)
}

/// The message of a `Status`, or the text itself.
fn message(body: &[u8]) -> String {
    let status: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let message = status.as_ref().and_then(|s| s.get("message")).and_then(serde_json::Value::as_str);
    message.map_or_else(|| String::from_utf8_lossy(body).trim().to_string(), str::to_string)
}

/// (host, port) of `https://host[:port]`.
pub fn address_of(server: &str) -> Result<(String, u16)> {
    let uri: http::Uri = server.parse().with_context(|| format!("--server {server} is not a URL"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("https"), Some(host)) => {
            Ok((host.trim_matches(['[', ']']).to_string(), uri.port_u16().unwrap_or(6443)))
        }
        _ => bail!("--server {server}: expected https://HOST:6443"),
    }
}

/// A TLS connection to the server; without an authority nothing is verified, which only fetching it may do.
pub async fn connect(
    server: &str,
    authority_pem: Option<&str>,
    own: Option<Arc<LiveCertificate>>,
    protocol: Option<&[u8]>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let (host, port) = address_of(server)?;
    let mut config = match authority_pem {
        Some(pem) => {
            let certificates = sampan_pki::certificate::certificates(pem)?;
            let authority = certificates.first().context("the authority's file holds no certificate")?;
            sampan_pki::tls::client_config(authority, own)?
        }
        None => unverified(),
    };
    config.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
    let stream =
        TcpStream::connect((host.as_str(), port)).await.with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    let name = rustls::pki_types::ServerName::try_from(host)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.with_context(|| format!("TLS with {server}"))
}

async fn send(
    server: &str,
    authority_pem: Option<&str>,
    request: http::request::Builder,
    body: Vec<u8>,
) -> Result<(StatusCode, Vec<u8>)> {
    let (host, port) = address_of(server)?;
    let stream = connect(server, authority_pem, None, Some(b"http/1.1")).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request =
        request.header(header::HOST, format!("{host}:{port}")).body(Full::new(bytes::Bytes::from(body)))?;
    let response: Response<_> =
        sender.send_request(request).await.with_context(|| format!("asking {server}"))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
    let body = body.map_err(|e| anyhow::anyhow!("reading the answer of {server}: {e}"))?;
    Ok((status, body.to_bytes().to_vec()))
}

fn unverified() -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Unverified(provider.clone()));
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|b| b.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
        .unwrap_or_else(|e| unreachable!("ring supports the default protocol versions: {e}"))
}

/// Takes any certificate: the authority is fetched with it, and then held against the token's hash.
#[derive(Debug)]
struct Unverified(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_urls() {
        assert_eq!(address_of("https://10.0.0.1").unwrap(), ("10.0.0.1".to_string(), 6443));
        assert_eq!(address_of("https://[fd00::1]:7443").unwrap(), ("fd00::1".to_string(), 7443));
        assert!(address_of("http://x").unwrap_err().to_string().contains("expected https"));
        assert!(address_of("10.0.0.1:6443").is_err());
        assert_eq!(message(br#"{"kind":"Status","message":"no"}"#), "no");
        assert_eq!(message(b"plain\n"), "plain");
    }
}
