//! Keys, certificates and tokens: who a cluster is, and how its parts prove who they are.
//!
//! Upstream counterparts: kubeadm's phases/certs, client-go util/cert, pkg/serviceaccount, cluster-bootstrap token.
//! Deliberately different: one authority signs servers and clients alike, and all keys are ECDSA P-256, which small
//! boards sign with quickly.
pub mod authority;
pub mod bootstrap_token;
pub mod certificate;
pub mod join_token;
mod keys;
pub mod kubeconfig;
pub mod renewal;
pub mod rotation;
pub mod sealed;
pub mod service_account_key;
pub mod tls;
pub mod unverified;

pub use authority::Authority;
pub use bootstrap_token::BootstrapToken;
pub use certificate::{LiveCertificate, Pair, Subject};
pub use join_token::{Credentials, JoinToken};
pub use service_account_key::ServiceAccountKey;

/// What goes wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("{path}: {reason}")]
    Malformed { path: String, reason: String },
    #[error("cannot make the certificate of {subject:?}: {source}")]
    Certificate { subject: String, source: rcgen::Error },
    #[error("the certificate request of {subject:?} is refused: {reason}")]
    Request { subject: String, reason: String },
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("cannot sign with the service account key")]
    Sign,
}

/// The SHA-256 of `bytes` in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut hex, b| {
        let _ = write!(hex, "{b:02x}");
        hex
    })
}

/// Whether two secrets are the same, in a time that does not tell how much of them is: digests are compared.
pub fn same_secret(a: &str, b: &str) -> bool {
    let digest = |s: &str| ring::digest::digest(&ring::digest::SHA256, s.as_bytes());
    let (a, b) = (digest(a), digest(b));
    a.as_ref().iter().zip(b.as_ref()).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
}
