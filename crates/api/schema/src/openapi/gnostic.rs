//! The version 2 document in gnostic's protobuf (openapi.v2.Document), which older kubectls read.
//!
//! Upstream: github.com/google/gnostic-models/openapiv2/OpenAPIv2.proto, whose tags these are.
//! Made from the same JSON pieces as the JSON document; what kubectl reads of it is written: paths with their
//! operations, parameters and extensions, and definitions. Responses are left empty.

use serde_json::{Map, Value};

/// The whole document.
pub fn document<'a>(
    title: &str,
    version: &str,
    paths: impl Iterator<Item = (String, Value)>,
    definitions: impl Iterator<Item = (&'a str, Value)>,
) -> Vec<u8> {
    let mut out = Message::default();
    out.text(1, "2.0");
    let mut info = Message::default();
    info.text(1, title);
    info.text(2, version);
    out.message(2, info);
    let mut all = Message::default();
    for (path, item) in paths {
        all.named(2, &path, path_item(&item));
    }
    out.message(8, all);
    let mut all = Message::default();
    for (name, definition) in definitions {
        all.named(1, name, schema(&definition));
    }
    out.message(9, all);
    out.0
}

#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn bytes(&mut self, tag: u64, bytes: &[u8]) {
        self.varint(tag << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// Leaves out what is empty, as proto3 does.
    fn text(&mut self, tag: u64, text: &str) {
        if !text.is_empty() {
            self.bytes(tag, text.as_bytes());
        }
    }

    fn texts(&mut self, tag: u64, list: Option<&Value>) {
        for text in list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            self.bytes(tag, text.as_bytes());
        }
    }

    fn flag(&mut self, tag: u64, flag: bool) {
        if flag {
            self.varint(tag << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, tag: u64, message: Message) {
        self.bytes(tag, &message.0);
    }

    /// A message of a name (1) and a value (2).
    fn named(&mut self, tag: u64, name: &str, value: Message) {
        let mut pair = Message::default();
        pair.text(1, name);
        pair.message(2, value);
        self.message(tag, pair);
    }

    /// Everything whose name begins with `x-`, as YAML, which JSON is.
    fn extensions(&mut self, tag: u64, map: &Map<String, Value>) {
        for (name, value) in map.iter().filter(|(name, _)| name.starts_with("x-")) {
            self.named(tag, name, any(value));
        }
    }
}

/// openapi.v2.Any with its yaml field.
fn any(value: &Value) -> Message {
    let mut out = Message::default();
    out.text(2, &value.to_string());
    out
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

fn path_item(item: &Value) -> Message {
    let mut out = Message::default();
    for (tag, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
        if let Some(found) = item.get(method) {
            out.message(tag, operation(found));
        }
    }
    parameters(&mut out, 9, item);
    out
}

fn operation(operation: &Value) -> Message {
    let mut out = Message::default();
    out.texts(1, operation.get("tags"));
    out.text(3, word(operation, "description"));
    out.text(5, word(operation, "operationId"));
    out.texts(6, operation.get("produces"));
    out.texts(7, operation.get("consumes"));
    parameters(&mut out, 8, operation);
    out.message(9, Message::default());
    out.texts(10, operation.get("schemes"));
    if let Value::Object(map) = operation {
        out.extensions(13, map);
    }
    out
}

fn parameters(out: &mut Message, tag: u64, owner: &Value) {
    for parameter in owner.get("parameters").and_then(Value::as_array).into_iter().flatten() {
        let place = word(parameter, "in");
        let required = parameter.get("required").and_then(Value::as_bool).unwrap_or(false);
        let mut inner = Message::default();
        let mut wrapped = Message::default();
        if place == "body" {
            inner.text(2, word(parameter, "name"));
            inner.text(3, place);
            inner.flag(4, required);
            inner.message(5, schema(&parameter["schema"]));
            wrapped.message(1, inner);
        } else {
            let query = place == "query";
            inner.flag(1, required);
            inner.text(2, place);
            inner.text(4, word(parameter, "name"));
            inner.text(if query { 6 } else { 5 }, word(parameter, "type"));
            let mut either = Message::default();
            either.message(if query { 3 } else { 4 }, inner);
            wrapped.message(2, either);
        }
        let mut item = Message::default();
        item.message(1, wrapped);
        out.message(tag, item);
    }
}

fn schema(value: &Value) -> Message {
    let mut out = Message::default();
    out.text(1, word(value, "$ref"));
    out.text(2, word(value, "format"));
    out.text(4, word(value, "description"));
    if let Some(default) = value.get("default") {
        out.message(5, any(default));
    }
    out.texts(19, value.get("required"));
    if let Some(additional) = value.get("additionalProperties") {
        let mut item = Message::default();
        item.message(1, schema(additional));
        out.message(21, item);
    }
    if let Some(ty) = value.get("type").and_then(Value::as_str) {
        let mut item = Message::default();
        item.text(1, ty);
        out.message(22, item);
    }
    if let Some(items) = value.get("items") {
        let mut item = Message::default();
        item.message(1, schema(items));
        out.message(23, item);
    }
    if let Some(Value::Object(properties)) = value.get("properties") {
        let mut all = Message::default();
        for (name, property) in properties {
            all.named(1, name, schema(property));
        }
        out.message(25, all);
    }
    if let Value::Object(map) = value {
        out.extensions(31, map);
    }
    out
}
