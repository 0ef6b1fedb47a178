//! ReplicaSet.
//!
//! Upstream counterpart: pkg/registry/apps/replicaset, ValidateReplicaSetSpec in pkg/apis/apps/validation.
use serde_json::{Value, json};

use super::workload::{
    drop_disabled, immutable, named_warnings, nonnegative_keys, not_above, parts, template_cells,
};
use crate::core::v1::pod_template::defaults_spec;
use crate::field::{ErrorList, Path};
use crate::kind::{Column, Kind, Rest};
use crate::label_selector::cell;
use crate::object::{bump_generation, child, default_absent, integer, keep, same_in, set_generation};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    let parts = match parts(object, "/spec") {
        Ok(parts) => parts,
        Err(error) => return vec![error],
    };
    let mut errors = ErrorList::new();
    nonnegative_keys(object, "/spec", &path, &["replicas", "minReadySeconds"], &mut errors);
    // "deployment" is what upstream says here too.
    parts.require_selector("deployment", &path, &mut errors);
    if parts.selector_is_usable("invalid label selector", &path, &mut errors) {
        parts.require_match(&path, &mut errors);
        parts.validate_template(&path, &mut errors);
        parts.require_endless("ReplicaSet", &path, &mut errors);
    }
    errors
}

fn validate_status(new: &Value, _: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let counts = ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"];
    let path = Path::new("status");
    nonnegative_keys(new, "/status", &path, &["replicas"], &mut errors);
    nonnegative_keys(new, "/status", &path, &counts, &mut errors);
    nonnegative_keys(new, "/status", &path, &["observedGeneration", "terminatingReplicas"], &mut errors);
    not_above(new, &counts, "replicas", "cannot be greater than status.replicas", &mut errors);
    let detail = "cannot be greater than readyReplicas";
    not_above(new, &["availableReplicas"], "readyReplicas", detail, &mut errors);
    errors
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let [names, images] = template_cells(object, "/spec/template");
    vec![
        table::name(object),
        integer(object, "/spec/replicas").into(),
        integer(object, "/status/replicas").into(),
        integer(object, "/status/readyReplicas").into(),
        table::age(object, now),
        names,
        images,
        cell(object.pointer("/spec/selector")),
    ]
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        let spec = child(object, "spec");
        default_absent(spec, "replicas", 1);
        if let Some(template) = spec.get_mut("template") {
            defaults_spec(template);
        }
    },
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({"replicas": 0});
            set_generation(object, 1);
            drop_disabled(object, "/spec/template");
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            drop_disabled(new, "/spec/template");
            bump_generation(new, old, !same_in(new, old, "/spec"));
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
        Column::string("Selector", "Which pods belong to it.").wide(),
    ],
    row,
    ..Kind::plain("apps", "v1", "ReplicaSet")
};
