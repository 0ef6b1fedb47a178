//! PersistentVolumeClaim.
//!
//! Upstream counterpart: pkg/registry/core/persistentvolumeclaim, ValidatePersistentVolumeClaimSpec in validation.go.
//! Left out: the rules of the status subresource and the older storage class annotation.
use k8s_openapi::api::core::v1::PersistentVolumeClaimSpec;
use serde_json::{Value, json};

use super::pod_spec::defaults::claim_spec_defaults;
use super::pod_spec::resources::validate_quantity;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::{FIELD_IMMUTABLE, validate_label_selector};
use crate::names;
use crate::object::{child, default_zero, items, keep, or_empty, read, same, same_in, text};
use crate::quantity::{Amount, amount, parse};
use crate::table;

const ACCESS_MODES: &[&str] = &["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

/// The rules of access modes, which volumes share.
pub(super) fn validate_access_modes(modes: &[String], empty: &str, path: &Path, errors: &mut ErrorList) {
    let at = path.child("accessModes");
    if modes.is_empty() {
        errors.push(FieldError::required(&at, empty));
    }
    for mode in modes.iter().filter(|m| !ACCESS_MODES.contains(&m.as_str())) {
        errors.push(FieldError::not_supported(&at, mode.as_str(), ACCESS_MODES));
    }
    let once_pod = |m: &&String| m.as_str() == "ReadWriteOncePod";
    let known = modes.iter().filter(|m| ACCESS_MODES.contains(&m.as_str()));
    if modes.iter().any(|m| once_pod(&m)) && known.clone().any(|m| !once_pod(&m)) {
        let detail = "may not use ReadWriteOncePod with other access modes";
        errors.push(FieldError::forbidden(&at, detail));
    }
}

/// The short names of access modes, as tables show them.
pub(super) fn access_modes(object: &Value, pointer: &str) -> String {
    let short = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ];
    let modes = items(object, pointer);
    let shown: Vec<&str> =
        short.iter().filter(|(m, _)| modes.iter().any(|v| v == m)).map(|(_, s)| *s).collect();
    shown.join(",")
}

/// All that is wrong with a claim's spec, wherever it stands.
pub fn validate_spec(spec: &PersistentVolumeClaimSpec, path: &Path, errors: &mut ErrorList) {
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    validate_access_modes(modes, "at least 1 access mode is required", path, errors);
    errors.extend(validate_label_selector(spec.selector.as_ref(), &path.child("selector")));
    let at = path.child("resources").key("storage");
    match spec.resources.as_ref().and_then(|r| r.requests.as_ref()?.get("storage")) {
        None => errors.push(FieldError::required(&at, "")),
        Some(size) if amount(size) <= Amount::ZERO => {
            errors.push(FieldError::invalid(&at, crate::quantity::text(size), "must be greater than zero"));
        }
        Some(size) => validate_quantity("storage", size, &at, errors),
    }
    for (key, class) in [
        ("storageClassName", &spec.storage_class_name),
        ("volumeAttributesClassName", &spec.volume_attributes_class_name),
    ] {
        let class = or_empty(class);
        if !class.is_empty() {
            errors.extend(FieldError::invalid_each(&path.child(key), class, names::dns1123_subdomain(class)));
        }
    }
    if let Some(mode) = spec.volume_mode.as_deref().filter(|m| !["Block", "Filesystem"].contains(m)) {
        errors.push(FieldError::not_supported(&path.child("volumeMode"), mode, &["Block", "Filesystem"]));
    }
    let sources = [
        ("dataSource", spec.data_source.as_ref().map(|s| (&s.api_group, &s.kind, &s.name))),
        ("dataSourceRef", spec.data_source_ref.as_ref().map(|s| (&s.api_group, &s.kind, &s.name))),
    ];
    for (key, (group, kind, name)) in sources.into_iter().filter_map(|(key, s)| s.map(|s| (key, s))) {
        let (at, group) = (path.child(key), or_empty(group));
        for (key, value) in [("name", name), ("kind", kind)] {
            if value.is_empty() {
                errors.push(FieldError::required(&at.child(key), ""));
            }
        }
        if group.is_empty() && kind != "PersistentVolumeClaim" {
            let detail = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
            errors.push(FieldError::invalid(&at, kind.as_str(), detail));
        }
        if !group.is_empty() {
            errors.extend(FieldError::invalid_each(
                &at.child("apiGroup"),
                group,
                names::dns1123_subdomain(group),
            ));
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let path = Path::new("spec");
    match read(object.get("spec"), &path) {
        Ok(spec) => {
            let mut errors = ErrorList::new();
            validate_spec(&spec, &path, &mut errors);
            errors
        }
        Err(error) => vec![error],
    }
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    let path = Path::new("spec");
    let stored = old.get("spec").cloned().unwrap_or_default();
    let mut munged = new.get("spec").cloned().unwrap_or_default();
    if text(&stored, "/volumeName").is_empty() {
        keep(&mut munged, &stored, "volumeName");
    }
    if text(new, "/status/phase") == "Bound" {
        let requests = stored.pointer("/resources/requests").cloned().unwrap_or_default();
        keep(child(child(&mut munged, "resources"), "requests"), &requests, "storage");
        keep(&mut munged, &stored, "volumeAttributesClassName");
    }
    if !same(Some(&munged), Some(&stored)) {
        let detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.push(FieldError::forbidden(&path, detail));
    }
    let size = |object: &Value, pointer: &str| {
        parse(text(object, pointer)).unwrap_or((Amount::ZERO, crate::quantity::Format::DecimalSi)).0
    };
    let asked = size(new, "/spec/resources/requests/storage");
    if asked < size(old, "/spec/resources/requests/storage") && asked <= size(old, "/status/capacity/storage")
    {
        let at = path.child("resources").child("requests").child("storage");
        errors.push(FieldError::forbidden(&at, "field can not be less than status.capacity"));
    }
    if !same_in(new, old, "/spec/volumeMode") {
        let mode = text(new, "/spec/volumeMode");
        errors.push(FieldError::invalid(&Path::new("volumeMode"), mode, FIELD_IMMUTABLE));
    }
    errors
}

/// dataSource and dataSourceRef mirror each other for the kinds that both may name.
fn normalize_sources(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    let local = |spec: &Value, key: &str| {
        spec.get(key).filter(|s| !s.is_null() && text(s, "/namespace").is_empty()).cloned()
    };
    match (local(spec, "dataSource"), local(spec, "dataSourceRef")) {
        (Some(source), None) if spec.get("dataSourceRef").is_none() => spec["dataSourceRef"] = source,
        (None, Some(source)) if spec.get("dataSource").is_none() => spec["dataSource"] = source,
        _ => {}
    }
}

pub const KIND: Kind = Kind {
    defaults: |object| {
        default_zero(child(object, "status"), "phase", "Pending");
        if let Some(spec) = object.get_mut("spec") {
            claim_spec_defaults(spec);
        }
    },
    rest: Rest {
        prepare_create: |object| {
            object["status"] = json!({"phase": "Pending"});
            normalize_sources(object);
        },
        prepare_update: |new, old| {
            keep(new, old, "status");
            normalize_sources(new);
        },
        validate,
        validate_update,
        warnings: |_, _| Vec::new(),
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[
        Column::NAME,
        Column::string("Status", "What has become of the claim."),
        Column::string("Volume", "The volume that is bound to it."),
        Column::string("Capacity", "The volume's size."),
        Column::string("Access Modes", "How the volume may be mounted."),
        Column::string("StorageClass", "StorageClass of the pvc"),
        Column::string("VolumeAttributesClass", "VolumeAttributesClass of the pvc"),
        Column::AGE,
        Column::string("VolumeMode", "Filesystem or Block.").wide(),
    ],
    row: |object, now| {
        let bound = !text(object, "/spec/volumeName").is_empty();
        let deleted = object.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null());
        let unset = |pointer: &str| match text(object, pointer) {
            "" => Value::from("<unset>"),
            value => value.into(),
        };
        vec![
            table::name(object),
            if deleted { "Terminating".into() } else { text(object, "/status/phase").into() },
            text(object, "/spec/volumeName").into(),
            if bound { text(object, "/status/capacity/storage").into() } else { "".into() },
            if bound { access_modes(object, "/status/accessModes").into() } else { "".into() },
            text(object, "/spec/storageClassName").into(),
            unset("/spec/volumeAttributesClassName"),
            table::age(object, now),
            unset("/spec/volumeMode"),
        ]
    },
    ..Kind::plain("", "v1", "PersistentVolumeClaim")
};
