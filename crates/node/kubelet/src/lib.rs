//! The kubelet: what a node does with the pods that are bound to it.
//!
//! Upstream counterpart: pkg/kubelet. Each pod has a worker, a state machine of its own (`worker`); what it decides is
//! pure and tested by itself (`plan`, `status`, `container_status`). It sees the cluster through a `kube::Client` and the
//! machine through the drivers' traits, `Runtime` and `PodNetwork`.
//!
//! Deliberately not here: device plugins, the CPU and memory managers' static policies, in-place resize, swap, and
//! preemption of running pods in favour of critical ones.
pub mod admission;
pub mod api;
pub mod back_off;
pub mod config;
pub mod container_config;
pub mod container_status;
pub mod dns;
pub mod env;
pub mod expansion;
pub mod hooks;
pub mod kubelet;
pub mod last_known;
pub mod local_storage;
pub mod logs;
pub mod node;
pub mod node_services;
pub mod plan;
pub mod pressure;
pub mod probes;
pub mod pull;
pub mod qos_groups;
pub mod recorder;
pub mod resources;
pub mod security;
pub mod static_pods;
pub mod status;
pub mod worker;

pub use config::KubeletConfig;
pub use kubelet::{ContainerRef, Kubelet, LookupError};
