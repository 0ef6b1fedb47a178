//! metadata.managedFields: who owns which fields.
//!
//! Upstream: staging/src/k8s.io/apimachinery/pkg/util/managedfields/internal (managedfields.go, capmanagers.go,
//! stripmeta.go). What stays true: an entry that a write doesn't change keeps its bytes; an entry is known by
//! manager, operation, subresource and, for updates, API version.

use std::cmp::Ordering;

use jiff::Timestamp;
use serde_json::{Map, Value};

use super::codec;
use super::set::FieldSet;

/// Upstream's DefaultMaxUpdateManagers.
pub const MAX_UPDATE_ENTRIES: usize = 10;
/// The entry that the oldest updates end up in.
pub const OLD_UPDATES_MANAGER: &str = "ancient-changes";
/// The entry for what was there before the first apply to an object without managed fields.
pub const BEFORE_FIRST_APPLY_MANAGER: &str = "before-first-apply";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Apply,
    Update,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        }
    }
}

/// One entry of managedFields.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) manager: String,
    pub(crate) operation: Operation,
    pub(crate) api_version: String,
    pub(crate) subresource: String,
    /// As the object carries it.
    pub(crate) time: Option<String>,
    pub(crate) set: FieldSet,
    /// As it was read; None once it differs from that.
    written: Option<Value>,
}

impl Entry {
    pub(crate) fn new(manager: &str, operation: Operation, api_version: &str, subresource: &str) -> Entry {
        Entry {
            // An entry must have a name.
            manager: if manager.is_empty() { "unknown".to_string() } else { manager.to_string() },
            operation,
            api_version: api_version.to_string(),
            subresource: subresource.to_string(),
            time: None,
            set: FieldSet::default(),
            written: None,
        }
    }

    /// Whether both are the same owner's.
    pub(crate) fn same_owner(&self, other: &Entry) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    pub(crate) fn touch(&mut self) {
        self.written = None;
    }

    pub(crate) fn stamp(&mut self, now: Timestamp) {
        self.time = Some(now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        self.touch();
    }

    fn seconds(&self) -> i64 {
        let time = self.time.as_deref().and_then(|time| time.parse::<Timestamp>().ok());
        time.map_or(0, Timestamp::as_second)
    }

    /// The order in which entries of one time, or conflicts, are listed.
    pub(crate) fn owner_order(&self, other: &Entry) -> Ordering {
        self.manager
            .cmp(&other.manager)
            .then_with(|| self.operation.cmp(&other.operation))
            .then_with(|| self.api_version.cmp(&other.api_version))
            .then_with(|| self.subresource.cmp(&other.subresource))
    }

    fn decode(index: usize, value: &Value) -> Result<Entry, String> {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_string();
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return Err("operation must be `Apply` or `Update`".to_string()),
        };
        let api_version = text("apiVersion");
        if api_version.is_empty() {
            return Err("apiVersion must not be empty".to_string());
        }
        match text("fieldsType").as_str() {
            "FieldsV1" => {}
            "" => return Err(format!("missing fieldsType in managed fields entry {index}")),
            other => return Err(format!("invalid fieldsType {other:?} in managed fields entry {index}")),
        }
        let set = match value.get("fieldsV1") {
            Some(fields) => codec::decode(fields).map_err(|error| {
                format!("error decoding versioned set of {:?}: error decoding set: {error}", text("manager"))
            })?,
            None => FieldSet::default(),
        };
        Ok(Entry {
            manager: text("manager"),
            operation,
            api_version,
            subresource: text("subresource"),
            time: value.get("time").and_then(Value::as_str).map(String::from),
            set,
            written: Some(value.clone()),
        })
    }

    fn encode(self) -> Value {
        if let Some(written) = self.written {
            return written;
        }
        let mut out = Map::new();
        out.insert("apiVersion".to_string(), self.api_version.into());
        out.insert("fieldsType".to_string(), "FieldsV1".into());
        out.insert("fieldsV1".to_string(), codec::encode(&self.set));
        if !self.manager.is_empty() {
            out.insert("manager".to_string(), self.manager.into());
        }
        out.insert("operation".to_string(), self.operation.name().into());
        if !self.subresource.is_empty() {
            out.insert("subresource".to_string(), self.subresource.into());
        }
        if let Some(time) = self.time {
            out.insert("time".to_string(), time.into());
        }
        Value::Object(out)
    }
}

/// All entries of one object.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owners {
    pub(crate) entries: Vec<Entry>,
}

impl Owners {
    /// Reads `managedFields`; of two entries of one owner the later counts.
    pub(crate) fn decode(managed_fields: Option<&Value>) -> Result<Owners, String> {
        let values = match managed_fields {
            None | Some(Value::Null) => return Ok(Owners::default()),
            Some(Value::Array(values)) => values,
            Some(_) => return Err("managedFields must be a list".to_string()),
        };
        let mut owners = Owners::default();
        for (index, value) in values.iter().enumerate() {
            let entry = Entry::decode(index, value)?;
            owners.entries.retain(|other| !other.same_owner(&entry));
            owners.entries.push(entry);
        }
        Ok(owners)
    }

    /// Sorted as upstream does: applies first, then by time, manager, version and subresource. None if empty.
    pub(crate) fn encode(mut self) -> Option<Value> {
        self.entries.sort_by(|a, b| {
            a.operation
                .cmp(&b.operation)
                .then_with(|| a.seconds().cmp(&b.seconds()))
                .then_with(|| a.manager.cmp(&b.manager))
                .then_with(|| a.api_version.cmp(&b.api_version))
                .then_with(|| a.subresource.cmp(&b.subresource))
        });
        (!self.entries.is_empty())
            .then(|| Value::Array(self.entries.into_iter().map(Entry::encode).collect()))
    }

    pub(crate) fn find(&self, owner: &Entry) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.same_owner(owner))
    }

    /// Replaces the entry of the same owner.
    pub(crate) fn put(&mut self, entry: Entry) {
        self.entries.retain(|other| !other.same_owner(&entry));
        self.entries.push(entry);
    }

    pub(crate) fn drop_empty(&mut self) {
        self.entries.retain(|entry| !entry.set.is_empty());
    }

    /// Takes fields from everyone who wrote the same version. Entries of other versions stay as they are: their
    /// sets speak of other fields.
    pub(crate) fn release(&mut self, api_version: &str, fields: &FieldSet, except: Option<&Entry>) {
        for entry in &mut self.entries {
            if entry.api_version != api_version || except.is_some_and(|owner| owner.same_owner(entry)) {
                continue;
            }
            if entry.set.subtract(fields) {
                entry.touch();
            }
        }
    }

    /// Folds the oldest updates into one entry a version until few enough are left.
    pub(crate) fn cap(&mut self) {
        let mut updates: Vec<usize> =
            (0..self.entries.len()).filter(|at| self.entries[*at].operation == Operation::Update).collect();
        if updates.len() <= MAX_UPDATE_ENTRIES {
            return;
        }
        updates.sort_by(|a, b| {
            let (a, b) = (&self.entries[*a], &self.entries[*b]);
            a.seconds().cmp(&b.seconds()).then_with(|| a.owner_order(b))
        });
        let mut left = updates.len();
        // For each version the oldest entry, which becomes the one that the others are folded into.
        let mut firsts: Vec<(String, usize)> = Vec::new();
        for at in updates {
            if left <= MAX_UPDATE_ENTRIES {
                break;
            }
            let version = self.entries[at].api_version.clone();
            let Some(&(_, first)) = firsts.iter().find(|(other, _)| *other == version) else {
                firsts.push((version, at));
                continue;
            };
            let named = Entry::new(OLD_UPDATES_MANAGER, Operation::Update, &version, "");
            let (from, into) = match self.entries.iter().position(|entry| entry.same_owner(&named)) {
                // The bucket of an earlier write itself: it takes the first one in and goes on as the first.
                Some(bucket) if bucket == at => (first, bucket),
                Some(bucket) => (at, bucket),
                None => {
                    self.entries[first].manager = named.manager;
                    self.entries[first].subresource = String::new();
                    (at, first)
                }
            };
            if let Some(known) =
                firsts.iter_mut().find(|(other, _)| *other == version).filter(|_| from == first)
            {
                known.1 = into;
            }
            let folded = std::mem::take(&mut self.entries[from].set);
            // The later of the two times.
            self.entries[into].time = self.entries[at].time.clone();
            self.entries[into].set.union(folded);
            self.entries[into].touch();
            left -= 1;
        }
        self.drop_empty();
    }
}
