//! The controllers of the control plane: one file a controller, one line a controller in [`registry`].
//!
//! Upstream counterpart: cmd/kube-controller-manager and pkg/controller. Each controller sees the cluster through its
//! own client (so that RBAC and field managers tell them apart) and the process's shared informers, keeps a queue of
//! keys, and reconciles one key at a time. Nothing runs on a timer: an idle cluster costs nothing.
//!
//! Deliberate differences: there is no leader election here (the caller starts them on one server), and no periodic
//! resync: what a controller missed it learns from its informers' relists.
pub mod api_error;
pub mod context;
pub mod controller;
pub mod events;
pub mod registry;

pub mod controller_ref;
pub mod discovery;
pub mod expectations;
pub mod int_or_percent;
pub mod label_selector;
pub mod node_fit;
pub mod pod_control;
pub mod pod_state;
pub mod revision_history;
pub mod service_endpoints;
pub mod template_hash;

pub mod cluster_role_aggregation;
pub mod cron_job;
pub mod daemon_set;
pub mod deployment;
pub mod disruption;
pub mod endpoint_slice;
pub mod endpoint_slice_mirroring;
pub mod endpoints;
pub mod garbage_collector;
pub mod job;
pub mod namespace;
pub mod node_ipam;
pub mod node_lifecycle;
pub mod plan;
pub mod pod_gc;
pub mod replica_set;
pub mod replication;
pub mod resource_quota;
pub mod root_ca;
pub mod service_account;
pub mod stateful_set;
pub mod taint_eviction;
pub mod token_cleaner;
pub mod ttl_after_finished;

pub use context::{Clients, Context, Options, Scope};
pub use registry::{REGISTRY, start};
