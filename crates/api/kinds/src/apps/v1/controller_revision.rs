//! ControllerRevision.
//!
//! Upstream counterpart: pkg/registry/apps/controllerrevision, validateControllerRevision in pkg/apis/apps/validation.
use serde_json::Value;

use super::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::nonnegative;
use crate::object::{integer, items, text, truth};
use crate::table;

fn validate_revision(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    nonnegative(integer(object, "/revision"), &Path::new("revision"), &mut errors);
    errors
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = validate_revision(object);
    match object.get("data") {
        None | Some(Value::Null) => {
            errors.push(FieldError::required(&Path::new("data"), "data is mandatory"))
        }
        Some(Value::Object(_)) => {}
        Some(_) => errors.push(FieldError::required(&Path::new("data"), "data must be a valid JSON object")),
    }
    errors
}

/// The controller that owns it, as `kind.group/name`.
fn controller(object: &Value) -> Value {
    let owner = items(object, "/metadata/ownerReferences").iter().find(|o| truth(o, "/controller"));
    let Some(owner) = owner else { return "<none>".into() };
    let group = text(owner, "/apiVersion").split_once('/').map(|(group, _)| group);
    let kind = text(owner, "/kind").to_lowercase();
    let kind = group.map_or_else(|| kind.clone(), |group| format!("{kind}.{group}"));
    format!("{kind}/{}", text(owner, "/name")).into()
}

pub const KIND: Kind = Kind {
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = validate_revision(new);
            immutable(new, old, "/data", &Path::new("data"), &mut errors);
            errors
        },
        ..Rest::ANY
    },
    columns: &[
        Column::NAME,
        Column::string("Controller", "Controller of the object"),
        Column::string("Revision", "Which state of the controller's this is; it grows."),
        Column::AGE,
    ],
    row: |object, now| {
        let revision = integer(object, "/revision").into();
        vec![table::name(object), controller(object), revision, table::age(object, now)]
    },
    ..Kind::plain("apps", "v1", "ControllerRevision")
};
