//! What a cycle sees: all nodes at one moment. Upstream counterpart: pkg/scheduler/backend/cache/snapshot.go.
//!
//! Only nodes that changed since the last cycle are replaced; the order of nodes goes round the zones, so that looking
//! at a part of them is fair.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sampan_drivers::runtime::Platform;

use super::{NodeInfo, PodInfo};

/// Pods that preemption has promised a node, by node.
pub type Nominated = HashMap<String, Vec<Arc<PodInfo>>>;

#[derive(Default)]
pub struct Snapshot {
    pub nodes: Vec<Arc<NodeInfo>>,
    index: HashMap<String, usize>,
    /// Places of nodes with pods that have any affinity, and with pods that have required anti-affinity.
    with_affinity: BTreeSet<usize>,
    with_required_anti_affinity: BTreeSet<usize>,
    /// How many nodes have an image.
    pub image_nodes: Arc<HashMap<String, i64>>,
    /// The platforms there are, with their nodes' names in order.
    pub platforms: Vec<(Arc<Platform>, Vec<String>)>,
    pub nominated: Arc<Nominated>,
}

impl Snapshot {
    pub fn get(&self, node: &str) -> Option<&Arc<NodeInfo>> {
        self.nodes.get(*self.index.get(node)?)
    }

    pub fn with_affinity(&self) -> impl Iterator<Item = &Arc<NodeInfo>> {
        self.with_affinity.iter().filter_map(|i| self.nodes.get(*i))
    }

    pub fn with_required_anti_affinity(&self) -> impl Iterator<Item = &Arc<NodeInfo>> {
        self.with_required_anti_affinity.iter().filter_map(|i| self.nodes.get(*i))
    }

    /// Takes the node's new state; false where the node is new or its place may change.
    pub fn replace(&mut self, info: &Arc<NodeInfo>) -> bool {
        let Some(&place) = self.index.get(&info.name) else { return false };
        let old = &self.nodes[place];
        if old.zone() != info.zone() || old.platform != info.platform {
            return false;
        }
        self.nodes[place] = info.clone();
        self.note(place);
        true
    }

    /// Takes all nodes anew.
    pub fn rebuild(&mut self, nodes: impl Iterator<Item = Arc<NodeInfo>>) {
        let mut zones: BTreeMap<(String, String), Vec<Arc<NodeInfo>>> = BTreeMap::new();
        let mut platforms: Vec<(Arc<Platform>, Vec<String>)> = Vec::new();
        for node in nodes {
            if let Some(platform) = &node.platform {
                match platforms.iter_mut().find(|(p, _)| p == platform) {
                    Some((_, names)) => names.push(node.name.clone()),
                    None => platforms.push((platform.clone(), vec![node.name.clone()])),
                }
            }
            let (region, zone) = node.zone();
            zones.entry((region.to_string(), zone.to_string())).or_default().push(node);
        }
        platforms.iter_mut().for_each(|(_, names)| names.sort());
        let longest = zones.values().map(Vec::len).max().unwrap_or(0);
        self.nodes =
            (0..longest).flat_map(|i| zones.values().filter_map(move |z| z.get(i).cloned())).collect();
        self.index = self.nodes.iter().enumerate().map(|(i, n)| (n.name.clone(), i)).collect();
        self.platforms = platforms;
        self.with_affinity.clear();
        self.with_required_anti_affinity.clear();
        (0..self.nodes.len()).for_each(|place| self.note(place));
    }

    fn note(&mut self, place: usize) {
        let node = &self.nodes[place];
        for (set, empty) in [
            (&mut self.with_affinity, node.with_affinity.is_empty()),
            (&mut self.with_required_anti_affinity, node.with_required_anti_affinity.is_empty()),
        ] {
            if empty {
                set.remove(&place);
            } else {
                set.insert(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nodes_go_round_the_zones_and_are_replaced_in_place() {
        let node = |name: &str, zone: &str| {
            let node = json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}});
            Arc::new(NodeInfo::of(Arc::new(serde_json::from_value(node).unwrap())))
        };
        let mut snapshot = Snapshot::default();
        snapshot.rebuild([node("a", "x"), node("b", "x"), node("c", "y")].into_iter());
        let names: Vec<&str> = snapshot.nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["a", "c", "b"]);
        assert!(snapshot.replace(&node("a", "x")));
        assert!(!snapshot.replace(&node("a", "y")), "another zone is another place");
        assert!(!snapshot.replace(&node("d", "x")));
    }
}
