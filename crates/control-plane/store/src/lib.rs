//! A revisioned key-value log with watch, in one SQLite file.
//!
//! Upstream counterpart: etcd, as Kubernetes uses it (`storage/etcd3`).
//!
//! One revision counter; get, range, guarded transactions, watch and compaction. What stays true:
//! - An acknowledged durable write survives `kill -9` and power loss.
//! - Revisions are given and published in order by one thread (`writer.rs`) and never given twice.
//! - Nothing is seen before it is on disk, but for the deferred class: keys under
//!   [`Options::deferred_prefixes`] written with [`Class::Deferred`] are visible at once and persisted in
//!   batches. A crash may lose the last of them; their revisions stay unused, and after any restart
//!   reads and watches of these prefixes below the restart revision answer [`StoreError::Compacted`].
//! - Everything is bounded: the queue, the history in memory and in the file, the WAL, the caches.
//!
//! Deliberate differences from etcd: no leases (keys do not expire by themselves), no users, one writer process.
mod entry;
mod error;
mod file;
mod memory;
mod options;
mod reader;
mod watch;
mod writer;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

pub use crate::entry::{Class, Entry, Event, EventKind, Expect, Guard, Page, Range, Write};
pub use crate::error::{StoreError, WatchError, WriteError};
use crate::memory::{Known, Memory};
pub use crate::options::Options;
pub use crate::watch::{Progress, Watch};
use crate::writer::{Request, Txn, Writer};

/// What may wait for the writer, in KiB; a request counts as one at least. Writers beyond it wait.
const QUEUE_KIB: u32 = 4096;
const KEY_LIMIT_BYTES: usize = 2048;
/// etcd's default limit of operations in a transaction.
const TXN_LIMIT_WRITES: usize = 128;

/// What the store's thread, its readers and its watches have in common.
pub(crate) struct Shared {
    options: Options,
    memory: Mutex<Memory>,
    /// A commit to the table of deferred keys is through.
    settled: Condvar,
    readers: Mutex<Vec<Connection>>,
    reading: Arc<Semaphore>,
    commits: AtomicU64,
}

impl Shared {
    fn path(&self) -> String {
        self.options.path.display().to_string()
    }

    /// No more changes will come.
    fn end(&self) {
        self.reading.close();
        self.readers.lock().clear();
        let mut memory = self.memory.lock();
        memory.closed = true;
        for watcher in memory.watchers.values() {
            watcher.wake.notify_one();
            watcher.idle.notify_waiters();
        }
    }
}

struct Inner {
    shared: Arc<Shared>,
    queue: Mutex<Option<Sender<Request>>>,
    room: Arc<Semaphore>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The thread ends when nobody can send to it any more; wait for it to flush.
        self.queue.lock().take();
        if let Some(thread) = self.thread.lock().take() {
            drop(thread.join());
        }
    }
}

/// Numbers for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub revision: u64,
    pub compacted: u64,
    /// Transactions committed, each with one sync.
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
        let opened = file::open(&options)?;
        let memory = Memory::new(opened.meta.reserved, opened.meta.compacted, options.history_bytes);
        let shared = Arc::new(Shared {
            memory: Mutex::new(memory),
            settled: Condvar::new(),
            readers: Mutex::new(Vec::new()),
            reading: Arc::new(Semaphore::new(reader::READERS)),
            commits: AtomicU64::new(0),
            options,
        });
        let (sender, receiver) = channel();
        let writer = Writer::new(opened, shared.clone());
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .stack_size(512 << 10)
            .spawn({
                let shared = shared.clone();
                move || {
                    // Also after a panic: whoever waits must learn that nothing comes any more.
                    let _ended = Ended(shared);
                    writer.run(&receiver);
                }
            })
            .map_err(|e| StoreError::Io { path: shared.path(), detail: e.to_string() })?;
        let inner = Inner {
            shared,
            queue: Mutex::new(Some(sender)),
            room: Arc::new(Semaphore::new(QUEUE_KIB as usize)),
            thread: Mutex::new(Some(thread)),
        };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// The latest published revision.
    pub fn revision(&self) -> u64 {
        self.inner.shared.memory.lock().published
    }

    /// Reads below this revision answer [`StoreError::Compacted`].
    pub fn compacted(&self) -> u64 {
        self.inner.shared.memory.lock().compacted
    }

    pub fn stats(&self) -> Stats {
        let memory = self.inner.shared.memory.lock();
        Stats {
            revision: memory.published,
            compacted: memory.compacted,
            commits: self.inner.shared.commits.load(Ordering::Relaxed),
            deferred_keys: memory.dirty.len(),
            history_bytes: memory.ring_bytes(),
            watches: memory.watchers.len(),
        }
    }

    /// The key, and the revision of the state that was read.
    pub async fn get(&self, key: &str, at: Option<u64>) -> Result<(Option<Entry>, u64), StoreError> {
        let shared = &self.inner.shared;
        {
            let memory = shared.memory.lock();
            let revision = shared.readable(&memory, at, shared.options.is_deferred(key))?;
            if let Known::Yes(state) = memory.resolve(key, revision) {
                return Ok((state, revision));
            }
        }
        let key = key.to_owned();
        shared.read(move |shared, c| shared.get_from_file(c, &key, at)).await
    }

    /// The entries under a prefix in byte order.
    pub async fn range(&self, range: Range) -> Result<Page, StoreError> {
        let shared = &self.inner.shared;
        shared.readable(&shared.memory.lock(), range.at, shared.options.may_be_deferred(&range.prefix))?;
        shared.read(move |shared, c| shared.range_from_file(c, &range)).await
    }

    /// How many keys there are under a prefix.
    pub async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        let prefix = prefix.to_owned();
        self.inner.shared.read(move |shared, c| shared.count_in_file(c, &prefix)).await
    }

    /// Changes one key and returns the revision of the change.
    pub async fn write(&self, write: Write) -> Result<u64, WriteError> {
        let revisions = self.write_many(Vec::new(), vec![write]).await?;
        Ok(revisions.first().copied().unwrap_or_default())
    }

    /// Changes several keys, or none when a guard or a write's own expectation does not hold. Each key's change
    /// has a revision of its own; they are returned in the order of `writes` and become visible together.
    pub async fn write_many(&self, guards: Vec<Guard>, writes: Vec<Write>) -> Result<Vec<u64>, WriteError> {
        let size_bytes = self.check(&guards, &writes)?;
        let kib = u32::try_from(size_bytes / 1024 + 1).unwrap_or(QUEUE_KIB).min(QUEUE_KIB);
        let room = self.inner.room.clone().acquire_many_owned(kib).await;
        let permit = room.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Request::Txn(Txn { guards, writes, reply, permit }))?;
        answer.await.unwrap_or(Err(StoreError::Closed.into()))
    }

    fn check(&self, guards: &[Guard], writes: &[Write]) -> Result<usize, StoreError> {
        let limit_bytes = self.inner.shared.options.max_value_bytes;
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

    fn send(&self, request: Request) -> Result<(), StoreError> {
        let queue = self.inner.queue.lock();
        let sender = queue.as_ref().ok_or(StoreError::Closed)?;
        sender.send(request).map_err(|_| StoreError::Closed)
    }

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), StoreError>>) -> Request,
    ) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(request(reply))?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Follows the changes under `prefix` after revision `from` (which may lie in the future).
    pub fn watch(&self, prefix: &str, from: u64) -> Result<Watch, StoreError> {
        let shared = &self.inner.shared;
        let mut memory = shared.memory.lock();
        if memory.closed {
            return Err(StoreError::Closed);
        }
        let past = from.min(memory.published);
        shared.readable(&memory, Some(past), shared.options.may_be_deferred(prefix))?;
        let id = memory.add_watcher(prefix, from);
        Ok(Watch::new(shared.clone(), prefix, from, id))
    }

    /// Forgets what was before `revision`. The store also does it by itself.
    pub async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.ask(|reply| Request::Compact(revision, reply)).await
    }

    /// Brings the deferred writes to disk now.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.ask(Request::Flush).await
    }

    /// Brings everything to disk and ends; later calls answer [`StoreError::Closed`].
    pub async fn close(&self) -> Result<(), StoreError> {
        self.ask(Request::Close).await
    }
}

struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests;
