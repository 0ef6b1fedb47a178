//! CSIStorageCapacity.
//!
//! Upstream counterpart: pkg/registry/storage/csistoragecapacity, pkg/apis/storage/validation.
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::default_table;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, Rest};
use crate::meta::{IS_NEGATIVE, validate_label_selector};
use crate::names;
use crate::object::{read, text};
use crate::quantity::{Amount, parse};

fn validate(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let at = Path::new("nodeTopology");
    match read(object.get("nodeTopology"), &at) {
        Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &at)),
        Err(error) => errors.push(error),
    }
    let class = text(object, "/storageClassName");
    let at = Path::new("storageClassName");
    errors.extend(FieldError::invalid_each(&at, class, names::dns1123_subdomain(class)));
    let capacity = text(object, "/capacity");
    if parse(capacity).is_some_and(|(amount, _)| amount < Amount::ZERO) {
        errors.push(FieldError::invalid(&Path::new("capacity"), capacity, IS_NEGATIVE));
    }
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            for key in ["nodeTopology", "storageClassName"] {
                immutable(new, old, &format!("/{key}"), &Path::new(key), &mut errors);
            }
            errors
        },
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: default_table::COLUMNS,
    row: default_table::row,
    ..Kind::plain("storage.k8s.io", "v1", "CSIStorageCapacity")
};
