//! Deployment.
//!
//! Upstream counterpart: pkg/registry/apps/deployment, ValidateDeploymentSpec in pkg/apis/apps/validation. Left out:
//! rollbackTo, which only versions before v1 had.
use serde_json::{Value, json};

use super::workload::{
    collisions_only_grow, drop_disabled, immutable, int_or_percent_value, named_warnings, nonnegative_keys,
    not_above, not_above_100_percent, parts, template_cells, validate_int_or_percent,
};
use crate::core::v1::pod_template::defaults_spec;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::object::{
    bump_generation, child, default_absent, default_zero, integer, keep, same_in, set_generation, text,
};
use crate::table;

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default_absent(spec, "replicas", 1);
    let strategy = child(spec, "strategy");
    default_zero(strategy, "type", "RollingUpdate");
    if text(strategy, "/type") == "RollingUpdate" {
        let rolling = child(strategy, "rollingUpdate");
        default_absent(rolling, "maxUnavailable", "25%");
        default_absent(rolling, "maxSurge", "25%");
    }
    default_absent(spec, "revisionHistoryLimit", 10);
    default_absent(spec, "progressDeadlineSeconds", 600);
    if let Some(template) = spec.get_mut("template") {
        defaults_spec(template);
    }
}

fn validate_strategy(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("spec").child("strategy");
    let at = path.child("rollingUpdate");
    let rolling = object.pointer("/spec/strategy/rollingUpdate").filter(|r| !r.is_null());
    match (text(object, "/spec/strategy/type"), rolling) {
        ("Recreate", None) => {}
        ("Recreate", Some(_)) => {
            let detail = "may not be specified when strategy `type` is 'Recreate'";
            errors.push(FieldError::forbidden(&at, detail));
        }
        ("RollingUpdate", None) => {
            errors.push(FieldError::required(&at, "this should be defaulted and never be nil"));
        }
        ("RollingUpdate", Some(rolling)) => {
            let value = |key: &str| rolling.get(key).cloned().unwrap_or_else(|| 0.into());
            let (unavailable, surge) = (value("maxUnavailable"), value("maxSurge"));
            validate_int_or_percent(&unavailable, &at.child("maxUnavailable"), errors);
            validate_int_or_percent(&surge, &at.child("maxSurge"), errors);
            if int_or_percent_value(&unavailable) == 0 && int_or_percent_value(&surge) == 0 {
                let detail = "may not be 0 when `maxSurge` is 0";
                errors.push(FieldError::invalid(&at.child("maxUnavailable"), unavailable.clone(), detail));
            }
            not_above_100_percent(&unavailable, &at.child("maxUnavailable"), errors);
        }
        _ => {
            let value = object.pointer("/spec/strategy").cloned().unwrap_or_default();
            errors.push(FieldError::not_supported(&path, value, &["Recreate", "RollingUpdate"]));
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    let parts = match parts(object, "/spec") {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    nonnegative_keys(object, "/spec", &path, &["replicas"], &mut errors);
    parts.require_selector("deployment", &path, &mut errors);
    if parts.selector_is_usable("invalid label selector", &path, &mut errors) {
        parts.require_match(&path, &mut errors);
        parts.validate_template(&path, &mut errors);
        parts.require_endless("ReplicaSet", &path, &mut errors);
    }
    validate_strategy(object, &mut errors);
    nonnegative_keys(object, "/spec", &path, &["minReadySeconds", "revisionHistoryLimit"], &mut errors);
    if let Some(deadline) = object.pointer("/spec/progressDeadlineSeconds").and_then(Value::as_i64) {
        nonnegative_keys(object, "/spec", &path, &["progressDeadlineSeconds"], &mut errors);
        if deadline <= integer(object, "/spec/minReadySeconds") {
            let at = path.child("progressDeadlineSeconds");
            errors.push(FieldError::invalid(&at, deadline, "must be greater than minReadySeconds"));
        }
    }
    errors
}

fn validate_status(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let keys = [
        "observedGeneration",
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
        "terminatingReplicas",
        "collisionCount",
    ];
    nonnegative_keys(new, "/status", &Path::new("status"), &keys, &mut errors);
    let counts = ["updatedReplicas", "readyReplicas", "availableReplicas"];
    not_above(new, &counts, "replicas", "cannot be greater than status.replicas", &mut errors);
    let detail = "cannot be greater than readyReplicas";
    not_above(new, &["availableReplicas"], "readyReplicas", detail, &mut errors);
    collisions_only_grow(new, old, &mut errors);
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object, "/spec/template");
    let (ready, wanted) = (integer(object, "/status/readyReplicas"), integer(object, "/spec/replicas"));
    vec![
        table::name(object),
        format!("{ready}/{wanted}").into(),
        integer(object, "/status/updatedReplicas").into(),
        integer(object, "/status/availableReplicas").into(),
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
            object["status"] = json!({});
            set_generation(object, 1);
            drop_disabled(object, "/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_disabled(new, "/spec/template");
            // Annotations are copied to replica sets, so that a change of them is one of what is wanted.
            let changed = !same_in(new, old, "/spec") || !same_in(new, old, "/metadata/annotations");
            bump_generation(new, old, changed);
        },
        validate,
        validate_update: |new, old| {
            let mut errors = validate(new);
            immutable(new, old, "/spec/selector", &Path::new("spec").child("selector"), &mut errors);
            errors
        },
        warnings: named_warnings,
    },
    status: Some(Rest {
        prepare_update: |new, old| {
            keep(new, old, "spec");
            let empty = json!({});
            keep(child(new, "metadata"), old.get("metadata").unwrap_or(&empty), "labels");
        },
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::string("Ready", "Number of the pod with ready state"),
        Column::string("Up-to-date", "How many pods have the wanted template."),
        Column::string("Available", "How many pods are available."),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
        Column::string("Selector", "Which pods belong to it.").wide(),
    ],
    row,
    ..Kind::plain("apps", "v1", "Deployment")
};

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(patch: Value) -> Value {
        let mut object = json!({
            "metadata": {"name": "d", "generation": 1},
            "spec": {
                "selector": {"matchLabels": {"a": "b"}},
                "template": {
                    "metadata": {"labels": {"a": "b"}},
                    "spec": {"containers": [{"name": "c", "image": "i"}]}
                }
            }
        });
        for (key, value) in patch.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        defaults(&mut object);
        object
    }

    fn texts(errors: ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn validation() {
        let cases: Vec<(Value, &[&str])> = vec![
            (json!({}), &[]),
            (
                json!({"selector": null}),
                &[
                    "spec.selector: Required value",
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                ],
            ),
            (
                json!({"selector": {}}),
                &["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
            ),
            (
                json!({"replicas": -1}),
                &["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (
                json!({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}}),
                &[
                    "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
                ],
            ),
            (
                json!({"strategy": {"type": "Recreate", "rollingUpdate": {}}}),
                &[
                    "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
                ],
            ),
            (
                json!({"progressDeadlineSeconds": 5, "minReadySeconds": 5}),
                &["spec.progressDeadlineSeconds: Invalid value: 5: must be greater than minReadySeconds"],
            ),
        ];
        for (patch, want) in cases {
            assert_eq!(texts(validate(&deployment(patch.clone()))), want, "{patch}");
        }
    }

    #[test]
    fn updates() {
        let old = deployment(json!({}));
        let mut new = old.clone();
        new["metadata"]["annotations"] = json!({"x": "y"});
        new["status"] = json!({"replicas": 9});
        (KIND.rest.prepare_update)(&mut new, &old);
        assert_eq!(new["metadata"]["generation"], 2);
        assert!(new.get("status").is_none());
        new["spec"]["selector"] = json!({"matchLabels": {"a": "b", "c": "d"}});
        new["spec"]["template"]["metadata"]["labels"]["c"] = "d".into();
        let errors = texts((KIND.rest.validate_update)(&new, &old));
        assert_eq!(errors.len(), 1);
        assert!(
            errors[0].starts_with("spec.selector: Invalid value: ")
                && errors[0].ends_with("field is immutable")
        );
        let status = KIND.status.unwrap();
        let stored = json!({"metadata": {"labels": {"a": "b"}}, "spec": {}, "status": {"collisionCount": 2}});
        let mut new =
            json!({"metadata": {"labels": {"x": "y"}}, "status": {"collisionCount": 1, "readyReplicas": 1}});
        (status.prepare_update)(&mut new, &stored);
        assert_eq!(new["metadata"]["labels"], json!({"a": "b"}));
        assert_eq!(
            texts((status.validate_update)(&new, &stored)),
            [
                "status.readyReplicas: Invalid value: 1: cannot be greater than status.replicas",
                "status.collisionCount: Invalid value: 1: cannot be decremented",
            ]
        );
    }
}
