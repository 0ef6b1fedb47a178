//! Private keys as other tools write them: PKCS#8, and the older forms of OpenSSL.
//!
//! Upstream counterpart: client-go util/keyutil. Deliberately different: what is read is kept as PKCS#8, the one form
//! that ring takes; a key in SEC1 (`EC PRIVATE KEY`) or PKCS#1 (`RSA PRIVATE KEY`) form is wrapped.
use rcgen::KeyPair;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;

const P256: &[u8] = &[
    0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07,
];
const P384: &[u8] = &[
    0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00,
    0x22,
];
const RSA: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
/// Keys of one file; more is no key file.
const MAX_KEYS: usize = 16;

/// The first key of a PEM text.
pub(crate) fn read(pem: &str) -> Result<KeyPair, String> {
    let first = PrivateKeyDer::pem_slice_iter(pem.as_bytes()).next();
    first.ok_or("it holds no private key")?.map_err(|e| e.to_string()).and_then(|key| pair(&key))
}

/// All keys of a PEM text, at least one.
pub(crate) fn read_all(pem: &str) -> Result<Vec<KeyPair>, String> {
    let keys: Vec<_> = PrivateKeyDer::pem_slice_iter(pem.as_bytes()).take(MAX_KEYS).collect();
    if keys.is_empty() {
        return Err("it holds no private key".to_string());
    }
    keys.into_iter().map(|key| key.map_err(|e| e.to_string()).and_then(|key| pair(&key))).collect()
}

fn pair(key: &PrivateKeyDer<'_>) -> Result<KeyPair, String> {
    let wrapped: Vec<Vec<u8>> = match key {
        PrivateKeyDer::Pkcs8(pkcs8) => vec![pkcs8.secret_pkcs8_der().to_vec()],
        PrivateKeyDer::Sec1(sec1) => [P256, P384].map(|kind| wrap(kind, sec1.secret_sec1_der())).to_vec(),
        PrivateKeyDer::Pkcs1(pkcs1) => vec![wrap(RSA, pkcs1.secret_pkcs1_der())],
        _ => Vec::new(),
    };
    let found = wrapped.into_iter().find_map(|der| {
        let der = rustls::pki_types::PrivatePkcs8KeyDer::from(der);
        KeyPair::try_from(&PrivateKeyDer::Pkcs8(der)).ok()
    });
    found.ok_or_else(|| {
        "the key is none of ECDSA P-256 or P-384, Ed25519 and RSA (2048 bits or more)".to_string()
    })
}

/// PKCS#8 around a key of an older form.
fn wrap(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let mut inner = vec![0x02, 0x01, 0x00];
    inner.extend_from_slice(algorithm);
    inner.extend_from_slice(&tagged(0x04, key));
    tagged(0x30, &inner)
}

fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut out = vec![tag];
    match length {
        ..0x80 => out.push(length as u8),
        _ => {
            let bytes = length.to_be_bytes();
            let used = &bytes[bytes.iter().take_while(|b| **b == 0).count()..];
            out.push(0x80 | used.len() as u8);
            out.extend_from_slice(used);
        }
    }
    out.extend_from_slice(content);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::PublicKeyData;

    /// `openssl ecparam -name prime256v1 -genkey`.
    const SEC1: &str = "-----BEGIN EC PARAMETERS-----
BggqhkjOPQMBBw==
-----END EC PARAMETERS-----
";

    #[test]
    fn reads_what_openssl_writes() {
        let key = KeyPair::generate().unwrap();
        let pkcs8 = key.serialized_der();
        // the SEC1 key is the octet string at the end of the PKCS#8 form
        let at = pkcs8.windows(2).position(|w| w == [0x04, 0x6d]).unwrap() + 2;
        use base64::Engine;
        let body = base64::engine::general_purpose::STANDARD.encode(&pkcs8[at..]);
        let sec1 = format!("{SEC1}-----BEGIN EC PRIVATE KEY-----\n{body}\n-----END EC PRIVATE KEY-----\n");
        let found = read(&sec1).unwrap();
        assert_eq!(found.subject_public_key_info(), key.subject_public_key_info());
        let both = format!("{}{sec1}", KeyPair::generate().unwrap().serialize_pem());
        assert_eq!(read_all(&both).unwrap().len(), 2);
        assert_eq!(tagged(0x04, &[0; 300])[..4], [0x04, 0x82, 0x01, 0x2c]);
        for bad in ["", SEC1, "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"] {
            assert!(read(bad).is_err() && read_all(bad).is_err(), "{bad}");
        }
    }
}
