//! The key that service account tokens are signed with. Upstream counterpart: pkg/serviceaccount/jwt.go and
//! openidmetadata.go.
//!
//! What stays true: a key's id is the unpadded base64url SHA-256 of its public key's DER form, so a verifier that
//! knows several keys finds the right one. Deliberately different: ES256 only.
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use rcgen::PublicKeyData;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use serde_json::{Value, json};

use crate::PkiError;
use crate::authority::load_or_create_key;

/// Longer tokens are not looked at.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// Signs and verifies tokens.
pub struct ServiceAccountKey {
    key: EcdsaKeyPair,
    id: String,
    random: SystemRandom,
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
    /// The key in that file, made when it is not there.
    pub fn load_or_create(path: &Path) -> Result<Self, PkiError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| crate::authority::io_error(folder, e))?;
        }
        let pair = load_or_create_key(path)?;
        let malformed = |reason: String| PkiError::Malformed { path: path.display().to_string(), reason };
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pair.serialized_der(), &random)
            .map_err(|e| malformed(e.to_string()))?;
        let digest = ring::digest::digest(&ring::digest::SHA256, &pair.subject_public_key_info());
        Ok(Self { key, id: BASE64URL.encode(digest), random })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The compact serialization of a token with those claims.
    pub fn sign(&self, claims: &Value) -> Result<String, PkiError> {
        let header = json!({"alg": "ES256", "kid": self.id});
        let signed =
            format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
        let signature = self.key.sign(&self.random, signed.as_bytes()).map_err(|_| PkiError::Sign)?;
        Ok(format!("{signed}.{}", BASE64URL.encode(signature)))
    }

    /// The claims of a token that this key signed. What they say (issuer, audience, times) is not looked at.
    pub fn verify(&self, token: &str) -> Result<Value, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let header = decode(header).ok_or(TokenError::Malformed)?;
        if token.len() > MAX_TOKEN_BYTES || header.get("crit").is_some() {
            return Err(TokenError::Malformed);
        }
        let text = |name: &str| header.get(name).and_then(Value::as_str);
        if text("kid").is_some_and(|kid| !kid.is_empty() && kid != self.id) {
            return Err(TokenError::UnknownKey);
        }
        if text("alg") != Some("ES256") {
            return Err(TokenError::Signature);
        }
        let signature = BASE64URL.decode(signature).map_err(|_| TokenError::Malformed)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| TokenError::Signature)?;
        decode(claims).ok_or(TokenError::Malformed)
    }

    /// The JSON Web Key Set that `/openid/v1/jwks` answers.
    pub fn jwks(&self) -> Value {
        let point = self.key.public_key().as_ref();
        let coordinate = |from: usize| BASE64URL.encode(point.get(from..from + 32).unwrap_or_default());
        json!({"keys": [{
            "use": "sig", "kty": "EC", "kid": self.id, "crv": "P-256", "alg": "ES256",
            "x": coordinate(1), "y": coordinate(33),
        }]})
    }
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
        assert_eq!((jwk["kid"].as_str(), jwk["x"].as_str().map(str::len)), (Some(key.id()), Some(43)));
        assert_eq!(key.id().len(), 43);
    }
}
