//! Answers to `WWW-Authenticate`: Basic, and bearer tokens from the realm it names.
//!
//! Upstream counterpart: the distribution project's token specification.
use base64::Engine;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request};
use sampan_drivers::runtime::{Auth, ImageError};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Client, Scope, judge, read_document};
use crate::manifest::hex_digest;
use crate::registries::Endpoint;

/// Tokens are kept by registry, repository, what they allow and whose they are.
pub(super) fn key(endpoint: &Endpoint, credential: Option<&Auth>, scope: &Scope) -> String {
    let mut hash = Sha256::new();
    if let Some(a) = credential {
        for part in [&a.username, &a.password, &a.identity_token, &a.registry_token] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
    }
    let from = scope.from.as_deref().unwrap_or("");
    let hash = hex_digest(&hash.finalize());
    format!("{} {} {} {from} {hash}", endpoint.url, endpoint.repository, scope.push)
}

/// The Authorization header that satisfies one of `challenges`.
pub(super) async fn answer(
    client: &Client,
    endpoint: &Endpoint,
    challenges: &[String],
    credential: Option<&Auth>,
    scope: &Scope,
) -> Result<HeaderValue, ImageError> {
    let denied = |why: &str| ImageError::Denied(format!("{}/{}: {why}", endpoint.host, endpoint.repository));
    if let Some(a) = credential.filter(|a| !a.registry_token.is_empty()) {
        return header(&format!("Bearer {}", a.registry_token));
    }
    let parsed: Vec<Challenge> = challenges.iter().filter_map(|c| Challenge::parse(c)).collect();
    if let Some(bearer) = parsed.iter().find(|c| c.scheme == "bearer") {
        return header(&format!("Bearer {}", token(client, endpoint, bearer, credential, scope).await?));
    }
    if parsed.iter().any(|c| c.scheme == "basic") {
        return match credential.and_then(basic) {
            Some(value) => header(&value),
            None => Err(denied("authorization required")),
        };
    }
    Err(denied("authorization required, in no way known here"))
}

fn header(value: &str) -> Result<HeaderValue, ImageError> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| ImageError::Denied("credentials with control characters".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn basic(auth: &Auth) -> Option<String> {
    if auth.username.is_empty() {
        return None;
    }
    let pair = format!("{}:{}", auth.username, auth.password);
    Some(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

async fn token(
    client: &Client,
    endpoint: &Endpoint,
    challenge: &Challenge,
    credential: Option<&Auth>,
    scope: &Scope,
) -> Result<String, ImageError> {
    let realm = challenge.get("realm").unwrap_or("");
    let service = challenge.get("service").unwrap_or("");
    let scopes = match challenge.get("scope") {
        _ if scope.push => {
            let from = scope.from.iter().map(|from| format!("repository:{from}:pull"));
            std::iter::once(format!("repository:{}:pull,push", endpoint.repository)).chain(from).collect()
        }
        Some(asked) if !asked.is_empty() => vec![asked.to_string()],
        _ => vec![format!("repository:{}:pull", endpoint.repository)],
    };
    let service = format!("service={}", escape(service));
    let refresh = credential.filter(|a| !a.identity_token.is_empty());
    let (request, body) = match refresh {
        Some(a) => {
            let form = format!(
                "grant_type=refresh_token&client_id=sampan&refresh_token={}&{service}&scope={}",
                escape(&a.identity_token),
                escape(&scopes.join(" "))
            );
            let request = Request::builder()
                .method(Method::POST)
                .uri(realm)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
            (request, Bytes::from(form))
        }
        None => {
            let separator = if realm.contains('?') { '&' } else { '?' };
            let query = scopes.iter().fold(service, |query, s| format!("{query}&scope={}", escape(s)));
            let mut request =
                Request::builder().method(Method::GET).uri(format!("{realm}{separator}{query}"));
            if let Some(value) = credential.and_then(basic) {
                request = request.header(AUTHORIZATION, header(&value)?);
            }
            (request, Bytes::new())
        }
    };
    let response = client.send(request, body, endpoint).await?;
    let response = judge(response, endpoint, "token").await?;
    let bytes = read_document(response).await?;
    let answer: TokenAnswer = serde_json::from_slice(&bytes)
        .map_err(|e| ImageError::Invalid(format!("token from {realm}: {e}")))?;
    let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
    if token.is_empty() {
        return Err(ImageError::Denied(format!("{realm} gave no token")));
    }
    Ok(token)
}

pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// One `WWW-Authenticate` value.
struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn parse(text: &str) -> Option<Challenge> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut parameters = Vec::new();
        while let Some((name, after)) = rest.split_once('=') {
            let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            parameters.push((name, value.trim().to_string()));
            rest = after;
        }
        (!scheme.is_empty()).then(|| Challenge { scheme: scheme.to_ascii_lowercase(), parameters })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let c = Challenge::parse(
            r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull,push""#,
        )
        .unwrap();
        assert_eq!(c.scheme, "bearer");
        assert_eq!(c.get("realm"), Some("https://auth.example/token"));
        assert_eq!(c.get("scope"), Some("repository:a/b:pull,push"));
        assert_eq!(Challenge::parse("Basic realm=x").unwrap().get("realm"), Some("x"));
        assert!(Challenge::parse(r#"Bearer realm="open"#).is_none());
        assert_eq!(escape("repository:a/b:pull"), "repository%3Aa%2Fb%3Apull");
    }
}
