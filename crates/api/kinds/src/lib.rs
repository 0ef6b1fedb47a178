//! The built-in kinds: one file a kind, `group/version/kind.rs`, each exporting one [`Kind`].
//!
//! Everything here is pure: defaults, validation, update strategy, printer columns. The API server runs them
//! in upstream's order; nothing here knows of HTTP, the store or the clock's reading but what it is handed.
pub mod apps;
pub mod batch;
pub mod coordination;
pub mod core;
pub mod default_table;
pub mod discovery;
pub mod events;
pub mod field;
pub mod ip;
pub mod kind;
pub mod label_selector;
pub mod meta;
pub mod names;
pub mod object;
pub mod quantity;
pub mod rbac;
pub mod registry;
pub mod table;

pub use field::{ErrorList, FieldError, Path};
pub use kind::{Column, Kind, Rest};
