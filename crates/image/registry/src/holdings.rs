//! The registry's interface over content that somebody else keeps: what a node of a cluster lets others read.
//!
//! Upstream counterpart: spegel's `pkg/registry`. GET and HEAD of manifests and blobs, nothing else; which registry's
//! image is meant says `?ns=`, as containerd asks mirrors. What stays true: bytes go out only after the keeper found that
//! they may, and a manifest only with its digest.
use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::digest::Digest;
use crate::error::RegistryError;
use crate::http::{Query, Route, Target, blob_headers, json, manifest_response};
use crate::registry::{Document, Manifest, Reference};
use crate::storage::disk;

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Who keeps the content. Its calls may block.
pub trait Holdings: Send + Sync + 'static {
    /// A manifest or an index of `registry/repository`, by tag or digest.
    fn manifest(&self, registry: &str, repository: &str, reference: &str) -> Option<Vec<u8>>;
    /// A blob with its size.
    fn blob(&self, registry: &str, digest: &str) -> Option<(File, u64)>;
}

/// How many blobs go out at a time, how many may wait for their turn, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub streams: usize,
    pub waiting: usize,
    pub wait: std::time::Duration,
}

/// Serves [`Holdings`], to so many at a time.
pub struct Lending {
    holdings: Arc<dyn Holdings>,
    streams: Arc<Semaphore>,
    queue: Arc<Semaphore>,
    limits: Limits,
}

impl Lending {
    pub fn new(holdings: Arc<dyn Holdings>, limits: Limits) -> Arc<Lending> {
        let streams = Arc::new(Semaphore::new(limits.streams));
        let queue = Arc::new(Semaphore::new(limits.waiting.max(1)));
        Arc::new(Lending { holdings, streams, queue, limits })
    }

    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Response<Body> {
        // nothing that is asked here has a body
        let answer = self.read(request.map(drop)).await;
        let response = answer.unwrap_or_else(|error| error.response());
        response.map(|body| body.map_err(std::io::Error::other).boxed_unsync())
    }

    async fn read(&self, request: Request<()>) -> crate::http::Answer {
        let route = Route::parse(request.uri().path())?;
        let head = request.method() == Method::HEAD;
        if !head && request.method() != Method::GET {
            return Err(RegistryError::Unsupported("nodes are read only".into()));
        }
        let query = Query::parse(request.uri().query().unwrap_or(""));
        let registry = query.get("ns").unwrap_or("").to_string();
        match route.target {
            Target::Base => Ok(json(b"{}".to_vec())),
            Target::Manifest(reference) => {
                let manifest = self.manifest(registry, route.repository, &reference).await?;
                Ok(manifest_response(manifest, request.headers(), head))
            }
            Target::Blob(digest) => self.blob(registry, &digest.parse()?, &request, head).await,
            _ => Err(RegistryError::NoEndpoint),
        }
    }

    async fn manifest(
        &self,
        registry: String,
        repository: String,
        reference: &str,
    ) -> Result<Manifest, RegistryError> {
        let unknown = format!("{registry}/{repository}: {reference}");
        let wanted = Reference::parse(reference)?;
        let (holdings, asked) = (self.holdings.clone(), reference.to_string());
        let found =
            tokio::task::spawn_blocking(move || holdings.manifest(&registry, &repository, &asked)).await;
        let Some(bytes) = found.ok().flatten().map(Bytes::from) else {
            return Err(RegistryError::ManifestUnknown(unknown));
        };
        let digest = match wanted {
            Reference::Digest(digest) if !digest.matches(&bytes) => {
                return Err(RegistryError::ManifestUnknown(unknown));
            }
            Reference::Digest(digest) => digest,
            Reference::Tag(_) => Digest::of(crate::digest::Algorithm::Sha256, &bytes),
        };
        let media_type = Document::parse(None, &bytes)?.media_type;
        Ok(Manifest { digest, media_type, bytes })
    }

    async fn blob(
        &self,
        registry: String,
        digest: &Digest,
        request: &Request<()>,
        head: bool,
    ) -> crate::http::Answer {
        let (holdings, asked) = (self.holdings.clone(), digest.to_string());
        let found = tokio::task::spawn_blocking(move || holdings.blob(&registry, &asked)).await;
        let Some((file, size)) = found.ok().flatten() else {
            return Err(RegistryError::BlobUnknown(digest.to_string()));
        };
        let (mut response, part) = blob_headers(digest, size, request.headers())?;
        let Some((first, length)) = part.filter(|_| !head) else { return Ok(response) };
        let turn = self.turn().await?;
        let pieces = disk::stream_file(Arc::new(file), first, length);
        // the turn ends with the body, however that ends
        let pieces = futures::StreamExt::map(pieces, move |piece| {
            let _ = &turn;
            piece
        });
        *response.body_mut() = axum::body::Body::from_stream(pieces);
        Ok(response)
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, RegistryError> {
        let busy = || RegistryError::TooManyRequests("this node hands out as much as it may already".into());
        let _place = self.queue.clone().try_acquire_owned().map_err(|_| busy())?;
        let turn = tokio::time::timeout(self.limits.wait, self.streams.clone().acquire_owned()).await;
        turn.map_err(|_| busy())?.map_err(|_| busy())
    }
}

/// Whether the request is one that [`Lending`] answers.
pub fn is_read(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
        && matches!(Route::parse(path).map(|r| r.target), Ok(Target::Manifest(_) | Target::Blob(_)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;
    use crate::digest::Algorithm;

    const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},"layers":[]}"#;
    const BLOB: &[u8] = b"0123456789";

    struct Shelf;
    impl Holdings for Shelf {
        fn manifest(&self, registry: &str, repository: &str, reference: &str) -> Option<Vec<u8>> {
            let known = registry == "docker.io" && repository == "library/x";
            let digest = Digest::of(Algorithm::Sha256, MANIFEST).to_string();
            match reference {
                _ if !known => None,
                "1" => Some(MANIFEST.to_vec()),
                // a disk that lies
                "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" => {
                    Some(b"x".to_vec())
                }
                text => (text == digest).then(|| MANIFEST.to_vec()),
            }
        }

        fn blob(&self, registry: &str, digest: &str) -> Option<(File, u64)> {
            let known = registry == "docker.io" && digest == Digest::of(Algorithm::Sha256, BLOB).to_string();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(BLOB).unwrap();
            known.then_some((file, BLOB.len() as u64))
        }
    }

    fn lending(streams: usize, waiting: usize) -> Arc<Lending> {
        Lending::new(Arc::new(Shelf), Limits { streams, waiting, wait: Duration::from_secs(60) })
    }

    fn asking(method: &str, path: &str, range: &str) -> Request<()> {
        let request = Request::builder().method(method).uri(path);
        let request = if range.is_empty() { request } else { request.header("range", range) };
        request.body(()).unwrap()
    }

    #[tokio::test]
    async fn what_is_held_is_read_and_nothing_else() {
        let manifest = Digest::of(Algorithm::Sha256, MANIFEST);
        let blob = Digest::of(Algorithm::Sha256, BLOB);
        let empty = Digest::of(Algorithm::Sha256, b"");
        let shelf = lending(4, 4);
        for (method, path, range, status, body) in [
            ("GET", "/v2/".to_string(), "", 200, &b"{}"[..]),
            ("GET", "/v2/library/x/manifests/1?ns=docker.io".into(), "", 200, MANIFEST),
            ("GET", format!("/v2/library/x/manifests/{manifest}?ns=docker.io"), "", 200, MANIFEST),
            ("HEAD", "/v2/library/x/manifests/1?ns=docker.io".into(), "", 200, b""),
            ("GET", "/v2/library/x/manifests/1?ns=ghcr.io".into(), "", 404, b""),
            ("GET", "/v2/library/x/manifests/1".into(), "", 404, b""),
            ("GET", "/v2/library/x/manifests/2?ns=docker.io".into(), "", 404, b""),
            ("GET", format!("/v2/library/x/manifests/{empty}?ns=docker.io"), "", 404, b""),
            ("GET", format!("/v2/library/x/blobs/{blob}?ns=docker.io"), "", 200, BLOB),
            ("GET", format!("/v2/library/x/blobs/{blob}?ns=docker.io"), "bytes=4-", 206, &BLOB[4..]),
            ("GET", format!("/v2/library/x/blobs/{blob}?ns=docker.io"), "bytes=10-", 416, b""),
            ("HEAD", format!("/v2/library/x/blobs/{blob}?ns=docker.io"), "", 200, b""),
            ("GET", format!("/v2/library/x/blobs/{empty}?ns=docker.io"), "", 404, b""),
            ("GET", format!("/v2/library/x/blobs/{blob}?ns=ghcr.io"), "", 404, b""),
            ("GET", "/v2/library/x/tags/list?ns=docker.io".into(), "", 404, b""),
            ("GET", "/v2/_catalog".into(), "", 404, b""),
            ("PUT", "/v2/library/x/manifests/1?ns=docker.io".into(), "", 405, b""),
            ("DELETE", format!("/v2/library/x/blobs/{blob}?ns=docker.io"), "", 405, b""),
            ("GET", "/v2/../x/manifests/1?ns=docker.io".into(), "", 400, b""),
        ] {
            let answer = shelf.clone().answer(asking(method, &path, range)).await;
            assert_eq!(answer.status().as_u16(), status, "{method} {path} {range}");
            let got = answer.into_body().collect().await.unwrap().to_bytes();
            assert!(!(200..300).contains(&status) || got == body, "{method} {path}: {got:?}");
        }
        assert!(is_read(&Method::HEAD, &format!("/v2/a/b/blobs/{blob}")));
        for (method, path) in
            [("GET", "/v2/"), ("GET", "/v2/_catalog"), ("PUT", "/v2/a/manifests/1"), ("GET", "/pods")]
        {
            assert!(!is_read(&method.parse().unwrap(), path), "{method} {path}");
        }
    }

    #[tokio::test]
    async fn so_many_at_a_time() {
        let shelf = lending(1, 1);
        let path = format!("/v2/library/x/blobs/{}?ns=docker.io", Digest::of(Algorithm::Sha256, BLOB));
        let first = shelf.clone().answer(asking("GET", &path, "")).await;
        assert_eq!(first.status(), 200);
        let second = tokio::spawn(shelf.clone().answer(asking("GET", &path, "")));
        while shelf.queue.available_permits() > 0 && !second.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // one goes out and one waits: a third is sent away, but may ask what there is
        let third = shelf.clone().answer(asking("GET", &path, "")).await;
        assert_eq!(third.status(), 429);
        assert_eq!(shelf.clone().answer(asking("HEAD", &path, "")).await.status(), 200);
        drop(first);
        assert_eq!(second.await.unwrap().status(), 200);
    }
}
