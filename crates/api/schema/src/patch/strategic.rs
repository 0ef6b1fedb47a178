//! Strategic merge patch: merging that knows which lists are merged, and by which key.
//!
//! Upstream: staging/src/k8s.io/apimachinery/pkg/util/strategicpatch/patch.go (StrategicMergeMapPatch, that is
//! with MergeParallelList and IgnoreUnmatchedNulls) and third_party/forked/golang/json/fields.go. Making patches
//! is the client's side and isn't here.
//!
//! What stays true: only built-in types come here; custom resources don't offer this patch type. Differences:
//! directives of one object are taken in the order of their names, where upstream's order is random; a null
//! among the items of a merged list is an error, where upstream panics.

mod lists;

use serde_json::{Map, Value};

use super::PatchError;
use super::wording::{go_type, json_kind, plain, quoted};
use crate::types::{Element, Shape, Type};

const DIRECTIVE: &str = "$patch";
const REPLACE: &str = "replace";
const DELETE: &str = "delete";
const MERGE: &str = "merge";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_LIST: &str = "$deleteFromPrimitiveList";
const SET_ELEMENT_ORDER: &str = "$setElementOrder";

const BAD_PRIMITIVE_LIST: &str = "invalid patch format of primitive list";
const BAD_RETAIN_KEYS: &str = "invalid patch format of retainKeys";
const BAD_SET_ELEMENT_ORDER: &str = "invalid patch format of setElementOrder list";

type Object = Map<String, Value>;

/// Merges `patch` into `doc`, an object of type `ty`.
pub fn strategic(ty: &Type, doc: Value, patch: Value) -> Result<Value, PatchError> {
    let patch = match patch {
        Value::Object(patch) => patch,
        Value::Null => Map::new(),
        other => {
            return Err(PatchError::Malformed(format!(
                "json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
                json_kind(&other)
            )));
        }
    };
    let doc = match doc {
        Value::Object(doc) => doc,
        _ => Map::new(),
    };
    merge_object(doc, patch, Place::Struct(ty)).map(Value::Object)
}

/// What is known of the object being merged.
#[derive(Clone, Copy)]
enum Place<'a> {
    Struct(&'a Type),
    /// A struct of Go that shows no fields, by name: RawExtension, JSON.
    Opaque(&'static str),
    /// Not a struct but this kind of Go value: nothing below can be looked up.
    Other(&'static str),
}

/// What a field says about merging.
struct Rule<'a> {
    /// The field's own value, or the items of a list.
    place: Place<'a>,
    merge: bool,
    replace: bool,
    merge_key: &'a str,
}

impl<'a> Place<'a> {
    fn of(element: &'a Element) -> Place<'a> {
        match &element.shape {
            Shape::Object(ty) => Place::Struct(ty),
            Shape::Array(_) => Place::Other("slice"),
            Shape::Map(_) => Place::Other("map"),
            Shape::RawExtension => Place::Opaque("RawExtension"),
            Shape::FieldsV1 => Place::Opaque("FieldsV1"),
            Shape::Time => Place::Opaque("Time"),
            Shape::MicroTime => Place::Opaque("MicroTime"),
            Shape::Quantity => Place::Opaque("Quantity"),
            Shape::IntOrString => Place::Opaque("IntOrString"),
            Shape::Any => Place::Opaque("JSON"),
            Shape::SchemaOrArray => Place::Opaque("JSONSchemaPropsOrArray"),
            Shape::SchemaOrBool => Place::Opaque("JSONSchemaPropsOrBool"),
            Shape::SchemaOrStrings => Place::Opaque("JSONSchemaPropsOrStringArray"),
            Shape::AnyObject => Place::Other("interface"),
            Shape::String => Place::Other("string"),
            Shape::Bytes => Place::Other("slice"),
            Shape::Boolean => Place::Other("bool"),
            Shape::Int32 => Place::Other("int32"),
            Shape::Int64 => Place::Other("int64"),
            Shape::Double => Place::Other("float64"),
        }
    }

    /// The rule of a field; of its items where `list`.
    fn rule(self, key: &str, list: bool) -> Result<Rule<'a>, PatchError> {
        let missing = |name: &str| {
            PatchError::Internal(format!(
                "unable to find api field in struct {name} for the json field {}",
                quoted(key)
            ))
        };
        let ty = match self {
            Place::Struct(ty) => ty,
            Place::Opaque(name) => return Err(missing(name)),
            Place::Other(kind) => {
                return Err(PatchError::Internal(format!(
                    "merging an object in json but data type is not struct, instead is: {kind}"
                )));
            }
        };
        let field = ty
            .field(key)
            .or_else(|| ty.fields().iter().find(|field| field.name.eq_ignore_ascii_case(key)))
            .ok_or_else(|| missing(ty.short_name()))?;
        let place = match &field.shape {
            Shape::Array(items) if list => match &items.shape {
                Shape::Array(_) => return Err(PatchError::Internal("unexpected slice of slice".to_string())),
                _ => Place::of(items),
            },
            other if list => {
                let kind = match other {
                    Shape::Object(_) => "struct",
                    _ => match Place::of(&field.element) {
                        Place::Other(kind) => kind,
                        Place::Opaque(_) | Place::Struct(_) => "struct",
                    },
                };
                return Err(PatchError::Internal(format!("expected slice or array type, but got: {kind}")));
            }
            _ => Place::of(&field.element),
        };
        Ok(Rule {
            place,
            merge: field.patch.merge,
            replace: field.patch.replace,
            merge_key: field.merge_key.as_deref().unwrap_or(""),
        })
    }
}

fn merge_object(mut original: Object, mut patch: Object, place: Place<'_>) -> Result<Object, PatchError> {
    if let Some(directive) = patch.get(DIRECTIVE) {
        return match directive.as_str() {
            Some(REPLACE) => {
                patch.remove(DIRECTIVE);
                Ok(patch)
            }
            Some(DELETE) => Ok(Map::new()),
            _ => Err(bad_patch_type(directive, &patch)),
        };
    }
    retain_keys(&mut original, &mut patch)?;
    let mut orders = Vec::new();
    patch.retain(|key, value| {
        let order = key.starts_with(SET_ELEMENT_ORDER);
        if order {
            orders.push((key.clone(), value.take()));
        }
        !order
    });
    for (key, order) in orders {
        lists::merge_ordered(&mut original, &mut patch, &key, order, place)?;
    }
    let mut changes: Vec<(String, Value)> = patch.into_iter().collect();
    changes.sort_by(|a, b| a.0.cmp(&b.0));
    for (key, change) in changes {
        if let Some(list) = key.strip_prefix(DELETE_FROM_LIST) {
            let list =
                list.strip_prefix('/').ok_or_else(|| PatchError::Malformed(BAD_PRIMITIVE_LIST.into()))?;
            merge_member(&mut original, list, change, place, true)?;
        } else {
            merge_member(&mut original, &key, change, place, false)?;
        }
    }
    Ok(original)
}

/// `deletes`: the value lists what to take out of a list of scalars.
fn merge_member(
    original: &mut Object,
    key: &str,
    mut change: Value,
    place: Place<'_>,
    deletes: bool,
) -> Result<(), PatchError> {
    if change.is_null() {
        original.remove(key);
        return Ok(());
    }
    let same = original.get(key).map(|current| go_type(current) == go_type(&change));
    if same != Some(true) {
        if deletes {
            return Ok(());
        }
        drop_nulls(&mut change);
        if drop_directives(&mut change) {
            original.insert(key.to_string(), change);
        } else {
            original.remove(key);
        }
        return Ok(());
    }
    let Some(current) = original.get_mut(key) else { return Ok(()) };
    *current = match (current.take(), change) {
        (Value::Object(current), Value::Object(change)) => {
            let rule = place.rule(key, false)?;
            Value::Object(if rule.replace { change } else { merge_object(current, change, rule.place)? })
        }
        (Value::Array(current), Value::Array(change)) => {
            let rule = place.rule(key, true)?;
            Value::Array(if rule.merge || deletes {
                lists::merge_lists(current, change, &rule, deletes)?
            } else {
                change
            })
        }
        (_, change) => change,
    };
    Ok(())
}

/// `$retainKeys`: members that it doesn't name go; the patch may not bring others.
fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), PatchError> {
    let malformed = || PatchError::Malformed(BAD_RETAIN_KEYS.to_string());
    let keys = match patch.remove(RETAIN_KEYS) {
        None => return Ok(()),
        Some(Value::Array(keys)) => keys,
        Some(_) => return Err(malformed()),
    };
    let named = |key: &str| keys.iter().any(|named| named.as_str() == Some(key));
    for (key, value) in patch.iter() {
        let directive = key.starts_with(DELETE_FROM_LIST) || key.starts_with(SET_ELEMENT_ORDER);
        if !value.is_null() && !directive && !named(key) {
            return Err(malformed());
        }
    }
    original.retain(|key, _| named(key));
    Ok(())
}

/// Members that are null go, at every depth.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Objects that carry a directive go, at every depth; false where the value itself is one.
fn drop_directives(value: &mut Value) -> bool {
    match value {
        Value::Object(members) => {
            if members.contains_key(DIRECTIVE) {
                return false;
            }
            members.retain(|_, member| drop_directives(member));
        }
        Value::Array(items) => items.retain_mut(drop_directives),
        _ => {}
    }
    true
}

fn bad_patch_type(directive: &Value, patch: &Object) -> PatchError {
    PatchError::Internal(format!(
        "unknown patch type: {} in map: {}",
        plain(directive),
        plain(&Value::Object(patch.clone()))
    ))
}

fn bad_argument(expected: &Value, actual: &Value) -> PatchError {
    PatchError::Internal(format!("expected a {}, but received a {}", go_type(expected), go_type(actual)))
}

#[cfg(test)]
mod tests;
