//! Joining: what an agent asks of a server, and the server's answer (`POST /v1-sampan/join`).
//!
//! The agent makes its own key; only a certificate request travels. A node's name belongs to whoever used it first: the
//! agent sends a password that it keeps on disk, and the server keeps the hash in a Secret, as K3s does. Renewal is the
//! same request, proved by the certificate that is still good, and by the token when it is not. The answer carries all
//! authorities that are to be trusted, so that nodes follow when a new one signs.
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use sampan_pki::{JoinToken, LiveCertificate, Pair};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

pub const PATH: &str = "/v1-sampan/join";
/// Answers when the authorities are others than those whose hash is in `?known=`: how nodes hear of a new one.
pub const AUTHORITY_CHANGES: &str = "/v1-sampan/authority";
/// The cluster's certificate authority, for anyone: agents hold it against their token's hash.
pub const AUTHORITY_PATH: &str = "/cacerts";
/// Answers here are small.
const MAX_BODY_BYTES: usize = 256 * 1024;
/// How long the server may take to say which authority it has, when a start does not depend on it.
const GLANCE: Duration = Duration::from_secs(5);

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
    /// All authorities to be trusted, PEM.
    #[serde(default)]
    pub authority: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    pub cluster_cidr: String,
    pub service_cidr: String,
    pub cluster_dns: String,
    pub cluster_domain: String,
    /// Whether nodes share images; the server tells changes with every tunnel.
    #[serde(default)]
    pub embedded_registry: bool,
}

/// A node that has joined: how it reaches its server.
pub struct Membership {
    pub server: String,
    pub node_name: String,
    pub cluster: Cluster,
    trusted_pem: RwLock<String>,
}

impl Membership {
    fn new(server: &str, node_name: &str, cluster: Cluster, trusted_pem: String) -> Self {
        Self {
            server: server.to_string(),
            node_name: node_name.to_string(),
            cluster,
            trusted_pem: RwLock::new(trusted_pem),
        }
    }

    /// All authorities that this node trusts, PEM.
    pub fn trusted(&self) -> String {
        self.trusted_pem.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn trust(&self, pem: String) {
        *self.trusted_pem.write().unwrap_or_else(PoisonError::into_inner) = pem;
    }
}

/// The server said no: asking again in the same way is of no use.
#[derive(Debug, thiserror::Error)]
#[error("{server} refused to let node {node_name} join: {message}{advice}")]
pub struct Refused {
    pub server: String,
    pub node_name: String,
    pub code: StatusCode,
    pub message: String,
    pub advice: &'static str,
}

const TOKEN_ADVICE: &str = ". The token is not known there: it has expired, was deleted, or the server's was changed by \
     `sampan token rotate`. Put the present one, from <data-dir>/server/node-token of the server or from `sampan token \
     create`, into --token or the configuration file";

/// The files of a membership.
struct Files<'a>(&'a Path);

impl Files<'_> {
    fn stem(&self) -> std::path::PathBuf {
        self.0.join("client-kubelet")
    }

    fn trusted(&self) -> std::path::PathBuf {
        self.0.join("server-ca.crt")
    }

    fn cluster(&self) -> std::path::PathBuf {
        self.0.join("cluster.json")
    }

    /// What is kept of an earlier membership of that name; the certificate may have expired.
    fn load(&self, node_name: &str) -> Option<(String, Pair, Cluster)> {
        let trusted = std::fs::read_to_string(self.trusted()).ok()?;
        let pair = Pair::load(&self.stem())?;
        let cluster = serde_json::from_slice(&std::fs::read(self.cluster()).ok()?).ok()?;
        let is_own = pair.subject()?.common_name == format!("system:node:{node_name}");
        is_own.then_some((trusted, pair, cluster))
    }

    fn save(&self, server: &str, trusted_pem: &str, pair: &Pair, cluster: &Cluster) -> Result<()> {
        use sampan_world::files::write_atomic;
        pair.save(&self.stem())?;
        write_atomic(&self.cluster(), &serde_json::to_vec(cluster)?, 0o600)?;
        if std::fs::read_to_string(self.trusted()).ok().as_deref() != Some(trusted_pem) {
            write_atomic(&self.trusted(), trusted_pem.as_bytes(), 0o644)?;
        }
        write_kubeconfig(self.0, server, trusted_pem, pair)
    }
}

fn write_kubeconfig(folder: &Path, server: &str, trusted_pem: &str, pair: &Pair) -> Result<()> {
    let kubeconfig = sampan_pki::kubeconfig::kubeconfig("sampan", server, trusted_pem, pair);
    let path = folder.join("kubelet.kubeconfig");
    Ok(sampan_world::files::write_atomic(&path, kubeconfig.as_bytes(), 0o600)?)
}

/// Joins, or takes up an earlier membership from `folder` when its certificate has not expired.
pub async fn join(
    folder: &Path,
    server: &str,
    token: Option<&str>,
    node_name: &str,
) -> Result<(Membership, Pair)> {
    let files = Files(folder);
    let kept = files.load(node_name);
    let token = token.map(|token| JoinToken::parse(token).context("--token")).transpose()?;
    if let Some((trusted, pair, cluster)) = &kept
        && pair.subject().is_some_and(|s| s.not_after > sampan_world::clock::now())
        && !names_another_authority(server, token.as_ref(), trusted).await
    {
        write_kubeconfig(folder, server, trusted, pair)?;
        return Ok((Membership::new(server, node_name, cluster.clone(), trusted.clone()), pair.clone()));
    }
    let trusted = kept.map(|(trusted, _, _)| trusted);
    let Some(token) = token else {
        bail!(
            "joining {server} needs --token (see `sampan token create` on the server){}",
            if trusted.is_some() { "; the certificate of an earlier join has expired" } else { "" }
        )
    };
    let joined = by_token(folder, server, &token, node_name, trusted.as_deref()).await?;
    files.save(server, &joined.trusted_pem, &joined.pair, &joined.cluster)?;
    Ok((Membership::new(server, node_name, joined.cluster, joined.trusted_pem), joined.pair))
}

/// Whether the token was made for an authority that this node does not know, and the server has just that: it was
/// replaced without the old one's signature, and the owner gave the new token. A server that does not answer, or has
/// another one than the token says, is no reason to give up a membership that is good.
async fn names_another_authority(server: &str, token: Option<&JoinToken>, trusted: &str) -> bool {
    let Some(token) = token else { return false };
    if token.trusted(trusted).is_ok_and(|known| known.is_some()) {
        return false;
    }
    let Ok(Ok(offered)) = tokio::time::timeout(GLANCE, fetch_authority(server)).await else { return false };
    token.trusted(&offered).is_ok_and(|known| known.is_some())
}

/// What a join brings.
struct Joined {
    pair: Pair,
    cluster: Cluster,
    trusted_pem: String,
}

/// Joins with a token. `trusted` is what an earlier join brought: a token that names no authority goes with it.
async fn by_token(
    folder: &Path,
    server: &str,
    token: &JoinToken,
    node_name: &str,
    trusted: Option<&str>,
) -> Result<Joined> {
    let trusted = match (trusted, &token.authority_hash) {
        (Some(trusted), None) => trusted.to_string(),
        _ => {
            let offered = fetch_authority(server).await?;
            let trusted = token.trusted(&offered);
            let trusted = trusted.with_context(|| format!("the certificate authority of {server}"))?;
            let Some(trusted) = trusted else {
                bail!(
                    "{server} is not the server that the token was made for: its certificate authority differs"
                );
            };
            trusted
        }
    };
    ask(folder, server, node_name, &trusted, Proof::Token(&token.bearer())).await
}

/// What a node proves itself with.
enum Proof<'a> {
    Token(&'a str),
    Certificate(Arc<LiveCertificate>),
}

async fn ask(
    folder: &Path,
    server: &str,
    node_name: &str,
    trusted_pem: &str,
    proof: Proof<'_>,
) -> Result<Joined> {
    let (key_pem, certificate_request) =
        sampan_pki::authority::new_request(&format!("system:node:{node_name}"))?;
    let request = JoinRequest {
        node_name: node_name.to_string(),
        node_password: node_password(folder)?,
        certificate_request,
    };
    let body = serde_json::to_vec(&request)?;
    let mut request = Request::post(PATH).header(header::CONTENT_TYPE, "application/json");
    let mut own = None;
    let mut advice = "";
    match proof {
        Proof::Token(token) => {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            advice = TOKEN_ADVICE;
        }
        Proof::Certificate(certificate) => own = Some(certificate),
    }
    let (code, body) = send(server, Some(trusted_pem), own, request, body).await?;
    if code != StatusCode::OK {
        let (server, node_name) = (server.to_string(), node_name.to_string());
        let advice = if code == StatusCode::UNAUTHORIZED { advice } else { "" };
        return Err(Refused { server, node_name, code, message: message(&body), advice }.into());
    }
    let answer: JoinAnswer =
        serde_json::from_slice(&body).with_context(|| format!("the answer of {server}"))?;
    let pair = Pair { certificate_pem: answer.certificate, key_pem };
    pair.certified_key().with_context(|| format!("the certificate from {server}"))?;
    let trusted_pem = answer.authority.unwrap_or_else(|| trusted_pem.to_string());
    sampan_pki::certificate::certificates(&trusted_pem)
        .with_context(|| format!("the certificate authority of {server}"))?;
    Ok(Joined { pair, cluster: answer.cluster, trusted_pem })
}

/// A new certificate for a node that has joined, saved: proved by the present one (`own`, `None` when it is good no
/// more), else by the token.
pub async fn renew(
    folder: &Path,
    membership: &Membership,
    own: Option<Arc<LiveCertificate>>,
    token: Option<&str>,
) -> Result<Pair> {
    let Membership { server, node_name, .. } = membership;
    let trusted = membership.trusted();
    let mut refusal = None;
    let mut joined = None;
    if let Some(own) = own {
        match ask(folder, server, node_name, &trusted, Proof::Certificate(own)).await {
            Ok(answer) => joined = Some(answer),
            Err(error) if error.is::<Refused>() => refusal = Some(error),
            Err(error) => return Err(error),
        }
    }
    let joined = match (joined, token) {
        (Some(joined), _) => joined,
        (None, Some(token)) => {
            let token = JoinToken::parse(token).context("--token")?;
            by_token(folder, server, &token, node_name, Some(&trusted)).await?
        }
        (None, None) => {
            let error = refusal.unwrap_or_else(|| anyhow::anyhow!("the node's certificate has expired"));
            return Err(error.context("start this node with --token to have it join anew"));
        }
    };
    Files(folder).save(server, &joined.trusted_pem, &joined.pair, &joined.cluster)?;
    membership.trust(joined.trusted_pem);
    Ok(joined.pair)
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
    let (status, body) = send(server, None, None, Request::get(AUTHORITY_PATH), Vec::new()).await?;
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

/// A TLS connection to the server; without authorities nothing is verified, which only fetching them may do.
pub async fn connect(
    server: &str,
    trusted_pem: Option<&str>,
    own: Option<Arc<LiveCertificate>>,
    protocol: Option<&[u8]>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let (host, port) = address_of(server)?;
    let mut config = match trusted_pem {
        Some(pem) => sampan_pki::tls::client_config(&sampan_pki::certificate::certificates(pem)?, own)?,
        None => unverified(),
    };
    config.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
    let stream =
        TcpStream::connect((host.as_str(), port)).await.with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    let name = rustls::pki_types::ServerName::try_from(host)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.map_err(|error| {
        let advice = advice(&error);
        anyhow::Error::new(error).context(format!("TLS with {server}{advice}"))
    })
}

/// What the owner may do about a server that is not trusted.
fn advice(error: &std::io::Error) -> String {
    use rustls::CertificateError as Bad;
    let found = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match found {
        Some(rustls::Error::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        )) => format!(" (is this machine's clock right? It says {})", sampan_world::clock::now_seconds()),
        Some(rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => {
            " (its certificate authority is not the one this node joined: after `sampan certificate rotate-ca --force` \
             start this node with the server's new token)"
                .to_string()
        }
        _ => String::new(),
    }
}

async fn send(
    server: &str,
    trusted_pem: Option<&str>,
    own: Option<Arc<LiveCertificate>>,
    request: http::request::Builder,
    body: Vec<u8>,
) -> Result<(StatusCode, Vec<u8>)> {
    let (host, port) = address_of(server)?;
    let stream = connect(server, trusted_pem, own, Some(b"http/1.1")).await?;
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
