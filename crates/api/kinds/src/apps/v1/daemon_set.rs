//! DaemonSet.
//!
//! Upstream counterpart: pkg/registry/apps/daemonset, ValidateDaemonSetSpec in pkg/apis/apps/validation. What stays
//! true: the template's generation, which v1 shows as an annotation only, grows when and only when the template
//! changes, and no client sets it after creation.
use serde_json::{Value, json};

use super::workload::{
    collisions_only_grow, drop_disabled, immutable, int_or_percent_value, nonnegative_keys,
    not_above_100_percent, parts, template_cells, template_warnings, validate_int_or_percent,
};
use crate::core::v1::pod_template::defaults_spec;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::meta::{nonnegative, validate_label_selector};
use crate::object::{
    bump_generation, child, default_absent, default_zero, integer, keep, same_in, set_generation, text,
};
use crate::table;

/// Where v1 keeps the template's generation.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

fn template_generation(object: &Value) -> i64 {
    let annotations = object.pointer("/metadata/annotations");
    let text = annotations.and_then(|a| a.get(TEMPLATE_GENERATION)).and_then(Value::as_str);
    text.and_then(|t| t.parse().ok()).unwrap_or_default()
}

fn set_template_generation(object: &mut Value, generation: i64) {
    child(child(object, "metadata"), "annotations")[TEMPLATE_GENERATION] = generation.to_string().into();
}

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    let strategy = child(spec, "updateStrategy");
    default_zero(strategy, "type", "RollingUpdate");
    if text(strategy, "/type") == "RollingUpdate" {
        let rolling = child(strategy, "rollingUpdate");
        default_absent(rolling, "maxUnavailable", 1);
        default_absent(rolling, "maxSurge", 0);
    }
    default_absent(spec, "revisionHistoryLimit", 10);
    if let Some(template) = spec.get_mut("template") {
        defaults_spec(template);
    }
}

fn validate_strategy(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("spec").child("updateStrategy");
    let at = path.child("rollingUpdate");
    match text(object, "/spec/updateStrategy/type") {
        "OnDelete" => {}
        "RollingUpdate" => {
            let rolling = object.pointer("/spec/updateStrategy/rollingUpdate").filter(|r| !r.is_null());
            let Some(rolling) = rolling else {
                errors.push(FieldError::required(&at, ""));
                return;
            };
            let value = |key: &str| rolling.get(key).cloned().unwrap_or_else(|| 0.into());
            let values = [("maxUnavailable", value("maxUnavailable")), ("maxSurge", value("maxSurge"))];
            values.iter().for_each(|(key, value)| validate_int_or_percent(value, &at.child(key), errors));
            values.iter().for_each(|(key, value)| not_above_100_percent(value, &at.child(key), errors));
            match values.each_ref().map(|(_, value)| int_or_percent_value(value) != 0) {
                [true, true] => {
                    let detail = "may not be set when maxUnavailable is non-zero";
                    errors.push(FieldError::invalid(&at.child("maxSurge"), value("maxSurge"), detail));
                }
                [false, false] => {
                    let detail = "cannot be 0 when maxSurge is 0";
                    errors.push(FieldError::required(&at.child("maxUnavailable"), detail));
                }
                _ => {}
            }
        }
        _ => {
            let value = object.pointer("/spec/updateStrategy").cloned().unwrap_or_default();
            errors.push(FieldError::not_supported_as_listed(&path, value, &["RollingUpdate", "OnDelete"]));
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    let parts = match parts(object, "/spec") {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = validate_label_selector(parts.selector.as_ref(), &path.child("selector"));
    if errors.is_empty() {
        parts.require_match(&path, &mut errors);
    }
    parts.refuse_empty("daemonset", &path, &mut errors);
    parts.validate_template(&path, &mut errors);
    parts.require_endless("DaemonSet", &path, &mut errors);
    nonnegative_keys(object, "/spec", &path, &["minReadySeconds"], &mut errors);
    nonnegative(template_generation(object), &path.child("templateGeneration"), &mut errors);
    validate_strategy(object, &mut errors);
    nonnegative_keys(object, "/spec", &path, &["revisionHistoryLimit"], &mut errors);
    errors
}

fn validate_status(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let keys = [
        "currentNumberScheduled",
        "numberMisscheduled",
        "desiredNumberScheduled",
        "numberReady",
        "observedGeneration",
        "updatedNumberScheduled",
        "numberAvailable",
        "numberUnavailable",
        "collisionCount",
    ];
    nonnegative_keys(new, "/status", &Path::new("status"), &keys, &mut errors);
    collisions_only_grow(new, old, &mut errors);
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object, "/spec/template");
    vec![
        table::name(object),
        integer(object, "/status/desiredNumberScheduled").into(),
        integer(object, "/status/currentNumberScheduled").into(),
        integer(object, "/status/numberReady").into(),
        integer(object, "/status/updatedNumberScheduled").into(),
        integer(object, "/status/numberAvailable").into(),
        table::labels(object.pointer("/spec/template/spec/nodeSelector")),
        table::age(object, now),
        names,
        images,
        cell(object.pointer("/spec/selector")),
    ]
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({
                "currentNumberScheduled": 0,
                "desiredNumberScheduled": 0,
                "numberMisscheduled": 0,
                "numberReady": 0
            });
            set_generation(object, 1);
            set_template_generation(object, template_generation(object).max(1));
            drop_disabled(object, "/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_disabled(new, "/spec/template");
            let changed = !same_in(new, old, "/spec/template");
            set_template_generation(new, template_generation(old) + i64::from(changed));
            bump_generation(new, old, changed || !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            immutable(new, old, "/spec/selector", &Path::new("spec").child("selector"), &mut errors);
            errors.extend(validate(new));
            errors
        },
        warnings: template_warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::integer("Desired", "How many nodes should run a pod of it."),
        Column::integer("Current", "How many nodes that should run a pod of it do."),
        Column::integer("Ready", "How many nodes that should run a pod of it have a ready one."),
        Column::integer("Up-to-date", "How many nodes run a pod with the wanted template."),
        Column::integer("Available", "How many nodes that should run a pod of it have an available one."),
        Column::string("Node Selector", "Labels of the nodes that run it."),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
        Column::string("Selector", "Which pods belong to it.").wide(),
    ],
    row,
    ..Kind::plain("apps", "v1", "DaemonSet")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_generation_follows_the_template() {
        let mut old =
            json!({"metadata": {"name": "d"}, "spec": {"template": {"spec": {"hostNetwork": true}}}});
        defaults(&mut old);
        (KIND.rest.prepare_create)(&mut old);
        assert_eq!(old["metadata"]["annotations"][TEMPLATE_GENERATION], "1");
        let mut new = old.clone();
        new["metadata"]["annotations"] = json!({});
        new["spec"]["minReadySeconds"] = 3.into();
        (KIND.rest.prepare_update)(&mut new, &old);
        assert_eq!((template_generation(&new), &new["metadata"]["generation"]), (1, &json!(2)));
        new["spec"]["template"]["spec"]["hostNetwork"] = false.into();
        (KIND.rest.prepare_update)(&mut new, &old);
        assert_eq!(template_generation(&new), 2);
    }

    #[test]
    fn one_of_surge_and_unavailable() {
        for (surge, unavailable, want) in [
            (
                json!(0),
                json!(0),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Required value: cannot be 0 when maxSurge is 0",
            ),
            (
                json!(1),
                json!("5%"),
                "spec.updateStrategy.rollingUpdate.maxSurge: Invalid value: 1: may not be set when maxUnavailable is non-zero",
            ),
            (
                json!("101%"),
                json!(0),
                "spec.updateStrategy.rollingUpdate.maxSurge: Invalid value: \"101%\": must not be greater than 100%",
            ),
        ] {
            let rolling = json!({"maxSurge": surge, "maxUnavailable": unavailable});
            let object =
                json!({"spec": {"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": rolling}}});
            let mut errors = ErrorList::new();
            validate_strategy(&object, &mut errors);
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [want]);
        }
    }
}
