//! resource.k8s.io/v1, one file a kind.
pub mod device_class;
pub mod resource_claim;
pub mod resource_claim_template;
pub mod resource_slice;

/// The group's name.
pub const GROUP: &str = "resource.k8s.io";
