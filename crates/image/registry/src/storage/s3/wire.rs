//! Signed requests to S3, and the little of XML that its answers need.
//!
//! Upstream counterpart: AWS Signature Version 4. Buckets are addressed by path. Requests are tried again a few times
//! when the store is busy or the connection breaks; all of them may be repeated.
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use ring::hmac;

use super::super::{Result, StorageError};
use crate::digest::{Algorithm, Digest};
use crate::outbound::{self, HttpClient};

const BASE: &str = "docker/registry/v2";
const ANSWER_MAX_BYTES: usize = 16 << 20;
const ANSWER: Duration = Duration::from_secs(60);
const ATTEMPTS: u32 = 4;
const FIRST_DELAY: Duration = Duration::from_millis(200);

/// docker-registry's `storage.s3`.
#[derive(Clone, Default)]
pub struct S3Options {
    pub bucket: String,
    pub region: String,
    /// `https://minio.example:9000`; empty for AWS.
    pub region_endpoint: String,
    /// Prefix of all keys; empty for none.
    pub root_directory: String,
    pub access_key: String,
    pub secret_key: String,
    pub session_token: String,
    pub ca_file: Option<PathBuf>,
}

pub(super) struct Wire {
    options: S3Options,
    scheme: String,
    host: String,
    prefix: String,
    client: HttpClient<Full<Bytes>>,
}

pub(super) struct Request {
    method: Method,
    key: String,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Request {
    /// A request about an object, or with an empty key about the bucket.
    pub(super) fn new(method: Method, key: &str) -> Request {
        Request { method, key: key.to_string(), query: Vec::new(), headers: Vec::new(), body: Bytes::new() }
    }

    pub(super) fn query(mut self, name: &str, value: &str) -> Request {
        self.query.push((name.to_string(), value.to_string()));
        self
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Request {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }

    pub(super) fn body(mut self, body: Bytes) -> Request {
        self.body = body;
        self
    }
}

pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) length: Option<u64>,
    pub(super) modified: i64,
    pub(super) etag: String,
    pub(super) body: Bytes,
}

impl Answer {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The answer, unless it tells of an error.
    pub(super) fn ok(self, key: &str) -> Result<Answer> {
        if self.status.is_success() {
            return Ok(self);
        }
        let text = self.text();
        let code = text_of(&text, "Code").unwrap_or_default();
        let message = format!("{} {code} {}", self.status, text_of(&text, "Message").unwrap_or_default());
        Err(StorageError::Backend { key: key.to_string(), message })
    }
}

impl Wire {
    pub(super) fn new(mut options: S3Options) -> Result<Wire> {
        let failed = |message: String| StorageError::Backend { key: options.bucket.clone(), message };
        if options.region.is_empty() {
            options.region = "us-east-1".into();
        }
        let endpoint = match options.region_endpoint.as_str() {
            "" => format!("https://s3.{}.amazonaws.com", options.region),
            own if own.contains("://") => own.to_string(),
            own => format!("https://{own}"),
        };
        let uri: Uri = endpoint.parse().map_err(|e| failed(format!("{endpoint}: {e}")))?;
        let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.authority()) else {
            return Err(failed(format!("{endpoint} is no URL")));
        };
        let (scheme, host) = (scheme.to_string(), host.to_string());
        let client = outbound::client(options.ca_file.as_deref()).map_err(failed)?;
        let root = options.root_directory.trim_matches('/');
        let prefix = if root.is_empty() { format!("{BASE}/") } else { format!("{root}/{BASE}/") };
        Ok(Wire { options, scheme, host, prefix, client })
    }

    pub(super) fn bucket(&self) -> &str {
        &self.options.bucket
    }

    pub(super) fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn short_key(&self, full: &str) -> Option<String> {
        full.strip_prefix(&self.prefix).map(str::to_string)
    }

    /// Sends a request and reads the answer to its end.
    pub(super) async fn send(&self, request: Request) -> Result<Answer> {
        let mut attempt = 1;
        loop {
            let sent = tokio::time::timeout(ANSWER, self.once(&request)).await;
            let sent = sent.unwrap_or_else(|_| Err(self.failed(&request, "no answer")));
            match sent {
                Ok(answer) if !answer.status.is_server_error() || attempt >= ATTEMPTS => return Ok(answer),
                Err(e) if attempt >= ATTEMPTS => return Err(e),
                _ => {}
            }
            tokio::time::sleep(FIRST_DELAY * 2_u32.pow(attempt)).await;
            attempt += 1;
        }
    }

    async fn once(&self, request: &Request) -> Result<Answer> {
        let response = self.client.request(self.signed(request)?).await;
        let (parts, body) = response.map_err(|e| self.failed(request, &e.to_string()))?.into_parts();
        let body = Limited::new(body, ANSWER_MAX_BYTES).collect().await;
        let body = body.map_err(|e| self.failed(request, &e.to_string()))?.to_bytes();
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok());
        let modified = header("last-modified").and_then(|date| {
            jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok().map(|t| t.as_second())
        });
        Ok(Answer {
            status: parts.status,
            length: header("content-length").and_then(|l| l.parse().ok()),
            modified: modified.unwrap_or_default(),
            etag: header("etag").unwrap_or_default().to_string(),
            body,
        })
    }

    /// Sends a request whose answer is read piece by piece.
    pub(super) async fn stream(&self, request: Request) -> Result<Incoming> {
        let response = self.client.request(self.signed(&request)?);
        let response = tokio::time::timeout(ANSWER, response).await;
        let response = response.map_err(|_| self.failed(&request, "no answer"))?;
        let response = response.map_err(|e| self.failed(&request, &e.to_string()))?;
        match response.status() {
            status if status.is_success() => Ok(response.into_body()),
            StatusCode::NOT_FOUND => {
                Err(StorageError::Io { key: request.key, source: std::io::ErrorKind::NotFound.into() })
            }
            status => Err(self.failed(&request, &status.to_string())),
        }
    }

    fn failed(&self, request: &Request, message: &str) -> StorageError {
        StorageError::Backend { key: request.key.clone(), message: format!("{}: {message}", self.host) }
    }

    fn signed(&self, request: &Request) -> Result<http::Request<Full<Bytes>>> {
        let now = sampan_world::clock::now();
        let date = now.strftime("%Y%m%dT%H%M%SZ").to_string();
        let key = if request.key.is_empty() { String::new() } else { self.full_key(&request.key) };
        let path = format!("/{}/{}", self.options.bucket, encode_key(&key));
        let mut query: Vec<String> =
            request.query.iter().map(|(n, v)| format!("{}={}", encode(n), encode(v))).collect();
        query.sort_unstable();
        let query = query.join("&");
        let content = Digest::of(Algorithm::Sha256, &request.body);
        let mut headers = request.headers.clone();
        headers.push(("host".into(), self.host.clone()));
        headers.push(("x-amz-content-sha256".into(), content.hex().to_string()));
        headers.push(("x-amz-date".into(), date.clone()));
        if !self.options.session_token.is_empty() {
            headers.push(("x-amz-security-token".into(), self.options.session_token.clone()));
        }
        headers.sort_unstable();
        let authorization =
            self.authorization(&request.method, &path, &query, &headers, content.hex(), &date);
        let uri = format!("{}://{}{path}?{query}", self.scheme, self.host);
        let mut signed =
            http::Request::builder().method(request.method.clone()).uri(uri.trim_end_matches('?'));
        for (name, value) in headers.iter().filter(|(name, _)| name != "host") {
            signed = signed.header(name, value);
        }
        signed
            .header("authorization", authorization)
            .body(Full::new(request.body.clone()))
            .map_err(|e| self.failed(request, &e.to_string()))
    }

    fn authorization(
        &self,
        method: &Method,
        path: &str,
        query: &str,
        headers: &[(String, String)],
        content: &str,
        date: &str,
    ) -> String {
        let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(";");
        let mut canonical = format!("{method}\n{path}\n{query}\n");
        for (name, value) in headers {
            let _ = writeln!(canonical, "{name}:{}", value.trim());
        }
        let _ = write!(canonical, "\n{names}\n{content}");
        let day = &date[..8];
        let scope = format!("{day}/{}/s3/aws4_request", self.options.region);
        let canonical = Digest::of(Algorithm::Sha256, canonical.as_bytes());
        let to_sign = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", canonical.hex());
        let mut key = format!("AWS4{}", self.options.secret_key).into_bytes();
        for part in [day, &self.options.region, "s3", "aws4_request"] {
            key = hmac_sha256(&key, part.as_bytes());
        }
        let mut signature = String::with_capacity(64);
        for byte in hmac_sha256(&key, to_sign.as_bytes()) {
            let _ = write!(signature, "{byte:02x}");
        }
        let access = &self.options.access_key;
        format!("AWS4-HMAC-SHA256 Credential={access}/{scope},SignedHeaders={names},Signature={signature}")
    }
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

fn encode(text: &str) -> String {
    crate::http::encode(text)
}

pub(super) fn encode_key(key: &str) -> String {
    key.split('/').map(encode).collect::<Vec<_>>().join("/")
}

/// What lies between `<tag>` and `</tag>`, each time.
pub(super) fn texts_of(xml: &str, tag: &str) -> Vec<String> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let mut found = Vec::new();
    let mut rest = xml;
    while let Some((_, after)) = rest.split_once(&open) {
        let Some((inner, after)) = after.split_once(&close) else { break };
        found.push(inner.to_string());
        rest = after;
    }
    found
}

/// The first text of an element, unescaped.
pub(super) fn text_of(xml: &str, tag: &str) -> Option<String> {
    let text = texts_of(xml, tag).into_iter().next()?;
    let mut text = text;
    for (escaped, plain) in [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&apos;", "'")]
    {
        text = text.replace(escaped, plain);
    }
    Some(text.replace("&amp;", "&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_is_read_as_far_as_needed() {
        let xml = "<L><Prefix>p/</Prefix><Contents><Key>p/a&amp;b</Key></Contents>\
            <CommonPrefixes><Prefix>p/x/</Prefix></CommonPrefixes></L>";
        assert_eq!(texts_of(xml, "Contents").len(), 1);
        assert_eq!(text_of(&texts_of(xml, "CommonPrefixes")[0], "Prefix").unwrap(), "p/x/");
        assert_eq!(text_of(xml, "Key").unwrap(), "p/a&b");
        assert_eq!(text_of(xml, "NextContinuationToken"), None);
    }

    /// The example of AWS' own documentation, "GET Bucket Lifecycle".
    #[test]
    fn signatures_are_awss() {
        let wire = Wire::new(S3Options {
            bucket: "b".into(),
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            ..S3Options::default()
        })
        .unwrap();
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let headers = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("x-amz-content-sha256", empty),
            ("x-amz-date", "20130524T000000Z"),
        ];
        let headers = headers.map(|(n, v)| (n.to_string(), v.to_string()));
        let signed = wire.authorization(&Method::GET, "/", "lifecycle=", &headers, empty, "20130524T000000Z");
        let wanted = "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543";
        assert!(signed.ends_with(wanted), "{signed}");
    }
}
