//! The keys that service account tokens are signed with. Upstream counterpart: pkg/serviceaccount/jwt.go and
//! openidmetadata.go.
//!
//! What stays true: a key's id is the unpadded base64url SHA-256 of its public key's DER form, so a verifier that
//! knows several keys finds the right one. The file is a bundle, as K3s' service.key: the first key signs, all verify,
//! so tokens live on when a new key comes first. Deliberately different: ES256 only.
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use rcgen::PublicKeyData;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use serde_json::{Value, json};

use crate::authority::{io_error, load_or_create_key};
use crate::{PkiError, keys};

/// Longer tokens are not looked at.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// Signs and verifies tokens.
pub struct ServiceAccountKey {
    path: PathBuf,
    keys: RwLock<Arc<Keys>>,
    random: SystemRandom,
}

struct Keys {
    signing: EcdsaKeyPair,
    /// Of all keys, the signing one's first.
    verifying: Vec<Verifying>,
}

struct Verifying {
    id: String,
    point: Vec<u8>,
}

impl Keys {
    fn read(pem: &str) -> Result<Self, String> {
        let all = keys::read_all(pem)?;
        let random = SystemRandom::new();
        let mut verifying = Vec::with_capacity(all.len());
        let mut signing = None;
        for key in all {
            let pair =
                EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.serialized_der(), &random)
                    .map_err(|_| "a key is not an ECDSA P-256 key".to_string())?;
            let digest = ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info());
            let point = pair.public_key().as_ref().to_vec();
            verifying.push(Verifying { id: BASE64URL.encode(digest), point });
            signing.get_or_insert(pair);
        }
        Ok(Self { signing: signing.ok_or("it holds no key")?, verifying })
    }

    fn signing_id(&self) -> &str {
        self.verifying.first().map_or("", |key| &key.id)
    }
}

/// The ids of the keys in such a file, the signing one's first; an error says what is wrong with it.
pub(crate) fn ids(pem: &str) -> Result<Vec<String>, String> {
    Ok(Keys::read(pem)?.verifying.into_iter().map(|key| key.id).collect())
}

/// Why a token is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("it is not a signed token")]
    Malformed,
    #[error("invalid signature, no keys found")]
    UnknownKey,
    #[error("invalid signature")]
    Signature,
}

impl ServiceAccountKey {
    /// The keys in that file; one is made when it is not there.
    pub fn load_or_create(path: &Path) -> Result<Self, PkiError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| io_error(folder, e))?;
        }
        load_or_create_key(path)?;
        let keys = RwLock::new(Arc::new(read(path)?));
        Ok(Self { path: path.to_path_buf(), keys, random: SystemRandom::new() })
    }

    /// Reads the file again; true when other keys are used now.
    pub fn reload(&self) -> Result<bool, PkiError> {
        let next = read(&self.path)?;
        let ids = |keys: &Keys| keys.verifying.iter().map(|k| k.id.clone()).collect::<Vec<_>>();
        let changed = ids(&next) != ids(&self.keys());
        if changed {
            *self.keys.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(next);
        }
        Ok(changed)
    }

    fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The id of the key that signs.
    pub fn id(&self) -> String {
        self.keys().signing_id().to_string()
    }

    /// The compact serialization of a token with those claims.
    pub fn sign(&self, claims: &Value) -> Result<String, PkiError> {
        let keys = self.keys();
        let header = json!({"alg": "ES256", "kid": keys.signing_id()});
        let signed =
            format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
        let signature = keys.signing.sign(&self.random, signed.as_bytes()).map_err(|_| PkiError::Sign)?;
        Ok(format!("{signed}.{}", BASE64URL.encode(signature)))
    }

    /// The claims of a token that one of the keys signed. What they say (issuer, audience, times) is not looked at.
    pub fn verify(&self, token: &str) -> Result<Value, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let header = decode(header).ok_or(TokenError::Malformed)?;
        if token.len() > MAX_TOKEN_BYTES || header.get("crit").is_some() {
            return Err(TokenError::Malformed);
        }
        let text = |name: &str| header.get(name).and_then(Value::as_str);
        let kid = text("kid").filter(|kid| !kid.is_empty());
        let keys = self.keys();
        let mut fitting = keys.verifying.iter().filter(|key| kid.is_none_or(|kid| kid == key.id)).peekable();
        if fitting.peek().is_none() {
            return Err(TokenError::UnknownKey);
        }
        if text("alg") != Some("ES256") {
            return Err(TokenError::Signature);
        }
        let signature = BASE64URL.decode(signature).map_err(|_| TokenError::Malformed)?;
        let verified = fitting.any(|key| {
            let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &key.point);
            key.verify(signed.as_bytes(), &signature).is_ok()
        });
        match verified {
            true => decode(claims).ok_or(TokenError::Malformed),
            false => Err(TokenError::Signature),
        }
    }

    /// The JSON Web Key Set that `/openid/v1/jwks` answers.
    pub fn jwks(&self) -> Value {
        let keys = self.keys();
        let of = |key: &Verifying| {
            let part = |from: usize| BASE64URL.encode(key.point.get(from..from + 32).unwrap_or_default());
            json!({
                "use": "sig", "kty": "EC", "kid": key.id, "crv": "P-256", "alg": "ES256",
                "x": part(1), "y": part(33),
            })
        };
        json!({"keys": keys.verifying.iter().map(of).collect::<Vec<_>>()})
    }
}

impl std::fmt::Debug for ServiceAccountKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceAccountKey").field("id", &self.id()).finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Keys, PkiError> {
    let pem = std::fs::read_to_string(path).map_err(|e| io_error(path, e))?;
    Keys::read(&pem).map_err(|reason| PkiError::Malformed { path: path.display().to_string(), reason })
}

/// The claims of a token that nobody has verified: only to see whose it may be.
pub fn unverified_claims(token: &str) -> Option<Value> {
    let mut parts = token.split('.');
    let (_, claims, _) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || token.len() > MAX_TOKEN_BYTES { None } else { decode(claims) }
}

fn decode(part: &str) -> Option<Value> {
    let value: Value = serde_json::from_slice(&BASE64URL.decode(part).ok()?).ok()?;
    value.is_object().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifies_only_what_it_signed() {
        let folder = tempfile::tempdir().unwrap();
        let key = ServiceAccountKey::load_or_create(&folder.path().join("a.key")).unwrap();
        let other = ServiceAccountKey::load_or_create(&folder.path().join("b.key")).unwrap();
        let token = key.sign(&json!({"iss": "me"})).unwrap();
        let again = ServiceAccountKey::load_or_create(&folder.path().join("a.key")).unwrap();
        assert_eq!(again.verify(&token).unwrap(), json!({"iss": "me"}));
        assert_eq!(other.verify(&token), Err(TokenError::UnknownKey));
        assert_eq!(unverified_claims(&token).unwrap()["iss"], "me");

        let parts: Vec<&str> = token.split('.').collect();
        let claims = BASE64URL.encode(r#"{"iss":"you"}"#);
        let none = BASE64URL.encode(r#"{"alg":"none"}"#);
        let cases = [
            (format!("{}.{claims}.{}", parts[0], parts[2]), TokenError::Signature),
            (format!("{none}.{}.", parts[1]), TokenError::Signature),
            (format!("{}.{}", parts[0], parts[1]), TokenError::Malformed),
            (format!("{token}.x"), TokenError::Malformed),
            (String::new(), TokenError::Malformed),
            (".".repeat(3), TokenError::Malformed),
            (format!("{}.{}.!", parts[0], parts[1]), TokenError::Malformed),
        ];
        for (token, want) in cases {
            assert_eq!(key.verify(&token), Err(want), "{token}");
        }
        let jwk = &key.jwks()["keys"][0];
        assert_eq!(jwk["kid"], key.id());
        assert_eq!((jwk["x"].as_str().map(str::len), key.id().len()), (Some(43), 43));
    }

    #[test]
    fn old_tokens_outlive_a_new_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.key");
        let key = ServiceAccountKey::load_or_create(&path).unwrap();
        let (old_id, old) = (key.id(), key.sign(&json!({"n": 1})).unwrap());
        assert!(!key.reload().unwrap(), "nothing has changed");
        let first = std::fs::read_to_string(&path).unwrap();
        let next = rcgen::KeyPair::generate().unwrap().serialize_pem();
        std::fs::write(&path, format!("{next}{first}")).unwrap();
        assert!(key.reload().unwrap());
        assert_ne!(key.id(), old_id);
        assert_eq!(key.verify(&old).unwrap()["n"], 1);
        let new = key.sign(&json!({"n": 2})).unwrap();
        assert_eq!(key.verify(&new).unwrap()["n"], 2);
        assert_eq!(key.jwks()["keys"].as_array().unwrap().len(), 2);
        std::fs::write(&path, "rubbish").unwrap();
        assert!(key.reload().is_err());
        assert!(key.verify(&old).is_ok(), "what was read stays");
        std::fs::write(&path, next).unwrap();
        key.reload().unwrap();
        assert_eq!(key.verify(&old), Err(TokenError::UnknownKey));
    }
}
