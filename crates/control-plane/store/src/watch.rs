//! Following the changes under a prefix.
//!
//! Upstream counterpart: etcd's `WatchStream`, with its progress notifications.
//!
//! A watch pulls: who publishes only wakes it. Recent changes come from memory, older ones from the file. What
//! stays true: each change after `from` is delivered once, in order, or the watch ends with an error. Where there
//! is no history but in memory (deferred keys, etcd) a watch that lags behind the memory is too slow.
use std::sync::Arc;

use crate::Published;
use crate::entry::Event;
use crate::error::WatchError;
use crate::memory::Memory;
use crate::sqlite;

/// One batch is at most so many changes ...
const BATCH_EVENTS: usize = 256;
/// ... or about so many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// What [`Watch::next_batch`] gives.
#[derive(Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    /// There is no other change up to this revision.
    pub through: u64,
}

/// The changes under one prefix, from [`crate::Store::watch`].
pub struct Watch {
    memory: Published,
    /// Where changes are that memory no longer has.
    history: Option<Arc<sqlite::Shared>>,
    prefix: Arc<str>,
    id: u64,
    /// What the last batch reaches to.
    through: u64,
}

impl Watch {
    pub(crate) fn new(
        memory: Published,
        history: Option<Arc<sqlite::Shared>>,
        prefix: &str,
        from: u64,
        id: u64,
    ) -> Self {
        Self { memory, history, prefix: prefix.into(), id, through: from }
    }

    /// The next changes, at least one. Calling it says that those before have been dealt with. Dropping the
    /// future loses nothing.
    pub async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        loop {
            let batch = self.step(false).await?;
            if !batch.events.is_empty() {
                return Ok(batch.events);
            }
        }
    }

    /// Like [`Self::next`], but also tells of revisions that changed nothing under the prefix: then there are no
    /// events.
    pub async fn next_batch(&mut self) -> Result<Batch, WatchError> {
        self.step(true).await
    }

    async fn step(&mut self, counts: bool) -> Result<Batch, WatchError> {
        let shared = self.memory.clone();
        loop {
            let wake = {
                let mut memory = shared.lock();
                let (floor, published, closed) = (memory.floor, memory.published, memory.closed);
                let Some(watcher) = memory.watchers.get_mut(&self.id) else { return Err(WatchError::Closed) };
                if watcher.lost {
                    return Err(WatchError::Compacted { compacted: floor });
                }
                watcher.counts = counts;
                if watcher.busy {
                    watcher.busy = false;
                    watcher.delivered = self.through;
                }
                if watcher.pending == 0 {
                    watcher.delivered = watcher.delivered.max(published);
                    watcher.idle.notify_waiters();
                    if counts && published > self.through {
                        self.through = published;
                        return Ok(Batch { events: Vec::new(), through: published });
                    }
                    if closed {
                        return Err(WatchError::Closed);
                    }
                    Some(watcher.wake.clone())
                } else if watcher.pending > floor {
                    let start = watcher.pending;
                    let events = memory.recent(&self.prefix, start, BATCH_EVENTS, BATCH_BYTES);
                    let last = events.last().map_or(published, |e| e.revision);
                    self.advance(&mut memory, last, !events.is_empty());
                    if !events.is_empty() {
                        return Ok(Batch { events, through: self.through });
                    }
                    continue;
                } else {
                    None
                }
            };
            match (wake, &self.history) {
                (Some(wake), _) => wake.notified().await,
                (None, Some(file)) if !file.options.may_be_deferred(&self.prefix) => {
                    let events = self.catch_up(file.clone()).await?;
                    if !events.is_empty() {
                        return Ok(Batch { events, through: self.through });
                    }
                }
                _ => return Err(WatchError::TooSlow { oldest: shared.lock().floor }),
            }
        }
    }

    async fn catch_up(&mut self, file: Arc<sqlite::Shared>) -> Result<Vec<Event>, WatchError> {
        let start = self.memory.lock().watchers.get(&self.id).map_or(0, |w| w.pending);
        let prefix = self.prefix.clone();
        let read = file
            .read(move |shared, c| shared.history_from_file(c, &prefix, start, BATCH_EVENTS, BATCH_BYTES));
        let (events, through) = read.await?;
        let memory = self.memory.clone();
        self.advance(&mut memory.lock(), through, !events.is_empty());
        Ok(events)
    }

    /// Everything up to `through` is handed out (`busy`) or was nothing.
    fn advance(&mut self, memory: &mut Memory, through: u64, busy: bool) {
        let pending = if through >= memory.published {
            0
        } else if through >= memory.floor {
            memory.first_match(&self.prefix, through)
        } else {
            through + 1
        };
        // with nothing more under the prefix, what is handed out reaches to the latest
        self.through = if pending == 0 { through.max(memory.published) } else { through };
        if let Some(watcher) = memory.watchers.get_mut(&self.id) {
            watcher.pending = pending;
            watcher.busy = busy;
        }
    }

    /// A view of how far this watch has come, for others to hold.
    pub fn progress(&self) -> Progress {
        Progress { memory: self.memory.clone(), id: self.id }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(watcher) = self.memory.lock().watchers.remove(&self.id) {
            watcher.idle.notify_waiters();
        }
    }
}

/// How far a [`Watch`] has come: bookmarks and reads "not older than" stand on it.
#[derive(Clone)]
pub struct Progress {
    memory: Published,
    id: u64,
}

impl Progress {
    /// All changes up to this revision were returned by [`Watch::next`] and dealt with (it was called again).
    /// That is the store's latest revision while nothing is under way. `None` once the watch is gone.
    pub fn delivered(&self) -> Option<u64> {
        let memory = self.memory.lock();
        let watcher = memory.watchers.get(&self.id).filter(|w| !w.lost)?;
        let quiet = !watcher.busy && watcher.pending == 0;
        Some(if quiet { watcher.delivered.max(memory.published) } else { watcher.delivered })
    }

    /// Waits until everything up to `revision` is delivered.
    pub async fn reached(&self, revision: u64) -> Result<(), WatchError> {
        loop {
            let idle = {
                let memory = self.memory.lock();
                memory.watchers.get(&self.id).map(|w| w.idle.clone()).ok_or(WatchError::Closed)?
            };
            let mut changed = std::pin::pin!(idle.notified());
            changed.as_mut().enable();
            if self.delivered().ok_or(WatchError::Closed)? >= revision {
                return Ok(());
            }
            if self.memory.lock().closed {
                return Err(WatchError::Closed);
            }
            changed.await;
        }
    }
}
