//! The schema of the Kubernetes API: one table of facts, one [`Type`], and the walks over it.
//!
//! Everything that upstream generates per kind (deep copies aside) is one walk over a `Type` here: reading and
//! checking JSON, protobuf, patches, apply and OpenAPI, for built-in and custom kinds alike.

pub mod apply;
pub mod conform;
pub mod decode;
mod descriptions;
pub mod openapi;
pub mod patch;
pub mod proto;
pub mod quantity;
mod table;
pub mod time;
pub mod types;

pub use types::{
    Element, Field, GroupVersionKind, ListKind, MapKind, Omit, PatchStrategy, ResourceFact, Rules, Shape,
    Text, Type, TypeRef, Wire, all, by_gvk, by_name, resources,
};
