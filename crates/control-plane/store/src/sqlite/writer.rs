//! The sequencer: one thread that checks guards, gives revisions, commits and publishes.
//!
//! Upstream counterpart: etcd's apply loop with its batched backend transaction.
//!
//! It drains its queue into one transaction, syncs once, publishes the batch and only then answers, so whoever
//! has an answer also reads their write. What stays true: a durable change is on disk before anyone sees it;
//! changes are published in the order of their revisions; a revision once given is never given again, not even
//! when its commit failed. With nothing waiting (no deferred write, nothing to compact) the thread sleeps.
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};
use sampan_world::clock;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::Shared;
use super::file::{self, Opened};
use crate::entry::{Class, Entry, Event, EventKind, Guard, Write};
use crate::error::{StoreError, WriteError, sqlite};
use crate::memory::Known;

/// Revisions reserved on disk at a time: a crash may skip so many.
const RESERVED_BLOCK: u64 = 4096;
/// One transaction takes at most so many requests ...
const BATCH_REQUESTS: usize = 512;
/// ... or about so many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// Deferred writes wait in at most so much memory while the disk takes none.
const DIRTY_LIMIT_BYTES: usize = 4 << 20;
const DIRTY_FLUSH_BYTES: usize = 1 << 20;
/// Compaction holds up writes for so many rows at a time.
const COMPACT_ROWS: u64 = 500;
/// Fewer rows than this are not worth the writing that takes them off the disk, …
const LAZY_ROWS: u64 = 64;
/// … for so long.
const LAZY: Duration = Duration::from_secs(3600);
const VACUUM_PAGES: u32 = 256;
/// How long a failed flush or compaction waits.
const RETRY: Duration = Duration::from_secs(10);

pub(crate) type WriteReply = oneshot::Sender<Result<Vec<u64>, WriteError>>;

pub(crate) struct Txn {
    pub(crate) guards: Vec<Guard>,
    pub(crate) writes: Vec<Write>,
    pub(crate) reply: WriteReply,
    /// Its share of the queue.
    pub(crate) permit: OwnedSemaphorePermit,
}

pub(crate) enum Request {
    Txn(Txn),
    Compact(u64, oneshot::Sender<Result<(), StoreError>>),
    Flush(oneshot::Sender<Result<(), StoreError>>),
    Close(oneshot::Sender<Result<(), StoreError>>),
}

/// A change that has its revision but is not yet visible.
struct Staged {
    event: Event,
    /// Belongs to the table of deferred keys.
    deferred_key: bool,
    /// Reaches the disk later.
    deferred: bool,
}

pub(crate) struct Writer {
    connection: Connection,
    shared: Arc<Shared>,
    last_given: u64,
    reserved: u64,
    /// Compacted on disk.
    compacted: u64,
    last_row: u64,
    /// Rows of the log written since what is compacted, and those of them before `compact_mark`.
    rows: u64,
    marked_rows: u64,
    /// Rows that nobody may read any more and that are still on disk, at most; and until when they may be.
    forgotten_rows: u64,
    lazy_until: Instant,
    flush_at: Option<Instant>,
    /// The disk has just failed to take a flush.
    flush_not_before: Option<Instant>,
    compact_at: Option<Instant>,
    /// What was the latest revision when the last compaction interval began.
    compact_mark: u64,
    _lock: File,
}

impl Writer {
    pub(crate) fn new(opened: Opened, shared: Arc<Shared>) -> Self {
        Self {
            connection: opened.connection,
            shared,
            last_given: opened.meta.reserved,
            reserved: opened.meta.reserved,
            compacted: opened.meta.compacted,
            last_row: opened.meta.last_row,
            // What a former run left is compacted by the clock alone.
            rows: 0,
            marked_rows: 0,
            forgotten_rows: 0,
            lazy_until: clock::monotonic() + LAZY,
            flush_at: None,
            flush_not_before: None,
            compact_at: None,
            compact_mark: opened.meta.reserved,
            _lock: opened.lock,
        }
    }

    pub(crate) fn run(mut self, queue: &Receiver<Request>) {
        if self.last_row > self.compacted {
            self.compact_at = Some(clock::monotonic() + self.shared.options.compact_interval);
        }
        let mut close = None;
        loop {
            let first = match self.next_deadline() {
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => queue.recv_timeout(at.saturating_duration_since(clock::monotonic())),
            };
            let mut control = None;
            let mut batch = Vec::new();
            match first {
                Ok(request) => gather(request, queue, &mut batch, &mut control),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.process(batch);
            match control {
                None | Some(Request::Txn(_)) => {}
                Some(Request::Flush(reply)) => drop(reply.send(self.flush())),
                Some(Request::Compact(revision, reply)) => drop(reply.send(self.compact_to(revision))),
                Some(Request::Close(reply)) => {
                    close = Some(reply);
                    break;
                }
            }
            self.compact_when_due();
        }
        let ended = self.end();
        if let Some(reply) = close {
            drop(reply.send(ended));
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.flush_at.into_iter().chain(self.compact_at).min()
    }

    /// Stages, commits, publishes and answers; then flushes when that is due.
    fn process(&mut self, batch: Vec<Txn>) {
        let mut staged = Vec::new();
        let mut view = HashMap::new();
        let mut answers = Vec::with_capacity(batch.len());
        let mut permits = Vec::with_capacity(batch.len());
        for txn in batch {
            let answer = self.stage(&txn.guards, txn.writes, &mut view, &mut staged);
            answers.push((txn.reply, answer));
            permits.push(txn.permit);
        }
        // With nothing staged there are only conflicts and failed look-ups.
        let nothing = staged.is_empty();
        if !nothing && let Err(e) = self.commit_and_publish(staged, false) {
            tracing::warn!(error = %e, "the store cannot write");
            // Conflicts too were found against changes that now never happened.
            for (reply, _) in answers {
                drop(reply.send(Err(e.clone().into())));
            }
        } else {
            for (reply, answer) in answers {
                drop(reply.send(answer));
            }
        }
        // On its own, so that a disk that takes nothing does not fail writes that need none.
        if self.flush_due()
            && let Err(e) = self.flush()
        {
            tracing::warn!(error = %e, "the store cannot bring deferred writes to disk");
            self.flush_at = Some(clock::monotonic() + RETRY);
            self.flush_not_before = self.flush_at;
        }
    }

    /// Checks a transaction against what is published and staged, and stages its changes: all or none.
    fn stage(
        &mut self,
        guards: &[Guard],
        writes: Vec<Write>,
        view: &mut HashMap<Arc<str>, Option<Entry>>,
        staged: &mut Vec<Staged>,
    ) -> Result<Vec<u64>, WriteError> {
        let mut current = Vec::with_capacity(writes.len());
        for guard in guards {
            check(&guard.key, guard.expect, &self.current(&guard.key, view)?)?;
        }
        for write in &writes {
            let now = self.current(&write.key, view)?;
            check(&write.key, write.expect, &now)?;
            current.push(now);
        }
        let full = self.shared.memory.lock().dirty_bytes > DIRTY_LIMIT_BYTES;
        if full && let Some(write) = writes.iter().find(|w| self.is_deferred(w)) {
            let detail = format!("too many writes wait for the disk, {} among them", write.key);
            return Err(StoreError::Full { path: self.shared.path(), detail }.into());
        }
        let mut revisions = Vec::with_capacity(writes.len());
        for (write, prev) in writes.into_iter().zip(current) {
            if write.value.is_none() && prev.is_none() {
                revisions.push(self.last_given.max(self.shared.memory.lock().published));
                continue;
            }
            let deferred = self.is_deferred(&write);
            self.last_given += 1;
            let event = Event {
                kind: if write.value.is_some() { EventKind::Put } else { EventKind::Delete },
                key: prev.as_ref().map_or_else(|| write.key.as_str().into(), |p| p.key.clone()),
                create_revision: prev.as_ref().map_or(self.last_given, |p| p.create_revision),
                value: write.value.unwrap_or_default(),
                prev,
                revision: self.last_given,
            };
            revisions.push(event.revision);
            view.insert(event.key.clone(), event.after());
            staged.push(Staged {
                deferred_key: self.shared.options.is_deferred(&event.key),
                event,
                deferred,
            });
        }
        Ok(revisions)
    }

    fn is_deferred(&self, write: &Write) -> bool {
        write.class == Class::Deferred && self.shared.options.is_deferred(&write.key)
    }

    fn current(
        &self,
        key: &str,
        view: &HashMap<Arc<str>, Option<Entry>>,
    ) -> Result<Option<Entry>, StoreError> {
        if let Some(state) = view.get(key) {
            return Ok(state.clone());
        }
        if let Known::Yes(state) = self.shared.memory.lock().latest(key) {
            return Ok(state);
        }
        let found = if self.shared.options.is_deferred(key) {
            file::deferred_get(&self.connection, key)
        } else {
            file::log_get(&self.connection, key, u64::MAX)
        };
        found.map_err(|e| self.error(e))
    }

    fn flush_due(&self) -> bool {
        let now = clock::monotonic();
        let memory = self.shared.memory.lock();
        !memory.dirty.is_empty()
            && self.flush_not_before.is_none_or(|at| at <= now)
            && (memory.dirty.len() >= self.shared.options.flush_after_keys
                || memory.dirty_bytes >= DIRTY_FLUSH_BYTES
                || self.flush_at.is_some_and(|at| at <= now))
    }

    fn commit_and_publish(&mut self, staged: Vec<Staged>, flush: bool) -> Result<(), StoreError> {
        let durable = staged.iter().any(|s| !s.deferred);
        let needed = self.last_given > self.reserved;
        let deferred_table = flush || staged.iter().any(|s| s.deferred_key && !s.deferred);
        let flushed = if flush { self.dirty() } else { Vec::new() };
        if durable || flush || needed {
            if deferred_table {
                self.shared.memory.lock().epoch += 1;
            }
            let committed = self.commit(&staged, &flushed);
            if deferred_table && committed.is_err() {
                self.shared.memory.lock().epoch += 1;
                self.shared.settled.notify_all();
            }
            committed?;
        }
        for s in staged.iter().filter(|s| !s.deferred && !s.deferred_key) {
            self.last_row = s.event.revision;
            self.rows += 1;
        }
        let shared = self.shared.clone();
        let wake = {
            let mut memory = shared.memory.lock();
            for (key, revision, _) in &flushed {
                memory.forget_dirty(key, *revision);
            }
            let wake = memory.publish(staged.into_iter().map(|s| (s.event, s.deferred)).collect());
            if deferred_table {
                memory.epoch += 1;
            }
            self.schedule(memory.dirty.is_empty(), memory.published);
            wake
        };
        if deferred_table {
            shared.settled.notify_all();
        }
        for watcher in wake {
            watcher.notify_one();
        }
        Ok(())
    }

    fn schedule(&mut self, all_flushed: bool, published: u64) {
        let options = &self.shared.options;
        if all_flushed {
            self.flush_at = None;
        } else if self.flush_at.is_none_or(|at| at <= clock::monotonic()) {
            self.flush_at = Some(clock::monotonic() + options.flush_interval);
        }
        if self.compact_at.is_none() && published > self.compact_mark {
            self.compact_at = Some(clock::monotonic() + options.compact_interval);
        }
    }

    fn dirty(&self) -> Vec<(Arc<str>, u64, Option<Entry>)> {
        let memory = self.shared.memory.lock();
        memory.dirty.iter().map(|(k, d)| (k.clone(), d.revision, d.after.clone())).collect()
    }

    fn commit(
        &mut self,
        staged: &[Staged],
        flushed: &[(Arc<str>, u64, Option<Entry>)],
    ) -> Result<(), StoreError> {
        match self.try_commit(staged, flushed) {
            Err(StoreError::Full { .. }) => {
                // The WAL may give back what the file already has room for.
                drop(file::checkpoint(&self.connection, true));
                self.try_commit(staged, flushed)
            }
            other => other,
        }
    }

    fn try_commit(
        &mut self,
        staged: &[Staged],
        flushed: &[(Arc<str>, u64, Option<Entry>)],
    ) -> Result<(), StoreError> {
        // Half a block is left over when the next one is reserved, so that this rarely costs a sync of its own.
        let reserve = self.last_given + RESERVED_BLOCK / 2 > self.reserved;
        let reserved = if reserve { self.last_given + RESERVED_BLOCK } else { self.reserved };
        let written = (|| {
            let t = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            if reserve {
                file::reserve(&t, reserved)?;
            }
            for (key, _, after) in flushed {
                file::set_deferred(&t, key, after.as_ref())?;
            }
            for s in staged.iter().filter(|s| !s.deferred) {
                if s.deferred_key {
                    file::set_deferred(&t, &s.event.key, s.event.after().as_ref())?;
                } else {
                    file::append(&t, &s.event)?;
                }
            }
            t.commit()
        })();
        written.map_err(|e| self.error(e))?;
        self.reserved = reserved;
        self.shared.commits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if self.shared.memory.lock().dirty.is_empty() {
            return Ok(());
        }
        self.commit_and_publish(Vec::new(), true)
    }

    fn compact_when_due(&mut self) {
        let options = &self.shared.options;
        let published = self.shared.memory.lock().published;
        let target = if self.rows > options.compact_after_revisions {
            // Half of what may be kept stays, so that this is not done at every write.
            self.rows = options.compact_after_revisions / 2;
            self.marked_rows = self.marked_rows.min(self.rows);
            published.saturating_sub(options.compact_after_revisions / 2)
        } else if self.compact_at.is_some_and(|at| at <= clock::monotonic()) {
            let mark = std::mem::replace(&mut self.compact_mark, published);
            self.rows -= self.marked_rows;
            self.forgotten_rows += self.marked_rows;
            self.marked_rows = self.rows;
            let again = published > mark || self.last_row > self.compacted.max(mark);
            self.compact_at = again.then(|| clock::monotonic() + options.compact_interval);
            if self.forgotten_rows < LAZY_ROWS && clock::monotonic() < self.lazy_until {
                let mut memory = self.shared.memory.lock();
                memory.compacted = memory.compacted.max(mark);
                return;
            }
            mark
        } else {
            return;
        };
        if let Err(e) = self.compact_to(target) {
            tracing::warn!(error = %e, "the store cannot compact its history");
            self.compact_at = Some(clock::monotonic() + RETRY);
        }
    }

    fn compact_to(&mut self, target: u64) -> Result<(), StoreError> {
        {
            let mut memory = self.shared.memory.lock();
            if target > memory.published {
                return Err(StoreError::FutureRevision { requested: target, current: memory.published });
            }
            // First nobody may begin to read the old, then it goes.
            memory.compacted = memory.compacted.max(target);
        }
        // An idle cluster renews leases only; they have no rows here, so nothing is written for them.
        if self.last_row <= self.compacted {
            return Ok(());
        }
        while self.compacted < target {
            let done = file::compact(&mut self.connection, self.compacted, target, COMPACT_ROWS);
            self.compacted = done.map_err(|e| self.error(e))?;
        }
        self.forgotten_rows = 0;
        self.lazy_until = clock::monotonic() + LAZY;
        while file::vacuum(&self.connection, VACUUM_PAGES).map_err(|e| self.error(e))? {}
        Ok(())
    }

    /// The clean end: everything is on disk and no revision is skipped at the next start.
    fn end(mut self) -> Result<(), StoreError> {
        let flushed = self.flush();
        let ended = flushed.and_then(|()| {
            if self.reserved > self.last_given {
                file::mark_clean(&self.connection, self.last_given).map_err(|e| self.error(e))?;
            }
            Ok(())
        });
        if let Err(e) = &ended {
            tracing::warn!(error = %e, "the store ended without its last deferred writes");
        }
        drop(file::checkpoint(&self.connection, true));
        let shared = self.shared.clone();
        drop(self);
        shared.end();
        ended
    }

    fn error(&self, e: rusqlite::Error) -> StoreError {
        sqlite(&self.shared.options.path, e)
    }
}

fn check(key: &str, expect: crate::entry::Expect, current: &Option<Entry>) -> Result<(), WriteError> {
    if expect.holds(current.as_ref()) {
        return Ok(());
    }
    Err(WriteError::Conflict { key: key.to_owned(), current: current.clone() })
}

/// Takes what waits, up to a transaction's worth or the first request that isn't a write.
fn gather(first: Request, queue: &Receiver<Request>, batch: &mut Vec<Txn>, control: &mut Option<Request>) {
    let mut next = Some(first);
    let mut bytes = 0;
    while let Some(request) = next {
        let Request::Txn(txn) = request else {
            *control = Some(request);
            return;
        };
        bytes += txn.writes.iter().map(|w| w.value.as_ref().map_or(0, |v| v.len())).sum::<usize>();
        batch.push(txn);
        if batch.len() >= BATCH_REQUESTS || bytes >= BATCH_BYTES {
            return;
        }
        next = queue.try_recv().ok();
    }
}
