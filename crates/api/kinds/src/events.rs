//! The group events.k8s.io.
pub mod v1;
