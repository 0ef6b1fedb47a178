//! Pushing: manifests, and blobs that are found there, mounted from another repository, or uploaded.
//!
//! Upstream counterparts: the OCI distribution spec's push workflow; containerd's `remotes/docker/pusher`. What stays
//! true: nothing is ever pushed to a mirror; bytes that don't have their digest are never committed; an upload that
//! broke goes on where the registry says it stands, and every retry is bounded.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use sha2::Digest;

use super::watched::{Hashed, Watched};
use super::*;
use crate::manifest::hex_digest;
use crate::source::Source;

/// After an upload broke, this much is committed at a time: some registries keep nothing of a request that was cut.
const PIECE_BYTES: u64 = 16 << 20;
/// Of sending something, without any progress: a registry that restarts is waited for.
const UPLOAD_ATTEMPTS: u32 = 6;
const MOUNT_REFUSED: [u16; 5] = [400, 401, 403, 404, 405];

/// How a blob came to where it was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    Existed,
    Mounted,
    Uploaded,
}

/// A blob to push.
pub struct Upload<'a> {
    pub blob: &'a Descriptor,
    pub source: &'a dyn Source,
    /// Set to how many of its bytes have been sent.
    pub sent: Arc<AtomicU64>,
}

/// An upload that the registry knows about.
struct Session {
    location: Uri,
    offset: u64,
}

impl Client {
    /// The digest that the registry has it under.
    pub async fn put_manifest(
        &self,
        target: &Reference,
        media_type: &str,
        bytes: &Bytes,
        auth: &[Auth],
    ) -> Result<String, ImageError> {
        let digest = manifest::digest(bytes);
        if let Some(wanted) = &target.digest {
            check_digest(bytes, wanted)?;
        }
        let name = target.tag.as_deref().unwrap_or(&digest);
        let scope = Scope { push: true, from: None };
        let put = async |endpoint: &Endpoint, credential: Option<&Auth>| {
            let call = Call {
                method: Method::PUT,
                url: format!("{}/{}/manifests/{name}", endpoint.url, endpoint.repository),
                headers: vec![(CONTENT_TYPE, media_type.to_string())],
                body: bytes.clone(),
                scope: &scope,
            };
            let response = self.exchange(endpoint, credential, &call).await?;
            let answered = header(&response, "docker-content-digest");
            accepted(response, endpoint, &format!("manifests/{name}")).await?;
            match answered {
                Some(other) if other != digest => Err(ImageError::Invalid(format!(
                    "{}/{}: stored {digest} as {other}",
                    endpoint.host, endpoint.repository
                ))),
                _ => Ok(()),
            }
        };
        self.at_target(target, auth, put).await?;
        Ok(digest)
    }

    /// Whether the registry has a blob or a manifest; `what` is `blobs/sha256:…` or `manifests/…`.
    pub async fn has(&self, target: &Reference, what: &str, auth: &[Auth]) -> Result<bool, ImageError> {
        let scope = Scope { push: true, from: None };
        let head = async |endpoint: &Endpoint, credential: Option<&Auth>| {
            let call = Call {
                method: Method::HEAD,
                url: format!("{}/{}/{what}", endpoint.url, endpoint.repository),
                headers: vec![(ACCEPT, ACCEPTED.to_string())],
                body: Bytes::new(),
                scope: &scope,
            };
            match judge(self.exchange(endpoint, credential, &call).await?, endpoint, what).await {
                Ok(_) => Ok(true),
                Err(ImageError::NotFound(_)) => Ok(false),
                Err(e) => Err(e),
            }
        };
        self.at_target(target, auth, head).await
    }

    /// Brings a blob to the repository of `target` in the cheapest way that works.
    pub async fn push_blob(
        &self,
        target: &Reference,
        auth: &[Auth],
        upload: &Upload<'_>,
    ) -> Result<Pushed, ImageError> {
        let size_bytes = upload.blob.size;
        if self.has(target, &format!("blobs/{}", upload.blob.digest), auth).await? {
            upload.sent.store(size_bytes, Ordering::Relaxed);
            return Ok(Pushed::Existed);
        }
        let from = upload.source.origin().filter(|o| o.registry == target.registry);
        let from = from.map(|o| o.repository.clone()).filter(|r| *r != target.repository);
        let push = async |endpoint: &Endpoint, credential: Option<&Auth>| {
            let session = self.begin(endpoint, credential, &upload.blob.digest, from.as_deref()).await?;
            let Some(session) = session else { return Ok(Ok(Pushed::Mounted)) };
            // It tries again by itself, from where it stands: not all over.
            Ok(self.upload(endpoint, credential, upload, session).await.map(|()| Pushed::Uploaded))
        };
        let pushed = self.at_target(target, auth, push).await??;
        upload.sent.store(size_bytes, Ordering::Relaxed);
        Ok(pushed)
    }

    /// Runs `work` at the registry itself with each credential, again while it is unavailable.
    async fn at_target<T>(
        &self,
        target: &Reference,
        auth: &[Auth],
        work: impl AsyncFn(&Endpoint, Option<&Auth>) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let mut last = ImageError::Unavailable(format!("{target}: no endpoint"));
        let endpoints = self.registries.own_endpoints(target);
        for (index, endpoint) in endpoints.iter().enumerate() {
            for credential in self.credentials(endpoint, auth).await? {
                for attempt in 1..=ATTEMPTS {
                    let error = match work(endpoint, credential.as_ref()).await {
                        Ok(done) => return Ok(done),
                        Err(error) => error,
                    };
                    if !again(&mut last, error, endpoint, attempt, index + 1 == endpoints.len()).await {
                        break;
                    }
                }
            }
        }
        Err(last)
    }

    /// Begins an upload, unless the blob could be mounted from `from`.
    async fn begin(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        digest: &str,
        from: Option<&str>,
    ) -> Result<Option<Session>, ImageError> {
        let uploads = format!("{}/{}/blobs/uploads/", endpoint.url, endpoint.repository);
        let mut tries = vec![(uploads.clone(), Scope { push: true, from: None })];
        if let Some(from) = from {
            let url = format!("{uploads}?mount={digest}&from={}", token::escape(from));
            tries.insert(0, (url, Scope { push: true, from: Some(from.to_string()) }));
        }
        let last = tries.len() - 1;
        for (index, (url, scope)) in tries.into_iter().enumerate() {
            let headers = vec![(CONTENT_LENGTH, "0".to_string())];
            let call = Call { method: Method::POST, url, headers, body: Bytes::new(), scope: &scope };
            let response = match self.exchange(endpoint, credential, &call).await {
                // A token for two repositories may be refused where one for the target alone is not.
                Err(ImageError::Denied(_)) if index < last => continue,
                other => other?,
            };
            if index < last && MOUNT_REFUSED.contains(&response.status().as_u16()) {
                continue;
            }
            let status = response.status();
            let location = header(&response, "location");
            accepted(response, endpoint, "blobs/uploads/").await?;
            if status == StatusCode::CREATED && index < last {
                return Ok(None);
            }
            return Ok(Some(Session { location: locate(&call.url, location, endpoint)?, offset: 0 }));
        }
        Err(ImageError::Invalid(format!("{}: no upload could be begun", endpoint.host)))
    }

    async fn upload(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        upload: &Upload<'_>,
        mut session: Session,
    ) -> Result<(), ImageError> {
        let size_bytes = upload.blob.size;
        let hashed = Arc::new(Mutex::new(Hashed::default()));
        let (mut failures, mut best, mut piece, mut lost) = (0, 0, size_bytes, false);
        while lost || session.offset < size_bytes {
            let step = async {
                let at = match lost {
                    true => self.found_again(endpoint, credential, upload, &session.location).await?,
                    false => Session { location: session.location.clone(), offset: session.offset },
                };
                let length = piece.min(size_bytes - at.offset.min(size_bytes));
                match length {
                    0 => Ok(at),
                    _ => self.patch(endpoint, credential, upload, &at, length, &hashed).await,
                }
            };
            match step.await {
                Ok(next) => (session, lost) = (next, false),
                Err(e @ ImageError::Unavailable(_)) => {
                    failures += 1;
                    if failures >= UPLOAD_ATTEMPTS {
                        return Err(e);
                    }
                    tracing::debug!(host = endpoint.host, failures, error = %e, "an upload broke");
                    tokio::time::sleep(delay(failures)).await;
                    (piece, lost) = (PIECE_BYTES, true);
                }
                Err(e) => return Err(e),
            }
            // Progress earns new attempts.
            if session.offset > best {
                best = session.offset;
                failures = failures.min(1);
            }
        }
        let got = {
            let hashed = hashed.lock();
            (hashed.bytes == size_bytes).then(|| hex_digest(&hashed.hash.clone().finalize()))
        };
        if let Some(got) = got.filter(|got| *got != upload.blob.digest) {
            let what = &upload.blob.digest;
            return Err(ImageError::Invalid(format!("blob {what}: its bytes have digest {got}")));
        }
        self.commit(endpoint, credential, &session.location, &upload.blob.digest).await
    }

    /// The session that broke, or a new one where the registry has forgotten it.
    async fn found_again(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        upload: &Upload<'_>,
        location: &Uri,
    ) -> Result<Session, ImageError> {
        if let Some(session) = self.stands(endpoint, credential, location).await? {
            return Ok(session);
        }
        let begun = self.begin(endpoint, credential, &upload.blob.digest, None).await?;
        begun.ok_or_else(|| unavailable(endpoint, "the registry forgot the upload"))
    }

    /// Sends `length` bytes from where the session stands.
    async fn patch(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        upload: &Upload<'_>,
        session: &Session,
        length: u64,
        hashed: &Arc<Mutex<Hashed>>,
    ) -> Result<Session, ImageError> {
        let from = session.offset;
        let inner = upload.source.open(upload.blob, from).await?;
        let failed = Arc::new(Mutex::new(None));
        let body = Watched {
            inner,
            left: length,
            at: from,
            sent: upload.sent.clone(),
            hashed: hashed.clone(),
            failed: failed.clone(),
        };
        let mut request = Request::builder()
            .method(Method::PATCH)
            .uri(session.location.clone())
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, length)
            .header(CONTENT_RANGE, format!("{from}-{}", from + length - 1));
        request = self.authorize(request, endpoint, credential, &session.location);
        let answer =
            self.watch(self.send_body(request, body.boxed_unsync(), endpoint), &upload.sent, endpoint);
        let answer = answer.await;
        if let Some(e) = failed.lock().take() {
            return Err(ImageError::Unavailable(format!("reading {}: {e}", upload.blob.digest)));
        }
        let response = answer?;
        // A token that ran out meanwhile: the next request gets a new one.
        if response.status() == StatusCode::UNAUTHORIZED {
            self.tokens.lock().clear();
            return Err(unavailable(endpoint, "the token ran out"));
        }
        let range = header(&response, "range");
        let location = header(&response, "location");
        accepted(response, endpoint, "an upload").await?;
        let location = match location {
            Some(_) => locate(&session.location.to_string(), location, endpoint)?,
            None => session.location.clone(),
        };
        let offset = range.and_then(|r| r.rsplit('-').next()?.trim().parse::<u64>().ok());
        Ok(Session { location, offset: offset.map_or(from + length, |last| last + 1) })
    }

    /// Where an upload stands; `None` when the registry doesn't know it any more.
    async fn stands(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        location: &Uri,
    ) -> Result<Option<Session>, ImageError> {
        let scope = Scope { push: true, from: None };
        let call = Call {
            method: Method::GET,
            url: location.to_string(),
            headers: Vec::new(),
            body: Bytes::new(),
            scope: &scope,
        };
        let response = self.exchange(endpoint, credential, &call).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let range = header(&response, "range");
        let moved = header(&response, "location");
        accepted(response, endpoint, "an upload").await?;
        // `0-0` stands for nothing as well as for one byte.
        let last = range.and_then(|r| r.rsplit('-').next()?.trim().parse::<u64>().ok()).unwrap_or(0);
        let location = match moved {
            Some(_) => locate(&call.url, moved, endpoint)?,
            None => location.clone(),
        };
        Ok(Some(Session { location, offset: if last == 0 { 0 } else { last + 1 } }))
    }

    async fn commit(
        &self,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        location: &Uri,
        digest: &str,
    ) -> Result<(), ImageError> {
        let url = location.to_string();
        let separator = if url.contains('?') { '&' } else { '?' };
        let scope = Scope { push: true, from: None };
        let call = Call {
            method: Method::PUT,
            url: format!("{url}{separator}digest={digest}"),
            headers: vec![(CONTENT_LENGTH, "0".to_string())],
            body: Bytes::new(),
            scope: &scope,
        };
        let response = self.exchange(endpoint, credential, &call).await?;
        accepted(response, endpoint, &format!("blobs/{digest}")).await
    }

    fn authorize(
        &self,
        request: http::request::Builder,
        endpoint: &Endpoint,
        credential: Option<&Auth>,
        uri: &Uri,
    ) -> http::request::Builder {
        let key = token::key(endpoint, credential, &Scope { push: true, from: None });
        let own = endpoint.url.parse().is_ok_and(|own: Uri| same_host(&own, uri));
        match self.tokens.lock().get(&key).filter(|_| own) {
            Some(value) => request.header(AUTHORIZATION, value.clone()),
            None => request,
        }
    }

    /// Gives a request up once nothing of its body has moved for as long as [`STALL`].
    async fn watch<T>(
        &self,
        work: impl Future<Output = Result<T, ImageError>>,
        sent: &AtomicU64,
        endpoint: &Endpoint,
    ) -> Result<T, ImageError> {
        let mut work = std::pin::pin!(work);
        let mut before = sent.load(Ordering::Relaxed);
        loop {
            match tokio::time::timeout(STALL, &mut work).await {
                Ok(answer) => return answer,
                Err(_) => {
                    let now = sent.load(Ordering::Relaxed);
                    if now == before {
                        let seconds = STALL.as_secs();
                        return Err(unavailable(endpoint, format!("took no bytes for {seconds} s")));
                    }
                    before = now;
                }
            }
        }
    }
}

fn header(response: &Response<Incoming>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_string())
}

fn locate(base: &str, location: Option<String>, endpoint: &Endpoint) -> Result<Uri, ImageError> {
    let found = location.as_deref().zip(base.parse().ok()).and_then(|(l, base)| relative(&base, l));
    found.ok_or_else(|| {
        ImageError::Invalid(format!("{}: the registry gave an upload no usable location", endpoint.host))
    })
}

/// 2xx, or an error that says what the registry said.
async fn accepted(response: Response<Incoming>, endpoint: &Endpoint, path: &str) -> Result<(), ImageError> {
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    if matches!(status.as_u16(), 404 | 408 | 425 | 429 | 500..=599) {
        return judge(response, endpoint, path).await.map(drop);
    }
    let said = read_document(response).await.map(|b| complaint(&b)).unwrap_or_default();
    let what = format!("{}/{}: {path}: {status}{said}", endpoint.host, endpoint.repository);
    Err(match status.as_u16() {
        401 | 403 => ImageError::Denied(what),
        _ => ImageError::Invalid(what),
    })
}

/// The registry's own words, cut short.
fn complaint(body: &[u8]) -> String {
    let parsed: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let first = &parsed["errors"][0];
    let words: Vec<&str> = ["code", "message"].iter().filter_map(|k| first[*k].as_str()).collect();
    let text: String = words.join(": ").chars().filter(|c| !c.is_control()).take(200).collect();
    if text.is_empty() { text } else { format!(": {text}") }
}
