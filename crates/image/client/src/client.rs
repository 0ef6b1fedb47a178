//! The registry client: resolves names, fetches manifests and blobs, over mirrors, with tokens, retries and resume.
//!
//! Upstream counterparts: the OCI distribution spec; containerd's `remotes/docker`. What stays true: every document
//! fetched by digest has that digest; credentials of the pod go to the image's own registry only, never to a mirror
//! or to where a redirect leads; every retry is bounded. HTTP proxies are not read from the environment.
use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use parking_lot::Mutex;
use sampan_drivers::runtime::{Auth, ImageError, Platform};

use crate::manifest::{self, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageConfig};
use crate::reference::Reference;
use crate::registries::{Endpoint, Registries};
use crate::transport::Transport;

mod token;

/// Until a response begins, and between two pieces of its body.
const STALL: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 4;
const FIRST_DELAY: Duration = Duration::from_millis(250);
const REDIRECTS_MAX: u32 = 5;
const TOKENS_MAX: usize = 64;

const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Takes a blob's bytes; the caller checks the digest of what it got.
pub trait Sink: Send {
    /// How many bytes it has: where to go on.
    fn offset(&self) -> u64;
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Forget everything: the registry can't resume.
    fn restart(&mut self) -> io::Result<()>;
}

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("writing the blob: {0}")]
    Sink(#[from] io::Error),
}

/// What a name leads to.
pub struct Resolved {
    pub digest: String,
    pub media_type: String,
    pub bytes: Bytes,
    pub document: Document,
}

pub struct Client {
    registries: Registries,
    transport: Transport,
    tokens: Mutex<HashMap<String, HeaderValue>>,
}

impl Client {
    pub fn new(registries: Registries) -> Client {
        Client { registries, transport: Transport::default(), tokens: Mutex::default() }
    }

    /// The index or manifest behind a name.
    pub async fn resolve(&self, reference: &Reference, auth: &[Auth]) -> Result<Resolved, ImageError> {
        self.document(reference, reference.target(), reference.digest.as_deref(), auth).await
    }

    /// A manifest of an index.
    pub async fn manifest(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        auth: &[Auth],
    ) -> Result<Resolved, ImageError> {
        self.document(reference, &descriptor.digest, Some(&descriptor.digest), auth).await
    }

    /// A small blob, verified, in memory: image configurations.
    pub async fn small_blob(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        auth: &[Auth],
    ) -> Result<Bytes, ImageError> {
        let path = format!("blobs/{}", descriptor.digest);
        Ok(self.everywhere(reference, auth, &path, None, Some(&descriptor.digest)).await?.1)
    }

    /// Streams a blob into `sink`, resuming where a connection broke.
    pub async fn blob(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        auth: &[Auth],
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        let path = format!("blobs/{}", descriptor.digest);
        let mut last = ImageError::Unavailable("no endpoint".into());
        for endpoint in self.registries.endpoints(reference) {
            for credential in self.credentials(&endpoint, auth) {
                let mut attempt = 0;
                while attempt < ATTEMPTS {
                    let before = sink.offset();
                    match self.blob_once(&endpoint, &path, descriptor.size, credential.as_ref(), sink).await {
                        Ok(()) => return Ok(()),
                        Err(FetchError::Image(e @ ImageError::Unavailable(_))) => last = e,
                        Err(FetchError::Image(e)) => {
                            last = worse(last, e);
                            break;
                        }
                        Err(e) => return Err(e),
                    }
                    // Progress earns new attempts, so that a long blob over a bad line comes through.
                    attempt = if sink.offset() > before { 1 } else { attempt + 1 };
                    tokio::time::sleep(delay(attempt)).await;
                }
            }
        }
        Err(last.into())
    }

    /// The platforms that an image really has.
    pub async fn platforms(&self, reference: &Reference, auth: &[Auth]) -> Result<Vec<Platform>, ImageError> {
        let resolved = self.resolve(reference, auth).await?;
        match resolved.document {
            Document::Index(index) => Ok(index.images().into_iter().map(|(p, _)| p).collect()),
            Document::Manifest(m) => {
                let config = self.small_blob(reference, &m.config, auth).await?;
                Ok(vec![ImageConfig::parse(&config)?.platform()])
            }
        }
    }

    async fn document(
        &self,
        reference: &Reference,
        target: &str,
        digest: Option<&str>,
        auth: &[Auth],
    ) -> Result<Resolved, ImageError> {
        let path = format!("manifests/{target}");
        let (media_type, bytes) = self.everywhere(reference, auth, &path, Some(ACCEPTED), digest).await?;
        let document = manifest::parse(&media_type, &bytes)?;
        Ok(Resolved { digest: manifest::digest(&bytes), media_type, bytes, document })
    }

    /// A document and its media type. Tries each endpoint with each credential, again while they are unavailable.
    async fn everywhere(
        &self,
        reference: &Reference,
        auth: &[Auth],
        path: &str,
        accept: Option<&str>,
        digest: Option<&str>,
    ) -> Result<(String, Bytes), ImageError> {
        let mut last = ImageError::Unavailable(format!("{reference}: no endpoint"));
        for endpoint in self.registries.endpoints(reference) {
            for credential in self.credentials(&endpoint, auth) {
                for attempt in 1..=ATTEMPTS {
                    match self.ask(&endpoint, credential.as_ref(), path, accept, digest).await {
                        Ok(found) => return Ok(found),
                        Err(e @ ImageError::Unavailable(_)) => {
                            tracing::debug!(host = endpoint.host, attempt, error = %e, "registry request failed");
                            last = worse(last, e);
                        }
                        Err(e) => {
                            last = worse(last, e);
                            break;
                        }
                    }
                    // A mirror that is down must not hold up the next endpoint for long.
                    if attempt == ATTEMPTS || endpoint.mirror_of.is_some() {
                        break;
                    }
                    tokio::time::sleep(delay(attempt)).await;
                }
            }
        }
        Err(last)
    }

    async fn ask(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        path: &str,
        accept: Option<&str>,
        digest: Option<&str>,
    ) -> Result<(String, Bytes), ImageError> {
        let response = self.get(endpoint, path, accept, 0, credential).await?;
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
        let media_type = media_type.split(';').next().unwrap_or("").trim().to_string();
        let bytes = read_document(response).await?;
        if let Some(digest) = digest {
            check_digest(&bytes, digest)?;
        }
        Ok((media_type, bytes))
    }

    fn credentials(&self, endpoint: &Endpoint, auth: &[Auth]) -> Vec<Option<Auth>> {
        if endpoint.mirror_of.is_none() && !auth.is_empty() {
            return auth.iter().cloned().map(Some).collect();
        }
        vec![self.registries.auth(&endpoint.host)]
    }

    async fn blob_once(
        &self,
        endpoint: &Endpoint,
        path: &str,
        size_bytes: u64,
        credential: Option<&Auth>,
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        if size_bytes > 0 && sink.offset() >= size_bytes {
            if sink.offset() == size_bytes {
                return Ok(());
            }
            sink.restart()?;
        }
        let response = self.get(endpoint, path, None, sink.offset(), credential).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT && sink.offset() > 0 {
            sink.restart()?;
        }
        let mut body = response.into_body();
        loop {
            let frame = match tokio::time::timeout(STALL, body.frame()).await {
                Err(_) => return Err(unavailable(endpoint, "the registry stopped sending").into()),
                Ok(None) => break,
                Ok(Some(Err(e))) => return Err(unavailable(endpoint, e).into()),
                Ok(Some(Ok(frame))) => frame,
            };
            if let Some(data) = frame.data_ref() {
                if size_bytes > 0 && sink.offset() + data.len() as u64 > size_bytes {
                    return Err(
                        ImageError::Invalid(format!("{path} is longer than its {size_bytes} bytes")).into()
                    );
                }
                sink.write(data)?;
            }
        }
        if sink.offset() < size_bytes {
            return Err(unavailable(endpoint, format!("{path} ended after {} bytes", sink.offset())).into());
        }
        Ok(())
    }

    /// A GET below the repository, with what authentication the registry asks for.
    async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        accept: Option<&str>,
        offset: u64,
        credential: Option<&Auth>,
    ) -> Result<Response<Incoming>, ImageError> {
        let mut url = format!("{}/{}/{path}", endpoint.url, endpoint.repository);
        if let Some(registry) = &endpoint.mirror_of {
            url = format!("{url}?ns={registry}");
        }
        let key = token::key(endpoint, credential);
        let mut authorization = self.tokens.lock().get(&key).cloned();
        for round in 0..2 {
            let response = self.follow(&url, accept, offset, authorization.clone(), endpoint).await?;
            if response.status() == StatusCode::UNAUTHORIZED && round == 0 {
                let challenges: Vec<String> = response
                    .headers()
                    .get_all(WWW_AUTHENTICATE)
                    .iter()
                    .filter_map(|v| Some(v.to_str().ok()?.to_string()))
                    .collect();
                let answer = token::answer(self, endpoint, &challenges, credential).await?;
                let mut tokens = self.tokens.lock();
                if tokens.len() >= TOKENS_MAX {
                    tokens.clear();
                }
                tokens.insert(key.clone(), answer.clone());
                authorization = Some(answer);
                continue;
            }
            return judge(response, endpoint, path).await;
        }
        Err(ImageError::Denied(format!("{}/{}", endpoint.host, endpoint.repository)))
    }

    /// Sends a GET and follows redirects; the authorization stays with the first host.
    async fn follow(
        &self,
        url: &str,
        accept: Option<&str>,
        offset: u64,
        authorization: Option<HeaderValue>,
        endpoint: &Endpoint,
    ) -> Result<Response<Incoming>, ImageError> {
        let mut uri: Uri = url.parse().map_err(|e| ImageError::Invalid(format!("{url}: {e}")))?;
        let first = uri.clone();
        for _ in 0..REDIRECTS_MAX {
            let mut request = Request::builder().method(Method::GET).uri(uri.clone());
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            if let Some(value) = &authorization
                && (uri.authority(), uri.scheme()) == (first.authority(), first.scheme())
            {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let response = self.send(request, Bytes::new(), endpoint).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|v| v.to_str().ok()).unwrap_or("");
            uri = relative(&uri, location)
                .ok_or_else(|| ImageError::Invalid(format!("{url}: redirect to {location:?}")))?;
        }
        Err(ImageError::Invalid(format!("{url}: more than {REDIRECTS_MAX} redirects")))
    }

    async fn send(
        &self,
        request: http::request::Builder,
        body: Bytes,
        endpoint: &Endpoint,
    ) -> Result<Response<Incoming>, ImageError> {
        let request = request
            .header(http::header::USER_AGENT, concat!("sampan/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body))
            .map_err(|e| ImageError::Invalid(e.to_string()))?;
        let host = request.uri().authority().map_or(endpoint.host.clone(), ToString::to_string);
        let client =
            self.transport.client(&host, self.registries.tls(&host)).map_err(|e| unavailable(endpoint, e))?;
        match tokio::time::timeout(STALL, client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(ImageError::Unavailable(format!("{host}: {}", chain(&e)))),
            Err(_) => Err(ImageError::Unavailable(format!("{host}: no answer within {} s", STALL.as_secs()))),
        }
    }
}

/// An error with its causes: hyper's own text says only "client error (Connect)".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn unavailable(endpoint: &Endpoint, why: impl std::fmt::Display) -> ImageError {
    ImageError::Unavailable(format!("{}: {why}", endpoint.host))
}

fn delay(attempt: u32) -> Duration {
    FIRST_DELAY * 2u32.saturating_pow(attempt.saturating_sub(1).min(4))
}

/// Which of two errors says more about the image.
fn worse(old: ImageError, new: ImageError) -> ImageError {
    let rank = |e: &ImageError| match e {
        ImageError::Unavailable(_) => 0,
        ImageError::NotFound(_) => 1,
        ImageError::Denied(_) => 2,
        _ => 3,
    };
    if rank(&new) >= rank(&old) { new } else { old }
}

async fn judge(
    response: Response<Incoming>,
    endpoint: &Endpoint,
    path: &str,
) -> Result<Response<Incoming>, ImageError> {
    let what = format!("{}/{}: {path}", endpoint.host, endpoint.repository);
    let status = response.status();
    match status.as_u16() {
        200 | 206 => Ok(response),
        404 => Err(ImageError::NotFound(what)),
        401 | 403 => Err(ImageError::Denied(format!(
            "{what}: {status}: repository does not exist or may require authorization"
        ))),
        408 | 425 | 429 | 500..=599 => Err(ImageError::Unavailable(format!("{what}: {status}"))),
        _ => Err(ImageError::Invalid(format!("{what}: unexpected status {status}"))),
    }
}

async fn read_document(response: Response<Incoming>) -> Result<Bytes, ImageError> {
    let body = Limited::new(response.into_body(), DOCUMENT_MAX_BYTES as usize);
    match tokio::time::timeout(STALL, body.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
            Err(ImageError::Invalid(format!("document over {DOCUMENT_MAX_BYTES} bytes")))
        }
        Ok(Err(e)) => Err(ImageError::Unavailable(e.to_string())),
        Err(_) => Err(ImageError::Unavailable("the registry stopped sending".into())),
    }
}

fn check_digest(bytes: &[u8], wanted: &str) -> Result<(), ImageError> {
    let got = manifest::digest(bytes);
    if got == wanted {
        return Ok(());
    }
    Err(ImageError::Invalid(format!("digest is {got}, not the {wanted} asked for")))
}

fn relative(base: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.parse().ok();
    }
    let path = location.starts_with('/').then_some(location)?;
    format!("{}://{}{path}", base.scheme_str()?, base.authority()?).parse().ok()
}

#[cfg(test)]
mod tests;
