//! The store in one SQLite file: for a single server.
//!
//! Upstream counterpart: etcd itself, as a part of the process.
//!
//! One thread writes (`writer.rs`), a few connections read (`reader.rs`), `file.rs` has the tables. What stays true:
//! - An acknowledged durable write survives `kill -9` and power loss.
//! - Revisions are given and published in order by one thread and never given twice.
//! - Nothing is seen before it is on disk, but for the deferred class: keys under
//!   [`Options::deferred_prefixes`] written with [`crate::Class::Deferred`] are visible at once and persisted in
//!   batches. A crash may lose the last of them; their revisions stay unused, and after any restart
//!   reads and watches of these prefixes below the restart revision answer [`StoreError::Compacted`].
//! - Everything is bounded: the queue, the history in memory and in the file, the WAL, the caches.
pub(crate) mod file;
mod reader;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::Published;
use crate::entry::{Entry, Guard, Page, Range, Write};
use crate::error::{StoreError, WriteError};
use crate::memory::{Known, Memory};
use crate::options::Options;
use crate::sqlite::writer::{Request, Txn, Writer};

/// What the store's thread, its readers and its watches have in common.
pub(crate) struct Shared {
    pub(crate) options: Options,
    memory: Published,
    /// A commit to the table of deferred keys is through.
    settled: Condvar,
    readers: Mutex<Vec<Connection>>,
    reading: Arc<Semaphore>,
    commits: AtomicU64,
}

impl Shared {
    pub(crate) fn path(&self) -> String {
        self.options.path.display().to_string()
    }

    /// No more changes will come.
    fn end(&self) {
        self.reading.close();
        self.readers.lock().clear();
        self.memory.lock().close();
    }
}

/// The open file.
pub(crate) struct Sqlite {
    shared: Arc<Shared>,
    queue: Mutex<Option<Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // The thread ends when nobody can send to it any more; wait for it to flush.
        self.queue.lock().take();
        if let Some(thread) = self.thread.lock().take() {
            drop(thread.join());
        }
    }
}

impl Sqlite {
    pub(crate) fn open(options: Options) -> Result<Self, StoreError> {
        let opened = file::open(&options)?;
        let memory = Memory::new(opened.meta.reserved, opened.meta.compacted, options.history_bytes);
        let shared = Arc::new(Shared {
            memory: Arc::new(Mutex::new(memory)),
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
        Ok(Self { shared, queue: Mutex::new(Some(sender)), thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn memory(&self) -> Published {
        self.shared.memory.clone()
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    pub(crate) fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Relaxed)
    }

    /// Whether changes under `prefix` after `from` can be had.
    pub(crate) fn watchable(&self, memory: &Memory, prefix: &str, from: u64) -> Result<(), StoreError> {
        let deferred = self.shared.options.may_be_deferred(prefix);
        self.shared.readable(memory, Some(from.min(memory.published)), deferred).map(drop)
    }

    pub(crate) async fn get(&self, key: &str, at: Option<u64>) -> Result<(Option<Entry>, u64), StoreError> {
        let shared = &self.shared;
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

    pub(crate) async fn range(&self, range: Range) -> Result<Page, StoreError> {
        let shared = &self.shared;
        shared.readable(&shared.memory.lock(), range.at, shared.options.may_be_deferred(&range.prefix))?;
        shared.read(move |shared, c| shared.range_from_file(c, &range)).await
    }

    pub(crate) async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        let prefix = prefix.to_owned();
        self.shared.read(move |shared, c| shared.count_in_file(c, &prefix)).await
    }

    pub(crate) async fn write_many(
        &self,
        guards: Vec<Guard>,
        writes: Vec<Write>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Vec<u64>, WriteError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Txn(Txn { guards, writes, reply, permit }))?;
        answer.await.unwrap_or(Err(StoreError::Closed.into()))
    }

    fn send(&self, request: Request) -> Result<(), StoreError> {
        let queue = self.queue.lock();
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

    pub(crate) async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.ask(|reply| Request::Compact(revision, reply)).await
    }

    pub(crate) async fn flush(&self) -> Result<(), StoreError> {
        self.ask(Request::Flush).await
    }

    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        self.ask(Request::Close).await
    }
}

struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.end();
    }
}
