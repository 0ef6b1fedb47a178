//! PodDisruptionBudget.
//!
//! Upstream counterpart: pkg/registry/policy/poddisruptionbudget, pkg/apis/policy/validation.
use serde_json::{Value, json};

use crate::apps::v1::workload::{nonnegative_keys, not_above_100_percent, validate_int_or_percent};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_selector;
use crate::object::{bump_generation, integer, keep, read, same_in, set_generation};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let bound = |key: &str| object.pointer(&format!("/spec/{key}")).filter(|v| !v.is_null());
    if bound("minAvailable").is_some() && bound("maxUnavailable").is_some() {
        let detail = "minAvailable and maxUnavailable cannot be both set";
        errors.push(FieldError::invalid(&path, object["spec"].clone(), detail));
    }
    for key in ["minAvailable", "maxUnavailable"] {
        if let Some(value) = bound(key) {
            validate_int_or_percent(value, &path.child(key), &mut errors);
            not_above_100_percent(value, &path.child(key), &mut errors);
        }
    }
    if let Some(selector) = bound("selector") {
        match read(Some(selector), &path.child("selector")) {
            Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &path.child("selector"))),
            Err(error) => errors.push(error),
        }
    }
    let policies = ["AlwaysAllow", "IfHealthyBudget"];
    let policy = bound("unhealthyPodEvictionPolicy").and_then(Value::as_str);
    if let Some(policy) = policy.filter(|p| !policies.contains(p)) {
        let at = path.child("unhealthyPodEvictionPolicy");
        errors.push(FieldError::not_supported(&at, policy, &policies));
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let keys = ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"];
    nonnegative_keys(new, "/status", &Path::new("status"), &keys, &mut errors);
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let bound = |key: &str| match object.pointer(&format!("/spec/{key}")) {
        Some(Value::String(percent)) => percent.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => "N/A".to_string(),
    };
    vec![
        table::name(object),
        bound("minAvailable").into(),
        bound("maxUnavailable").into(),
        integer(object, "/status/disruptionsAllowed").into(),
        table::age(object, now),
    ]
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({
                "currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0
            });
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::string("Min Available", "The minimum number of pods that must be available."),
        Column::string("Max Unavailable", "The maximum number of pods that may be unavailable."),
        Column::integer(
            "Allowed Disruptions",
            "Calculated number of pods that may be disrupted at this time.",
        ),
        Column::AGE,
    ],
    row,
    ..Kind::plain("policy", "v1", "PodDisruptionBudget")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bound_only() {
        let texts = |spec: Value| -> Vec<String> {
            validate(&json!({"spec": spec})).iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts(json!({"minAvailable": "50%", "selector": {}})), Vec::<String>::new());
        assert_eq!(
            texts(json!({"minAvailable": "101%", "maxUnavailable": -1})),
            [
                "spec: Invalid value: {\"maxUnavailable\":-1,\"minAvailable\":\"101%\"}: minAvailable and maxUnavailable cannot be both set",
                "spec.minAvailable: Invalid value: \"101%\": must not be greater than 100%",
                "spec.maxUnavailable: Invalid value: -1: must be greater than or equal to 0",
            ]
        );
    }
}
