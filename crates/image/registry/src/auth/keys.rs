//! Public keys that tokens are checked with: of certificates, PEM files and JSON Web Key Sets.
//!
//! Upstream counterparts: RFC 7517, 7518; distribution's `registry/auth/token`. ring does the checking: RSA of 2048 bits
//! or more, P-256, P-384 and Ed25519.
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use rustls::pki_types::pem::{PemObject, SectionKind};
use serde::Deserialize;
use x509_parser::prelude::{ASN1Time, FromDer, SubjectPublicKeyInfo, X509Certificate};

const KEYS_MAX: usize = 64;
const CHAIN_MAX: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
}

#[derive(Clone, Debug)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// PKCS#1, as certificates have it.
    RsaDer(Vec<u8>),
    Ec(Curve, Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    id: Option<String>,
    material: Material,
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(default)]
    crv: String,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl Jwk {
    fn key(&self) -> Option<Key> {
        let decode = |t: &Option<String>| URL_SAFE_NO_PAD.decode(t.as_deref()?.trim_end_matches('=')).ok();
        let material = match (self.kty.as_str(), self.crv.as_str()) {
            ("RSA", _) => Material::Rsa { n: decode(&self.n)?, e: decode(&self.e)? },
            ("EC", "P-256") => Material::Ec(Curve::P256, point(&decode(&self.x)?, &decode(&self.y)?)),
            ("EC", "P-384") => Material::Ec(Curve::P384, point(&decode(&self.x)?, &decode(&self.y)?)),
            ("OKP", "Ed25519") => Material::Ed25519(decode(&self.x)?),
            _ => return None,
        };
        Some(Key { id: self.kid.clone(), material })
    }
}

fn point(x: &[u8], y: &[u8]) -> Vec<u8> {
    [&[4], x, y].concat()
}

/// The keys of a JWKS, or of one JWK.
pub(super) fn of_jwks(text: &str) -> Result<Vec<Key>, String> {
    let set: Jwks = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(e) => Jwks { keys: vec![serde_json::from_str(text).map_err(|_| e.to_string())?] },
    };
    let keys: Vec<Key> = set.keys.iter().take(KEYS_MAX).filter_map(Jwk::key).collect();
    if keys.is_empty() { Err("it has no RSA, P-256, P-384 or Ed25519 key".into()) } else { Ok(keys) }
}

/// Keys of PEM certificates and public keys; certificates are roots for tokens that bring a chain along, too.
pub(super) fn of_pem(pem: &[u8]) -> Result<(Vec<Key>, Vec<Vec<u8>>), String> {
    let (mut keys, mut roots) = (Vec::new(), Vec::new());
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(pem).take(KEYS_MAX) {
        match section.map_err(|e| e.to_string())? {
            (SectionKind::Certificate, der) => {
                let (_, certificate) = X509Certificate::from_der(&der).map_err(|e| e.to_string())?;
                keys.extend(of_info(certificate.public_key()));
                roots.push(der);
            }
            (SectionKind::PublicKey, der) => {
                let (_, info) = SubjectPublicKeyInfo::from_der(&der).map_err(|e| e.to_string())?;
                keys.extend(of_info(&info));
            }
            _ => {}
        }
    }
    if keys.is_empty() { Err("it has no certificate or public key".into()) } else { Ok((keys, roots)) }
}

fn of_info(info: &SubjectPublicKeyInfo<'_>) -> Option<Key> {
    let bits = info.subject_public_key.data.to_vec();
    let material = match info.algorithm.algorithm.to_id_string().as_str() {
        "1.2.840.113549.1.1.1" => Material::RsaDer(bits),
        "1.3.101.112" => Material::Ed25519(bits),
        "1.2.840.10045.2.1" if bits.len() == 65 => Material::Ec(Curve::P256, bits),
        "1.2.840.10045.2.1" if bits.len() == 97 => Material::Ec(Curve::P384, bits),
        _ => return None,
    };
    Some(Key { id: None, material })
}

/// The key of the first certificate of a chain that leads to one of the roots.
pub(super) fn of_chain(chain: &[Vec<u8>], roots: &[Vec<u8>]) -> Option<Key> {
    let now = ASN1Time::from_timestamp(sampan_world::clock::now().as_second()).ok()?;
    let parse = |der: &'_ Vec<u8>| X509Certificate::from_der(der).ok().map(|_| ());
    if chain.is_empty() || chain.len() > CHAIN_MAX || chain.iter().any(|der| parse(der).is_none()) {
        return None;
    }
    for (index, der) in chain.iter().enumerate() {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        if !certificate.validity().is_valid_at(now) || (index > 0 && !certificate.is_ca()) {
            return None;
        }
        let trusted = roots.iter().any(|root| {
            let Ok((_, root_certificate)) = X509Certificate::from_der(root) else { return false };
            root == der
                || (root_certificate.is_ca()
                    && root_certificate.validity().is_valid_at(now)
                    && certificate.issuer() == root_certificate.subject()
                    && certificate.verify_signature(Some(root_certificate.public_key())).is_ok())
        });
        if trusted {
            return of_info(X509Certificate::from_der(&chain[0]).ok()?.1.public_key());
        }
        let (_, next) = X509Certificate::from_der(chain.get(index + 1)?).ok()?;
        if certificate.issuer() != next.subject()
            || certificate.verify_signature(Some(next.public_key())).is_err()
        {
            return None;
        }
    }
    None
}

impl Key {
    pub(super) fn is(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id)
    }

    /// Whether `signature` is this key's over `message` by the JWA `algorithm`; keys are only used with their own.
    pub(super) fn verifies(&self, algorithm: &str, message: &[u8], signature: &[u8]) -> bool {
        match (&self.material, algorithm) {
            (Material::Ec(Curve::P256, point), "ES256") => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point)
                    .verify(message, signature)
                    .is_ok()
            }
            (Material::Ec(Curve::P384, point), "ES384") => {
                UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, point)
                    .verify(message, signature)
                    .is_ok()
            }
            (Material::Ed25519(key), "EdDSA") => {
                UnparsedPublicKey::new(&signature::ED25519, key).verify(message, signature).is_ok()
            }
            (Material::Rsa { n, e }, _) => {
                let strip = |b: &[u8]| b.iter().copied().skip_while(|b| *b == 0).collect::<Vec<u8>>();
                let key = RsaPublicKeyComponents { n: strip(n), e: strip(e) };
                rsa(algorithm).is_some_and(|p| key.verify(p, message, signature).is_ok())
            }
            (Material::RsaDer(der), _) => rsa(algorithm)
                .is_some_and(|p| UnparsedPublicKey::new(p, der).verify(message, signature).is_ok()),
            _ => false,
        }
    }
}

fn rsa(algorithm: &str) -> Option<&'static signature::RsaParameters> {
    Some(match algorithm {
        "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
        "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
        "RS512" => &signature::RSA_PKCS1_2048_8192_SHA512,
        "PS256" => &signature::RSA_PSS_2048_8192_SHA256,
        "PS384" => &signature::RSA_PSS_2048_8192_SHA384,
        "PS512" => &signature::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}
