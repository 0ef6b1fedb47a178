//! Reading the file: a few connections of their own, each read a snapshot of one revision.
//!
//! Upstream counterpart: etcd's `mvcc/kvstore_txn` and its compaction and future-revision checks.
//!
//! The log answers for any revision by itself. The table of deferred keys knows the latest only; what
//! memory has of a key goes before it. What stays true: an answer is the state at one revision, whole. A read
//! of deferred keys that a commit to their table has run through is done again.
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use super::{Shared, file};
use crate::entry::{Entry, Event, Page, Range, Span};
use crate::error::{StoreError, sqlite};
use crate::memory::{self, Known, Memory};

/// Connections, and so reads of the file at once.
pub(crate) const READERS: usize = 2;
const ATTEMPTS: usize = 64;
/// The longest wait for a commit that changes deferred keys.
const SETTLE: Duration = Duration::from_secs(10);

/// Keys of a list before their values are read.
enum Found {
    Log(Arc<str>, u64),
    Deferred(Arc<str>),
    Memory(Entry),
}

impl Found {
    fn key(&self) -> &str {
        match self {
            Found::Log(key, _) | Found::Deferred(key) => key,
            Found::Memory(entry) => &entry.key,
        }
    }
}

impl Shared {
    /// The revision that a read at `at` has, if it can have it.
    pub(crate) fn readable(
        &self,
        memory: &Memory,
        at: Option<u64>,
        deferred: bool,
    ) -> Result<u64, StoreError> {
        let revision = at.unwrap_or(memory.published);
        if revision > memory.published {
            return Err(StoreError::FutureRevision { requested: revision, current: memory.published });
        }
        let oldest = if deferred { memory.compacted.max(memory.floor) } else { memory.compacted };
        if revision < oldest {
            return Err(StoreError::Compacted { compacted: oldest });
        }
        Ok(revision)
    }

    /// Runs `read` on one of the connections.
    pub(crate) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Self, &Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.reading.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let shared = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let idle = shared.readers.lock().pop();
            let connection = match idle {
                Some(connection) => connection,
                None => file::open_reader(&shared.options.path).map_err(|e| shared.error(e))?,
            };
            let answer = read(&shared, &connection);
            // A connection that met an error is not worth keeping.
            if answer.is_ok() && !shared.memory.lock().closed {
                shared.readers.lock().push(connection);
            }
            answer
        });
        task.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Runs `read` in a snapshot that holds all of one revision, again when the world moved under it.
    fn snapshot<T>(
        &self,
        c: &Connection,
        at: Option<u64>,
        deferred: bool,
        read: impl Fn(&Connection, u64) -> Result<T, StoreError>,
    ) -> Result<(T, u64), StoreError> {
        for _ in 0..ATTEMPTS {
            let (revision, epoch) = {
                let mut memory = self.memory.lock();
                if deferred && memory.epoch % 2 == 1 {
                    self.settled.wait_while_for(&mut memory, |m| m.epoch % 2 == 1, SETTLE);
                    if memory.epoch % 2 == 1 {
                        return Err(StoreError::Busy { path: self.path() });
                    }
                }
                (self.readable(&memory, at, deferred)?, memory.epoch)
            };
            let transaction = c.unchecked_transaction().map_err(|e| self.error(e))?;
            let answer = read(&transaction, revision)?;
            drop(transaction);
            let memory = self.memory.lock();
            let quiet = !deferred || (memory.epoch == epoch && memory.floor <= revision);
            if quiet && memory.compacted <= revision {
                return Ok((answer, revision));
            }
        }
        Err(StoreError::Busy { path: self.path() })
    }

    pub(crate) fn get_from_file(
        &self,
        c: &Connection,
        key: &str,
        at: Option<u64>,
    ) -> Result<(Option<Entry>, u64), StoreError> {
        let deferred = self.options.is_deferred(key);
        self.snapshot(c, at, deferred, |c, revision| {
            if !deferred {
                return file::log_get(c, key, revision).map_err(|e| self.error(e));
            }
            let entry = file::deferred_get(c, key).map_err(|e| self.error(e))?;
            match self.memory.lock().resolve(key, revision) {
                Known::Yes(state) => Ok(state),
                Known::No => Ok(entry),
            }
        })
    }

    pub(crate) fn range_from_file(&self, c: &Connection, range: &Range) -> Result<Page, StoreError> {
        let deferred = self.options.may_be_deferred(&range.prefix);
        let span = Span::of(&range.prefix, range.from.as_deref());
        let limit = range.limit;
        let ((entries, remaining), revision) = self.snapshot(c, range.at, deferred, |c, revision| {
            let wanted = if limit == 0 { 0 } else { limit.saturating_add(1) };
            let mut found = Vec::new();
            if !self.options.all_deferred(&range.prefix) {
                let keys = file::log_keys(c, &span, revision, wanted).map_err(|e| self.error(e))?;
                found.extend(keys.into_iter().map(|(k, r)| Found::Log(k, r)));
            }
            let mut remaining = 0;
            if limit > 0 && found.len() > limit {
                let rest = Span { start: found[limit].key().as_bytes().to_vec(), end: span.end.clone() };
                remaining = file::log_count(c, &rest, revision).map_err(|e| self.error(e))?;
                found.truncate(limit);
            }
            if deferred {
                let known = self.deferred_keys(c, &span, revision)?;
                found.extend(known);
                found.sort_unstable_by(|a, b| a.key().cmp(b.key()));
                if limit > 0 && found.len() > limit {
                    remaining += (found.len() - limit) as u64;
                    found.truncate(limit);
                }
            }
            let mut entries = Vec::with_capacity(found.len());
            for f in found {
                let entry = match f {
                    Found::Memory(entry) => Some(entry),
                    Found::Log(key, revision) => {
                        file::log_entry(c, &key, revision).map_err(|e| self.error(e))?
                    }
                    Found::Deferred(key) => file::deferred_get(c, &key).map_err(|e| self.error(e))?,
                };
                entries.extend(entry);
            }
            Ok((entries, remaining))
        })?;
        let remaining = (remaining > 0).then_some(remaining);
        Ok(Page { entries, more: remaining.is_some(), remaining, revision })
    }

    /// The deferred keys of `span` as they were at `revision`, in order.
    fn deferred_keys(&self, c: &Connection, span: &Span, revision: u64) -> Result<Vec<Found>, StoreError> {
        let mut keys = file::deferred_keys(c, span).map_err(|e| self.error(e))?;
        let memory = self.memory.lock();
        keys.extend(memory.keys(span).into_iter().filter(|k| self.options.is_deferred(k)));
        keys.sort_unstable();
        keys.dedup();
        let found = keys.into_iter().filter_map(|key| match memory.resolve(&key, revision) {
            Known::Yes(state) => state.map(Found::Memory),
            Known::No => Some(Found::Deferred(key)),
        });
        Ok(found.collect())
    }

    pub(crate) fn count_in_file(&self, c: &Connection, prefix: &str) -> Result<u64, StoreError> {
        let deferred = self.options.may_be_deferred(prefix);
        let span = Span::of(prefix, None);
        let counted = self.snapshot(c, None, deferred, |c, revision| {
            let mut count = 0;
            if !self.options.all_deferred(prefix) {
                count = file::log_count(c, &span, revision).map_err(|e| self.error(e))?;
            }
            if deferred {
                count += self.deferred_keys(c, &span, revision)?.len() as u64;
            }
            Ok(count)
        })?;
        Ok(counted.0)
    }

    /// The changes under `prefix` from `start` to the latest, as far as one batch goes, and up to which
    /// revision they are complete.
    pub(crate) fn history_from_file(
        &self,
        c: &Connection,
        prefix: &str,
        start: u64,
        limit: usize,
        limit_bytes: usize,
    ) -> Result<(Vec<Event>, u64), StoreError> {
        let end = self.memory.lock().published;
        let span = Span::of(prefix, None);
        let (mut events, more) =
            file::log_events(c, &span, (start, end), limit, limit_bytes).map_err(|e| self.error(e))?;
        let compacted = self.memory.lock().compacted;
        // Rows that were compacted away meanwhile would be missing from the middle.
        if start <= compacted {
            return Err(StoreError::Compacted { compacted });
        }
        let through = if more { events.last().map_or(end, |e| e.revision) } else { end };
        events.retain(|e| memory::sees(prefix, &e.key));
        Ok((events, through))
    }

    pub(crate) fn error(&self, e: rusqlite::Error) -> StoreError {
        sqlite(&self.options.path, e)
    }
}
