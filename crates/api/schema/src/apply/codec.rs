//! FieldsV1: a set of fields as JSON.
//!
//! Upstream: structured-merge-diff/v6/fieldpath (serialize.go, serialize-pe.go). `f:` is a field, `k:` an item by
//! its keys, `v:` an item by its value, `i:` one by its index, `.` says that the place itself is meant too.
//! Bytes from outside: decoding never panics, and gives up below [`MAX_DEPTH`].

use serde_json::{Map, Value};

use super::scalar::to_json;
use super::set::{FieldSet, PathElement};

/// serde_json reads no deeper either.
pub const MAX_DEPTH: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("parsing key as path element: {0}")]
    Element(String),
    #[error("expected an object in a field set")]
    NotAnObject,
    #[error("the field set is nested more than {MAX_DEPTH} deep")]
    TooDeep,
}

/// Reads a set. Kinds of path elements that aren't known are passed over, as upstream does.
pub fn decode(fields: &Value) -> Result<FieldSet, DecodeError> {
    decode_level(fields, 0).map(|(set, _)| set)
}

/// The set below, and whether the place itself is a member.
fn decode_level(fields: &Value, depth: usize) -> Result<(FieldSet, bool), DecodeError> {
    if depth > MAX_DEPTH {
        return Err(DecodeError::TooDeep);
    }
    let entries = match fields {
        Value::Null => return Ok((FieldSet::default(), true)),
        Value::Object(entries) => entries,
        _ => return Err(DecodeError::NotAnObject),
    };
    let mut set = FieldSet::default();
    let mut member = false;
    for (key, below) in entries {
        if key == "." {
            member = true;
            continue;
        }
        if let Some(element) = decode_element(key)? {
            let (children, below_member) = decode_level(below, depth + 1)?;
            set.put(|| element, below_member, children);
        }
    }
    let member = member || set.is_empty();
    Ok((set, member))
}

fn decode_element(key: &str) -> Result<Option<PathElement>, DecodeError> {
    let bad = |problem: String| DecodeError::Element(problem);
    if key.len() < 2 {
        return Err(bad("key must be 2 characters long:".to_string()));
    }
    if key.as_bytes()[1] != b':' {
        return Err(bad(format!("missing colon: {key}")));
    }
    let content = &key[2..];
    Ok(Some(match key.as_bytes()[0] {
        b'f' => PathElement::field(content),
        b'v' => PathElement::Value(serde_json::from_str(content).map_err(|error| bad(error.to_string()))?),
        b'i' => PathElement::Index(content.parse().map_err(|_| bad(format!("{content:?} is no index")))?),
        b'k' => {
            let fields: Map<String, Value> =
                serde_json::from_str(content).map_err(|error| bad(error.to_string()))?;
            let mut fields: Vec<_> =
                fields.into_iter().map(|(name, value)| (name.into_boxed_str(), value)).collect();
            fields.sort_by(|a, b| a.0.cmp(&b.0));
            PathElement::Key(fields)
        }
        _ => return Ok(None),
    }))
}

/// Writes a set.
pub fn encode(set: &FieldSet) -> Value {
    let mut out = Map::new();
    for node in &set.nodes {
        let mut below = encode(&node.children);
        if node.member
            && !node.children.is_empty()
            && let Value::Object(below) = &mut below
        {
            below.insert(".".to_string(), Value::Object(Map::new()));
        }
        out.insert(encode_element(&node.element), below);
    }
    Value::Object(out)
}

fn encode_element(element: &PathElement) -> String {
    match element {
        PathElement::Field(name) => format!("f:{name}"),
        PathElement::Value(value) => format!("v:{}", to_json(value)),
        PathElement::Index(at) => format!("i:{at}"),
        PathElement::Key(fields) => {
            let mut out = String::from("k:{");
            for (at, (name, value)) in fields.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(&**name).to_string());
                out.push(':');
                out.push_str(&to_json(value));
            }
            out.push('}');
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn round_trip() {
        for fields in [
            json!({}),
            json!({"f:spec": {".": {}, "f:replicas": {}}}),
            json!({"f:ports": {r#"k:{"containerPort":80,"protocol":"TCP"}"#: {".": {}, "f:name": {}}}}),
            json!({"f:finalizers": {".": {}, r#"v:"a/b""#: {}, "i:3": {}}}),
        ] {
            assert_eq!(encode(&decode(&fields).unwrap()), fields);
        }
        // Other writers' spelling becomes ours.
        let odd = json!({"f:p": {r#"k:{"z":"x", "a":80.0}"#: {"x:unknown": {}}, "f:q": null}});
        let ours = json!({"f:p": {r#"k:{"a":80,"z":"x"}"#: {}, "f:q": {}}});
        assert_eq!(encode(&decode(&odd).unwrap()), ours);
    }

    #[test]
    fn foreign_bytes() {
        for bad in [
            json!("x"),
            json!({"": {}}),
            json!({"f": {}}),
            json!({"é": {}}),
            json!({"fé": {}}),
            json!({"k:[]": {}}),
            json!({"k:": {}}),
            json!({"v:{": {}}),
            json!({"i:x": {}}),
            json!({"f:a": 1}),
        ] {
            assert!(decode(&bad).is_err(), "{bad}");
        }
        let mut deep = json!({});
        for _ in 0..1000 {
            deep = json!({"f:a": deep});
        }
        assert_eq!(decode(&deep), Err(DecodeError::TooDeep));
    }
}
