//! FlowSchema.
//!
//! Upstream counterpart: pkg/registry/flowcontrol/flowschema, pkg/apis/flowcontrol. Left out: the checks inside rules
//! and of the mandatory objects.
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{
    bump_generation, child, count, default_zero, integer, items, keep, same_in, set_generation, text,
};
use crate::table;

const PRECEDENCE_MAX: i64 = 10_000;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    let precedence = integer(object, "/spec/matchingPrecedence");
    let at = path.child("matchingPrecedence");
    if precedence <= 0 {
        errors.push(FieldError::invalid(&at, precedence, "must be a positive value"));
    }
    if precedence > PRECEDENCE_MAX {
        let detail = format!("must not be greater than {PRECEDENCE_MAX}");
        errors.push(FieldError::invalid(&at, precedence, detail));
    }
    if precedence == 1 && text(object, "/metadata/name") != "exempt" {
        let detail = "only the schema named 'exempt' may have matchingPrecedence 1";
        errors.push(FieldError::invalid(&at, precedence, detail));
    }
    let method = object.pointer("/spec/distinguisherMethod/type").and_then(Value::as_str);
    if let Some(method) = method.filter(|m| !["ByNamespace", "ByUser"].contains(m)) {
        let at = path.child("distinguisherMethod").child("type");
        errors.push(FieldError::not_supported(&at, method, &["ByNamespace", "ByUser"]));
    }
    let level = text(object, "/spec/priorityLevelConfiguration/name");
    let at = path.child("priorityLevelConfiguration").child("name");
    match level {
        "" => errors.push(FieldError::required(&at, "must reference a priority level")),
        _ => errors.extend(FieldError::invalid_each(&at, level, names::dns1123_subdomain(level))),
    }
    for (i, rule) in items(object, "/spec/rules").iter().enumerate() {
        let at = path.child("rules").index(i);
        if count(rule, "/subjects") == 0 {
            errors.push(FieldError::required(
                &at.child("subjects"),
                "subjects must contain at least one value",
            ));
        }
        if count(rule, "/resourceRules") + count(rule, "/nonResourceRules") == 0 {
            let detail = "at least one of resourceRules and nonResourceRules has to be non-empty";
            errors.push(FieldError::required(&at, detail));
        }
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults: |object| default_zero(child(object, "spec"), "matchingPrecedence", 1000),
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
        Column::string("PriorityLevel", "Where matching requests are queued."),
        Column::string("MatchingPrecedence", "Which schema is asked first: the lowest number's."),
        Column::string("DistinguisherMethod", "How flows are told from each other."),
        Column::AGE,
        Column::string("MissingPL", "references a broken or non-existent PriorityLevelConfiguration"),
    ],
    row: |object, now| {
        let dangling = items(object, "/status/conditions").iter().find(|c| text(c, "/type") == "Dangling");
        vec![
            table::name(object),
            text(object, "/spec/priorityLevelConfiguration/name").into(),
            integer(object, "/spec/matchingPrecedence").into(),
            table::or_none(text(object, "/spec/distinguisherMethod/type")),
            table::age(object, now),
            dangling.map_or("?", |c| text(c, "/status")).into(),
        ]
    },
    ..Kind::plain("flowcontrol.apiserver.k8s.io", "v1", "FlowSchema")
};
