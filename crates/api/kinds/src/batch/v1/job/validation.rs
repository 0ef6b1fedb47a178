//! What a job's spec has to be, alone and in a CronJob's template.
//!
//! Upstream counterpart: validateJobSpec and what it calls in pkg/apis/batch/validation.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::batch::v1::{
    PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use serde_json::{Value, json};

use super::{CONTROLLER_UID_LABELS, JOB_NAME_LABELS};
use crate::apps::v1::workload::{Parts, nonnegative_keys, parts};
use crate::field::{ErrorList, FieldError, Path, go_quote};
use crate::label_selector::{is_valid, matches};
use crate::meta::{validate_label_name, validate_label_selector};
use crate::names;
use crate::object::{items, or_empty, read, text, truth};

const INDEXED_MAX: i64 = 100_000;
const HIGH_COMPLETIONS_MAX: i64 = 10_000;
const RULES_MAX: usize = 20;
const EXIT_CODES_MAX: usize = 255;
const PATTERNS_MAX: usize = 20;
const MANAGED_BY_MAX: usize = 63;
const SUCCEEDED_INDEXES_MAX: usize = 64 * 1024;

/// All that is wrong with a job. `prefixed` is false for stored jobs from before the prefixed labels.
pub fn validate(job: &Value, prefixed: bool) -> ErrorList {
    let path = Path::new("spec");
    let parts = match parts(job, "/spec") {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    validate_generated_selector(job, &parts, prefixed, &mut errors);
    validate_spec(job, "/spec", &path, &mut errors);
    match &parts.selector {
        None => errors.push(FieldError::required(&path.child("selector"), "")),
        selector => errors.extend(validate_label_selector(selector.as_ref(), &path.child("selector"))),
    }
    if is_valid(parts.selector.as_ref()) {
        parts.require_match(&path, &mut errors);
    }
    let (name, completions) = (text(job, "/metadata/name"), number(job, "/spec", "completions"));
    if text(job, "/spec/completionMode") == "Indexed"
        && let Some(completions) = completions.filter(|c| *c > 0)
    {
        // The controller makes hostnames from the name and the index.
        let longest = format!("{name}-{}", completions - 1);
        if !names::dns1123_label(&longest).is_empty() {
            let detail = format!("will not able to create pod with invalid DNS label: {longest}");
            errors.push(FieldError::invalid(&Path::new("metadata").child("name"), name, detail));
        }
    }
    errors
}

fn validate_generated_selector(job: &Value, parts: &Parts, prefixed: bool, errors: &mut ErrorList) {
    if truth(job, "/spec/manualSelector") || parts.selector.is_none() {
        return;
    }
    let (name, uid) = (text(job, "/metadata/name"), text(job, "/metadata/uid"));
    if uid.is_empty() {
        errors.push(FieldError::required(&Path::new("metadata").child("uid"), ""));
    }
    let labels = parts.template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    let at = Path::new("spec").child("template").child("metadata").child("labels");
    let mut expected = BTreeMap::new();
    for i in 0..if prefixed { 2 } else { 1 } {
        for (key, value) in [(CONTROLLER_UID_LABELS[i], uid), (JOB_NAME_LABELS[i], name)] {
            expected.insert(key.to_string(), value.to_string());
            let detail = format!("must be '{value}'");
            match labels.get(key) {
                None => errors.push(FieldError::required(&at.key(key), detail)),
                Some(actual) if actual != value => {
                    errors.push(FieldError::invalid(&at.key(key), json!(labels), detail));
                }
                Some(_) => {}
            }
        }
    }
    if is_valid(parts.selector.as_ref()) && !matches(parts.selector.as_ref(), &expected) {
        let at = Path::new("spec").child("selector");
        errors.push(FieldError::invalid(&at, json!(parts.selector), "`selector` not auto-generated"));
    }
}

fn number(object: &Value, pointer: &str, key: &str) -> Option<i64> {
    object.pointer(&format!("{pointer}/{key}")).and_then(Value::as_i64)
}

/// All that is wrong with the job's spec at `pointer`, besides its selector.
pub fn validate_spec(object: &Value, pointer: &str, path: &Path, errors: &mut ErrorList) {
    let parts = match parts(object, pointer) {
        Ok(parts) => parts,
        Err(error) => return errors.push(error),
    };
    let keys = [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ];
    nonnegative_keys(object, pointer, path, &keys, errors);
    let has = |key: &str| object.pointer(&format!("{pointer}/{key}")).is_some_and(|v| !v.is_null());
    if has("maxFailedIndexes") && !has("backoffLimitPerIndex") {
        let detail = "when maxFailedIndexes is specified";
        errors.push(FieldError::required(&path.child("backoffLimitPerIndex"), detail));
    }
    if let Some(managed_by) = object.pointer(&format!("{pointer}/managedBy")).and_then(Value::as_str) {
        domain_prefixed_path(managed_by, &path.child("managedBy"), errors);
        if managed_by.len() > MANAGED_BY_MAX {
            errors.push(FieldError::too_long(&path.child("managedBy"), MANAGED_BY_MAX));
        }
    }
    validate_completion_mode(object, pointer, path, errors);
    let failure_policy = has("podFailurePolicy");
    if failure_policy {
        let at = path.child("podFailurePolicy").child("rules");
        let rules = items(object, &format!("{pointer}/podFailurePolicy/rules"));
        if rules.len() > RULES_MAX {
            errors.push(FieldError::too_many(&at, rules.len(), RULES_MAX));
        }
        for (i, rule) in rules.iter().enumerate() {
            match read(Some(rule), &at.index(i)) {
                Ok(rule) => {
                    validate_failure_rule(&rule, &parts, has("backoffLimitPerIndex"), &at.index(i), errors);
                }
                Err(error) => errors.push(error),
            }
        }
    }
    if has("successPolicy") {
        validate_success_policy(object, pointer, &path.child("successPolicy"), errors);
    }
    let at = path.child("podReplacementPolicy");
    let policy = object.pointer(&format!("{pointer}/podReplacementPolicy")).and_then(Value::as_str);
    let supported: &[&str] = if failure_policy { &["Failed"] } else { &["Failed", "TerminatingOrFailed"] };
    if let Some(policy) = policy.filter(|p| !supported.contains(p)) {
        errors.push(FieldError::not_supported(&at, policy, supported));
    }
    parts.validate_template(path, errors);
    validate_restart_policy(&parts, failure_policy, path, errors);
}

fn validate_restart_policy(parts: &Parts, failure_policy: bool, path: &Path, errors: &mut ErrorList) {
    let at = path.child("template").child("spec").child("restartPolicy");
    match parts.template.spec.as_ref().map(|s| or_empty(&s.restart_policy)).unwrap_or_default() {
        "" | "Always" => {
            errors.push(FieldError::required(&at, "valid values: \"OnFailure\", \"Never\""));
        }
        "OnFailure" if failure_policy => {
            let detail = "only \"Never\" is supported when podFailurePolicy is specified";
            errors.push(FieldError::invalid(&at, "OnFailure", detail));
        }
        "OnFailure" | "Never" => {}
        other => errors.push(FieldError::not_supported(&at, other, &["OnFailure", "Never"])),
    }
}

fn validate_completion_mode(object: &Value, pointer: &str, path: &Path, errors: &mut ErrorList) {
    let of = |key: &str| number(object, pointer, key);
    let (completions, parallelism) = (of("completions"), of("parallelism"));
    let (per_index, failed) = (of("backoffLimitPerIndex"), of("maxFailedIndexes"));
    let mut refuse = |key: &str, value: Option<i64>, detail: String| {
        if let Some(value) = value {
            errors.push(FieldError::invalid(&path.child(key), value, detail));
        }
    };
    match text(object, &format!("{pointer}/completionMode")) {
        "Indexed" => {
            let detail =
                format!("must be less than or equal to {INDEXED_MAX} when completion mode is Indexed");
            refuse("parallelism", parallelism.filter(|p| *p > INDEXED_MAX), detail);
            let above = failed.filter(|f| completions.is_some_and(|c| *f > c));
            refuse("maxFailedIndexes", above, "must be less than or equal to completions".to_string());
            let detail = format!("must be less than or equal to {INDEXED_MAX}");
            refuse("maxFailedIndexes", failed.filter(|f| *f > INDEXED_MAX), detail);
            if per_index.is_some() && completions.is_some_and(|c| c > INDEXED_MAX) {
                let detail = format!(
                    "must be less than or equal to {HIGH_COMPLETIONS_MAX} when completions are above {INDEXED_MAX} and \
                     used with backoff limit per index"
                );
                refuse("parallelism", parallelism.filter(|p| *p > HIGH_COMPLETIONS_MAX), detail.clone());
                refuse("maxFailedIndexes", failed.filter(|f| *f > HIGH_COMPLETIONS_MAX), detail);
                if failed.is_none() {
                    let detail = format!("must be specified when completions is above {INDEXED_MAX}");
                    errors.push(FieldError::required(&path.child("maxFailedIndexes"), detail));
                }
            }
            if completions.is_none() {
                let detail = "when completion mode is Indexed";
                errors.push(FieldError::required(&path.child("completions"), detail));
            }
        }
        "" | "NonIndexed" => {
            refuse("backoffLimitPerIndex", per_index, "requires indexed completion mode".to_string());
            refuse("maxFailedIndexes", failed, "requires indexed completion mode".to_string());
        }
        other => {
            let at = path.child("completionMode");
            errors.push(FieldError::not_supported(&at, other, &["Indexed", "NonIndexed"]));
        }
    }
}

/// `acme.io/foo`.
pub fn domain_prefixed_path(value: &str, path: &Path, errors: &mut ErrorList) {
    if value.is_empty() {
        return errors.push(FieldError::required(path, ""));
    }
    let Some((host, rest)) = value.split_once('/').filter(|(h, r)| !h.is_empty() && !r.is_empty()) else {
        let detail = "must be a domain-prefixed path (such as \"acme.io/foo\")";
        return errors.push(FieldError::invalid(path, value, detail));
    };
    errors.extend(FieldError::invalid_each(path, host, names::dns1123_subdomain(host)));
    if !rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&b)) {
        let detail = names::regex_error("Invalid path", r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+", &[]);
        errors.push(FieldError::invalid(path, rest, detail));
    }
}

fn validate_failure_rule(
    rule: &PodFailurePolicyRule,
    parts: &Parts,
    per_index: bool,
    path: &Path,
    errors: &mut ErrorList,
) {
    const ACTIONS: [&str; 4] = ["Count", "FailIndex", "FailJob", "Ignore"];
    let at = path.child("action");
    match rule.action.as_str() {
        "" => errors.push(FieldError::required(&at, valid_values(&ACTIONS))),
        "FailIndex" if !per_index => {
            let detail = "requires the backoffLimitPerIndex to be set";
            errors.push(FieldError::invalid(&at, "FailIndex", detail));
        }
        action if ACTIONS.contains(&action) => {}
        action => errors.push(FieldError::not_supported(&at, action, &ACTIONS)),
    }
    let patterns = rule.on_pod_conditions.as_deref().unwrap_or_default();
    if let Some(exit_codes) = &rule.on_exit_codes {
        let spec = parts.template.spec.as_ref();
        let containers =
            spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
        let names: BTreeSet<&str> = containers.map(|c| c.name.as_str()).collect();
        validate_exit_codes(exit_codes, &names, &path.child("onExitCodes"), errors);
    }
    validate_patterns(patterns, &path.child("onPodConditions"), errors);
    let detail = match (rule.on_exit_codes.is_some(), !patterns.is_empty()) {
        (true, true) => "specifying both OnExitCodes and OnPodConditions is not supported",
        (false, false) => "specifying one of OnExitCodes and OnPodConditions is required",
        _ => return,
    };
    errors.push(FieldError::invalid(path, Value::Null, detail));
}

fn valid_values(values: &[&str]) -> String {
    let quoted: Vec<String> = values.iter().map(|v| go_quote(v)).collect();
    format!("valid values: [{}]", quoted.join(" "))
}

fn validate_patterns(
    patterns: &[PodFailurePolicyOnPodConditionsPattern],
    path: &Path,
    errors: &mut ErrorList,
) {
    const STATUSES: [&str; 3] = ["False", "True", "Unknown"];
    if patterns.len() > PATTERNS_MAX {
        errors.push(FieldError::too_many(path, patterns.len(), PATTERNS_MAX));
    }
    for (i, pattern) in patterns.iter().enumerate() {
        let at = path.index(i);
        errors.extend(validate_label_name(&pattern.type_, &at.child("type")));
        let status = serde_json::to_value(pattern).unwrap_or_default();
        let status = text(&status, "/status");
        if status.is_empty() {
            errors.push(FieldError::required(&at.child("status"), valid_values(&STATUSES)));
        } else if !STATUSES.contains(&status) {
            errors.push(FieldError::not_supported(&at.child("status"), status, &STATUSES));
        }
    }
}

fn validate_exit_codes(
    codes: &PodFailurePolicyOnExitCodesRequirement,
    containers: &BTreeSet<&str>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let at = path.child("operator");
    match codes.operator.as_str() {
        "" => errors.push(FieldError::required(&at, valid_values(&["In", "NotIn"]))),
        "In" | "NotIn" => {}
        other => errors.push(FieldError::not_supported(&at, other, &["In", "NotIn"])),
    }
    if let Some(name) = codes.container_name.as_deref().filter(|name| !containers.contains(name)) {
        let detail = "must be one of the container or initContainer names in the pod template";
        errors.push(FieldError::invalid(&path.child("containerName"), name, detail));
    }
    let (at, values) = (path.child("values"), codes.values.as_slice());
    if values.is_empty() {
        errors.push(FieldError::invalid(&at, json!(values), "at least one value is required"));
    } else if values.len() > EXIT_CODES_MAX {
        errors.push(FieldError::too_many(&at, values.len(), EXIT_CODES_MAX));
    }
    let mut seen = BTreeSet::new();
    for (i, value) in values.iter().enumerate() {
        if codes.operator == "In" && *value == 0 {
            errors.push(FieldError::invalid(&at.index(i), 0, "must not be 0 for the In operator"));
        }
        if !seen.insert(value) {
            errors.push(FieldError::duplicate(&at.index(i), *value));
        }
    }
    if !values.is_sorted() {
        errors.push(FieldError::invalid(&at, json!(values), "must be ordered"));
    }
}

fn validate_success_policy(object: &Value, pointer: &str, path: &Path, errors: &mut ErrorList) {
    let policy = object.pointer(&format!("{pointer}/successPolicy")).cloned().unwrap_or_default();
    if text(object, &format!("{pointer}/completionMode")) != "Indexed" {
        return errors.push(FieldError::invalid(path, policy, "requires indexed completion mode"));
    }
    let completions = number(object, pointer, "completions").unwrap_or_default();
    let (at, rules) = (path.child("rules"), items(&policy, "/rules"));
    if rules.is_empty() {
        let detail = "at least one rules must be specified when the successPolicy is specified";
        errors.push(FieldError::required(&at, detail));
    }
    if rules.len() > RULES_MAX {
        errors.push(FieldError::too_many(&at, rules.len(), RULES_MAX));
    }
    for (i, rule) in rules.iter().enumerate() {
        validate_success_rule(rule, completions, &at.index(i), errors);
    }
}

fn validate_success_rule(rule: &Value, completions: i64, path: &Path, errors: &mut ErrorList) {
    let indexes = rule.get("succeededIndexes").and_then(Value::as_str);
    let wanted = rule.get("succeededCount").and_then(Value::as_i64);
    if indexes.is_none() && wanted.is_none() {
        let detail = "at least one of succeededCount or succeededIndexes must be specified";
        errors.push(FieldError::required(path, detail));
    }
    let mut total = 0;
    if let Some(indexes) = indexes {
        let at = path.child("succeededIndexes");
        if indexes.len() > SUCCEEDED_INDEXES_MAX {
            errors.push(FieldError::too_long(&at, SUCCEEDED_INDEXES_MAX));
        }
        match parse_indexes(indexes, completions) {
            Ok(intervals) => total = intervals.iter().map(|(first, last)| last - first + 1).sum(),
            Err(error) => {
                let detail = format!("error parsing succeededIndexes: {error}");
                errors.push(FieldError::invalid(&at, indexes, detail));
            }
        }
    }
    if let Some(wanted) = wanted {
        let at = path.child("succeededCount");
        crate::meta::nonnegative(wanted, &at, errors);
        if wanted > completions {
            let detail =
                format!("must be less than or equal to {completions} (the number of specified completions)");
            errors.push(FieldError::invalid(&at, wanted, detail));
        }
        if indexes.is_some() && wanted > total {
            let detail = format!(
                "must be less than or equal to {total} (the number of indexes in the specified succeededIndexes field)"
            );
            errors.push(FieldError::invalid(&at, wanted, detail));
        }
    }
}

/// The intervals of a text such as `0-2,5`, each index below `completions`, growing.
pub fn parse_indexes(text: &str, completions: i64) -> Result<Vec<(i64, i64)>, String> {
    let mut intervals: Vec<(i64, i64)> = Vec::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (first, last) = parse_interval(part, completions)?;
        if let Some((_, previous)) = intervals.last().filter(|(_, previous)| *previous >= first) {
            return Err(format!("non-increasing order, previous: {previous}, current: {first}"));
        }
        intervals.push((first, last));
    }
    Ok(intervals)
}

/// One interval: `3` or `3-5`.
pub fn parse_interval(text: &str, completions: i64) -> Result<(i64, i64), String> {
    let index = |part: &str| -> Result<i64, String> {
        let quoted = go_quote(part);
        let index: i64 =
            part.parse().map_err(|_| format!("cannot convert string to integer for index: {quoted}"))?;
        if index >= completions { Err(format!("too large index: {quoted}")) } else { Ok(index) }
    };
    let parts: Vec<&str> = text.split('-').collect();
    match parts.as_slice() {
        [only] => index(only).map(|index| (index, index)),
        [first, last] => {
            let (first, last) = (index(first)?, index(last)?);
            if first >= last {
                return Err(format!("non-increasing order, previous: {first}, current: {last}"));
            }
            Ok((first, last))
        }
        _ => Err(format!(
            "the fragment {} violates the requirement that an index interval can have at most two parts separated by '-'",
            go_quote(text)
        )),
    }
}
