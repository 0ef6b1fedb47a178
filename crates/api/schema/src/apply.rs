//! Server-side apply and the bookkeeping of who owns which field.
//!
//! Upstream: sigs.k8s.io/structured-merge-diff/v6 and staging/src/k8s.io/apimachinery/pkg/util/managedfields;
//! the handlers' part is endpoints/handlers/{create,patch}.go and fieldmanager/equality.go.
//!
//! [`track_update`] runs on every create, update and patch; [`apply`] is the apply patch. Both come before
//! defaulting and admission; [`revert_timestamps`] comes last, before the object is stored.
//!
//! What stays true: a write that changes nothing changes no entry. Differences: one version a kind is
//! converted to none other, so entries of other versions are kept as they are, neither conflicting nor giving
//! way; sets aren't rewritten when a custom resource's lists turn from granular to atomic.

mod compare;
mod conflict;
mod extract;
mod last_applied;
mod merge;
mod owners;
mod place;
mod prune;
mod reset;
mod scalar;
mod set;
mod validate;

pub mod codec;

use std::sync::LazyLock;

use jiff::Timestamp;
use serde_json::{Map, Value};

pub use conflict::Conflict;
pub use last_applied::ANNOTATION as LAST_APPLIED_ANNOTATION;
pub use owners::{BEFORE_FIRST_APPLY_MANAGER, MAX_UPDATE_ENTRIES, OLD_UPDATES_MANAGER, Operation};
pub use reset::Reset;
pub use set::{FieldSet, PathElement, show_path};

use crate::types::Type;
use owners::{Entry, Owners};
use place::Place;

/// Upstream's FieldManagerMaxLength.
pub const MAX_MANAGER_LEN_BYTES: usize = 128;

/// Who writes, and how.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// See [`manager_name`].
    pub manager: &'a str,
    /// `status`, `scale`, …; empty for the object itself.
    pub subresource: &'a str,
    /// The version that the request speaks, such as `apps/v1`.
    pub api_version: &'a str,
    pub now: Timestamp,
    /// What the resource's strategy puts back whatever a client sends: `status` for most objects themselves.
    /// Nobody owns these through this writer.
    pub reset: &'a Reset,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// 400 BadRequest.
    #[error("{0}")]
    BadRequest(String),
    /// 409 Conflict, with a cause for each one.
    #[error("{}", conflict::summary(.0))]
    Conflict(Vec<Conflict>),
    /// 500 InternalError, as upstream answers for a configuration that doesn't fit its type.
    #[error("{0}")]
    Internal(String),
}

/// What an apply makes.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    pub object: Value,
    /// False where the object is as it was, managed fields included: there is nothing to store.
    pub changed: bool,
}

/// The manager of a write: what the request says, else the program of the user agent, cut to what fits.
/// Empty where neither says anything; the entry then says "unknown".
pub fn manager_name(field_manager: &str, user_agent: &str) -> String {
    if !field_manager.is_empty() {
        return field_manager.to_string();
    }
    let mut name = String::new();
    for c in user_agent.split('/').next().unwrap_or_default().chars() {
        if !is_printable(c) {
            continue;
        }
        if name.len() + c.len_utf8() > MAX_MANAGER_LEN_BYTES {
            break;
        }
        name.push(c);
    }
    name
}

/// Near enough to Go's unicode.IsPrint for names of programs.
fn is_printable(c: char) -> bool {
    let format =
        matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
    let private = matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{f0000}'..='\u{10ffff}');
    !c.is_control() && !format && !private && (c == ' ' || !c.is_whitespace())
}

/// Records in `new` which fields this write changed. `live` is what was there before: an empty object on
/// create. On an error `new` is left without managed fields, and the write goes on, as upstream does.
pub fn track_update(ty: &Type, live: &Value, new: &mut Value, writer: &Writer<'_>) -> Result<(), String> {
    let Some(Value::Object(metadata)) = new.get_mut("metadata") else { return Ok(()) };
    let sent = metadata.remove("managedFields");
    // Through a subresource nobody sets managed fields by hand.
    let sent = sent.filter(|sent| writer.subresource.is_empty() && sent.is_array());
    let kept = live.pointer("/metadata/managedFields");
    let changes = changes(Place::Root(ty), live, new, writer)
        .map_err(|problem| format!("failed to update ManagedFields: {problem}"))?;
    if changes.is_empty() && (sent.is_none() || sent.as_ref() == kept) {
        set_managed_fields(new, kept.cloned());
        return Ok(());
    }
    let mut owners = match &sent {
        Some(sent) if is_reset(sent) => Owners::default(),
        // Clients that don't know managed fields shall not delete them by accident.
        Some(sent) => match Owners::decode(Some(sent)) {
            Ok(owners) if !owners.entries.is_empty() => owners,
            _ => Owners::decode(kept).unwrap_or_default(),
        },
        None => Owners::decode(kept).unwrap_or_default(),
    };
    let is_create = live.pointer("/metadata/uid").and_then(Value::as_str).is_none_or(str::is_empty);
    // What isn't tracked from the start doesn't begin on an update: the writer isn't the owner of all of it.
    if owners.entries.is_empty() && !is_create {
        return Ok(());
    }
    own(changes, writer, &mut owners);
    set_managed_fields(new, owners.encode());
    Ok(())
}

/// Moves the ownership of what changed to the writer.
fn own(changes: compare::Changes, writer: &Writer<'_>, owners: &mut Owners) {
    owners.release(writer.api_version, &changes.touched, None);
    owners.release(writer.api_version, &changes.removed, None);
    if !changes.touched.is_empty() {
        let mut entry = Entry::new(writer.manager, Operation::Update, writer.api_version, writer.subresource);
        if let Some(former) = owners.find(&entry) {
            entry.set = former.set.clone();
        }
        entry.set.union(changes.touched);
        entry.stamp(writer.now);
        owners.put(entry);
    }
    owners.drop_empty();
    owners.cap();
}

/// What differs and can be owned at all.
fn changes(
    place: Place<'_>,
    live: &Value,
    new: &Value,
    writer: &Writer<'_>,
) -> Result<compare::Changes, validate::Problem> {
    let mut changes = compare::compare(place, live, new)?;
    for set in [&mut changes.touched, &mut changes.removed] {
        set.subtract(&NEVER_OWNED);
        writer.reset.apply(set);
    }
    Ok(changes)
}

/// Merges `config` into `live`, which is None where the object is yet to be made.
pub fn apply(
    ty: &Type,
    live: Option<&Value>,
    config: &Value,
    force: bool,
    writer: &Writer<'_>,
) -> Result<Applied, ApplyError> {
    check_config(ty, config, writer)?;
    let place = Place::Root(ty);
    let empty = Value::Object(Map::new());
    let was = live.unwrap_or(&empty);
    let mut owners = Owners::decode(was.pointer("/metadata/managedFields"))
        .map_err(|problem| ApplyError::Internal(format!("failed to decode managed fields: {problem}")))?;
    if owners.entries.is_empty() && live.is_some() {
        let first = Writer { manager: BEFORE_FIRST_APPLY_MANAGER, ..*writer };
        let changes = changes(place, &empty, was, &first).map_err(|problem| {
            ApplyError::Internal(format!("failed to create manager for existing fields: {problem}"))
        })?;
        own(changes, &first, &mut owners);
    }
    let merged = match merge_owned(place, was, config, owners.clone(), force, writer) {
        Err(ApplyError::Conflict(conflicts)) if writer.manager == last_applied::MANAGER => {
            // The object may still be kubectl's from before server-side apply.
            match last_applied::upheld(place, was, writer.api_version) {
                None => Err(ApplyError::Conflict(conflicts)),
                Some(upheld) => {
                    let (_, left): (Vec<_>, Vec<_>) =
                        conflicts.into_iter().partition(|conflict| upheld.contains(&conflict.path));
                    if !left.is_empty() {
                        return Err(ApplyError::Conflict(left));
                    }
                    merge_owned(place, was, config, owners, true, writer)
                }
            }
        }
        other => other,
    };
    let (mut object, owners) = merged?;
    if writer.manager == last_applied::MANAGER {
        last_applied::follow(&mut object, config);
    }
    set_managed_fields(&mut object, owners.encode());
    let Some(live) = live else { return Ok(Applied { object, changed: true }) };
    revert_timestamps(&mut object, live);
    let changed = !scalar::equal(&object, live);
    Ok(Applied { object, changed })
}

/// The merged object without managed fields, and the owners that it has then.
fn merge_owned(
    place: Place<'_>,
    live: &Value,
    config: &Value,
    mut owners: Owners,
    force: bool,
    writer: &Writer<'_>,
) -> Result<(Value, Owners), ApplyError> {
    let internal = |problem: String| ApplyError::Internal(problem);
    let mut merged = merge::merge(place, live, config)
        .map_err(|problems| internal(format!("failed to merge config: {}", validate::join(&problems))))?;

    let mut applier = Entry::new(writer.manager, Operation::Apply, writer.api_version, writer.subresource);
    applier.set = extract::fields_of(place, config);
    writer.reset.apply(&mut applier.set);
    applier.set.subtract(&NEVER_OWNED);
    let former = owners.find(&applier).cloned();
    if let Some(former) = &former {
        let mut owned = applier.set.clone();
        for entry in owners.entries.iter().filter(|entry| !entry.same_owner(&applier)) {
            owned.union(entry.set.clone());
        }
        merged = prune::prune(place, merged, &former.set, &owned);
    }
    let changes = changes(place, live, &merged, writer)
        .map_err(|problem| internal(format!("failed to compare objects: {problem}")))?;
    if !force {
        let conflicts = conflict::find(&owners.entries, &applier, &changes.touched);
        if !conflicts.is_empty() {
            return Err(ApplyError::Conflict(conflicts));
        }
    }
    owners.release(writer.api_version, &changes.touched, Some(&applier));
    owners.release(writer.api_version, &changes.removed, Some(&applier));
    if scalar::equal(live, &merged) {
        applier.time = former.and_then(|former| former.time);
    } else {
        applier.stamp(writer.now);
    }
    owners.put(applier);
    owners.drop_empty();
    Ok((merged, owners))
}

fn check_config(ty: &Type, config: &Value, writer: &Writer<'_>) -> Result<(), ApplyError> {
    let text = |path: &str| config.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("/apiVersion"), text("/kind"));
    let group_version =
        if api_version.contains('/') { api_version.to_string() } else { format!("/{api_version}") };
    let fits = ty.kinds.is_empty() || ty.kinds.iter().any(|known| known.kind == kind);
    if api_version != writer.api_version || !fits {
        return Err(ApplyError::BadRequest(format!("invalid object type: {group_version}, Kind={kind}")));
    }
    if config.pointer("/metadata/managedFields").is_some_and(|fields| !fields.is_null()) {
        return Err(ApplyError::BadRequest("metadata.managedFields must be nil".to_string()));
    }
    let problems = validate::validate(Place::Root(ty), config, false);
    if problems.is_empty() {
        return Ok(());
    }
    Err(ApplyError::Internal(format!(
        "failed to create typed patch object ({}/{}; {group_version}, Kind={kind}): {}",
        text("/metadata/namespace"),
        text("/metadata/name"),
        validate::join(&problems)
    )))
}

/// Takes back new times of managed fields where nothing else changed, so that the write is none. Does nothing
/// where an entry came or went: whoever writes a field, even with the value it has, becomes its owner.
pub fn revert_timestamps(new: &mut Value, old: &Value) {
    let (Some(new_fields), Some(old_fields)) = (managed_fields(new), managed_fields(old)) else { return };
    let time = |entry: &Value| entry.get("time").cloned();
    if new_fields.len() != old_fields.len()
        || new_fields.iter().zip(old_fields).all(|(new, old)| time(new) == time(old))
        || !new_fields.iter().zip(old_fields).all(|(new, old)| equal_except(new, old, &["time"]))
        || !equal_except(new, old, &["metadata"])
    {
        return;
    }
    let (Some(new_metadata), Some(old_metadata)) = (new.get("metadata"), old.get("metadata")) else { return };
    if equal_except(new_metadata, old_metadata, &["managedFields"]) {
        let old_fields = Value::Array(old_fields.clone());
        set_managed_fields(new, Some(old_fields));
    }
}

fn equal_except(left: &Value, right: &Value, except: &[&str]) -> bool {
    let (Some(left), Some(right)) = (left.as_object(), right.as_object()) else { return left == right };
    let counts =
        |members: &Map<String, Value>| members.keys().filter(|key| !except.contains(&key.as_str())).count();
    counts(left) == counts(right)
        && left
            .iter()
            .filter(|(key, _)| !except.contains(&key.as_str()))
            .all(|(key, left)| right.get(key).is_some_and(|right| scalar::equal(left, right)))
}

/// `[]` and `[{}]` ask for the managed fields to be forgotten.
fn is_reset(managed_fields: &Value) -> bool {
    match managed_fields.as_array().map(Vec::as_slice) {
        Some([]) => true,
        Some([one]) => one.as_object().is_some_and(Map::is_empty),
        _ => false,
    }
}

fn managed_fields(object: &Value) -> Option<&Vec<Value>> {
    object.pointer("/metadata/managedFields")?.as_array()
}

fn set_managed_fields(object: &mut Value, managed_fields: Option<Value>) {
    let Some(Value::Object(metadata)) = object.get_mut("metadata") else { return };
    match managed_fields {
        Some(managed_fields) => {
            metadata.insert("managedFields".to_string(), managed_fields);
        }
        None => {
            metadata.remove("managedFields");
        }
    }
}

/// What no entry ever names.
static NEVER_OWNED: LazyLock<FieldSet> = LazyLock::new(|| {
    FieldSet::of_paths([
        "apiVersion",
        "kind",
        "metadata",
        "metadata.name",
        "metadata.namespace",
        "metadata.creationTimestamp",
        "metadata.selfLink",
        "metadata.uid",
        "metadata.clusterName",
        "metadata.generation",
        "metadata.managedFields",
        "metadata.resourceVersion",
    ])
});

#[cfg(test)]
mod tests;
