//! Event of the group events.k8s.io, which is stored as the core group's.
//!
//! Upstream counterpart: ValidateEventCreate and ValidateEventUpdate in pkg/apis/core/validation/events.go. What stays
//! true: creating and changing events through this version is stricter than through the core group's.
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::core::v1::event;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, Rest};
use crate::object::{is_unset, same_in, text};

const CONTROLLER: &str = "reportingController";

fn validate(object: &Value) -> ErrorList {
    let mut errors = event::validate_any_version(object, CONTROLLER);
    validate_series(object, &mut errors);
    if is_unset(object.get("eventTime")) {
        errors.push(FieldError::required(&Path::new("eventTime"), ""));
    }
    let kind = text(object, "/type");
    if !["Normal", "Warning"].contains(&kind) {
        let detail = format!("has invalid value: {kind}");
        errors.push(FieldError::invalid(&Path::new("type"), "", detail));
    }
    let unset = [
        ("deprecatedFirstTimestamp", "firstTimestamp"),
        ("deprecatedLastTimestamp", "lastTimestamp"),
        ("deprecatedCount", "count"),
    ];
    for (_, shown) in unset.iter().filter(|(key, _)| !is_unset(object.get(key))) {
        errors.push(FieldError::invalid(&Path::new(shown), "", "needs to be unset"));
    }
    let source = |key: &str| text(object, &format!("/deprecatedSource/{key}"));
    if !source("component").is_empty() || !source("host").is_empty() {
        errors.push(FieldError::invalid(&Path::new("source"), "", "needs to be unset"));
    }
    errors
}

fn validate_series(object: &Value, errors: &mut ErrorList) {
    let Some(series) = object.get("series").filter(|s| !s.is_null()) else { return };
    if series.get("count").and_then(Value::as_i64).unwrap_or_default() < 2 {
        errors.push(FieldError::invalid(&Path::new("series.count"), "", "should be at least 2"));
    }
    if is_unset(series.get("lastObservedTime")) {
        errors.push(FieldError::required(&Path::new("series.lastObservedTime"), ""));
    }
}

/// To the microsecond; clients may write more digits.
fn micros(object: &Value) -> Option<i64> {
    text(object, "/eventTime").parse::<jiff::Timestamp>().ok().map(|t| t.as_microsecond())
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = event::validate_any_version(new, CONTROLLER);
    if !same_in(new, old, "/series") {
        validate_series(new, &mut errors);
    }
    // The fields, and the core group's names, which the messages have.
    let fixed = [
        ("regarding", "involvedObject"),
        ("reason", "reason"),
        ("note", "message"),
        ("deprecatedSource", "source"),
        ("deprecatedFirstTimestamp", "firstTimestamp"),
        ("deprecatedLastTimestamp", "lastTimestamp"),
        ("deprecatedCount", "count"),
        ("type", "type"),
        ("eventTime", "eventTime"),
        ("action", "action"),
        ("related", "related"),
        (CONTROLLER, CONTROLLER),
        ("reportingInstance", "reportingInstance"),
    ];
    for (key, shown) in fixed {
        if key != "eventTime" || micros(new) != micros(old) {
            immutable(new, old, &format!("/{key}"), &Path::new(shown), &mut errors);
        }
    }
    errors
}

/// The object under the core group's field names, for the columns that both share.
fn as_core(object: &Value) -> Value {
    let mut core = object.clone();
    let renamed = [
        ("regarding", "involvedObject"),
        ("note", "message"),
        (CONTROLLER, "reportingComponent"),
        ("deprecatedSource", "source"),
        ("deprecatedFirstTimestamp", "firstTimestamp"),
        ("deprecatedLastTimestamp", "lastTimestamp"),
        ("deprecatedCount", "count"),
    ];
    for (key, name) in renamed {
        if let Some(value) = object.get(key) {
            core[name] = value.clone();
        }
    }
    core
}

pub const KIND: Kind = Kind {
    rest: Rest { validate, validate_update, ..Rest::ANY },
    create_on_update: true,
    columns: event::KIND.columns,
    row: |object, now| (event::KIND.row)(&as_core(object), now),
    selectable: |object| {
        let of = |pointer: &str| text(object, pointer).to_string();
        vec![
            ("regarding.kind", of("/regarding/kind")),
            ("regarding.namespace", of("/regarding/namespace")),
            ("regarding.name", of("/regarding/name")),
            ("regarding.uid", of("/regarding/uid")),
            ("regarding.apiVersion", of("/regarding/apiVersion")),
            ("regarding.resourceVersion", of("/regarding/resourceVersion")),
            ("regarding.fieldPath", of("/regarding/fieldPath")),
            ("reason", of("/reason")),
            (CONTROLLER, of("/reportingController")),
            ("type", of("/type")),
        ]
    },
    ..Kind::plain("events.k8s.io", "v1", "Event")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stricter_than_core() {
        let event = json!({
            "metadata": {"namespace": "a"}, "regarding": {"namespace": "a"}, "eventTime": "2024-01-01T00:00:00.000001Z",
            "reportingController": "c", "reportingInstance": "i", "action": "a", "reason": "r", "type": "Normal"
        });
        let texts = |errors: ErrorList| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(validate(&event)), Vec::<String>::new());
        let mut wrong = event.clone();
        wrong["type"] = "x".into();
        wrong["deprecatedCount"] = 1.into();
        wrong["series"] = json!({"count": 1});
        assert_eq!(
            texts(validate(&wrong)),
            [
                "series.count: Invalid value: \"\": should be at least 2",
                "series.lastObservedTime: Required value",
                "type: Invalid value: \"\": has invalid value: x",
                "count: Invalid value: \"\": needs to be unset",
            ]
        );
        let mut new = event.clone();
        new["eventTime"] = "2024-01-01T00:00:00.0000011Z".into();
        assert_eq!(texts(validate_update(&new, &event)), Vec::<String>::new());
        new["note"] = "other".into();
        assert_eq!(
            texts(validate_update(&new, &event)),
            ["message: Invalid value: \"other\": field is immutable"]
        );
    }
}
