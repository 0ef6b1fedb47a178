//! Certificates with their keys: reading them, when they end, and serving them while they are renewed.
//!
//! Upstream counterpart: client-go util/certificate and apiserver's dynamic certificates. What stays true: a new
//! certificate is served to the next handshake, no connection is cut for it.
use std::path::Path;
use std::sync::{Arc, RwLock};

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sampan_world::files;

use crate::PkiError;
use crate::authority::{RENEW_BELOW_DAYS, io_error};

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

    /// The saved pair when `fits` accepts its certificate and it has long enough to live, or a new one, saved.
    pub fn load_or_make(
        stem: &Path,
        fits: impl FnOnce(&Subject) -> bool,
        make: impl FnOnce() -> Result<Self, PkiError>,
    ) -> Result<Self, PkiError> {
        if let Some(pair) = Self::load(stem) {
            let subject = pair.certificates()?.first().and_then(|c| subject(c));
            if subject.is_some_and(|s| fits(&s)) && !pair.needs_renewal(sampan_world::clock::now()) {
                return Ok(pair);
            }
        }
        let pair = make()?;
        pair.save(stem)?;
        Ok(pair)
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

    /// Whole days until the certificate ends; negative when it has.
    pub fn days_left(&self, now: Timestamp) -> Option<i64> {
        let not_after = subject(self.certificates().ok()?.first()?)?.not_after;
        Some((not_after.as_second() - now.as_second()).div_euclid(24 * 60 * 60))
    }

    pub fn needs_renewal(&self, now: Timestamp) -> bool {
        self.days_left(now).is_none_or(|days| days < RENEW_BELOW_DAYS)
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

/// What of a certificate says who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub common_name: String,
    pub organizations: Vec<String>,
    /// DNS names and IP addresses, sorted.
    pub names: Vec<String>,
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
    Some(Subject {
        // the last one counts, as in Go's pkix.Name
        common_name: parsed.subject().iter_common_name().last().and_then(text).unwrap_or_default(),
        organizations: parsed.subject().iter_organization().filter_map(text).collect(),
        names,
        not_after: Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()?,
    })
}

/// A serving certificate that can be replaced while the server runs.
#[derive(Debug)]
pub struct LiveCertificate(RwLock<Arc<CertifiedKey>>);

impl LiveCertificate {
    pub fn new(pair: &Pair) -> Result<Arc<Self>, PkiError> {
        Ok(Arc::new(Self(RwLock::new(Arc::new(pair.certified_key()?)))))
    }

    /// Serves `pair` from the next handshake on.
    pub fn replace(&self, pair: &Pair) -> Result<(), PkiError> {
        let key = Arc::new(pair.certified_key()?);
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = key;
        Ok(())
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(|e| e.into_inner()).clone()
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
    use jiff::SignedDuration;

    #[test]
    fn a_saved_pair_is_used_until_it_no_longer_fits() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let stem = folder.path().join("serving");
        let names = ["localhost".to_string(), "10.0.0.1".to_string()];
        let get = |want: &str| {
            let fits = |s: &Subject| s.names.iter().any(|n| n == want);
            Pair::load_or_make(&stem, fits, || authority.server("sampan", &names)).unwrap()
        };
        let first = get("10.0.0.1");
        assert_eq!(first.certificate_pem, get("localhost").certificate_pem);
        let second = get("elsewhere");
        assert_ne!(first.certificate_pem, second.certificate_pem);
        // half of a save is not a pair
        first.save(&stem).unwrap();
        std::fs::write(stem.with_extension("key"), &second.key_pem).unwrap();
        assert!(Pair::load(&stem).is_none());

        let live = LiveCertificate::new(&first).unwrap();
        live.replace(&second).unwrap();
        assert_eq!(live.current().cert, second.certificates().unwrap());
        let now = sampan_world::clock::now();
        assert!(!first.needs_renewal(now));
        assert!(first.needs_renewal(now + SignedDuration::from_hours(24 * 280)));
    }

    #[test]
    fn rubbish_is_no_certificate() {
        for bytes in [&b""[..], b"\x30", b"\x30\x82\xff\xff", &[0x30; 300]] {
            assert_eq!(subject(&CertificateDer::from(bytes.to_vec())), None);
        }
        assert!(certificates("").is_err());
        assert!(certificates("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----").is_err());
    }
}
