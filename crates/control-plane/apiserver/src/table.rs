//! `Table` answers: what `kubectl get` prints.
//!
//! Upstream counterparts: pkg/printers, k8s.io/apiserver/pkg/endpoints/handlers/response.go. Columns and cells are
//! the kinds' own (`sampan_kinds::Kind::columns`).
use sampan_world::clock;
use serde_json::{Value, json};

use crate::negotiate::Output;
use crate::registry::Resource;
use crate::reply::partial;
use crate::status::{Result, Status};

/// What goes into a row's `object`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

impl Include {
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "" | "Metadata" => Ok(Self::Metadata),
            "None" => Ok(Self::None),
            "Object" => Ok(Self::Object),
            _ => Err(Status::bad_request(format!(
                "Unable to convert to Table as requested: includeObject: Invalid value: {text:?}: must be \
                 'Metadata', 'Object', 'None', or empty"
            ))),
        }
    }
}

/// The table of these objects, which are of the resource's version.
pub fn of(resource: &Resource, output: Output, objects: &[Value], include: Include, headed: bool) -> Value {
    let now = clock::now();
    let rules = &resource.rules;
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": (rules.row)(object, now)});
            match include {
                Include::None => row["object"] = Value::Null,
                Include::Metadata => row["object"] = partial(object, output),
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    let columns: Vec<Value> = match headed {
        true => rules.columns.iter().map(column).collect(),
        false => Vec::new(),
    };
    let version = match objects {
        [object] => object.pointer("/metadata/resourceVersion").cloned(),
        _ => None,
    };
    let metadata = version.map_or_else(|| json!({}), |version| json!({"resourceVersion": version}));
    json!({"kind": "Table", "apiVersion": output.meta_version(), "metadata": metadata,
        "columnDefinitions": columns, "rows": rows})
}

fn column(column: &sampan_kinds::Column) -> Value {
    json!({"name": column.name, "type": column.kind, "format": column.format,
        "description": column.description, "priority": column.priority})
}
