//! upgrade.sampan.io/v1.
pub mod plan;
