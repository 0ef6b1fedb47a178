//! rbac.authorization.k8s.io/v1, one file a kind; rules and bindings' parts are shared.
pub mod binding;
pub mod cluster_role;
pub mod cluster_role_binding;
pub mod policy_rule;
pub mod role;
pub mod role_binding;

/// The group's name, which references in bindings default to.
pub const GROUP: &str = "rbac.authorization.k8s.io";
