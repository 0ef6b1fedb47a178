//! Nodes repel pods that do not tolerate their taints. Upstream counterparts:
//! pkg/scheduler/framework/plugins/tainttoleration, component-helpers/scheduling/corev1/helpers.go.
use k8s_openapi::api::core::v1::{Node, Taint, Toleration};
use std::sync::Arc;

use crate::framework::{
    ClusterEvent, CycleState, Filter, NodeInfo, Plugin, PodInfo, Score, Verdict, default_normalize,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "TaintToleration", weight: 3, new: |_| Box::new(TaintToleration) };

struct TaintToleration;

/// Whether one toleration covers the taint.
pub fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|t| covers(t, taint))
}

fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    let empty = |text: &Option<String>| text.as_deref().unwrap_or_default().to_string();
    let (effect, key) = (empty(&toleration.effect), empty(&toleration.key));
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => empty(&toleration.value) == empty(&taint.value),
        "Exists" => true,
        _ => false,
    }
}

/// The first taint that keeps the pod away.
pub fn untolerated<'a>(taints: &'a [Taint], pod: &PodInfo) -> Option<&'a Taint> {
    let hard = |t: &&Taint| t.effect == "NoSchedule" || t.effect == "NoExecute";
    let tolerations = pod.spec().tolerations.as_deref().unwrap_or_default();
    taints.iter().filter(hard).find(|t| !tolerates(tolerations, t))
}

fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default()
}

impl Plugin for TaintToleration {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        match event {
            ClusterEvent::NodeAdded(node) => untolerated(taints(node), pod).is_none(),
            ClusterEvent::NodeUpdated { old, new, change } => {
                change.taints
                    && untolerated(taints(old), pod).is_some()
                    && untolerated(taints(new), pod).is_none()
            }
            ClusterEvent::PodUpdated { new, change, .. } => change.tolerations && new.uid == pod.uid,
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

impl Filter for TaintToleration {
    fn filter(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        match untolerated(node.taints(), pod) {
            None => Verdict::Success,
            Some(_) => Verdict::unresolvable("node(s) had untolerated taint(s)"),
        }
    }
}

impl Score for TaintToleration {
    fn score(&self, _state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> i64 {
        let soft = node.taints().iter().filter(|t| t.effect == "PreferNoSchedule");
        let tolerations = pod.spec().tolerations.as_deref().unwrap_or_default();
        soft.filter(|t| !tolerates(tolerations, t)).count() as i64
    }
    fn normalize(&self, _state: &CycleState, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        default_normalize(scores, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node_info, pod};
    use serde_json::json;

    #[test]
    fn tolerations_cover_taints_as_upstream() {
        for (toleration, taint, wanted) in [
            (
                json!({"key": "a", "operator": "Exists"}),
                json!({"key": "a", "value": "x", "effect": "NoSchedule"}),
                true,
            ),
            (
                json!({"key": "a", "value": "x"}),
                json!({"key": "a", "value": "x", "effect": "NoExecute"}),
                true,
            ),
            (
                json!({"key": "a", "value": "y"}),
                json!({"key": "a", "value": "x", "effect": "NoExecute"}),
                false,
            ),
            (json!({"operator": "Exists"}), json!({"key": "a", "effect": "NoSchedule"}), true),
            (
                json!({"key": "a", "operator": "Exists", "effect": "NoExecute"}),
                json!({"key": "a", "effect": "NoSchedule"}),
                false,
            ),
            (
                json!({"key": "b", "operator": "Exists"}),
                json!({"key": "a", "effect": "PreferNoSchedule"}),
                true,
            ),
        ] {
            let text = format!("{toleration} {taint}");
            let pod = pod("p", json!({"spec": {"containers": [], "tolerations": [toleration]}}));
            let node = node_info("n", json!({"spec": {"taints": [taint]}}));
            let verdict = TaintToleration.filter(&CycleState::default(), &pod, &node);
            assert_eq!(verdict.is_success(), wanted, "{text}");
        }
        let soft = node_info("n", json!({"spec": {"taints": [{"key": "a", "effect": "PreferNoSchedule"}]}}));
        assert_eq!(TaintToleration.score(&CycleState::default(), &pod("p", json!({})), &soft), 1);
        let mut scores = [1, 0, 2];
        TaintToleration.normalize(&CycleState::default(), &mut scores, &[]);
        assert_eq!(scores, [50, 100, 0]);
    }
}
