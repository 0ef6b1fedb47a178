//! What can go wrong in the store, and how SQLite's codes become it. (etcd's words become it in `etcd.rs`.)
//!
//! Upstream counterpart: the errors of etcd's client (`ErrCompacted`, `ErrFutureRev`, `ErrNoSpace`).
//! What stays true: after any of these but [`StoreError::Closed`] and [`StoreError::Corrupt`] the store
//! goes on serving reads, and takes writes again as soon as the cause is gone.
use std::path::Path;

use rusqlite::ErrorCode;

use crate::entry::Entry;

/// A failed read, watch, compaction or opening.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The history asked for is gone; list again. `compacted` is the oldest revision that still answers.
    #[error("the requested revision has been compacted; the oldest available is {compacted}")]
    Compacted { compacted: u64 },
    /// The revision asked for has not been given yet.
    #[error("revision {requested} is in the future; the latest is {current}")]
    FutureRevision { requested: u64, current: u64 },
    /// No space on the disk (or in the memory for writes that wait for it). Reads go on.
    #[error("the store {path} is full: {detail}")]
    Full { path: String, detail: String },
    /// The key or the value exceeds its limit.
    #[error("{key}: {size_bytes} bytes exceed the limit of {limit_bytes}")]
    TooLarge { key: String, size_bytes: usize, limit_bytes: usize },
    /// A transaction that cannot be asked for (an empty key, a key twice).
    #[error("{key}: {detail}")]
    Invalid { key: String, detail: &'static str },
    /// The file is damaged or is not a store.
    #[error(
        "the store file {path} cannot be used: {detail}; restore it from a backup, or move {path}, {path}-wal and \
         {path}-shm away to begin with an empty cluster"
    )]
    Corrupt { path: String, detail: String },
    /// Another process has the store open.
    #[error("the store {path} is in use by another process")]
    Locked { path: String },
    /// The disk failed.
    #[error("the store {path} cannot be read or written: {detail}")]
    Io { path: String, detail: String },
    /// An endpoint, or a file for speaking with it, that cannot be what is meant.
    #[error("the datastore endpoint {endpoint} cannot be used: {detail}")]
    Endpoint { endpoint: String, detail: String },
    /// No member of etcd could be spoken to. Nothing was changed.
    #[error(
        "etcd at {endpoints} cannot be reached: {detail}; check that it runs, and that the datastore endpoints (with \
         http or https) and certificates are right"
    )]
    Unreachable { endpoints: String, detail: String },
    /// etcd got the request and gave no answer: a write may have happened or not.
    #[error("etcd at {endpoints} did not answer: {detail}")]
    Unanswered { endpoints: String, detail: String },
    /// etcd does not take the request: who asks may not, or must say who they are.
    #[error(
        "etcd at {endpoints} refuses: {detail}; where it knows users, give a client certificate of one that may read, \
         write and watch all keys"
    )]
    Refused { endpoints: String, detail: String },
    /// A read found no quiet moment; try again.
    #[error("the store {path} is busy")]
    Busy { path: String },
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

/// A failed write. Nothing of it is visible; after [`StoreError::Io`], [`StoreError::Unanswered`] or a crash its
/// outcome is unknown, and so it is after etcd's [`StoreError::Full`]: the write that fills it up is still done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    /// `key` is not as its guard expects; `current` is what it is.
    #[error("{key}: the key has changed (now at revision {})", current.as_ref().map_or(0, |e| e.mod_revision))]
    Conflict { key: String, current: Option<Entry> },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The end of a watch: list again and watch from there.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WatchError {
    /// The history this watch still had to read is gone.
    #[error("the requested revision has been compacted; the oldest available is {compacted}")]
    Compacted { compacted: u64 },
    /// This watch was read too slowly: what it had to deliver no longer fits the memory for it.
    #[error("the watch fell behind; the oldest available revision is {oldest}")]
    TooSlow { oldest: u64 },
    #[error("the store is closed")]
    Closed,
    #[error(transparent)]
    Store(StoreError),
}

impl From<StoreError> for WatchError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Compacted { compacted } => WatchError::Compacted { compacted },
            StoreError::Closed => WatchError::Closed,
            e => WatchError::Store(e),
        }
    }
}

/// What SQLite says about the file at `path`, in the store's words.
pub(crate) fn sqlite(path: &Path, error: rusqlite::Error) -> StoreError {
    let (path, detail) = (path.display().to_string(), error.to_string());
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { path, detail },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => StoreError::Corrupt { path, detail },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { path },
        _ => StoreError::Io { path, detail },
    }
}
