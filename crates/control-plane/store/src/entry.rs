//! The words of the store: entries, events, writes and ranges.
//!
//! Upstream counterpart: etcd's `mvccpb.KeyValue` and `mvccpb.Event`, `etcdserverpb.RangeRequest` and `TxnRequest`.
//! Differences: keys are UTF-8; every key written by one transaction has a revision of its own (they follow
//! each other and become visible together); there is no per-key version counter.
use std::sync::Arc;

use bytes::Bytes;

/// A key with its value at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: Arc<str>,
    pub value: Bytes,
    /// The revision of the write that gave the key this value.
    pub mod_revision: u64,
    /// The revision of the write that created the key.
    pub create_revision: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Put,
    Delete,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub kind: EventKind,
    pub key: Arc<str>,
    /// The new value; empty for a deletion.
    pub value: Bytes,
    /// The key as it was before; `None` for a creation.
    pub prev: Option<Entry>,
    pub revision: u64,
    /// The revision that created the key (for a deletion: the deleted one).
    pub create_revision: u64,
}

impl Event {
    /// The key as this event leaves it.
    pub fn after(&self) -> Option<Entry> {
        (self.kind == EventKind::Put).then(|| Entry {
            key: self.key.clone(),
            value: self.value.clone(),
            mod_revision: self.revision,
            create_revision: self.create_revision,
        })
    }
}

/// What a key must be for a transaction to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Any,
    Absent,
    /// Present, last written at this revision.
    Revision(u64),
}

impl Expect {
    pub(crate) fn holds(self, current: Option<&Entry>) -> bool {
        match self {
            Expect::Any => true,
            Expect::Absent => current.is_none(),
            Expect::Revision(r) => current.is_some_and(|e| e.mod_revision == r),
        }
    }
}

/// How soon a write reaches the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Before it is acknowledged or seen by anyone.
    Durable,
    /// With the next batch. Only for keys under [`crate::Options::deferred_prefixes`]; elsewhere it is `Durable`.
    Deferred,
}

/// A guarded change of one key.
#[derive(Debug, Clone)]
pub struct Write {
    pub key: String,
    pub expect: Expect,
    /// `None` deletes. Deleting what isn't there changes nothing and takes no revision.
    pub value: Option<Bytes>,
    pub class: Class,
}

impl Write {
    pub fn create(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), expect: Expect::Absent, value: Some(value.into()), class: Class::Durable }
    }

    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), expect: Expect::Any, value: Some(value.into()), class: Class::Durable }
    }

    pub fn update(key: impl Into<String>, revision: u64, value: impl Into<Bytes>) -> Self {
        let expect = Expect::Revision(revision);
        Self { key: key.into(), expect, value: Some(value.into()), class: Class::Durable }
    }

    pub fn delete(key: impl Into<String>, expect: Expect) -> Self {
        Self { key: key.into(), expect, value: None, class: Class::Durable }
    }

    pub fn deferred(mut self) -> Self {
        self.class = Class::Deferred;
        self
    }
}

/// A condition on a key that a transaction does not itself write.
#[derive(Debug, Clone)]
pub struct Guard {
    pub key: String,
    pub expect: Expect,
}

/// Which entries a list wants: those under `prefix`, in byte order.
#[derive(Debug, Clone, Default)]
pub struct Range {
    pub prefix: String,
    /// Begin at this key (inclusive, like upstream's continue tokens, which append a NUL to the last key seen).
    pub from: Option<String>,
    /// 0 is no limit.
    pub limit: usize,
    /// The state at this revision instead of the latest.
    pub at: Option<u64>,
}

impl Range {
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..Self::default() }
    }

    /// Continues after `key`.
    pub fn start_after(mut self, key: &str) -> Self {
        self.from = Some(format!("{key}\0"));
        self
    }

    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    pub fn at(mut self, revision: u64) -> Self {
        self.at = Some(revision);
        self
    }
}

/// The answer to a [`Range`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// There are entries after these.
    pub more: bool,
    /// How many; `None` when there are no more.
    pub remaining: Option<u64>,
    /// The revision of the state that was read.
    pub revision: u64,
}

/// Keys from `start` up to, without, `end`, as bytes.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) start: Vec<u8>,
    pub(crate) end: Vec<u8>,
}

impl Span {
    pub(crate) fn of(prefix: &str, from: Option<&str>) -> Self {
        let mut end = prefix.as_bytes().to_vec();
        match end.last_mut() {
            // No byte of UTF-8 is 0xFF, so this never overflows and never skips a key.
            Some(last) => *last += 1,
            None => end.push(0xFF),
        }
        let start = from.unwrap_or(prefix).max(prefix).as_bytes().to_vec();
        Self { start, end }
    }

    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_slice() && key < self.end.as_slice()
    }
}
