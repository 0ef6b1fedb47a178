//! Spreads like pods over topology domains, as their constraints say or by system defaults.
//! Upstream counterpart: pkg/scheduler/framework/plugins/podtopologyspread.
//!
//! Pods are counted by groups of equal labels, so that a node with many replicas costs one comparison.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::TopologySpreadConstraint;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use sampan_client::informer::controller_of;

use super::taint_toleration::untolerated;
use crate::framework::node_info::PodGroup;
use crate::framework::selector::{Labels, RequiredNodeAffinity, labels_of};
use crate::framework::{
    ClusterEvent, Cycle, CycleState, Filter, MAX_NODE_SCORE, NodeInfo, NodeNames, Plugin, PodInfo, PreFilter,
    PreScore, Score, Selector, Verdict,
};
use crate::plugins::Descriptor;
use crate::sources::Sources;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "PodTopologySpread",
    weight: 2,
    new: |cx| Box::new(PodTopologySpread { sources: cx.sources.clone() }),
};

const HOSTNAME: &str = "kubernetes.io/hostname";
/// Pods without constraints that a service or controller selects: (key, max skew), all of them soft.
const SYSTEM_DEFAULTS: [(&str, i64); 2] = [(HOSTNAME, 3), ("topology.kubernetes.io/zone", 5)];

struct PodTopologySpread {
    sources: Sources,
}

#[derive(Clone, Debug)]
struct Constraint {
    max_skew: i64,
    key: String,
    selector: Selector,
    min_domains: i64,
    honor_affinity: bool,
    honor_taints: bool,
}

impl Constraint {
    fn of(c: &TopologySpreadConstraint, labels: &Labels) -> Self {
        let keys = c.match_label_keys.iter().flatten();
        let same: Labels = keys.filter_map(|k| Some((k.clone(), labels.get(k)?.clone()))).collect();
        Self {
            max_skew: i64::from(c.max_skew),
            key: c.topology_key.clone(),
            selector: Selector::of_labels(&same).and(Selector::of(c.label_selector.as_ref())),
            min_domains: i64::from(c.min_domains.unwrap_or(1)),
            honor_affinity: c.node_affinity_policy.as_deref() != Some("Ignore"),
            honor_taints: c.node_taints_policy.as_deref() == Some("Honor"),
        }
    }

    fn counts_node(&self, pod: &PodInfo, required: &RequiredNodeAffinity, node: &NodeInfo) -> bool {
        (!self.honor_affinity || required.matches(&node.node))
            && (!self.honor_taints || untolerated(node.taints(), pod).is_none())
    }
}

/// What a selector says about each group of pods, remembered for a cycle.
#[derive(Clone, Default)]
struct Matcher {
    /// Few: a list serves better than a map.
    matching: Vec<u128>,
    others: HashSet<u128>,
}

impl Matcher {
    fn matches(&mut self, selector: &Selector, group: &PodGroup) -> bool {
        if self.matching.contains(&group.label_set) {
            return true;
        }
        if self.others.contains(&group.label_set) {
            return false;
        }
        let matches = selector.matches(group.sample.labels());
        if matches {
            self.matching.push(group.label_set);
        } else {
            self.others.insert(group.label_set);
        }
        matches
    }

    /// Like [`Self::count`], of groups that were all met before.
    fn recount(&self, namespace: &str, node: &NodeInfo) -> i64 {
        let met = |g: &&PodGroup| self.matching.contains(&g.label_set) && g.sample.namespace == namespace;
        node.groups.iter().filter(met).map(|g| g.count - g.terminating).sum()
    }

    /// How many living pods of the namespace match on the node.
    fn count(&mut self, selector: &Selector, namespace: &str, node: &NodeInfo) -> i64 {
        if selector.is_empty() {
            return 0;
        }
        let mut count = 0;
        for group in node.groups.iter().filter(|g| g.sample.namespace == namespace) {
            if self.matches(selector, group) {
                count += group.count - group.terminating;
            }
        }
        count
    }
}

fn constraints(pod: &PodInfo, action: &str) -> Vec<Constraint> {
    let own = pod.spec().topology_spread_constraints.iter().flatten();
    own.filter(|c| c.when_unsatisfiable == action).map(|c| Constraint::of(c, pod.labels())).collect()
}

fn has_all_keys(labels: &Labels, constraints: &[Constraint]) -> bool {
    constraints.iter().all(|c| labels.contains_key(&c.key))
}

/// What hard constraints are judged by: matching pods by domain, one map a constraint.
#[derive(Clone)]
struct Hard {
    constraints: Vec<Constraint>,
    required: RequiredNodeAffinity,
    counts: Vec<HashMap<String, i64>>,
    /// The fewest of any domain.
    lowest: Vec<i64>,
}

impl Hard {
    fn settle(&mut self) {
        let lowest = |(counts, c): (&HashMap<String, i64>, &Constraint)| {
            let few = (counts.len() as i64) < c.min_domains;
            if few { 0 } else { counts.values().copied().min().unwrap_or(i64::from(i32::MAX)) }
        };
        self.lowest = self.counts.iter().zip(&self.constraints).map(lowest).collect();
    }

    fn change(&mut self, pod: &PodInfo, other: &PodInfo, node: &NodeInfo, delta: i64) {
        if other.namespace != pod.namespace || !has_all_keys(node.labels(), &self.constraints) {
            return;
        }
        for (constraint, counts) in self.constraints.iter().zip(&mut self.counts) {
            if constraint.selector.matches(other.labels())
                && constraint.counts_node(pod, &self.required, node)
            {
                *counts.entry(node.labels()[&constraint.key].clone()).or_default() += delta;
            }
        }
        self.settle();
    }
}

/// What soft constraints are scored by.
#[derive(Clone)]
struct Soft {
    constraints: Vec<Constraint>,
    /// Nodes without all keys get nothing, unless the constraints are the system's.
    all_keys: bool,
    counts: Vec<HashMap<String, i64>>,
    matchers: Vec<Matcher>,
    weights: Vec<f64>,
}

impl PodTopologySpread {
    /// The selector of the services and the controller of a pod; an empty one where there is none.
    fn default_selector(&self, pod: &PodInfo) -> Selector {
        let mut wanted = Labels::new();
        for service in self.sources.services.list_in(&pod.namespace) {
            let selector = service.spec.as_ref().and_then(|s| s.selector.as_ref());
            if let Some(selector) = selector
                && selector.iter().all(|(k, v)| pod.labels().get(k) == Some(v))
            {
                wanted.extend(selector.clone());
            }
        }
        let Some(owner) = controller_of(&*pod.pod) else { return Selector::of_labels(&wanted) };
        let (namespace, name) = (pod.namespace.as_str(), owner.name.as_str());
        let mut more: Option<LabelSelector> = None;
        match (owner.api_version.as_str(), owner.kind.as_str()) {
            ("v1", "ReplicationController") => {
                let controller = self.sources.replication_controllers.get(namespace, name);
                wanted.extend(controller.and_then(|c| c.spec.as_ref()?.selector.clone()).unwrap_or_default());
            }
            ("apps/v1", "ReplicaSet") => {
                more = self
                    .sources
                    .replica_sets
                    .get(namespace, name)
                    .and_then(|r| Some(r.spec.as_ref()?.selector.clone()));
            }
            ("apps/v1", "StatefulSet") => {
                more = self
                    .sources
                    .stateful_sets
                    .get(namespace, name)
                    .and_then(|s| Some(s.spec.as_ref()?.selector.clone()));
            }
            _ => {}
        }
        let selector = Selector::of_labels(&wanted);
        match &more {
            Some(more) => selector.and(Selector::of(Some(more))),
            None => selector,
        }
    }

    fn soft_constraints(&self, pod: &PodInfo) -> Vec<Constraint> {
        if pod.spec().topology_spread_constraints.iter().flatten().next().is_some() {
            return constraints(pod, "ScheduleAnyway");
        }
        let selector = self.default_selector(pod);
        if selector.is_empty() {
            return Vec::new();
        }
        let default = |(key, max_skew): &(&str, i64)| Constraint {
            max_skew: *max_skew,
            key: key.to_string(),
            selector: selector.clone(),
            min_domains: 1,
            honor_affinity: true,
            honor_taints: false,
        };
        SYSTEM_DEFAULTS.iter().map(default).collect()
    }
}

impl Plugin for PodTopologySpread {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn may_help(&self, pod: &PodInfo, event: &ClusterEvent) -> bool {
        let hard = constraints(pod, "DoNotSchedule");
        let counted = |other: &PodInfo| {
            other.namespace == pod.namespace && hard.iter().any(|c| c.selector.matches(other.labels()))
        };
        let keys =
            |node: &k8s_openapi::api::core::v1::Node| has_all_keys(labels_of(&node.metadata.labels), &hard);
        match event {
            ClusterEvent::AssignedPodAdded(other) | ClusterEvent::AssignedPodDeleted(other) => counted(other),
            ClusterEvent::AssignedPodUpdated { old, new, change } => {
                change.labels && counted(old) != counted(new)
            }
            ClusterEvent::PodUpdated { new, change, .. } => {
                let tolerates = change.tolerations && hard.iter().any(|c| c.honor_taints);
                new.uid == pod.uid && (change.labels || tolerates)
            }
            ClusterEvent::NodeAdded(node) | ClusterEvent::NodeDeleted(node) => keys(node),
            ClusterEvent::NodeUpdated { old, new, change } => {
                (change.labels || change.taints) && (keys(old) || keys(new))
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

impl PreFilter for PodTopologySpread {
    fn pre_filter(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>) {
        let constraints = constraints(pod, "DoNotSchedule");
        if constraints.is_empty() {
            return (Verdict::Skip, None);
        }
        let required = RequiredNodeAffinity::of(pod.spec());
        let mut counts = vec![HashMap::new(); constraints.len()];
        let mut matchers: Vec<Matcher> = constraints.iter().map(|_| Matcher::default()).collect();
        for node in cx.snapshot.nodes.iter().filter(|n| has_all_keys(n.labels(), &constraints)) {
            for (i, constraint) in constraints.iter().enumerate() {
                if constraint.counts_node(pod, &required, node) {
                    let count = matchers[i].count(&constraint.selector, &pod.namespace, node);
                    *counts[i].entry(node.labels()[&constraint.key].clone()).or_default() += count;
                }
            }
        }
        let mut hard = Hard { constraints, required, counts, lowest: Vec::new() };
        hard.settle();
        state.write(hard);
        (Verdict::Success, None)
    }
    fn add_pod(&self, state: &mut CycleState, pod: &PodInfo, added: &PodInfo, node: &NodeInfo) {
        if let Some(hard) = state.get_mut::<Hard>() {
            hard.change(pod, added, node, 1);
        }
    }
    fn remove_pod(&self, state: &mut CycleState, pod: &PodInfo, removed: &PodInfo, node: &NodeInfo) {
        if let Some(hard) = state.get_mut::<Hard>() {
            hard.change(pod, removed, node, -1);
        }
    }
}

impl Filter for PodTopologySpread {
    fn filter(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict {
        let Some(hard) = state.read::<Hard>() else { return Verdict::Success };
        for (i, constraint) in hard.constraints.iter().enumerate() {
            let Some(domain) = node.labels().get(&constraint.key) else {
                return Verdict::unresolvable(
                    "node(s) didn't match pod topology spread constraints (missing required label)",
                );
            };
            let own = i64::from(constraint.selector.matches(pod.labels()));
            let there = hard.counts[i].get(domain).copied().unwrap_or(0);
            if there + own - hard.lowest[i] > constraint.max_skew {
                return Verdict::unschedulable("node(s) didn't match pod topology spread constraints");
            }
        }
        Verdict::Success
    }
}

impl PreScore for PodTopologySpread {
    fn pre_score(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        nodes: &[Arc<NodeInfo>],
    ) -> Verdict {
        let constraints = self.soft_constraints(pod);
        if constraints.is_empty() {
            return Verdict::Skip;
        }
        let all_keys = pod.spec().topology_spread_constraints.iter().flatten().next().is_some();
        let eligible = |node: &NodeInfo| !all_keys || has_all_keys(node.labels(), &constraints);
        let mut counts: Vec<HashMap<String, i64>> = vec![HashMap::new(); constraints.len()];
        let mut matchers = vec![Matcher::default(); constraints.len()];
        let scored: Vec<&Arc<NodeInfo>> = nodes.iter().filter(|n| eligible(n)).collect();
        let required = RequiredNodeAffinity::of(pod.spec());
        let mut weights = Vec::with_capacity(constraints.len());
        for (i, constraint) in constraints.iter().enumerate() {
            let (selector, matcher) = (&constraint.selector, &mut matchers[i]);
            if constraint.key == HOSTNAME {
                // a host's domain is the host: its pods are counted when it is scored
                weights.push(((scored.len() + 2) as f64).ln());
                for node in &scored {
                    matcher.count(selector, &pod.namespace, node);
                }
                continue;
            }
            let domain = |node: &NodeInfo| node.labels().get(&constraint.key).cloned();
            let mut domains: HashMap<String, i64> =
                scored.iter().filter_map(|n| Some((domain(n)?, 0))).collect();
            let none = scored.iter().any(|n| !n.labels().contains_key(&constraint.key));
            weights.push(((domains.len() + usize::from(none) + 2) as f64).ln());
            if domains.is_empty() {
                continue;
            }
            for node in cx.snapshot.nodes.iter().filter(|n| eligible(n)) {
                let Some(count) = node.labels().get(&constraint.key).and_then(|d| domains.get_mut(d)) else {
                    continue;
                };
                if constraint.counts_node(pod, &required, node) {
                    *count += matcher.count(selector, &pod.namespace, node);
                }
            }
            counts[i] = domains;
        }
        state.write(Soft { constraints, all_keys, counts, matchers, weights });
        Verdict::Success
    }
}

impl Score for PodTopologySpread {
    fn score(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> i64 {
        let Some(soft) = state.read::<Soft>() else { return 0 };
        if soft.all_keys && !has_all_keys(node.labels(), &soft.constraints) {
            return 0;
        }
        let mut score = 0.0;
        for (i, constraint) in soft.constraints.iter().enumerate() {
            let Some(domain) = node.labels().get(&constraint.key) else { continue };
            let count = match constraint.key.as_str() {
                HOSTNAME => soft.matchers[i].recount(&pod.namespace, node),
                _ => soft.counts[i].get(domain).copied().unwrap_or(0),
            };
            score += count as f64 * soft.weights[i] + (constraint.max_skew - 1) as f64;
        }
        score.round() as i64
    }

    fn normalize(&self, state: &CycleState, scores: &mut [i64], nodes: &[Arc<NodeInfo>]) {
        let Some(soft) = state.read::<Soft>() else { return };
        let ignored = |node: &NodeInfo| soft.all_keys && !has_all_keys(node.labels(), &soft.constraints);
        let counted = || scores.iter().zip(nodes).filter(|(_, n)| !ignored(n)).map(|(s, _)| *s);
        let (min, max) = (counted().min().unwrap_or(0), counted().max().unwrap_or(0));
        for (score, node) in scores.iter_mut().zip(nodes) {
            *score = match max {
                _ if ignored(node) => 0,
                0 => MAX_NODE_SCORE,
                max => MAX_NODE_SCORE * (max + min - *score) / max,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framework::Snapshot;
    use crate::testing::{node_info, pod};
    use serde_json::{Value, json};

    fn zone(name: &str, zone: &str, pods: usize) -> Arc<NodeInfo> {
        let mut node = node_info(name, json!({"metadata": {"labels": {"zone": zone, HOSTNAME: name}}}));
        for i in 0..pods {
            node.add_pod(pod(&format!("{name}-{i}"), json!({"metadata": {"labels": {"app": "a"}}})));
        }
        Arc::new(node)
    }

    fn spread(when: &str, more: Value) -> Arc<PodInfo> {
        let mut constraint = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": when,
            "labelSelector": {"matchLabels": {"app": "a"}}});
        constraint.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let value = json!({"metadata": {"labels": {"app": "a"}},
            "spec": {"containers": [], "topologySpreadConstraints": [constraint]}});
        pod("new", value)
    }

    #[test]
    fn hard_constraints_bound_the_skew() {
        let plugin = PodTopologySpread { sources: Sources::detached() };
        let nodes =
            [zone("a", "x", 2), zone("b", "y", 1), zone("c", "z", 1), Arc::new(node_info("d", json!({})))];
        let mut snapshot = Snapshot::default();
        snapshot.rebuild(nodes.iter().cloned());
        for (more, wanted) in [
            (json!({}), [false, true, true, false]),
            (json!({"maxSkew": 2}), [true, true, true, false]),
            (json!({"minDomains": 4}), [false, false, false, false]),
        ] {
            let pod = spread("DoNotSchedule", more.clone());
            let mut state = CycleState::default();
            assert!(plugin.pre_filter(&Cycle { snapshot: &snapshot }, &mut state, &pod).0.is_success());
            let got: Vec<bool> = nodes.iter().map(|n| plugin.filter(&state, &pod, n).is_success()).collect();
            assert_eq!(got, wanted, "{more}");
        }
        let pod = spread("DoNotSchedule", json!({}));
        let mut state = CycleState::default();
        plugin.pre_filter(&Cycle { snapshot: &snapshot }, &mut state, &pod);
        let gone = nodes[0].pods[0].clone();
        plugin.remove_pod(&mut state, &pod, &gone, &nodes[0]);
        assert!(plugin.filter(&state, &pod, &nodes[0]).is_success(), "preempting one makes room");
    }

    #[test]
    fn soft_constraints_and_system_defaults_prefer_emptier_domains() {
        let sources = Sources::detached();
        let plugin = PodTopologySpread { sources: sources.clone() };
        let nodes = [zone("a", "x", 2), zone("b", "y", 0)];
        let mut snapshot = Snapshot::default();
        snapshot.rebuild(nodes.iter().cloned());
        let scores = |pod: &PodInfo| {
            let mut state = CycleState::default();
            let verdict = plugin.pre_score(&Cycle { snapshot: &snapshot }, &mut state, pod, &nodes);
            let mut scores: Vec<i64> = nodes.iter().map(|n| plugin.score(&state, pod, n)).collect();
            plugin.normalize(&state, &mut scores, &nodes);
            (verdict, scores)
        };
        assert_eq!(scores(&spread("ScheduleAnyway", json!({}))), (Verdict::Success, vec![0, 100]));
        let plain = pod("p", json!({"metadata": {"labels": {"app": "a"}}}));
        assert_eq!(scores(&plain).0, Verdict::Skip, "nothing selects it");
        let service =
            json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"selector": {"app": "a"}}});
        sources.services.put(serde_json::from_value(service).unwrap());
        let (verdict, by_default) = scores(&plain);
        assert!(verdict.is_success() && by_default[1] > by_default[0], "{by_default:?}");
    }
}
