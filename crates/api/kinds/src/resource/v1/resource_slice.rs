//! ResourceSlice.
//!
//! Upstream counterpart: pkg/registry/resource/resourceslice. Left out: the devices, their counters and taints.
use std::collections::BTreeSet;

use serde_json::Value;

use super::GROUP;
use crate::apps::v1::workload::immutable;
use crate::core::v1::pod_spec::older_volumes::validate_csi_driver_name;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::names;
use crate::object::{bump_generation, items, same_in, set_generation, text};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    validate_csi_driver_name(text(object, "/spec/driver"), &path.child("driver"), &mut errors);
    let (pool, at) = (text(object, "/spec/pool/name"), path.child("pool").child("name"));
    match pool {
        "" => errors.push(FieldError::required(&at, "")),
        _ => {
            let messages = pool.split('/').flat_map(names::dns1123_subdomain).collect();
            errors.extend(FieldError::invalid_each(&at, pool, messages));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, device) in items(object, "/spec/devices").iter().enumerate() {
        let (at, name) = (path.child("devices").index(i).child("name"), text(device, "/name"));
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_label(name)));
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&at, name));
        }
    }
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        validate,
        validate_update: |new, old| {
            let (mut errors, path) = (validate(new), Path::new("spec"));
            immutable(new, old, "/spec/driver", &path.child("driver"), &mut errors);
            immutable(new, old, "/spec/pool/name", &path.child("pool").child("name"), &mut errors);
            immutable(new, old, "/spec/nodeName", &path.child("nodeName"), &mut errors);
            errors
        },
        ..Rest::ANY
    },
    columns: &[
        Column::NAME,
        Column::string("Node", "The node that has the devices."),
        Column::string("Driver", "The driver that the devices belong to."),
        Column::string("Pool", "The pool that the slice is part of."),
        Column::AGE,
    ],
    row: |object, now| {
        vec![
            table::name(object),
            text(object, "/spec/nodeName").into(),
            text(object, "/spec/driver").into(),
            text(object, "/spec/pool/name").into(),
            table::age(object, now),
        ]
    },
    selectable: |object| {
        vec![
            ("spec.nodeName", text(object, "/spec/nodeName").to_string()),
            ("spec.driver", text(object, "/spec/driver").to_string()),
        ]
    },
    ..Kind::plain(GROUP, "v1", "ResourceSlice")
};
