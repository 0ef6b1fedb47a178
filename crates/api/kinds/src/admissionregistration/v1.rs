//! admissionregistration.k8s.io/v1, one file a kind; webhooks', rules' and policies' parts are shared.
pub mod match_resources;
pub mod mutating_admission_policy;
pub mod mutating_admission_policy_binding;
pub mod mutating_webhook_configuration;
pub mod policy_binding;
pub mod validating_admission_policy;
pub mod validating_admission_policy_binding;
pub mod validating_webhook_configuration;
pub mod webhook;

/// The group's name.
pub const GROUP: &str = "admissionregistration.k8s.io";
