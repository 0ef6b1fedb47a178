//! Reading and changing parts of a JSON object.
//!
//! Generic rules (defaults, strategies, columns) work on `serde_json::Value`; deep ones read a part of it into the
//! k8s-openapi struct with [`read`]. What is missing reads as the empty value, as upstream's Go structs do.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::field::{FieldError, Path};

/// Text at a JSON pointer, "" where there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The text, "" where there is none: Go's string.
pub fn or_empty(text: &Option<String>) -> &str {
    text.as_deref().unwrap_or_default()
}

/// A number at a JSON pointer, 0 where there is none.
pub fn integer(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or_default()
}

/// A truth at a JSON pointer, false where there is none.
pub fn truth(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).and_then(Value::as_bool).unwrap_or_default()
}

/// The items of a list at a JSON pointer.
pub fn items<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The items of a list at a JSON pointer, to be changed.
pub fn items_mut<'a>(object: &'a mut Value, pointer: &str) -> &'a mut [Value] {
    object.pointer_mut(pointer).and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default()
}

/// The entries of a map at a JSON pointer.
pub fn entries<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    object.pointer(pointer).and_then(Value::as_object).into_iter().flatten()
}

/// How many entries the list or map at a JSON pointer has.
pub fn count(object: &Value, pointer: &str) -> usize {
    match object.pointer(pointer) {
        Some(Value::Array(items)) => items.len(),
        Some(Value::Object(entries)) => entries.len(),
        _ => 0,
    }
}

/// The map under `key`, made if it is not there.
pub fn child<'a>(object: &'a mut Value, key: &str) -> &'a mut Value {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let child = &mut object[key];
    if child.is_null() {
        *child = Value::Object(Map::new());
    }
    child
}

/// True where Go would see the zero value: absent, null, "", 0 or false.
pub fn is_unset(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::String(s)) => s.is_empty(),
        Some(Value::Number(n)) => n.as_f64() == Some(0.0),
        Some(_) => false,
    }
}

/// Sets `key` where it holds the zero value (a field that is no pointer in upstream's Go type).
pub fn default_zero(object: &mut Value, key: &str, value: impl Into<Value>) {
    if object.is_object() && is_unset(object.get(key)) {
        object[key] = value.into();
    }
}

/// Sets `key` where it is absent (a pointer in upstream's Go type).
pub fn default_absent(object: &mut Value, key: &str, value: impl Into<Value>) {
    if object.is_object() && object.get(key).is_none_or(Value::is_null) {
        object[key] = value.into();
    }
}

/// Removes `key`.
pub fn remove(object: &mut Value, key: &str) -> Option<Value> {
    object.as_object_mut().and_then(|o| o.remove(key))
}

/// Makes `new`'s `key` what it is in `old`, removing it where `old` has none.
pub fn keep(new: &mut Value, old: &Value, key: &str) {
    match old.get(key) {
        Some(value) => new[key] = value.clone(),
        None => drop(remove(new, key)),
    }
}

/// Scalars that are pointers in upstream's Go types: their zero value is not the same as their absence.
const POINTERS: &[&str] = &[
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "allowVolumeExpansion",
    "attachRequired",
    "automountServiceAccountToken",
    "backoffLimit",
    "backoffLimitPerIndex",
    "completions",
    "defaultMode",
    "enableServiceLinks",
    "failedJobsHistoryLimit",
    "fsGroup",
    "hostProcess",
    "hostUsers",
    "immutable",
    "manualSelector",
    "maxFailedIndexes",
    "minReplicas",
    "mode",
    "optional",
    "parallelism",
    "podInfoOnMount",
    "priority",
    "privileged",
    "readOnlyRootFilesystem",
    "replicas",
    "requiresRepublish",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "seLinuxMount",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "storageCapacity",
    "storageClassName",
    "successfulJobsHistoryLimit",
    "suspend",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "volumeAttributesClassName",
];

fn is_empty(key: &str, value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(o)) => o.is_empty(),
        Some(Value::Array(a)) => a.is_empty(),
        Some(_) => !POINTERS.contains(&key) && is_unset(value),
    }
}

/// Whether both hold the same: upstream's Semantic.DeepEqual on Go structs, in which null, {}, [] and absence are the
/// same, and a zero value is absence except where the Go field is a pointer.
pub fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    same_at("", a, b)
}

fn same_at(key: &str, a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (a, b) if is_empty(key, a) && is_empty(key, b) => true,
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            a.iter().all(|(k, v)| same_at(k, Some(v), b.get(k)))
                && b.iter().all(|(k, v)| a.contains_key(k) || is_empty(k, Some(v)))
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_at("", Some(a), Some(b)))
        }
        (a, b) => a == b,
    }
}

/// Whether both hold the same under `pointer`.
pub fn same_in(a: &Value, b: &Value, pointer: &str) -> bool {
    let key = pointer.rsplit('/').next().unwrap_or_default();
    same_at(key, a.pointer(pointer), b.pointer(pointer))
}

/// Sets `metadata.generation`.
pub fn set_generation(object: &mut Value, generation: i64) {
    child(object, "metadata")["generation"] = generation.into();
}

/// Sets the stored generation, one more where `changed`.
pub fn bump_generation(new: &mut Value, old: &Value, changed: bool) {
    let generation = integer(old, "/metadata/generation") + i64::from(changed);
    if generation != 0 {
        set_generation(new, generation);
    }
}

/// Reads a part of an object into its struct; absence reads as the empty one.
pub fn read<'a, T: Deserialize<'a>>(part: Option<&'a Value>, path: &Path) -> Result<T, FieldError> {
    static EMPTY: Value = Value::Null;
    let failed = |error: serde_json::Error| FieldError::internal(path, error.to_string());
    match part {
        Some(value) if !value.is_null() => T::deserialize(value).map_err(failed),
        _ => T::deserialize(&EMPTY).or_else(|_| T::deserialize(empty_object())).map_err(failed),
    }
}

fn empty_object() -> &'static Value {
    static EMPTY: std::sync::OnceLock<Value> = std::sync::OnceLock::new();
    EMPTY.get_or_init(|| Value::Object(Map::new()))
}

/// The parts of `metadata` that validation of a spec looks at.
pub fn metadata(object: &Value) -> ObjectMeta {
    let map = |pointer: &str| -> Option<BTreeMap<String, String>> {
        object
            .pointer(pointer)
            .and_then(Value::as_object)
            .map(|m| m.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_string())).collect())
    };
    let some = |pointer: &str| Some(text(object, pointer)).filter(|s| !s.is_empty()).map(str::to_string);
    ObjectMeta {
        name: some("/metadata/name"),
        namespace: some("/metadata/namespace"),
        labels: map("/metadata/labels"),
        annotations: map("/metadata/annotations"),
        ..ObjectMeta::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn emptiness_is_equal() {
        let cases = [
            (json!({"a": 1}), json!({"a": 1, "b": null, "c": []}), true),
            (json!({"emptyDir": {"medium": ""}}), json!({}), false),
            (json!({"a": {}}), json!({}), true),
            (json!({"hostNetwork": false, "a": ""}), json!({}), true),
            (json!({"hostUsers": false}), json!({}), false),
            (json!([1, {}]), json!([1, null]), true),
            (json!([1]), json!([1, 2]), false),
        ];
        for (a, b, want) in cases {
            assert_eq!(same(Some(&a), Some(&b)), want, "{a} {b}");
            assert_eq!(same(Some(&b), Some(&a)), want, "{b} {a}");
        }
    }
}
