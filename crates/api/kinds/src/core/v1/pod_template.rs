//! PodTemplate, and the template that workload kinds hold.
//!
//! Upstream counterpart: pkg/registry/core/podtemplate and ValidatePodTemplateSpec in validation.go.
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};
use serde_json::Value;

use super::pod_spec::{self, annotations, warnings};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::{validate_annotations, validate_labels};
use crate::object::{bump_generation, or_empty, read, same, set_generation};
use crate::table;

/// Defaults of a template: those of its spec.
pub fn defaults_spec(template: &mut Value) {
    if let Some(spec) = template.get_mut("spec") {
        pod_spec::defaults(spec);
    }
}

/// All that is wrong with a template.
pub fn validate_spec(template: &PodTemplateSpec, path: &Path) -> ErrorList {
    let (spec, meta) =
        (template.spec.clone().unwrap_or_default(), template.metadata.clone().unwrap_or_default());
    let (labels, notes) = (meta.labels.as_ref(), meta.annotations.as_ref());
    let mut errors = validate_labels(labels, &path.child("labels"));
    errors.extend(validate_annotations(notes, &path.child("annotations")));
    annotations::validate(notes, &spec, &path.child("annotations"), &mut errors);
    let spec_path = path.child("spec");
    errors.extend(pod_spec::validate(&spec, None, &spec_path));
    annotations::validate_match(notes, &spec, &spec_path, &mut errors);
    if spec.ephemeral_containers.as_ref().is_some_and(|c| !c.is_empty()) {
        let detail = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden(&spec_path.child("ephemeralContainers"), detail));
    }
    errors
}

/// Warnings about the template at `path` of an object.
pub fn warnings_spec(template: Option<&Value>, path: &Path) -> Vec<String> {
    let Ok(template) = read::<PodTemplateSpec>(template, path) else { return Vec::new() };
    let (spec, meta) = (template.spec.unwrap_or_default(), template.metadata.unwrap_or_default());
    warnings::warnings(&spec, &meta, path)
}

/// The names and images of containers, as wide tables show them.
pub fn container_cells(containers: &[Container]) -> [Value; 2] {
    let names: Vec<&str> = containers.iter().map(|c| c.name.as_str()).collect();
    let images: Vec<&str> = containers.iter().map(|c| or_empty(&c.image)).collect();
    [names.join(",").into(), images.join(",").into()]
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("template");
    match read(object.get("template"), &path) {
        Ok(template) => validate_spec(&template, &path),
        Err(error) => vec![error],
    }
}

fn drop_disabled(object: &mut Value) {
    if let Some(spec) = object.pointer_mut("/template/spec") {
        pod_spec::drop_disabled_fields(spec);
    }
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        if let Some(template) = object.get_mut("template") {
            defaults_spec(template);
        }
    },
    rest: Rest {
        prepare_create: |object| {
            drop_disabled(object);
            set_generation(object, 1);
        },
        prepare_update: |new, old| {
            drop_disabled(new);
            let changed = !same(new.get("template"), old.get("template"));
            bump_generation(new, old, changed);
        },
        validate,
        validate_update: |new, _| validate(new),
        warnings: |new, _| warnings_spec(new.get("template"), &Path::new("template")),
    },
    columns: &[
        Column::NAME,
        Column::string("Containers", "Names of each container in the template."),
        Column::string("Images", "Images referenced by each container in the template."),
        Column::string("Pod Labels", "The labels for the pod template."),
    ],
    row: |object, _| {
        let template: PodTemplateSpec =
            read(object.get("template"), &Path::new("template")).unwrap_or_default();
        let [names, images] = container_cells(&template.spec.unwrap_or_default().containers);
        vec![table::name(object), names, images, table::labels(object.pointer("/template/metadata/labels"))]
    },
    ..Kind::plain("", "v1", "PodTemplate")
};
