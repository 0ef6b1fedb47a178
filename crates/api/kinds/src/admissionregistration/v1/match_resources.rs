//! The rules and selectors that say what admission looks at.
//!
//! Upstream counterpart: validateRuleWithOperations and validateMatchResources in
//! pkg/apis/admissionregistration/validation. Left out: which combinations of resources with `*` are allowed.
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::meta::validate_label_selector;
use crate::object::{default_absent, items, items_mut, read, text};

const OPERATIONS: &[&str] = &["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
const SCOPES: &[&str] = &["*", "Cluster", "Namespaced"];
const MATCH_POLICIES: &[&str] = &["Equivalent", "Exact"];

/// Defaults of rules under `list`.
pub fn defaults_rules(object: &mut Value, list: &str) {
    items_mut(object, list).iter_mut().for_each(|rule| default_absent(rule, "scope", "*"));
}

/// Defaults of what matches what: policy and selectors.
pub fn defaults(object: &mut Value) {
    default_absent(object, "matchPolicy", "Equivalent");
    default_absent(object, "namespaceSelector", json!({}));
    default_absent(object, "objectSelector", json!({}));
}

/// All that is wrong with a rule.
pub fn validate_rule(rule: &Value, path: &Path, errors: &mut ErrorList) {
    let operations: Vec<&str> = items(rule, "/operations").iter().filter_map(Value::as_str).collect();
    let at = path.child("operations");
    if operations.is_empty() {
        errors.push(FieldError::required(&at, ""));
    }
    if operations.len() > 1 && operations.contains(&"*") {
        let detail = "if '*' is present, must not specify other operations";
        errors.push(FieldError::invalid(&at, json!(operations), detail));
    }
    for (i, operation) in operations.iter().enumerate().filter(|(_, o)| !OPERATIONS.contains(o)) {
        errors.push(FieldError::not_supported(&at.index(i), *operation, OPERATIONS));
    }
    for (key, words) in [("apiGroups", "API groups"), ("apiVersions", "API versions"), ("resources", "")] {
        let (at, values) = (path.child(key), items(rule, &format!("/{key}")));
        if values.is_empty() {
            errors.push(FieldError::required(&at, ""));
        }
        if !words.is_empty() && values.len() > 1 && values.iter().any(|v| v == "*") {
            let detail = format!("if '*' is present, must not specify other {words}");
            errors.push(FieldError::invalid(&at, values.to_vec(), detail));
        }
        if key != "apiGroups" {
            for (i, _) in values.iter().enumerate().filter(|(_, value)| *value == "") {
                errors.push(FieldError::required(&at.index(i), ""));
            }
        }
    }
    let scope = rule.get("scope").and_then(Value::as_str);
    if let Some(scope) = scope.filter(|scope| !SCOPES.contains(scope)) {
        errors.push(FieldError::not_supported(&path.child("scope"), scope, SCOPES));
    }
}

/// All that is wrong with policy and selectors.
pub fn validate(object: &Value, path: &Path, errors: &mut ErrorList) {
    let policy = text(object, "/matchPolicy");
    if !policy.is_empty() && !MATCH_POLICIES.contains(&policy) {
        errors.push(FieldError::not_supported(&path.child("matchPolicy"), policy, MATCH_POLICIES));
    }
    for key in ["namespaceSelector", "objectSelector"] {
        match read(object.get(key), &path.child(key)) {
            Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &path.child(key))),
            Err(error) => errors.push(error),
        }
    }
    for list in ["resourceRules", "excludeResourceRules"] {
        for (i, rule) in items(object, &format!("/{list}")).iter().enumerate() {
            validate_rule(rule, &path.child(list).index(i), errors);
        }
    }
}
