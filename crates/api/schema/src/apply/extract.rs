//! The set of fields that an object states, and an object without some of its fields.
//!
//! Upstream: structured-merge-diff/v6/typed (tofieldset.go, remove.go). Difference: atomic values are left as
//! they are even where a set names something inside them, which a change of schema can leave behind.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::place::{Form, Place};
use super::set::{FieldSet, PathElement};
use crate::types::ListKind;

/// The fields that `value` states.
pub(crate) fn fields_of(place: Place<'_>, value: &Value) -> FieldSet {
    collect(place, value).1
}

/// Whether the place itself belongs to the set, and what below it does.
fn collect(place: Place<'_>, value: &Value) -> (bool, FieldSet) {
    match (place.form(Some(value)), value) {
        (Form::Scalar(_) | Form::Atomic(_), _) => (true, FieldSet::default()),
        (Form::List(kind), Value::Array(items)) => (false, collect_list(place, kind, items)),
        (Form::Object, Value::Object(members)) => {
            let mut set = FieldSet::default();
            for (name, member) in members {
                let (below, declared) = place.member(name);
                let (own, children) = collect(below, member);
                let hollow = member.is_null() || member.as_object().is_some_and(Map::is_empty);
                set.put(|| PathElement::field(name), own || hollow || !declared, children);
            }
            (false, set)
        }
        _ => (false, FieldSet::default()),
    }
}

fn collect_list(place: Place<'_>, kind: &ListKind, items: &[Value]) -> FieldSet {
    let mut set = FieldSet::default();
    let mut counts: BTreeMap<PathElement, (usize, &Value)> = BTreeMap::new();
    for item in items {
        if let Ok(element) = place.item(kind, item) {
            counts.entry(element).or_insert((0, item)).0 += 1;
        }
    }
    for (element, (count, item)) in counts {
        // Duplicates are owned as a whole: there is no telling them apart.
        let children = if count > 1 { FieldSet::default() } else { collect(place.items(), item).1 };
        set.put(|| element, true, children);
    }
    set
}

/// `value` without what `gone` names. Objects and lists that lose all they have stay, empty.
pub(crate) fn without(place: Place<'_>, value: &Value, gone: &FieldSet) -> Value {
    match (place.form(Some(value)), value) {
        (Form::List(kind), Value::Array(items)) => {
            let keep =
                |item: &Value| match place.item(kind, item).ok().and_then(|element| gone.find(&element)) {
                    None => Some(item.clone()),
                    Some(node) if node.member => None,
                    Some(node) => Some(without(place.items(), item, &node.children)),
                };
            Value::Array(items.iter().filter_map(keep).collect())
        }
        (Form::Object, Value::Object(members)) => {
            let mut out = Map::new();
            for (name, member) in members {
                match gone.find(&PathElement::field(name)) {
                    None => {
                        out.insert(name.clone(), member.clone());
                    }
                    Some(node) if node.member => {}
                    Some(node) => {
                        out.insert(name.clone(), without(place.member(name).0, member, &node.children));
                    }
                }
            }
            Value::Object(out)
        }
        _ => value.clone(),
    }
}
