//! TLS between nodes: each side shows the certificate that makes it a node, and needs no other.
//!
//! Deliberate difference to the kubelet upstream: the certificate is one for clients at both ends. It names no address, so
//! that a node whose address changes stays what it is; its subject is the node.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use sampan_pki::LiveCertificate;
use tokio::net::TcpStream;

/// On the same link an answer takes milliseconds.
const CONNECT: Duration = Duration::from_millis(1500);
const HANDSHAKE: Duration = Duration::from_secs(5);
const NODES: &str = "system:nodes";

/// Why a node was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// It may well be reached another way.
    #[error("{address}: {why}")]
    Unreachable { address: SocketAddr, why: String },
    #[error("{address}: {why}")]
    Refused { address: SocketAddr, why: String },
}

pub fn server_config(
    own: Arc<LiveCertificate>,
    trust: Arc<dyn ClientCertVerifier>,
) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_client_cert_verifier(trust).with_cert_resolver(own);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

pub fn client_config(
    own: Arc<LiveCertificate>,
    trust: Arc<dyn ClientCertVerifier>,
) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let verifier = Arc::new(AnyNode(trust));
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = builder.with_client_cert_resolver(own);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Lets a node in, and says which it is.
pub async fn accept(
    config: &Arc<ServerConfig>,
    stream: TcpStream,
) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, String)> {
    let acceptor = tokio_rustls::TlsAcceptor::from(config.clone());
    let stream =
        tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await.context("the handshake")??;
    let node = node_of(stream.get_ref().1.peer_certificates())?;
    Ok((stream, node))
}

/// A connection to that node and no other.
pub async fn dial(
    config: &Arc<ClientConfig>,
    node: &str,
    address: SocketAddr,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, DialError> {
    let unreachable = |why: String| DialError::Unreachable { address, why };
    let stream = match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
        Ok(stream) => stream.map_err(|e| unreachable(e.to_string()))?,
        Err(_) => return Err(unreachable(format!("no answer within {} ms", CONNECT.as_millis()))),
    };
    let connector = tokio_rustls::TlsConnector::from(config.clone());
    let connecting = connector.connect(ServerName::IpAddress(address.ip().into()), stream);
    let stream = match tokio::time::timeout(HANDSHAKE, connecting).await {
        Ok(stream) => stream.map_err(|e| unreachable(e.to_string()))?,
        Err(_) => return Err(unreachable(format!("no handshake within {} s", HANDSHAKE.as_secs()))),
    };
    match node_of(stream.get_ref().1.peer_certificates()) {
        Ok(found) if found == node => Ok(stream),
        Ok(found) => Err(DialError::Refused { address, why: format!("this is node {found}, not {node}") }),
        Err(error) => Err(DialError::Refused { address, why: error.to_string() }),
    }
}

/// The node whose certificate it is.
fn node_of(certificates: Option<&[CertificateDer<'_>]>) -> Result<String> {
    let certificate = certificates.and_then(|c| c.first()).context("no certificate")?;
    let subject =
        sampan_pki::certificate::subject(certificate).context("a certificate that can't be read")?;
    match subject.common_name.strip_prefix("system:node:") {
        Some(node) if subject.organizations.iter().any(|o| o == NODES) => Ok(node.to_string()),
        _ => bail!("{} is no node", subject.common_name),
    }
}

/// Takes the certificate of any client of the cluster; whose it is, is looked at afterwards.
#[derive(Debug)]
struct AnyNode(Arc<dyn ClientCertVerifier>);

impl ServerCertVerifier for AnyNode {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify_client_cert(end, intermediates, now).map(|_| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampan_pki::{Authority, Pair};

    async fn meet(server: &Pair, client: &Pair, trusted: &Authority, node: &str) -> Result<String> {
        let trust = sampan_pki::tls::client_verifier(trusted.trusted())?;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serving = server_config(LiveCertificate::new(server)?, trust.clone())?;
        let accepting = tokio::spawn(async move {
            let (stream, _) = listener.accept().await?;
            accept(&serving, stream).await.map(|(stream, node)| (Box::new(stream), node))
        });
        let config = client_config(LiveCertificate::new(client)?, trust)?;
        let _dialled = dial(&config, node, address).await?;
        Ok(accepting.await??.1)
    }

    #[tokio::test]
    async fn only_nodes_meet_and_each_is_who_it_says() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [ours, foreign] = folders.each_ref().map(|f| Authority::load_or_create(f.path()).unwrap());
        let node = |authority: &Authority, name: &str| {
            authority.client(&format!("system:node:{name}"), &[NODES]).unwrap()
        };
        let (a, b) = (node(&ours, "a"), node(&ours, "b"));
        assert_eq!(meet(&b, &a, &ours, "b").await.unwrap(), "a");
        for (what, server, client, expected) in [
            ("another node answers", &b, &a, "c"),
            ("an administrator answers", &ours.client("admin", &["system:masters"]).unwrap(), &a, "b"),
            ("another cluster's node answers", &node(&foreign, "b"), &a, "b"),
            ("an administrator asks", &b, &ours.client("admin", &["system:masters"]).unwrap(), "b"),
            ("a user with a node's name asks", &b, &ours.client("system:node:a", &[]).unwrap(), "b"),
            ("another cluster's node asks", &b, &node(&foreign, "a"), "b"),
        ] {
            assert!(meet(server, client, &ours, expected).await.is_err(), "{what}");
        }
    }
}
