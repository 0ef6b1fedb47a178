//! What the kinds that hold a pod template and a selector have in common.
//!
//! Upstream counterpart: the shared functions of pkg/apis/apps/validation/validation.go and the workloads' strategies.
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::{Value, json};

use crate::core::v1::pod_spec::drop_disabled_fields;
use crate::core::v1::pod_template::{container_cells, validate_spec, warnings_spec};
use crate::field::{ErrorList, FieldError, Path};
use crate::label_selector::{is_empty, is_valid, matches};
use crate::meta::{FIELD_IMMUTABLE, nonnegative, validate_label_selector};
use crate::names;
use crate::object::{integer, or_empty, read, same_in, text};

/// The parts of a workload's spec that are read into structs.
pub struct Parts {
    /// `None` where there is no selector, which is not the same as an empty one.
    pub selector: Option<LabelSelector>,
    pub template: PodTemplateSpec,
}

/// Reads the parts at `pointer`, a spec's place.
pub fn parts(object: &Value, pointer: &str) -> Result<Parts, FieldError> {
    let path = Path::new("spec");
    let selector = match object.pointer(&format!("{pointer}/selector")) {
        None | Some(Value::Null) => None,
        some => Some(read(some, &path.child("selector"))?),
    };
    let template = read(object.pointer(&format!("{pointer}/template")), &path.child("template"))?;
    Ok(Parts { selector, template })
}

impl Parts {
    /// A selector that has to be there and select something. `kind` is for the message.
    pub fn require_selector(&self, kind: &str, path: &Path, errors: &mut ErrorList) {
        let at = path.child("selector");
        match &self.selector {
            None => errors.push(FieldError::required(&at, "")),
            Some(selector) => {
                errors.extend(validate_label_selector(Some(selector), &at));
                self.refuse_empty(kind, path, errors);
            }
        }
    }

    /// A selector that selects everything is refused.
    pub fn refuse_empty(&self, kind: &str, path: &Path, errors: &mut ErrorList) {
        if let Some(selector) = self.selector.as_ref().filter(|s| is_empty(s)) {
            let detail = format!("empty selector is invalid for {kind}");
            errors.push(FieldError::invalid(&path.child("selector"), json!(selector), detail));
        }
    }

    /// True where the selector can be used; an unusable one is said once more, as upstream does.
    pub fn selector_is_usable(&self, detail: &str, path: &Path, errors: &mut ErrorList) -> bool {
        let usable = is_valid(self.selector.as_ref());
        if !usable {
            errors.push(FieldError::invalid(&path.child("selector"), json!(self.selector), detail));
        }
        usable
    }

    /// The selector has to select the template's labels.
    pub fn require_match(&self, path: &Path, errors: &mut ErrorList) {
        let labels = self.template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
        if !matches(self.selector.as_ref(), &labels) {
            let at = path.child("template").child("metadata").child("labels");
            let detail = "`selector` does not match template `labels`";
            errors.push(FieldError::invalid(&at, json!(labels), detail));
        }
    }

    /// All that is wrong with the template itself.
    pub fn validate_template(&self, path: &Path, errors: &mut ErrorList) {
        errors.extend(validate_spec(&self.template, &path.child("template")));
    }

    /// Pods that are to run for ever. `kind` is for the message.
    pub fn require_endless(&self, kind: &str, path: &Path, errors: &mut ErrorList) {
        let at = path.child("template").child("spec");
        let spec = self.template.spec.as_ref();
        let policy = spec.map(|s| or_empty(&s.restart_policy)).unwrap_or_default();
        if policy != "Always" {
            errors.push(FieldError::not_supported(&at.child("restartPolicy"), policy, &["Always"]));
        }
        if spec.is_some_and(|s| s.active_deadline_seconds.is_some()) {
            let detail = format!("activeDeadlineSeconds in {kind} is not Supported");
            errors.push(FieldError::forbidden(&at.child("activeDeadlineSeconds"), detail));
        }
    }
}

/// Numbers under `pointer` that may not be below zero; what isn't there isn't looked at.
pub fn nonnegative_keys(object: &Value, pointer: &str, path: &Path, keys: &[&str], errors: &mut ErrorList) {
    for key in keys {
        nonnegative(integer(object, &format!("{pointer}/{key}")), &path.child(key), errors);
    }
}

/// Numbers under `status` that may not be above the number under `limit`.
pub fn not_above(object: &Value, keys: &[&str], limit: &str, detail: &str, errors: &mut ErrorList) {
    let most = integer(object, &format!("/status/{limit}"));
    for key in keys {
        let count = integer(object, &format!("/status/{key}"));
        if count > most {
            errors.push(FieldError::invalid(&Path::new("status").child(key), count, detail));
        }
    }
}

/// `status.collisionCount` only grows.
pub fn collisions_only_grow(new: &Value, old: &Value, errors: &mut ErrorList) {
    let count = integer(new, "/status/collisionCount");
    let at = |object: &Value| object.pointer("/status/collisionCount").and_then(Value::as_i64);
    if at(old).is_some_and(|old| at(new).is_none_or(|new| new < old)) {
        let at = Path::new("status").child("collisionCount");
        errors.push(FieldError::invalid(&at, count, "cannot be decremented"));
    }
}

/// The value at `pointer` may not change.
pub fn immutable(new: &Value, old: &Value, pointer: &str, path: &Path, errors: &mut ErrorList) {
    if !same_in(new, old, pointer) {
        let value = new.pointer(pointer).cloned().unwrap_or_default();
        errors.push(FieldError::invalid(path, value, FIELD_IMMUTABLE));
    }
}

/// A number, not below zero, or a percentage.
pub fn validate_int_or_percent(value: &Value, path: &Path, errors: &mut ErrorList) {
    match value {
        Value::String(text) => errors.extend(FieldError::invalid_each(path, text, names::percent(text))),
        other => nonnegative(other.as_i64().unwrap_or_default(), path, errors),
    }
}

fn percent(value: &Value) -> Option<i64> {
    let text = value.as_str().filter(|text| names::percent(text).is_empty())?;
    Some(text.trim_end_matches('%').parse().unwrap_or(i64::MAX))
}

/// The number, or the percentage's.
pub fn int_or_percent_value(value: &Value) -> i64 {
    let number = || value.as_i64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default();
    percent(value).unwrap_or_else(number)
}

/// A percentage may not be above 100 %.
pub fn not_above_100_percent(value: &Value, path: &Path, errors: &mut ErrorList) {
    if percent(value).is_some_and(|percent| percent > 100) {
        errors.push(FieldError::invalid(path, value.clone(), "must not be greater than 100%"));
    }
}

/// Removes what 1.36 has off by default from the template at `pointer`.
pub fn drop_disabled(object: &mut Value, pointer: &str) {
    if let Some(spec) = object.pointer_mut(&format!("{pointer}/spec")) {
        drop_disabled_fields(spec);
    }
}

/// A name that pods' names are made from should be a label.
pub fn name_warning(object: &Value) -> Option<String> {
    let messages = names::dns1123_label(text(object, "/metadata/name"));
    (!messages.is_empty()).then(|| {
        format!(
            "metadata.name: this is used in Pod names and hostnames, which can result in surprising behavior; a DNS \
             label is recommended: [{}]",
            messages.join(" ")
        )
    })
}

/// Warnings about `spec.template`, which an update repeats only where it changed the spec.
pub fn template_warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let generation = |object: &Value| integer(object, "/metadata/generation");
    if old.is_some_and(|old| generation(old) == generation(new)) {
        return Vec::new();
    }
    warnings_spec(new.pointer("/spec/template"), &Path::new("spec").child("template"))
}

/// Warnings about the name of a new object and about its template.
pub fn named_warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let name = if old.is_none() { name_warning(new) } else { None };
    name.into_iter().chain(template_warnings(new, old)).collect()
}

/// The wide cells `Containers` and `Images` of the template at `pointer`.
pub fn template_cells(object: &Value, pointer: &str) -> [Value; 2] {
    let containers: Vec<Container> = object
        .pointer(&format!("{pointer}/spec/containers"))
        .and_then(|list| read(Some(list), &Path::new("spec")).ok())
        .unwrap_or_default();
    container_cells(&containers)
}
