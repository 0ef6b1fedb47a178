//! A node must have what a pod requests; emptier nodes are better (LeastAllocated).
//! Upstream counterparts: fit.go and least_allocated.go in pkg/scheduler/framework/plugins/noderesources.
//!
//! Deliberate difference: requests are the spec's; resizes in place and dynamic resources are not counted.
use std::borrow::Cow;

use k8s_openapi::api::core::v1::Node;

use crate::framework::{
    ClusterEvent, CycleState, Filter, MAX_NODE_SCORE, NodeInfo, Plugin, PodInfo, Score, Verdict,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "NodeResourcesFit", weight: 1, new: |_| Box::new(NodeResourcesFit) };

struct NodeResourcesFit;

/// What the node lacks for the pod, and whether it would lack it even when empty.
pub fn insufficient(pod: &PodInfo, node: &NodeInfo) -> (Vec<Cow<'static, str>>, bool) {
    let (mut reasons, mut hopeless) = (Vec::new(), false);
    let (wanted, all, used) = (&pod.requests, &node.allocatable, &node.requested);
    if node.pods.len() as i64 + 1 > all.pods {
        reasons.push("Too many pods".into());
    }
    let mut check = |wanted: i64, all: i64, used: i64, reason: &dyn Fn() -> Cow<'static, str>| {
        if wanted > 0 && wanted > all - used {
            reasons.push(reason());
            hopeless |= wanted > all;
        }
    };
    check(wanted.milli_cpu, all.milli_cpu, used.milli_cpu, &|| "Insufficient cpu".into());
    check(wanted.memory_bytes, all.memory_bytes, used.memory_bytes, &|| "Insufficient memory".into());
    check(wanted.ephemeral_storage_bytes, all.ephemeral_storage_bytes, used.ephemeral_storage_bytes, &|| {
        "Insufficient ephemeral-storage".into()
    });
    for (name, amount) in &wanted.scalar {
        let reason = || Cow::Owned(format!("Insufficient {name}"));
        check(*amount, all.scalar_of(name), used.scalar_of(name), &reason);
    }
    (reasons, hopeless)
}

impl Plugin for NodeResourcesFit {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        let fits_empty =
            |node: &std::sync::Arc<Node>| insufficient(pod, &NodeInfo::of(node.clone())).0.is_empty();
        match event {
            ClusterEvent::AssignedPodDeleted(_) => true,
            ClusterEvent::AssignedPodUpdated { change, .. } => change.scaled_down,
            ClusterEvent::PodUpdated { new, change, .. } => change.scaled_down && new.uid == pod.uid,
            ClusterEvent::NodeAdded(node) => fits_empty(node),
            ClusterEvent::NodeUpdated { old, new, change } if change.allocatable => {
                let (old, now) =
                    (NodeInfo::of(old.clone()).allocatable, NodeInfo::of(new.clone()).allocatable);
                fits_empty(new) && (now.pods > old.pods || now.exceeds_anywhere(&old))
            }
            _ => false,
        }
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
    fn as_score(&self) -> Option<&dyn Score> {
        Some(self)
    }
}

impl Filter for NodeResourcesFit {
    fn filter(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        match insufficient(pod, node) {
            (reasons, _) if reasons.is_empty() => Verdict::Success,
            (reasons, true) => Verdict::Unresolvable(reasons),
            (reasons, false) => Verdict::Unschedulable(reasons),
        }
    }
}

impl Score for NodeResourcesFit {
    fn score(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> i64 {
        let of = |requested: i64, all: i64| match all {
            0 => None,
            all if requested > all => Some(0),
            all => Some((all - requested) * MAX_NODE_SCORE / all),
        };
        let cpu = of(node.non_zero.0 + pod.non_zero.0, node.allocatable.milli_cpu);
        let memory = of(node.non_zero.1 + pod.non_zero.1, node.allocatable.memory_bytes);
        match (cpu, memory) {
            (Some(cpu), Some(memory)) => (cpu + memory) / 2,
            (one, other) => one.or(other).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node_info, pod};
    use serde_json::{Value, json};

    fn asking(requests: Value) -> std::sync::Arc<PodInfo> {
        pod("p", json!({"spec": {"containers": [{"name": "c", "resources": {"requests": requests}}]}}))
    }

    #[test]
    fn what_is_missing_is_said_as_upstream() {
        let mut node = node_info(
            "n",
            json!({"status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "2", "example.com/gpu": "1"}}}),
        );
        node.add_pod(asking(json!({"cpu": "1500m", "memory": "512Mi"})));
        for (requests, wanted) in [
            (json!({"cpu": "500m"}), Verdict::Success),
            (json!({"cpu": "501m"}), Verdict::unschedulable("Insufficient cpu")),
            (json!({"cpu": "3"}), Verdict::unresolvable("Insufficient cpu")),
            (json!({"memory": "513Mi"}), Verdict::unschedulable("Insufficient memory")),
            (json!({"example.com/gpu": "2"}), Verdict::unresolvable("Insufficient example.com/gpu")),
            (json!({"ephemeral-storage": "1"}), Verdict::unresolvable("Insufficient ephemeral-storage")),
            (
                json!({"cpu": "1", "memory": "1Gi"}),
                Verdict::Unschedulable(vec!["Insufficient cpu".into(), "Insufficient memory".into()]),
            ),
        ] {
            let text = requests.to_string();
            assert_eq!(
                NodeResourcesFit.filter(&CycleState::default(), &asking(requests), &node),
                wanted,
                "{text}"
            );
        }
        node.add_pod(pod("q", json!({})));
        let verdict = NodeResourcesFit.filter(&CycleState::default(), &asking(json!({})), &node);
        assert_eq!(verdict, Verdict::unschedulable("Too many pods"));
    }

    #[test]
    fn emptier_nodes_score_higher() {
        let node =
            node_info("n", json!({"status": {"allocatable": {"cpu": "4", "memory": "10000", "pods": "9"}}}));
        let pod = asking(json!({"cpu": "3", "memory": "5000"}));
        assert_eq!(NodeResourcesFit.score(&CycleState::default(), &pod, &node), (25 + 50) / 2);
    }
}
