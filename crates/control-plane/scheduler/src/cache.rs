//! What the scheduler believes of the cluster: nodes, the pods on them, and pods it has placed but not yet seen bound.
//! Upstream counterpart: pkg/scheduler/backend/cache/cache.go.
//!
//! An assumed pod counts as if it ran; it is confirmed by the API's event or forgotten when binding fails. Deliberate
//! difference: a node's state is shared with snapshots and copied when it changes after that.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use sampan_drivers::platform;

use crate::framework::snapshot::Nominated;
use crate::framework::{NodeInfo, PodInfo, Snapshot};

#[derive(Default)]
pub struct Cache(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    nodes: BTreeMap<String, Arc<NodeInfo>>,
    /// Where each pod counts, by UID.
    pods: HashMap<Arc<str>, Placed>,
    image_nodes: Arc<HashMap<String, i64>>,
    nominated: Arc<Nominated>,
    /// Nodes that changed since the last snapshot.
    dirty: BTreeSet<String>,
    /// Nodes came, went or changed place.
    structure: bool,
}

struct Placed {
    node: String,
    assumed: bool,
}

impl Cache {
    pub fn put_node(&self, node: Arc<Node>) {
        let mut inner = self.0.lock();
        let name = node.metadata.name.clone().unwrap_or_default();
        let entry = inner.nodes.entry(name.clone()).or_default();
        let was_present = entry.present;
        let images = entry.images.clone();
        Arc::make_mut(entry).set_node(node);
        let now = entry.images.clone();
        inner.count_images(&images, &now);
        inner.structure |= !was_present;
        inner.dirty.insert(name);
    }

    pub fn remove_node(&self, name: &str) {
        let mut inner = self.0.lock();
        let Some(entry) = inner.nodes.get_mut(name) else { return };
        let images = entry.images.clone();
        if entry.pods.is_empty() {
            inner.nodes.remove(name);
        } else {
            // its pods are still known to the API: keep them in case the node comes back
            let info = Arc::make_mut(entry);
            info.present = false;
            info.images = Arc::default();
        }
        inner.count_images(&images, &Arc::default());
        inner.structure = true;
    }

    /// Counts a pod that the API says is on a node; one that was assumed is confirmed.
    pub fn put_pod(&self, pod: &Arc<PodInfo>) {
        let mut inner = self.0.lock();
        inner.take_pod(&pod.uid);
        inner.place(pod.clone(), pod.node_name().to_string(), false);
    }

    /// Counts `pod` on `node` before it is bound; false where it counts already.
    pub fn assume(&self, pod: &Arc<PodInfo>, node: &str) -> bool {
        let mut inner = self.0.lock();
        if inner.pods.contains_key(&pod.uid) {
            return false;
        }
        inner.place(pod.clone(), node.to_string(), true);
        true
    }

    /// Takes back what was assumed; true if it was.
    pub fn forget(&self, uid: &str) -> bool {
        let mut inner = self.0.lock();
        let assumed = inner.pods.get(uid).is_some_and(|p| p.assumed);
        if assumed {
            inner.take_pod(uid);
        }
        assumed
    }

    pub fn is_assumed(&self, uid: &str) -> bool {
        self.0.lock().pods.get(uid).is_some_and(|p| p.assumed)
    }

    pub fn remove_pod(&self, uid: &str) {
        self.0.lock().take_pod(uid);
    }

    /// Notes that `pod` was promised `node`; "" takes the promise back.
    pub fn nominate(&self, pod: &Arc<PodInfo>, node: &str) {
        let mut inner = self.0.lock();
        let known = inner.nominated.values().flatten().any(|p| p.uid == pod.uid);
        if !known && node.is_empty() {
            return;
        }
        let nominated = Arc::make_mut(&mut inner.nominated);
        nominated.values_mut().for_each(|pods| pods.retain(|p| p.uid != pod.uid));
        nominated.retain(|_, pods| !pods.is_empty());
        if !node.is_empty() {
            nominated.entry(node.to_string()).or_default().push(pod.clone());
        }
    }

    /// The pods promised `node`.
    pub fn nominated_to(&self, node: &str) -> Vec<Arc<PodInfo>> {
        self.0.lock().nominated.get(node).cloned().unwrap_or_default()
    }

    /// The node that `uid` was promised.
    pub fn nomination_of(&self, uid: &str) -> Option<String> {
        let inner = self.0.lock();
        let promised = inner.nominated.iter().find(|(_, pods)| pods.iter().any(|p| *p.uid == *uid));
        promised.map(|(node, _)| node.clone())
    }

    /// Brings `snapshot` up to date.
    pub fn update(&self, snapshot: &mut Snapshot) {
        let mut inner = self.0.lock();
        let inner = &mut *inner;
        snapshot.image_nodes = inner.image_nodes.clone();
        snapshot.nominated = inner.nominated.clone();
        let mut rebuild = std::mem::take(&mut inner.structure);
        for name in std::mem::take(&mut inner.dirty) {
            if let Some(info) = inner.nodes.get(&name).filter(|n| n.present) {
                rebuild = rebuild || !snapshot.replace(info);
            }
        }
        if rebuild {
            snapshot.rebuild(inner.nodes.values().filter(|n| n.present).cloned());
        }
    }

    /// Whether each platform among the nodes has a node that holds the image: then it runs on all of them.
    pub fn image_is_everywhere(&self, image: &str) -> bool {
        let inner = self.0.lock();
        if !inner.image_nodes.contains_key(image) {
            return false;
        }
        let nodes = inner.nodes.values().filter(|n| n.present);
        platform::is_everywhere(
            nodes.filter_map(|n| Some((n.platform.as_deref()?, n.images.contains_key(image)))),
        )
    }
}

impl Inner {
    fn place(&mut self, pod: Arc<PodInfo>, node: String, assumed: bool) {
        let entry = self.nodes.entry(node.clone()).or_default();
        let uid = pod.uid.clone();
        let info = Arc::make_mut(entry);
        if info.name.is_empty() {
            info.name.clone_from(&node);
        }
        info.add_pod(pod);
        self.dirty.insert(node.clone());
        self.pods.insert(uid, Placed { node, assumed });
    }

    fn take_pod(&mut self, uid: &str) {
        let Some(placed) = self.pods.remove(uid) else { return };
        let Some(entry) = self.nodes.get_mut(&placed.node) else { return };
        let info = Arc::make_mut(entry);
        info.remove_pod(uid);
        if !info.present && info.pods.is_empty() {
            self.nodes.remove(&placed.node);
        } else {
            self.dirty.insert(placed.node);
        }
    }

    fn count_images(&mut self, old: &Arc<HashMap<String, i64>>, new: &Arc<HashMap<String, i64>>) {
        if Arc::ptr_eq(old, new) {
            return;
        }
        let counts = Arc::make_mut(&mut self.image_nodes);
        for name in old.keys().filter(|n| !new.contains_key(*n)) {
            if let Some(count) = counts.get_mut(name) {
                *count -= 1;
                if *count <= 0 {
                    counts.remove(name);
                }
            }
        }
        for name in new.keys().filter(|n| !old.contains_key(*n)) {
            *counts.entry(name.clone()).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod};
    use serde_json::json;

    #[test]
    fn assumed_pods_count_until_confirmed_or_forgotten() {
        let (cache, mut snapshot) = (Cache::default(), Snapshot::default());
        cache.put_node(node("n", json!({})).into());
        let waiting = pod(
            "p",
            json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}}),
        );
        assert!(cache.assume(&waiting, "n"));
        assert!(!cache.assume(&waiting, "n"));
        cache.update(&mut snapshot);
        assert_eq!(snapshot.get("n").unwrap().requested.milli_cpu, 1000);
        assert!(cache.forget("p"));
        cache.update(&mut snapshot);
        assert_eq!(snapshot.get("n").unwrap().requested.milli_cpu, 0);
        let bound = pod("p", json!({"spec": {"nodeName": "n", "containers": []}}));
        cache.put_pod(&bound);
        assert!(!cache.forget("p"), "what the API says is not forgotten");
        cache.remove_node("n");
        cache.update(&mut snapshot);
        assert!(snapshot.nodes.is_empty());
        cache.put_node(node("n", json!({})).into());
        cache.update(&mut snapshot);
        assert_eq!(snapshot.get("n").unwrap().pods.len(), 1, "a node that comes back has its pods");
    }
}
