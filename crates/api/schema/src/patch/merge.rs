//! JSON merge patch, RFC 7386.
//!
//! Upstream: gopkg.in/evanphx/json-patch.v4/merge.go. What it takes whole from a patch loses its nulls, inside
//! lists too, except where a list replaces an object: that one is kept as it is.

use serde_json::{Map, Value};

use super::PatchError;
use super::wording::json_kind;

/// Merges `patch` into `doc`: null removes, objects merge, everything else replaces.
pub fn merge(doc: Value, patch: Value) -> Result<Value, PatchError> {
    let patch = match patch {
        Value::Object(patch) => patch,
        Value::Null => return Err(PatchError::Malformed("Invalid JSON Patch".to_string())),
        other => {
            return Err(PatchError::Malformed(format!(
                "error decoding patch: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
                json_kind(&other)
            )));
        }
    };
    let mut doc = match doc {
        Value::Object(doc) => doc,
        _ => Map::new(),
    };
    merge_objects(&mut doc, patch);
    Ok(Value::Object(doc))
}

fn merge_objects(doc: &mut Map<String, Value>, patch: Map<String, Value>) {
    for (key, mut change) in patch {
        match (doc.get_mut(&key), change) {
            (_, Value::Null) => {
                doc.remove(&key);
            }
            (Some(Value::Object(current)), Value::Object(change)) => merge_objects(current, change),
            (Some(current @ Value::Object(_)), replacement) => *current = replacement,
            (_, taken) => {
                change = taken;
                drop_nulls(&mut change);
                doc.insert(key, change);
            }
        }
    }
}

/// Members that are null go; items of lists stay, null or not.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(entries) => {
            entries.retain(|_, entry| !entry.is_null());
            entries.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges() {
        for (doc, patch, want) in [
            (
                json!({"a": "b", "c": {"d": 1}}),
                json!({"a": null, "c": {"e": 2}}),
                json!({"c": {"d": 1, "e": 2}}),
            ),
            (json!({"a": [1, 2]}), json!({"a": [3]}), json!({"a": [3]})),
            (json!({}), json!({"a": {"b": null, "c": [{"d": null}, null]}}), json!({"a": {"c": [{}, null]}})),
            (json!({"a": 1}), json!({"a": {"b": null}}), json!({"a": {}})),
            (json!({"a": {"b": 1}}), json!({"a": [{"c": null}]}), json!({"a": [{"c": null}]})),
            (json!({"a": null}), json!({"a": {"b": 1}}), json!({"a": {"b": 1}})),
        ] {
            assert_eq!(merge(doc.clone(), patch.clone()).unwrap(), want, "{doc} {patch}");
        }
        assert_eq!(merge(json!({}), json!(null)), Err(PatchError::Malformed("Invalid JSON Patch".into())));
        assert!(matches!(merge(json!({}), json!([])), Err(PatchError::Malformed(_))));
    }
}
