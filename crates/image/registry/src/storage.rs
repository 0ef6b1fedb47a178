//! Where a registry keeps its bytes: files by key, written whole or not at all, and uploads that grow.
//!
//! Upstream counterpart: distribution's `registry/storage/driver`. What every implementation keeps true:
//! - `put` and `publish` are atomic: a reader, and a restart after a crash, sees the old content or the new;
//! - what `publish`, or `put` with [`Sync::Content`], acknowledged survives a loss of power;
//! - an upload keeps what was acknowledged, so that it can be resumed after a restart of the server.
//!
//! Keys are paths of `/`-joined names made by [`crate::layout`] from checked names; nothing else makes them.
use std::io;
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;

use crate::digest::Hasher;

pub mod disk;
pub mod s3;

pub use disk::Disk;
pub use s3::{S3, S3Options};

/// How large the buffers are that blobs pass through: two for each upload and download under way.
pub const PIECE_BYTES: usize = 128 << 10;

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{key}: {source}")]
    Io { key: String, source: io::Error },
    #[error("{key}: {message}")]
    Backend { key: String, message: String },
}

impl StorageError {
    pub fn is_full(&self) -> bool {
        match self {
            StorageError::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            StorageError::Backend { .. } => false,
        }
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, StorageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

pub type Result<T> = std::result::Result<T, StorageError>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub size_bytes: u64,
    /// Seconds since 1970.
    pub modified: i64,
}

/// What has to be on the disk itself before `put` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// The file and its name.
    Content,
    /// That there is such a file: its key says all that matters.
    Name,
    /// Nothing: it can be made again from what else is kept.
    Lazy,
}

pub type ByteStream = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

#[async_trait::async_trait]
pub trait Storage: Send + std::marker::Sync + 'static {
    /// A small file as a whole; `None` when there is none.
    async fn get(&self, key: &str) -> Result<Option<Bytes>>;
    async fn put(&self, key: &str, content: Bytes, sync: Sync) -> Result<()>;
    async fn stat(&self, key: &str) -> Result<Option<Stat>>;
    /// Makes it look just written; `false` when there is none.
    async fn touch(&self, key: &str) -> Result<bool>;
    /// Names in a folder, sorted; with `holding`, only of folders that have that file. Empty when there is no folder.
    async fn list(&self, folder: &str, holding: Option<&str>) -> Result<Vec<String>>;
    /// Removes a file, or a folder at once with all that is in it. That there is none is fine.
    async fn remove(&self, key: &str) -> Result<()>;
    /// `length` bytes from `offset` of a file that has them.
    async fn read(&self, key: &str, offset: u64, length: u64) -> Result<ByteStream>;

    /// Starts an upload under `key`.
    async fn create(&self, key: &str) -> Result<()>;
    /// Goes on with an upload, at its end; `None` when there is none.
    async fn append(&self, key: &str) -> Result<Option<Box<dyn Appender>>>;
    /// Makes a finished upload the file `to`, for good.
    async fn publish(&self, upload: &str, to: &str) -> Result<()>;

    /// How far an upload has come, and when it last did.
    async fn upload_stat(&self, key: &str) -> Result<Option<Stat>> {
        self.stat(key).await
    }
    /// Ends the writing to an upload: from now on it can be read like a file.
    async fn seal(&self, _key: &str) -> Result<()> {
        Ok(())
    }
    /// Whether uploads can be read while they grow.
    fn reads_uploads(&self) -> bool {
        true
    }

    /// Removes what crashes may have left behind; nothing under way is touched. Returns how many things.
    async fn sweep(&self) -> Result<u64>;
}

/// An upload open for writing.
#[async_trait::async_trait]
pub trait Appender: Send {
    /// How many bytes the upload has.
    fn offset(&self) -> u64;
    /// Writes the pieces, and hashes them on the way.
    async fn write(&mut self, pieces: Vec<Bytes>, hasher: Option<Hasher>) -> Result<Option<Hasher>>;
    /// Makes what was written last beyond the request and this process.
    async fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
