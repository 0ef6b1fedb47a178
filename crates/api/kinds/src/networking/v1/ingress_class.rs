//! IngressClass.
//!
//! Upstream counterpart: pkg/registry/networking/ingressclass, ValidateIngressClass in pkg/apis/networking/validation.
use serde_json::Value;

use super::ingress::validate_typed_reference;
use crate::apps::v1::workload::immutable;
use crate::batch::v1::job::validation::domain_prefixed_path;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{bump_generation, default_absent, same_in, set_generation, text};
use crate::table;

const CONTROLLER_MAX: usize = 250;
const SCOPES: &[&str] = &["Cluster", "Namespace"];

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let controller = text(object, "/spec/controller");
    if controller.len() > CONTROLLER_MAX {
        errors.push(FieldError::too_long(&path.child("controller"), CONTROLLER_MAX));
    }
    domain_prefixed_path(controller, &path.child("controller"), &mut errors);
    let Some(parameters) = object.pointer("/spec/parameters").filter(|p| !p.is_null()) else { return errors };
    let at = path.child("parameters");
    validate_typed_reference(parameters, &at, &mut errors);
    let namespace = parameters.get("namespace").and_then(Value::as_str);
    match (parameters.get("scope").and_then(Value::as_str), namespace) {
        (None, _) => errors.push(FieldError::required(&at.child("scope"), "")),
        (Some("Namespace"), None) => {
            let detail = "`parameters.scope` is set to 'Namespace'";
            errors.push(FieldError::required(&at.child("namespace"), detail));
        }
        (Some("Namespace"), Some(name)) => {
            errors.extend(FieldError::invalid_each(&at.child("namespace"), name, names::dns1123_label(name)));
        }
        (Some("Cluster"), Some(_)) => {
            let detail = "`parameters.scope` is set to 'Cluster'";
            errors.push(FieldError::forbidden(&at.child("namespace"), detail));
        }
        (Some("Cluster"), None) => {}
        (Some(scope), _) => errors.push(FieldError::not_supported(&at.child("scope"), scope, SCOPES)),
    }
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let default = object
        .pointer("/metadata/annotations")
        .is_some_and(|a| a.get("ingressclass.kubernetes.io/is-default-class").is_some_and(|v| v == "true"));
    let name = text(object, "/metadata/name");
    let parameters = object.pointer("/spec/parameters").filter(|p| !p.is_null()).map(|parameters| {
        let group = parameters.get("apiGroup").and_then(Value::as_str);
        let group = group.map(|group| format!(".{group}")).unwrap_or_default();
        format!("{}{group}/{}", text(parameters, "/kind"), text(parameters, "/name"))
    });
    vec![
        if default { format!("{name} (default)") } else { name.to_string() }.into(),
        text(object, "/spec/controller").into(),
        table::or_none(&parameters.unwrap_or_default()),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        if let Some(parameters) = object.pointer_mut("/spec/parameters") {
            default_absent(parameters, "scope", "Cluster");
        }
    },
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            let at = Path::new("spec").child("controller");
            immutable(new, old, "/spec/controller", &at, &mut errors);
            errors.extend(validate(new));
            errors
        },
        ..Rest::ANY
    },
    columns: &[
        Column::NAME,
        Column::string("Controller", "Controller that is responsible for handling this class"),
        Column::string("Parameters", "A reference to a resource with additional parameters"),
        Column::AGE,
    ],
    row,
    ..Kind::plain("networking.k8s.io", "v1", "IngressClass")
};
