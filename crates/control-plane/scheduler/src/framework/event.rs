//! What happens in the cluster, as far as it may make a pod schedulable.
//! Upstream counterpart: pkg/scheduler/framework/events.go; the many actions are the fields of [`NodeChange`] and
//! [`PodChange`].
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};

use super::PodInfo;

/// What changed in a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeChange {
    pub allocatable: bool,
    pub labels: bool,
    pub taints: bool,
}

impl NodeChange {
    pub fn between(old: &Node, new: &Node) -> Self {
        let allocatable =
            |n: &Node| n.status.as_ref().and_then(|s| s.allocatable.clone()).unwrap_or_default();
        let taints = |n: &Node| n.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
        let unschedulable = |n: &Node| n.spec.as_ref().and_then(|s| s.unschedulable) == Some(true);
        Self {
            allocatable: allocatable(old) != allocatable(new),
            labels: old.metadata.labels != new.metadata.labels,
            taints: taints(old) != taints(new) || (unschedulable(old) && !unschedulable(new)),
        }
    }

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// What changed in a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodChange {
    pub labels: bool,
    pub scaled_down: bool,
    pub gates_gone: bool,
    pub tolerations: bool,
}

impl PodChange {
    pub fn between(old: &PodInfo, new: &PodInfo) -> Self {
        let gates = |p: &Pod| p.spec.as_ref().and_then(|s| s.scheduling_gates.as_ref()).map_or(0, Vec::len);
        let tolerations = |p: &Pod| p.spec.as_ref().and_then(|s| s.tolerations.as_ref()).map_or(0, Vec::len);
        Self {
            labels: old.pod.metadata.labels != new.pod.metadata.labels,
            scaled_down: old.requests.exceeds_anywhere(&new.requests),
            gates_gone: gates(&old.pod) > 0 && gates(&new.pod) == 0,
            tolerations: tolerations(&old.pod) != tolerations(&new.pod),
        }
    }
}

#[derive(Clone, Debug)]
pub enum ClusterEvent {
    NodeAdded(Arc<Node>),
    NodeUpdated {
        old: Arc<Node>,
        new: Arc<Node>,
        change: NodeChange,
    },
    NodeDeleted(Arc<Node>),
    /// Of a pod that has a node.
    AssignedPodAdded(Arc<PodInfo>),
    AssignedPodUpdated {
        old: Arc<PodInfo>,
        new: Arc<PodInfo>,
        change: PodChange,
    },
    /// Also of a pod that gave back what it was assumed or nominated to have.
    AssignedPodDeleted(Arc<PodInfo>),
    /// Of a pod without a node: only itself is concerned.
    PodUpdated {
        old: Arc<PodInfo>,
        new: Arc<PodInfo>,
        change: PodChange,
    },
    /// Claims, volumes or storage classes changed in this namespace ("" is everywhere).
    StorageChanged {
        namespace: String,
    },
    NamespaceChanged,
    /// The platforms of this image are known, or asking took too long.
    PlatformsAnswered {
        image: String,
    },
    /// The pod with that UID should be looked at again.
    Activate {
        uid: Arc<str>,
    },
    /// The pod waited for too long.
    Timeout,
}
