//! PriorityClass.
//!
//! Upstream counterpart: pkg/registry/scheduling/priorityclass, ValidatePriorityClass in pkg/apis/scheduling/validation.
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::core::v1::pod_spec::one_of;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{default_absent, integer, set_generation, text, truth};
use crate::table;

const USER_MAX: i64 = 1_000_000_000;
const SYSTEM_CLASSES: [(&str, i64); 2] =
    [("system-node-critical", 2 * USER_MAX + 1000), ("system-cluster-critical", 2 * USER_MAX)];

/// Why a class with a system's name isn't one of the system's.
fn system_class_error(name: &str, value: i64, global: bool) -> Option<String> {
    match SYSTEM_CLASSES.iter().find(|(known, _)| *known == name) {
        None => Some(format!("{name} is not a known system priority class")),
        Some((_, known)) if *known != value => Some(format!("value of {name} PriorityClass must be {known}")),
        Some(_) if global => Some(format!("globalDefault of {name} PriorityClass must be false")),
        Some(_) => None,
    }
}

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (name, value) = (text(object, "/metadata/name"), integer(object, "/value"));
    if name.starts_with("system-") {
        if let Some(error) = system_class_error(name, value, truth(object, "/globalDefault")) {
            let detail = format!(
                "priority class names with 'system-' prefix are reserved for system use only. error: {error}"
            );
            errors.push(FieldError::forbidden(&Path::new("metadata").child("name"), detail));
        }
    } else if value > USER_MAX {
        let detail = format!("maximum allowed value of a user defined priority is {USER_MAX}");
        errors.push(FieldError::forbidden(&Path::new("value"), detail));
    }
    if let Some(policy) = object.get("preemptionPolicy").and_then(Value::as_str) {
        let policies = ["Never", "PreemptLowerPriority"];
        one_of(policy, &policies, &Path::new("preemptionPolicy"), &mut errors);
    }
    errors
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if integer(new, "/value") != integer(old, "/value") {
        errors.push(FieldError::forbidden(&Path::new("value"), "may not be changed in an update."));
    }
    immutable(new, old, "/preemptionPolicy", &Path::new("preemptionPolicy"), &mut errors);
    errors
}

pub const KIND: Kind = Kind {
    defaults: |object| default_absent(object, "preemptionPolicy", "PreemptLowerPriority"),
    rest: Rest { prepare_create: |object| set_generation(object, 1), validate, validate_update, ..Rest::ANY },
    columns: &[
        Column::NAME,
        Column::integer("Value", "The priority of pods with this class."),
        Column {
            kind: "boolean",
            ..Column::string("Global-Default", "Whether pods without a class get it.")
        },
        Column::AGE,
        Column::string("PreemptionPolicy", "Whether such pods preempt others.").wide(),
    ],
    row: |object, now| {
        vec![
            table::name(object),
            integer(object, "/value").into(),
            truth(object, "/globalDefault").into(),
            table::age(object, now),
            text(object, "/preemptionPolicy").into(),
        ]
    },
    ..Kind::plain("scheduling.k8s.io", "v1", "PriorityClass")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn system_names_are_the_systems() {
        for (name, value, want) in [
            ("system-node-critical", 2_000_001_000i64, 0),
            ("system-node-critical", 1, 1),
            ("system-other", 1, 1),
            ("user", 1_000_000_001, 1),
            ("user", -5, 0),
        ] {
            let class = json!({"metadata": {"name": name}, "value": value});
            assert_eq!(validate(&class).len(), want, "{name} {value}");
        }
    }
}
