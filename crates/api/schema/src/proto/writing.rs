//! Writes messages by their type, in the order of the tags.
//!
//! Upstream: the generated Marshal methods, whose bytes these are.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use super::{ProtoError, encode_message, json_schema};
use crate::conform::{TypeError, zero};
use crate::time;
use crate::types::{Element, Field, Shape, Type, Wire};

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_number(out: &mut Vec<u8>, tag: u32, number: u64) {
    put_varint(out, u64::from(tag) << 3);
    put_varint(out, number);
}

pub fn put_bytes(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    put_varint(out, u64::from(tag) << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Writes a message whose length is known only afterwards: its bytes move up to let the length in.
pub fn nested(
    out: &mut Vec<u8>,
    tag: u32,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), ProtoError>,
) -> Result<(), ProtoError> {
    put_varint(out, u64::from(tag) << 3 | 2);
    let start = out.len();
    out.push(0);
    write(out)?;
    let length = out.len() - start - 1;
    if length < 0x80 {
        out[start] = length as u8;
    } else {
        let mut prefix = Vec::with_capacity(5);
        put_varint(&mut prefix, length as u64);
        out.splice(start..=start, prefix);
    }
    Ok(())
}

pub fn write_level(
    ty: &Type,
    order: &[u16],
    level: usize,
    map: &Map<String, Value>,
    out: &mut Vec<u8>,
) -> Result<(), ProtoError> {
    let field = |at: &u16| &ty.fields()[usize::from(*at)];
    let mut rest = order;
    while let Some(first) = rest.first().map(field) {
        let path = first.wire_path();
        if path[level + 1] == 0 {
            write_field(first, map.get(&*first.name), out)?;
            rest = &rest[1..];
        } else {
            let count = rest.iter().take_while(|at| field(at).wire_path()[level] == path[level]).count();
            let (group, others) = rest.split_at(count);
            nested(out, path[level], |out| write_level(ty, group, level + 1, map, out))?;
            rest = others;
        }
    }
    Ok(())
}

fn write_field(field: &Field, value: Option<&Value>, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    let tag = field.tag;
    let wrong = || ProtoError::Shape(field.name.to_string());
    let value = match value {
        Some(value) if !value.is_null() => value,
        _ => return if field.pointer { Ok(()) } else { write_zero(field, out) },
    };
    match (&field.shape, value) {
        (Shape::Array(_), Value::Array(list)) if field.wire == Wire::Items => write_items(tag, list, out),
        (Shape::Array(items), Value::Array(list)) => {
            list.iter().try_for_each(|item| write_value(items, tag, item, out).map_err(|_| wrong()))
        }
        (Shape::Map(items), Value::Object(map)) => {
            for (key, value) in map {
                nested(out, tag, |out| {
                    put_bytes(out, 1, key.as_bytes());
                    match value {
                        Value::Array(list) if field.wire == Wire::Items => write_items(2, list, out),
                        value => write_value(items, 2, value, out),
                    }
                })?;
            }
            Ok(())
        }
        (Shape::Array(_) | Shape::Map(_), _) => Err(wrong()),
        (_, value) => write_value(&field.element, tag, value, out),
    }
}

/// What Go writes for a value that isn't there but isn't a pointer either.
fn write_zero(field: &Field, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    match &field.shape {
        Shape::Array(_) if field.wire == Wire::Items => Ok(()),
        Shape::Array(_) | Shape::Map(_) | Shape::Bytes => Ok(()),
        Shape::Object(_) | Shape::Time | Shape::MicroTime => {
            write_value(&field.element, field.tag, &Value::Null, out)
        }
        Shape::RawExtension | Shape::FieldsV1 | Shape::Any => {
            put_bytes(out, field.tag, b"");
            Ok(())
        }
        Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStrings => Ok(()),
        _ => write_value(&field.element, field.tag, &zero(&field.element), out),
    }
}

fn write_items(tag: u32, list: &[Value], out: &mut Vec<u8>) -> Result<(), ProtoError> {
    nested(out, tag, |out| {
        for item in list {
            put_bytes(out, 1, item.as_str().unwrap_or("").as_bytes());
        }
        Ok(())
    })
}

fn write_value(element: &Element, tag: u32, value: &Value, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    let wrong = || ProtoError::Shape(value.to_string().chars().take(80).collect());
    match &element.shape {
        Shape::Boolean => put_number(out, tag, u64::from(value.as_bool().ok_or_else(wrong)?)),
        Shape::Int32 | Shape::Int64 => put_number(out, tag, value.as_i64().ok_or_else(wrong)? as u64),
        Shape::Double => {
            put_varint(out, u64::from(tag) << 3 | 1);
            out.extend_from_slice(&value.as_f64().ok_or_else(wrong)?.to_le_bytes());
        }
        Shape::String => put_bytes(out, tag, value.as_str().ok_or_else(wrong)?.as_bytes()),
        Shape::Bytes => {
            let bytes = BASE64.decode(value.as_str().ok_or_else(wrong)?).map_err(|_| wrong())?;
            put_bytes(out, tag, &bytes);
        }
        Shape::Time | Shape::MicroTime => return write_time(tag, value, out),
        Shape::Quantity => {
            let text = value.as_str().ok_or_else(wrong)?.as_bytes();
            return nested(out, tag, |out| {
                put_bytes(out, 1, text);
                Ok(())
            });
        }
        Shape::IntOrString => {
            let (number, text) = (value.as_i64().unwrap_or(0), value.as_str());
            return nested(out, tag, |out| {
                put_number(out, 1, u64::from(text.is_some()));
                put_number(out, 2, number as u64);
                put_bytes(out, 3, text.unwrap_or("").as_bytes());
                Ok(())
            });
        }
        Shape::RawExtension | Shape::FieldsV1 | Shape::Any => {
            let raw = value.to_string();
            return nested(out, tag, |out| {
                put_bytes(out, 1, raw.as_bytes());
                Ok(())
            });
        }
        Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStrings => {
            return nested(out, tag, |out| write_schema_or(&element.shape, value, out));
        }
        Shape::Object(ty) => return nested(out, tag, |out| encode_message(ty, value, out)),
        Shape::Array(_) | Shape::Map(_) | Shape::AnyObject => return Err(wrong()),
    }
    Ok(())
}

fn write_time(tag: u32, value: &Value, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    let Some(text) = value.as_str() else {
        put_bytes(out, tag, b"");
        return Ok(());
    };
    let at = time::parse(text).ok_or_else(|| TypeError::time(text))?;
    nested(out, tag, |out| {
        put_number(out, 1, at.seconds as u64);
        put_number(out, 2, at.nanos as u64);
        Ok(())
    })
}

fn write_schema_or(shape: &Shape, value: &Value, out: &mut Vec<u8>) -> Result<(), ProtoError> {
    let schema_tag = if matches!(shape, Shape::SchemaOrBool) { 2 } else { 1 };
    let ty = json_schema()?;
    match value {
        Value::Object(_) => {
            if schema_tag == 2 {
                put_number(out, 1, 1);
            }
            nested(out, schema_tag, |out| encode_message(ty, value, out))
        }
        Value::Bool(allows) if schema_tag == 2 => {
            put_number(out, 1, u64::from(*allows));
            Ok(())
        }
        Value::Array(list) => {
            for item in list {
                match item {
                    Value::String(text) => put_bytes(out, 2, text.as_bytes()),
                    item => nested(out, 2, |out| encode_message(ty, item, out))?,
                }
            }
            Ok(())
        }
        other => Err(ProtoError::Shape(other.to_string())),
    }
}
