//! Tolerations, and the taint effects that nodes share with them.
//!
//! Upstream counterpart: ValidateTolerations and validateTaintEffect in validation.go. The operators Lt and Gt are
//! off in 1.36.
use k8s_openapi::api::core::v1::Toleration;

use crate::field::{ErrorList, FieldError, Path};
use crate::meta::validate_label_name;
use crate::names;
use crate::object::or_empty;

const EFFECTS: &[&str] = &["NoExecute", "NoSchedule", "PreferNoSchedule"];

pub fn validate(tolerations: &[Toleration], path: &Path, errors: &mut ErrorList) {
    for (i, toleration) in tolerations.iter().enumerate() {
        let at = path.index(i);
        let (key, operator) = (or_empty(&toleration.key), or_empty(&toleration.operator));
        let (value, effect) = (or_empty(&toleration.value), or_empty(&toleration.effect));
        let operator_path = at.child("operator");
        if !key.is_empty() {
            errors.extend(validate_label_name(key, &at.child("key")));
        } else if operator != "Exists" {
            let detail =
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.push(FieldError::invalid(&operator_path, operator, detail));
        }
        if toleration.toleration_seconds.is_some() && effect != "NoExecute" {
            let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.push(FieldError::invalid(&at.child("effect"), effect, detail));
        }
        match operator {
            "" | "Equal" => {
                let messages = names::label_value(value);
                if !messages.is_empty() {
                    errors.push(FieldError::invalid(&operator_path, value, messages.join(";")));
                }
            }
            "Exists" if !value.is_empty() => {
                let detail = "value must be empty when `operator` is 'Exists'";
                errors.push(FieldError::invalid(&operator_path, value, detail));
            }
            "Exists" => {}
            "Lt" | "Gt" => {
                let supported = &["Equal", "Exists", "Gt", "Lt"];
                errors.push(FieldError::not_supported(&operator_path, operator, supported));
            }
            _ => errors.push(FieldError::not_supported(&operator_path, operator, &["Equal", "Exists"])),
        }
        validate_effect(effect, true, &at.child("effect"), errors);
    }
}

/// A taint's effect; tolerations may leave it out.
pub fn validate_effect(effect: &str, allow_empty: bool, path: &Path, errors: &mut ErrorList) {
    if effect.is_empty() {
        if !allow_empty {
            errors.push(FieldError::required(path, ""));
        }
    } else if !EFFECTS.contains(&effect) {
        errors.push(FieldError::not_supported(path, effect, EFFECTS));
    }
}
