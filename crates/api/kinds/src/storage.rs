//! The group storage.k8s.io.
pub mod v1;
