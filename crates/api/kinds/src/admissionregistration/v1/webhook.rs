//! The webhooks that the two webhook configurations hold.
//!
//! Upstream counterpart: validateValidatingWebhook and validateMutatingWebhook in
//! pkg/apis/admissionregistration/validation. Left out: compiling match conditions, and the inside of CA bundles.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::match_resources;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::Column;
use crate::names;
use crate::object::{bump_generation, count, default_absent, items, items_mut, same_in, text};
use crate::table;

const REVIEW_VERSIONS: [&str; 2] = ["v1", "v1beta1"];

/// Defaults of all webhooks. Only mutating ones are called again.
pub fn defaults(object: &mut Value, mutating: bool) {
    for hook in items_mut(object, "/webhooks") {
        default_absent(hook, "failurePolicy", "Fail");
        match_resources::defaults(hook);
        default_absent(hook, "timeoutSeconds", 10);
        if mutating {
            default_absent(hook, "reinvocationPolicy", "Never");
        }
        match_resources::defaults_rules(hook, "/rules");
        if let Some(service) = hook.pointer_mut("/clientConfig/service") {
            default_absent(service, "port", 443);
        }
    }
}

pub fn prepare_update(new: &mut Value, old: &Value) {
    bump_generation(new, old, !same_in(new, old, "/webhooks"));
}

/// All that is wrong with the webhooks.
pub fn validate(object: &Value, mutating: bool) -> ErrorList {
    let (mut errors, mut seen) = (ErrorList::new(), BTreeSet::new());
    for (i, hook) in items(object, "/webhooks").iter().enumerate() {
        let at = Path::new("webhooks").index(i);
        validate_one(hook, mutating, &at, &mut errors);
        let name = text(hook, "/name");
        if !name.is_empty() && !seen.insert(name) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
    }
    errors
}

fn validate_one(hook: &Value, mutating: bool, path: &Path, errors: &mut ErrorList) {
    validate_name(text(hook, "/name"), &path.child("name"), errors);
    for (i, rule) in items(hook, "/rules").iter().enumerate() {
        match_resources::validate_rule(rule, &path.child("rules").index(i), errors);
    }
    let one_of = |key: &str, supported: &[&str], errors: &mut ErrorList| {
        let value = hook.get(key).and_then(Value::as_str);
        if let Some(value) = value.filter(|value| !supported.contains(value)) {
            errors.push(FieldError::not_supported(&path.child(key), value, supported));
        }
    };
    one_of("failurePolicy", &["Fail", "Ignore"], errors);
    match_resources::validate(hook, path, errors);
    if hook.get("sideEffects").is_none_or(Value::is_null) {
        let detail = "must specify one of None, NoneOnDryRun";
        errors.push(FieldError::required(&path.child("sideEffects"), detail));
    }
    one_of("sideEffects", &["None", "NoneOnDryRun"], errors);
    let timeout = hook.get("timeoutSeconds").and_then(Value::as_i64);
    if let Some(seconds) = timeout.filter(|seconds| !(1..=30).contains(seconds)) {
        let detail = "the timeout value must be between 1 and 30 seconds";
        errors.push(FieldError::invalid(&path.child("timeoutSeconds"), seconds, detail));
    }
    if mutating {
        one_of("reinvocationPolicy", &["IfNeeded", "Never"], errors);
    }
    validate_client(hook, &path.child("clientConfig"), errors);
    validate_review_versions(hook, &path.child("admissionReviewVersions"), errors);
    validate_conditions(hook, "", path, errors);
}

/// The match conditions under `pointer`.
pub fn validate_conditions(object: &Value, pointer: &str, path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for (i, condition) in items(object, &format!("{pointer}/matchConditions")).iter().enumerate() {
        let (at, name) = (path.child("matchConditions").index(i), text(condition, "/name"));
        if text(condition, "/expression").trim().is_empty() {
            errors.push(FieldError::required(&at.child("expression"), ""));
        }
        match name {
            "" => errors.push(FieldError::required(&at.child("name"), "")),
            _ => {
                errors.extend(FieldError::invalid_each(&at.child("name"), name, names::qualified_name(name)))
            }
        }
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
    }
}

/// A domain of three labels at least.
fn validate_name(name: &str, path: &Path, errors: &mut ErrorList) {
    if name.is_empty() {
        return errors.push(FieldError::required(path, ""));
    }
    let messages = names::dns1123_subdomain(name);
    if !messages.is_empty() {
        return errors.push(FieldError::invalid(path, name, messages.join(",")));
    }
    if name.split('.').count() < 3 {
        let detail = "should be a domain with at least three segments separated by dots";
        errors.push(FieldError::invalid(path, name, detail));
    }
}

fn validate_client(hook: &Value, path: &Path, errors: &mut ErrorList) {
    let url = hook.pointer("/clientConfig/url").and_then(Value::as_str);
    let service = hook.pointer("/clientConfig/service").filter(|s| !s.is_null());
    match (url, service) {
        (None, None) | (Some(_), Some(_)) => {
            errors.push(FieldError::required(path, "exactly one of url or service is required"));
        }
        (Some(url), None) => {
            if !url.starts_with("https://") {
                let detail = "'https' is the only allowed URL scheme; desired format: https://host[/path]";
                errors.push(FieldError::invalid(&path.child("url"), url, detail));
            }
        }
        (None, Some(service)) => {
            let at = path.child("service");
            for (key, what) in [("name", "service name"), ("namespace", "service namespace")] {
                if text(service, &format!("/{key}")).is_empty() {
                    errors.push(FieldError::required(&at.child(key), format!("{what} is required")));
                }
            }
            let port = service.get("port").and_then(Value::as_i64).unwrap_or(443);
            for message in names::port_num(port) {
                let detail = format!("port is not valid: {message}");
                errors.push(FieldError::invalid(&at.child("port"), port, detail));
            }
        }
    }
}

fn validate_review_versions(hook: &Value, path: &Path, errors: &mut ErrorList) {
    let versions: Vec<&str> =
        items(hook, "/admissionReviewVersions").iter().filter_map(Value::as_str).collect();
    if versions.is_empty() {
        let detail = format!("must specify one of {}", REVIEW_VERSIONS.join(", "));
        return errors.push(FieldError::required(path, detail));
    }
    let mut seen = BTreeSet::new();
    for (i, version) in versions.iter().enumerate() {
        if !seen.insert(*version) {
            errors.push(FieldError::invalid(&path.index(i), *version, "duplicate version"));
            continue;
        }
        errors.extend(FieldError::invalid_each(&path.index(i), version, names::dns1035_label(version)));
    }
    if !versions.iter().any(|version| REVIEW_VERSIONS.contains(version)) {
        let detail = format!("must include at least one of {}", REVIEW_VERSIONS.join(", "));
        errors.push(FieldError::invalid(path, json!(versions), detail));
    }
}

pub const COLUMNS: &[Column] = &[
    Column::NAME,
    Column::integer("Webhooks", "Webhooks indicates the number of webhooks registered in this configuration"),
    Column::AGE,
];

pub fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    vec![table::name(object), count(object, "/webhooks").into(), table::age(object, now)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let texts = |hook: Value| -> Vec<String> {
            let mut object = json!({"webhooks": [hook]});
            defaults(&mut object, true);
            validate(&object, true).iter().map(ToString::to_string).collect()
        };
        let ok = json!({
            "name": "a.example.com", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"service": {"name": "s", "namespace": "n"}},
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]
        });
        assert_eq!(texts(ok), Vec::<String>::new());
        assert_eq!(
            texts(json!({"name": "a.b", "timeoutSeconds": 31, "clientConfig": {"url": "http://x"},
                "admissionReviewVersions": ["v2"], "sideEffects": "Some"})),
            [
                "webhooks[0].name: Invalid value: \"a.b\": should be a domain with at least three segments separated by dots",
                "webhooks[0].sideEffects: Unsupported value: \"Some\": supported values: \"None\", \"NoneOnDryRun\"",
                "webhooks[0].timeoutSeconds: Invalid value: 31: the timeout value must be between 1 and 30 seconds",
                "webhooks[0].clientConfig.url: Invalid value: \"http://x\": 'https' is the only allowed URL scheme; desired format: https://host[/path]",
                "webhooks[0].admissionReviewVersions: Invalid value: [\"v2\"]: must include at least one of v1, v1beta1",
            ]
        );
    }
}
