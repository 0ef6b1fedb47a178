//! Validation of `metadata` for every kind.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/api/validation/objectmeta.go and pkg/apis/meta/v1/validation, with
//! pkg/apis/core/validation's check of finalizers' names. It works on the JSON object, so that managedFields are
//! never copied.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::NameRule;
use crate::names;
use crate::object::{entries, integer, items, text, truth};

/// Annotations together may have this many bytes.
pub const TOTAL_ANNOTATION_SIZE_LIMIT_BYTES: usize = 256 * 1024;
const FIELD_MANAGER_MAX_LENGTH: usize = 128;
const SUBRESOURCE_MAX_LENGTH: usize = 256;
const STANDARD_FINALIZERS: [&str; 3] = ["kubernetes", "orphan", "foregroundDeletion"];

/// What is said of a field that may not change.
pub const FIELD_IMMUTABLE: &str = "field is immutable";
/// What is said of a number below zero.
pub const IS_NEGATIVE: &str = "must be greater than or equal to 0";

/// All that is wrong with a new object's metadata; its name has been generated and its namespace set.
pub fn validate(object: &Value, namespaced: bool, rule: NameRule) -> ErrorList {
    let path = Path::new("metadata");
    let mut errors = ErrorList::new();
    let generate_name = text(object, "/metadata/generateName");
    if !generate_name.is_empty() {
        let messages = names::object_name(rule, generate_name, true);
        errors.extend(FieldError::invalid_each(&path.child("generateName"), generate_name, messages));
    }
    let name = text(object, "/metadata/name");
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), "name or generateName is required"));
    } else {
        errors.extend(FieldError::invalid_each(
            &path.child("name"),
            name,
            names::object_name(rule, name, false),
        ));
    }
    let namespace = text(object, "/metadata/namespace");
    let namespace_path = path.child("namespace");
    match (namespaced, namespace.is_empty()) {
        (true, true) => errors.push(FieldError::required(&namespace_path, "")),
        (true, false) => {
            errors.extend(FieldError::invalid_each(
                &namespace_path,
                namespace,
                names::dns1123_label(namespace),
            ));
        }
        (false, false) => errors.push(FieldError::forbidden(&namespace_path, "not allowed on this type")),
        (false, true) => {}
    }
    nonnegative(integer(object, "/metadata/generation"), &path.child("generation"), &mut errors);
    validate_maps(object, &path, &mut errors);
    validate_finalizers(object, &path.child("finalizers"), &mut errors);
    validate_managed_fields(object, &path.child("managedFields"), &mut errors);
    validate_finalizers_standard(object, &path.child("finalizers"), &mut errors);
    errors
}

/// All that is wrong with an update's metadata.
pub fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let path = Path::new("metadata");
    let mut errors = ErrorList::new();
    if old.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null()) {
        no_new_finalizers(new, old, &path.child("finalizers"), &mut errors);
    }
    if text(new, "/metadata/resourceVersion").is_empty() {
        errors.push(FieldError::invalid(
            &path.child("resourceVersion"),
            "",
            "must be specified for an update",
        ));
    }
    let generation = integer(new, "/metadata/generation");
    if generation < integer(old, "/metadata/generation") {
        errors.push(FieldError::invalid(&path.child("generation"), generation, "must not be decremented"));
    }
    for key in
        ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"]
    {
        immutable_key(new.get("metadata"), old.get("metadata"), key, &path, &mut errors);
    }
    validate_maps(new, &path, &mut errors);
    validate_managed_fields(new, &path.child("managedFields"), &mut errors);
    validate_finalizers_standard(new, &path.child("finalizers"), &mut errors);
    errors
}

fn validate_maps(object: &Value, path: &Path, errors: &mut ErrorList) {
    let labels =
        entries(object, "/metadata/labels").map(|(k, v)| (k.as_str(), v.as_str().unwrap_or_default()));
    validate_label_entries(labels, &path.child("labels"), errors);
    let annotations =
        entries(object, "/metadata/annotations").map(|(k, v)| (k.as_str(), v.as_str().unwrap_or_default()));
    validate_annotation_entries(annotations, &path.child("annotations"), errors);
    validate_owner_references(object, &path.child("ownerReferences"), errors);
}

fn validate_label_entries<'a>(
    labels: impl Iterator<Item = (&'a str, &'a str)>,
    path: &Path,
    errors: &mut ErrorList,
) {
    for (key, value) in labels {
        errors.extend(FieldError::invalid_each(path, key, names::qualified_name(key)));
        errors.extend(FieldError::invalid_each(path, value, names::label_value(value)));
    }
}

fn validate_annotation_entries<'a>(
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let mut size_bytes = 0;
    for (key, value) in annotations {
        errors.extend(FieldError::invalid_each(path, key, names::qualified_name(&key.to_lowercase())));
        size_bytes += key.len() + value.len();
    }
    if size_bytes > TOTAL_ANNOTATION_SIZE_LIMIT_BYTES {
        errors.push(FieldError::too_long(path, TOTAL_ANNOTATION_SIZE_LIMIT_BYTES));
    }
}

/// Labels of a template or a selector.
pub fn validate_labels(labels: Option<&BTreeMap<String, String>>, path: &Path) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_label_entries(
        labels.into_iter().flatten().map(|(k, v)| (k.as_str(), v.as_str())),
        path,
        &mut errors,
    );
    errors
}

/// Annotations of a template.
pub fn validate_annotations(annotations: Option<&BTreeMap<String, String>>, path: &Path) -> ErrorList {
    let mut errors = ErrorList::new();
    let entries = annotations.into_iter().flatten().map(|(k, v)| (k.as_str(), v.as_str()));
    validate_annotation_entries(entries, path, &mut errors);
    errors
}

/// A label's key.
pub fn validate_label_name(name: &str, path: &Path) -> ErrorList {
    FieldError::invalid_each(path, name, names::qualified_name(name)).collect()
}

/// A label selector of any kind.
pub fn validate_label_selector(selector: Option<&LabelSelector>, path: &Path) -> ErrorList {
    let Some(selector) = selector else { return ErrorList::new() };
    let mut errors = validate_labels(selector.match_labels.as_ref(), &path.child("matchLabels"));
    for (i, requirement) in selector.match_expressions.iter().flatten().enumerate() {
        validate_requirement(requirement, &path.child("matchExpressions").index(i), &mut errors);
    }
    errors
}

fn validate_requirement(requirement: &LabelSelectorRequirement, path: &Path, errors: &mut ErrorList) {
    let values = requirement.values.as_deref().unwrap_or_default();
    match requirement.operator.as_str() {
        "In" | "NotIn" if values.is_empty() => errors.push(FieldError::required(
            &path.child("values"),
            "must be specified when `operator` is 'In' or 'NotIn'",
        )),
        "In" | "NotIn" => {}
        "Exists" | "DoesNotExist" if !values.is_empty() => errors.push(FieldError::forbidden(
            &path.child("values"),
            "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
        )),
        "Exists" | "DoesNotExist" => {}
        other => {
            errors.push(FieldError::invalid(&path.child("operator"), other, "not a valid selector operator"));
        }
    }
    errors.extend(validate_label_name(&requirement.key, &path.child("key")));
    for (i, value) in values.iter().enumerate() {
        let at = path.child("values").index(i);
        errors.extend(FieldError::invalid_each(&at, value, names::label_value(value)));
    }
}

fn validate_owner_references(object: &Value, path: &Path, errors: &mut ErrorList) {
    let mut controller: Option<String> = None;
    let references = items(object, "/metadata/ownerReferences");
    for reference in references {
        let api_version = text(reference, "/apiVersion");
        let version = api_version.rsplit('/').next().unwrap_or_default();
        // What has two slashes is no version at all to upstream's parser.
        if version.is_empty() || api_version.matches('/').count() > 1 {
            errors.push(FieldError::invalid(
                &path.child("apiVersion"),
                api_version,
                "version must not be empty",
            ));
        }
        for key in ["kind", "name", "uid"] {
            if text(reference, &format!("/{key}")).is_empty() {
                errors.push(FieldError::invalid(&path.child(key), "", "must not be empty"));
            }
        }
        let kind = text(reference, "/kind");
        if api_version == "v1" && kind == "Event" {
            let detail = "/v1, Kind=Event is disallowed from being an owner";
            errors.push(FieldError::invalid(path, reference.clone(), detail));
        }
        if truth(reference, "/controller") {
            let this = format!("{kind}/{}", text(reference, "/name"));
            match &controller {
                Some(first) => {
                    let detail = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for \
                         {first} and {this}"
                    );
                    errors.push(FieldError::invalid(path, references.to_vec(), detail));
                }
                None => controller = Some(this),
            }
        }
    }
}

fn validate_finalizers(object: &Value, path: &Path, errors: &mut ErrorList) {
    let finalizers = items(object, "/metadata/finalizers");
    for finalizer in finalizers.iter().filter_map(Value::as_str) {
        errors.extend(FieldError::invalid_each(path, finalizer, names::qualified_name(finalizer)));
    }
    let has = |name: &str| finalizers.iter().any(|f| f == name);
    if has("orphan") && has("foregroundDeletion") {
        let detail = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(FieldError::invalid(path, finalizers.to_vec(), detail));
    }
}

fn validate_finalizers_standard(object: &Value, path: &Path, errors: &mut ErrorList) {
    for (i, finalizer) in items(object, "/metadata/finalizers").iter().enumerate() {
        errors.extend(validate_finalizer_standard(finalizer.as_str().unwrap_or_default(), &path.index(i)));
    }
}

/// A finalizer without a prefix has to be one of Kubernetes' own.
pub fn validate_finalizer_standard(name: &str, path: &Path) -> Option<FieldError> {
    (!name.contains('/') && !STANDARD_FINALIZERS.contains(&name)).then(|| {
        FieldError::invalid(path, name, "name is neither a standard finalizer name nor is it fully qualified")
    })
}

fn no_new_finalizers(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let old = items(old, "/metadata/finalizers");
    let extra: std::collections::BTreeSet<&str> = items(new, "/metadata/finalizers")
        .iter()
        .filter(|f| !old.contains(f))
        .filter_map(Value::as_str)
        .collect();
    if !extra.is_empty() {
        let quoted: Vec<String> = extra.iter().map(|f| crate::field::go_quote(f)).collect();
        let detail = format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
            quoted.join(", ")
        );
        errors.push(FieldError::forbidden(path, detail));
    }
}

fn validate_managed_fields(object: &Value, path: &Path, errors: &mut ErrorList) {
    for (i, entry) in items(object, "/metadata/managedFields").iter().enumerate() {
        let path = path.index(i);
        let operation = text(entry, "/operation");
        if operation != "Apply" && operation != "Update" {
            let detail = "must be `Apply` or `Update`";
            errors.push(FieldError::invalid(&path.child("operation"), operation, detail));
        }
        let fields_type = text(entry, "/fieldsType");
        if !fields_type.is_empty() && fields_type != "FieldsV1" {
            errors.push(FieldError::invalid(&path.child("fieldsType"), fields_type, "must be `FieldsV1`"));
        }
        errors.extend(validate_field_manager(text(entry, "/manager"), &path.child("manager")));
        if text(entry, "/subresource").len() > SUBRESOURCE_MAX_LENGTH {
            errors.push(FieldError::too_long(&path.child("subresource"), SUBRESOURCE_MAX_LENGTH));
        }
    }
}

/// A field manager's name, in metadata or in a request's options.
pub fn validate_field_manager(manager: &str, path: &Path) -> ErrorList {
    let mut errors = ErrorList::new();
    if manager.len() > FIELD_MANAGER_MAX_LENGTH {
        errors.push(FieldError::too_long(path, FIELD_MANAGER_MAX_LENGTH));
    }
    for (position, c) in manager.char_indices().filter(|(_, c)| c.is_control()) {
        let detail = format!("invalid character U+{:04X} (at position {position})", c as u32);
        errors.push(FieldError::invalid(path, manager, detail));
    }
    errors
}

/// `key` must be the same in both.
pub fn immutable_key(
    new: Option<&Value>,
    old: Option<&Value>,
    key: &str,
    path: &Path,
    errors: &mut ErrorList,
) {
    let (new, old) = (new.and_then(|n| n.get(key)), old.and_then(|o| o.get(key)));
    if !crate::object::same(new, old) {
        let value = new.cloned().unwrap_or(match old {
            Some(Value::String(_)) if !key.ends_with("Timestamp") => "".into(),
            _ => Value::Null,
        });
        errors.push(FieldError::invalid(&path.child(key), value, FIELD_IMMUTABLE));
    }
}

/// A number that may not be below zero.
pub fn nonnegative(value: i64, path: &Path, errors: &mut ErrorList) {
    if value < 0 {
        errors.push(FieldError::invalid(path, value, IS_NEGATIVE));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(errors: ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn create_refuses() {
        let base = json!({"metadata": {"name": "a", "namespace": "b"}});
        let cases = [
            (json!({"name": ""}), "metadata.name: Required value: name or generateName is required"),
            (json!({"namespace": ""}), "metadata.namespace: Required value"),
            (json!({"labels": {"a": "-"}}), "metadata.labels: Invalid value: \"-\": a valid label must be"),
            (
                json!({"annotations": {"/a": ""}}),
                "metadata.annotations: Invalid value: \"/a\": prefix part must be",
            ),
            (
                json!({"annotations": {"a": "x".repeat(300_000)}}),
                "metadata.annotations: Too long: may not be more than 262144 bytes",
            ),
            (
                json!({"finalizers": ["x"]}),
                "metadata.finalizers[0]: Invalid value: \"x\": name is neither a standard",
            ),
            (
                json!({"ownerReferences": [{"apiVersion": "v1", "kind": "A", "name": "n"}]}),
                "metadata.ownerReferences.uid: Invalid value: \"\": must not be empty",
            ),
            (
                json!({"generation": -1}),
                "metadata.generation: Invalid value: -1: must be greater than or equal to 0",
            ),
        ];
        assert_eq!(texts(validate(&base, true, NameRule::DnsSubdomain)), Vec::<String>::new());
        for (patch, want) in cases {
            let mut object = base.clone();
            for (key, value) in patch.as_object().unwrap() {
                object["metadata"][key] = value.clone();
            }
            let errors = texts(validate(&object, true, NameRule::DnsSubdomain));
            assert!(errors.len() == 1 && errors[0].starts_with(want), "{errors:?}");
        }
        let errors = texts(validate(&base, false, NameRule::DnsSubdomain));
        assert_eq!(errors, ["metadata.namespace: Forbidden: not allowed on this type"]);
    }

    #[test]
    fn update_refuses() {
        let old = json!({"metadata": {"name": "a", "uid": "u", "resourceVersion": "1", "generation": 2,
            "deletionTimestamp": "2024-01-01T00:00:00Z"}});
        let mut new = old.clone();
        assert_eq!(texts(validate_update(&new, &old)), Vec::<String>::new());
        new["metadata"]["uid"] = "v".into();
        new["metadata"]["generation"] = 1.into();
        new["metadata"]["resourceVersion"] = "".into();
        new["metadata"]["finalizers"] = json!(["a/b"]);
        assert_eq!(
            texts(validate_update(&new, &old)),
            [
                "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{\"a/b\"}",
                "metadata.resourceVersion: Invalid value: \"\": must be specified for an update",
                "metadata.generation: Invalid value: 1: must not be decremented",
                "metadata.uid: Invalid value: \"v\": field is immutable",
            ]
        );
    }
}
