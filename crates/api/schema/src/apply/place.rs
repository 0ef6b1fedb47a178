//! What apply may find at one place of an object, and how lists' items are told apart there.
//!
//! Upstream: kube-openapi/pkg/schemaconv (OpenAPI to apply's schema) and structured-merge-diff/v6/typed/helpers.go.
//! What stays true: where nothing is known (any value, preserved unknown fields) lists are atomic and objects
//! granular, all the way down; inside RawExtension everything is atomic.

use serde_json::Value;

use super::set::PathElement;
use crate::types::{Element, Field, ListKind, MapKind, Shape, Type, by_name};

const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    /// A whole object of an API kind.
    Root(&'a Type),
    Element(&'a Element),
    /// Nothing is known: objects are granular, lists atomic.
    Deduced,
    /// Nothing is known, and nothing inside is looked at.
    Untyped,
}

/// The form in which a value is walked.
pub(crate) enum Form<'a> {
    Scalar(Scalar),
    Atomic(Container),
    /// A list whose items merge.
    List(&'a ListKind),
    /// An object whose members merge.
    Object,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Container {
    List,
    Object,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    Number,
    String,
    Boolean,
    Any,
}

impl Form<'_> {
    /// Which of scalar, list and object it is.
    pub(crate) fn kind(&self) -> u8 {
        match self {
            Form::Scalar(_) => 0,
            Form::List(_) | Form::Atomic(Container::List) => 1,
            Form::Object | Form::Atomic(Container::Object) => 2,
        }
    }
}

impl<'a> Place<'a> {
    /// The form that `value` has here; absent and null values take an object's where any form goes.
    pub(crate) fn form(self, value: Option<&Value>) -> Form<'a> {
        let element = match self {
            Place::Root(_) => return Form::Object,
            Place::Deduced => return free(value, false),
            Place::Untyped => return free(value, true),
            Place::Element(element) => element,
        };
        let object = match element.map {
            MapKind::Atomic => Form::Atomic(Container::Object),
            MapKind::Granular => Form::Object,
        };
        match &element.shape {
            Shape::Boolean => Form::Scalar(Scalar::Boolean),
            Shape::Int32 | Shape::Int64 | Shape::Double => Form::Scalar(Scalar::Number),
            Shape::String | Shape::Bytes => Form::Scalar(Scalar::String),
            Shape::Time | Shape::MicroTime | Shape::Quantity => Form::Scalar(Scalar::Any),
            Shape::RawExtension => free(value, true),
            Shape::IntOrString
            | Shape::Any
            | Shape::SchemaOrArray
            | Shape::SchemaOrBool
            | Shape::SchemaOrStrings => match free(value, false) {
                Form::Object => object,
                other => other,
            },
            Shape::Array(_) if element.list == ListKind::Atomic => Form::Atomic(Container::List),
            Shape::Array(_) => Form::List(&element.list),
            Shape::FieldsV1 | Shape::AnyObject | Shape::Map(_) | Shape::Object(_) => object,
        }
    }

    /// What an object's member is, and whether a field of that name is declared.
    pub(crate) fn member(self, name: &str) -> (Place<'a>, bool) {
        match self {
            Place::Root(ty) if ty.field(name).is_some() => in_type(ty, name),
            // What every object has, whether or not its type says so.
            Place::Root(_) if matches!(name, "apiVersion" | "kind") => (Place::Deduced, true),
            Place::Root(ty) if name == "metadata" => match by_name(OBJECT_META) {
                Some(metadata) => (Place::Root(metadata), true),
                None => in_type(ty, name),
            },
            Place::Root(ty) => in_type(ty, name),
            Place::Untyped => (Place::Untyped, false),
            Place::Deduced => (Place::Deduced, false),
            Place::Element(element) => match &element.shape {
                Shape::Object(ty) => in_type(ty, name),
                Shape::Map(items) => (Place::Element(items), false),
                Shape::RawExtension => (Place::Untyped, false),
                _ => (Place::Deduced, false),
            },
        }
    }

    /// Whether an object here may have a member of this name. True where nothing is known.
    pub(crate) fn allows(self, name: &str) -> bool {
        let ty = match self {
            // Not all root types declare what every object has.
            Place::Root(_) if matches!(name, "apiVersion" | "kind" | "metadata") => return true,
            Place::Root(ty) => ty,
            Place::Element(Element { shape: Shape::Object(ty), .. }) => ty,
            _ => return true,
        };
        ty.preserve_unknown || ty.embedded_resource || ty.additional.is_some() || ty.field(name).is_some()
    }

    /// The field of a built-in type.
    pub(crate) fn built_in_field(self, name: &str) -> Option<&'a Field> {
        let ty = match self {
            Place::Root(ty) => ty,
            Place::Element(Element { shape: Shape::Object(ty), .. }) => ty,
            _ => return None,
        };
        if ty.has_wire { ty.field(name) } else { None }
    }

    /// What a list's items are.
    pub(crate) fn items(self) -> Place<'a> {
        match self {
            Place::Element(Element { shape: Shape::Array(items), .. }) => Place::Element(items),
            _ => Place::Untyped,
        }
    }

    /// The path element of a list's item; `self` is the list's place.
    pub(crate) fn item(self, kind: &ListKind, item: &Value) -> Result<PathElement, String> {
        let keys = match kind {
            ListKind::Atomic => return Err("invalid indexing of non-associative list".to_string()),
            ListKind::Set => return set_item(item),
            ListKind::Map(keys) => keys,
        };
        let members = match item {
            Value::Object(members) => members,
            Value::Null => return Err("associative list with keys may not have a null element".to_string()),
            _ => return Err("associative list with keys may not have non-map elements".to_string()),
        };
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            let value = match members.get(&**key) {
                Some(value) => Some(value),
                None => self.key_default(key),
            };
            if let Some(value) = value {
                found.push((Box::from(&**key), value.clone()));
            }
        }
        if found.is_empty() && !keys.is_empty() {
            let keys: Vec<_> = keys.iter().map(|key| crate::patch::wording::quoted(key)).collect();
            return Err(format!(
                "associative list with keys has an element that omits all key fields [{}] (and doesn't have \
                 default values for any key fields)",
                keys.join(" ")
            ));
        }
        found.sort_by(|a: &(Box<str>, Value), b| a.0.cmp(&b.0));
        Ok(PathElement::Key(found))
    }

    fn key_default(self, key: &str) -> Option<&'a Value> {
        match self.items() {
            Place::Element(Element { shape: Shape::Object(ty), .. }) => {
                ty.field(key)?.element.schema_default.as_deref()
            }
            _ => None,
        }
    }
}

fn in_type<'a>(ty: &'a Type, name: &str) -> (Place<'a>, bool) {
    if let Some(field) = ty.field(name) {
        return (Place::Element(&field.element), true);
    }
    match &ty.additional {
        Some(additional) => (Place::Element(additional), false),
        None => (Place::Deduced, false),
    }
}

fn free(value: Option<&Value>, atomic: bool) -> Form<'static> {
    match value {
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_)) => Form::Scalar(Scalar::Any),
        Some(Value::Array(_)) => Form::Atomic(Container::List),
        _ if atomic => Form::Atomic(Container::Object),
        _ => Form::Object,
    }
}

fn set_item(item: &Value) -> Result<PathElement, String> {
    match item {
        Value::Object(_) => Err("associative list without keys has an element that's a map type".to_string()),
        Value::Array(_) => Err("not supported: associative list with lists as elements".to_string()),
        Value::Null => {
            Err("associative list without keys has an element that's an explicit null".to_string())
        }
        scalar => Ok(PathElement::Value(scalar.clone())),
    }
}
