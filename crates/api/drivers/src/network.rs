//! The pod network as the runtime's caller sees it. Upstream counterpart: CNI's ADD, DEL and CHECK.
use std::net::IpAddr;
use std::path::Path;

use async_trait::async_trait;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("no free address left in the node's pod range {range}")]
    Exhausted { range: String },
    #[error("the node has no pod range yet (spec.podCIDR is not set)")]
    NoRange,
    #[error("pod {pod}: {message}")]
    Failed { pod: String, message: String },
}

/// A port of the node that leads to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

#[async_trait]
pub trait PodNetwork: Send + Sync {
    /// Connects the network namespace at `netns` for the pod with that UID and returns its addresses. Safe to repeat.
    async fn attach(
        &self,
        pod_uid: &str,
        netns: &Path,
        ports: &[HostPort],
    ) -> Result<Vec<IpAddr>, NetworkError>;
    /// Undoes [`Self::attach`]; also for a namespace that is gone already. Safe to repeat.
    async fn detach(&self, pod_uid: &str) -> Result<(), NetworkError>;
    /// Forgets what belongs to no pod of the list.
    async fn retain(&self, pod_uids: &[String]) -> Result<(), NetworkError>;
}
