//! apps/v1, one file a kind; what the workloads have in common is in `workload`.
pub mod controller_revision;
pub mod daemon_set;
pub mod deployment;
pub mod replica_set;
pub mod stateful_set;
pub mod workload;
