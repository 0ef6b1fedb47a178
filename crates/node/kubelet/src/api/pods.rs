//! What the API needs to know of the node's pods, and how the kubelet answers.
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::kubelet::{ContainerRef, Kubelet, LookupError};

/// The node's pods as the API serves them. Names are the API's; what is found is what runs here.
pub trait Pods: Send + Sync {
    fn node_name(&self) -> String;
    /// A folder on the file system that the node's pods use.
    fn root_dir(&self) -> PathBuf;
    /// All pods of the node with their newest statuses.
    fn pods(&self) -> Vec<Arc<Pod>>;
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>>;
    /// The sandbox of the pod, where it has one.
    fn sandbox_id(&self, namespace: &str, name: &str) -> Option<String>;
    /// The newest container of that name, or the one before it.
    fn container(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        is_previous: bool,
    ) -> Result<ContainerRef, LookupError>;
    /// For `/configz`.
    fn configuration(&self) -> Value;
}

impl Pods for Kubelet {
    fn node_name(&self) -> String {
        self.config().node_name.clone()
    }

    fn root_dir(&self) -> PathBuf {
        self.config().root_dir.clone()
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        Kubelet::pods(self)
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        Kubelet::pod(self, namespace, name).ok()
    }

    fn sandbox_id(&self, namespace: &str, name: &str) -> Option<String> {
        Kubelet::sandbox_id(self, namespace, name).ok().flatten()
    }

    fn container(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        is_previous: bool,
    ) -> Result<ContainerRef, LookupError> {
        Kubelet::container(self, namespace, name, None, container, is_previous)
    }

    fn configuration(&self) -> Value {
        let config = self.config();
        json!({"kubeletconfig": {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "port": config.api_port,
            "maxPods": config.max_pods,
            "podPidsLimit": config.pod_pids_limit,
            "clusterDomain": config.cluster_domain,
            "clusterDNS": config.cluster_dns.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "resolvConf": config.resolv_conf,
            "allowedUnsafeSysctls": config.allowed_unsafe_sysctls,
            "registerNode": config.register,
            "systemReserved": config.reserved,
        }})
    }
}
