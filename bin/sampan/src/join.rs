//! Joining: what an agent asks of a server, and the server's answer (`POST /v1-sampan/join`).
//!
//! The agent makes its own key; only a certificate request travels. A node's name belongs to whoever used it first: the
//! agent sends a password that it keeps on disk, and the server keeps the hash in a Secret, as K3s does. Renewal is the
//! same request, proved by the certificate that is still good, and by the token when it is not. The answer carries all
//! authorities that are to be trusted, so that nodes follow when a new one signs. Any server of the cluster will do: they
//! are asked in turn until one can say yes or no.
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
use tokio_rustls::client::TlsStream;

use crate::agent::servers::Servers;

pub const PATH: &str = "/v1-sampan/join";
/// Answers when the authorities are others than those whose hash is in `?known=`: how nodes hear of a new one.
pub const AUTHORITY_CHANGES: &str = "/v1-sampan/authority";
/// The cluster's certificate authority, for anyone: agents hold it against their token's hash.
pub const AUTHORITY_PATH: &str = "/cacerts";
/// Answers here are small.
const MAX_BODY_BYTES: usize = 256 * 1024;
/// How long one of several servers may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
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

/// A node that has joined: how it reaches its servers.
pub struct Membership {
    /// The one that the owner named.
    pub server: String,
    pub servers: Arc<Servers>,
    pub node_name: String,
    pub cluster: Cluster,
    trusted_pem: RwLock<String>,
}

impl Membership {
    pub fn new(servers: Arc<Servers>, node_name: &str, cluster: Cluster, trusted_pem: String) -> Self {
        Self {
            server: servers.given().unwrap_or_default().to_string(),
            servers,
            node_name: node_name.to_string(),
            cluster,
            trusted_pem: RwLock::new(trusted_pem),
        }
    }

    /// All authorities that this node trusts, PEM.
    pub fn trusted(&self) -> String {
        self.trusted_pem.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A TLS connection, as this node, to the first server that answers.
    pub async fn connect(&self, own: Arc<LiveCertificate>, protocol: &[u8]) -> Result<TlsStream<TcpStream>> {
        self.servers.connect(&self.trusted(), own, protocol).await
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

/// The server is in trouble, or starts: it may say yes later, and another may now.
#[derive(Debug, thiserror::Error)]
#[error("{server} cannot answer node {node_name}: {message}")]
pub struct Unable {
    pub server: String,
    pub node_name: String,
    pub message: String,
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
    if std::fs::read_to_string(&path).is_ok_and(|kept| kept == kubeconfig) {
        return Ok(());
    }
    Ok(sampan_world::files::write_atomic(&path, kubeconfig.as_bytes(), 0o600)?)
}

/// Has the kubeconfig, which is for commands on this machine, name that server.
pub fn name_in_kubeconfig(folder: &Path, membership: &Membership, server: &str) -> Result<()> {
    let pair = Pair::load(&Files(folder).stem()).context("the node's certificate is gone")?;
    write_kubeconfig(folder, server, &membership.trusted(), &pair)
}

/// Joins, or takes up an earlier membership from `folder` when its certificate has not expired.
pub async fn join(
    folder: &Path,
    servers: &Arc<Servers>,
    token: Option<&str>,
    node_name: &str,
) -> Result<(Membership, Pair)> {
    let files = Files(folder);
    let kept = files.load(node_name);
    let token = token.map(|token| JoinToken::parse(token).context("--token")).transpose()?;
    let member = |cluster: Cluster, trusted| Membership::new(servers.clone(), node_name, cluster, trusted);
    if let Some((trusted, pair, cluster)) = &kept
        && pair.subject().is_some_and(|s| s.not_after > sampan_world::clock::now())
        && !names_another_authority(servers, token.as_ref(), trusted).await
    {
        write_kubeconfig(folder, &servers.first()?, trusted, pair)?;
        return Ok((member(cluster.clone(), trusted.clone()), pair.clone()));
    }
    let trusted = kept.map(|(trusted, _, _)| trusted);
    let Some(token) = token else {
        bail!(
            "joining {} needs --token (see `sampan token create` on the server){}",
            servers.first()?,
            if trusted.is_some() { "; the certificate of an earlier join has expired" } else { "" }
        )
    };
    let (token, known) = (&token, trusted.as_deref());
    let asked = |server: String| async move { by_token(folder, &server, token, node_name, known).await };
    let (server, joined) = any(servers, asked).await?;
    files.save(&server, &joined.trusted_pem, &joined.pair, &joined.cluster)?;
    Ok((member(joined.cluster, joined.trusted_pem), joined.pair))
}

/// Asks servers in turn, until one says yes or no. Otherwise the first one's error is told: it is the one that the owner
/// named, or that worked before.
async fn any<T, F, Fut>(servers: &Servers, ask: F) -> Result<(String, T)>
where
    F: Fn(String) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let (mut first, order) = (None, servers.order());
    let is_alone = order.len() == 1;
    for server in order {
        // alone, there is nobody else to turn to, and TCP is patient
        let asked = match is_alone {
            true => ask(server.clone()).await,
            false => match tokio::time::timeout(ANSWER, ask(server.clone())).await {
                Ok(asked) => asked,
                Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut))
                    .with_context(|| format!("{server} did not answer within {} s", ANSWER.as_secs())),
            },
        };
        match asked {
            Ok(answer) => {
                servers.worked(&server);
                return Ok((server, answer));
            }
            Err(error) if !may_pass(&error) => return Err(error),
            Err(error) => {
                servers.failed(&server);
                first.get_or_insert(error);
            }
        }
    }
    Err(first.unwrap_or_else(|| anyhow::anyhow!("no server is known")))
}

/// Whether asking again, or another server, may help: the server was not reached, or said that it is in trouble.
pub fn may_pass(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.is::<std::io::Error>() || e.is::<hyper::Error>() || e.is::<Unable>())
}

/// Whether the token was made for an authority that this node does not know, and the server has just that: it was
/// replaced without the old one's signature, and the owner gave the new token. A server that does not answer, or has
/// another one than the token says, is no reason to give up a membership that is good.
async fn names_another_authority(servers: &Servers, token: Option<&JoinToken>, trusted: &str) -> bool {
    let Some(token) = token else { return false };
    if token.trusted(trusted).is_ok_and(|known| known.is_some()) {
        return false;
    }
    for server in servers.order() {
        if let Ok(Ok(offered)) = tokio::time::timeout(GLANCE, fetch_authority(&server)).await {
            return token.trusted(&offered).is_ok_and(|known| known.is_some());
        }
    }
    false
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
        let (server, node_name, message) = (server.to_string(), node_name.to_string(), message(&body));
        if code.is_server_error() {
            return Err(Unable { server, node_name, message }.into());
        }
        let advice = if code == StatusCode::UNAUTHORIZED { advice } else { "" };
        return Err(Refused { server, node_name, code, message, advice }.into());
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
    let asked = |server: String| {
        let own = own.clone();
        async move { renew_by(folder, &server, membership, own, token).await }
    };
    let (server, joined) = any(&membership.servers, asked).await?;
    Files(folder).save(&server, &joined.trusted_pem, &joined.pair, &joined.cluster)?;
    membership.trust(joined.trusted_pem);
    Ok(joined.pair)
}

async fn renew_by(
    folder: &Path,
    server: &str,
    membership: &Membership,
    own: Option<Arc<LiveCertificate>>,
    token: Option<&str>,
) -> Result<Joined> {
    let (node_name, trusted) = (&membership.node_name, membership.trusted());
    let mut refusal = None;
    if let Some(own) = own {
        match ask(folder, server, node_name, &trusted, Proof::Certificate(own)).await {
            Ok(joined) => return Ok(joined),
            Err(error) if error.is::<Refused>() => refusal = Some(error),
            Err(error) => return Err(error),
        }
    }
    let Some(token) = token else {
        let error = refusal.unwrap_or_else(|| anyhow::anyhow!("the node's certificate has expired"));
        return Err(error.context("start this node with --token to have it join anew"));
    };
    let token = JoinToken::parse(token).context("--token")?;
    by_token(folder, server, &token, node_name, Some(&trusted)).await
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

pub async fn fetch_authority(server: &str) -> Result<String> {
    let (status, body) = send(server, None, None, Request::get(AUTHORITY_PATH), Vec::new()).await?;
    if status != StatusCode::OK {
        bail!("{server}{AUTHORITY_PATH} answered {status}");
    }
    Ok(String::from_utf8(body)?)
}

/// The message of a `Status`, or the text itself.
pub fn message(body: &[u8]) -> String {
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

/// The URL of the API that listens there.
pub fn url_of(host: &str, port: u16) -> String {
    if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") }
}

/// A TLS connection to the server; without authorities nothing is verified, which only fetching them may do.
pub async fn connect(
    server: &str,
    trusted_pem: Option<&str>,
    own: Option<Arc<LiveCertificate>>,
    protocol: Option<&[u8]>,
) -> Result<TlsStream<TcpStream>> {
    let (host, port) = address_of(server)?;
    let mut config = match trusted_pem {
        Some(pem) => sampan_pki::tls::client_config(&sampan_pki::certificate::certificates(pem)?, own)?,
        None => (*sampan_pki::unverified::client_config()?).clone(),
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

pub async fn send(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_urls() {
        assert_eq!(address_of("https://10.0.0.1").unwrap(), ("10.0.0.1".to_string(), 6443));
        assert_eq!(address_of("https://[fd00::1]:7443").unwrap(), ("fd00::1".to_string(), 7443));
        assert!(address_of("http://x").unwrap_err().to_string().contains("expected https"));
        assert!(address_of("10.0.0.1:6443").is_err());
        assert_eq!(url_of("fd00::1", 6443), "https://[fd00::1]:6443");
        assert_eq!(message(br#"{"kind":"Status","message":"no"}"#), "no");
        assert_eq!(message(b"plain\n"), "plain");
    }
}
