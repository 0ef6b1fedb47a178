//! Kubernetes' protobuf, in and out, for any built-in type.
//!
//! Upstream: staging/src/k8s.io/apimachinery/pkg/runtime/serializer/protobuf/protobuf.go and the generated
//! Marshal and Unmarshal methods (gogo, proto2 rules).
//!
//! What stays true: reading never panics and is bounded in depth; unknown tags are skipped; what is read is
//! conformed, so it equals what the same object in JSON would give. Writing is canonical as upstream's: tags in
//! order, map keys sorted, values that Go doesn't hold by pointer written even when zero.
//! Custom types have no protobuf; asking for it is an error.

mod reading;
mod writing;

use serde_json::{Map, Value};

use crate::conform::{TypeError, conform};
use crate::types::{JSON_SCHEMA_PROPS, Type};
use reading::{Item, Reader, read_message, utf8};
use writing::{nested, put_bytes, write_level};

/// Opens every message outside of watch streams.
pub const MAGIC: &[u8] = b"k8s\0";
const DEPTH_MAX: u32 = 100;

#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    NoMagic,
    #[error("unexpected EOF")]
    Truncated,
    #[error("proto: illegal wireType {0}")]
    WireType(u8),
    #[error("proto: integer overflow")]
    Overflow,
    #[error("proto: wrong wireType for field {0}")]
    WrongWire(String),
    #[error("proto: invalid UTF-8 in a string")]
    Utf8,
    #[error("proto: messages nested too deeply")]
    Depth,
    #[error("no kind {kind:?} is registered for version {api_version:?}")]
    UnknownKind { api_version: String, kind: String },
    #[error("{0} has no protobuf form")]
    NoWire(String),
    #[error("{0}: the value doesn't have the field's type")]
    Shape(String),
    #[error("embedded object: {0}")]
    Embedded(String),
    #[error(transparent)]
    Type(#[from] TypeError),
}

/// runtime.Unknown: what an object is, and its bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
    pub raw: &'a [u8],
    pub content_encoding: &'a str,
    pub content_type: &'a str,
}

/// Takes the envelope off.
pub fn envelope(bytes: &[u8]) -> Result<Envelope<'_>, ProtoError> {
    let mut reader = Reader(bytes.strip_prefix(MAGIC).ok_or(ProtoError::NoMagic)?);
    let mut envelope = Envelope::default();
    while let Some((tag, item)) = reader.next()? {
        match (tag, item) {
            (1, Item::Bytes(bytes)) => {
                let mut meta = Reader(bytes);
                while let Some((tag, item)) = meta.next()? {
                    match (tag, item) {
                        (1, Item::Bytes(text)) => envelope.api_version = utf8(text)?,
                        (2, Item::Bytes(text)) => envelope.kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Item::Bytes(raw)) => envelope.raw = raw,
            (3, Item::Bytes(text)) => envelope.content_encoding = utf8(text)?,
            (4, Item::Bytes(text)) => envelope.content_type = utf8(text)?,
            _ => {}
        }
    }
    Ok(envelope)
}

/// Reads an object with its envelope. Where the envelope doesn't say what it holds (as client-go's bodies for
/// some options don't), `default` is `(apiVersion, kind)` to go by.
pub fn decode(bytes: &[u8], default: Option<(&str, &str)>) -> Result<Value, ProtoError> {
    decode_within(bytes, default, 0)
}

fn decode_within(bytes: &[u8], default: Option<(&str, &str)>, depth: u32) -> Result<Value, ProtoError> {
    let envelope = envelope(bytes)?;
    let (default_version, default_kind) = default.unwrap_or_default();
    let api_version = if envelope.api_version.is_empty() { default_version } else { envelope.api_version };
    let kind = if envelope.kind.is_empty() { default_kind } else { envelope.kind };
    if envelope.content_type == "application/json" {
        return serde_json::from_slice(envelope.raw).map_err(|error| ProtoError::Embedded(error.to_string()));
    }
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let unknown = || ProtoError::UnknownKind { api_version: api_version.to_owned(), kind: kind.to_owned() };
    let ty = crate::by_gvk(group, version, kind).ok_or_else(unknown)?;
    let mut map = Map::new();
    read_message(ty, envelope.raw, &mut map, depth)?;
    let mut value = Value::Object(map);
    conform(ty, &mut value)?;
    value["apiVersion"] = Value::from(api_version);
    value["kind"] = Value::from(kind);
    Ok(value)
}

/// Reads a message without envelope, conformed.
pub fn decode_message(ty: &Type, raw: &[u8]) -> Result<Value, ProtoError> {
    let mut map = Map::new();
    read_message(ty, raw, &mut map, 0)?;
    let mut value = Value::Object(map);
    conform(ty, &mut value)?;
    Ok(value)
}

/// Writes an object with its envelope, by the apiVersion and kind that it carries.
pub fn encode(ty: &Type, object: &Value) -> Result<Vec<u8>, ProtoError> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or("");
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    nested(&mut out, 1, |out| {
        put_bytes(out, 1, text("apiVersion").as_bytes());
        put_bytes(out, 2, text("kind").as_bytes());
        Ok(())
    })?;
    nested(&mut out, 2, |out| encode_message(ty, object, out))?;
    put_bytes(&mut out, 3, b"");
    put_bytes(&mut out, 4, b"");
    Ok(out)
}

/// Writes the message alone.
pub fn encode_message(ty: &Type, object: &Value, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    if !ty.has_wire {
        return Err(ProtoError::NoWire(ty.name.to_string()));
    }
    let empty = Map::new();
    let map = match object {
        Value::Object(map) => map,
        Value::Null => &empty,
        _ => return Err(ProtoError::Shape(ty.name.to_string())),
    };
    write_level(ty, ty.wire_order(), 0, map, out)
}

/// metav1.WatchEvent as it goes over a protobuf watch stream: no envelope of its own around it, but around the
/// object in it (`object` is the result of [`encode`]).
pub fn watch_event(event: &str, object: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(object.len() + event.len() + 16);
    put_bytes(&mut out, 1, event.as_bytes());
    let mut extension = Vec::with_capacity(object.len() + 8);
    put_bytes(&mut extension, 1, object);
    put_bytes(&mut out, 2, &extension);
    out
}

fn json_schema() -> Result<&'static Type, ProtoError> {
    crate::by_name(JSON_SCHEMA_PROPS).ok_or_else(|| ProtoError::NoWire(JSON_SCHEMA_PROPS.to_owned()))
}

#[cfg(test)]
mod tests;
