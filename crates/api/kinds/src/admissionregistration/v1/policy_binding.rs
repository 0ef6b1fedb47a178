//! What the bindings of the two admission policies have in common.
//!
//! Upstream counterpart: validateValidatingAdmissionPolicyBindingSpec in pkg/apis/admissionregistration/validation.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::match_resources;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::Column;
use crate::label_selector::cell;
use crate::names;
use crate::object::{items, text};
use crate::table;

const ACTIONS: &[&str] = &["Audit", "Deny", "Warn"];

pub fn defaults(object: &mut Value) {
    if let Some(resources) = object.pointer_mut("/spec/matchResources").filter(|r| r.is_object()) {
        match_resources::defaults(resources);
        match_resources::defaults_rules(resources, "/resourceRules");
        match_resources::defaults_rules(resources, "/excludeResourceRules");
    }
}

/// All that is wrong with a binding. Only validating policies have actions.
pub fn validate(object: &Value, mutating: bool) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let (at, policy) = (path.child("policyName"), text(object, "/spec/policyName"));
    match policy {
        "" => errors.push(FieldError::required(&at, "")),
        _ => errors.extend(FieldError::invalid_each(&at, policy, names::dns1123_subdomain(policy))),
    }
    if let Some(parameter) = object.pointer("/spec/paramRef").filter(|p| !p.is_null()) {
        validate_parameter(parameter, &path.child("paramRef"), &mut errors);
    }
    if let Some(resources) = object.pointer("/spec/matchResources").filter(|r| !r.is_null()) {
        match_resources::validate(resources, &path.child("matchResources"), &mut errors);
    }
    if !mutating {
        validate_actions(object, &path.child("validationActions"), &mut errors);
    }
    errors
}

fn validate_parameter(parameter: &Value, path: &Path, errors: &mut ErrorList) {
    let name = text(parameter, "/name");
    let selector = parameter.get("selector").is_some_and(|s| !s.is_null());
    if !name.is_empty() {
        let messages = names::path_segment(name, false);
        errors.extend(FieldError::invalid_each(&path.child("name"), name, messages));
    }
    match (name.is_empty(), selector) {
        (true, false) => errors.push(FieldError::required(path, "one of name or selector must be specified")),
        (false, true) => {
            for key in ["name", "selector"] {
                errors.push(FieldError::forbidden(
                    &path.child(key),
                    "name and selector are mutually exclusive",
                ));
            }
        }
        _ => {}
    }
    let at = path.child("parameterNotFoundAction");
    match parameter.get("parameterNotFoundAction").and_then(Value::as_str) {
        None => errors.push(FieldError::required(&at, "")),
        Some("Allow" | "Deny") => {}
        Some(other) => errors.push(FieldError::not_supported(&at, other, &["Allow", "Deny"])),
    }
}

fn validate_actions(object: &Value, path: &Path, errors: &mut ErrorList) {
    let actions: Vec<&str> =
        items(object, "/spec/validationActions").iter().filter_map(Value::as_str).collect();
    let mut seen = BTreeSet::new();
    for (i, action) in actions.iter().enumerate() {
        if !ACTIONS.contains(action) {
            errors.push(FieldError::not_supported(&path.index(i), *action, ACTIONS));
        }
        if !seen.insert(*action) {
            errors.push(FieldError::duplicate(&path.index(i), *action));
        }
    }
    if seen.contains("Deny") && seen.contains("Warn") {
        let detail = "must not contain both Deny and Warn (repeating the same validation failure information in the \
                      API response and headers serves no purpose)";
        errors.push(FieldError::invalid(path, json!(actions), detail));
    }
    if actions.is_empty() {
        errors.push(FieldError::required(path, "at least one validation action is required"));
    }
}

pub const COLUMNS: &[Column] = &[
    Column::NAME,
    Column::string(
        "PolicyName",
        "PolicyName indicates the policy definition which the policy binding binded to",
    ),
    Column::string("ParamRef", "ParamRef indicates the param resource which sets the configuration param"),
    Column::AGE,
];

pub fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let of = |key: &str| text(object, &format!("/spec/paramRef/{key}"));
    let parameter: Value = match (of("namespace"), of("name")) {
        (_, "") if object.pointer("/spec/paramRef/selector").is_some() => {
            cell(object.pointer("/spec/paramRef/selector"))
        }
        (_, "") => "<unset>".into(),
        ("", name) => format!("*/{name}").into(),
        (namespace, name) => format!("{namespace}/{name}").into(),
    };
    vec![table::name(object), text(object, "/spec/policyName").into(), parameter, table::age(object, now)]
}
