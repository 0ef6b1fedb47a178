//! Two pods cannot take the same port of a node. Upstream counterpart: pkg/scheduler/framework/plugins/nodeports.
use crate::framework::NodeNames;
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, NodeInfo, Plugin, PodInfo, PreFilter, Verdict,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor = Descriptor { name: "NodePorts", weight: 0, new: |_| Box::new(NodePorts) };

struct NodePorts;

impl Plugin for NodePorts {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        match event {
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::AssignedPodDeleted(gone) => {
                pod.ports.iter().any(|wanted| gone.ports.iter().any(|p| p.conflicts(wanted)))
            }
            _ => false,
        }
    }
    fn as_pre_filter(&self) -> Option<&dyn PreFilter> {
        Some(self)
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl PreFilter for NodePorts {
    fn pre_filter(&self, _: &Cycle<'_>, _: &mut CycleState, pod: &PodInfo) -> (Verdict, Option<NodeNames>) {
        (if pod.ports.is_empty() { Verdict::Skip } else { Verdict::Success }, None)
    }
}

impl Filter for NodePorts {
    fn filter(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        if pod.ports.iter().any(|wanted| node.ports.iter().any(|p| p.conflicts(wanted))) {
            return Verdict::unschedulable("node(s) didn't have free ports for the requested pod ports");
        }
        Verdict::Success
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node_info, pod};
    use serde_json::{Value, json};

    #[test]
    fn ports_conflict_by_address_protocol_and_number() {
        let taking =
            |port: Value| pod("p", json!({"spec": {"containers": [{"name": "c", "ports": [port]}]}}));
        let mut node = node_info("n", json!({}));
        node.add_pod(taking(json!({"containerPort": 1, "hostPort": 80, "hostIP": "10.0.0.1"})));
        for (port, wanted) in [
            (json!({"containerPort": 1, "hostPort": 80}), false),
            (json!({"containerPort": 1, "hostPort": 80, "hostIP": "10.0.0.2"}), true),
            (json!({"containerPort": 1, "hostPort": 80, "hostIP": "10.0.0.1", "protocol": "UDP"}), true),
            (json!({"containerPort": 1, "hostPort": 81}), true),
            (json!({"containerPort": 80}), true),
        ] {
            let text = port.to_string();
            let verdict = NodePorts.filter(&CycleState::default(), &taking(port), &node);
            assert_eq!(verdict.is_success(), wanted, "{text}");
        }
    }
}
