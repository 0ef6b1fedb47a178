//! ResourceClaim.
//!
//! Upstream counterpart: pkg/registry/resource/resourceclaim, ValidateResourceClaim in pkg/apis/resource/validation. Left
//! out: selectors, constraints, configuration and all of the status.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::GROUP;
use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{count, default_zero, items, items_mut, keep, text};
use crate::table;

const REQUESTS_MAX: usize = 32;

/// Defaults of the claim's spec at `pointer`.
pub(super) fn defaults(object: &mut Value, pointer: &str) {
    let request = |request: &mut Value| {
        default_zero(request, "allocationMode", "ExactCount");
        if text(request, "/allocationMode") == "ExactCount" {
            default_zero(request, "count", 1);
        }
    };
    for entry in items_mut(object, &format!("{pointer}/devices/requests")) {
        if let Some(exact) = entry.get_mut("exactly").filter(|e| e.is_object()) {
            request(exact);
        }
        items_mut(entry, "/firstAvailable").iter_mut().for_each(request);
    }
}

/// All that is wrong with the claim's spec at `pointer`.
pub(super) fn validate(object: &Value, pointer: &str, path: &Path) -> ErrorList {
    let (mut errors, at) = (ErrorList::new(), path.child("devices").child("requests"));
    let requests = items(object, &format!("{pointer}/devices/requests"));
    if requests.len() > REQUESTS_MAX {
        errors.push(FieldError::too_many(&at, requests.len(), REQUESTS_MAX));
    }
    let mut seen = BTreeSet::new();
    for (i, request) in requests.iter().enumerate() {
        let (at, name) = (at.index(i), text(request, "/name"));
        match name {
            "" => errors.push(FieldError::required(&at.child("name"), "")),
            _ => errors.extend(FieldError::invalid_each(&at.child("name"), name, names::dns1123_label(name))),
        }
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
        let exact = request.get("exactly").filter(|e| !e.is_null());
        match (exact, items(request, "/firstAvailable")) {
            (Some(exact), []) => validate_request(exact, &at.child("exactly"), &mut errors),
            (None, []) => {
                let detail = "exactly one of `exactly` or `firstAvailable` is required";
                errors.push(FieldError::required(&at, detail));
            }
            (None, alternatives) => {
                for (j, alternative) in alternatives.iter().enumerate() {
                    validate_request(alternative, &at.child("firstAvailable").index(j), &mut errors);
                }
            }
            (Some(_), _) => {
                let detail =
                    "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set";
                errors.push(FieldError::invalid(&at, Value::Null, detail));
            }
        }
    }
    errors
}

fn validate_request(request: &Value, path: &Path, errors: &mut ErrorList) {
    let (class, at) = (text(request, "/deviceClassName"), path.child("deviceClassName"));
    match class {
        "" => errors.push(FieldError::required(&at, "")),
        _ => errors.extend(FieldError::invalid_each(&at, class, names::dns1123_subdomain(class))),
    }
    let (mode, at) = (text(request, "/allocationMode"), path.child("allocationMode"));
    let wanted = request.get("count").and_then(Value::as_i64).unwrap_or_default();
    match mode {
        "All" if wanted != 0 => {
            let detail = "must not be specified when allocationMode is 'All'";
            errors.push(FieldError::invalid(&path.child("count"), wanted, detail));
        }
        "ExactCount" if wanted <= 0 => {
            errors.push(FieldError::invalid(&path.child("count"), wanted, "must be greater than zero"));
        }
        "All" | "ExactCount" => {}
        other => errors.push(FieldError::not_supported(&at, other, &["All", "ExactCount"])),
    }
}

fn state(object: &Value) -> String {
    let mut states = Vec::new();
    let deleted = object.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null());
    let allocated = object.pointer("/status/allocation").is_some_and(|a| !a.is_null());
    if deleted {
        states.push("deleted");
    }
    match (allocated, deleted) {
        (true, _) => states.push("allocated"),
        (false, false) => states.push("pending"),
        (false, true) => {}
    }
    if allocated && count(object, "/status/reservedFor") > 0 {
        states.push("reserved");
    }
    states.join(",")
}

pub const KIND: Kind = Kind {
    defaults: |object| defaults(object, "/spec"),
    rest: Rest {
        prepare_create: |object| object["status"] = json!({}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate: |object| validate(object, "/spec", &Path::new("spec")),
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            immutable(new, old, "/spec", &Path::new("spec"), &mut errors);
            errors
        },
        ..Rest::ANY
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("State", "A summary of the current state (allocated, pending, reserved, etc.)."),
        Column::AGE,
    ],
    row: |object, now| vec![table::name(object), state(object).into(), table::age(object, now)],
    ..Kind::plain(GROUP, "v1", "ResourceClaim")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let claim = |request: Value| {
            let mut object = json!({"spec": {"devices": {"requests": [request]}}});
            (KIND.defaults)(&mut object);
            (KIND.rest.validate)(&object).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(claim(json!({"name": "r", "exactly": {"deviceClassName": "c"}})), Vec::<String>::new());
        assert_eq!(
            claim(json!({"name": "r", "exactly": {"allocationMode": "All", "count": 2}})),
            [
                "spec.devices.requests[0].exactly.deviceClassName: Required value",
                "spec.devices.requests[0].exactly.count: Invalid value: 2: must not be specified when allocationMode is 'All'",
            ]
        );
    }
}
