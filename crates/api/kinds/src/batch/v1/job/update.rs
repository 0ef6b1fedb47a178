//! What of a job may change.
//!
//! Upstream counterpart: ValidateJobSpecUpdate in pkg/apis/batch/validation and shouldAllowMutablePodTemplate in
//! pkg/registry/batch/job. Deliberately different: what is wrong with the new spec is said once, not twice.
use serde_json::Value;

use super::{CONTROLLER_UID_LABELS, JOB_NAME_LABELS, is_true, validation};
use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::FIELD_IMMUTABLE;
use crate::object::{child, integer, items, items_mut, keep, same, same_in, text, truth};

/// All that is wrong with an update.
pub fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let path = Path::new("spec");
    let labels = old.pointer("/spec/template/metadata/labels");
    let had = |label: &str| labels.is_some_and(|l| l.get(label).is_some());
    let mut errors = validation::validate(new, had(JOB_NAME_LABELS[1]) && had(CONTROLLER_UID_LABELS[1]));
    validate_completions(new, old, &path, &mut errors);
    immutable(new, old, "/spec/selector", &path.child("selector"), &mut errors);
    validate_template(new, old, &path, &mut errors);
    let fixed = ["completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"];
    for key in fixed {
        immutable(new, old, &format!("/spec/{key}"), &path.child(key), &mut errors);
    }
    errors
}

/// Only an indexed job can grow or shrink, and then its parallelism with it.
fn validate_completions(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let at = path.child("completions");
    if text(new, "/spec/completionMode") != "Indexed" {
        return immutable(new, old, "/spec/completions", &at, errors);
    }
    let completions = new.pointer("/spec/completions").and_then(Value::as_i64);
    if let Some(completions) = completions.filter(|_| !same_in(new, old, "/spec/completions"))
        && completions != integer(new, "/spec/parallelism")
    {
        let detail = "can only be modified in tandem with spec.parallelism";
        errors.push(FieldError::invalid(&at, completions, detail));
    }
}

/// A job that is suspended and has no pods may still get other resources and another place to run.
fn is_template_mutable(old: &Value) -> bool {
    let not_started = old.pointer("/status/startTime").is_none_or(Value::is_null);
    truth(old, "/spec/suspend")
        && (not_started || is_true(old, "Suspended"))
        && integer(old, "/status/active") == 0
}

fn validate_template(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    if !is_template_mutable(old) {
        return immutable(new, old, "/spec/template", &path.child("template"), errors);
    }
    let new = new.pointer("/spec/template/spec").cloned().unwrap_or_default();
    let mut old = old.pointer("/spec/template/spec").cloned().unwrap_or_default();
    let affinity = new.get("affinity").cloned().unwrap_or_default();
    keep(child(&mut old, "affinity"), &affinity, "nodeAffinity");
    ["nodeSelector", "tolerations", "schedulingGates"].iter().for_each(|key| keep(&mut old, &new, key));
    for list in ["/containers", "/initContainers"] {
        let containers = items(&new, list);
        if items(&old, list).len() == containers.len() {
            for (old, new) in items_mut(&mut old, list).iter_mut().zip(containers) {
                if text(old, "/name") == text(new, "/name") {
                    keep(old, new, "resources");
                }
            }
        }
    }
    if !same(Some(&new), Some(&old)) {
        errors.push(FieldError::invalid(&path.child("template.spec"), new, FIELD_IMMUTABLE));
    }
}
