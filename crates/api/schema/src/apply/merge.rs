//! Merging a configuration into the live object.
//!
//! Upstream: structured-merge-diff/v6/typed/merge.go. The configuration's values win; keyed lists and sets merge
//! item by item, in the configuration's order as far as it says anything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde_json::{Map, Value};

use super::place::{Form, Place};
use super::set::PathElement;
use super::validate::{Problem, check_scalar};
use crate::types::ListKind;

/// `live` with `config` merged into it.
pub(crate) fn merge(place: Place<'_>, live: &Value, config: &Value) -> Result<Value, Vec<Problem>> {
    let merged = merge_value(place, Some(live), Some(config))?;
    Ok(merged.unwrap_or_else(|| Value::Object(Map::new())))
}

/// None where nothing is left.
fn merge_value(
    place: Place<'_>,
    live: Option<&Value>,
    config: Option<&Value>,
) -> Result<Option<Value>, Vec<Problem>> {
    let form = if config.is_some() { place.form(config) } else { place.form(live) };
    match form {
        Form::Scalar(scalar) => {
            let live_problem = live.and_then(|value| check_scalar(scalar, value, "lhs: "));
            let config_problem = config.and_then(|value| check_scalar(scalar, value, "rhs: "));
            if let (Some(live_problem), Some(config_problem)) = (live_problem, config_problem) {
                return Err(vec![Problem::here(live_problem), Problem::here(config_problem)]);
            }
        }
        Form::Atomic(_) => {}
        Form::List(kind) => {
            let live = live.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let config = config.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            // Two empty ones are a leaf, which keeps null, absent and [] apart.
            if !live.is_empty() || !config.is_empty() {
                return merge_lists(place, kind, live, config);
            }
        }
        Form::Object => {
            let empty = Map::new();
            let live = live.and_then(Value::as_object).unwrap_or(&empty);
            let config = config.and_then(Value::as_object).unwrap_or(&empty);
            if !live.is_empty() || !config.is_empty() {
                return merge_objects(place, live, config);
            }
        }
    }
    Ok(config.or(live).cloned())
}

fn merge_objects(
    place: Place<'_>,
    live: &Map<String, Value>,
    config: &Map<String, Value>,
) -> Result<Option<Value>, Vec<Problem>> {
    let mut out = Map::new();
    let mut problems = Vec::new();
    let only_config = config.keys().filter(|name| !live.contains_key(*name));
    for name in live.keys().chain(only_config) {
        match merge_value(place.member(name).0, live.get(name), config.get(name)) {
            Ok(merged) => {
                if let Some(merged) = merged {
                    out.insert(name.clone(), merged);
                }
            }
            Err(found) => {
                let element = PathElement::field(name);
                problems.extend(found.into_iter().map(|problem| problem.below(&element)));
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok((!out.is_empty()).then_some(Value::Object(out)))
}

/// The items of one side, by path element.
struct Indexed<'a> {
    elements: Vec<PathElement>,
    /// None for the live side's duplicates: they are replaced rather than merged.
    items: BTreeMap<PathElement, Option<&'a Value>>,
}

fn index<'a>(
    place: Place<'_>,
    kind: &ListKind,
    list: &'a [Value],
    allow_duplicates: bool,
) -> Result<Indexed<'a>, Vec<Problem>> {
    let mut elements = Vec::with_capacity(list.len());
    let mut items = BTreeMap::new();
    let mut problems = Vec::new();
    for (at, item) in list.iter().enumerate() {
        match place.item(kind, item) {
            Err(problem) => problems.push(Problem::here(format!("element {at}: {problem}"))),
            Ok(element) => {
                let known = items.contains_key(&element);
                if known && !allow_duplicates {
                    problems.push(Problem::here(format!("duplicate entries for key {element}")));
                    continue;
                }
                items.insert(element.clone(), (!known).then_some(item));
                elements.push(element);
            }
        }
    }
    if problems.is_empty() { Ok(Indexed { elements, items }) } else { Err(problems) }
}

/// The live items that the configuration doesn't name keep their places between those that both have.
fn merge_lists(
    place: Place<'_>,
    kind: &ListKind,
    live_list: &[Value],
    config_list: &[Value],
) -> Result<Option<Value>, Vec<Problem>> {
    let config = index(place, kind, config_list, false)?;
    let live = index(place, kind, live_list, true)?;
    let shared = config.elements.iter().filter(|element| live.items.contains_key(*element));
    let mut shared: VecDeque<&PathElement> = shared.collect();
    let mut next_shared = shared.pop_front();
    let mut done: BTreeSet<&PathElement> = BTreeSet::new();
    let mut out = Vec::with_capacity(live_list.len().max(config_list.len()));
    let mut problems = Vec::new();
    let mut emit = |element: &PathElement, left: Option<&Value>, right: Option<&Value>| match merge_value(
        place.items(),
        left,
        right,
    ) {
        Ok(merged) => out.extend(merged),
        Err(found) => problems.extend(found.into_iter().map(|problem| problem.below(element))),
    };
    let both = |element: &PathElement| {
        let left = live.items.get(element).map(|item| item.unwrap_or(&Value::Null));
        (left, config.items.get(element).copied().flatten())
    };

    let (mut l, mut r) = (0, 0);
    while l < live.elements.len() || r < config.elements.len() {
        if let (Some(element), Some(wanted)) = (live.elements.get(l), config.elements.get(r)) {
            if element == wanted {
                done.insert(wanted);
                let (left, right) = both(element);
                emit(element, left, right);
                l += 1;
                r += 1;
                next_shared = shared.pop_front();
                continue;
            }
            if config.items.contains_key(element) && next_shared.is_some_and(|next| next != element) {
                // Both have it, but it isn't its turn.
                l += 1;
                continue;
            }
        }
        if let Some(element) = live.elements.get(l) {
            if !config.items.contains_key(element) {
                emit(element, Some(&live_list[l]), None);
                l += 1;
                continue;
            }
            if done.contains(element) {
                l += 1;
            }
        }
        if let Some(element) = config.elements.get(r) {
            done.insert(element);
            let (left, right) = both(element);
            emit(element, left, right);
            r += 1;
            if next_shared == Some(element) {
                next_shared = shared.pop_front();
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok((!out.is_empty()).then_some(Value::Array(out)))
}
