//! ValidatingAdmissionPolicy.
//!
//! Upstream counterpart: pkg/registry/admissionregistration/validatingadmissionpolicy, pkg/apis/admissionregistration.
//! Left out: compiling expressions.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::webhook::validate_conditions;
use super::{GROUP, match_resources};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{
    bump_generation, child, count, default_absent, items, keep, same_in, set_generation, text,
};
use crate::table;

const REASONS: &[&str] = &["Forbidden", "Invalid", "RequestEntityTooLarge", "Unauthorized"];

/// Defaults that both policies have.
pub(super) fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_absent(spec, "failurePolicy", "Fail");
    if let Some(constraints) = spec.get_mut("matchConstraints").filter(|c| c.is_object()) {
        match_resources::defaults(constraints);
        match_resources::defaults_rules(constraints, "/resourceRules");
        match_resources::defaults_rules(constraints, "/excludeResourceRules");
    }
}

/// What both policies have: failure policy, kind of parameters, constraints, variables.
pub(super) fn validate_shared(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("spec");
    let policy = text(object, "/spec/failurePolicy");
    if !["Fail", "Ignore"].contains(&policy) {
        errors.push(FieldError::not_supported(&path.child("failurePolicy"), policy, &["Fail", "Ignore"]));
    }
    if let Some(kind) = object.pointer("/spec/paramKind").filter(|k| !k.is_null()) {
        for key in ["apiVersion", "kind"] {
            if text(kind, &format!("/{key}")).is_empty() {
                errors.push(FieldError::required(&path.child("paramKind").child(key), ""));
            }
        }
    }
    let at = path.child("matchConstraints");
    match object.pointer("/spec/matchConstraints").filter(|c| !c.is_null()) {
        None => errors.push(FieldError::required(&at, "")),
        Some(constraints) => {
            match_resources::validate(constraints, &at, errors);
            if count(constraints, "/resourceRules") == 0 {
                errors.push(FieldError::required(&at.child("resourceRules"), ""));
            }
        }
    }
    validate_conditions(object, "/spec", &path, errors);
    for (i, variable) in items(object, "/spec/variables").iter().enumerate() {
        for key in ["name", "expression"] {
            if text(variable, &format!("/{key}")).trim().is_empty() {
                let at = path.child("variables").index(i).child(key);
                errors.push(FieldError::required(&at, format!("{key} is not specified")));
            }
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    validate_shared(object, &mut errors);
    let validations = items(object, "/spec/validations");
    let annotations = items(object, "/spec/auditAnnotations");
    if validations.is_empty() && annotations.is_empty() {
        for key in ["validations", "auditAnnotations"] {
            let detail = "validations or auditAnnotations must contain at least one item";
            errors.push(FieldError::required(&path.child(key), detail));
        }
    }
    for (i, validation) in validations.iter().enumerate() {
        let at = path.child("validations").index(i);
        let (expression, message) = (text(validation, "/expression").trim(), text(validation, "/message"));
        if expression.is_empty() {
            errors.push(FieldError::required(&at.child("expression"), "expression is not specified"));
        }
        if message.trim().contains('\n') {
            errors.push(FieldError::invalid(&at.child("message"), message, "must not contain line breaks"));
        }
        if message.is_empty() && expression.contains('\n') {
            let detail = "message must be specified if expression contains line breaks";
            errors.push(FieldError::required(&at.child("message"), detail));
        }
        let reason = validation.get("reason").and_then(Value::as_str);
        if let Some(reason) = reason.filter(|r| !REASONS.contains(r)) {
            errors.push(FieldError::not_supported(&at.child("reason"), reason, REASONS));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, annotation) in annotations.iter().enumerate() {
        let (at, key) = (path.child("auditAnnotations").index(i), text(annotation, "/key"));
        if text(annotation, "/valueExpression").trim().is_empty() {
            let detail = "valueExpression is not specified";
            errors.push(FieldError::required(&at.child("valueExpression"), detail));
        }
        if !seen.insert(key) {
            errors.push(FieldError::duplicate(&at.child("key"), key));
        }
    }
    errors
}

/// The kind of a policy's parameters.
pub(super) fn param_kind(object: &Value) -> Value {
    let of = |key: &str| text(object, &format!("/spec/paramKind/{key}"));
    match object.pointer("/spec/paramKind").filter(|k| !k.is_null()) {
        Some(_) => format!("{}/{}", of("apiVersion"), of("kind")).into(),
        None => "<unset>".into(),
    }
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({});
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
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::integer(
            "Validations",
            "Validations indicates the number of validation rules defined in this configuration",
        ),
        Column::string(
            "ParamKind",
            "ParamKind specifies the kind of resources used to parameterize this policy",
        ),
        Column::AGE,
    ],
    row: |object, now| {
        let validations = count(object, "/spec/validations");
        vec![table::name(object), validations.into(), param_kind(object), table::age(object, now)]
    },
    ..Kind::plain(GROUP, "v1", "ValidatingAdmissionPolicy")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let mut policy = json!({"spec": {"validations": [{"expression": "true"}], "matchConstraints": {"resourceRules":
            [{"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*"]}]}}});
        defaults(&mut policy);
        assert_eq!(policy["spec"]["matchConstraints"]["resourceRules"][0]["scope"], "*");
        assert_eq!(validate(&policy), Vec::new());
        policy["spec"]["validations"] = json!([{"expression": "", "reason": "x"}]);
        let errors: Vec<String> = validate(&policy).iter().map(ToString::to_string).collect();
        assert_eq!(errors[0], "spec.validations[0].expression: Required value: expression is not specified");
        assert_eq!(errors.len(), 2);
    }
}
