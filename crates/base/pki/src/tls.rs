//! The TLS configurations of servers and of clients that know the authority.
//!
//! Upstream counterpart: apiserver's server/secure_serving.go. A client certificate is asked for and its signature
//! checked in the handshake, but whether it is trusted is decided per request by authentication, so that a wrong one
//! gets a 401 answer that says so, as upstream does, and not a closed connection. What is valid goes by the clock of
//! `sampan_world`, as everything does.
use std::sync::{Arc, RwLock};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

use crate::{LiveCertificate, PkiError};

/// The clock that certificates are checked by.
#[derive(Debug)]
struct WorldTime;

impl rustls::time_provider::TimeProvider for WorldTime {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = sampan_world::clock::now().as_second();
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(seconds).ok()?)))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A server that serves `live` and asks for, but does not need, a client certificate.
pub fn server_config(live: Arc<LiveCertificate>) -> Result<rustls::ServerConfig, PkiError> {
    let provider = provider();
    let asks = Arc::new(AskForCertificate(provider.signature_verification_algorithms));
    let builder = rustls::ServerConfig::builder_with_details(provider, Arc::new(WorldTime))
        .with_safe_default_protocol_versions()?;
    let mut config = builder.with_client_cert_verifier(asks).with_cert_resolver(live);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// A client that trusts only those authorities, with a certificate of its own or none.
pub fn client_config(
    trusted: &[CertificateDer<'static>],
    own: Option<Arc<LiveCertificate>>,
) -> Result<rustls::ClientConfig, PkiError> {
    let builder = rustls::ClientConfig::builder_with_details(provider(), Arc::new(WorldTime))
        .with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(roots(trusted)?);
    Ok(match own {
        Some(own) => builder.with_client_cert_resolver(own),
        None => builder.with_no_client_auth(),
    })
}

/// Decides whether the certificates of a connection chain to one of those authorities and are for clients.
pub fn client_verifier(trusted: &[CertificateDer<'static>]) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(trusted)?), provider())
        .build()
        .map_err(|e| PkiError::Tls(Error::General(e.to_string())))
}

/// Decides whether a server's certificates chain to one of those authorities.
pub fn server_verifier(
    trusted: &[CertificateDer<'static>],
) -> Result<Arc<dyn rustls::client::danger::ServerCertVerifier>, PkiError> {
    let verifier =
        rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots(trusted)?), provider());
    Ok(verifier.build().map_err(|e| PkiError::Tls(Error::General(e.to_string())))?)
}

fn roots(trusted: &[CertificateDer<'static>]) -> Result<RootCertStore, PkiError> {
    let mut roots = RootCertStore::empty();
    trusted.iter().try_for_each(|one| roots.add(one.clone()))?;
    Ok(roots)
}

/// A [`client_verifier`] whose authorities can be replaced.
#[derive(Debug)]
pub struct LiveVerifier(RwLock<Arc<dyn ClientCertVerifier>>);

impl LiveVerifier {
    pub fn new(trusted: &[CertificateDer<'static>]) -> Result<Arc<Self>, PkiError> {
        Ok(Arc::new(Self(RwLock::new(client_verifier(trusted)?))))
    }

    pub fn replace(&self, trusted: &[CertificateDer<'static>]) -> Result<(), PkiError> {
        let next = client_verifier(trusted)?;
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = next;
        Ok(())
    }

    fn current(&self) -> Arc<dyn ClientCertVerifier> {
        self.0.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl ClientCertVerifier for LiveVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.current().verify_client_cert(end, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.current().verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.current().verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current().supported_verify_schemes()
    }
}

#[derive(Debug)]
struct AskForCertificate(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AskForCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Pair};
    use std::io::{Read, Write};

    /// Moves bytes between the two until neither has any.
    fn shake(
        client: &mut rustls::ClientConnection,
        server: &mut rustls::ServerConnection,
    ) -> Result<(), rustls::Error> {
        for _ in 0..10 {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                server.read_tls(&mut rest).unwrap();
                server.process_new_packets()?;
            }
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets()?;
            }
        }
        Ok(())
    }

    fn connect(own: Option<&Pair>, trusted: &Authority, serving: &Pair) -> Option<rustls::ServerConnection> {
        let server = server_config(LiveCertificate::new(serving).unwrap()).unwrap();
        let own = own.map(|p| LiveCertificate::new(p).unwrap());
        let client = client_config(trusted.trusted(), own).unwrap();
        let mut client =
            rustls::ClientConnection::new(Arc::new(client), "127.0.0.1".try_into().unwrap()).unwrap();
        let mut server = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        shake(&mut client, &mut server).ok()?;
        client.writer().write_all(b"hi").unwrap();
        shake(&mut client, &mut server).ok()?;
        let mut got = [0; 2];
        server.reader().read_exact(&mut got).unwrap();
        Some(server)
    }

    #[test]
    fn a_foreign_client_certificate_reaches_authentication_which_refuses_it() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [ours, foreign] = folders.each_ref().map(|f| Authority::load_or_create(f.path()).unwrap());
        let serving = ours.server("sampan", &["127.0.0.1".into()]).unwrap();
        assert!(connect(None, &foreign, &serving).is_none(), "a client does not trust another authority");
        assert!(connect(None, &ours, &serving).unwrap().peer_certificates().is_none());

        let verifier = LiveVerifier::new(ours.trusted()).unwrap();
        for (pair, trusted) in [
            (ours.client("me", &[]).unwrap(), true),
            (foreign.client("me", &[]).unwrap(), false),
            (ours.server("me", &[]).unwrap(), false),
        ] {
            let connection = connect(Some(&pair), &ours, &serving).unwrap();
            let chain = connection.peer_certificates().unwrap();
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(
                sampan_world::clock::now().as_second().unsigned_abs(),
            ));
            assert_eq!(verifier.verify_client_cert(&chain[0], &chain[1..], now).is_ok(), trusted);
            verifier.replace(foreign.trusted()).unwrap();
            assert!(!trusted || verifier.verify_client_cert(&chain[0], &chain[1..], now).is_err());
            verifier.replace(ours.trusted()).unwrap();
        }
    }
}
