//! Brings a value into the form that Go's decoding and encoding of the same text would leave: unknown fields
//! dropped and named, types checked, well-known values made canonical.
//!
//! Upstream: sigs.k8s.io/json decoding into the structs of staging/src/k8s.io/api, then encoding/json.
//!
//! What stays true: conforming twice changes nothing. The rules, from the struct tags in data/go-1.36.txt:
//! - null is absence (an item of a list or value of a map becomes its zero instead);
//! - false, 0, "", [] and {} are dropped where the field is no pointer and says omitempty;
//! - a struct that is no pointer is always there, `{}` if need be, and so are its fields without omitempty;
//! - a pointer's zero is kept: `replicas: 0` is not the same as no replicas.
//!
//! Custom types have neither tags nor pointers: nothing is filled in and only null is dropped.
//! Deliberate difference: where Go writes null (a nil list, map or time without omitempty), nothing is written.
//! The first type error in field-name order is reported; upstream reports the first in document order.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use crate::quantity;
use crate::time;
use crate::types::{Element, Field, Omit, Shape, Type};

/// Deeper than any built-in kind; values come from parsers bounded at 128.
const DEPTH_MAX: usize = 200;
const UNKNOWN_MAX: usize = 100;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Conformed {
    /// Paths of the dropped fields, as in `unknown field "spec.foo"`.
    pub unknown: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    #[error("json: cannot unmarshal {found} into Go struct field {owner}.{field} of type {expected}")]
    Field { found: String, owner: String, field: String, expected: String },
    #[error("json: cannot unmarshal {found} into Go value of type {expected}")]
    Root { found: String, expected: String },
    #[error("{0}")]
    Quantity(#[from] quantity::QuantityError),
    #[error("parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\"{why}")]
    Time { text: String, why: String },
    #[error("illegal base64 data at input byte {0}")]
    Base64(usize),
    #[error("exceeded max depth")]
    Depth,
}

/// Conforms `value` to `ty` in place.
pub fn conform(ty: &Type, value: &mut Value) -> Result<Conformed, TypeError> {
    let mut walk = Walk { path: Vec::new(), owner: "", unknown: Vec::new(), quiet: 0 };
    match value {
        Value::Object(map) => walk.object(ty, map)?,
        other => {
            return Err(TypeError::Root {
                found: found(other),
                expected: format!("{}.{}", ty.package(), ty.short_name()),
            });
        }
    }
    Ok(Conformed { unknown: walk.unknown })
}

/// The value that Go's zero of this shape encodes to.
pub fn zero(element: &Element) -> Value {
    match &element.shape {
        Shape::Boolean => Value::Bool(false),
        Shape::Int32 | Shape::Int64 | Shape::Double | Shape::IntOrString => Value::from(0),
        Shape::String | Shape::Bytes => Value::from(""),
        Shape::Quantity => Value::from("0"),
        Shape::Array(_) => Value::Array(Vec::new()),
        Shape::Map(_) => Value::Object(Map::new()),
        Shape::Object(ty) => {
            let mut map = Map::new();
            fill(ty, &mut map, 0);
            Value::Object(map)
        }
        _ => Value::Null,
    }
}

/// Adds the fields that Go always writes.
fn fill(ty: &Type, map: &mut Map<String, Value>, depth: usize) {
    if !ty.has_wire || depth > DEPTH_MAX {
        return;
    }
    for field in ty.fields().iter().filter(|field| !field.pointer) {
        if always_written(field) && !map.contains_key(&*field.name) {
            let zero = match field.object() {
                Some(inner) => {
                    let mut map = Map::new();
                    fill(inner, &mut map, depth + 1);
                    Value::Object(map)
                }
                None => zero(&field.element),
            };
            map.insert(field.name.to_string(), zero);
        }
    }
}

fn always_written(field: &Field) -> bool {
    match field.shape {
        // omitempty means nothing for structs.
        Shape::Object(_) | Shape::Quantity | Shape::IntOrString => field.omit != Omit::Zero,
        Shape::Boolean | Shape::Int32 | Shape::Int64 | Shape::Double | Shape::String => {
            field.omit == Omit::Never
        }
        _ => false,
    }
}

/// Go's omitempty leaves this out.
fn left_out(field: &Field, value: &Value) -> bool {
    if field.pointer || field.omit == Omit::Never {
        return false;
    }
    match (&field.shape, value) {
        (Shape::Boolean, Value::Bool(value)) => !value,
        (Shape::Int32 | Shape::Int64 | Shape::Double, Value::Number(number)) => number.as_f64() == Some(0.0),
        (Shape::String | Shape::Bytes, Value::String(text)) => text.is_empty(),
        (Shape::Array(_), Value::Array(list)) => list.is_empty(),
        (Shape::Map(_), Value::Object(map)) => map.is_empty(),
        _ => false,
    }
}

enum Step<'t> {
    Field(&'t str),
    Key(String),
    Index(usize),
}

struct Walk<'t> {
    path: Vec<Step<'t>>,
    /// Name of the struct that the last field belongs to.
    owner: &'t str,
    unknown: Vec<String>,
    /// Inside something that Go decodes by a method of its own, which never minds unknown fields.
    quiet: usize,
}

impl<'t> Walk<'t> {
    fn object(&mut self, ty: &'t Type, map: &mut Map<String, Value>) -> Result<(), TypeError> {
        if self.path.len() > DEPTH_MAX {
            return Err(TypeError::Depth);
        }
        self.prune(ty, map);
        let outer = std::mem::replace(&mut self.owner, ty.short_name());
        for field in ty.fields() {
            let Some(value) = map.get_mut(&*field.name) else { continue };
            if value.is_null() && !field.nullable {
                map.remove(&*field.name);
                continue;
            }
            self.path.push(Step::Field(&field.name));
            self.element(&field.element, &field.go_type, value)?;
            self.path.pop();
            if value.is_null() && !field.nullable || left_out(field, value) {
                map.remove(&*field.name);
            }
        }
        if let Some(additional) = &ty.additional {
            for (key, value) in map.iter_mut().filter(|(key, _)| ty.field(key).is_none()) {
                self.path.push(Step::Key(key.clone()));
                self.element(additional, "", value)?;
                self.path.pop();
            }
        }
        self.owner = outer;
        fill(ty, map, self.path.len());
        Ok(())
    }

    fn prune(&mut self, ty: &Type, map: &mut Map<String, Value>) {
        if ty.preserve_unknown || ty.additional.is_some() || map.keys().all(|key| ty.field(key).is_some()) {
            return;
        }
        let unknown: Vec<String> = map.keys().filter(|key| ty.field(key).is_none()).cloned().collect();
        for key in unknown {
            map.remove(&key);
            if self.quiet == 0 && self.unknown.len() < UNKNOWN_MAX {
                let path = self.strict_path();
                self.unknown.push(if path.is_empty() { key } else { format!("{path}.{key}") });
            }
        }
    }

    fn element(&mut self, element: &'t Element, go_type: &str, value: &mut Value) -> Result<(), TypeError> {
        if value.is_null() && element.nullable {
            return Ok(());
        }
        let fits = match (&element.shape, &mut *value) {
            (Shape::Boolean, Value::Bool(_)) | (Shape::String, Value::String(_)) => true,
            (Shape::Int32 | Shape::IntOrString, Value::Number(number)) => {
                number.as_i64().is_some_and(|number| i32::try_from(number).is_ok())
            }
            (Shape::IntOrString, Value::String(_)) => true,
            (Shape::Int64, Value::Number(number)) => number.as_i64().is_some(),
            (Shape::Double, Value::Number(_)) => true,
            (Shape::Bytes, Value::String(text)) => return bytes(text),
            (Shape::Time | Shape::MicroTime, Value::String(text)) => {
                return canonical_time(text, matches!(element.shape, Shape::MicroTime));
            }
            (Shape::Quantity, value) => return canonical_quantity(value),
            (Shape::RawExtension | Shape::FieldsV1 | Shape::Any, _)
            | (Shape::AnyObject, Value::Object(_)) => true,
            (Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStrings, value) => {
                return self.schema_or(value);
            }
            (Shape::Array(items), Value::Array(list)) => return self.list(items, go_type, list),
            (Shape::Map(items), Value::Object(map)) => return self.map(items, go_type, map),
            (Shape::Object(ty), Value::Object(map)) => return self.object(ty, map),
            _ => false,
        };
        if fits { Ok(()) } else { Err(self.mismatch(element, go_type, value)) }
    }

    fn list(&mut self, items: &'t Element, go_type: &str, list: &mut [Value]) -> Result<(), TypeError> {
        let item_type = go_type.strip_prefix("[]").unwrap_or("");
        for (at, item) in list.iter_mut().enumerate() {
            if item.is_null() && !items.nullable {
                *item = zero(items);
                // Go's zero of a time is written as null.
                if item.is_null() {
                    continue;
                }
            }
            self.path.push(Step::Index(at));
            self.element(items, item_type, item)?;
            self.path.pop();
        }
        Ok(())
    }

    fn map(
        &mut self,
        items: &'t Element,
        go_type: &str,
        map: &mut Map<String, Value>,
    ) -> Result<(), TypeError> {
        let item_type =
            go_type.strip_prefix("map[").and_then(|rest| rest.split_once(']')).map_or("", |(_, item)| item);
        for (key, value) in map.iter_mut() {
            if value.is_null() && !items.nullable {
                *value = zero(items);
                if value.is_null() {
                    continue;
                }
            }
            self.path.push(Step::Key(key.clone()));
            self.element(items, item_type, value)?;
            self.path.pop();
        }
        Ok(())
    }

    /// apiextensions' unions of a schema with something simpler. What fits nothing is let through here and
    /// refused by the validation of the definition.
    fn schema_or(&mut self, value: &mut Value) -> Result<(), TypeError> {
        let Some(schema) = crate::by_name(crate::types::JSON_SCHEMA_PROPS) else { return Ok(()) };
        self.quiet += 1;
        match value {
            Value::Object(map) => self.object(schema, map)?,
            Value::Array(list) => {
                for (at, map) in list.iter_mut().enumerate() {
                    if let Value::Object(map) = map {
                        self.path.push(Step::Index(at));
                        self.object(schema, map)?;
                        self.path.pop();
                    }
                }
            }
            _ => {}
        }
        self.quiet -= 1;
        Ok(())
    }

    fn mismatch(&self, element: &Element, go_type: &str, value: &Value) -> TypeError {
        let expected = if go_type.is_empty() { go_name(element) } else { go_type.to_owned() };
        let fields: Vec<&str> = self
            .path
            .iter()
            .filter_map(|step| match step {
                Step::Field(name) => Some(*name),
                _ => None,
            })
            .collect();
        TypeError::Field {
            found: found(value),
            owner: self.owner.to_owned(),
            field: fields.join("."),
            expected,
        }
    }

    fn strict_path(&self) -> String {
        let mut out = String::new();
        for step in &self.path {
            let name = match step {
                Step::Index(at) => {
                    out.push_str(&format!("[{at}]"));
                    continue;
                }
                Step::Field(name) => name,
                Step::Key(key) => key.as_str(),
            };
            if !out.is_empty() {
                out.push('.');
            }
            out.push_str(name);
        }
        out
    }
}

/// How Go names the type of such an element in its messages.
fn go_name(element: &Element) -> String {
    match &element.shape {
        Shape::Boolean => "bool".to_owned(),
        Shape::Int32 | Shape::IntOrString => "int32".to_owned(),
        Shape::Int64 => "int64".to_owned(),
        Shape::Double => "float64".to_owned(),
        Shape::Bytes => "[]uint8".to_owned(),
        Shape::Array(items) => format!("[]{}", go_name(items)),
        Shape::Map(items) => format!("map[string]{}", go_name(items)),
        Shape::Object(ty) => format!("{}.{}", ty.package(), ty.short_name()),
        Shape::Quantity => "resource.Quantity".to_owned(),
        _ => "string".to_owned(),
    }
}

impl TypeError {
    pub(crate) fn time(text: &str) -> Self {
        Self::Time { text: text.to_owned(), why: time::why_not(text) }
    }
}

fn found(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        // Go names the number only where it is a number that doesn't fit; for other types it is just "number".
        Value::Number(number) if number.as_i64().is_none_or(|number| i32::try_from(number).is_err()) => {
            format!("number {number}")
        }
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(_) => "array".to_owned(),
        Value::Object(_) => "object".to_owned(),
    }
}

fn bytes(text: &mut String) -> Result<(), TypeError> {
    if text.contains(['\r', '\n']) {
        text.retain(|letter| !matches!(letter, '\r' | '\n'));
    }
    match BASE64.decode(text.as_bytes()) {
        Ok(_) => Ok(()),
        Err(base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _)) => {
            Err(TypeError::Base64(at))
        }
        // Go names the beginning of the group that is too short.
        Err(_) => Err(TypeError::Base64(text.len() / 4 * 4)),
    }
}

fn canonical_time(text: &mut String, micro: bool) -> Result<(), TypeError> {
    let parsed = time::parse(text);
    let canonical =
        parsed.and_then(|at| if micro { time::format_micros(at) } else { time::format_seconds(at) });
    *text = canonical.ok_or_else(|| TypeError::time(text))?;
    Ok(())
}

fn canonical_quantity(value: &mut Value) -> Result<(), TypeError> {
    let canonical = match &*value {
        Value::String(text) => quantity::canonical(text.trim())?,
        Value::Number(number) => quantity::canonical(&number.to_string())?,
        _ => return Err(quantity::QuantityError::FormatWrong.into()),
    };
    *value = Value::String(canonical);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(kind: (&str, &str, &str), mut value: Value) -> Result<(Value, Vec<String>), String> {
        let ty = crate::by_gvk(kind.0, kind.1, kind.2).unwrap();
        let conformed = conform(ty, &mut value).map_err(|error| error.to_string())?;
        let mut again = value.clone();
        conform(ty, &mut again).unwrap();
        assert_eq!(again, value, "conforming twice");
        Ok((value, conformed.unknown))
    }

    #[test]
    fn zeros_and_nulls() {
        let (value, unknown) = check(
            ("apps", "v1", "Deployment"),
            json!({"metadata": {"name": "x", "labels": {"a": null}, "annotations": {}, "creationTimestamp": null},
              "spec": {"replicas": 0, "paused": false, "minReadySeconds": 0, "Foo": 1, "selector": null,
                "template": {"spec": {"containers": [{"name": "c", "foo": {"bar": 1}, "ports": [],
                  "resources": {"limits": {"cpu": "1000m", "memory": 1024}}}]}}}}),
        )
        .unwrap();
        assert_eq!(unknown, ["spec.Foo", "spec.template.spec.containers[0].foo"]);
        assert_eq!(
            value,
            json!({"metadata": {"name": "x", "labels": {"a": ""}}, "status": {},
              "spec": {"replicas": 0, "strategy": {}, "template": {"metadata": {}, "spec": {"containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1", "memory": "1024"}}}]}}}})
        );
    }

    #[test]
    fn well_known_values() {
        let (value, _) = check(
            ("", "v1", "Secret"),
            json!({"data": {"a": "aGk=\n", "b": null}, "metadata": {"creationTimestamp": "2024-01-01T01:00:00.5+01:00"}}),
        )
        .unwrap();
        assert_eq!(value["data"], json!({"a": "aGk=", "b": ""}));
        assert_eq!(value["metadata"]["creationTimestamp"], "2024-01-01T00:00:00Z");
        let (value, _) = check(
            ("coordination.k8s.io", "v1", "Lease"),
            json!({"spec": {"renewTime": "2024-01-01T00:00:00.1Z"}}),
        )
        .unwrap();
        assert_eq!(value["spec"]["renewTime"], "2024-01-01T00:00:00.100000Z");
        let (value, _) = check(("", "v1", "Service"), json!({"spec": {"ports": [{"port": 80}]}})).unwrap();
        assert_eq!(value["spec"]["ports"], json!([{"port": 80, "targetPort": 0}]));
    }

    #[test]
    fn type_errors() {
        for (kind, value, want) in [
            (
                ("apps", "v1", "Deployment"),
                json!({"spec": {"replicas": "3"}}),
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                ("", "v1", "Pod"),
                json!({"spec": {"containers": {}}}),
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
            (
                ("", "v1", "Pod"),
                json!({"spec": {"containers": [{"ports": [{"containerPort": 1.5}]}]}}),
                "json: cannot unmarshal number 1.5 into Go struct field ContainerPort.spec.containers.ports.containerPort of type int32",
            ),
            (
                ("", "v1", "Pod"),
                json!({"spec": {"restartPolicy": 1}}),
                "json: cannot unmarshal number into Go struct field PodSpec.spec.restartPolicy of type v1.RestartPolicy",
            ),
            (
                ("", "v1", "Pod"),
                json!({"metadata": {"labels": {"a": 1}}}),
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
            ),
            (("", "v1", "Pod"), json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
            (("", "v1", "Secret"), json!({"data": {"a": "a=b"}}), "illegal base64 data at input byte 1"),
            (
                ("", "v1", "Node"),
                json!({"status": {"capacity": {"cpu": "x"}}}),
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ),
        ] {
            assert_eq!(check(kind, value).unwrap_err(), want);
        }
    }

    #[test]
    fn schemas_in_schemas() {
        let (value, unknown) = check(
            ("apiextensions.k8s.io", "v1", "CustomResourceDefinition"),
            json!({"spec": {"versions": [{"schema": {"openAPIV3Schema": {
              "items": {"type": "string", "foo": 1}, "additionalProperties": true, "default": {"x": null}}}}]}}),
        )
        .unwrap();
        assert!(unknown.is_empty());
        assert_eq!(
            value["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
            json!({"items": {"type": "string"}, "additionalProperties": true, "default": {"x": null}})
        );
    }
}
