//! Event of the core group.
//!
//! Upstream counterpart: pkg/apis/core/validation/events.go (legacyValidateEvent), pkg/registry/core/event.
use serde_json::Value;

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_label_name;
use crate::names;
use crate::object::{integer, text};
use crate::table;

fn is_set(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).is_some_and(|t| !t.is_null())
}

/// The rules of every version. `controller` is that version's name of the reporting controller's field.
pub fn validate_any_version(event: &Value, controller: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let own = text(event, "/metadata/namespace");
    let involved = match text(event, "/involvedObject/namespace") {
        "" => text(event, "/regarding/namespace"),
        namespace => namespace,
    };
    let timed = is_set(event, "/eventTime");
    let fits = match (involved.is_empty(), timed) {
        (true, false) => ["", "default"].contains(&own),
        (true, true) => ["default", "kube-system"].contains(&own),
        (false, false) => own == involved,
        (false, true) => true,
    };
    if !fits {
        let at = Path::new("involvedObject").child("namespace");
        errors.push(FieldError::invalid(&at, involved, "does not match event.namespace"));
    }
    if timed {
        let name = text(event, &format!("/{controller}"));
        if name.is_empty() {
            errors.push(FieldError::required(&Path::new(controller), ""));
        }
        errors.extend(validate_label_name(name, &Path::new(controller)));
        for key in ["reportingInstance", "action", "reason"] {
            let length = text(event, &format!("/{key}")).len();
            if length == 0 {
                errors.push(FieldError::required(&Path::new(key), ""));
            }
            if length > 128 {
                errors.push(FieldError::invalid(&Path::new(key), "", "can have at most 128 characters"));
            }
        }
        if text(event, "/message").len().max(text(event, "/note").len()) > 1024 {
            errors.push(FieldError::invalid(&Path::new("message"), "", "can have at most 1024 characters"));
        }
    }
    errors.extend(FieldError::invalid_each(&Path::new("namespace"), own, names::dns1123_subdomain(own)));
    errors
}

fn row(event: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let since = |pointer: &str| table::since(event.pointer(pointer), now);
    let first = if is_set(event, "/firstTimestamp") { since("/firstTimestamp") } else { since("/eventTime") };
    let mut last = if is_set(event, "/lastTimestamp") { since("/lastTimestamp") } else { first.clone() };
    let mut count = integer(event, "/count").max(1);
    if is_set(event, "/series") {
        last = since("/series/lastObservedTime");
        count = integer(event, "/series/count");
    }
    let kind = text(event, "/involvedObject/kind").to_lowercase();
    let target = match text(event, "/involvedObject/name") {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let either = |a: &str, b: &str| {
        let first = text(event, a);
        if first.is_empty() { text(event, b).to_string() } else { first.to_string() }
    };
    let (component, instance) =
        (either("/source/component", "/reportingComponent"), either("/source/host", "/reportingInstance"));
    let source = if instance.is_empty() { component } else { format!("{component}, {instance}") };
    vec![
        last.into(),
        text(event, "/type").into(),
        text(event, "/reason").into(),
        target.into(),
        text(event, "/involvedObject/fieldPath").into(),
        source.into(),
        text(event, "/message").trim().into(),
        first.into(),
        count.into(),
        table::name(event),
    ]
}

fn selectable(event: &Value) -> Vec<(&'static str, String)> {
    let reporter = text(event, "/reportingComponent");
    let component = text(event, "/source/component");
    vec![
        ("involvedObject.kind", text(event, "/involvedObject/kind").to_string()),
        ("involvedObject.namespace", text(event, "/involvedObject/namespace").to_string()),
        ("involvedObject.name", text(event, "/involvedObject/name").to_string()),
        ("involvedObject.uid", text(event, "/involvedObject/uid").to_string()),
        ("involvedObject.apiVersion", text(event, "/involvedObject/apiVersion").to_string()),
        ("involvedObject.resourceVersion", text(event, "/involvedObject/resourceVersion").to_string()),
        ("involvedObject.fieldPath", text(event, "/involvedObject/fieldPath").to_string()),
        ("reason", text(event, "/reason").to_string()),
        ("reportingComponent", reporter.to_string()),
        ("source", if component.is_empty() { reporter } else { component }.to_string()),
        ("type", text(event, "/type").to_string()),
    ]
}

pub const KIND: Kind = Kind {
    rest: Rest {
        validate: |event| validate_any_version(event, "reportingComponent"),
        validate_update: |event, _| validate_any_version(event, "reportingComponent"),
        ..Rest::ANY
    },
    create_on_update: true,
    columns: &[
        Column::string("Last Seen", "When it was last seen."),
        Column::string("Type", "Normal or Warning."),
        Column::string("Reason", "Why it happened, in a word."),
        Column::string("Object", "What it is about."),
        Column::string("Subobject", "What part of the object it is about.").wide(),
        Column::string("Source", "Who reports it.").wide(),
        Column::string("Message", "What happened."),
        Column::string("First Seen", "When it was first seen.").wide(),
        Column::string("Count", "How often it was seen.").wide(),
        Column::NAME.wide(),
    ],
    row,
    selectable,
    ..Kind::plain("", "v1", "Event")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let event = |ns: &str, involved: &str| json!({"metadata": {"namespace": ns}, "involvedObject": {"namespace": involved}});
        let cases = [("a", "a", 0), ("a", "b", 1), ("default", "", 0), ("a", "", 1)];
        for (ns, involved, want) in cases {
            let errors = (KIND.rest.validate)(&event(ns, involved));
            assert_eq!(errors.len(), want, "{ns} {involved} {errors:?}");
        }
        let mut timed = event("a", "a");
        timed["eventTime"] = "2024-01-01T00:00:00.000000Z".into();
        let errors: Vec<String> = (KIND.rest.validate)(&timed).iter().map(ToString::to_string).collect();
        assert!(errors.contains(&"reportingComponent: Required value".to_string()), "{errors:?}");
        assert!(errors.contains(&"action: Required value".to_string()), "{errors:?}");
    }
}
