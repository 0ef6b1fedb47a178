//! Lease.
//!
//! Upstream counterpart: pkg/registry/coordination/lease, ValidateLeaseSpec in pkg/apis/coordination/validation. The
//! fields of coordinated leader election, which 1.36 has off by default, are dropped unless they are in use.
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::IS_NEGATIVE;
use crate::names;
use crate::object::{remove, text};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let number = |key: &str| object.pointer(&format!("/spec/{key}")).and_then(Value::as_i64);
    if let Some(seconds) = number("leaseDurationSeconds").filter(|s| *s <= 0) {
        let at = path.child("leaseDurationSeconds");
        errors.push(FieldError::invalid(&at, seconds, "must be greater than 0"));
    }
    if let Some(transitions) = number("leaseTransitions").filter(|t| *t < 0) {
        errors.push(FieldError::invalid(&path.child("leaseTransitions"), transitions, IS_NEGATIVE));
    }
    let at = path.child("strategy").child("strategy");
    match object.pointer("/spec/strategy").and_then(Value::as_str) {
        None | Some("OldestEmulationVersion") => {}
        Some(name) if name.contains('/') => {
            errors.extend(FieldError::invalid_each(&at, name, names::qualified_name(name)));
        }
        Some(name) => errors.push(FieldError::not_supported(&at, name, &["OldestEmulationVersion"])),
    }
    if !text(object, "/spec/preferredHolder").is_empty() && text(object, "/spec/strategy").is_empty() {
        let detail = "may only be specified if `strategy` is defined";
        errors.push(FieldError::forbidden(&path.child("preferredHolder"), detail));
    }
    errors
}

fn drop_disabled(new: &mut Value, old: Option<&Value>) {
    for key in ["strategy", "preferredHolder"] {
        let used = old.and_then(|o| o.pointer(&format!("/spec/{key}"))).is_some_and(|v| !v.is_null());
        if let Some(spec) = new.get_mut("spec").filter(|_| !used) {
            remove(spec, key);
        }
    }
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| drop_disabled(object, None),
        prepare_update: |new, old| drop_disabled(new, Some(old)),
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    create_on_update: true,
    unconditional_update: false,
    columns: &[Column::NAME, Column::string("Holder", "Who holds the lease."), Column::AGE],
    row: |object, now| {
        vec![table::name(object), text(object, "/spec/holderIdentity").into(), table::age(object, now)]
    },
    ..Kind::plain("coordination.k8s.io", "v1", "Lease")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({"leaseDurationSeconds": 1, "leaseTransitions": 0}), &[]),
            (
                json!({"leaseDurationSeconds": 0, "leaseTransitions": -1}),
                &[
                    "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0",
                    "spec.leaseTransitions: Invalid value: -1: must be greater than or equal to 0",
                ],
            ),
        ];
        for (spec, want) in cases {
            let errors = validate(&json!({"spec": spec}));
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), want);
        }
    }
}
