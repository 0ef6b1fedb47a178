//! Cordoned nodes take only pods that tolerate it.
//! Upstream counterpart: pkg/scheduler/framework/plugins/nodeunschedulable.
use k8s_openapi::api::core::v1::{Node, Taint};

use super::taint_toleration::tolerates;
use crate::framework::{ClusterEvent, CycleState, Filter, NodeInfo, Plugin, PodInfo, Verdict};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "NodeUnschedulable", weight: 0, new: |_| Box::new(NodeUnschedulable) };

struct NodeUnschedulable;

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true)
}

fn tolerates_cordon(pod: &PodInfo) -> bool {
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".to_string(),
        effect: "NoSchedule".to_string(),
        ..Taint::default()
    };
    tolerates(pod.spec().tolerations.as_deref().unwrap_or_default(), &taint)
}

impl Plugin for NodeUnschedulable {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        match event {
            ClusterEvent::NodeAdded(node) => !is_cordoned(node),
            ClusterEvent::NodeUpdated { old, new, .. } => is_cordoned(old) && !is_cordoned(new),
            ClusterEvent::PodUpdated { new, change, .. } => {
                change.tolerations && new.uid == pod.uid && tolerates_cordon(new)
            }
            _ => false,
        }
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for NodeUnschedulable {
    fn filter(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        if !node.unschedulable() || tolerates_cordon(pod) {
            return Verdict::Success;
        }
        Verdict::unresolvable("node(s) were unschedulable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node_info, pod};
    use serde_json::json;

    #[test]
    fn cordoned_nodes_need_a_toleration() {
        let cordoned = node_info("n", json!({"spec": {"unschedulable": true}}));
        let tolerant = json!({"spec": {"containers": [], "tolerations": [
            {"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]}});
        let filter = |p: &PodInfo, n: &NodeInfo| NodeUnschedulable.filter(&CycleState::default(), p, n);
        assert_eq!(filter(&pod("p", tolerant), &cordoned), Verdict::Success);
        assert_eq!(
            filter(&pod("p", json!({})), &cordoned),
            Verdict::unresolvable("node(s) were unschedulable")
        );
        assert_eq!(filter(&pod("p", json!({})), &node_info("n", json!({}))), Verdict::Success);
    }
}
