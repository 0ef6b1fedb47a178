//! Pods that want to be near or away from other pods. Upstream counterpart: pkg/scheduler/framework/plugins/interpodaffinity.
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;

use crate::framework::pod_info::AffinityTerm;
use crate::framework::selector::{Labels, labels_of};
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, MAX_NODE_SCORE, NodeInfo, NodeNames, Plugin, PodInfo, PreFilter,
    PreScore, Score, Verdict,
};
use crate::plugins::Descriptor;
use crate::sources::Sources;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "InterPodAffinity",
    weight: 2,
    new: |cx| Box::new(InterPodAffinity { sources: cx.sources.clone() }),
};

/// What a running pod's required affinity to the new one is worth.
const HARD_WEIGHT: i64 = 1;

struct InterPodAffinity {
    sources: Sources,
}

/// Matching pods by (topology key, domain).
#[derive(Clone, Default)]
struct Counts(HashMap<String, HashMap<String, i64>>);

impl Counts {
    fn add(&mut self, node: &NodeInfo, key: &str, value: i64) {
        let Some(domain) = node.labels().get(key) else { return };
        if !self.0.contains_key(key) {
            self.0.insert(key.to_string(), HashMap::new());
        }
        if let Some(domains) = self.0.get_mut(key) {
            match domains.get_mut(domain) {
                Some(count) => *count += value,
                None => {
                    domains.insert(domain.clone(), value);
                }
            }
        }
    }

    fn get(&self, key: &str, domain: &str) -> i64 {
        self.0.get(key).and_then(|d| d.get(domain)).copied().unwrap_or(0)
    }

    fn none(&self) -> bool {
        self.0.values().flat_map(HashMap::values).all(|n| *n == 0)
    }

    /// Whether the node lies in a domain with any of them.
    fn touches(&self, node: &NodeInfo) -> bool {
        let there = |(key, domains): (&String, &HashMap<String, i64>)| {
            node.labels().get(key).and_then(|d| domains.get(d)).is_some_and(|n| *n > 0)
        };
        self.0.iter().any(there)
    }

    fn sum(&self, node: &NodeInfo) -> i64 {
        let there =
            |(key, domains): (&String, &HashMap<String, i64>)| domains.get(node.labels().get(key)?).copied();
        self.0.iter().filter_map(there).sum()
    }
}

#[derive(Clone)]
struct Filtering {
    namespace_labels: Labels,
    affinity_terms: Vec<AffinityTerm>,
    anti_affinity_terms: Vec<AffinityTerm>,
    /// Running pods that want the new one away.
    existing_anti_affinity: Counts,
    affinity: Counts,
    anti_affinity: Counts,
}

#[derive(Clone)]
struct Scoring(Counts);

static NO_LABELS: Labels = Labels::new();

/// All terms together must mean the pod.
fn all_match(terms: &[AffinityTerm], pod: &PodInfo) -> bool {
    !terms.is_empty() && terms.iter().all(|t| t.matches(&pod.namespace, pod.labels(), &NO_LABELS))
}

impl Filtering {
    fn change(&mut self, pod: &PodInfo, other: &PodInfo, node: &NodeInfo, delta: i64) {
        for term in &other.required_anti_affinity {
            if term.matches(&pod.namespace, pod.labels(), &self.namespace_labels) {
                self.existing_anti_affinity.add(node, &term.topology_key, delta);
            }
        }
        self.count_incoming(other, node, delta);
    }

    fn count_incoming(&mut self, other: &PodInfo, node: &NodeInfo, delta: i64) {
        if all_match(&self.affinity_terms, other) {
            self.affinity_terms.iter().for_each(|t| self.affinity.add(node, &t.topology_key, delta));
        }
        for term in &self.anti_affinity_terms {
            if term.matches(&other.namespace, other.labels(), &NO_LABELS) {
                self.anti_affinity.add(node, &term.topology_key, delta);
            }
        }
    }

    /// The first pod of a group that wants to be together finds nobody: it may start anywhere.
    fn satisfies_affinity(&self, pod: &PodInfo, node: &NodeInfo) -> bool {
        let mut near = true;
        for term in &self.affinity_terms {
            let Some(domain) = node.labels().get(&term.topology_key) else { return false };
            near &= self.affinity.get(&term.topology_key, domain) > 0;
        }
        near || (self.affinity.none() && all_match(&self.affinity_terms, pod))
    }

    fn satisfies_anti_affinity(&self, node: &NodeInfo) -> bool {
        self.anti_affinity_terms.iter().all(|term| {
            let domain = node.labels().get(&term.topology_key);
            domain.is_none_or(|d| self.anti_affinity.get(&term.topology_key, d) <= 0)
        })
    }
}

impl InterPodAffinity {
    fn namespace_labels(&self, namespace: &str) -> Labels {
        self.sources.namespaces.get("", namespace).and_then(|n| n.metadata.labels.clone()).unwrap_or_default()
    }

    /// The incoming pod's terms with the namespaces that their selectors select now.
    fn unrolled(&self, terms: &[AffinityTerm]) -> Vec<AffinityTerm> {
        let unroll = |term: &AffinityTerm| {
            let mut term = term.clone();
            if !term.namespace_selector.is_empty() {
                let all = self.sources.namespaces.list();
                let selected =
                    all.iter().filter(|n| term.namespace_selector.matches(labels_of(&n.metadata.labels)));
                term.namespaces.extend(selected.filter_map(|n| n.metadata.name.clone()));
                term.namespace_selector = crate::framework::Selector::nothing();
            }
            term
        };
        terms.iter().map(unroll).collect()
    }
}

fn topology<'a>(node: &'a Node, term: &AffinityTerm) -> Option<&'a String> {
    labels_of(&node.metadata.labels).get(&term.topology_key)
}

impl Plugin for InterPodAffinity {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        let (near, away) = (&pod.required_affinity, &pod.required_anti_affinity);
        let (near, away) = (self.unrolled(near), self.unrolled(away));
        match event {
            ClusterEvent::AssignedPodAdded(other) => all_match(&near, other),
            ClusterEvent::AssignedPodUpdated { old, new, change } if change.labels => {
                (!all_match(&near, old) && all_match(&near, new))
                    || (all_match(&away, old) && !all_match(&away, new))
            }
            ClusterEvent::AssignedPodDeleted(other) => {
                all_match(&away, other) || all_match(&self.unrolled(&other.required_anti_affinity), pod)
            }
            ClusterEvent::PodUpdated { new, change, .. } => change.labels && new.uid == pod.uid,
            ClusterEvent::NodeAdded(node) => {
                !away.is_empty() || near.iter().any(|t| topology(node, t).is_some())
            }
            ClusterEvent::NodeUpdated { old, new, change } if change.labels => {
                let moved = |t: &AffinityTerm| topology(old, t) != topology(new, t);
                near.iter().any(|t| moved(t) && topology(new, t).is_some())
                    || away.iter().any(|t| moved(t) && topology(old, t).is_some())
            }
            ClusterEvent::NamespaceChanged => true,
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

impl PreFilter for InterPodAffinity {
    fn pre_filter(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>) {
        let own = !pod.required_affinity.is_empty() || !pod.required_anti_affinity.is_empty();
        if !own && cx.snapshot.with_required_anti_affinity().next().is_none() {
            return (Verdict::Skip, None);
        }
        let mut filtering = Filtering {
            namespace_labels: self.namespace_labels(&pod.namespace),
            affinity_terms: self.unrolled(&pod.required_affinity),
            anti_affinity_terms: self.unrolled(&pod.required_anti_affinity),
            existing_anti_affinity: Counts::default(),
            affinity: Counts::default(),
            anti_affinity: Counts::default(),
        };
        for node in cx.snapshot.with_required_anti_affinity() {
            for term in node.with_required_anti_affinity.iter().flat_map(|p| &p.required_anti_affinity) {
                if term.matches(&pod.namespace, pod.labels(), &filtering.namespace_labels) {
                    filtering.existing_anti_affinity.add(node, &term.topology_key, 1);
                }
            }
        }
        if own {
            for node in &cx.snapshot.nodes {
                for group in &node.groups {
                    filtering.count_incoming(&group.sample, node, group.count);
                }
            }
        } else if filtering.existing_anti_affinity.none() {
            return (Verdict::Skip, None);
        }
        state.write(filtering);
        (Verdict::Success, None)
    }
    fn add_pod(&self, state: &mut CycleState, pod: &PodInfo, added: &PodInfo, node: &NodeInfo) {
        if let Some(filtering) = state.get_mut::<Filtering>() {
            filtering.change(pod, added, node, 1);
        }
    }
    fn remove_pod(&self, state: &mut CycleState, pod: &PodInfo, removed: &PodInfo, node: &NodeInfo) {
        if let Some(filtering) = state.get_mut::<Filtering>() {
            filtering.change(pod, removed, node, -1);
        }
    }
}

impl Filter for InterPodAffinity {
    fn filter(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        let Some(filtering) = state.read::<Filtering>() else { return Verdict::Success };
        if !filtering.satisfies_affinity(pod, node) {
            return Verdict::unresolvable("node(s) didn't match pod affinity rules");
        }
        if !filtering.satisfies_anti_affinity(node) {
            return Verdict::unschedulable("node(s) didn't match pod anti-affinity rules");
        }
        if filtering.existing_anti_affinity.touches(node) {
            return Verdict::unschedulable("node(s) didn't satisfy existing pods anti-affinity rules");
        }
        Verdict::Success
    }
}

impl PreScore for InterPodAffinity {
    fn pre_score(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        _: &[Arc<NodeInfo>],
    ) -> Verdict {
        let (near, away) = (&pod.preferred_affinity, &pod.preferred_anti_affinity);
        let own = !near.is_empty() || !away.is_empty();
        if !own && cx.snapshot.with_affinity().next().is_none() {
            return Verdict::Skip;
        }
        let namespace_labels = self.namespace_labels(&pod.namespace);
        let mut counts = Counts::default();
        if own {
            let (near, away) = (self.unrolled(near), self.unrolled(away));
            for node in &cx.snapshot.nodes {
                for group in &node.groups {
                    let other = &group.sample;
                    for (term, sign) in near.iter().map(|t| (t, 1)).chain(away.iter().map(|t| (t, -1))) {
                        if term.matches(&other.namespace, other.labels(), &NO_LABELS) {
                            counts.add(node, &term.topology_key, sign * term.weight * group.count);
                        }
                    }
                }
            }
        }
        for node in cx.snapshot.with_affinity() {
            for other in &node.with_affinity {
                let hard = other.required_affinity.iter().map(|t| (t, HARD_WEIGHT));
                let soft = other.preferred_affinity.iter().map(|t| (t, t.weight));
                let anti = other.preferred_anti_affinity.iter().map(|t| (t, -t.weight));
                for (term, weight) in hard.chain(soft).chain(anti) {
                    if term.matches(&pod.namespace, pod.labels(), &namespace_labels) {
                        counts.add(node, &term.topology_key, weight);
                    }
                }
            }
        }
        if counts.0.is_empty() {
            return Verdict::Skip;
        }
        state.write(Scoring(counts));
        Verdict::Success
    }
}

impl Score for InterPodAffinity {
    fn score(&self, state: &CycleState, _pod: &PodInfo, node: &NodeInfo) -> i64 {
        state.read::<Scoring>().map_or(0, |s| s.0.sum(node))
    }

    fn normalize(&self, _state: &CycleState, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        let (min, max) =
            (scores.iter().min().copied().unwrap_or(0), scores.iter().max().copied().unwrap_or(0));
        for score in scores {
            *score = if max > min { MAX_NODE_SCORE * (*score - min) / (max - min) } else { 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framework::Snapshot;
    use crate::testing::{node_info, pod};
    use serde_json::{Value, json};

    const NEAR: &str = "node(s) didn't match pod affinity rules";
    const AWAY: &str = "node(s) didn't match pod anti-affinity rules";
    const EXISTING: &str = "node(s) didn't satisfy existing pods anti-affinity rules";

    fn wanting(name: &str, kind: &str, app: &str, key: &str) -> Arc<PodInfo> {
        let term = json!([{"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": key}]);
        let affinity = json!({kind: {"requiredDuringSchedulingIgnoredDuringExecution": term}});
        pod(
            name,
            json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [], "affinity": affinity}}),
        )
    }

    fn node(name: &str, arch: Value, pods: &[Arc<PodInfo>]) -> Arc<NodeInfo> {
        let mut node = node_info(name, json!({"metadata": {"labels": {"arch": arch}}}));
        pods.iter().for_each(|p| node.add_pod(p.clone()));
        Arc::new(node)
    }

    #[test]
    fn rules_hold_in_both_directions() {
        let plugin = InterPodAffinity { sources: Sources::detached() };
        let plain = pod("plain", json!({"metadata": {"labels": {"app": "a"}}}));
        let hermit = wanting("hermit", "podAntiAffinity", "a", "arch");
        for (text, there, new, wanted) in [
            (
                "away from its like",
                vec![plain.clone()],
                wanting("n", "podAntiAffinity", "a", "arch"),
                [AWAY, ""],
            ),
            ("away from others", vec![plain.clone()], wanting("n", "podAntiAffinity", "b", "arch"), ["", ""]),
            ("near its like", vec![plain.clone()], wanting("n", "podAffinity", "a", "arch"), ["", NEAR]),
            ("first of its group", vec![], wanting("n", "podAffinity", "a", "arch"), ["", ""]),
            ("near nobody", vec![], wanting("n", "podAffinity", "b", "arch"), [NEAR, NEAR]),
            ("kept away by another", vec![hermit], plain.clone(), [EXISTING, ""]),
        ] {
            let nodes = [node("x", json!("arm64"), &there), node("y", json!("amd64"), &[])];
            let mut snapshot = Snapshot::default();
            snapshot.rebuild(nodes.iter().cloned());
            let mut state = CycleState::default();
            plugin.pre_filter(&Cycle { snapshot: &snapshot }, &mut state, &new);
            let got: Vec<String> = nodes.iter().map(|n| plugin.filter(&state, &new, n).message()).collect();
            assert_eq!(got, wanted, "{text}");
        }
    }

    #[test]
    fn preferences_of_both_sides_are_scored() {
        let plugin = InterPodAffinity { sources: Sources::detached() };
        let term = json!([{"weight": 5, "podAffinityTerm":
            {"labelSelector": {"matchLabels": {"app": "a"}}, "topologyKey": "arch"}}]);
        let affinity = json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": term}});
        let new = pod("n", json!({"spec": {"containers": [], "affinity": affinity}}));
        let plain = pod("plain", json!({"metadata": {"labels": {"app": "a"}}}));
        let nodes = [node("x", json!("arm64"), &[plain]), node("y", json!("amd64"), &[])];
        let mut snapshot = Snapshot::default();
        snapshot.rebuild(nodes.iter().cloned());
        let mut state = CycleState::default();
        assert!(plugin.pre_score(&Cycle { snapshot: &snapshot }, &mut state, &new, &nodes).is_success());
        let mut scores: Vec<i64> = nodes.iter().map(|n| plugin.score(&state, &new, n)).collect();
        assert_eq!(scores, [-5, 0]);
        plugin.normalize(&state, &mut scores, &nodes);
        assert_eq!(scores, [0, 100]);
    }
}
