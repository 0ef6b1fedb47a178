//! JSON patch, RFC 6902.
//!
//! Upstream: gopkg.in/evanphx/json-patch.v4/patch.go as called by endpoints/handlers/patch.go, with its habits:
//! `replace` on an object's missing key adds it, negative indices count from the end, `copy` of a missing key
//! copies null. Limits: 10000 operations, 3 MiB copied, and, which upstream leaves to its decoder, how deep the
//! result may nest: copying a document into itself doubles that every time.

use std::io;

use serde_json::{Map, Value};

use super::PatchError;
use super::wording::{json_kind, quoted};

/// Upstream's maxJSONPatchOperations.
pub const MAX_OPERATIONS: usize = 10_000;
/// Upstream's JSONPatchMaxCopyBytes.
pub const MAX_COPY_SIZE_BYTES: usize = 3 * 1024 * 1024;

/// More than a parser lets through.
pub const MAX_DEPTH: usize = 200;

const MISSING: &str = "missing value";
const INVALID_INDEX: &str = "invalid index referenced";

/// Applies the operations of `patch` to `doc` one after the other.
pub fn json(doc: Value, patch: &Value) -> Result<Value, PatchError> {
    let operations = operations(patch)?;
    if operations.len() > MAX_OPERATIONS {
        return Err(PatchError::TooLarge(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut doc = doc;
    let mut copied_size_bytes = 0;
    for operation in operations {
        run(&mut doc, operation, &mut copied_size_bytes).map_err(PatchError::Unprocessable)?;
    }
    Ok(doc)
}

/// What strict field validation says about operations: members that no operation has.
pub fn unknown_fields(patch: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (at, operation) in patch.as_array().into_iter().flatten().enumerate() {
        for key in operation.as_object().into_iter().flat_map(Map::keys) {
            if !matches!(key.as_str(), "op" | "path" | "from" | "value") {
                found.push(format!("json patch unknown field {}", quoted(&format!("[{at}].{key}"))));
            }
        }
    }
    found
}

/// Checks the patch's form: a list of objects whose `op`, `path` and `from` are strings.
fn operations(patch: &Value) -> Result<Vec<&Map<String, Value>>, PatchError> {
    let malformed =
        |text: String| PatchError::Malformed(format!("error decoding patch: json: cannot unmarshal {text}"));
    let items = match patch {
        Value::Null => return Ok(Vec::new()),
        Value::Array(items) => items,
        other => {
            return Err(malformed(format!(
                "{} into Go value of type []handlers.jsonPatchOp",
                json_kind(other)
            )));
        }
    };
    let mut operations = Vec::with_capacity(items.len());
    for item in items {
        let operation = item.as_object().ok_or_else(|| {
            malformed(format!("{} into Go value of type handlers.jsonPatchOp", json_kind(item)))
        })?;
        for name in ["op", "path", "from"] {
            if let Some(value) = operation.get(name).filter(|value| !value.is_string() && !value.is_null()) {
                return Err(malformed(format!(
                    "{} into Go struct field jsonPatchOp.{name} of type string",
                    json_kind(value)
                )));
            }
        }
        operations.push(operation);
    }
    Ok(operations)
}

fn run(doc: &mut Value, operation: &Map<String, Value>, copied_size_bytes: &mut usize) -> Result<(), String> {
    let kind = operation.get("op").and_then(Value::as_str).unwrap_or("unknown");
    let path = operation.get("path").and_then(Value::as_str);
    let from = operation.get("from").and_then(Value::as_str);
    match kind {
        "add" => {
            let path = path.ok_or("add operation failed to decode path: missing value")?;
            let target = find(doc, path).ok_or_else(|| {
                format!("add operation does not apply: doc is missing path: \"{path}\": {MISSING}")
            })?;
            let value = operation.get("value").cloned().unwrap_or_default();
            check_depth(path, &value)?;
            target.add(value).map_err(|error| format!("error in add for path: '{path}': {error}"))
        }
        "remove" => {
            let path = path.ok_or("remove operation failed to decode path: missing value")?;
            let target = find(doc, path).ok_or_else(|| {
                format!("remove operation does not apply: doc is missing path: \"{path}\": {MISSING}")
            })?;
            match target.remove() {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("error in remove for path: '{path}': {error}")),
            }
        }
        "replace" => replace(doc, path, operation.get("value")),
        "move" => transfer(doc, from, path, None),
        "copy" => transfer(doc, from, path, Some(copied_size_bytes)),
        "test" => test(doc, path, operation.get("value")),
        other => Err(format!("Unexpected kind: {other}")),
    }
}

fn replace(doc: &mut Value, path: Option<&str>, value: Option<&Value>) -> Result<(), String> {
    let path =
        path.ok_or("replace operation failed to decode path: operation missing path field: missing value")?;
    if path.is_empty() {
        match value {
            Some(value @ (Value::Object(_) | Value::Array(_))) => *doc = value.clone(),
            _ => return Err("replace operation value must be object or array: %!w(<nil>)".to_string()),
        }
        return Ok(());
    }
    let target = find(doc, path)
        .ok_or_else(|| format!("replace operation does not apply: doc is missing path: {path}: {MISSING}"))?;
    let value = value.cloned().unwrap_or_default();
    check_depth(path, &value)?;
    match target.container {
        Container::Object(entries) => {
            entries.insert(target.key, value);
            Ok(())
        }
        Container::Array(items) => match index(&target.key, items.len()) {
            Ok(at) => {
                items[at] = value;
                Ok(())
            }
            Err(_) => Err(format!("replace operation does not apply: doc is missing key: {path}: {MISSING}")),
        },
    }
}

/// Move, or copy where a budget of bytes is given.
fn transfer(
    doc: &mut Value,
    from: Option<&str>,
    path: Option<&str>,
    copied_size_bytes: Option<&mut usize>,
) -> Result<(), String> {
    let kind = if copied_size_bytes.is_some() { "copy" } else { "move" };
    let from = from.ok_or_else(|| {
        format!("{kind} operation failed to decode from: operation, missing from field: {MISSING}")
    })?;
    let source = find(doc, from).ok_or_else(|| {
        format!("{kind} operation does not apply: doc is missing from path: {from}: {MISSING}")
    })?;
    let key = source.key.clone();
    let value = match copied_size_bytes.is_some() {
        true => source.get().map(Option::unwrap_or_default),
        false => source.remove(),
    };
    let value = value.map_err(|error| match kind {
        "copy" => format!("error in copy for from: '{from}': {error}"),
        _ => format!("error in move for path: '{key}': {error}"),
    })?;
    let path = path.ok_or_else(|| match kind {
        "copy" => format!("copy operation failed to decode path: {MISSING}"),
        _ => format!("move operation failed to decode path: operation missing path field: {MISSING}"),
    })?;
    let target = find(doc, path).ok_or_else(|| {
        format!("{kind} operation does not apply: doc is missing destination path: {path}: {MISSING}")
    })?;
    if let Some(copied_size_bytes) = copied_size_bytes {
        *copied_size_bytes = copied_size_bytes.saturating_add(size_bytes(&value));
        if *copied_size_bytes > MAX_COPY_SIZE_BYTES {
            return Err(format!(
                "Unable to complete the copy, the accumulated size increase of copy is {copied_size_bytes}, \
                 exceeding the limit {MAX_COPY_SIZE_BYTES}"
            ));
        }
    }
    check_depth(path, &value)?;
    target.add(value).map_err(|error| match kind {
        "copy" => format!("error while adding value during copy: {error}"),
        _ => format!("error in move for path: '{path}': {error}"),
    })
}

fn test(doc: &mut Value, path: Option<&str>, want: Option<&Value>) -> Result<(), String> {
    let path =
        path.ok_or("test operation failed to decode path: operation missing path field: missing value")?;
    let want = want.unwrap_or(&Value::Null);
    let passed = if path.is_empty() {
        doc == want
    } else {
        let target = find(doc, path)
            .ok_or_else(|| format!("test operation does not apply: is missing path: {path}: {MISSING}"))?;
        let value = target.get().map_err(|error| format!("error in test for path: '{path}': {error}"))?;
        value.unwrap_or_default() == *want
    };
    if passed { Ok(()) } else { Err(format!("testing value {path} failed: test failed")) }
}

enum Container<'a> {
    Object(&'a mut Map<String, Value>),
    Array(&'a mut Vec<Value>),
}

/// The place that a pointer names: the container and the key in it.
struct Target<'a> {
    container: Container<'a>,
    key: String,
}

/// None where a step on the way isn't there or can't hold anything.
fn find<'a>(doc: &'a mut Value, path: &str) -> Option<Target<'a>> {
    let mut parts = path.split('/');
    parts.next();
    let mut parts: Vec<&str> = parts.collect();
    let key = unescape(parts.pop()?);
    let mut at = doc;
    for part in parts {
        let part = unescape(part);
        at = match at {
            Value::Object(entries) => entries.get_mut(&part)?,
            Value::Array(items) => {
                let at = index(&part, items.len()).ok()?;
                items.get_mut(at)?
            }
            _ => return None,
        };
    }
    let container = match at {
        Value::Object(entries) => Container::Object(entries),
        Value::Array(items) => Container::Array(items),
        _ => return None,
    };
    Some(Target { container, key })
}

impl Target<'_> {
    /// None for an object's missing key.
    fn get(&self) -> Result<Option<Value>, String> {
        match &self.container {
            Container::Object(entries) => Ok(entries.get(&self.key).cloned()),
            Container::Array(items) => Ok(items.get(index(&self.key, items.len())?).cloned()),
        }
    }

    fn add(self, value: Value) -> Result<(), String> {
        match self.container {
            Container::Object(entries) => {
                entries.insert(self.key, value);
            }
            Container::Array(items) if self.key == "-" => items.push(value),
            Container::Array(items) => {
                let at = number(&self.key).map_err(|error| {
                    format!("value was not a proper array index: '{}': {error}", self.key)
                })?;
                items.insert(bounded(at, items.len() + 1)?, value);
            }
        }
        Ok(())
    }

    fn remove(self) -> Result<Value, String> {
        match self.container {
            Container::Object(entries) => entries
                .remove(&self.key)
                .ok_or_else(|| format!("Unable to remove nonexistent key: {}: {MISSING}", self.key)),
            Container::Array(items) => {
                let at = index(&self.key, items.len())?;
                Ok(items.remove(at))
            }
        }
    }
}

fn unescape(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// The index that `key` means in a list of `len` items.
fn index(key: &str, len: usize) -> Result<usize, String> {
    bounded(number(key)?, len)
}

fn bounded(at: i64, len: usize) -> Result<usize, String> {
    let invalid = || format!("Unable to access invalid index: {at}: {INVALID_INDEX}");
    let from_start = if at < 0 { at.checked_add_unsigned(len as u64).ok_or_else(invalid)? } else { at };
    match usize::try_from(from_start) {
        Ok(from_start) if from_start < len => Ok(from_start),
        _ => Err(invalid()),
    }
}

/// Go's strconv.Atoi.
fn number(key: &str) -> Result<i64, String> {
    key.parse().map_err(|error: std::num::ParseIntError| {
        let problem = match error.kind() {
            std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => "value out of range",
            _ => "invalid syntax",
        };
        format!("strconv.Atoi: parsing {}: {problem}", quoted(key))
    })
}

/// Whether a value may go where `path` says.
fn check_depth(path: &str, value: &Value) -> Result<(), String> {
    fn within(value: &Value, left: usize) -> bool {
        match value {
            Value::Object(members) => left > 0 && members.values().all(|member| within(member, left - 1)),
            Value::Array(items) => left > 0 && items.iter().all(|item| within(item, left - 1)),
            _ => true,
        }
    }
    let above = path.matches('/').count();
    let fits = above <= MAX_DEPTH && within(value, MAX_DEPTH - above);
    if fits { Ok(()) } else { Err("exceeded max depth".to_string()) }
}

/// The length of a value's JSON, counted without writing it.
fn size_bytes(value: &Value) -> usize {
    struct Counter(usize);
    impl io::Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counter = Counter(0);
    match serde_json::to_writer(&mut counter, value) {
        Ok(()) => counter.0,
        Err(_) => usize::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json as j;

    #[test]
    fn operations_apply() {
        let doc = j!({"a": {"b": [1, 2, 3]}, "x/y": 1, "m~n": null});
        for (patch, want) in [
            (
                j!([{"op": "add", "path": "/a/b/1", "value": 9}]),
                j!({"a": {"b": [1, 9, 2, 3]}, "x/y": 1, "m~n": null}),
            ),
            (
                j!([{"op": "add", "path": "/a/b/-", "value": 9}]),
                j!({"a": {"b": [1, 2, 3, 9]}, "x/y": 1, "m~n": null}),
            ),
            (
                j!([{"op": "add", "path": "/a/b/-1", "value": 9}]),
                j!({"a": {"b": [1, 2, 3, 9]}, "x/y": 1, "m~n": null}),
            ),
            (j!([{"op": "remove", "path": "/a/b/-1"}]), j!({"a": {"b": [1, 2]}, "x/y": 1, "m~n": null})),
            (
                j!([{"op": "remove", "path": "/x~1y"}, {"op": "remove", "path": "/m~0n"}]),
                j!({"a": {"b": [1, 2, 3]}}),
            ),
            (
                j!([{"op": "replace", "path": "/new", "value": {}}]),
                j!({"a": {"b": [1, 2, 3]}, "x/y": 1, "m~n": null, "new": {}}),
            ),
            (
                j!([{"op": "move", "from": "/a/b/0", "path": "/x~1y"}]),
                j!({"a": {"b": [2, 3]}, "x/y": 1, "m~n": null}),
            ),
            (
                j!([{"op": "copy", "from": "/a/b", "path": "/c"}, {"op": "remove", "path": "/a"}]),
                j!({"c": [1, 2, 3], "x/y": 1, "m~n": null}),
            ),
            (
                j!([{"op": "test", "path": "/a/b/0", "value": 1}, {"op": "test", "path": "/gone"}]),
                doc.clone(),
            ),
            (j!([{"op": "replace", "path": "", "value": {"z": 1}}]), j!({"z": 1})),
        ] {
            assert_eq!(json(doc.clone(), &patch).unwrap(), want, "{patch}");
        }
    }

    #[test]
    fn failures_name_the_place() {
        let doc = j!({"a": {"b": [1]}, "s": "text"});
        for (patch, want) in [
            (
                j!([{"op": "add", "path": "/q/r", "value": 1}]),
                "add operation does not apply: doc is missing path: \"/q/r\": missing value",
            ),
            (
                j!([{"op": "add", "path": "", "value": 1}]),
                "add operation does not apply: doc is missing path: \"\": missing value",
            ),
            (
                j!([{"op": "add", "path": "/a/b/5", "value": 1}]),
                "error in add for path: '/a/b/5': Unable to access invalid index: 5: invalid index referenced",
            ),
            (
                j!([{"op": "add", "path": "/a/b/x", "value": 1}]),
                "error in add for path: '/a/b/x': value was not a proper array index: 'x': strconv.Atoi: parsing \"x\": invalid syntax",
            ),
            (
                j!([{"op": "remove", "path": "/q"}]),
                "error in remove for path: '/q': Unable to remove nonexistent key: q: missing value",
            ),
            (
                j!([{"op": "remove", "path": "/s/t"}]),
                "remove operation does not apply: doc is missing path: \"/s/t\": missing value",
            ),
            (
                j!([{"op": "replace", "path": "/a/b/1", "value": 1}]),
                "replace operation does not apply: doc is missing key: /a/b/1: missing value",
            ),
            (j!([{"op": "test", "path": "/a/b/0", "value": 2}]), "testing value /a/b/0 failed: test failed"),
            (
                j!([{"op": "move", "path": "/a"}]),
                "move operation failed to decode from: operation, missing from field: missing value",
            ),
            (j!([{"path": "/a"}]), "Unexpected kind: unknown"),
        ] {
            assert_eq!(
                json(doc.clone(), &patch),
                Err(PatchError::Unprocessable(want.to_string())),
                "{patch}"
            );
        }
    }

    #[test]
    fn limits_and_form() {
        let many = Value::Array(vec![j!({"op": "test", "path": "/a"}); MAX_OPERATIONS + 1]);
        assert_eq!(
            json(j!({}), &many),
            Err(PatchError::TooLarge(
                "The allowed maximum operations in a JSON patch is 10000, got 10001".into()
            ))
        );
        let mut copies = vec![j!({"op": "add", "path": "/l", "value": ["x".repeat(1024)]})];
        copies.extend(std::iter::repeat_n(j!({"op": "copy", "from": "/l", "path": "/l/-"}), 64));
        assert!(matches!(json(j!({}), &Value::Array(copies)), Err(PatchError::Unprocessable(text))
            if text.starts_with("Unable to complete the copy, the accumulated size increase of copy is")));
        let mut nesting = Vec::new();
        for at in 0..20 {
            let path = "/a".repeat((1 << at) + 1);
            nesting.push(j!({"op": "copy", "from": "/a", "path": path}));
        }
        let doc = j!({"a": {"b": {}}});
        let deeper = json(doc, &Value::Array(nesting)).map(|_| ());
        assert_eq!(deeper, Err(PatchError::Unprocessable("exceeded max depth".into())));
        for (patch, want) in [
            (j!({}), "object into Go value of type []handlers.jsonPatchOp"),
            (j!(["x"]), "string into Go value of type handlers.jsonPatchOp"),
            (j!([{"op": 1}]), "number into Go struct field jsonPatchOp.op of type string"),
        ] {
            let want = format!("error decoding patch: json: cannot unmarshal {want}");
            assert_eq!(json(j!({}), &patch), Err(PatchError::Malformed(want)));
        }
        assert_eq!(unknown_fields(&j!([{"op": "add", "foo": 1}])), [r#"json patch unknown field "[0].foo""#]);
    }
}
