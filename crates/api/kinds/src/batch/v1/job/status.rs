//! What a job's status may become.
//!
//! Upstream counterpart: validateJobStatus and ValidateJobStatusUpdate in pkg/apis/batch/validation, with the options of
//! getStatusValidationOptions in pkg/registry/batch/job. What stays true: a rule holds only where what it is about
//! changes, so that a status that is wrong already can still be updated.
use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::validation::{parse_indexes, parse_interval};
use super::{has_condition, is_true};
use crate::apps::v1::workload::nonnegative_keys;
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::FIELD_IMMUTABLE;
use crate::object::{count, integer, items, same_in, text, truth};

/// All that is wrong with a status update.
pub fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = Path::new("status");
    nonnegative_keys(
        new,
        "/status",
        &path,
        &["active", "succeeded", "failed", "ready", "terminating"],
        &mut errors,
    );
    validate_uncounted(new, &path.child("uncountedTerminatedPods"), &mut errors);
    validate_conditions(new, old, &path.child("conditions"), &mut errors);
    validate_times(new, old, &path, &mut errors);
    validate_finished(new, old, &path, &mut errors);
    validate_indexes(new, old, &path, &mut errors);
    validate_counters(new, old, &path, &mut errors);
    errors
}

fn changed(new: &Value, old: &Value, key: &str) -> bool {
    !same_in(new, old, &format!("/status/{key}"))
}

/// Whether the condition came or went.
fn turned(new: &Value, old: &Value, kind: &str) -> bool {
    is_true(new, kind) != is_true(old, kind)
}

fn is_finished(job: &Value) -> bool {
    is_true(job, "Complete") || is_true(job, "Failed")
}

fn validate_uncounted(new: &Value, path: &Path, errors: &mut ErrorList) {
    let mut seen = BTreeSet::new();
    for key in ["succeeded", "failed"] {
        let uids = items(new, &format!("/status/uncountedTerminatedPods/{key}"));
        for (i, uid) in uids.iter().filter_map(Value::as_str).enumerate() {
            let at = path.child(key).index(i);
            if uid.is_empty() {
                errors.push(FieldError::invalid(&at, "", "must not be empty"));
            } else if !seen.insert(uid) {
                errors.push(FieldError::duplicate(&at, uid));
            }
        }
    }
}

fn validate_conditions(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let mut refuse = |wrong: bool, detail: &str| {
        if wrong {
            errors.push(FieldError::invalid(path, Value::Null, detail));
        }
    };
    let is = |kind: &str| is_true(new, kind);
    let turned = |kind: &str| turned(new, old, kind);
    let (complete, failed) = (is("Complete"), is("Failed"));
    let (target, criteria) = (is("FailureTarget"), is("SuccessCriteriaMet"));
    refuse(
        (turned("Complete") || turned("Failed")) && complete && failed,
        "cannot set Complete=True and Failed=true conditions",
    );
    refuse(
        (turned("Complete") || turned("FailureTarget")) && complete && target,
        "cannot set Complete=True and FailureTarget=true conditions",
    );
    refuse(
        (turned("Failed") || changed(new, old, "failedIndexes")) && failed && !target,
        "cannot set Failed=True condition without the FailureTarget=true condition",
    );
    refuse(
        (turned("Complete") || turned("SuccessCriteriaMet")) && complete && !criteria,
        "cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
    );
    refuse(criteria && failed, "cannot set SuccessCriteriaMet=True and Failed=true conditions");
    refuse(criteria && target, "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions");
    refuse(
        new.pointer("/spec/successPolicy").is_some_and(|p| !p.is_null()) && complete && !criteria,
        "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True",
    );
    for kind in ["Failed", "Complete", "FailureTarget"] {
        let detail = format!("cannot disable the terminal {kind}=True condition");
        refuse(is_true(old, kind) && !is(kind), &detail);
    }
    let had = is_true(old, "SuccessCriteriaMet");
    refuse(had && !criteria, "cannot disable the SuccessCriteriaMet=True condition");
    refuse(
        is_true(old, "Complete") && !had && criteria,
        "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions",
    );
}

fn time(job: &Value, key: &str) -> Option<Timestamp> {
    text(job, &format!("/status/{key}")).parse().ok()
}

fn validate_times(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let (start, end, complete) =
        (time(new, "startTime"), time(new, "completionTime"), is_true(new, "Complete"));
    let shown = |key: &str| new.pointer(&format!("/status/{key}")).cloned().unwrap_or_default();
    let end_at = path.child("completionTime");
    let (start_moved, end_moved) = (start != time(old, "startTime"), end != time(old, "completionTime"));
    if turned(new, old, "Complete") || end_moved {
        if end.is_some() && !complete {
            let detail = "cannot set completionTime when there is no Complete=True condition";
            errors.push(FieldError::invalid(&end_at, shown("completionTime"), detail));
        }
        if end.is_none() && complete {
            errors.push(FieldError::required(&end_at, "completionTime is required for Complete jobs"));
        }
    }
    if (start_moved || end_moved) && start.zip(end).is_some_and(|(start, end)| end < start) {
        let detail = "must be equal to or after `startTime`";
        errors.push(FieldError::invalid(&end_at, shown("completionTime"), detail));
    }
    if end_moved && end.is_some() && time(old, "completionTime").is_some() {
        errors.push(FieldError::invalid(&end_at, shown("completionTime"), FIELD_IMMUTABLE));
    }
    let resuming = is_true(old, "Suspended") && has_condition(new, "Suspended", "False");
    if start_moved && !resuming && time(old, "startTime").is_some() && !truth(new, "/spec/suspend") {
        let detail = "field is immutable for unsuspended job once set";
        errors.push(FieldError::invalid(&path.child("startTime"), shown("startTime"), detail));
    }
}

fn validate_finished(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let finished = is_finished(new);
    let turned = finished != is_finished(old);
    let affected = |key: &str| finished && (turned || changed(new, old, key));
    let number = |key: &str| integer(new, &format!("/status/{key}"));
    if affected("active") && number("active") > 0 {
        let detail = "active>0 is invalid for finished job";
        errors.push(FieldError::invalid(&path.child("active"), number("active"), detail));
    }
    let nothing_to_do =
        truth(new, "/spec/suspend") && new.pointer("/spec/completions").and_then(Value::as_i64) == Some(0);
    if affected("startTime") && time(new, "startTime").is_none() && !nothing_to_do {
        errors.push(FieldError::required(&path.child("startTime"), "startTime is required for finished job"));
    }
    let uncounted =
        ["succeeded", "failed"].map(|k| count(new, &format!("/status/uncountedTerminatedPods/{k}")));
    if affected("uncountedTerminatedPods") && uncounted.iter().sum::<usize>() > 0 {
        let value = new.pointer("/status/uncountedTerminatedPods").cloned().unwrap_or_default();
        let at = path.child("uncountedTerminatedPods");
        errors.push(FieldError::invalid(&at, value, "must be empty for finished job"));
    }
    if affected("terminating") && number("terminating") > 0 {
        let detail = "terminating>0 is invalid for finished job";
        errors.push(FieldError::invalid(&path.child("terminating"), number("terminating"), detail));
    }
    if (changed(new, old, "ready") || changed(new, old, "active")) && number("ready") > number("active") {
        let detail = "cannot set more ready pods than active";
        errors.push(FieldError::invalid(&path.child("ready"), number("ready"), detail));
    }
}

fn validate_indexes(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let completions = new.pointer("/spec/completions").and_then(Value::as_i64);
    let completed = text(new, "/status/completedIndexes");
    let failed = new.pointer("/status/failedIndexes").and_then(Value::as_str);
    let per_index = new.pointer("/spec/backoffLimitPerIndex").is_some_and(|l| !l.is_null());
    let completed_changed = completed != text(old, "/status/completedIndexes");
    let failed_changed = failed != old.pointer("/status/failedIndexes").and_then(Value::as_str);
    let mut refuse = |key: &str, value: &str, detail: String| {
        errors.push(FieldError::invalid(&path.child(key), value, detail));
    };
    if completed_changed {
        if let Some(Err(error)) = completions.map(|c| parse_indexes(completed, c)) {
            refuse("completedIndexes", completed, format!("error parsing completedIndexes: {error}"));
        }
        if !completed.is_empty() && text(new, "/spec/completionMode") != "Indexed" {
            let detail = "cannot set non-empty completedIndexes when non-indexed completion mode";
            refuse("completedIndexes", completed, detail.to_string());
        }
    }
    let Some(failed) = failed else { return };
    if failed_changed {
        if !per_index {
            let detail = "cannot set non-null failedIndexes when backoffLimitPerIndex is null";
            refuse("failedIndexes", failed, detail.to_string());
        } else if let Some(Err(error)) = completions.map(|c| parse_indexes(failed, c)) {
            refuse("failedIndexes", failed, format!("error parsing failedIndexes: {error}"));
        }
    }
    if (failed_changed || completed_changed)
        && let Some(index) = completions.and_then(|c| overlap(completed, failed, c))
    {
        let detail = format!("failedIndexes and completedIndexes overlap at index: {index}");
        refuse("failedIndexes", failed, detail);
    }
}

/// The first index that is in both; malformed intervals are left out, they are refused elsewhere.
fn overlap(completed: &str, failed: &str, completions: i64) -> Option<i64> {
    let intervals = |text: &str| -> Vec<(i64, i64)> {
        text.split(',').filter_map(|part| parse_interval(part, completions).ok()).collect()
    };
    let (completed, failed) = (intervals(completed), intervals(failed));
    let (mut c, mut f) = (completed.iter().peekable(), failed.iter().peekable());
    while let (Some((c_first, c_last)), Some((f_first, f_last))) = (c.peek(), f.peek()) {
        if c_first <= f_last && f_first <= c_last {
            return Some(*c_first.max(f_first));
        }
        if c_first <= f_first {
            c.next()
        } else {
            f.next()
        };
    }
    None
}

fn validate_counters(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let decreased = |key: &str| {
        let of = |job: &Value| integer(job, &format!("/status/{key}"));
        (of(new) < of(old)).then(|| of(new))
    };
    if let Some(failed) = decreased("failed") {
        let detail = "cannot decrease the failed counter";
        errors.push(FieldError::invalid(&path.child("failed"), failed, detail));
    }
    // An indexed job whose parallelism follows its completions can shrink, and its successes with it.
    let elastic = text(new, "/spec/completionMode") == "Indexed"
        && new.pointer("/spec/completions") == new.pointer("/spec/parallelism");
    if let Some(succeeded) = decreased("succeeded").filter(|_| !elastic) {
        let detail = "cannot decrease the succeeded counter";
        errors.push(FieldError::invalid(&path.child("succeeded"), succeeded, detail));
    }
}
