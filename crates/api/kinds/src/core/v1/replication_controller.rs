//! ReplicationController.
//!
//! Upstream counterpart: pkg/registry/core/replicationcontroller, ValidateReplicationControllerSpec in validation.go.
use k8s_openapi::api::core::v1::{Container, ReplicationControllerSpec, ReplicationControllerStatus};
use serde_json::{Value, json};

use super::pod_template::{container_cells, defaults_spec, validate_spec, warnings_spec};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::nonnegative;
use crate::object::{
    bump_generation, child, count, default_absent, integer, keep, read, same_in, set_generation,
};
use crate::table;

fn defaults(object: &mut Value) {
    let labels = object.pointer("/spec/template/metadata/labels").cloned().unwrap_or_default();
    if count(&labels, "") > 0 {
        if count(object, "/spec/selector") == 0 {
            child(object, "spec")["selector"] = labels.clone();
        }
        if count(object, "/metadata/labels") == 0 {
            child(object, "metadata")["labels"] = labels;
        }
    }
    default_absent(child(object, "spec"), "replicas", 1);
    if let Some(template) = object.pointer_mut("/spec/template") {
        defaults_spec(template);
    }
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    let spec: ReplicationControllerSpec = match read(object.get("spec"), &path) {
        Ok(spec) => spec,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    nonnegative(
        spec.min_ready_seconds.unwrap_or_default().into(),
        &path.child("minReadySeconds"),
        &mut errors,
    );
    let selector = spec.selector.unwrap_or_default();
    if selector.is_empty() {
        errors.push(FieldError::required(&path.child("selector"), ""));
    }
    match spec.replicas {
        None => errors.push(FieldError::required(&path.child("replicas"), "")),
        Some(replicas) => nonnegative(replicas.into(), &path.child("replicas"), &mut errors),
    }
    let at = path.child("template");
    let Some(template) = spec.template else {
        errors.push(FieldError::required(&at, ""));
        return errors;
    };
    let labels = template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    if selector.iter().any(|(key, value)| labels.get(key) != Some(value)) {
        let detail = "`selector` does not match template `labels`";
        errors.push(FieldError::invalid(&at.child("metadata").child("labels"), json!(labels), detail));
    }
    errors.extend(validate_spec(&template, &at));
    let pod = template.spec.unwrap_or_default();
    let policy = pod.restart_policy.as_deref().unwrap_or_default();
    if policy != "Always" {
        let at = at.child("spec").child("restartPolicy");
        errors.push(FieldError::not_supported(&at, policy, &["Always"]));
    }
    if pod.active_deadline_seconds.is_some() {
        let detail = "activeDeadlineSeconds in ReplicationController is not Supported";
        errors.push(FieldError::forbidden(&at.child("spec").child("activeDeadlineSeconds"), detail));
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let path = Path::new("status");
    let status: ReplicationControllerStatus = match read(new.get("status"), &path) {
        Ok(status) => status,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    let of = |count: Option<i32>| count.unwrap_or_default();
    let (labeled, ready) = (of(status.fully_labeled_replicas), of(status.ready_replicas));
    let available = of(status.available_replicas);
    let counts =
        [("fullyLabeledReplicas", labeled), ("readyReplicas", ready), ("availableReplicas", available)];
    nonnegative(status.replicas.into(), &path.child("replicas"), &mut errors);
    counts.iter().for_each(|(key, count)| nonnegative((*count).into(), &path.child(key), &mut errors));
    nonnegative(
        status.observed_generation.unwrap_or_default(),
        &path.child("observedGeneration"),
        &mut errors,
    );
    for (key, count) in counts.iter().filter(|(_, count)| *count > status.replicas) {
        let detail = "cannot be greater than status.replicas";
        errors.push(FieldError::invalid(&path.child(key), *count, detail));
    }
    if available > ready {
        let detail = "cannot be greater than readyReplicas";
        errors.push(FieldError::invalid(&path.child("availableReplicas"), available, detail));
    }
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let containers: Vec<Container> = object
        .pointer("/spec/template/spec/containers")
        .and_then(|list| read(Some(list), &Path::new("spec")).ok())
        .unwrap_or_default();
    let [names, images] = container_cells(&containers);
    vec![
        table::name(object),
        integer(object, "/spec/replicas").into(),
        integer(object, "/status/replicas").into(),
        integer(object, "/status/readyReplicas").into(),
        table::age(object, now),
        names,
        images,
        table::labels(object.pointer("/spec/selector")),
    ]
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({"replicas": 0});
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            bump_generation(new, old, !same_in(new, old, "/spec"));
        },
        validate,
        validate_update: |new, _| validate(new),
        warnings: |new, _| warnings_spec(new.pointer("/spec/template"), &Path::new("spec").child("template")),
    },
    status: Some(Rest {
        prepare_update: |new, old| keep(new, old, "spec"),
        validate_update: validate_status,
        ..Rest::ANY
    }),
    columns: &[
        Column::NAME,
        Column::integer("Desired", "How many replicas are wanted."),
        Column::integer("Current", "How many replicas there are."),
        Column::integer("Ready", "How many replicas are ready."),
        Column::AGE,
        Column::string("Containers", "Names of each container in the template.").wide(),
        Column::string("Images", "Images referenced by each container in the template.").wide(),
        Column::string("Selector", "The labels of the pods that are counted.").wide(),
    ],
    row,
    selectable: |object| vec![("status.replicas", integer(object, "/status/replicas").to_string())],
    ..Kind::plain("", "v1", "ReplicationController")
};
