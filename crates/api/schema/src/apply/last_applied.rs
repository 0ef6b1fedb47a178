//! The annotation in which `kubectl apply` of old keeps what it applied last.
//!
//! Upstream: apimachinery/pkg/util/managedfields/internal (lastappliedmanager.go, lastappliedupdater.go). Both
//! only for the manager "kubectl": fields still as the annotation has them don't conflict, and the annotation
//! follows what server-side apply applies.

use serde_json::{Map, Value};

use super::compare::compare;
use super::extract::fields_of;
use super::place::Place;
use super::set::FieldSet;
use super::validate::validate;

pub const ANNOTATION: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Upstream's TotalAnnotationSizeLimitB.
const MAX_ANNOTATIONS_SIZE_BYTES: usize = 256 * 1024;

pub(crate) const MANAGER: &str = "kubectl";

fn annotation(object: &Value) -> Option<&str> {
    object.pointer("/metadata/annotations")?.get(ANNOTATION)?.as_str().filter(|text| !text.is_empty())
}

/// The fields that `kubectl apply` of old set and that are as it set them. None where it can't be told.
pub(crate) fn upheld(place: Place<'_>, live: &Value, api_version: &str) -> Option<FieldSet> {
    let last: Value = serde_json::from_str(annotation(live)?).ok()?;
    if last.get("apiVersion").and_then(Value::as_str) != Some(api_version)
        || !validate(place, live, false).is_empty()
        || !validate(place, &last, false).is_empty()
    {
        return None;
    }
    let changes = compare(place, &last, live).ok()?;
    let mut upheld = fields_of(place, &last);
    upheld.subtract(&changes.touched);
    upheld.subtract(&changes.removed);
    Some(upheld)
}

/// Writes the applied configuration into `object`'s annotation, if there is one and it doesn't get too large.
pub(crate) fn follow(object: &mut Value, config: &Value) {
    if annotation(object).is_none() {
        return;
    }
    let text = written(config);
    let Some(Value::Object(annotations)) = object.pointer_mut("/metadata/annotations") else { return };
    annotations.insert(ANNOTATION.to_string(), text.into());
    let size = |(key, value): (&String, &Value)| key.len() + value.as_str().map_or(0, str::len);
    if annotations.iter().map(size).sum::<usize>() > MAX_ANNOTATIONS_SIZE_BYTES {
        annotations.remove(ANNOTATION);
    }
}

/// As Go's encoder writes it: keys sorted, `<`, `>` and `&` escaped, a line feed at the end.
fn written(config: &Value) -> String {
    let mut config = sorted(config);
    if let Some(Value::Object(annotations)) = config.pointer_mut("/metadata/annotations") {
        annotations.remove(ANNOTATION);
    }
    let mut out = String::new();
    for c in config.to_string().chars() {
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            c => out.push(c),
        }
    }
    out.push('\n');
    out
}

/// The same value with members in order, however the map keeps them.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| *name);
            Value::Object(
                members.into_iter().map(|(name, value)| (name.clone(), sorted(value))).collect::<Map<_, _>>(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}
