//! Pull-through: what isn't here is fetched from another registry, checked, served and kept.
//!
//! Upstream counterpart: distribution's `registry/proxy`. Differences: a blob is fetched once for all who ask for it
//! meanwhile, ranges included, and resumed when the connection breaks; its last bytes go out only when its digest is
//! right; tags are compared by HEAD, which registries with limits on pulls don't count; referrers are cached too.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::auth::AccessController;
use crate::digest::Digest;
use crate::error::RegistryError;
use crate::http::Answer;
use crate::layout;
use crate::registry::{Document, MANIFEST_MAX_BYTES, Manifest, Reference, Registry};
use crate::storage::PIECE_BYTES;

mod upstream;

pub use upstream::{Upstream, UpstreamError, UpstreamOptions};

/// Written at once while fetching.
const STEP_BYTES: usize = 1 << 20;
/// Without progress in between.
const ATTEMPTS: u32 = 4;
const FIRST_DELAY: Duration = Duration::from_millis(250);
const FETCHES_MAX: usize = 64;
const REFERRERS_MAX: usize = 64;
const TAG_PAGES_MAX: usize = 64;

#[derive(Clone, Debug)]
struct Progress {
    written: u64,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Running,
    Done,
    Failed(String),
}

/// A blob on its way here.
#[derive(Clone)]
struct Fetch {
    upload_id: String,
    size: u64,
    progress: watch::Receiver<Progress>,
}

pub struct Proxy {
    upstream: Arc<Upstream>,
    ttl: Option<Duration>,
    fetches: Mutex<HashMap<(String, Digest), Fetch>>,
}

impl From<UpstreamError> for RegistryError {
    fn from(e: UpstreamError) -> RegistryError {
        match e {
            UpstreamError::NotFound(what) => RegistryError::ManifestUnknown(what),
            UpstreamError::Denied(what) => RegistryError::Denied(format!("by the upstream registry: {what}")),
            UpstreamError::Away(what) => RegistryError::Upstream(what),
        }
    }
}

impl Proxy {
    /// With `ttl`, cached images that nobody pulled for that long are removed by the garbage collection.
    pub fn new(upstream: Upstream, ttl: Option<Duration>) -> Proxy {
        Proxy { upstream: Arc::new(upstream), ttl, fetches: Mutex::default() }
    }

    /// containerd says with `?ns=` which registry it means: what is another's is not looked for here.
    pub(crate) fn check_namespace(&self, registry: &str) -> Result<(), RegistryError> {
        if self.upstream.stands_for(registry) {
            return Ok(());
        }
        let names = self.upstream.namespaces().join(", ");
        Err(RegistryError::NameUnknown(format!("this cache stands for {names}, not for {registry}")))
    }

    pub(crate) fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    pub(crate) async fn manifest(
        &self,
        registry: &Arc<Registry>,
        name: &str,
        reference: &Reference,
    ) -> Result<Manifest, RegistryError> {
        let cached = match registry.manifest(name, reference).await {
            Ok(manifest) => Some(manifest),
            Err(RegistryError::ManifestUnknown(_)) => None,
            Err(e) => return Err(e),
        };
        if let (Reference::Digest(_), Some(manifest)) = (reference, &cached) {
            registry.used(name, &manifest.digest).await;
            return Ok(manifest.clone());
        }
        let fetched = match &cached {
            Some(manifest) => match self.upstream.head_manifest(name, reference).await {
                Ok(Some(digest)) if digest == manifest.digest => Ok(manifest.clone()),
                Ok(_) => self.fetch_manifest(registry, name, reference).await,
                Err(e) => Err(e.into()),
            },
            None => self.fetch_manifest(registry, name, reference).await,
        };
        match (fetched, cached) {
            (Err(RegistryError::Upstream(why)), Some(manifest)) => {
                tracing::warn!(repository = name, %reference, why, "upstream is away; serving what is cached");
                registry.used(name, &manifest.digest).await;
                Ok(manifest)
            }
            (Ok(manifest), _) => {
                registry.used(name, &manifest.digest).await;
                Ok(manifest)
            }
            (Err(e), _) => Err(e),
        }
    }

    async fn fetch_manifest(
        &self,
        registry: &Arc<Registry>,
        name: &str,
        reference: &Reference,
    ) -> Result<Manifest, RegistryError> {
        let (media_type, bytes) = self.upstream.manifest(name, reference, MANIFEST_MAX_BYTES).await?;
        let digest = match reference {
            Reference::Digest(digest) if !digest.matches(&bytes) => {
                return Err(RegistryError::Upstream(format!("{name}: what it sent isn't {digest}")));
            }
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(_) => Digest::of(crate::digest::Algorithm::Sha256, &bytes),
        };
        let media_type = match Document::parse(Some(&media_type), &bytes) {
            Ok(document) => document.media_type,
            Err(_) => media_type,
        };
        let kept = {
            let (registry, name, reference) = (registry.clone(), name.to_string(), reference.clone());
            let (media_type, bytes) = (media_type.clone(), bytes.clone());
            tokio::spawn(async move {
                registry.put_manifest(&name, &reference, &[], Some(&media_type), bytes).await.map(drop)
            })
            .await
        };
        if let Ok(Err(error)) = kept {
            tracing::warn!(repository = name, %reference, %error, "not cached");
        }
        Ok(Manifest { digest, media_type, bytes })
    }

    pub(crate) async fn tags(
        &self,
        registry: &Arc<Registry>,
        name: &str,
    ) -> Result<Vec<String>, RegistryError> {
        match self.upstream.tags(name, TAG_PAGES_MAX).await {
            Ok(tags) => Ok(tags),
            Err(UpstreamError::Away(why)) => {
                tracing::warn!(repository = name, why, "upstream is away; listing the cached tags");
                registry.tags(name).await
            }
            Err(UpstreamError::NotFound(_)) => Err(RegistryError::NameUnknown(name.to_string())),
            Err(e) => Err(e.into()),
        }
    }

    /// Caches the manifests that refer to `subject`, as far as they can be had.
    pub(crate) async fn fetch_referrers(&self, registry: &Arc<Registry>, name: &str, subject: &Digest) {
        let digests = match self.upstream.referrers(name, subject).await {
            Ok(digests) => digests,
            Err(error) => {
                tracing::debug!(repository = name, %subject, %error, "no referrers from upstream");
                return;
            }
        };
        for digest in digests.into_iter().take(REFERRERS_MAX) {
            if let Err(error) = self.manifest(registry, name, &Reference::Digest(digest)).await {
                tracing::debug!(repository = name, %subject, %error, "a referrer could not be had");
            }
        }
    }

    /// Answers for a blob that isn't here.
    pub(crate) async fn blob(
        &self,
        registry: &Arc<Registry>,
        name: &str,
        digest: &Digest,
        headers: &HeaderMap,
        head: bool,
    ) -> Answer {
        // With tokens a client may be allowed some repositories only; otherwise whoever sees one sees all.
        if !matches!(registry.access, AccessController::Token(_))
            && registry.mount(name, digest, None).await?.is_some()
        {
            return Box::pin(registry.get_blob(name, digest, headers, head)).await;
        }
        let running = self.fetches.lock().get(&(name.to_string(), digest.clone())).cloned();
        if head && running.is_none() {
            let size = self.upstream.head_blob(name, digest).await.map_err(blob_error)?;
            return Ok(blob_response(digest, size));
        }
        let fetch = match running {
            Some(fetch) => fetch,
            None => match self.begin(registry, name, digest).await? {
                Begun::Fetch(fetch) => fetch,
                Begun::Direct(response) => return Ok(response),
            },
        };
        let mut response = blob_response(digest, Some(fetch.size));
        let range = crate::http::range_of(headers, fetch.size, digest)?;
        let (first, length) = range.unwrap_or((0, fetch.size));
        if range.is_some() {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let last = first + length.saturating_sub(1);
            let value = format!("bytes {first}-{last}/{}", fetch.size);
            set(response.headers_mut(), header::CONTENT_RANGE, &value);
        }
        set(response.headers_mut(), header::CONTENT_LENGTH, &length.to_string());
        if !head {
            *response.body_mut() = follow(registry.clone(), name, digest, fetch, first, first + length);
        }
        Ok(response)
    }

    /// Starts fetching a blob; what can't be kept is only passed on.
    async fn begin(
        &self,
        registry: &Arc<Registry>,
        name: &str,
        digest: &Digest,
    ) -> Result<Begun, RegistryError> {
        let body = self.upstream.blob(name, digest, 0).await.map_err(blob_error)?;
        let key = (name.to_string(), digest.clone());
        let upload = match registry.start_upload(name).await {
            Ok(upload) if body.size.is_some() && self.fetches.lock().len() < FETCHES_MAX => upload,
            kept => {
                if let Err(error) = kept {
                    tracing::warn!(repository = name, %digest, %error, "not cached");
                }
                let mut response = blob_response(digest, body.size);
                *response.body_mut() = body.into_body();
                return Ok(Begun::Direct(response));
            }
        };
        let (sender, progress) = watch::channel(Progress { written: 0, state: State::Running });
        let fetch = Fetch { upload_id: upload.id, size: body.size.unwrap_or_default(), progress };
        if let Some(earlier) = self.fetches.lock().get(&key) {
            let earlier = earlier.clone();
            return Ok(Begun::Fetch(earlier));
        }
        self.fetches.lock().insert(key, fetch.clone());
        let task = Fetching {
            registry: registry.clone(),
            upstream: self.upstream.clone(),
            name: name.to_string(),
            digest: digest.clone(),
            fetch: fetch.clone(),
            sender,
        };
        tokio::spawn(task.run(body));
        Ok(Begun::Fetch(fetch))
    }
}

enum Begun {
    Fetch(Fetch),
    Direct(Response<Body>),
}

/// The task that brings a blob here.
struct Fetching {
    registry: Arc<Registry>,
    upstream: Arc<Upstream>,
    name: String,
    digest: Digest,
    fetch: Fetch,
    sender: watch::Sender<Progress>,
}

impl Fetching {
    async fn run(self, body: upstream::BlobBody) {
        let result = self.fetch(body).await;
        let state = match result {
            Ok(()) => State::Done,
            Err(error) => {
                tracing::warn!(repository = self.name, digest = %self.digest, %error, "fetching failed");
                let _ = self.registry.cancel_upload(&self.name, &self.fetch.upload_id).await;
                State::Failed(error.to_string())
            }
        };
        if let Some(proxy) = &self.registry.proxy {
            proxy.fetches.lock().remove(&(self.name.clone(), self.digest.clone()));
        }
        self.sender.send_modify(|p| p.state = state);
    }

    async fn fetch(&self, body: upstream::BlobBody) -> Result<(), RegistryError> {
        let mut body = Some(body);
        let (mut written, mut attempt) = (0, 0);
        loop {
            let before = written;
            let opened = match body.take() {
                Some(body) => Ok(body),
                None => self.upstream.blob(&self.name, &self.digest, written).await,
            };
            let ended = match opened {
                Ok(opened) => self.copy(opened, &mut written).await?,
                Err(e) => Some(e),
            };
            match ended {
                None if written == self.fetch.size => break,
                Some(e @ (UpstreamError::NotFound(_) | UpstreamError::Denied(_))) => {
                    return Err(blob_error(e));
                }
                _ => {}
            }
            attempt = if written > before { 1 } else { attempt + 1 };
            if attempt > ATTEMPTS {
                return Err(RegistryError::Upstream(format!("{} broke off at {written} bytes", self.digest)));
            }
            tokio::time::sleep(FIRST_DELAY * 2_u32.pow(attempt.min(4))).await;
        }
        self.registry.finish_upload(&self.name, &self.fetch.upload_id, &self.digest).await.map(drop)
    }

    /// Writes what comes; returns why it ended early, if it did.
    async fn copy(
        &self,
        mut body: upstream::BlobBody,
        written: &mut u64,
    ) -> Result<Option<UpstreamError>, RegistryError> {
        if body.offset != *written {
            return Ok(Some(UpstreamError::Away("it can't resume".into())));
        }
        loop {
            let mut step = Vec::new();
            let mut ended = None;
            while step.len() < STEP_BYTES {
                match body.next().await {
                    Ok(Some(piece)) => step.extend_from_slice(&piece),
                    end => {
                        ended = Some(end.err());
                        break;
                    }
                }
            }
            let length = step.len() as u64;
            if *written + length > self.fetch.size {
                return Err(RegistryError::Upstream(format!("{} is longer than announced", self.digest)));
            }
            if length > 0 {
                let (algorithm, body) = (self.digest.algorithm(), Body::from(step));
                let id = &self.fetch.upload_id;
                self.registry.write_upload(&self.name, id, None, Some(length), algorithm, body).await?;
                *written += length;
                self.sender.send_modify(|p| p.written = *written);
            }
            if let Some(ended) = ended {
                return Ok(ended);
            }
        }
    }
}

/// A body that follows a fetch. Its last byte waits for the digest: a wrong one breaks the transfer off.
fn follow(registry: Arc<Registry>, name: &str, digest: &Digest, fetch: Fetch, first: u64, end: u64) -> Body {
    let upload = layout::upload(name, &fetch.upload_id);
    let state = (registry, digest.clone(), upload, fetch, first);
    Body::from_stream(futures::stream::unfold(
        state,
        move |(registry, digest, upload, mut fetch, offset)| async move {
            if offset >= end {
                return None;
            }
            let piece = loop {
                let progress = fetch.progress.borrow_and_update().clone();
                let visible = match &progress.state {
                    State::Failed(why) => break Err(std::io::Error::other(why.clone())),
                    State::Done => fetch.size,
                    State::Running if !registry.storage().reads_uploads() => 0,
                    State::Running => progress.written.min(fetch.size.saturating_sub(1)),
                };
                let length = visible.min(end).saturating_sub(offset).min(PIECE_BYTES as u64);
                if length > 0 {
                    break registry.read_arriving(&upload, &digest, offset, length).await;
                }
                if fetch.progress.changed().await.is_err() {
                    break Err(std::io::Error::other("the fetch ended"));
                }
            };
            let (end_of_piece, failed) = match &piece {
                Ok(piece) => (offset + piece.len() as u64, false),
                Err(_) => (offset, true),
            };
            let next = if failed { u64::MAX } else { end_of_piece };
            Some((piece, (registry, digest, upload, fetch, next)))
        },
    ))
}

impl Registry {
    /// Part of a blob that may become a blob at any moment.
    async fn read_arriving(
        &self,
        upload: &str,
        digest: &Digest,
        offset: u64,
        length: u64,
    ) -> std::io::Result<Bytes> {
        let mut stream = match self.storage().read(upload, offset, length).await {
            Ok(stream) => stream,
            Err(_) => self
                .read_blob(digest, offset, length)
                .await
                .map_err(|e| std::io::Error::other(e.to_string()))?,
        };
        stream.next().await.unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()))
    }
}

fn blob_error(e: UpstreamError) -> RegistryError {
    match e {
        UpstreamError::NotFound(what) => RegistryError::BlobUnknown(what),
        e => e.into(),
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn blob_response(digest: &Digest, size: Option<u64>) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    set(headers, header::ETAG, &format!("\"{digest}\""));
    set(headers, HeaderName::from_static("docker-content-digest"), &digest.to_string());
    if let Some(size) = size {
        set(headers, header::CONTENT_LENGTH, &size.to_string());
    }
    response
}

/// Only GET and HEAD go upstream.
fn method(head: bool) -> Method {
    if head { Method::HEAD } else { Method::GET }
}
