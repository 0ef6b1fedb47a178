//! LimitRange.
//!
//! Upstream counterpart: pkg/registry/core/limitrange, ValidateLimitRange in validation.go.
use serde_json::Value;

use super::pod_spec::resources::{validate_container_resource_name, validate_resource_name};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, Rest};
use crate::object::{child, default_absent, entries, items, items_mut, text};
use crate::quantity::{Amount, parse, round_up_to_milli};

const LISTS: &[&str] = &["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"];

fn defaults(object: &mut Value) {
    for item in items_mut(object, "/spec/limits") {
        if text(item, "/type") == "Container" {
            for (from, to) in [("max", "default"), ("default", "defaultRequest"), ("min", "defaultRequest")] {
                let source = item.get(from).and_then(Value::as_object).cloned().unwrap_or_default();
                let target = child(item, to);
                source.into_iter().for_each(|(name, value)| default_absent(target, &name, value));
            }
            child(item, "defaultRequest");
        }
        LISTS.iter().for_each(|list| round_up_to_milli(item.get_mut(*list)));
    }
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let limits = items(object, "/spec/limits");
    for (i, item) in limits.iter().enumerate() {
        let path = Path::new("spec").child("limits").index(i);
        let (kind, at) = (text(item, "/type"), path.child("type"));
        errors.extend(crate::meta::validate_label_name(kind, &at));
        if !kind.contains('/')
            && !["Pod", "Container", "PersistentVolumeClaim"].contains(&kind)
            && !kind.is_empty()
        {
            let detail = "must be a standard limit type or fully qualified";
            errors.push(FieldError::invalid(&at, kind, detail));
        }
        if limits[..i].iter().any(|other| text(other, "/type") == kind) {
            errors.push(FieldError::duplicate(&at, kind));
        }
        for list in LISTS {
            let at = path.child(list);
            if kind == "Pod" && list.starts_with("default") {
                if entries(item, &format!("/{list}")).next().is_some() {
                    errors.push(FieldError::forbidden(&at, "may not be specified when `type` is 'Pod'"));
                }
                continue;
            }
            for (name, _) in entries(item, &format!("/{list}")) {
                match kind {
                    "Pod" | "Container" => validate_container_resource_name(name, &at.key(name), &mut errors),
                    _ => drop(validate_resource_name(name, &at.key(name), &mut errors)),
                }
            }
        }
        let storage = |list: &str| item.get(list).is_some_and(|l| l.get("storage").is_some());
        if kind == "PersistentVolumeClaim" && !storage("min") && !storage("max") {
            let detail = "either minimum or maximum storage value is required, but neither was provided";
            errors.push(FieldError::required(&path.child("limits"), detail));
        }
        compare(item, &path, &mut errors);
    }
    errors
}

/// min ≤ default request ≤ default ≤ max, and a ratio of at least 1.
fn compare(item: &Value, path: &Path, errors: &mut ErrorList) {
    let pairs = [
        ("min", "max", "min", "min value", "max value"),
        ("min", "defaultRequest", "defaultRequest", "min value", "default request value"),
        ("defaultRequest", "max", "defaultRequest", "default request value", "max value"),
        ("defaultRequest", "default", "defaultRequest", "default request value", "default limit value"),
        ("min", "default", "default", "min value", "default value"),
        ("default", "max", "default", "default value", "max value"),
    ];
    for (low, high, at, low_name, high_name) in pairs {
        for (name, low) in entries(item, &format!("/{low}")) {
            let Some(high) = item.get(high).and_then(|h| h.get(name)) else { continue };
            let (low, high) = (low.as_str().unwrap_or_default(), high.as_str().unwrap_or_default());
            if parse(low).map(|q| q.0) > parse(high).map(|q| q.0) {
                let detail = format!("{low_name} {low} is greater than {high_name} {high}");
                let value = text(item, &format!("/{at}/{}", name.replace('/', "~1")));
                errors.push(FieldError::invalid(&path.child(at).key(name), value, detail));
            }
        }
    }
    for (name, ratio) in entries(item, "/maxLimitRequestRatio") {
        let ratio = ratio.as_str().unwrap_or_default();
        if parse(ratio).is_some_and(|(ratio, _)| ratio < Amount::ONE) {
            let at = path.child("maxLimitRequestRatio").key(name);
            errors.push(FieldError::invalid(&at, ratio, format!("ratio {ratio} is less than 1")));
        }
    }
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest { validate, validate_update: |new, _| validate(new), ..Rest::ANY },
    create_on_update: true,
    ..Kind::plain("", "v1", "LimitRange")
};
