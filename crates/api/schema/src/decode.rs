//! Reads JSON and YAML into a `Value`, noting duplicate and unknown fields on the way.
//!
//! Upstream: sigs.k8s.io/json and staging/src/k8s.io/apimachinery/pkg/runtime/serializer/json/json.go.
//!
//! What stays true: one pass and one tree; fields that the type doesn't know are skipped without being kept;
//! what is noted comes in document order, with upstream's paths and words, at most 100 notes. Nesting is
//! bounded by the parsers (128 levels; Go allows 10000, which no real object needs).
//! Field names are case-sensitive. Contents of RawExtension and FieldsV1 are taken as they are.
//! YAML is read as upstream reads it: its first document, merge keys followed, whole floats made integers, and unknown
//! fields in the order of their names. Deliberate difference: the lines of duplicates are found by indentation; where
//! that fails they are noted by path as in JSON.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::types::{Element, Shape, Type};

mod unicode;
mod yaml;

const NOTES_MAX: usize = 100;

/// What a strict reader objects to and a lenient one passes over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StrictError {
    #[error("unknown field {0:?}")]
    Unknown(String),
    #[error("duplicate field {0:?}")]
    Duplicate(String),
    #[error("line {line}: key {key:?} already set in map")]
    YamlDuplicate { line: usize, key: String },
}

#[derive(Debug)]
pub struct Decoded {
    pub value: Value,
    pub strict: Vec<StrictError>,
}

impl Decoded {
    /// `strict decoding error: unknown field "spec.foo", duplicate field "spec.x"`; None if all is well.
    pub fn strict_message(&self) -> Option<String> {
        if self.strict.is_empty() {
            return None;
        }
        let words: Vec<String> = self.strict.iter().map(StrictError::to_string).collect();
        Some(format!("strict decoding error: {}", words.join(", ")))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// In the words of Go's encoding/json.
    #[error("{0}")]
    Json(String),
    #[error("yaml: {0}")]
    Yaml(String),
}

/// Reads one JSON document. Without a type nothing counts as unknown, duplicates still do.
pub fn json(bytes: &[u8], ty: Option<&Type>) -> Result<Decoded, DecodeError> {
    match read_json(bytes, ty) {
        Ok(decoded) => Ok(decoded),
        // Go puts U+FFFD in the place of what is no character.
        Err(error) => match unicode::repaired(bytes) {
            Some(repaired) => read_json(repaired.as_bytes(), ty),
            None => Err(error),
        },
    }
}

fn read_json(bytes: &[u8], ty: Option<&Type>) -> Result<Decoded, DecodeError> {
    let notes = RefCell::new(Vec::new());
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = seed(ty, &notes).deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match value {
        Ok(value) => Ok(Decoded { value, strict: notes.into_inner() }),
        Err(error) => Err(DecodeError::Json(go_syntax_error(bytes, &error))),
    }
}

/// Reads the first document of YAML (which JSON is, too).
pub fn yaml(bytes: &[u8], ty: Option<&Type>) -> Result<Decoded, DecodeError> {
    let doubles = RefCell::new(Vec::new());
    let Some(document) = serde_yaml_ng::Deserializer::from_slice(bytes).next() else {
        return Ok(Decoded { value: Value::Null, strict: Vec::new() });
    };
    let mut value = seed(None, &doubles)
        .deserialize(document)
        .map_err(|error| DecodeError::Yaml(yaml::go_error(&error.to_string())))?;
    yaml::as_go_reads(&mut value);
    let mut strict = yaml::with_lines(bytes, doubles.into_inner());
    if ty.is_some() && value.is_object() {
        let notes = RefCell::new(Vec::new());
        value = seed(ty, &notes).deserialize(value).map_err(|error| DecodeError::Json(error.to_string()))?;
        strict.extend(notes.into_inner());
    }
    Ok(Decoded { value, strict })
}

type Notes = RefCell<Vec<StrictError>>;

fn seed<'a>(ty: Option<&'a Type>, notes: &'a Notes) -> Node<'a> {
    let expect = ty.map_or(Expect::Untyped, Expect::Object);
    Node { expect, path: &Path { parent: None, step: Step::Root }, notes }
}

/// Where the reader stands; lives on the stack, made into text only for a note.
struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(out)?;
        }
        match self.step {
            Step::Root => Ok(()),
            Step::Key(key) if self.parent.is_some_and(|parent| parent.parent.is_some()) => {
                write!(out, ".{key}")
            }
            Step::Key(key) => out.write_str(key),
            Step::Index(index) => write!(out, "[{index}]"),
        }
    }
}

#[derive(Clone, Copy)]
enum Expect<'a> {
    Object(&'a Type),
    Element(&'a Element),
    /// Anything; duplicates count.
    Untyped,
    /// Anything, and Go wouldn't look inside.
    Opaque,
}

impl<'a> Expect<'a> {
    fn object(self) -> Option<&'a Type> {
        match self {
            Expect::Object(ty) => Some(ty),
            Expect::Element(element) => element.object(),
            _ => None,
        }
    }

    /// What stands under a key; None for a field that isn't known.
    fn under(self, key: &str) -> Option<Expect<'a>> {
        if let Some(ty) = self.object() {
            return match (ty.field(key), &ty.additional) {
                (Some(field), _) => Some(Expect::of(&field.element)),
                (None, Some(additional)) => Some(Expect::of(additional)),
                (None, None) => (ty.preserve_unknown).then_some(Expect::Untyped),
            };
        }
        match self {
            Expect::Element(Element { shape: Shape::Map(items), .. }) => Some(Expect::of(items)),
            Expect::Opaque => Some(Expect::Opaque),
            _ => Some(Expect::Untyped),
        }
    }

    fn item(self) -> Expect<'a> {
        match self {
            Expect::Element(Element { shape: Shape::Array(items), .. }) => Expect::of(items),
            Expect::Opaque => Expect::Opaque,
            _ => Expect::Untyped,
        }
    }

    fn of(element: &'a Element) -> Expect<'a> {
        match element.shape {
            Shape::RawExtension
            | Shape::FieldsV1
            | Shape::SchemaOrArray
            | Shape::SchemaOrBool
            | Shape::SchemaOrStrings => Expect::Opaque,
            _ => Expect::Element(element),
        }
    }
}

struct Node<'a> {
    expect: Expect<'a>,
    path: &'a Path<'a>,
    notes: &'a Notes,
}

impl Node<'_> {
    fn note(&self, note: StrictError) {
        let mut notes = self.notes.borrow_mut();
        if notes.len() < NOTES_MAX && !notes.contains(&note) {
            notes.push(note);
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        self.deserialize(reader)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let path = Path { parent: Some(self.path), step: Step::Index(list.len()) };
            let node = Node { expect: self.expect.item(), path: &path, notes: self.notes };
            match items.next_element_seed(node)? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key_seed(Key)? {
            let path = Path { parent: Some(self.path), step: Step::Key(&key) };
            let opaque = matches!(self.expect, Expect::Opaque);
            if !opaque && map.contains_key(&key) {
                self.note(StrictError::Duplicate(path.to_string()));
            }
            match self.expect.under(&key) {
                Some(expect) => {
                    let value = entries.next_value_seed(Node { expect, path: &path, notes: self.notes })?;
                    match map.get_mut(&key) {
                        // Go reads a second object into the first one.
                        Some(present) if !matches!(expect, Expect::Untyped | Expect::Opaque) => {
                            merge(present, value);
                        }
                        _ => drop(map.insert(key, value)),
                    }
                }
                None => {
                    self.note(StrictError::Unknown(path.to_string()));
                    entries.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Value::Object(map))
    }

    fn visit_enum<A: serde::de::EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(A::Error::custom("tags are not supported"))
    }
}

fn merge(present: &mut Value, value: Value) {
    match (present, value) {
        (Value::Object(fields), Value::Object(more)) => {
            for (key, value) in more {
                match fields.get_mut(&key) {
                    Some(field) => merge(field, value),
                    None => drop(fields.insert(key, value)),
                }
            }
        }
        // Go passes over null.
        (Value::Object(_), Value::Null) => {}
        (present, value) => *present = value,
    }
}

/// Map keys: strings, and for YAML also the plain scalars that become their text.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<String, D::Error> {
        reader.deserialize_any(self)
    }
}

impl Visitor<'_> for Key {
    type Value = String;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string key")
    }
    fn visit_str<E>(self, key: &str) -> Result<String, E> {
        Ok(key.to_owned())
    }
    fn visit_string<E>(self, key: String) -> Result<String, E> {
        Ok(key)
    }
    fn visit_bool<E>(self, key: bool) -> Result<String, E> {
        Ok(key.to_string())
    }
    fn visit_i64<E>(self, key: i64) -> Result<String, E> {
        Ok(key.to_string())
    }
    fn visit_u64<E>(self, key: u64) -> Result<String, E> {
        Ok(key.to_string())
    }
    fn visit_f64<E>(self, key: f64) -> Result<String, E> {
        Ok(key.to_string())
    }
}

/// Go's wording of a syntax error, as near as serde_json's verdict and position allow.
fn go_syntax_error(bytes: &[u8], error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "unexpected end of JSON input".to_owned();
    }
    let text = error.to_string();
    let line_start = match error.line() {
        0 | 1 => 0,
        line => {
            bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(line - 2).map_or(0, |(at, _)| at + 1)
        }
    };
    let at = line_start + error.column().saturating_sub(1);
    // Go looks at bytes.
    let offender = match text.starts_with("control character") {
        true => bytes[..bytes.len().min(at + 1)].iter().rev().find(|byte| **byte < b' '),
        false => bytes.get(at),
    };
    let offender = offender.map(|byte| char::from(*byte));
    let place = [
        ("expected value", "looking for beginning of value"),
        ("key must be a string", "looking for beginning of object key string"),
        ("trailing comma", "looking for beginning of value"),
        ("expected `,` or `}`", "after object key:value pair"),
        ("expected `,` or `]`", "after array element"),
        ("expected `:`", "after object key"),
        ("trailing characters", "after top-level value"),
        ("invalid number", "in numeric literal"),
        ("invalid escape", "in string escape code"),
        ("control character", "in string literal"),
        ("expected ident", "in literal"),
    ];
    match (offender, place.iter().find(|(theirs, _)| text.starts_with(theirs))) {
        (Some(offender), Some((_, place))) => format!("invalid character {offender:?} {place}"),
        (_, _) if text.starts_with("recursion limit") => "exceeded max depth".to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deployment() -> Option<&'static Type> {
        crate::by_gvk("apps", "v1", "Deployment")
    }

    #[test]
    fn strict_notes_in_document_order() {
        let body = br#"{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"x","unknownMeta":"foo",
          "labels":{"a":"1","a":"2"}},
          "spec":{"unknown1":"v","unknownDupe":1,"unknownDupe":2,"paused":true,"paused":false,"template":{"spec":{
          "containers":[{"name":"n","imagePullPolicy":"a","imagePullPolicy":"b","unknownNested":{"x":1}}],"Volumes":[]}}}}"#;
        let decoded = json(body, deployment()).unwrap();
        assert_eq!(
            decoded.strict_message().unwrap(),
            concat!(
                r#"strict decoding error: unknown field "metadata.unknownMeta", duplicate field "metadata.labels.a", "#,
                r#"unknown field "spec.unknown1", unknown field "spec.unknownDupe", "#,
                r#"duplicate field "spec.paused", "#,
                r#"duplicate field "spec.template.spec.containers[0].imagePullPolicy", "#,
                r#"unknown field "spec.template.spec.containers[0].unknownNested", "#,
                r#"unknown field "spec.template.spec.Volumes""#
            )
        );
        assert_eq!(decoded.value["spec"]["paused"], json!(false));
        assert_eq!(decoded.value["spec"].get("unknown1"), None);
    }

    #[test]
    fn untyped_and_opaque() {
        let decoded = json(br#"{"a":{"b":1,"b":2}}"#, None).unwrap();
        assert_eq!(decoded.strict, [StrictError::Duplicate("a.b".into())]);
        let body = br#"{"data":{"x":1,"x":2,"y":{"any":true}}}"#;
        let decoded = json(body, crate::by_gvk("apps", "v1", "ControllerRevision")).unwrap();
        assert_eq!((decoded.strict, decoded.value), (vec![], json!({"data":{"x":2,"y":{"any":true}}})));
    }

    #[test]
    fn yaml_documents() {
        let text = b"apiVersion: apps/v1\nkind: Deployment\nspec:\n  replicas: 0x2\n  foo: 1\n  paused: true\n  paused: true\n";
        let decoded = yaml(text, deployment()).unwrap();
        assert_eq!(decoded.value["spec"], json!({"replicas": 2, "paused": true}));
        assert_eq!(decoded.strict.len(), 2);
        assert!(yaml(b"a: [", None).is_err());
    }

    #[test]
    fn syntax_errors_in_gos_words() {
        for (text, want) in [
            ("", "unexpected end of JSON input"),
            ("{", "unexpected end of JSON input"),
            ("x", "invalid character 'x' looking for beginning of value"),
            ("{\"a\" 1}", "invalid character '1' after object key"),
            ("{\"a\":1\n \"b\"}", "invalid character '\"' after object key:value pair"),
            ("{} x", "invalid character 'x' after top-level value"),
        ] {
            assert_eq!(json(text.as_bytes(), None).unwrap_err().to_string(), want, "{text}");
        }
        assert!(json("[".repeat(100_000).as_bytes(), None).is_err());
    }
}
