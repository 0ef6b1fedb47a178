//! The group resource.k8s.io.
pub mod v1;
