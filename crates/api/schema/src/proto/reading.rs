//! Reads messages by their type, field by field.
//!
//! Upstream: the generated Unmarshal methods. What stays true: every step takes from a slice whose end is checked,
//! and nesting is counted.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use super::{DEPTH_MAX, MAGIC, ProtoError, decode_within, json_schema};
use crate::conform::{TypeError, zero};
use crate::time;
use crate::types::{Element, Field, Shape, Type, Wire};

pub struct Reader<'a>(pub &'a [u8]);

#[derive(Clone, Copy)]
pub enum Item<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32,
    Bytes(&'a [u8]),
}

impl<'a> Reader<'a> {
    pub fn next(&mut self) -> Result<Option<(u32, Item<'a>)>, ProtoError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let tag = u32::try_from(key >> 3).map_err(|_| ProtoError::Overflow)?;
        let item = match key & 7 {
            0 => Item::Varint(self.varint()?),
            1 => {
                let mut number = [0; 8];
                number.copy_from_slice(self.take(8)?);
                Item::Fixed64(u64::from_le_bytes(number))
            }
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| ProtoError::Overflow)?;
                Item::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Item::Fixed32
            }
            other => return Err(ProtoError::WireType(other as u8)),
        };
        Ok(Some((tag, item)))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], ProtoError> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(ProtoError::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn varint(&mut self) -> Result<u64, ProtoError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(ProtoError::Overflow)
    }
}

pub fn utf8(bytes: &[u8]) -> Result<&str, ProtoError> {
    std::str::from_utf8(bytes).map_err(|_| ProtoError::Utf8)
}

/// Go keeps strings that aren't UTF-8 and its JSON encoder replaces what is wrong; so does this.
fn text(bytes: &[u8]) -> Value {
    Value::String(String::from_utf8_lossy(bytes).into_owned())
}

pub fn read_message(
    ty: &Type,
    bytes: &[u8],
    map: &mut Map<String, Value>,
    depth: u32,
) -> Result<(), ProtoError> {
    if !ty.has_wire {
        return Err(ProtoError::NoWire(ty.name.to_string()));
    }
    read_level(ty, &[], bytes, map, depth)
}

/// Reads a message, or the one embedded in it under `prefix`.
fn read_level(
    ty: &Type,
    prefix: &[u32],
    bytes: &[u8],
    map: &mut Map<String, Value>,
    depth: u32,
) -> Result<(), ProtoError> {
    if depth > DEPTH_MAX {
        return Err(ProtoError::Depth);
    }
    let level = prefix.len();
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        let leads_here = |field: &&Field| {
            let path = field.wire_path();
            field.tag != 0 && path[..level] == *prefix && path[level] == tag
        };
        let Some(field) = ty.fields().iter().find(leads_here) else { continue };
        if field.wire_path()[level + 1] == 0 {
            read_field(field, item, map, depth)?;
        } else if let Item::Bytes(inner) = item {
            let mut deeper = [0; 3];
            deeper[..level].copy_from_slice(prefix);
            deeper[level] = tag;
            read_level(ty, &deeper[..=level], inner, map, depth + 1)?;
        }
    }
    Ok(())
}

fn read_field(
    field: &Field,
    item: Item<'_>,
    map: &mut Map<String, Value>,
    depth: u32,
) -> Result<(), ProtoError> {
    let wrong = || ProtoError::WrongWire(field.name.to_string());
    let name = field.name.as_ref();
    match (&field.shape, item) {
        (Shape::Array(_), Item::Bytes(bytes)) if field.wire == Wire::Items => {
            map.insert(name.to_owned(), read_items(bytes)?);
        }
        (Shape::Array(items), item) => {
            let list = map.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            let Value::Array(list) = list else { return Err(wrong()) };
            match (&items.shape, item) {
                // Packed numbers: nobody writes them, but every reader takes them.
                (Shape::Int32 | Shape::Int64 | Shape::Boolean, Item::Bytes(bytes)) => {
                    let mut packed = Reader(bytes);
                    while !packed.0.is_empty() {
                        let number = Item::Varint(packed.varint()?);
                        list.push(read_value(items, number, depth)?.ok_or_else(wrong)?);
                    }
                }
                (_, item) => {
                    list.push(read_value(items, item, depth)?.ok_or_else(wrong)?);
                }
            }
        }
        (Shape::Map(items), Item::Bytes(bytes)) => {
            let entries = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(entries) = entries else { return Err(wrong()) };
            let (mut key, mut value) = (String::new(), zero(items));
            let mut reader = Reader(bytes);
            while let Some((tag, item)) = reader.next()? {
                match (tag, item) {
                    (1, Item::Bytes(bytes)) => key = String::from_utf8_lossy(bytes).into_owned(),
                    (2, Item::Bytes(bytes)) if field.wire == Wire::Items => value = read_items(bytes)?,
                    (2, item) => value = read_value(items, item, depth)?.ok_or_else(wrong)?,
                    _ => {}
                }
            }
            entries.insert(key, value);
        }
        (Shape::Object(ty), Item::Bytes(bytes)) => {
            // A message that comes in pieces is merged.
            let inner = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(inner) = inner else { return Err(wrong()) };
            read_message(ty, bytes, inner, depth + 1)?;
        }
        (_, item) => {
            let value = read_value(&field.element, item, depth)?.ok_or_else(wrong)?;
            map.insert(name.to_owned(), value);
        }
    }
    Ok(())
}

/// A message whose field 1 repeats strings.
fn read_items(bytes: &[u8]) -> Result<Value, ProtoError> {
    let mut list = Vec::new();
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        if let (1, Item::Bytes(bytes)) = (tag, item) {
            list.push(text(bytes));
        }
    }
    Ok(Value::Array(list))
}

/// A single value; None where the wire type isn't that of the shape.
fn read_value(element: &Element, item: Item<'_>, depth: u32) -> Result<Option<Value>, ProtoError> {
    let value = match (&element.shape, item) {
        (Shape::Boolean, Item::Varint(number)) => Value::Bool(number != 0),
        (Shape::Int32, Item::Varint(number)) => Value::from(number as u32 as i32),
        (Shape::Int64, Item::Varint(number)) => Value::from(number as i64),
        (Shape::Double, Item::Fixed64(bits)) => Value::from(f64::from_bits(bits)),
        (Shape::String, Item::Bytes(bytes)) => text(bytes),
        (Shape::Bytes, Item::Bytes(bytes)) => Value::String(BASE64.encode(bytes)),
        (Shape::Time | Shape::MicroTime, Item::Bytes(bytes)) => {
            read_time(bytes, matches!(element.shape, Shape::MicroTime))?
        }
        (Shape::Quantity, Item::Bytes(bytes)) => match first_bytes(bytes)? {
            Some(quantity) if !quantity.is_empty() => text(quantity),
            _ => Value::from("0"),
        },
        (Shape::IntOrString, Item::Bytes(bytes)) => read_int_or_string(bytes)?,
        (Shape::RawExtension | Shape::FieldsV1 | Shape::Any, Item::Bytes(bytes)) => match first_bytes(bytes)?
        {
            None => Value::Null,
            Some([]) => Value::Null,
            Some(raw) if raw.starts_with(MAGIC) => decode_nested(raw, depth)?,
            Some(raw) => {
                serde_json::from_slice(raw).map_err(|error| ProtoError::Embedded(error.to_string()))?
            }
        },
        (Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStrings, Item::Bytes(bytes)) => {
            read_schema_or(&element.shape, bytes, depth)?
        }
        (Shape::Object(ty), Item::Bytes(bytes)) => {
            let mut inner = Map::new();
            read_message(ty, bytes, &mut inner, depth + 1)?;
            Value::Object(inner)
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn decode_nested(raw: &[u8], depth: u32) -> Result<Value, ProtoError> {
    if depth > DEPTH_MAX { Err(ProtoError::Depth) } else { decode_within(raw, None, depth + 10) }
}

/// Field 1 of a message that holds little else.
fn first_bytes(bytes: &[u8]) -> Result<Option<&[u8]>, ProtoError> {
    let mut found = None;
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        if let (1, Item::Bytes(bytes)) = (tag, item) {
            found = Some(bytes);
        }
    }
    Ok(found)
}

fn read_time(bytes: &[u8], micro: bool) -> Result<Value, ProtoError> {
    let (mut seconds, mut nanos) = (0, 0);
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        match (tag, item) {
            (1, Item::Varint(number)) => seconds = number as i64,
            (2, Item::Varint(number)) => nanos = number as i32,
            _ => {}
        }
    }
    // The zero time is written as an empty message.
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let at = time::Instant { seconds, nanos: nanos.clamp(0, 999_999_999) };
    let text = if micro { time::format_micros(at) } else { time::format_seconds(at) };
    text.map(Value::String).ok_or_else(|| TypeError::time(&seconds.to_string()).into())
}

fn read_int_or_string(bytes: &[u8]) -> Result<Value, ProtoError> {
    let (mut kind, mut number, mut string) = (0, 0, Value::from(""));
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        match (tag, item) {
            (1, Item::Varint(value)) => kind = value,
            (2, Item::Varint(value)) => number = value as u32 as i32,
            (3, Item::Bytes(value)) => string = text(value),
            _ => {}
        }
    }
    Ok(if kind == 1 { string } else { Value::from(number) })
}

fn read_schema_or(shape: &Shape, bytes: &[u8], depth: u32) -> Result<Value, ProtoError> {
    let (schema_tag, other_tag) = if matches!(shape, Shape::SchemaOrBool) { (2, 1) } else { (1, 2) };
    let ty = json_schema()?;
    let (mut schema, mut list, mut allows) = (None, Vec::new(), false);
    let read = |bytes| -> Result<Value, ProtoError> {
        let mut map = Map::new();
        read_message(ty, bytes, &mut map, depth + 1)?;
        Ok(Value::Object(map))
    };
    let mut reader = Reader(bytes);
    while let Some((tag, item)) = reader.next()? {
        match item {
            Item::Bytes(bytes) if tag == schema_tag => schema = Some(read(bytes)?),
            Item::Bytes(bytes) if tag == other_tag && matches!(shape, Shape::SchemaOrArray) => {
                list.push(read(bytes)?)
            }
            Item::Bytes(bytes) if tag == other_tag => list.push(text(bytes)),
            Item::Varint(number) if tag == other_tag => allows = number != 0,
            _ => {}
        }
    }
    Ok(match (shape, schema) {
        (_, Some(schema)) => schema,
        (Shape::SchemaOrBool, None) => Value::Bool(allows),
        (_, None) => Value::Array(list),
    })
}
