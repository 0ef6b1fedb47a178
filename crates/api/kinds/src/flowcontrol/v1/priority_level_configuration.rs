//! PriorityLevelConfiguration.
//!
//! Upstream counterpart: pkg/registry/flowcontrol/prioritylevelconfiguration, pkg/apis/flowcontrol. Left out: the
//! numbers of queues and hands, and the checks of the mandatory objects.
use serde_json::{Value, json};

use crate::apps::v1::workload::nonnegative_keys;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{bump_generation, default_absent, default_zero, keep, same_in, set_generation, text};
use crate::table;

fn defaults(object: &mut Value) {
    for (key, shares) in [("exempt", 0), ("limited", 30)] {
        if let Some(part) = object.pointer_mut(&format!("/spec/{key}")).filter(|p| p.is_object()) {
            default_absent(part, "nominalConcurrencyShares", shares);
            default_absent(part, "lendablePercent", 0);
        }
    }
    if let Some(queuing) = object.pointer_mut("/spec/limited/limitResponse/queuing").filter(|q| q.is_object())
    {
        default_zero(queuing, "handSize", 8);
        default_zero(queuing, "queues", 64);
        default_zero(queuing, "queueLengthLimit", 50);
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let has = |key: &str| object.pointer(&format!("/spec/{key}")).is_some_and(|v| !v.is_null());
    let kind = text(object, "/spec/type");
    let (wanted, other) = match kind {
        "Exempt" => (None, "limited"),
        "Limited" => (Some("limited"), "exempt"),
        _ => {
            let at = path.child("type");
            errors.push(FieldError::not_supported(&at, kind, &["Exempt", "Limited"]));
            return errors;
        }
    };
    if wanted.is_some_and(|key| !has(key)) {
        errors.push(FieldError::required(&path.child("limited"), "must not be empty when type is Limited"));
    }
    if has(other) {
        let detail = match kind {
            "Exempt" => "must be nil if the type is not Limited",
            _ => "must be nil if the type is Limited",
        };
        errors.push(FieldError::forbidden(&path.child(other), detail));
    }
    for key in ["exempt", "limited"] {
        let at = path.child(key);
        let pointer = format!("/spec/{key}");
        nonnegative_keys(
            object,
            &pointer,
            &at,
            &["nominalConcurrencyShares", "lendablePercent"],
            &mut errors,
        );
    }
    let (response, at) = ("/spec/limited/limitResponse", path.child("limited").child("limitResponse"));
    let queuing = object.pointer(&format!("{response}/queuing")).is_some_and(|q| !q.is_null());
    match text(object, &format!("{response}/type")) {
        _ if !has("limited") => {}
        "Reject" if queuing => {
            let detail = "must be nil if limited.limitResponse.type is not Limited";
            errors.push(FieldError::forbidden(&at.child("queuing"), detail));
        }
        "Queue" if !queuing => {
            let detail = "must not be empty if limited.limitResponse.type is Limited";
            errors.push(FieldError::required(&at.child("queuing"), detail));
        }
        "Reject" | "Queue" => {}
        other => errors.push(FieldError::not_supported(&at.child("type"), other, &["Queue", "Reject"])),
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({});
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            bump_generation(new, old, !same_in(new, old, "/spec"));
            keep(new, old, "status");
        },
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("Type", "Whether requests are limited."),
        Column::string("NominalConcurrencyShares", "Its share of the server's concurrency."),
        Column::string("Queues", "How many queues there are."),
        Column::string("HandSize", "Among how many queues a request may choose."),
        Column::string("QueueLengthLimit", "How many requests wait in a queue at most."),
        Column::AGE,
    ],
    row: |object, now| {
        let number = |pointer: &str| -> Value {
            object.pointer(pointer).filter(|v| v.is_number()).cloned().unwrap_or_else(|| "<none>".into())
        };
        vec![
            table::name(object),
            text(object, "/spec/type").into(),
            number("/spec/limited/nominalConcurrencyShares"),
            number("/spec/limited/limitResponse/queuing/queues"),
            number("/spec/limited/limitResponse/queuing/handSize"),
            number("/spec/limited/limitResponse/queuing/queueLengthLimit"),
            table::age(object, now),
        ]
    },
    ..Kind::plain("flowcontrol.apiserver.k8s.io", "v1", "PriorityLevelConfiguration")
};
