//! Objects in S3, or in what speaks like it (MinIO, Garage, Ceph).
//!
//! Upstream counterpart: distribution's S3 driver; the keys are the same, so its buckets can be taken over. An upload is
//! a multipart upload; bytes that make no whole part yet lie beside it when a request ends, so that it can be resumed.
//! Removing a folder takes one object after another: whoever relies on a folder's being gone removes its main file
//! first, by its name's order. Nothing locks the bucket: one registry at a time may write to a prefix.
use std::io;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use http::{Method, StatusCode};
use http_body_util::BodyExt;

use super::{Appender, ByteStream, Result, Stat, Storage, StorageError, Sync};
use crate::digest::Hasher;

mod wire;

pub use wire::S3Options;
use wire::{Request, Wire, encode_key, text_of, texts_of};

/// Of a multipart upload; S3 wants 5 MiB at least, and 10,000 parts at most.
const PART_BYTES: usize = 8 << 20;
const PARTS_MAX: usize = 10_000;
/// Copied in one request.
const COPY_MAX_BYTES: u64 = 5 << 30;
const COPY_PART_BYTES: u64 = 1 << 30;
const STALL: Duration = Duration::from_secs(60);
const SESSION: &str = ".multipart";
const TAIL: &str = ".tail";

pub struct S3 {
    wire: std::sync::Arc<Wire>,
}

#[derive(Clone)]
struct Part {
    number: usize,
    size_bytes: u64,
    etag: String,
}

impl S3 {
    pub fn new(options: S3Options) -> Result<S3> {
        Ok(S3 { wire: std::sync::Arc::new(Wire::new(options)?) })
    }
}

impl Wire {
    async fn object(&self, key: &str) -> Result<Option<Bytes>> {
        let answer = self.send(Request::new(Method::GET, key)).await?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            _ => Ok(Some(answer.ok(key)?.body)),
        }
    }

    async fn store(&self, key: &str, content: Bytes) -> Result<()> {
        self.send(Request::new(Method::PUT, key).body(content)).await?.ok(key).map(drop)
    }

    async fn drop_object(&self, key: &str) -> Result<()> {
        let answer = self.send(Request::new(Method::DELETE, key)).await?;
        if answer.status == StatusCode::NOT_FOUND { Ok(()) } else { answer.ok(key).map(drop) }
    }

    async fn head(&self, key: &str) -> Result<Option<Stat>> {
        let answer = self.send(Request::new(Method::HEAD, key)).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = answer.ok(key)?;
        Ok(Some(Stat { size_bytes: answer.length.unwrap_or_default(), modified: answer.modified }))
    }

    /// Keys below `prefix`, and with `delimiter` the folders among them, each once.
    async fn keys(&self, prefix: &str, delimiter: bool) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let mut request = Request::new(Method::GET, "").query("list-type", "2");
            request = request.query("prefix", &self.full_key(prefix));
            if delimiter {
                request = request.query("delimiter", "/");
            }
            if let Some(token) = &token {
                request = request.query("continuation-token", token);
            }
            let answer = self.send(request).await?.ok(prefix)?;
            let xml = answer.text();
            for entry in texts_of(&xml, "Contents").iter().filter_map(|c| text_of(c, "Key")) {
                found.extend(self.short_key(&entry));
            }
            for entry in texts_of(&xml, "CommonPrefixes").iter().filter_map(|c| text_of(c, "Prefix")) {
                found.extend(self.short_key(entry.trim_end_matches('/')));
            }
            token = text_of(&xml, "NextContinuationToken").filter(|t| !t.is_empty());
            if token.is_none() {
                return Ok(found);
            }
        }
    }

    async fn begin_multipart(&self, key: &str) -> Result<String> {
        let answer = self.send(Request::new(Method::POST, key).query("uploads", "")).await?.ok(key)?;
        text_of(&answer.text(), "UploadId").ok_or_else(|| StorageError::Backend {
            key: key.to_string(),
            message: "no UploadId in the answer".into(),
        })
    }

    /// `None` when there is no such multipart upload any more.
    async fn parts(&self, key: &str, id: &str) -> Result<Option<Vec<Part>>> {
        let mut parts: Vec<Part> = Vec::new();
        loop {
            let mut request = Request::new(Method::GET, key).query("uploadId", id);
            if let Some(last) = parts.last() {
                request = request.query("part-number-marker", &last.number.to_string());
            }
            let answer = self.send(request).await?;
            if answer.status == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            let xml = answer.ok(key)?.text();
            for part in texts_of(&xml, "Part") {
                let number = text_of(&part, "PartNumber").and_then(|n| n.parse().ok());
                let size_bytes = text_of(&part, "Size").and_then(|n| n.parse().ok());
                if let (Some(number), Some(size_bytes), Some(etag)) =
                    (number, size_bytes, text_of(&part, "ETag"))
                {
                    parts.push(Part { number, size_bytes, etag });
                }
            }
            if text_of(&xml, "IsTruncated").as_deref() != Some("true") || parts.len() >= PARTS_MAX {
                return Ok(Some(parts));
            }
        }
    }

    async fn put_part(&self, key: &str, id: &str, number: usize, content: Bytes) -> Result<Part> {
        let size_bytes = content.len() as u64;
        let request = Request::new(Method::PUT, key)
            .query("partNumber", &number.to_string())
            .query("uploadId", id)
            .body(content);
        let answer = self.send(request).await?.ok(key)?;
        Ok(Part { number, size_bytes, etag: answer.etag })
    }

    async fn complete(&self, key: &str, id: &str, parts: &[Part]) -> Result<()> {
        let part =
            |p: &Part| format!("<Part><PartNumber>{}</PartNumber><ETag>{}</ETag></Part>", p.number, p.etag);
        let body: String = parts.iter().map(part).collect();
        let body = format!("<CompleteMultipartUpload>{body}</CompleteMultipartUpload>");
        let request = Request::new(Method::POST, key).query("uploadId", id).body(body.into());
        self.copied(key, request).await.map(drop)
    }

    /// For requests that may fail with 200, the error in the body.
    async fn copied(&self, key: &str, request: Request) -> Result<wire::Answer> {
        let answer = self.send(request).await?.ok(key)?;
        match text_of(&answer.text(), "Error") {
            Some(message) => Err(StorageError::Backend { key: key.to_string(), message }),
            None => Ok(answer),
        }
    }

    /// The upload's id, its parts, and what follows them.
    async fn session(&self, key: &str) -> Result<Option<(String, Vec<Part>, Bytes)>> {
        let Some(id) = self.object(&format!("{key}{SESSION}")).await? else { return Ok(None) };
        let id = String::from_utf8_lossy(&id).into_owned();
        let Some(parts) = self.parts(key, &id).await? else { return Ok(None) };
        let size: u64 = parts.iter().map(|p| p.size_bytes).sum();
        let tail = self.object(&format!("{key}{TAIL}")).await?.unwrap_or_default();
        // A tail that has become part of a part meanwhile is told by where it begins.
        let current = tail.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes) == Some(size);
        Ok(Some((id, parts, if current { tail.slice(8..) } else { Bytes::new() })))
    }

    async fn copy(&self, from: &str, to: &str) -> Result<()> {
        let Some(stat) = self.head(from).await? else {
            let source = io::ErrorKind::NotFound.into();
            return Err(StorageError::Io { key: from.to_string(), source });
        };
        let source = format!("/{}/{}", self.bucket(), encode_key(&self.full_key(from)));
        if stat.size_bytes <= COPY_MAX_BYTES {
            return self
                .copied(to, Request::new(Method::PUT, to).header("x-amz-copy-source", &source))
                .await
                .map(drop);
        }
        let id = self.begin_multipart(to).await?;
        let (mut parts, mut first) = (Vec::new(), 0);
        while first < stat.size_bytes {
            let last = (first + COPY_PART_BYTES).min(stat.size_bytes) - 1;
            let number = parts.len() + 1;
            let request = Request::new(Method::PUT, to)
                .query("partNumber", &number.to_string())
                .query("uploadId", &id)
                .header("x-amz-copy-source", &source)
                .header("x-amz-copy-source-range", &format!("bytes={first}-{last}"));
            let etag = text_of(&self.copied(to, request).await?.text(), "ETag").unwrap_or_default();
            parts.push(Part { number, size_bytes: last + 1 - first, etag });
            first = last + 1;
        }
        self.complete(to, &id, &parts).await
    }
}

#[async_trait::async_trait]
impl Storage for S3 {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.wire.object(key).await
    }

    async fn put(&self, key: &str, content: Bytes, _: Sync) -> Result<()> {
        self.wire.store(key, content).await
    }

    async fn stat(&self, key: &str) -> Result<Option<Stat>> {
        self.wire.head(key).await
    }

    async fn touch(&self, key: &str) -> Result<bool> {
        match self.wire.object(key).await? {
            Some(content) => self.wire.store(key, content).await.map(|()| true),
            None => Ok(false),
        }
    }

    async fn list(&self, folder: &str, holding: Option<&str>) -> Result<Vec<String>> {
        let prefix = format!("{folder}/");
        let keys = self.wire.keys(&prefix, holding.is_none()).await?;
        let mut names: Vec<String> = keys
            .iter()
            .filter_map(|key| key.strip_prefix(&prefix))
            .filter_map(|rest| match holding {
                Some(file) => rest.strip_suffix(file)?.strip_suffix('/'),
                None => Some(rest),
            })
            .filter(|name| !name.is_empty() && !name.contains('/'))
            .map(str::to_string)
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    async fn remove(&self, key: &str) -> Result<()> {
        for inner in self.wire.keys(&format!("{key}/"), false).await? {
            if let Some(upload) = inner.strip_suffix(SESSION)
                && let Some(id) = self.wire.object(&inner).await?
            {
                let id = String::from_utf8_lossy(&id).into_owned();
                let abort = Request::new(Method::DELETE, upload).query("uploadId", &id);
                let answer = self.wire.send(abort).await?;
                if answer.status != StatusCode::NOT_FOUND {
                    answer.ok(upload)?;
                }
            }
            self.wire.drop_object(&inner).await?;
        }
        self.wire.drop_object(key).await
    }

    async fn read(&self, key: &str, offset: u64, length: u64) -> Result<ByteStream> {
        if length == 0 {
            return Ok(Box::pin(stream::empty()));
        }
        let range = format!("bytes={offset}-{}", offset + length - 1);
        let body = self.wire.stream(Request::new(Method::GET, key).header("range", &range)).await?;
        Ok(Box::pin(stream::unfold(Some(body), |body| async move {
            let mut body = body?;
            loop {
                match tokio::time::timeout(STALL, body.frame()).await {
                    Err(_) => return Some((Err(io::ErrorKind::TimedOut.into()), None)),
                    Ok(None) => return None,
                    Ok(Some(Err(e))) => return Some((Err(io::Error::other(e)), None)),
                    Ok(Some(Ok(frame))) => {
                        if let Ok(data) = frame.into_data() {
                            return Some((Ok(data), Some(body)));
                        }
                    }
                }
            }
        })))
    }

    async fn create(&self, key: &str) -> Result<()> {
        let id = self.wire.begin_multipart(key).await?;
        self.wire.store(&format!("{key}{SESSION}"), id.into()).await
    }

    async fn append(&self, key: &str) -> Result<Option<Box<dyn Appender>>> {
        let Some((id, parts, tail)) = self.wire.session(key).await? else { return Ok(None) };
        let sent: u64 = parts.iter().map(|p| p.size_bytes).sum();
        let mut buffer = BytesMut::with_capacity(tail.len());
        buffer.put(tail);
        let (wire, key) = (self.wire.clone(), key.to_string());
        Ok(Some(Box::new(S3Appender { wire, key, id, parts: parts.len(), sent, buffer })))
    }

    async fn publish(&self, upload: &str, to: &str) -> Result<()> {
        self.wire.copy(upload, to).await?;
        self.wire.drop_object(upload).await
    }

    async fn sweep(&self) -> Result<u64> {
        Ok(0)
    }

    async fn upload_stat(&self, key: &str) -> Result<Option<Stat>> {
        if let Some(stat) = self.wire.head(key).await? {
            return Ok(Some(stat));
        }
        let Some((_, parts, tail)) = self.wire.session(key).await? else { return Ok(None) };
        let size_bytes = parts.iter().map(|p| p.size_bytes).sum::<u64>() + tail.len() as u64;
        let mut modified = 0;
        for state in [SESSION, TAIL] {
            let stat = self.wire.head(&format!("{key}{state}")).await?;
            modified = modified.max(stat.map_or(0, |s| s.modified));
        }
        Ok(Some(Stat { size_bytes, modified }))
    }

    async fn seal(&self, key: &str) -> Result<()> {
        let Some((id, mut parts, tail)) = self.wire.session(key).await? else { return Ok(()) };
        if parts.is_empty() {
            let abort = Request::new(Method::DELETE, key).query("uploadId", &id);
            self.wire.send(abort).await?.ok(key)?;
            return self.wire.store(key, tail).await;
        }
        if !tail.is_empty() {
            parts.push(self.wire.put_part(key, &id, parts.len() + 1, tail).await?);
        }
        self.wire.complete(key, &id, &parts).await
    }

    fn reads_uploads(&self) -> bool {
        false
    }
}

struct S3Appender {
    wire: std::sync::Arc<Wire>,
    key: String,
    id: String,
    parts: usize,
    sent: u64,
    buffer: BytesMut,
}

#[async_trait::async_trait]
impl Appender for S3Appender {
    fn offset(&self) -> u64 {
        self.sent + self.buffer.len() as u64
    }

    async fn write(&mut self, pieces: Vec<Bytes>, mut hasher: Option<Hasher>) -> Result<Option<Hasher>> {
        for piece in pieces {
            if let Some(hasher) = hasher.as_mut() {
                hasher.update(&piece);
            }
            self.buffer.extend_from_slice(&piece);
        }
        while self.buffer.len() >= PART_BYTES {
            if self.parts >= PARTS_MAX {
                let message = format!("more than {PARTS_MAX} parts of {PART_BYTES} bytes");
                return Err(StorageError::Backend { key: self.key.clone(), message });
            }
            let part = self.buffer.split_to(PART_BYTES).freeze();
            self.wire.put_part(&self.key, &self.id, self.parts + 1, part).await?;
            self.parts += 1;
            self.sent += PART_BYTES as u64;
        }
        Ok(hasher)
    }

    async fn flush(&mut self) -> Result<()> {
        let mut tail = BytesMut::with_capacity(8 + self.buffer.len());
        tail.put_u64(self.sent);
        tail.extend_from_slice(&self.buffer);
        self.wire.store(&format!("{}{TAIL}", self.key), tail.freeze()).await
    }
}
