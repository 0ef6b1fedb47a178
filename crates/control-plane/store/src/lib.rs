//! A revisioned key-value log with watch: in one SQLite file ([`Store::open`]), or in an etcd that several servers
//! share ([`Store::connect`]).
//!
//! Upstream counterpart: etcd, as Kubernetes uses it (`storage/etcd3`).
//!
//! One revision counter; get, range, guarded transactions, watch and compaction. What stays true, whatever is below:
//! - An acknowledged durable write is never lost; revisions are published in order and never given twice.
//! - A read without a revision sees every write that was acknowledged before it, by whomever.
//! - A watch delivers each change once and in order, or ends with an error that says to list again.
//! - Everything is bounded: queues, the history in memory, every wait.
//!
//! Keys under `/registry/` are objects. Keys under `/sampan/` are plain: they are read, written and guarded like any
//! other, but a watch shows them only to who asks for them by [`Store::follow`] or by that prefix.
//!
//! Deliberate differences from etcd: no leases (keys do not expire by themselves), no users; in the file each key
//! written by one transaction has a revision of its own.
mod entry;
mod error;
mod etcd;
mod follow;
mod memory;
mod options;
mod sqlite;
mod watch;

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

pub use crate::entry::{Class, Entry, Event, EventKind, Expect, Guard, Page, Range, Write};
pub use crate::error::{StoreError, WatchError, WriteError};
use crate::etcd::Cluster;
pub use crate::etcd::Etcd;
pub use crate::etcd::members::{Member, MemberStatus, Members, MembersError};
pub use crate::follow::Follow;
use crate::memory::Memory;
pub use crate::options::Options;
use crate::sqlite::Sqlite;
pub use crate::watch::{Batch, Progress, Watch};

/// What may wait to be written, in KiB; a request counts as one at least. Writers beyond it wait.
const QUEUE_KIB: u32 = 4096;
const KEY_LIMIT_BYTES: usize = 2048;
/// etcd's default limit of operations in a transaction.
const TXN_LIMIT_WRITES: usize = 128;

/// What a backend has published, which watches read.
pub(crate) type Published = Arc<Mutex<Memory>>;

enum Backend {
    Sqlite(Sqlite),
    Etcd(Cluster),
}

struct Inner {
    memory: Published,
    backend: Backend,
    max_value_bytes: usize,
    room: Arc<Semaphore>,
}

/// Numbers for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub revision: u64,
    pub compacted: u64,
    /// Transactions committed: each with one sync of the file, or each an answer of etcd.
    pub commits: u64,
    /// Keys whose latest state is not yet on disk.
    pub deferred_keys: usize,
    pub history_bytes: usize,
    pub watches: usize,
}

/// The store. Clones are the same store; the last one dropped closes it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// Opens or creates the file. Blocks; a process that already has it open makes it fail.
    pub fn open(options: Options) -> Result<Store, StoreError> {
        let max_value_bytes = options.max_value_bytes;
        let sqlite = Sqlite::open(options)?;
        Ok(Self::new(sqlite.memory(), Backend::Sqlite(sqlite), max_value_bytes))
    }

    /// Connects to etcd and begins to follow it. An etcd that does not answer is waited for a while
    /// ([`Etcd::connect_wait`]).
    pub async fn connect(etcd: Etcd) -> Result<Store, StoreError> {
        let max_value_bytes = etcd.max_value_bytes;
        let cluster = Cluster::connect(etcd).await?;
        Ok(Self::new(cluster.memory(), Backend::Etcd(cluster), max_value_bytes))
    }

    fn new(memory: Published, backend: Backend, max_value_bytes: usize) -> Self {
        let room = Arc::new(Semaphore::new(QUEUE_KIB as usize));
        Self { inner: Arc::new(Inner { memory, backend, max_value_bytes, room }) }
    }

    /// Whether other servers may write to it too.
    pub fn is_shared(&self) -> bool {
        matches!(self.inner.backend, Backend::Etcd(_))
    }

    /// The latest published revision: what watches of this store have or can have seen.
    pub fn revision(&self) -> u64 {
        self.inner.memory.lock().published
    }

    /// The revision of the data now: no write that anyone has an answer for is newer. Where the store is shared this
    /// asks the others, and may be ahead of [`Self::revision`].
    pub async fn latest(&self) -> Result<u64, StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(_) => Ok(self.revision()),
            Backend::Etcd(cluster) => cluster.latest().await,
        }
    }

    /// Reads below this revision answer [`StoreError::Compacted`].
    pub fn compacted(&self) -> u64 {
        self.inner.memory.lock().compacted
    }

    pub fn stats(&self) -> Stats {
        let commits = match &self.inner.backend {
            Backend::Sqlite(file) => file.commits(),
            Backend::Etcd(cluster) => cluster.commits(),
        };
        let memory = self.inner.memory.lock();
        Stats {
            revision: memory.published,
            compacted: memory.compacted,
            commits,
            deferred_keys: memory.dirty.len(),
            history_bytes: memory.ring_bytes(),
            watches: memory.watchers.len(),
        }
    }

    /// The key, and the revision of the state that was read.
    pub async fn get(&self, key: &str, at: Option<u64>) -> Result<(Option<Entry>, u64), StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.get(key, at).await,
            Backend::Etcd(cluster) => cluster.get(key, at).await,
        }
    }

    /// The entries under a prefix in byte order.
    pub async fn range(&self, range: Range) -> Result<Page, StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.range(range).await,
            Backend::Etcd(cluster) => cluster.range(range).await,
        }
    }

    /// How many keys there are under a prefix.
    pub async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.count(prefix).await,
            Backend::Etcd(cluster) => cluster.count(prefix).await,
        }
    }

    /// Changes one key and returns the revision of the change.
    pub async fn write(&self, write: Write) -> Result<u64, WriteError> {
        let revisions = self.write_many(Vec::new(), vec![write]).await?;
        Ok(revisions.first().copied().unwrap_or_default())
    }

    /// Changes several keys, or none when a guard or a write's own expectation does not hold. The revisions of the
    /// changes are returned in the order of `writes`; they become visible together. In the file each is one of its
    /// own; etcd gives all the same, so there at most one of the keys may lie under `/registry/`.
    pub async fn write_many(&self, guards: Vec<Guard>, writes: Vec<Write>) -> Result<Vec<u64>, WriteError> {
        let size_bytes = self.check(&guards, &writes)?;
        let kib = u32::try_from(size_bytes / 1024 + 1).unwrap_or(QUEUE_KIB).min(QUEUE_KIB);
        let room = self.inner.room.clone().acquire_many_owned(kib).await;
        let permit = room.map_err(|_| StoreError::Closed)?;
        match &self.inner.backend {
            Backend::Sqlite(file) => file.write_many(guards, writes, permit).await,
            Backend::Etcd(cluster) => {
                let written = cluster.write_many(&guards, &writes).await;
                drop(permit);
                written
            }
        }
    }

    fn check(&self, guards: &[Guard], writes: &[Write]) -> Result<usize, StoreError> {
        let limit_bytes = self.inner.max_value_bytes;
        let invalid = |key: &str, detail| Err(StoreError::Invalid { key: key.to_owned(), detail });
        let mut seen = HashSet::new();
        let mut total = 0;
        for key in guards.iter().map(|g| &g.key).chain(writes.iter().map(|w| &w.key)) {
            if key.is_empty() {
                return invalid(key, "a key cannot be empty");
            }
            if key.len() > KEY_LIMIT_BYTES {
                let (size_bytes, limit_bytes) = (key.len(), KEY_LIMIT_BYTES);
                return Err(StoreError::TooLarge { key: key.clone(), size_bytes, limit_bytes });
            }
        }
        for write in writes {
            let size_bytes = write.value.as_ref().map_or(0, |v| v.len());
            if size_bytes > limit_bytes {
                return Err(StoreError::TooLarge { key: write.key.clone(), size_bytes, limit_bytes });
            }
            if !seen.insert(write.key.as_str()) {
                return invalid(&write.key, "a transaction writes a key once");
            }
            total += size_bytes + write.key.len();
        }
        match writes.get(TXN_LIMIT_WRITES) {
            Some(write) => invalid(&write.key, "a transaction has at most 128 writes"),
            None => Ok(total),
        }
    }

    /// Follows the changes under `prefix` after revision `from` (which may lie in the future).
    pub fn watch(&self, prefix: &str, from: u64) -> Result<Watch, StoreError> {
        let mut memory = self.inner.memory.lock();
        if memory.closed {
            return Err(StoreError::Closed);
        }
        let history = match &self.inner.backend {
            Backend::Sqlite(file) => {
                file.watchable(&memory, prefix, from)?;
                Some(file.shared())
            }
            Backend::Etcd(_) => {
                // etcd has older changes, but who asks for them can as well list again
                let compacted = memory.floor.max(memory.compacted.min(memory.published));
                if from < compacted {
                    return Err(StoreError::Compacted { compacted });
                }
                None
            }
        };
        let id = memory.add_watcher(prefix, from);
        Ok(Watch::new(self.inner.memory.clone(), history, prefix, from, id))
    }

    /// Follows one key, whoever writes it: meant for the plain keys under `/sampan/`.
    pub fn follow(&self, key: &str) -> Follow {
        Follow::new(self.clone(), key)
    }

    /// Forgets what was before `revision`. The store also does it by itself.
    pub async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.compact(revision).await,
            Backend::Etcd(cluster) => cluster.compact(revision).await,
        }
    }

    /// Brings the deferred writes to disk now. (etcd has none: it writes them at once.)
    pub async fn flush(&self) -> Result<(), StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.flush().await,
            Backend::Etcd(cluster) => cluster.open(),
        }
    }

    /// Brings everything to disk and ends; later calls answer [`StoreError::Closed`].
    pub async fn close(&self) -> Result<(), StoreError> {
        match &self.inner.backend {
            Backend::Sqlite(file) => file.close().await,
            Backend::Etcd(cluster) => cluster.close(),
        }
    }
}

#[cfg(test)]
mod tests;
