//! IPAddress, whose name is the address.
//!
//! Upstream counterpart: pkg/registry/networking/ipaddress, ValidateIPAddress in pkg/apis/networking/validation.
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::ip::validate_canonical_ip;
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::names;
use crate::object::text;
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let name = text(object, "/metadata/name");
    let mut errors = validate_canonical_ip(&Path::new("metadata").child("name"), name);
    let at = Path::new("spec").child("parentRef");
    let Some(parent) = object.pointer("/spec/parentRef").filter(|p| !p.is_null()) else {
        errors.push(FieldError::required(&at, ""));
        return errors;
    };
    let group = text(parent, "/group");
    if !group.is_empty() {
        let messages = names::dns1123_subdomain(group);
        errors.extend(FieldError::invalid_each(&at.child("group"), group, messages));
    }
    for key in ["resource", "name", "namespace"] {
        let value = text(parent, &format!("/{key}"));
        match value {
            "" if key == "namespace" => {}
            "" => errors.push(FieldError::required(&at.child(key), "")),
            _ => {
                let messages = names::path_segment(value, false);
                errors.extend(FieldError::invalid_each(&at.child(key), value, messages));
            }
        }
    }
    errors
}

fn parent(object: &Value) -> String {
    let of = |key: &str| text(object, &format!("/spec/parentRef/{key}"));
    if object.pointer("/spec/parentRef").is_none_or(Value::is_null) {
        return "<none>".to_string();
    }
    let group = if of("group").is_empty() { String::new() } else { format!(".{}", of("group")) };
    let namespace = if of("namespace").is_empty() { String::new() } else { format!("/{}", of("namespace")) };
    format!("{}{namespace}/{}", format!("{}{group}", of("resource")).to_lowercase(), of("name"))
}

pub const KIND: Kind = Kind {
    // The address itself is checked with the rest; it may hold colons.
    name_rule: NameRule::PathSegment,
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = validate(new);
            let at = Path::new("spec").child("parentRef");
            immutable(new, old, "/spec/parentRef", &at, &mut errors);
            errors
        },
        ..Rest::ANY
    },
    columns: &[Column::NAME, Column::string("ParentRef", "What the address belongs to."), Column::AGE],
    row: |object, now| vec![table::name(object), parent(object).into(), table::age(object, now)],
    ..Kind::plain("networking.k8s.io", "v1", "IPAddress")
};
