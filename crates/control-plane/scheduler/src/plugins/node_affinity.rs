//! `nodeSelector` and node affinity, required and preferred.
//! Upstream counterpart: pkg/scheduler/framework/plugins/nodeaffinity.
use std::sync::Arc;

use crate::framework::NodeNames;
use crate::framework::selector::{PreferredNodeAffinity, RequiredNodeAffinity};
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, NodeInfo, Plugin, PodInfo, PreFilter, PreScore, Score, Verdict,
    default_normalize,
};
use crate::plugins::Descriptor;

pub const DESCRIPTOR: Descriptor =
    Descriptor { name: "NodeAffinity", weight: 2, new: |_| Box::new(NodeAffinity) };

struct NodeAffinity;

#[derive(Clone)]
struct Required(RequiredNodeAffinity);
#[derive(Clone)]
struct Preferred(PreferredNodeAffinity);

impl Plugin for NodeAffinity {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        let required = || RequiredNodeAffinity::of(pod.spec());
        match event {
            ClusterEvent::NodeAdded(node) => required().matches(node),
            ClusterEvent::NodeUpdated { old, new, change } if change.labels => {
                let required = required();
                !required.matches(old) && required.matches(new)
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
    fn as_pre_score(&self) -> Option<&dyn PreScore> {
        Some(self)
    }
    fn as_score(&self) -> Option<&dyn Score> {
        Some(self)
    }
}

/// The nodes that required terms name by `metadata.name`, where every term does.
fn named_nodes(pod: &PodInfo) -> Option<NodeNames> {
    let affinity = pod.spec().affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let mut all: Option<NodeNames> = None;
    for term in terms {
        let mut names: Option<NodeNames> = None;
        let fields = term.match_fields.iter().flatten();
        for field in fields.filter(|f| f.key == "metadata.name" && f.operator == "In") {
            let own: NodeNames = field.values.iter().flatten().cloned().collect();
            names = Some(match names {
                Some(names) => names.intersection(&own).cloned().collect(),
                None => own,
            });
        }
        all.get_or_insert_default().extend(names?);
    }
    all
}

impl PreFilter for NodeAffinity {
    fn pre_filter(
        &self,
        _cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>) {
        let required = RequiredNodeAffinity::of(pod.spec());
        if required.is_empty() {
            return (Verdict::Skip, None);
        }
        state.write(Required(required));
        match named_nodes(pod) {
            Some(names) if names.is_empty() => (Verdict::unresolvable("pod affinity terms conflict"), None),
            names => (Verdict::Success, names),
        }
    }
}

impl Filter for NodeAffinity {
    fn filter(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> Verdict {
        match state.read::<Required>() {
            Some(Required(required)) if !required.matches(&node.node) => {
                Verdict::unresolvable("node(s) didn't match Pod's node affinity/selector")
            }
            _ => Verdict::Success,
        }
    }
}

impl PreScore for NodeAffinity {
    fn pre_score(
        &self,
        _: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        _: &[Arc<NodeInfo>],
    ) -> Verdict {
        let affinity = pod.spec().affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        let terms = affinity.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_deref());
        let preferred = PreferredNodeAffinity::of(terms.unwrap_or_default());
        if preferred.is_empty() {
            return Verdict::Skip;
        }
        state.write(Preferred(preferred));
        Verdict::Success
    }
}

impl Score for NodeAffinity {
    fn score(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> i64 {
        state.read::<Preferred>().map_or(0, |p| p.0.score(&node.node))
    }
    fn normalize(&self, _state: &CycleState, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        default_normalize(scores, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node_info, pod};
    use serde_json::json;

    #[test]
    fn names_in_every_term_narrow_the_search() {
        let by_name = |names: &[&str]| json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": names}]});
        let with = |terms: serde_json::Value| {
            pod(
                "p",
                json!({"spec": {"containers": [], "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}}),
            )
        };
        let names = |list: &[&str]| Some(list.iter().map(|n| n.to_string()).collect::<NodeNames>());
        assert_eq!(named_nodes(&with(json!([by_name(&["a"]), by_name(&["b"])]))), names(&["a", "b"]));
        assert_eq!(named_nodes(&with(json!([by_name(&["a"]), {"matchExpressions": []}]))), None);
        assert_eq!(named_nodes(&pod("p", json!({}))), None);
    }

    #[test]
    fn preferred_terms_add_up() {
        let pod = pod(
            "p",
            json!({"spec": {"containers": [], "affinity": {"nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 10, "preference": {"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": ["arm64"]}]}},
                {"weight": 5, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}]}}}}),
        );
        let snapshot = crate::framework::Snapshot::default();
        let mut state = CycleState::default();
        assert!(NodeAffinity.pre_score(&Cycle { snapshot: &snapshot }, &mut state, &pod, &[]).is_success());
        let both =
            node_info("n", json!({"metadata": {"labels": {"kubernetes.io/arch": "arm64", "ssd": ""}}}));
        assert_eq!(NodeAffinity.score(&state, &pod, &both), 15);
        assert_eq!(NodeAffinity.score(&state, &pod, &node_info("m", json!({}))), 0);
    }
}
