//! The cluster's certificate authority. Upstream counterpart: kubeadm's phases/certs and util/pkiutil.
//!
//! What stays true: the key is written before the certificate, so a crash in between leaves a key that the next
//! start uses; only [`crate::rotation`] replaces them. Certificates start to be valid in the past, since boards without
//! a battery come up with yesterday's clock; when one was really issued is told by its serial number, so that renewal
//! can go by a fraction of its life. `server-ca.crt` is a bundle: the certificate that belongs to the key comes first,
//! then what chains it to earlier authorities. All of it is trusted, for servers and clients alike; what of it is not
//! self-signed is presented with every certificate, so that who knows only an earlier authority trusts it too.
use std::path::{Path, PathBuf};
use std::{fs, io};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose as Usage, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use sampan_world::{clock, files, random};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use crate::{Pair, PkiError, certificate, keys};

const DAY_SECONDS: i64 = 24 * 60 * 60;
/// How long the authority lives.
pub const AUTHORITY_DAYS: i64 = 3650;
/// How long what it signs lives.
pub const CERTIFICATE_DAYS: i64 = 365;
/// 2025-01-01: the start of every certificate's validity, and the least that the clock is taken to be.
pub(crate) const EPOCH_SECONDS: i64 = 1_735_689_600;
/// The first byte of serial numbers that tell, in the next five, the second of issue.
pub(crate) const TELLING_SERIAL: u8 = 0x01;
/// Certificate requests come from agents that only hold a token.
const MAX_REQUEST_BYTES: usize = 16 * 1024;
const MAX_NAMES: usize = 64;
/// Groups (O) that a certificate can hold.
const MAX_GROUPS: usize = 2;

/// The key and certificates that the cluster's other certificates are signed with.
pub struct Authority {
    bundle: Vec<CertificateDer<'static>>,
    bundle_pem: String,
    /// What is presented besides a certificate of its own.
    chain_pem: String,
    issuer: Issuer<'static, KeyPair>,
    not_after_seconds: i64,
    lifetime_seconds: i64,
}

impl Authority {
    /// The authority in `folder` (`server-ca.crt`, `server-ca.key`), made when it is not there.
    pub fn load_or_create(folder: &Path) -> Result<Self, PkiError> {
        fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
        let (key_path, path) = (folder.join("server-ca.key"), folder.join("server-ca.crt"));
        let key = load_or_create_key(&key_path)?;
        let pem = match read_optional(&path)? {
            Some(pem) => pem,
            None => {
                let pem = self_signed(&key)?;
                files::write_atomic(&path, pem.as_bytes(), 0o644).map_err(|e| io_error(&path, e))?;
                pem
            }
        };
        Self::from_parts(pem, key, &path.display().to_string())
    }

    /// The authority of that bundle and key (PEM); `name` says in errors where they come from.
    pub fn from_pem(bundle_pem: &str, key_pem: &str, name: &str) -> Result<Self, PkiError> {
        let malformed = |reason| PkiError::Malformed { path: format!("{name}, its key"), reason };
        let key = keys::read(key_pem).map_err(malformed)?;
        Self::from_parts(bundle_pem.to_string(), key, name)
    }

    pub(crate) fn from_parts(bundle_pem: String, key: KeyPair, name: &str) -> Result<Self, PkiError> {
        let malformed = |reason: String| PkiError::Malformed { path: name.to_string(), reason };
        let bundle = certificate::certificates(&bundle_pem)
            .map_err(|e| malformed(format!("not a certificate: {e}")))?;
        let mut chain_pem = String::new();
        for one in &bundle {
            let told = certificate::details(one).ok_or_else(|| malformed("not a certificate".into()))?;
            if !told.is_self_signed {
                chain_pem.push_str(&certificate::pem(one));
            }
        }
        let Some(signer) = bundle.first() else { return Err(malformed("there is none".into())) };
        let (_, parsed) = x509_parser::parse_x509_certificate(signer)
            .map_err(|e| malformed(format!("not a certificate: {e}")))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(malformed("the certificate does not belong to server-ca.key".into()));
        }
        let not_after_seconds = parsed.validity().not_after.timestamp();
        let issuer = Issuer::from_ca_cert_der(signer, key).map_err(|e| malformed(e.to_string()))?;
        let lifetime_seconds = CERTIFICATE_DAYS * DAY_SECONDS;
        Ok(Self { bundle, bundle_pem, chain_pem, issuer, not_after_seconds, lifetime_seconds })
    }

    /// Signs for `seconds` instead of [`CERTIFICATE_DAYS`].
    pub fn with_lifetime(mut self, seconds: i64) -> Self {
        self.lifetime_seconds = seconds;
        self
    }

    pub fn lifetime_seconds(&self) -> i64 {
        self.lifetime_seconds
    }

    /// What `/cacerts` answers and kubeconfigs and pods carry: all certificates that are trusted.
    pub fn certificate_pem(&self) -> &str {
        &self.bundle_pem
    }

    /// All certificates that are trusted, the signer's first.
    pub fn trusted(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    /// What join tokens carry: the SHA-256 of the signer's certificate in DER form, in hex.
    pub fn hash(&self) -> String {
        self.bundle.first().map(|signer| crate::sha256_hex(signer)).unwrap_or_default()
    }

    /// Whether this authority's present key signed that certificate.
    pub fn has_signed(&self, certificate: &CertificateDer<'_>) -> bool {
        let Some(signer) = self.bundle.first() else { return false };
        certificate::is_signed_by(certificate, signer)
    }

    /// The end of what would be signed now: no certificate outlives its authority.
    pub fn next_not_after(&self) -> jiff::Timestamp {
        let seconds = (now_seconds() + self.lifetime_seconds).min(self.not_after_seconds);
        jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX)
    }

    /// A serving certificate for those DNS names and IP addresses.
    pub fn server(&self, common_name: &str, names: &[String]) -> Result<Pair, PkiError> {
        self.pair(serving(common_name, &[], names)?)
    }

    /// A certificate to serve with and to be a client with: what an etcd member has, to which others connect as it does
    /// to them.
    pub fn peer(&self, common_name: &str, names: &[String]) -> Result<Pair, PkiError> {
        let mut params = serving(common_name, &[], names)?;
        params.extended_key_usages.push(Usage::ClientAuth);
        self.pair(params)
    }

    /// A client certificate: the user, and the groups it is in.
    pub fn client(&self, user: &str, groups: &[&str]) -> Result<Pair, PkiError> {
        self.pair(client(user, groups)?)
    }

    /// The serving certificate of a kubelet, as upstream's kubelet-serving signer wants it.
    pub fn kubelet_serving(&self, node: &str, addresses: &[String]) -> Result<Pair, PkiError> {
        self.pair(serving(&format!("system:node:{node}"), &["system:nodes"], addresses)?)
    }

    /// The client certificate of a kubelet.
    pub fn kubelet_client(&self, node: &str) -> Result<Pair, PkiError> {
        self.client(&format!("system:node:{node}"), &["system:nodes"])
    }

    /// Signs the public key of a PEM request as a client; everything else in the request is ignored.
    pub fn sign_client(&self, request_pem: &str, user: &str, groups: &[&str]) -> Result<String, PkiError> {
        self.sign(request_pem, client(user, groups)?)
    }

    /// Signs the public key of a PEM request as a node's kubelet server.
    pub fn sign_kubelet_serving(
        &self,
        request_pem: &str,
        node: &str,
        addresses: &[String],
    ) -> Result<String, PkiError> {
        self.sign(request_pem, serving(&format!("system:node:{node}"), &["system:nodes"], addresses)?)
    }

    fn sign(&self, request_pem: &str, params: CertificateParams) -> Result<String, PkiError> {
        let subject = common_name(&params);
        let refused = |reason: String| PkiError::Request { subject: subject.clone(), reason };
        if request_pem.len() > MAX_REQUEST_BYTES {
            return Err(refused(format!("it is longer than {MAX_REQUEST_BYTES} bytes")));
        }
        let key = requested_key(request_pem).map_err(refused)?;
        let signed = self.dated(params).signed_by(&key, &self.issuer);
        let own_pem = signed.map_err(|source| PkiError::Certificate { subject, source })?.pem();
        Ok(own_pem + &self.chain_pem)
    }

    fn pair(&self, params: CertificateParams) -> Result<Pair, PkiError> {
        let wrap = |source| PkiError::Certificate { subject: common_name(&params), source };
        let key = KeyPair::generate().map_err(wrap)?;
        let certificate = self.dated(params.clone()).signed_by(&key, &self.issuer).map_err(wrap)?;
        Ok(Pair { certificate_pem: certificate.pem() + &self.chain_pem, key_pem: key.serialize_pem() })
    }

    fn dated(&self, params: CertificateParams) -> CertificateParams {
        ending(params, self.next_not_after().as_second())
    }

    /// A new authority that knows nothing of this one: its key and its own certificate (PEM).
    pub(crate) fn unrelated() -> Result<(KeyPair, String), PkiError> {
        let key = KeyPair::generate()
            .map_err(|source| PkiError::Certificate { subject: "the new authority".to_string(), source })?;
        let pem = self_signed(&key)?;
        Ok((key, pem))
    }

    /// This authority's certificate over another one's name and key: who trusts this one then trusts the other.
    pub(crate) fn cross_sign(&self, other_pem: &str, other_key: &KeyPair) -> Result<String, PkiError> {
        let other = certificate::certificates(other_pem)?;
        let subject = other.first().and_then(certificate::subject).map(|s| s.common_name).unwrap_or_default();
        let params = ending(authority_params(&subject), self.not_after_seconds);
        let signed = params.signed_by(other_key, &self.issuer);
        Ok(signed.map_err(|source| PkiError::Certificate { subject, source })?.pem())
    }
}

/// A new key and the request for a certificate over it, both PEM: what an agent that joins makes.
pub fn new_request(common_name: &str) -> Result<(String, String), PkiError> {
    let wrap = |source| PkiError::Certificate { subject: common_name.to_string(), source };
    let key = KeyPair::generate().map_err(wrap)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(common_name, &[]);
    let request = params.serialize_request(&key).and_then(|r| r.pem()).map_err(wrap)?;
    Ok((key.serialize_pem(), request))
}

/// The public key of a request that is signed with its private key. Nothing else of the request is read: rcgen's
/// own reader of requests panics on some malformed ones.
fn requested_key(request_pem: &str) -> Result<SubjectPublicKeyInfo, String> {
    let der =
        CertificateSigningRequestDer::from_pem_slice(request_pem.as_bytes()).map_err(|e| e.to_string())?;
    let (_, request) = X509CertificationRequest::from_der(&der).map_err(|e| e.to_string())?;
    let info = &request.certification_request_info;
    let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|e| e.to_string())?;
    if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err("the key is not an ECDSA P-256 key".to_string());
    }
    let point = &info.subject_pki.subject_public_key.data;
    ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_ASN1, point)
        .verify(info.raw, &request.signature_value.data)
        .map_err(|_| "it is not signed with its own key".to_string())?;
    Ok(key)
}

/// The ECDSA P-256 key in that file, made when it is not there.
pub(crate) fn load_or_create_key(path: &Path) -> Result<KeyPair, PkiError> {
    if let Some(pem) = read_optional(path)? {
        return keys::read(&pem)
            .map_err(|reason| PkiError::Malformed { path: path.display().to_string(), reason });
    }
    let subject = path.display().to_string();
    let key = KeyPair::generate().map_err(|source| PkiError::Certificate { subject, source })?;
    files::write_atomic(path, key.serialize_pem().as_bytes(), 0o600).map_err(|e| io_error(path, e))?;
    Ok(key)
}

pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error(path, e)),
    }
}

pub(crate) fn io_error(path: &Path, source: io::Error) -> PkiError {
    PkiError::Io { path: PathBuf::from(path).display().to_string(), source }
}

fn self_signed(key: &KeyPair) -> Result<String, PkiError> {
    // two that are made in the same second must not share a name: chains are found by it
    let subject = format!("sampan-ca@{}.{}", now_seconds(), random::suffix(4));
    let mut params = ending(authority_params(&subject), now_seconds() + AUTHORITY_DAYS * DAY_SECONDS);
    params.use_authority_key_identifier_extension = false;
    let signed = params.self_signed(key);
    Ok(signed.map_err(|source| PkiError::Certificate { subject, source })?.pem())
}

fn authority_params(subject: &str) -> CertificateParams {
    let mut params = base(name(subject, &[]));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages.push(KeyUsagePurpose::KeyCertSign);
    params
}

fn client(user: &str, groups: &[&str]) -> Result<CertificateParams, PkiError> {
    if groups.len() > MAX_GROUPS {
        let reason = format!("more than {MAX_GROUPS} groups");
        return Err(PkiError::Request { subject: user.to_string(), reason });
    }
    let mut params = base(name(user, groups));
    params.extended_key_usages = vec![Usage::ClientAuth];
    Ok(params)
}

fn serving(common_name: &str, groups: &[&str], names: &[String]) -> Result<CertificateParams, PkiError> {
    let wrap = |source| PkiError::Certificate { subject: common_name.to_string(), source };
    if names.len() > MAX_NAMES {
        let reason = format!("more than {MAX_NAMES} names");
        return Err(PkiError::Request { subject: common_name.to_string(), reason });
    }
    let mut params = base(name(common_name, groups));
    params.subject_alt_names = CertificateParams::new(names.to_vec()).map_err(wrap)?.subject_alt_names;
    params.extended_key_usages = vec![Usage::ServerAuth];
    Ok(params)
}

fn base(subject: DistinguishedName) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut serial = [0; 16];
    random::fill(&mut serial);
    serial[0] = TELLING_SERIAL;
    serial[1..6].copy_from_slice(&now_seconds().to_be_bytes()[3..]);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = subject;
    params.not_before = rcgen::date_time_ymd(2025, 1, 1);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params
}

fn ending(mut params: CertificateParams, at_seconds: i64) -> CertificateParams {
    let since_1970 = std::time::Duration::from_secs(at_seconds.max(EPOCH_SECONDS).unsigned_abs());
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_1970;
    params
}

/// The clock, but never before the epoch of certificates.
fn now_seconds() -> i64 {
    clock::now().as_second().max(EPOCH_SECONDS)
}

fn name(common_name: &str, groups: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    // rcgen keeps one value a type, so the second group goes by its number; see MAX_GROUPS
    for (group, kind) in
        groups.iter().zip([DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])])
    {
        name.push(kind, *group);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn common_name(params: &CertificateParams) -> String {
    match params.distinguished_name.get(&DnType::CommonName) {
        Some(rcgen::DnValue::Utf8String(s)) => s.clone(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::subject;

    #[test]
    fn is_made_once_and_signs() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let again = Authority::load_or_create(folder.path()).unwrap();
        assert_eq!(authority.hash(), again.hash());
        let pair = again.client("system:node:a", &["system:nodes", "extra"]).unwrap();
        let found = subject(&pair.certificates().unwrap()[0]).unwrap();
        assert_eq!(found.common_name, "system:node:a");
        assert_eq!(found.organizations, ["system:nodes", "extra"]);
        assert_eq!((found.not_after - found.issued).get_seconds(), CERTIFICATE_DAYS * DAY_SECONDS);
        assert!((clock::now() - found.issued).get_seconds() < 60, "the serial number tells when");
        assert!(again.client("u", &["a", "b", "c"]).is_err());
        // a crash between key and certificate: the key stays
        let key = fs::read(folder.path().join("server-ca.key")).unwrap();
        fs::remove_file(folder.path().join("server-ca.crt")).unwrap();
        Authority::load_or_create(folder.path()).unwrap();
        assert_eq!(key, fs::read(folder.path().join("server-ca.key")).unwrap());
        // somebody else's key is noticed
        fs::write(folder.path().join("server-ca.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(Authority::load_or_create(folder.path()).is_err());
    }

    #[test]
    fn nothing_outlives_the_authority() {
        let folder = tempfile::tempdir().unwrap();
        let mut authority = Authority::load_or_create(folder.path()).unwrap().with_lifetime(100);
        let ends = |a: &Authority| {
            let pair = a.client("u", &[]).unwrap();
            subject(&pair.certificates().unwrap()[0]).unwrap().not_after.as_second()
                - clock::now().as_second()
        };
        assert!((98..=100).contains(&ends(&authority)));
        authority.not_after_seconds = clock::now().as_second() + 50;
        assert!((48..=50).contains(&ends(&authority)));
    }

    #[test]
    fn requests_give_their_key_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let (key_pem, request) = new_request("root").unwrap();
        let certificate_pem = authority.sign_client(&request, "system:node:b", &["system:nodes"]).unwrap();
        let pair = Pair { certificate_pem, key_pem };
        assert_eq!(subject(&pair.certificates().unwrap()[0]).unwrap().common_name, "system:node:b");
        assert!(pair.certified_key().is_ok(), "the certificate fits the key");
        let half = request.len() / 2;
        for bad in [
            "",
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----",
            &request[..half],
        ] {
            assert!(authority.sign_client(bad, "u", &[]).is_err(), "{bad}");
        }
        assert!(authority.sign_client(&"x".repeat(MAX_REQUEST_BYTES + 1), "u", &[]).is_err());
    }
}
