//! VolumeAttachment.
//!
//! Upstream counterpart: pkg/registry/storage/volumeattachment, ValidateVolumeAttachment in pkg/apis/storage/validation.
//! Left out: the checks inside an inline volume.
use serde_json::{Value, json};

use crate::apps::v1::workload::immutable;
use crate::core::v1::pod_spec::older_volumes::validate_csi_driver_name;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{entries, keep, text, truth};
use crate::table;

const METADATA_MAX_BYTES: usize = 256 * 1024;
const MESSAGE_MAX_BYTES: usize = 1024;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    validate_csi_driver_name(text(object, "/spec/attacher"), &path.child("attacher"), &mut errors);
    let (at, detail) =
        (path.child("source"), "must specify exactly one of inlineVolumeSpec and persistentVolumeName");
    let inline = object.pointer("/spec/source/inlineVolumeSpec").is_some_and(|v| !v.is_null());
    let volume = object.pointer("/spec/source/persistentVolumeName").and_then(Value::as_str);
    match (inline, volume) {
        (false, None) => errors.push(FieldError::required(&at, detail)),
        (true, Some(_)) => errors.push(FieldError::forbidden(&at, detail)),
        (false, Some("")) => {
            let detail = "must specify non empty persistentVolumeName";
            errors.push(FieldError::required(&at.child("persistentVolumeName"), detail));
        }
        _ => {}
    }
    let node = text(object, "/spec/nodeName");
    errors.extend(FieldError::invalid_each(&path.child("nodeName"), node, names::dns1123_subdomain(node)));
    validate_status(object, &mut errors);
    if let Some(volume) = volume {
        let at = Path::new("spec.source.persistentVolumeName");
        errors.extend(FieldError::invalid_each(&at, volume, names::dns1123_subdomain(volume)));
    }
    errors
}

fn validate_status(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("status");
    let pairs = entries(object, "/status/attachmentMetadata");
    let size_bytes: usize = pairs.map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum();
    if size_bytes > METADATA_MAX_BYTES {
        errors.push(FieldError::too_long(&path.child("attachmentMetadata"), METADATA_MAX_BYTES));
    }
    for key in ["attachError", "detachError"] {
        let at = path.child(key);
        if text(object, &format!("/status/{key}/message")).len() > MESSAGE_MAX_BYTES {
            errors.push(FieldError::too_long(&at.child("message"), METADATA_MAX_BYTES));
        }
        let code = object.pointer(&format!("/status/{key}/errorCode")).and_then(Value::as_i64);
        if let Some(code) = code.filter(|code| *code < 0) {
            let detail = names::range_error(0, i64::from(i32::MAX));
            errors.push(FieldError::invalid(&at.child("errorCode"), code, detail));
        }
    }
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    immutable(new, old, "/spec", &Path::new("spec"), &mut errors);
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| object["status"] = json!({"attached": false}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate,
        validate_update,
        ..Rest::ANY
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), validate_update, ..Rest::ANY }),
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::string("Attacher", "The CSI driver that attaches the volume."),
        Column::string("PV", "The volume."),
        Column::string("Node", "The node that the volume is to be attached to."),
        Column { kind: "boolean", ..Column::string("Attached", "Whether the volume is attached.") },
        Column::AGE,
    ],
    row: |object, now| {
        vec![
            table::name(object),
            text(object, "/spec/attacher").into(),
            text(object, "/spec/source/persistentVolumeName").into(),
            text(object, "/spec/nodeName").into(),
            truth(object, "/status/attached").into(),
            table::age(object, now),
        ]
    },
    ..Kind::plain("storage.k8s.io", "v1", "VolumeAttachment")
};
