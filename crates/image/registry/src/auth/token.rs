//! Bearer tokens of an authorization server: JSON Web Tokens that list what their bearer may do.
//!
//! Upstream counterparts: distribution's `registry/auth/token` and its token specification. What stays true: a token
//! counts only with a trusted signature, from the configured issuer, for this service, while it is valid.
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::HeaderMap;
use serde::Deserialize;

use super::keys::{self, Key};
use super::{Access, AuthError, credentials, quoted};
use crate::error::RegistryError;

/// How far clocks may be apart.
const LEEWAY_S: i64 = 60;
const TOKEN_MAX_LENGTH: usize = 64 << 10;

/// docker-registry's `auth.token`.
#[derive(Clone, Debug, Default)]
pub struct TokenOptions {
    pub realm: String,
    pub service: String,
    pub issuer: String,
    /// PEM: certificates and public keys.
    pub root_cert_bundle: Option<Vec<u8>>,
    pub jwks: Option<String>,
    /// `RS256` and the like; empty for all that are known.
    pub signing_algorithms: Vec<String>,
}

pub struct TokenAuth {
    realm: String,
    service: String,
    issuer: String,
    algorithms: Vec<String>,
    keys: Vec<Key>,
    roots: Vec<Vec<u8>>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    iss: String,
    aud: Option<Audience>,
    exp: Option<f64>,
    nbf: Option<f64>,
    #[serde(default)]
    access: Vec<Granted>,
}

#[derive(Deserialize)]
struct Granted {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    #[serde(default)]
    actions: Vec<String>,
}

impl TokenAuth {
    pub fn new(options: TokenOptions) -> Result<TokenAuth, AuthError> {
        for (value, name) in
            [(&options.realm, "a realm"), (&options.service, "a service"), (&options.issuer, "an issuer")]
        {
            if value.is_empty() {
                return Err(AuthError::Missing(name));
            }
        }
        let (mut keys, mut roots) = (Vec::new(), Vec::new());
        if let Some(pem) = &options.root_cert_bundle {
            let failed = |message| AuthError::File { file: "the root certificate bundle".into(), message };
            (keys, roots) = keys::of_pem(pem).map_err(failed)?;
        }
        if let Some(text) = &options.jwks {
            let failed = |message| AuthError::File { file: "the JWKS".into(), message };
            keys.extend(keys::of_jwks(text).map_err(failed)?);
        }
        if keys.is_empty() {
            return Err(AuthError::NoKeys);
        }
        Ok(TokenAuth {
            realm: quoted(&options.realm),
            service: options.service,
            issuer: options.issuer,
            algorithms: options.signing_algorithms,
            keys,
            roots,
        })
    }

    pub(super) fn authorize(&self, headers: &HeaderMap, accesses: &[Access]) -> Result<(), RegistryError> {
        let Some(token) = credentials(headers, "bearer") else { return Err(self.challenge(accesses, None)) };
        let granted = match self.check(token) {
            Ok(claims) => claims.access,
            Err(why) => {
                tracing::warn!(why, "a token was refused");
                return Err(self.challenge(accesses, Some("invalid_token")));
            }
        };
        let allowed = |access: &Access| {
            access.actions.iter().all(|action| {
                granted.iter().any(|g| {
                    g.kind == access.kind
                        && g.name == access.name
                        && g.actions.iter().any(|a| a == action || a == "*")
                })
            })
        };
        if accesses.iter().all(allowed) {
            return Ok(());
        }
        Err(self.challenge(accesses, Some("insufficient_scope")))
    }

    fn challenge(&self, accesses: &[Access], error: Option<&str>) -> RegistryError {
        let mut challenge = format!("Bearer realm=\"{}\",service=\"{}\"", self.realm, quoted(&self.service));
        if !accesses.is_empty() {
            let scope = |a: &Access| format!("{}:{}:{}", a.kind, a.name, a.actions.join(","));
            let scopes: Vec<String> = accesses.iter().map(scope).collect();
            challenge.push_str(&format!(",scope=\"{}\"", quoted(&scopes.join(" "))));
        }
        if let Some(error) = error {
            challenge.push_str(&format!(",error=\"{error}\""));
        }
        RegistryError::Unauthorized { challenge }
    }

    fn check(&self, token: &str) -> Result<Claims, &'static str> {
        if token.len() > TOKEN_MAX_LENGTH {
            return Err("it is too long");
        }
        let (signed, signature) = token.rsplit_once('.').ok_or("it is no JSON Web Token")?;
        let (header, claims) = signed.split_once('.').ok_or("it is no JSON Web Token")?;
        let decode = |t: &str| URL_SAFE_NO_PAD.decode(t.trim_end_matches('=')).map_err(|_| "it is no base64");
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| "its header is malformed")?;
        if !self.algorithms.is_empty() && !self.algorithms.contains(&header.alg) {
            return Err("its signing algorithm is not allowed");
        }
        let signature = decode(signature)?;
        if !self.candidates(&header)?.iter().any(|k| k.verifies(&header.alg, signed.as_bytes(), &signature)) {
            return Err("its signature is not of a trusted key");
        }
        let claims: Claims =
            serde_json::from_slice(&decode(claims)?).map_err(|_| "its claims are malformed")?;
        let now = sampan_world::clock::now().as_second();
        let for_us = match &claims.aud {
            Some(Audience::One(one)) => *one == self.service,
            Some(Audience::Many(many)) => many.contains(&self.service),
            None => false,
        };
        match () {
            () if claims.iss != self.issuer => Err("it is of another issuer"),
            () if !for_us => Err("it is for another service"),
            () if claims.exp.is_none_or(|exp| (exp as i64).saturating_add(LEEWAY_S) <= now) => {
                Err("it has expired")
            }
            () if claims.nbf.is_some_and(|nbf| nbf as i64 > now.saturating_add(LEEWAY_S)) => {
                Err("it is not valid yet")
            }
            () => Ok(claims),
        }
    }

    /// The keys that may have signed: of the chain it brings, the one it names, or any.
    fn candidates(&self, header: &Header) -> Result<Vec<Key>, &'static str> {
        if !header.x5c.is_empty() {
            let chain: Result<Vec<Vec<u8>>, _> =
                header.x5c.iter().take(8).map(|c| STANDARD.decode(c)).collect();
            let chain = chain.map_err(|_| "its certificates are malformed")?;
            let key = keys::of_chain(&chain, &self.roots);
            return key.map(|k| vec![k]).ok_or("its certificates lead to no trusted root");
        }
        let named: Vec<Key> = match &header.kid {
            Some(id) => self.keys.iter().filter(|k| k.is(id)).cloned().collect(),
            None => Vec::new(),
        };
        Ok(if named.is_empty() { self.keys.clone() } else { named })
    }
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::{Value, json};

    use super::*;

    struct Issuer {
        pair: EcdsaKeyPair,
    }

    impl Issuer {
        fn new(pkcs8: &[u8]) -> Issuer {
            let random = SystemRandom::new();
            Issuer {
                pair: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random).unwrap(),
            }
        }

        fn jwks(&self) -> String {
            let point = self.pair.public_key().as_ref();
            let encode = |b: &[u8]| URL_SAFE_NO_PAD.encode(b);
            json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k1", "x": encode(&point[1..33]), "y": encode(&point[33..])}]})
                .to_string()
        }

        fn token(&self, header: Value, claims: Value) -> String {
            let encode = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
            let signed = format!("{}.{}", encode(&header), encode(&claims));
            let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
        }
    }

    fn options() -> TokenOptions {
        TokenOptions {
            realm: "https://auth/token".into(),
            service: "reg".into(),
            issuer: "me".into(),
            ..TokenOptions::default()
        }
    }

    fn bearer(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(http::header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        headers
    }

    fn claims() -> Value {
        let now = sampan_world::clock::now().as_second();
        json!({"iss": "me", "aud": "reg", "exp": now + 300, "nbf": now - 5,
            "access": [{"type": "repository", "name": "a/b", "actions": ["pull", "push"]}]})
    }

    #[test]
    fn only_good_tokens_open() {
        let key = rcgen::KeyPair::generate().unwrap();
        let issuer = Issuer::new(&key.serialize_der());
        let auth = TokenAuth::new(TokenOptions { jwks: Some(issuer.jwks()), ..options() }).unwrap();
        let want = [Access::new("repository", "a/b", &["pull", "push"])];
        let header = json!({"alg": "ES256", "kid": "k1", "typ": "JWT"});
        let good = issuer.token(header.clone(), claims());
        auth.authorize(&bearer(&good), &want).unwrap();
        auth.authorize(&bearer(&good), &[]).unwrap();
        let refused = |headers: &HeaderMap, want: &[Access]| match auth.authorize(headers, want) {
            Err(RegistryError::Unauthorized { challenge }) => challenge,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            refused(&HeaderMap::new(), &want),
            r#"Bearer realm="https://auth/token",service="reg",scope="repository:a/b:pull,push""#
        );
        let other = [Access::new("repository", "a/b", &["delete"])];
        assert!(refused(&bearer(&good), &other).ends_with(r#"error="insufficient_scope""#));
        for (name, value) in [
            ("iss", json!("you")),
            ("aud", json!(["other"])),
            ("exp", json!(1_000_000)),
            ("exp", Value::Null),
            ("nbf", json!(99_999_999_999_u64)),
        ] {
            let mut claims = claims();
            claims[name] = value;
            let token = issuer.token(header.clone(), claims);
            assert!(refused(&bearer(&token), &want).contains("invalid_token"), "{name}");
        }
        let stranger = Issuer::new(&rcgen::KeyPair::generate().unwrap().serialize_der());
        let mut forged = vec![stranger.token(header, claims()), "x".into(), "a.b.c".into()];
        forged.push(issuer.token(json!({"alg": "none"}), claims()));
        forged.push(issuer.token(json!({"alg": "HS256"}), claims()));
        forged.push(format!("{}x", good));
        for token in forged {
            assert!(refused(&bearer(&token), &want).contains("invalid_token"), "{token}");
        }
    }

    #[test]
    fn chains_must_lead_to_a_root() {
        let root_key = rcgen::KeyPair::generate().unwrap();
        let mut root = rcgen::CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        root.distinguished_name.push(rcgen::DnType::CommonName, "root");
        let root_certificate = root.self_signed(&root_key).unwrap();
        let leaf_key = rcgen::KeyPair::generate().unwrap();
        let issuer_of_leaf = rcgen::Issuer::new(root, root_key);
        let leaf = rcgen::CertificateParams::new(vec!["leaf".into()]).unwrap();
        let leaf = leaf.signed_by(&leaf_key, &issuer_of_leaf).unwrap();
        let pem = root_certificate.pem().into_bytes();
        let auth = TokenAuth::new(TokenOptions { root_cert_bundle: Some(pem), ..options() }).unwrap();
        let issuer = Issuer::new(&leaf_key.serialize_der());
        let header = json!({"alg": "ES256", "x5c": [STANDARD.encode(leaf.der())]});
        auth.authorize(&bearer(&issuer.token(header, claims())), &[]).unwrap();
        let stranger_key = rcgen::KeyPair::generate().unwrap();
        let own =
            rcgen::CertificateParams::new(vec!["leaf".into()]).unwrap().self_signed(&stranger_key).unwrap();
        let stranger = Issuer::new(&stranger_key.serialize_der());
        let header = json!({"alg": "ES256", "x5c": [STANDARD.encode(own.der())]});
        assert!(auth.authorize(&bearer(&stranger.token(header, claims())), &[]).is_err());
        assert!(matches!(TokenAuth::new(options()), Err(AuthError::NoKeys)));
    }
}
