//! What the store holds in memory: the recent changes, the deferred writes not yet on disk, and who watches.
//!
//! Upstream counterpart: etcd's `watchableStore` (synced and unsynced watchers) and its `treeIndex`.
//!
//! What stays true: everything is changed under one lock, by one hand (the file's sequencer, or the one watch of
//! etcd), a whole batch at a time, so a reader sees all of a transaction or nothing. `ring` holds every change of
//! every key after `floor`. A watcher costs no queue: it remembers where its next change may be, and reads the ring
//! (or, where the ring has moved on, the file), so a slow one cannot hold up anyone else. Plain keys are seen only
//! by who asks for them.
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::entry::{Entry, Event, Span};

/// What a change costs in memory besides its bytes.
const EVENT_OVERHEAD_BYTES: usize = 256;
/// Keys that are no objects: bootstrap data, counters.
pub(crate) const PLAIN_PREFIX: &str = "/sampan/";

/// Whether who watches `prefix` sees `key`.
pub(crate) fn sees(prefix: &str, key: &str) -> bool {
    key.starts_with(prefix) && (prefix.starts_with(PLAIN_PREFIX) || !key.starts_with(PLAIN_PREFIX))
}

pub(crate) struct Dirty {
    pub(crate) revision: u64,
    pub(crate) after: Option<Entry>,
}

pub(crate) struct Watcher {
    prefix: Arc<str>,
    /// Changes up to this one are not wanted.
    from: u64,
    /// No undelivered change is older than this; 0 when there is none.
    pub(crate) pending: u64,
    /// All changes up to this one were handed out and dealt with.
    pub(crate) delivered: u64,
    /// The consumer is dealing with the last batch.
    pub(crate) busy: bool,
    /// The consumer waits, also for revisions that bring it nothing.
    pub(crate) counts: bool,
    /// There is a gap in what came after the last batch.
    pub(crate) lost: bool,
    pub(crate) wake: Arc<Notify>,
    pub(crate) idle: Arc<Notify>,
}

/// What memory knows of a key at a revision.
pub(crate) enum Known {
    Yes(Option<Entry>),
    /// Ask the file.
    No,
}

pub(crate) struct Memory {
    pub(crate) published: u64,
    pub(crate) compacted: u64,
    /// The newest change that is no longer in the ring.
    pub(crate) floor: u64,
    ring: VecDeque<Event>,
    ring_bytes: usize,
    ring_limit_bytes: usize,
    index: BTreeMap<Arc<str>, VecDeque<u64>>,
    pub(crate) dirty: BTreeMap<Arc<str>, Dirty>,
    pub(crate) dirty_bytes: usize,
    pub(crate) watchers: HashMap<u64, Watcher>,
    next_watcher: u64,
    /// Odd while a commit changes the table of deferred keys; readers of that table compare it.
    pub(crate) epoch: u64,
    pub(crate) closed: bool,
}

impl Memory {
    pub(crate) fn new(published: u64, compacted: u64, ring_limit_bytes: usize) -> Self {
        Self {
            published,
            compacted,
            floor: published,
            ring: VecDeque::new(),
            ring_bytes: 0,
            ring_limit_bytes,
            index: BTreeMap::new(),
            dirty: BTreeMap::new(),
            dirty_bytes: 0,
            watchers: HashMap::new(),
            next_watcher: 0,
            epoch: 0,
            closed: false,
        }
    }

    /// The key as the last published write left it.
    pub(crate) fn latest(&self, key: &str) -> Known {
        self.resolve(key, self.published)
    }

    /// The key at `at`, where memory alone can tell.
    pub(crate) fn resolve(&self, key: &str, at: u64) -> Known {
        let Some(revisions) = self.index.get(key) else {
            return match self.dirty.get(key) {
                Some(d) if d.revision <= at => Known::Yes(d.after.clone()),
                _ => Known::No,
            };
        };
        let newer = revisions.partition_point(|r| *r <= at);
        if newer > 0 {
            return self.event(revisions[newer - 1]).map_or(Known::No, |e| Known::Yes(e.after()));
        }
        match revisions.front().and_then(|r| self.event(*r)) {
            // All we have is newer: the oldest tells what was before it.
            Some(e) if at >= self.floor || e.prev.as_ref().is_some_and(|p| p.mod_revision <= at) => {
                Known::Yes(e.prev.clone())
            }
            _ => Known::No,
        }
    }

    fn event(&self, revision: u64) -> Option<&Event> {
        self.ring.binary_search_by_key(&revision, |e| e.revision).ok().and_then(|i| self.ring.get(i))
    }

    /// The keys of `span` about which memory knows something.
    pub(crate) fn keys(&self, span: &Span) -> Vec<Arc<str>> {
        // The span's end need not be UTF-8, so the upper bound is checked key by key.
        let Ok(start) = std::str::from_utf8(&span.start) else { return Vec::new() };
        let bounds = (Bound::Included(start), Bound::Unbounded);
        let recent = self.index.range::<str, _>(bounds).map(|(k, _)| k);
        let dirty = self.dirty.range::<str, _>(bounds).map(|(k, _)| k);
        let mut keys: Vec<_> = recent.take_while(|k| span.contains(k.as_bytes())).cloned().collect();
        keys.extend(dirty.take_while(|k| span.contains(k.as_bytes())).cloned());
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Makes `events` visible, all at once; `deferred` says of each whether it still has to reach the disk.
    /// Returns who has to be woken.
    pub(crate) fn publish(&mut self, events: Vec<(Event, bool)>) -> Vec<Arc<Notify>> {
        let mut wake = Vec::new();
        for (event, deferred) in events {
            self.forget_dirty(&event.key, u64::MAX);
            if deferred {
                self.dirty_bytes += event.key.len() + event.value.len();
                let dirty = Dirty { revision: event.revision, after: event.after() };
                self.dirty.insert(event.key.clone(), dirty);
            }
            for watcher in self.watchers.values_mut() {
                if watcher.pending == 0 && event.revision > watcher.from && sees(&watcher.prefix, &event.key)
                {
                    watcher.pending = event.revision;
                    wake.push(watcher.wake.clone());
                }
            }
            self.published = event.revision;
            self.ring_bytes += cost(&event);
            self.index.entry(event.key.clone()).or_default().push_back(event.revision);
            self.ring.push_back(event);
        }
        wake.extend(self.counting());
        while self.ring_bytes > self.ring_limit_bytes {
            let Some(oldest) = self.ring.pop_front() else { break };
            self.floor = oldest.revision;
            self.ring_bytes -= cost(&oldest);
            if let Some(revisions) = self.index.get_mut(&oldest.key) {
                revisions.pop_front();
                if revisions.is_empty() {
                    self.index.remove(&oldest.key);
                }
            }
        }
        wake
    }

    /// Who waits for revisions and has no change to be woken for.
    fn counting(&self) -> impl Iterator<Item = Arc<Notify>> {
        self.watchers.values().filter(|w| w.counts && w.pending == 0).map(|w| w.wake.clone())
    }

    /// Everything up to `revision` is published: what came last was nothing that is kept here.
    pub(crate) fn advance(&mut self, revision: u64) -> Vec<Arc<Notify>> {
        if revision <= self.published {
            return Vec::new();
        }
        self.published = revision;
        self.counting().collect()
    }

    /// Begins anew at `revision` (which may be lower than before): what happened up to it is not known, so every
    /// watch ends.
    pub(crate) fn gap(&mut self, revision: u64) -> Vec<Arc<Notify>> {
        self.ring.clear();
        self.ring_bytes = 0;
        self.index.clear();
        (self.published, self.floor) = (revision, revision);
        self.compacted = self.compacted.min(revision);
        for watcher in self.watchers.values_mut() {
            watcher.lost = true;
            watcher.idle.notify_waiters();
        }
        self.watchers.values().map(|w| w.wake.clone()).collect()
    }

    /// No more changes will come.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        for watcher in self.watchers.values() {
            watcher.wake.notify_one();
            watcher.idle.notify_waiters();
        }
    }

    /// The disk has `key` as it was at `revision`.
    pub(crate) fn forget_dirty(&mut self, key: &str, revision: u64) {
        if self.dirty.get(key).is_some_and(|d| d.revision <= revision)
            && let Some(d) = self.dirty.remove(key)
        {
            self.dirty_bytes -= key.len() + d.after.map_or(0, |e| e.value.len());
        }
    }

    pub(crate) fn ring_bytes(&self) -> usize {
        self.ring_bytes
    }

    pub(crate) fn add_watcher(&mut self, prefix: &str, from: u64) -> u64 {
        self.next_watcher += 1;
        let pending = if from >= self.published {
            0
        } else if from >= self.floor {
            self.first_match(prefix, from)
        } else {
            from + 1
        };
        let watcher = Watcher {
            prefix: prefix.into(),
            from,
            pending,
            delivered: from,
            busy: false,
            counts: false,
            lost: false,
            wake: Arc::default(),
            idle: Arc::default(),
        };
        self.watchers.insert(self.next_watcher, watcher);
        self.next_watcher
    }

    /// The first change after `from` under `prefix` in the ring; 0 when there is none.
    pub(crate) fn first_match(&self, prefix: &str, from: u64) -> u64 {
        let start = self.ring.partition_point(|e| e.revision <= from);
        self.ring.range(start..).find(|e| sees(prefix, &e.key)).map_or(0, |e| e.revision)
    }

    /// Changes under `prefix` from revision `start` on: about `limit` of them or `limit_bytes`, each revision whole.
    pub(crate) fn recent(&self, prefix: &str, start: u64, limit: usize, limit_bytes: usize) -> Vec<Event> {
        let mut bytes = 0;
        let first = self.ring.partition_point(|e| e.revision < start);
        let mut taken: Vec<Event> = Vec::new();
        for event in self.ring.range(first..).filter(|e| sees(prefix, &e.key)) {
            let whole = taken.last().is_none_or(|last| last.revision != event.revision);
            if whole && (taken.len() >= limit || bytes >= limit_bytes) {
                break;
            }
            bytes += cost(event);
            taken.push(event.clone());
        }
        taken
    }
}

fn cost(event: &Event) -> usize {
    let prev = event.prev.as_ref().map_or(0, |p| p.value.len());
    event.key.len() + event.value.len() + prev + EVENT_OVERHEAD_BYTES
}
