//! What all pods of a node share: the runtime, the network, volumes, events, and what is known of the node.
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::Client;
use parking_lot::Mutex;
use sampan_client::Informer;
use sampan_drivers::{PodNetwork, Runtime};
use sampan_kinds::quantity::Amount;
use sampan_volumes::{ObjectWatches, VolumeHost};
use tokio::sync::Semaphore;

use crate::config::KubeletConfig;
use crate::recorder::Recorder;
use crate::resources;

/// Shared by the pods' workers.
pub struct NodeServices {
    pub config: KubeletConfig,
    pub client: Client,
    pub runtime: Arc<dyn Runtime>,
    pub network: Arc<dyn PodNetwork>,
    pub volumes: VolumeHost,
    /// `None` where objects come from elsewhere (tests).
    pub watches: Option<ObjectWatches>,
    pub recorder: Recorder,
    pub services: Informer<Service>,
    pub node: Informer<Node>,
    pub pulls: Semaphore,
    /// Bounds requests to the API that carry statuses.
    pub writes: Semaphore,
    /// Pods that were let in, by UID.
    pub admitted: Mutex<HashMap<String, Arc<Pod>>>,
    /// What the group of burstable pods weighs, and the turn to say so.
    pub burstable_shares: Mutex<i64>,
    pub burstable_order: tokio::sync::Mutex<()>,
    pub hostname: String,
}

impl NodeServices {
    /// The node as the API has it, where it is known.
    pub fn this_node(&self) -> Option<Arc<Node>> {
        self.node.get("", &self.config.node_name)
    }

    pub fn memory_bytes(&self) -> i64 {
        resources::amount(Some(&self.volumes.allocatable.read()), "memory").map_or(0, Amount::value)
    }
}
