//! The built-in kinds: one file a kind, `group/version/kind.rs`, each exporting one [`Kind`].
//!
//! Everything here is pure: defaults, validation, update strategy, printer columns. The API server runs them
//! in upstream's order; nothing here knows of HTTP, the store or the clock's reading but what it is handed.
pub mod admissionregistration;
pub mod apiextensions;
pub mod apiregistration;
pub mod apps;
pub mod autoscaling;
pub mod batch;
pub mod certificates;
pub mod coordination;
pub mod core;
pub mod coverage;
pub mod default_table;
pub mod discovery;
pub mod events;
pub mod field;
pub mod flowcontrol;
pub mod ip;
pub mod kind;
pub mod label_selector;
pub mod meta;
pub mod names;
pub mod networking;
pub mod node;
pub mod object;
pub mod policy;
pub mod quantity;
pub mod quota;
pub mod rbac;
pub mod registry;
pub mod resource;
pub mod scheduling;
pub mod storage;
pub mod table;
pub mod upgrade;
pub mod version;

pub use field::{ErrorList, FieldError, Path};
pub use kind::{Column, Kind, Rest};
