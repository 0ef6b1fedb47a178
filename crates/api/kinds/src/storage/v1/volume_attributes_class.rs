//! VolumeAttributesClass.
//!
//! Upstream counterpart: pkg/registry/storage/volumeattributesclass, pkg/apis/storage/validation.
use serde_json::Value;

use super::storage_class::{validate_parameters, validate_provisioner};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{same_in, text};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_provisioner(object, "driverName", &mut errors);
    validate_parameters(object, true, &mut errors);
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            for key in ["driverName", "parameters"] {
                if !same_in(new, old, &format!("/{key}")) {
                    let detail = format!("updates to {key} are forbidden.");
                    errors.push(FieldError::forbidden(&Path::new(key), detail));
                }
            }
            errors.extend(validate(new));
            errors
        },
        ..Rest::ANY
    },
    columns: &[Column::NAME, Column::string("DriverName", "The CSI driver it is for."), Column::AGE],
    row: |object, now| vec![table::name(object), text(object, "/driverName").into(), table::age(object, now)],
    ..Kind::plain("storage.k8s.io", "v1", "VolumeAttributesClass")
};
