//! Merging of lists: by key, of scalars, with deletions and a wanted order.
//!
//! Upstream: strategicpatch/patch.go (mergePatchIntoOriginal, mergeSlice, normalizeElementOrder). Order counts in
//! this sequence: the patch's $setElementOrder, the patch's list, the live list.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::super::wording::{go_type, plain};
use super::{
    BAD_SET_ELEMENT_ORDER, DELETE, DIRECTIVE, MERGE, Object, PatchError, Place, REPLACE, Rule,
    SET_ELEMENT_ORDER, bad_argument, bad_patch_type, drop_directives, merge_object,
};

/// Merges the list that a `$setElementOrder/NAME` is about, together with the patch's own `NAME`.
pub(super) fn merge_ordered(
    original: &mut Object,
    patch: &mut Object,
    directive: &str,
    order: Value,
    place: Place<'_>,
) -> Result<(), PatchError> {
    let order = into_list(order)?;
    let name = directive
        .strip_prefix(SET_ELEMENT_ORDER)
        .and_then(|rest| rest.strip_prefix('/'))
        .ok_or_else(|| PatchError::Malformed(BAD_SET_ELEMENT_ORDER.to_string()))?;
    let live = original.get(name).cloned().map(into_list).transpose()?;
    let changes = patch.get(name).cloned().map(into_list).transpose()?;
    let rule = place.rule(name, true)?;
    check_order(changes.as_deref().unwrap_or_default(), &order, rule.merge_key)?;

    let server_order = live.clone().unwrap_or_default();
    let element = element_type(&[&server_order, changes.as_deref().unwrap_or_default()]);
    let merged = match (live, changes) {
        (None, None) => return Ok(()),
        (Some(live), None) => live,
        (None, Some(mut changes)) => {
            changes.retain_mut(drop_directives);
            changes
        }
        (Some(live), Some(changes)) if rule.merge => merge_lists(live, changes, &rule, false)?,
        (Some(_), Some(changes)) => changes,
    };
    let (wanted, server_only) = partition(merged, &order, rule.merge_key)?;
    let maps = element? == "map[string]interface {}";
    let both = arrange(wanted, server_only, &order, &server_order, rule.merge_key, maps)?;
    original.insert(name.to_string(), Value::Array(both));
    patch.remove(name);
    Ok(())
}

pub(super) fn merge_lists(
    original: Vec<Value>,
    patch: Vec<Value>,
    rule: &Rule<'_>,
    deletes: bool,
) -> Result<Vec<Value>, PatchError> {
    if original.is_empty() && patch.is_empty() {
        return Ok(original);
    }
    let maps = element_type(&[&original, &patch])? == "map[string]interface {}";
    let (merged, server_order, patch_order) = if !maps {
        if deletes {
            let gone: HashSet<String> = patch.iter().map(Value::to_string).collect();
            return Ok(original.into_iter().filter(|item| !gone.contains(&item.to_string())).collect());
        }
        let mut seen = HashSet::new();
        let merged =
            original.iter().chain(&patch).filter(|item| seen.insert(item.to_string())).cloned().collect();
        (merged, original, patch)
    } else {
        if rule.merge_key.is_empty() {
            return Err(PatchError::Internal("cannot merge lists without merge key for struct".to_string()));
        }
        let (original, patch) = take_directives(original, patch, rule.merge_key)?;
        // Only the keys matter for the order.
        let server_order = keys_only(&original, rule.merge_key);
        let patch_order = keys_only(&patch, rule.merge_key);
        (merge_by_key(original, patch, rule)?, server_order, patch_order)
    };
    let (wanted, server_only) = partition(merged, &patch_order, rule.merge_key)?;
    arrange(wanted, server_only, &patch_order, &server_order, rule.merge_key, maps)
}

/// Obeys and removes `$patch` items. With a replace among them, the patch's plain items are all that is left.
fn take_directives(
    mut original: Vec<Value>,
    patch: Vec<Value>,
    merge_key: &str,
) -> Result<(Vec<Value>, Vec<Value>), PatchError> {
    let mut plain_items = Vec::new();
    let mut replace = false;
    for item in patch {
        let Value::Object(members) = &item else { continue };
        let Some(directive) = members.get(DIRECTIVE) else {
            plain_items.push(item);
            continue;
        };
        match directive.as_str() {
            Some(DELETE) => {
                let key = members.get(merge_key).ok_or_else(|| no_merge_key(&item, merge_key))?;
                original.retain(|live| live.get(merge_key) != Some(key));
            }
            Some(REPLACE) => replace = true,
            Some(MERGE) => {
                return Err(PatchError::Internal(
                    "merging lists cannot yet be specified in the patch".to_string(),
                ));
            }
            _ => return Err(bad_patch_type(directive, members)),
        }
    }
    Ok(if replace { (plain_items, Vec::new()) } else { (original, plain_items) })
}

fn merge_by_key(
    mut original: Vec<Value>,
    patch: Vec<Value>,
    rule: &Rule<'_>,
) -> Result<Vec<Value>, PatchError> {
    let mut places = HashMap::new();
    for (at, item) in original.iter().enumerate() {
        if let Some(key) = item.get(rule.merge_key) {
            places.entry(key.to_string()).or_insert(at);
        }
    }
    for item in patch {
        let key = item.get(rule.merge_key).ok_or_else(|| no_merge_key(&item, rule.merge_key))?.to_string();
        match places.get(&key) {
            Some(&at) => {
                if let (Value::Object(live), Value::Object(change)) = (original[at].take(), item) {
                    original[at] = Value::Object(merge_object(live, change, rule.place)?);
                }
            }
            None => {
                places.insert(key, original.len());
                original.push(item);
            }
        }
    }
    Ok(original)
}

fn keys_only(items: &[Value], merge_key: &str) -> Vec<Value> {
    let only = |item: &Value| match item.get(merge_key) {
        Some(key) => Value::Object([(merge_key.to_string(), key.clone())].into_iter().collect()),
        None => Value::Object(Object::new()),
    };
    items.iter().map(only).collect()
}

/// Splits `items` into those that `by` names and the others.
fn partition(
    items: Vec<Value>,
    by: &[Value],
    merge_key: &str,
) -> Result<(Vec<Value>, Vec<Value>), PatchError> {
    let mut named = HashSet::new();
    for (at, item) in by.iter().enumerate() {
        if merge_key.is_empty() {
            named.insert(item.to_string());
        } else if !item.is_object() {
            if !items.is_empty() {
                return Err(PatchError::Internal(format!("value for key {at} is not a map")));
            }
        } else if let Some(key) = item.get(merge_key) {
            named.insert(key.to_string());
        }
    }
    let mut wanted = Vec::new();
    let mut others = Vec::new();
    for item in items {
        let key = identity(&item, merge_key)?.to_string();
        if named.contains(&key) { wanted.push(item) } else { others.push(item) }
    }
    Ok((wanted, others))
}

/// What tells an item apart: its merge key's value, or the item itself where there is no key.
fn identity<'a>(item: &'a Value, merge_key: &str) -> Result<&'a Value, PatchError> {
    if merge_key.is_empty() {
        return Ok(item);
    }
    if !item.is_object() {
        return Err(bad_argument(&Value::Object(Object::new()), item));
    }
    item.get(merge_key).ok_or_else(|| no_merge_key(item, merge_key))
}

/// Puts `wanted` into its order, `server_only` into the server's, and the two together so that the server's
/// items keep their places among the others as far as that goes.
fn arrange(
    wanted: Vec<Value>,
    server_only: Vec<Value>,
    wanted_order: &[Value],
    server_order: &[Value],
    merge_key: &str,
    maps: bool,
) -> Result<Vec<Value>, PatchError> {
    let wanted_ranks = ranks(wanted_order, merge_key, maps)?;
    let server_ranks = ranks(server_order, merge_key, maps)?;
    let rank = |ranks: &HashMap<String, usize>, item: &Value| match identity(item, merge_key) {
        Ok(key) => ranks.get(&key.to_string()).copied(),
        Err(_) => None,
    };
    let sort = |items: Vec<Value>, ranks: &HashMap<String, usize>| {
        let mut ranked: Vec<_> = items.into_iter().map(|item| (rank(ranks, &item), item)).collect();
        insertion_sort(&mut ranked);
        ranked.into_iter().map(|(_, item)| item).collect::<Vec<_>>()
    };
    let wanted = sort(wanted, &wanted_ranks);
    let server_only = sort(server_only, &server_ranks);

    let mut out = Vec::with_capacity(wanted.len() + server_only.len());
    let mut left = server_only.into_iter().peekable();
    let mut right = wanted.into_iter().peekable();
    while let (Some(server), Some(patched)) = (left.peek(), right.peek()) {
        let first = match (rank(&server_ranks, server), rank(&server_ranks, patched)) {
            (Some(server), Some(patched)) => server < patched,
            _ => false,
        };
        out.extend(if first { left.next() } else { right.next() });
    }
    out.extend(left);
    out.extend(right);
    Ok(out)
}

/// Upstream's comparison says "before" wherever a rank is missing, which only means something to the
/// insertion sort that Go's stable sort is for lists of this length.
fn insertion_sort(items: &mut [(Option<usize>, Value)]) {
    if items.iter().all(|(rank, _)| rank.is_some()) {
        items.sort_by_key(|(rank, _)| *rank);
        return;
    }
    for at in 1..items.len() {
        let mut at = at;
        while at > 0 {
            let before = match (items[at].0, items[at - 1].0) {
                (Some(this), Some(previous)) => this < previous,
                _ => true,
            };
            if !before {
                break;
            }
            items.swap(at, at - 1);
            at -= 1;
        }
    }
}

fn ranks(order: &[Value], merge_key: &str, maps: bool) -> Result<HashMap<String, usize>, PatchError> {
    let mut ranks = HashMap::with_capacity(order.len());
    for (at, item) in order.iter().enumerate() {
        let key = if maps { identity(item, merge_key)? } else { item };
        ranks.entry(key.to_string()).or_insert(at);
    }
    Ok(ranks)
}

/// The patch's items must follow the order that the patch itself asks for.
fn check_order(changes: &[Value], order: &[Value], merge_key: &str) -> Result<(), PatchError> {
    if changes.is_empty() || order.is_empty() {
        return Ok(());
    }
    let mut wanted = Vec::with_capacity(changes.len());
    for change in changes {
        if !merge_key.is_empty() && !change.is_object() {
            return Err(bad_argument(&Value::Object(Object::new()), change));
        }
        if change.get(DIRECTIVE).is_none() {
            wanted.push(change);
        }
    }
    let mut at = 0;
    for ordered in order {
        let Some(change) = wanted.get(at) else { return Ok(()) };
        if identity(change, merge_key)? == identity(ordered, merge_key)? {
            at += 1;
        }
    }
    if at < wanted.len() {
        return Err(PatchError::Internal(format!(
            "The order in patch list:\n{}\n doesn't match {SET_ELEMENT_ORDER} list:\n{}\n",
            plain(&Value::Array(changes.to_vec())),
            plain(&Value::Array(order.to_vec()))
        )));
    }
    Ok(())
}

/// All items must be of one type, and not lists.
fn element_type(lists: &[&[Value]]) -> Result<&'static str, PatchError> {
    let mut found = None;
    for item in lists.iter().flat_map(|list| list.iter()) {
        let this = go_type(item);
        match found {
            None if item.is_array() => {
                return Err(PatchError::Unprocessable("lists of lists are not supported".to_string()));
            }
            None if !item.is_null() => found = Some(this),
            Some(before) if before == this => {}
            _ => {
                let lists = Value::Array(lists.iter().map(|list| Value::Array(list.to_vec())).collect());
                return Err(PatchError::Internal(format!(
                    "list element types are not identical: {}",
                    plain(&lists)
                )));
            }
        }
    }
    found.ok_or_else(|| PatchError::Internal("no elements in any of the given slices".to_string()))
}

fn into_list(value: Value) -> Result<Vec<Value>, PatchError> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(bad_argument(&Value::Array(Vec::new()), &other)),
    }
}

fn no_merge_key(item: &Value, merge_key: &str) -> PatchError {
    PatchError::Internal(format!("map: {} does not contain declared merge key: {merge_key}", plain(item)))
}
