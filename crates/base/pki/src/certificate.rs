//! Certificates with their keys: reading them, when they end, and serving them while they are renewed.
//!
//! Upstream counterpart: client-go util/certificate and apiserver's dynamic certificates. What stays true: a new
//! certificate is served to the next handshake, no connection is cut for it; a handshake that finds the certificate due
//! for renewal says so, which is how a clock that jumped is noticed.
use std::path::Path;
use std::sync::{Arc, OnceLock, RwLock};

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sampan_world::{clock, files};

use crate::authority::{CERTIFICATE_DAYS, EPOCH_SECONDS, TELLING_SERIAL, io_error};
use crate::{PkiError, renewal};

/// A certificate (with its chain) and its private key, PEM.
#[derive(Clone)]
pub struct Pair {
    pub certificate_pem: String,
    pub key_pem: String,
}

impl Pair {
    /// The pair in `<stem>.crt` and `<stem>.key`, when both are there and whole.
    pub fn load(stem: &Path) -> Option<Self> {
        let read = |extension| std::fs::read_to_string(stem.with_extension(extension)).ok();
        let pair = Self { certificate_pem: read("crt")?, key_pem: read("key")? };
        pair.certified_key().ok()?;
        Some(pair)
    }

    /// Writes `<stem>.key`, then `<stem>.crt`. A crash in between leaves two that do not fit, which [`Self::load`] sees.
    pub fn save(&self, stem: &Path) -> Result<(), PkiError> {
        let write = |extension, text: &str, mode| {
            let path = stem.with_extension(extension);
            files::write_atomic(&path, text.as_bytes(), mode).map_err(|e| io_error(&path, e))
        };
        if let Some(folder) = stem.parent() {
            std::fs::create_dir_all(folder).map_err(|e| io_error(folder, e))?;
        }
        write("key", &self.key_pem, 0o600)?;
        write("crt", &self.certificate_pem, 0o644)
    }

    pub fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, PkiError> {
        certificates(&self.certificate_pem)
    }

    /// What rustls serves or presents; an error when key and certificate do not belong together.
    pub fn certified_key(&self) -> Result<CertifiedKey, PkiError> {
        let malformed = |reason: String| PkiError::Malformed { path: "private key".to_string(), reason };
        let key =
            PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|e| malformed(e.to_string()))?;
        let key =
            CertifiedKey::new(self.certificates()?, rustls::crypto::ring::sign::any_supported_type(&key)?);
        key.keys_match()?;
        Ok(key)
    }

    /// Who the certificate is, and when it ends.
    pub fn subject(&self) -> Option<Subject> {
        subject(self.certificates().ok()?.first()?)
    }

    /// When it is to be renewed; what cannot be read is due.
    pub fn renew_at(&self) -> Timestamp {
        let certificates = self.certificates().unwrap_or_default();
        certificates.first().and_then(renewal::renew_at).unwrap_or(Timestamp::MIN)
    }
}

/// All certificates of a PEM text.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(PkiError::Malformed { path: "certificate".into(), reason: "there is none".into() }),
        Err(e) => Err(PkiError::Malformed { path: "certificate".into(), reason: e.to_string() }),
    }
}

/// The PEM form of a certificate.
pub fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_string();
    for line in body.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}

/// What of a certificate says who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub common_name: String,
    pub organizations: Vec<String>,
    /// DNS names and IP addresses, sorted.
    pub names: Vec<String>,
    /// When it was signed: validity begins earlier (see [`crate::authority`]). Of certificates that don't tell, as long
    /// before their end as ours live.
    pub issued: Timestamp,
    pub not_after: Timestamp,
}

/// The subject of a certificate; `None` when it cannot be read.
pub fn subject(certificate: &CertificateDer<'_>) -> Option<Subject> {
    use x509_parser::extensions::GeneralName;
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().ok().map(str::to_string);
    let alternatives = parsed.subject_alternative_name().ok().flatten();
    let mut names: Vec<String> = alternatives
        .iter()
        .flat_map(|a| &a.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_string()),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
                _ => <[u8; 16]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
            },
            _ => None,
        })
        .collect();
    names.sort_unstable();
    let not_after = parsed.validity().not_after.timestamp();
    let issued = issued_seconds(parsed.raw_serial(), not_after);
    Some(Subject {
        // the last one counts, as in Go's pkix.Name
        common_name: parsed.subject().iter_common_name().last().and_then(text).unwrap_or_default(),
        organizations: parsed.subject().iter_organization().filter_map(text).collect(),
        names,
        issued: Timestamp::from_second(issued).ok()?,
        not_after: Timestamp::from_second(not_after).ok()?,
    })
}

fn issued_seconds(serial: &[u8], not_after: i64) -> i64 {
    let told = match serial {
        [TELLING_SERIAL, a, b, c, d, e, random @ ..] if random.len() == 10 => {
            i64::from_be_bytes([0, 0, 0, *a, *b, *c, *d, *e])
        }
        _ => i64::MAX,
    };
    match (EPOCH_SECONDS..=not_after).contains(&told) {
        true => told,
        false => not_after - CERTIFICATE_DAYS * 24 * 60 * 60,
    }
}

/// What else of a certificate is worth checking and telling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    pub issuer: String,
    /// As K3s names them: `ClientAuth`, `ServerAuth`, `CertSign`.
    pub usages: Vec<String>,
    pub is_authority: bool,
    pub is_self_signed: bool,
    pub not_before: Timestamp,
}

/// The details of a certificate; `None` when it cannot be read.
pub fn details(certificate: &CertificateDer<'_>) -> Option<Details> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let usage = parsed.key_usage().ok().flatten();
    let may_sign = usage.as_ref().is_none_or(|u| u.value.key_cert_sign());
    let is_ca = parsed.basic_constraints().ok().flatten().is_some_and(|b| b.value.ca);
    let extended = parsed.extended_key_usage().ok().flatten();
    let has = |is: bool, name: &str| is.then(|| name.to_string());
    let usages = [
        has(extended.as_ref().is_some_and(|e| e.value.client_auth), "ClientAuth"),
        has(extended.as_ref().is_some_and(|e| e.value.server_auth), "ServerAuth"),
        has(is_ca && may_sign, "CertSign"),
    ];
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().ok().map(str::to_string);
    Some(Details {
        issuer: parsed.issuer().iter_common_name().last().and_then(text).unwrap_or_default(),
        usages: usages.into_iter().flatten().collect(),
        is_authority: is_ca && may_sign,
        is_self_signed: parsed.issuer().as_raw() == parsed.subject().as_raw()
            && parsed.verify_signature(None).is_ok(),
        not_before: Timestamp::from_second(parsed.validity().not_before.timestamp()).ok()?,
    })
}

/// Whether the key of `signer` signed `certificate`, and under the signer's name.
pub fn is_signed_by(certificate: &CertificateDer<'_>, signer: &CertificateDer<'_>) -> bool {
    let (Ok((_, certificate)), Ok((_, signer))) =
        (x509_parser::parse_x509_certificate(certificate), x509_parser::parse_x509_certificate(signer))
    else {
        return false;
    };
    certificate.issuer().as_raw() == signer.subject().as_raw()
        && certificate.verify_signature(Some(signer.public_key())).is_ok()
}

/// A serving or client certificate that can be replaced while connections are made with it.
pub struct LiveCertificate {
    held: RwLock<(Arc<CertifiedKey>, Timestamp)>,
    on_due: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl LiveCertificate {
    pub fn new(pair: &Pair) -> Result<Arc<Self>, PkiError> {
        let held = RwLock::new((Arc::new(pair.certified_key()?), pair.renew_at()));
        Ok(Arc::new(Self { held, on_due: OnceLock::new() }))
    }

    /// Has `told` called by handshakes that find the certificate due for renewal.
    pub fn on_due(&self, told: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_due.set(Box::new(told));
    }

    /// Serves `pair` from the next handshake on.
    pub fn replace(&self, pair: &Pair) -> Result<(), PkiError> {
        let held = (Arc::new(pair.certified_key()?), pair.renew_at());
        *self.held.write().unwrap_or_else(|e| e.into_inner()) = held;
        Ok(())
    }

    fn current(&self) -> Arc<CertifiedKey> {
        let (key, renew_at) = self.held.read().unwrap_or_else(|e| e.into_inner()).clone();
        if clock::now() >= renew_at
            && let Some(told) = self.on_due.get()
        {
            told();
        }
        key
    }
}

impl std::fmt::Debug for LiveCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveCertificate").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl rustls::client::ResolvesClientCert for LiveCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn a_replaced_certificate_is_served_next() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let stem = folder.path().join("serving");
        let make = || authority.server("sampan", &["localhost".to_string()]).unwrap();
        let (first, second) = (make(), make());
        first.save(&stem).unwrap();
        assert_eq!(Pair::load(&stem).unwrap().certificate_pem, first.certificate_pem);
        // half of a save is not a pair
        std::fs::write(stem.with_extension("key"), &second.key_pem).unwrap();
        assert!(Pair::load(&stem).is_none());

        let told = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let live = LiveCertificate::new(&first).unwrap();
        let count = told.clone();
        live.on_due(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
        live.replace(&second).unwrap();
        assert_eq!(live.current().cert, second.certificates().unwrap());
        assert_eq!(told.load(std::sync::atomic::Ordering::SeqCst), 0, "it is young");
        let spent = Authority::load_or_create(folder.path()).unwrap().with_lifetime(0);
        live.replace(&spent.server("sampan", &[]).unwrap()).unwrap();
        live.current();
        assert_eq!(told.load(std::sync::atomic::Ordering::SeqCst), 1, "the handshake told");
    }

    #[test]
    fn tells_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let signer = &authority.trusted()[0];
        let told = details(signer).unwrap();
        assert!(told.is_authority && told.is_self_signed && told.usages == ["CertSign"]);
        let client = authority.client("me", &[]).unwrap().certificates().unwrap();
        let told = details(&client[0]).unwrap();
        assert!(!told.is_authority && !told.is_self_signed && told.usages == ["ClientAuth"]);
        assert!(is_signed_by(&client[0], signer) && !is_signed_by(signer, &client[0]));
        assert_eq!(certificates(&pem(signer)).unwrap(), std::slice::from_ref(signer));
        // a serial number of another maker tells nothing
        let end = 2_000_000_000;
        for serial in [&[0x41; 16][..], &[1; 16], &[1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]] {
            assert_eq!(issued_seconds(serial, end), end - 365 * 86_400);
        }
    }

    #[test]
    fn rubbish_is_no_certificate() {
        for bytes in [&b""[..], b"\x30", b"\x30\x82\xff\xff", &[0x30; 300]] {
            let der = CertificateDer::from(bytes.to_vec());
            assert_eq!((subject(&der), details(&der)), (None, None));
        }
        assert!(certificates("").is_err());
        assert!(certificates("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----").is_err());
    }
}
