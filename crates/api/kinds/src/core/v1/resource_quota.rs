//! ResourceQuota.
//!
//! Upstream counterpart: pkg/registry/core/resourcequota, ValidateResourceQuotaSpec in validation.go. Left out: which
//! scope fits which resource, and scope selectors.
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use super::pod_spec::resources::{validate_quantity, validate_resource_name};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::FIELD_IMMUTABLE;
use crate::object::{entries, items, keep};
use crate::quantity::round_up_to_milli;
use crate::table;

const SCOPES: &[&str] = &[
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

fn validate_list(object: &Value, part: &str, list: &str, errors: &mut ErrorList) {
    for (name, value) in entries(object, &format!("/{part}/{list}")) {
        let at = Path::new(part).child(list).key(name);
        let valid = validate_resource_name(name, &at, errors);
        if valid && name == "storage" {
            errors.push(FieldError::invalid(&at, name.as_str(), "must be a standard resource for quota"));
        }
        let quantity = Quantity(value.as_str().unwrap_or_default().to_string());
        validate_quantity(name, &quantity, &at, errors);
    }
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_list(object, "spec", "hard", &mut errors);
    let (at, scopes) = (Path::new("spec").child("scopes"), items(object, "/spec/scopes"));
    for _ in scopes.iter().filter(|s| !SCOPES.iter().any(|known| s == known)) {
        errors.push(FieldError::invalid(&at, scopes.to_vec(), "unsupported scope"));
    }
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|scope| scopes.iter().any(|s| s == scope)) {
            errors.push(FieldError::invalid(&at, scopes.to_vec(), "conflicting scopes"));
        }
    }
    errors
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    let (scopes, stored) = (items(new, "/spec/scopes"), items(old, "/spec/scopes"));
    if scopes.iter().any(|s| !stored.contains(s)) || stored.iter().any(|s| !scopes.contains(s)) {
        errors.push(FieldError::invalid(
            &Path::new("spec").child("scopes"),
            scopes.to_vec(),
            FIELD_IMMUTABLE,
        ));
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    ["hard", "used"].iter().for_each(|list| validate_list(new, "status", list, &mut errors));
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for (name, hard) in entries(object, "/status/hard") {
        let used = object.pointer("/status/used").and_then(|u| u.get(name)).and_then(Value::as_str);
        let cell = format!("{name}: {}/{}", used.unwrap_or("0"), hard.as_str().unwrap_or("0"));
        if name.starts_with("limits.") { limits.push(cell) } else { requests.push(cell) }
    }
    vec![table::name(object), requests.join(", ").into(), limits.join(", ").into(), table::age(object, now)]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        for list in ["/spec/hard", "/status/hard", "/status/used"] {
            round_up_to_milli(object.pointer_mut(list));
        }
    },
    rest: Rest {
        prepare_create: |object| object["status"] = json!({}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate,
        validate_update,
        warnings: |_, _| Vec::new(),
    },
    status: Some(Rest {
        prepare_update: |new, old| {
            keep(new, old, "spec");
        },
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string(
            "Request",
            "Request represents a minimum amount of cpu/memory that a container may consume.",
        ),
        Column::string(
            "Limit",
            "Limits control the maximum amount of cpu/memory that a container may use independent of contention on the \
             node.",
        ),
        Column::AGE,
    ],
    row,
    ..Kind::plain("", "v1", "ResourceQuota")
};
