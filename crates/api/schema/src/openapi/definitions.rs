//! One definition a type.
//!
//! Upstream: k8s.io/kube-openapi/pkg/builder and builder3, which make them of generated Go code.

use serde_json::{Map, Value, json};

use super::Version;
use crate::descriptions::Descriptions;
use crate::types::{Element, Field, ListKind, MapKind, ResourceFact, Shape, Type};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const EXTENSIONS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1";

/// The definition that an element refers to, if any, looking into lists and maps.
pub fn referred(element: &Element) -> Option<String> {
    match &element.shape {
        Shape::Array(items) | Shape::Map(items) => referred(items),
        shape => name_of(shape),
    }
}

fn name_of(shape: &Shape) -> Option<String> {
    Some(match shape {
        Shape::Object(ty) => ty.name.to_string(),
        Shape::Time => format!("{META}.Time"),
        Shape::MicroTime => format!("{META}.MicroTime"),
        Shape::FieldsV1 => format!("{META}.FieldsV1"),
        Shape::Quantity => "io.k8s.apimachinery.pkg.api.resource.Quantity".to_owned(),
        Shape::IntOrString => "io.k8s.apimachinery.pkg.util.intstr.IntOrString".to_owned(),
        Shape::RawExtension => "io.k8s.apimachinery.pkg.runtime.RawExtension".to_owned(),
        Shape::Any => format!("{EXTENSIONS}.JSON"),
        Shape::SchemaOrArray => format!("{EXTENSIONS}.JSONSchemaPropsOrArray"),
        Shape::SchemaOrBool => format!("{EXTENSIONS}.JSONSchemaPropsOrBool"),
        Shape::SchemaOrStrings => format!("{EXTENSIONS}.JSONSchemaPropsOrStringArray"),
        _ => return None,
    })
}

pub fn definition(ty: &Type, texts: &Descriptions, version: Version, served: &[&ResourceFact]) -> Value {
    let mut out = Map::new();
    if let Some(text) = texts.get(&ty.name, "") {
        out.insert("description".into(), text.into());
    }
    if well_known(ty.short_name(), version, &mut out) {
        return Value::Object(out);
    }
    out.insert("type".into(), "object".into());
    let mut required = Vec::new();
    let mut properties = Map::new();
    for field in ty.fields() {
        let text = texts.get(&ty.name, &field.name).or_else(|| common_text(&field.name));
        properties.insert(field.name.to_string(), property(field, text, version));
        if field.required {
            required.push(Value::from(field.name.as_ref()));
        }
    }
    if !properties.is_empty() {
        out.insert("properties".into(), Value::Object(properties));
    }
    if !required.is_empty() {
        out.insert("required".into(), Value::Array(required));
    }
    let kinds = kinds(ty, served);
    if !kinds.is_empty() {
        out.insert("x-kubernetes-group-version-kind".into(), Value::Array(kinds));
    }
    if ty.map == Some(MapKind::Atomic) {
        out.insert("x-kubernetes-map-type".into(), "atomic".into());
    }
    if !ty.unions.is_empty() {
        out.insert("x-kubernetes-unions".into(), unions(ty));
    }
    Value::Object(out)
}

/// What list types say of the fields that all of them have; k8s-openapi has one generic list instead.
fn common_text(field: &str) -> Option<String> {
    let text = match field {
        "apiVersion" => "The version of the schema that this object is written in.",
        "kind" => "The kind of this object.",
        "metadata" => "Standard metadata.",
        "items" => "The objects of the list.",
        _ => return None,
    };
    Some(text.to_owned())
}

fn kinds(ty: &Type, served: &[&ResourceFact]) -> Vec<Value> {
    if ty.in_any_group {
        let mut versions: Vec<(&str, &str)> = served.iter().map(|fact| (fact.group, fact.version)).collect();
        versions.sort_unstable();
        versions.dedup();
        let kind = ty.short_name();
        return versions
            .iter()
            .map(|(group, version)| json!({"group": group, "version": version, "kind": kind}))
            .collect();
    }
    ty.kinds.iter().map(|gvk| json!({"group": gvk.group, "version": gvk.version, "kind": gvk.kind})).collect()
}

fn unions(ty: &Type) -> Value {
    let unions = ty.unions.iter().map(|union| {
        let fields: Map<String, Value> =
            union.fields.iter().map(|(field, value)| (field.to_string(), value.as_ref().into())).collect();
        let mut out = Map::new();
        if let Some(discriminator) = &union.discriminator {
            out.insert("discriminator".into(), discriminator.as_ref().into());
        }
        out.insert("fields-to-discriminateBy".into(), Value::Object(fields));
        Value::Object(out)
    });
    Value::Array(unions.collect())
}

/// Types whose JSON isn't an object with fields.
fn well_known(name: &str, version: Version, out: &mut Map<String, Value>) -> bool {
    let form = match (name, version) {
        ("Time" | "MicroTime", _) => json!({"type": "string", "format": "date-time"}),
        ("Quantity", Version::V2) => json!({"type": "string"}),
        ("Quantity", Version::V3) => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        ("IntOrString", Version::V2) => json!({"type": "string", "format": "int-or-string"}),
        ("IntOrString", Version::V3) => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        ("RawExtension" | "FieldsV1" | "Patch", _) => json!({"type": "object"}),
        ("JSON" | "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray", _) => {
            json!({})
        }
        _ => return false,
    };
    if let Value::Object(form) = form {
        out.extend(form);
    }
    true
}

fn property(field: &Field, text: Option<String>, version: Version) -> Value {
    let mut out = Map::new();
    if let Some(text) = text {
        out.insert("description".into(), text.into());
    }
    if version == Version::V3
        && let Some(default) = &field.schema_default
    {
        out.insert("default".into(), Value::clone(default));
    }
    if field.list_stated {
        let (kind, keys) = match &field.list {
            ListKind::Atomic => ("atomic", None),
            ListKind::Set => ("set", None),
            ListKind::Map(keys) => ("map", Some(json!(keys))),
        };
        out.insert("x-kubernetes-list-type".into(), kind.into());
        out.extend(keys.map(|keys| ("x-kubernetes-list-map-keys".to_owned(), keys)));
    }
    if field.map_stated {
        let kind = if field.map == MapKind::Atomic { "atomic" } else { "granular" };
        out.insert("x-kubernetes-map-type".into(), kind.into());
    }
    if let Some(strategy) = field.patch.text() {
        out.insert("x-kubernetes-patch-strategy".into(), strategy.into());
    }
    if let Some(key) = &field.merge_key {
        out.insert("x-kubernetes-patch-merge-key".into(), key.as_ref().into());
    }
    match name_of(&field.shape) {
        // Version 3 lets nothing stand beside a reference.
        Some(name) if version == Version::V3 && !out.is_empty() => {
            out.insert("allOf".into(), json!([version.reference(&name)]));
        }
        _ => {
            if let Value::Object(form) = form(&field.element, version) {
                out.extend(form);
            }
        }
    }
    Value::Object(out)
}

fn form(element: &Element, version: Version) -> Value {
    match &element.shape {
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Int32 => json!({"type": "integer", "format": "int32"}),
        Shape::Int64 => json!({"type": "integer", "format": "int64"}),
        Shape::Double => json!({"type": "number", "format": "double"}),
        Shape::String => json!({"type": "string"}),
        Shape::Bytes => json!({"type": "string", "format": "byte"}),
        Shape::Array(items) => json!({"type": "array", "items": form(items, version)}),
        Shape::Map(items) => json!({"type": "object", "additionalProperties": form(items, version)}),
        Shape::AnyObject => json!({"type": "object"}),
        shape => name_of(shape).map_or_else(|| json!({}), |name| version.reference(&name)),
    }
}
