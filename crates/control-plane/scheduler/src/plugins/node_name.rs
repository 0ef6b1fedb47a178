//! A pod that names its node runs only there. Upstream counterpart: pkg/scheduler/framework/plugins/nodename.
use crate::framework::{ClusterEvent, CycleState, Filter, NodeInfo, Plugin, PodInfo, Verdict};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor = Descriptor { name: "NodeName", weight: 0, new: |_| Box::new(NodeName) };

struct NodeName;

impl Plugin for NodeName {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, _pod: &PodInfo, event: &ClusterEvent) -> bool {
        matches!(event, ClusterEvent::NodeAdded(_))
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for NodeName {
    fn filter(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        match pod.node_name() {
            "" => Verdict::Success,
            name if name == node.name => Verdict::Success,
            _ => Verdict::unresolvable("node(s) didn't match the requested node name"),
        }
    }
}
