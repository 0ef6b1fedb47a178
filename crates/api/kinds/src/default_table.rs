//! The table of kinds without columns of their own upstream: the name and the moment of creation.
//!
//! Upstream counterpart: NewDefaultTableConvertor in k8s.io/apiserver/pkg/registry/rest.
use jiff::Timestamp;
use serde_json::Value;

use crate::kind::Column;
use crate::object::text;
use crate::table;

pub const COLUMNS: &[Column] =
    &[Column::NAME, Column { kind: "date", ..Column::string("Created At", "When the object was created.") }];

pub fn row(object: &Value, _: Timestamp) -> Vec<Value> {
    vec![table::name(object), text(object, "/metadata/creationTimestamp").into()]
}
