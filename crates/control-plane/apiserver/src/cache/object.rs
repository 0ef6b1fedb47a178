//! What the watch cache holds: objects, changes, and the encodings of changes that watchers share.
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::Value;

use crate::negotiate::Output;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::Result;
use crate::storage::{self, Storage};

/// One object as stored, and what selectors ask of it.
#[derive(Debug)]
pub struct Object {
    /// The store's key.
    pub key: Arc<str>,
    pub bytes: Bytes,
    pub revision: u64,
    /// Where in `key` the namespace (or the name of a cluster's resource) begins.
    scope_at: usize,
    namespaced: bool,
    labels: Box<[(Box<str>, Box<str>)]>,
    fields: Box<[(&'static str, String)]>,
}

impl Object {
    pub fn new(storage: &Storage, key: Arc<str>, bytes: Bytes, revision: u64) -> Self {
        let object: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let labels = object.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten();
        let labels =
            labels.filter_map(|(key, value)| Some((key.as_str().into(), value.as_str()?.into()))).collect();
        Self {
            scope_at: storage.prefix.len(),
            namespaced: storage.namespaced,
            labels,
            fields: (storage.rules.selectable)(&object).into(),
            key,
            bytes,
            revision,
        }
    }

    pub fn namespace(&self) -> &str {
        match self.namespaced {
            true => self.key[self.scope_at..].split('/').next().unwrap_or(""),
            false => "",
        }
    }

    pub fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or("")
    }

    /// The key without the resource's prefix.
    pub fn short_key(&self) -> &str {
        &self.key[self.scope_at..]
    }

    pub fn value(&self, storage: &Storage) -> Result<Value> {
        storage::decode(storage, &self.bytes, self.revision)
    }

    fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(k, _)| **k == *key).map(|(_, v)| &**v)
    }

    fn field(&self, field: &str) -> &str {
        match field {
            "metadata.name" => self.name(),
            "metadata.namespace" => self.namespace(),
            _ => self.fields.iter().find(|(k, _)| *k == field).map_or("", |(_, v)| v),
        }
    }
}

/// Which objects a request is about.
#[derive(Clone, Debug, Default)]
pub struct Predicate {
    /// "" is every namespace.
    pub namespace: String,
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

impl Predicate {
    pub fn matches(&self, object: &Object) -> bool {
        (self.namespace.is_empty() || object.namespace() == self.namespace)
            && self.labels.matches(|key| object.label(key))
            && self.fields.matches(|field| object.field(field))
    }

    /// Neither labels nor fields are selected on.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }
}

/// What a watcher is told of a change; what it is depends on its selectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeType {
    Added,
    Modified,
    Deleted,
}

impl ChangeType {
    pub fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// How a change was encoded: for which served version, in which form, as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodingKey {
    /// The served resource's number in the registry.
    pub resource: u32,
    pub output: Output,
    pub change: ChangeType,
}

/// So many encodings of one change are kept.
const ENCODINGS_MAX: usize = 8;

/// One change of one object.
#[derive(Debug)]
pub struct Change {
    pub revision: u64,
    /// The object after the change; None for a deletion.
    pub after: Option<Arc<Object>>,
    pub before: Option<Arc<Object>>,
    encodings: Mutex<Vec<(EncodingKey, Bytes)>>,
}

impl Change {
    pub fn new(revision: u64, after: Option<Arc<Object>>, before: Option<Arc<Object>>) -> Self {
        Self { revision, after, before, encodings: Mutex::new(Vec::new()) }
    }

    /// What a watcher with that predicate sees: nothing, or the change's type with the object to show.
    pub fn seen_by(&self, predicate: &Predicate) -> Option<(ChangeType, &Arc<Object>)> {
        let was = self.before.as_ref().filter(|object| predicate.matches(object));
        let is = self.after.as_ref().filter(|object| predicate.matches(object));
        match (was, is) {
            (None, None) => None,
            (None, Some(object)) => Some((ChangeType::Added, object)),
            (Some(_), Some(object)) => Some((ChangeType::Modified, object)),
            (Some(object), None) => Some((ChangeType::Deleted, object)),
        }
    }

    /// The encoding under `key`, made once and shared by all who watch alike.
    pub fn encoding(&self, key: EncodingKey, make: impl FnOnce() -> Result<Bytes>) -> Result<Bytes> {
        let mut encodings = self.encodings.lock();
        if let Some((_, bytes)) = encodings.iter().find(|(k, _)| *k == key) {
            return Ok(bytes.clone());
        }
        let bytes = make()?;
        if encodings.len() < ENCODINGS_MAX {
            encodings.push((key, bytes.clone()));
        }
        Ok(bytes)
    }

    /// About what the change keeps in memory.
    pub fn size_bytes(&self) -> usize {
        let of = |object: &Option<Arc<Object>>| object.as_ref().map_or(0, |object| object.bytes.len() + 256);
        of(&self.after) + of(&self.before)
    }
}
