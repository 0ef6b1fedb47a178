//! The client of the registry behind a pull-through cache.
//!
//! Upstream counterparts: the OCI distribution spec; distribution's token specification. Why not the node's client: a
//! cache passes on what it doesn't understand (artifacts of any type), asks by HEAD, and lists. What stays true:
//! credentials go to the registry and the token server it names, never where a redirect leads.
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use base64::Engine;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use parking_lot::Mutex;

use super::method;
use crate::digest::Digest;
use crate::http::encode;
use crate::outbound::{self, HttpClient};
use crate::registry::Reference;

const STALL: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: usize = 5;
const TOKENS_MAX: usize = 64;
/// One registry with many names; the first is the one that images carry.
const DOCKER_HUB: [&str; 3] = ["docker.io", "registry-1.docker.io", "index.docker.io"];
const LIST_MAX_BYTES: usize = 8 << 20;
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

#[derive(Clone, Debug, Default)]
pub struct UpstreamOptions {
    /// `https://registry-1.docker.io`
    pub url: String,
    pub username: String,
    pub password: String,
    /// PEM certificates trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Names of the registry that clients may mean with `?ns=`; its host's when empty.
    pub namespaces: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Denied(String),
    #[error("{0}")]
    Away(String),
}

pub struct Upstream {
    base: String,
    namespaces: Vec<String>,
    username: String,
    password: String,
    client: HttpClient<Empty<Bytes>>,
    tokens: Mutex<HashMap<String, HeaderValue>>,
}

/// A blob as it comes in.
pub(super) struct BlobBody {
    body: Incoming,
    pub(super) size: Option<u64>,
    pub(super) offset: u64,
}

impl BlobBody {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        loop {
            match tokio::time::timeout(STALL, self.body.frame()).await {
                Err(_) => return Err(UpstreamError::Away("it stopped sending".into())),
                Ok(None) => return Ok(None),
                Ok(Some(Err(e))) => return Err(UpstreamError::Away(e.to_string())),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    pub(super) fn into_body(self) -> Body {
        Body::new(self.body)
    }
}

#[derive(serde::Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

#[derive(serde::Deserialize)]
struct Tags {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

#[derive(serde::Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Entry {
    digest: String,
}

impl Upstream {
    pub fn new(options: UpstreamOptions) -> Result<Upstream, UpstreamError> {
        let invalid = |why: String| UpstreamError::Away(format!("{}: {why}", options.url));
        let base = options.url.trim_end_matches('/').trim_end_matches("/v2").to_string();
        let uri: Uri = base.parse().map_err(|e| invalid(format!("{e}")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(invalid("expected http://HOST or https://HOST".into()));
        }
        let mut namespaces = options.namespaces;
        if namespaces.is_empty() {
            namespaces.extend(uri.authority().map(ToString::to_string));
            if namespaces.iter().any(|name| DOCKER_HUB.contains(&name.as_str())) {
                namespaces = DOCKER_HUB.map(String::from).to_vec();
            }
        }
        let client = outbound::client(options.ca_file.as_deref()).map_err(invalid)?;
        let (username, password) = (options.username, options.password);
        Ok(Upstream { base, namespaces, username, password, client, tokens: Mutex::default() })
    }

    pub(super) fn namespaces(&self) -> &[String] {
        &self.namespaces
    }

    pub(super) fn stands_for(&self, registry: &str) -> bool {
        self.namespaces.iter().any(|name| name.eq_ignore_ascii_case(registry))
    }

    pub(super) async fn head_manifest(
        &self,
        name: &str,
        reference: &Reference,
    ) -> Result<Option<Digest>, UpstreamError> {
        let response = self.ask(true, name, &format!("manifests/{reference}"), 0).await?;
        let digest = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        Ok(digest.and_then(|d| d.parse().ok()))
    }

    pub(super) async fn manifest(
        &self,
        name: &str,
        reference: &Reference,
        max_bytes: usize,
    ) -> Result<(String, Bytes), UpstreamError> {
        let response = self.ask(false, name, &format!("manifests/{reference}"), 0).await?;
        let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let media_type = media_type.unwrap_or("").split(';').next().unwrap_or("").trim().to_string();
        Ok((media_type, read(response, max_bytes).await?))
    }

    pub(super) async fn head_blob(&self, name: &str, digest: &Digest) -> Result<Option<u64>, UpstreamError> {
        let response = self.ask(true, name, &format!("blobs/{digest}"), 0).await?;
        Ok(length(response.headers()))
    }

    /// A blob from `offset` on, or from its begin where the registry can't do that.
    pub(super) async fn blob(
        &self,
        name: &str,
        digest: &Digest,
        offset: u64,
    ) -> Result<BlobBody, UpstreamError> {
        let response = self.ask(false, name, &format!("blobs/{digest}"), offset).await?;
        let offset = if response.status() == StatusCode::PARTIAL_CONTENT { offset } else { 0 };
        Ok(BlobBody { size: length(response.headers()), body: response.into_body(), offset })
    }

    pub(super) async fn tags(&self, name: &str, pages_max: usize) -> Result<Vec<String>, UpstreamError> {
        let mut tags = Vec::new();
        let mut path = "tags/list".to_string();
        for _ in 0..pages_max {
            let response = self.ask(false, name, &path, 0).await?;
            let next = next_query(response.headers());
            let page: Tags = parse(&read(response, LIST_MAX_BYTES).await?)?;
            tags.extend(page.tags.unwrap_or_default());
            match next {
                Some(query) => path = format!("tags/list?{query}"),
                None => break,
            }
        }
        tags.sort_unstable();
        tags.dedup();
        Ok(tags)
    }

    /// Digests of what refers to `subject`, by the API or else by the tag that older registries have for it.
    pub(super) async fn referrers(&self, name: &str, subject: &Digest) -> Result<Vec<Digest>, UpstreamError> {
        let response = match self.ask(false, name, &format!("referrers/{subject}"), 0).await {
            Err(UpstreamError::NotFound(_)) => {
                let tag = format!("{}-{:.64}", subject.algorithm().name(), subject.hex());
                self.ask(false, name, &format!("manifests/{tag}"), 0).await?
            }
            response => response?,
        };
        let index: Index = parse(&read(response, LIST_MAX_BYTES).await?)?;
        Ok(index.manifests.iter().filter_map(|m| m.digest.parse().ok()).collect())
    }

    async fn ask(
        &self,
        head: bool,
        name: &str,
        path: &str,
        offset: u64,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let url = format!("{}/v2/{name}/{path}", self.base);
        let mut authorization = self.tokens.lock().get(name).cloned();
        for round in 0..2 {
            let response = self.follow(head, &url, offset, authorization.as_ref()).await?;
            if response.status() == StatusCode::UNAUTHORIZED && round == 0 {
                let answer = self.answer(name, response.headers()).await?;
                let mut tokens = self.tokens.lock();
                if tokens.len() >= TOKENS_MAX {
                    tokens.clear();
                }
                tokens.insert(name.to_string(), answer.clone());
                authorization = Some(answer);
                continue;
            }
            let what = format!("{url}: {}", response.status());
            return match response.status().as_u16() {
                200 | 206 => Ok(response),
                404 => Err(UpstreamError::NotFound(what)),
                401 | 403 => Err(UpstreamError::Denied(what)),
                _ => Err(UpstreamError::Away(what)),
            };
        }
        Err(UpstreamError::Denied(url))
    }

    async fn follow(
        &self,
        head: bool,
        url: &str,
        offset: u64,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let away = |why: String| UpstreamError::Away(format!("{url}: {why}"));
        let mut uri: Uri = url.parse().map_err(|e| away(format!("{e}")))?;
        let first = uri.clone();
        for _ in 0..REDIRECTS_MAX {
            let mut request =
                Request::builder().method(method(head)).uri(uri.clone()).header(header::ACCEPT, ACCEPTED);
            if offset > 0 {
                request = request.header(header::RANGE, format!("bytes={offset}-"));
            }
            if let Some(value) = authorization
                && (uri.scheme(), uri.authority()) == (first.scheme(), first.authority())
            {
                request = request.header(header::AUTHORIZATION, value);
            }
            let response = self.send(request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
            uri = location
                .and_then(|l| relative(&uri, l))
                .ok_or_else(|| away(format!("redirect to {location:?}")))?;
        }
        Err(away("too many redirects".into()))
    }

    async fn send(&self, request: http::request::Builder) -> Result<Response<Incoming>, UpstreamError> {
        let request = request
            .header(header::USER_AGENT, concat!("sampan/", env!("CARGO_PKG_VERSION")))
            .body(Empty::new())
            .map_err(|e| UpstreamError::Away(e.to_string()))?;
        let host = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        match tokio::time::timeout(STALL, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => {
                let cause = std::error::Error::source(&e).map(|c| format!(": {c}")).unwrap_or_default();
                Err(UpstreamError::Away(format!("{host}: {e}{cause}")))
            }
            Err(_) => Err(UpstreamError::Away(format!("{host}: no answer within {} s", STALL.as_secs()))),
        }
    }

    /// The Authorization that the registry's challenge asks for.
    async fn answer(&self, name: &str, headers: &HeaderMap) -> Result<HeaderValue, UpstreamError> {
        let denied = |why: &str| UpstreamError::Denied(format!("{}/{name}: {why}", self.base));
        let challenges = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok());
        let challenges: Vec<(String, Vec<(String, String)>)> = challenges.map(challenge).collect();
        let basic = (!self.username.is_empty()).then(|| {
            let pair = format!("{}:{}", self.username, self.password);
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        });
        let value = match challenges.iter().find(|(scheme, _)| scheme == "bearer") {
            Some((_, parameters)) => {
                let get = |n: &str| parameters.iter().find(|(p, _)| p == n).map_or("", |(_, v)| v);
                let realm = get("realm");
                let scope = format!("repository:{name}:pull");
                let separator = if realm.contains('?') { '&' } else { '?' };
                let url =
                    format!("{realm}{separator}service={}&scope={}", encode(get("service")), encode(&scope));
                let mut request = Request::builder().uri(url);
                if let Some(basic) = &basic {
                    request = request.header(header::AUTHORIZATION, sensitive(basic)?);
                }
                let response = self.send(request).await?;
                if !response.status().is_success() {
                    return Err(denied(&format!("the token server answered {}", response.status())));
                }
                let answer: TokenAnswer = parse(&read(response, LIST_MAX_BYTES).await?)?;
                let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
                format!("Bearer {token}")
            }
            None => basic.ok_or_else(|| denied("it asks for a user and a password"))?,
        };
        sensitive(&value)
    }
}

fn sensitive(value: &str) -> Result<HeaderValue, UpstreamError> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| UpstreamError::Denied("credentials with control characters".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, UpstreamError> {
    serde_json::from_slice(bytes).map_err(|e| UpstreamError::Away(format!("it sent no valid answer: {e}")))
}

async fn read(response: Response<Incoming>, max_bytes: usize) -> Result<Bytes, UpstreamError> {
    let body = Limited::new(response.into_body(), max_bytes).collect();
    match tokio::time::timeout(STALL, body).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) => Err(UpstreamError::Away(e.to_string())),
        Err(_) => Err(UpstreamError::Away("it stopped sending".into())),
    }
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The query of `<…?query>; rel="next"`.
fn next_query(headers: &HeaderMap) -> Option<String> {
    let link = headers.get(header::LINK)?.to_str().ok()?;
    let (target, relation) = link.trim().strip_prefix('<')?.split_once('>')?;
    relation.contains("next").then(|| target.split_once('?').map(|(_, q)| q.to_string()))?
}

fn relative(base: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.parse().ok();
    }
    let path = location.starts_with('/').then_some(location)?;
    format!("{}://{}{path}", base.scheme_str()?, base.authority()?).parse().ok()
}

/// A `WWW-Authenticate` value: the scheme, and its parameters.
fn challenge(text: &str) -> (String, Vec<(String, String)>) {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    let mut parameters = Vec::new();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        parameters.push((name.trim_matches([' ', ',']).to_ascii_lowercase(), value.trim().to_string()));
        rest = after;
    }
    (scheme.to_ascii_lowercase(), parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let (scheme, parameters) =
            challenge(r#"Bearer realm="https://a/t",service="r",scope="repository:a:pull,push""#);
        assert_eq!(scheme, "bearer");
        assert_eq!(parameters[2].1, "repository:a:pull,push");
        let mut headers = HeaderMap::new();
        headers.insert(header::LINK, r#"</v2/a/tags/list?last=x&n=5>; rel="next""#.parse().unwrap());
        assert_eq!(next_query(&headers).unwrap(), "last=x&n=5");
        for bad in ["ftp://x", "registry.example", ""] {
            assert!(
                Upstream::new(UpstreamOptions { url: bad.into(), ..Default::default() }).is_err(),
                "{bad}"
            );
        }
    }
    #[test]
    fn a_cache_stands_for_its_registry() {
        for (url, namespaces, asked, wanted) in [
            ("https://registry-1.docker.io", &[][..], "docker.io", true),
            ("https://registry-1.docker.io", &[], "ghcr.io", false),
            ("https://ghcr.io/", &[], "ghcr.io", true),
            ("https://r.example:5000/v2", &[], "r.example:5000", true),
            ("https://r.example:5000", &[], "r.example", false),
            ("https://mirror.example", &["docker.io"], "docker.io", true),
            ("https://mirror.example", &["docker.io"], "mirror.example", false),
        ] {
            let namespaces = namespaces.iter().map(ToString::to_string).collect();
            let upstream =
                Upstream::new(UpstreamOptions { url: url.into(), namespaces, ..Default::default() }).unwrap();
            assert_eq!(upstream.stands_for(asked), wanted, "{url} {asked}");
        }
    }
}
