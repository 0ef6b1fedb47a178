//! Uploads under way: written as they come, hashed on the way, kept when the connection or the server breaks.
//!
//! Upstream counterpart: distribution's `registry/storage/blobwriter.go`. An upload is its file; the rest (the digest so
//! far) is kept in memory only and computed again from the file when it isn't there. Unlike docker-registry, bytes of
//! a request that broke off count: the client asks how far it came and goes on.
use std::collections::HashMap;

use axum::body::Body;
use futures::StreamExt;
use http_body_util::BodyExt;

use super::*;
use crate::digest::Hasher;
use crate::storage::{Appender, PIECE_BYTES};

/// Beyond this many, the digests of idle uploads are forgotten, and computed again when they end.
const SESSIONS_MAX: usize = 1024;
/// Between two pieces of a body.
const STALL: Duration = Duration::from_secs(120);
/// How long a request waits for another that writes to the same upload.
const BUSY: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadStatus {
    pub id: String,
    pub offset: u64,
}

#[derive(Default)]
pub(super) struct Sessions(parking_lot::Mutex<HashMap<String, Arc<Mutex<Progress>>>>);

/// The digest of an upload's first `hashed` bytes.
#[derive(Default)]
struct Progress {
    hasher: Option<Hasher>,
    hashed: u64,
}

impl Sessions {
    fn of(&self, id: &str) -> Arc<Mutex<Progress>> {
        let mut sessions = self.0.lock();
        if let Some(session) = sessions.get(id) {
            return session.clone();
        }
        if sessions.len() >= SESSIONS_MAX {
            sessions.retain(|_, session| Arc::strong_count(session) > 1);
        }
        sessions.entry(id.to_string()).or_default().clone()
    }

    fn forget(&self, id: &str) {
        self.0.lock().remove(id);
    }
}

/// Identifiers are UUIDs: nothing else becomes part of a path.
fn check_id(id: &str) -> Result<(), RegistryError> {
    let valid = id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if valid { Ok(()) } else { Err(RegistryError::UploadUnknown(id.chars().take(64).collect())) }
}

impl Registry {
    pub async fn start_upload(&self, repository: &str) -> Result<UploadStatus, RegistryError> {
        let _gate = self.making_reachable().await;
        self.usage.add(repository, 0)?;
        let id = sampan_world::random::uuid();
        self.storage.create(&layout::upload(repository, &id)).await?;
        Ok(UploadStatus { id, offset: 0 })
    }

    pub async fn upload_status(&self, repository: &str, id: &str) -> Result<UploadStatus, RegistryError> {
        check_id(id)?;
        match self.storage.upload_stat(&layout::upload(repository, id)).await? {
            Some(stat) => Ok(UploadStatus { id: id.to_string(), offset: stat.size_bytes }),
            None => Err(RegistryError::UploadUnknown(id.to_string())),
        }
    }

    /// Appends a request's body. `range` is its place in the blob, both ends inclusive, where the client tells.
    pub async fn write_upload(
        &self,
        repository: &str,
        id: &str,
        range: Option<(u64, u64)>,
        length: Option<u64>,
        algorithm: Algorithm,
        mut body: Body,
    ) -> Result<UploadStatus, RegistryError> {
        let written = self.append_body(repository, id, range, length, algorithm, &mut body).await;
        if let Err(e) = &written
            && !matches!(e, RegistryError::ClientGone(_))
        {
            crate::http::drain(&mut body).await;
        }
        written
    }

    async fn append_body(
        &self,
        repository: &str,
        id: &str,
        range: Option<(u64, u64)>,
        length: Option<u64>,
        algorithm: Algorithm,
        body: &mut Body,
    ) -> Result<UploadStatus, RegistryError> {
        check_id(id)?;
        let session = self.sessions.of(id);
        let Ok(mut progress) = tokio::time::timeout(BUSY, session.lock()).await else {
            return Err(RegistryError::UploadInvalid(format!("another request is writing to {id}")));
        };
        let unknown = || RegistryError::UploadUnknown(id.to_string());
        let key = layout::upload(repository, id);
        let mut appender = match self.storage.append(&key).await? {
            Some(appender) => appender,
            None => {
                self.sessions.forget(id);
                return Err(unknown());
            }
        };
        let begin = appender.offset();
        if let Some((first, last)) = range {
            if first != begin {
                let location = crate::http::upload_location(repository, id);
                return Err(RegistryError::OutOfOrder { location, id: id.to_string(), offset: begin });
            }
            if length.is_some_and(|length| last < first || last - first + 1 != length) {
                return Err(RegistryError::SizeInvalid(format!("Content-Range {first}-{last}")));
            }
        }
        if length == Some(0) {
            return Ok(UploadStatus { id: id.to_string(), offset: begin });
        }
        // what is too large as a whole is refused before a byte of it is taken
        self.usage.add(repository, length.unwrap_or_default())?;
        let mut charged = length.unwrap_or_default();
        if begin == 0 {
            *progress = Progress { hasher: Some(Hasher::new(algorithm)), hashed: 0 };
        }
        let hasher = if progress.hashed == begin { progress.hasher.take() } else { None };
        *progress = Progress::default();
        let (hasher, received) =
            self.receive(repository, appender.as_mut(), hasher, body, &mut charged).await;
        // what came counts even when the rest didn't
        appender.flush().await?;
        let end = appender.offset();
        if hasher.is_some() {
            *progress = Progress { hasher, hashed: end };
        }
        let surplus = charged.saturating_sub(end - begin);
        self.usage.take(repository, surplus);
        received?;
        if range.is_some_and(|(first, last)| end - begin != last - first + 1) {
            return Err(RegistryError::SizeInvalid(format!("{} bytes came", end - begin)));
        }
        Ok(UploadStatus { id: id.to_string(), offset: end })
    }

    /// Reads the body into the upload: while one piece is written the next is read.
    async fn receive(
        &self,
        repository: &str,
        appender: &mut dyn Appender,
        mut hasher: Option<Hasher>,
        body: &mut Body,
        charged: &mut u64,
    ) -> (Option<Hasher>, Result<(), RegistryError>) {
        let begin = appender.offset();
        let mut gathered = gather(body).await;
        loop {
            let bytes: u64 = gathered.pieces.iter().map(|p| p.len() as u64).sum();
            let after = appender.offset() + bytes - begin;
            if after > *charged {
                if let Err(e) = self.usage.add(repository, after - *charged) {
                    return (hasher, Err(e));
                }
                *charged = after;
            }
            let ended = gathered.ended.take();
            let writing = appender.write(std::mem::take(&mut gathered.pieces), hasher.take());
            let next = async {
                match &ended {
                    Some(_) => Gathered::default(),
                    None => gather(body).await,
                }
            };
            let (written, next) = futures::future::join(writing, next).await;
            match written {
                Ok(h) => hasher = h,
                Err(e) => return (None, Err(e.into())),
            }
            if let Some(ended) = ended {
                return (hasher, ended);
            }
            gathered = next;
        }
    }

    /// Makes an upload the blob that it is said to be.
    pub async fn finish_upload(
        &self,
        repository: &str,
        id: &str,
        digest: &Digest,
    ) -> Result<BlobInfo, RegistryError> {
        check_id(id)?;
        let session = self.sessions.of(id);
        let mut progress = session.lock().await;
        let key = layout::upload(repository, id);
        self.storage.seal(&key).await?;
        let Some(stat) = self.storage.upload_stat(&key).await? else {
            self.sessions.forget(id);
            return Err(RegistryError::UploadUnknown(id.to_string()));
        };
        let size_bytes = stat.size_bytes;
        let hasher = progress.hasher.take();
        let hasher = hasher.filter(|h| progress.hashed == size_bytes && h.algorithm() == digest.algorithm());
        let actual = match hasher {
            Some(hasher) => hasher.finish(),
            None => self.hash(&key, size_bytes, digest.algorithm()).await?,
        };
        if actual != *digest {
            self.discard_upload(repository, id, size_bytes).await?;
            return Err(RegistryError::DigestInvalid(format!("it is {actual}, not {digest}")));
        }
        {
            let _gate = self.making_reachable().await;
            self.keep([digest]);
            let stored = self.storage.stat(&layout::blob(digest)).await?;
            if self.exists(&layout::layer(repository, digest)).await? {
                self.usage.take_from_repository(repository, size_bytes);
            }
            // The link goes first: the sync of the content then takes it along to disk. Alone it leads nowhere.
            self.link(&layout::layer(repository, digest), digest, Sync::Lazy).await?;
            if stored.is_some_and(|s| s.size_bytes == size_bytes) {
                self.usage.take_from_total(size_bytes);
            } else {
                self.storage.publish(&key, &layout::blob(digest)).await?;
            }
        }
        self.sessions.forget(id);
        self.storage.remove(&layout::upload_folder(repository, id)).await?;
        Ok(BlobInfo { digest: digest.clone(), size_bytes })
    }

    pub(super) async fn hash(
        &self,
        key: &str,
        size_bytes: u64,
        algorithm: Algorithm,
    ) -> Result<Digest, RegistryError> {
        let mut content = self.storage.read(key, 0, size_bytes).await?;
        let mut hasher = Hasher::new(algorithm);
        while let Some(piece) = content.next().await {
            hasher.update(&piece.map_err(|source| StorageError::Io { key: key.to_string(), source })?);
        }
        Ok(hasher.finish())
    }

    pub async fn cancel_upload(&self, repository: &str, id: &str) -> Result<(), RegistryError> {
        let status = self.upload_status(repository, id).await?;
        let session = self.sessions.of(id);
        let Ok(_progress) = tokio::time::timeout(BUSY, session.lock()).await else {
            return Err(RegistryError::UploadInvalid(format!("another request is writing to {id}")));
        };
        self.discard_upload(repository, id, status.offset).await
    }

    pub(super) async fn discard_upload(
        &self,
        repository: &str,
        id: &str,
        size_bytes: u64,
    ) -> Result<(), RegistryError> {
        self.storage.remove(&layout::upload_folder(repository, id)).await?;
        self.sessions.forget(id);
        self.usage.take(repository, size_bytes);
        Ok(())
    }
}

/// A piece's worth of a body, and whether and how the body ended with it.
#[derive(Default)]
struct Gathered {
    pieces: Vec<Bytes>,
    ended: Option<Result<(), RegistryError>>,
}

async fn gather(body: &mut Body) -> Gathered {
    let mut gathered = Gathered::default();
    let mut size = 0;
    while size < PIECE_BYTES {
        let gone = |why: String| Some(Err(RegistryError::ClientGone(why)));
        gathered.ended = match tokio::time::timeout(STALL, body.frame()).await {
            Err(_) => gone(format!("nothing came for {} s", STALL.as_secs())),
            Ok(None) => Some(Ok(())),
            Ok(Some(Err(e))) => gone(e.to_string()),
            Ok(Some(Ok(frame))) => {
                if let Ok(piece) = frame.into_data() {
                    size += piece.len();
                    gathered.pieces.push(piece);
                }
                continue;
            }
        };
        break;
    }
    gathered
}
