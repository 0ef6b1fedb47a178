//! CSINode.
//!
//! Upstream counterpart: pkg/registry/storage/csinode, ValidateCSINode in pkg/apis/storage/validation.
use std::collections::BTreeSet;

use serde_json::Value;

use crate::core::v1::pod_spec::older_volumes::validate_csi_driver_name;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::{FIELD_IMMUTABLE, nonnegative, validate_label_name};
use crate::object::{count, integer, items, remove, same, text};
use crate::table;

const NODE_ID_MAX: usize = 256;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, mut seen) = (ErrorList::new(), BTreeSet::new());
    for (i, driver) in items(object, "/spec/drivers").iter().enumerate() {
        let at = Path::new("spec").child("drivers").index(i);
        let (name, node) = (text(driver, "/name"), text(driver, "/nodeID"));
        validate_csi_driver_name(name, &at.child("name"), &mut errors);
        if node.is_empty() {
            errors.push(FieldError::required(&at.child("nodeID"), ""));
        }
        if node.len() > NODE_ID_MAX {
            let detail = format!("must be {NODE_ID_MAX} characters or less");
            errors.push(FieldError::invalid(&at.child("nodeID"), node, detail));
        }
        let most = integer(driver, "/allocatable/count");
        nonnegative(most, &at.child("allocatable").child("count"), &mut errors);
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
        let mut keys = BTreeSet::new();
        for key in items(driver, "/topologyKeys").iter().filter_map(Value::as_str) {
            if key.is_empty() {
                errors.push(FieldError::required(&at, ""));
            }
            if !keys.insert(key) {
                errors.push(FieldError::duplicate(&at, key));
            }
            errors.extend(validate_label_name(key, &at));
        }
    }
    errors
}

fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = validate(new);
    for old in items(old, "/spec/drivers") {
        let same_name =
            items(new, "/spec/drivers").iter().filter(|new| text(new, "/name") == text(old, "/name"));
        for driver in same_name {
            let [mut new, mut old] = [driver.clone(), old.clone()];
            // How many volumes fit may change; nothing else may.
            remove(&mut new, "allocatable");
            remove(&mut old, "allocatable");
            if !same(Some(&new), Some(&old)) {
                let at = Path::new("spec").child("drivers");
                errors.push(FieldError::invalid(&at, new, FIELD_IMMUTABLE));
            }
        }
    }
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest { validate, validate_update, ..Rest::ANY },
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::integer("Drivers", "Drivers indicates the number of CSI drivers registered on the node"),
        Column::AGE,
    ],
    row: |object, now| {
        vec![table::name(object), count(object, "/spec/drivers").into(), table::age(object, now)]
    },
    ..Kind::plain("storage.k8s.io", "v1", "CSINode")
};
