//! flowcontrol.apiserver.k8s.io/v1, one file a kind.
pub mod flow_schema;
pub mod priority_level_configuration;
