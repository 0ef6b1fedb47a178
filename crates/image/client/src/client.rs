//! The registry client: resolves names, fetches manifests and blobs, over mirrors, with tokens, retries and resume.
//!
//! Upstream counterparts: the OCI distribution spec; containerd's `remotes/docker`. What stays true: every document
//! fetched by digest has that digest; credentials of the pod go to the image's own registry only, never to a mirror
//! or to where a redirect leads; every retry is bounded. HTTP proxies are not read from the environment.
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, RANGE};
use http::header::{USER_AGENT, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use parking_lot::Mutex;
use sampan_drivers::runtime::{Auth, ImageError, Platform};

use crate::credentials::Keychain;
use crate::manifest::{self, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageConfig};
use crate::mirror::Mirror;
use crate::reference::Reference;
use crate::registries::{Endpoint, Registries};
use crate::source::without_start;
use crate::transport::{Body, Transport};

mod answer;
mod mirrored;
mod push;
mod token;
mod watched;

use answer::{
    again, chain, check_digest, check_whole, delay, has_all, judge, media_type, pour, read_document,
    relative, same_host, unavailable, worse,
};
use mirrored::Turn;

pub use push::{Pushed, Upload};

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
    /// The digest of what it got so far, where it knows: then a wrong blob is asked of the next endpoint.
    fn digest(&self) -> Option<String> {
        None
    }
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

/// What a token must allow besides reading the endpoint's repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Scope {
    push: bool,
    /// Another repository of the same registry, to mount blobs from.
    from: Option<String>,
}

/// A request to a registry.
struct Call<'a> {
    method: Method,
    url: String,
    headers: Vec<(HeaderName, String)>,
    body: Bytes,
    scope: &'a Scope,
}

const PULL: &Scope = &Scope { push: false, from: None };

pub struct Client {
    registries: Registries,
    keychain: Keychain,
    transport: Transport,
    tokens: Mutex<HashMap<String, HeaderValue>>,
    mirror: Option<Arc<dyn Mirror>>,
}

impl Client {
    pub fn new(registries: Registries) -> Client {
        let keychain = Keychain::default();
        let (transport, tokens) = (Transport::default(), Mutex::default());
        Client { registries, keychain, transport, tokens, mirror: None }
    }

    /// Others to ask for what a registry has.
    pub fn with_mirror(mut self, mirror: Option<Arc<dyn Mirror>>) -> Client {
        self.mirror = mirror;
        self
    }

    /// Whether others may hold this registry's images, and so may want them from here.
    pub fn is_mirrored(&self, registry: &str) -> bool {
        self.mirror.as_deref().is_some_and(|mirror| mirror.covers(registry))
    }

    /// Credentials for registries where neither the caller nor registries.yaml has any.
    pub fn with_keychain(mut self, keychain: Keychain) -> Client {
        self.keychain = keychain;
        self
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
        if let Some((mirror, _)) = self.mirror_for(reference, &path)
            && self.blob_from(mirror, reference, &path, descriptor, sink).await?
        {
            return Ok(());
        }
        let mut last = ImageError::Unavailable("no endpoint".into());
        for endpoint in self.registries.endpoints(reference) {
            for credential in self.credentials(&endpoint, auth).await? {
                let mut attempt = 0;
                while attempt < ATTEMPTS {
                    let before = sink.offset();
                    let got = self.blob_once(&endpoint, &path, descriptor.size, credential.as_ref(), sink);
                    match got.await.and_then(|()| check_whole(descriptor, before, sink)) {
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

    /// A blob's bytes from `offset` on, unverified, as a stream.
    pub async fn open_blob(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        auth: &[Auth],
        offset: u64,
    ) -> Result<Body, ImageError> {
        let path = format!("blobs/{}", descriptor.digest);
        let mut last = ImageError::Unavailable(format!("{reference}: no endpoint"));
        for endpoint in self.registries.endpoints(reference) {
            for credential in self.credentials(&endpoint, auth).await? {
                match self.get(&endpoint, &path, None, offset, credential.as_ref()).await {
                    Ok(response) => {
                        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
                        let skip = if partial { 0 } else { offset };
                        return Ok(without_start(response.into_body(), skip));
                    }
                    Err(e) => last = worse(last, e),
                }
            }
        }
        Err(last)
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
        let mirror = self.mirror_for(reference, path);
        if let Some((mirror, Turn::BeforeTheRegistry)) = mirror
            && let Some(found) = self.document_from(mirror, reference, path, digest).await
        {
            return Ok(found);
        }
        let later = mirror.filter(|(_, turn)| *turn == Turn::WhenTheRegistryIsAway);
        let mut last = ImageError::Unavailable(format!("{reference}: no endpoint"));
        let endpoints = self.registries.endpoints(reference);
        for (index, endpoint) in endpoints.iter().enumerate() {
            let is_last = index + 1 == endpoints.len() && later.is_none();
            for credential in self.credentials(endpoint, auth).await? {
                for attempt in 1..=ATTEMPTS {
                    let error = match self.ask(endpoint, credential.as_ref(), path, accept, digest).await {
                        Ok(found) => return Ok(found),
                        Err(error) => error,
                    };
                    if !again(&mut last, error, endpoint, attempt, is_last).await {
                        break;
                    }
                }
            }
        }
        if let (Some((mirror, _)), ImageError::Unavailable(_)) = (later, &last)
            && let Some(found) = self.document_from(mirror, reference, path, digest).await
        {
            return Ok(found);
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
        let media_type = media_type(&response);
        let bytes = read_document(response).await?;
        if let Some(digest) = digest {
            check_digest(&bytes, digest)?;
        }
        Ok((media_type, bytes))
    }

    async fn credentials(&self, endpoint: &Endpoint, auth: &[Auth]) -> Result<Vec<Option<Auth>>, ImageError> {
        if endpoint.mirror_of.is_none() && !auth.is_empty() {
            return Ok(auth.iter().cloned().map(Some).collect());
        }
        if let Some(auth) = self.registries.auth(&endpoint.host) {
            return Ok(vec![Some(auth)]);
        }
        let found = self.keychain.auth(&endpoint.host, &endpoint.repository).await;
        Ok(vec![found.map_err(|e| ImageError::Denied(e.to_string()))?])
    }

    async fn blob_once(
        &self,
        endpoint: &Endpoint,
        path: &str,
        size_bytes: u64,
        credential: Option<&Auth>,
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        if has_all(size_bytes, sink)? {
            return Ok(());
        }
        let response = self.get(endpoint, path, None, sink.offset(), credential).await?;
        pour(response, &endpoint.host, path, size_bytes, sink).await
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
        let mut headers = Vec::new();
        if let Some(accept) = accept {
            headers.push((ACCEPT, accept.to_string()));
        }
        if offset > 0 {
            headers.push((RANGE, format!("bytes={offset}-")));
        }
        let call = Call { method: Method::GET, url, headers, body: Bytes::new(), scope: PULL };
        judge(self.exchange(endpoint, credential, &call).await?, endpoint, path).await
    }

    /// Sends a request with what authentication the registry asks for; any answer but a refusal of it is returned.
    async fn exchange(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        call: &Call<'_>,
    ) -> Result<Response<Incoming>, ImageError> {
        let key = token::key(endpoint, credential, call.scope);
        let authorization = self.tokens.lock().get(&key).cloned();
        let response = self.follow(call, authorization, endpoint).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges: Vec<String> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|v| Some(v.to_str().ok()?.to_string()))
            .collect();
        let answer = token::answer(self, endpoint, &challenges, credential, call.scope).await?;
        {
            let mut tokens = self.tokens.lock();
            if tokens.len() >= TOKENS_MAX {
                tokens.clear();
            }
            tokens.insert(key, answer.clone());
        }
        self.follow(call, Some(answer), endpoint).await
    }

    /// Sends a request and follows redirects; the authorization stays with the first host.
    async fn follow(
        &self,
        call: &Call<'_>,
        authorization: Option<HeaderValue>,
        endpoint: &Endpoint,
    ) -> Result<Response<Incoming>, ImageError> {
        let url = &call.url;
        let mut uri: Uri = url.parse().map_err(|e| ImageError::Invalid(format!("{url}: {e}")))?;
        let own: Option<Uri> = endpoint.url.parse().ok();
        for _ in 0..REDIRECTS_MAX {
            let mut request = Request::builder().method(call.method.clone()).uri(uri.clone());
            for (name, value) in &call.headers {
                request = request.header(name, value);
            }
            if let Some(value) = &authorization
                && own.as_ref().is_some_and(|own| same_host(own, &uri))
            {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let response = self.send(request, call.body.clone(), endpoint).await?;
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
        let body = Full::new(body).map_err(|never| match never {}).boxed_unsync();
        match tokio::time::timeout(STALL, self.send_body(request, body, endpoint)).await {
            Ok(answer) => answer,
            Err(_) => Err(unavailable(endpoint, format!("no answer within {} s", STALL.as_secs()))),
        }
    }

    /// Sends a request whose body may take long; the caller watches over it.
    async fn send_body(
        &self,
        request: http::request::Builder,
        body: Body,
        endpoint: &Endpoint,
    ) -> Result<Response<Incoming>, ImageError> {
        let request = request
            .header(USER_AGENT, concat!("sampan/", env!("CARGO_PKG_VERSION")))
            .body(body)
            .map_err(|e| ImageError::Invalid(e.to_string()))?;
        let host = request.uri().authority().map_or(endpoint.host.clone(), ToString::to_string);
        let tls = self.registries.tls(&host);
        let client = self.transport.client(&host, tls.as_ref()).map_err(|e| unavailable(endpoint, e))?;
        match client.request(request).await {
            Ok(response) => Ok(response),
            Err(e) => Err(ImageError::Unavailable(format!("{host}: {}", chain(&e)))),
        }
    }
}

#[cfg(test)]
mod tests;
