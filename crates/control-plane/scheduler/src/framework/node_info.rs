//! A node with the pods on it and what they take. Upstream counterpart: `NodeInfo` in pkg/scheduler/framework/types.go.
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Taint};
use sampan_drivers::platform;
use sampan_drivers::runtime::Platform;

use super::pod_info::HostPort;
use super::selector::{Labels, labels_of};
use super::{PodInfo, Resources};

/// Pods of one namespace with the same labels: they match the same selectors.
#[derive(Clone, Debug)]
pub struct PodGroup {
    pub label_set: u128,
    pub sample: Arc<PodInfo>,
    pub count: i64,
    pub terminating: i64,
}

#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    pub name: String,
    pub node: Arc<Node>,
    /// False where only pods are known that name it.
    pub present: bool,
    pub allocatable: Resources,
    pub pods: Vec<Arc<PodInfo>>,
    pub groups: Vec<PodGroup>,
    pub with_affinity: Vec<Arc<PodInfo>>,
    pub with_required_anti_affinity: Vec<Arc<PodInfo>>,
    pub ports: Vec<HostPort>,
    pub requested: Resources,
    /// CPU (milli) and memory (bytes) with defaults for what requests nothing.
    pub non_zero: (i64, i64),
    /// Images on the node and their sizes.
    pub images: Arc<HashMap<String, i64>>,
    /// What its labels declare.
    pub platform: Option<Arc<Platform>>,
}

impl NodeInfo {
    pub fn of(node: Arc<Node>) -> Self {
        let mut info = Self::default();
        info.set_node(node);
        info
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let status = node.status.as_ref();
        self.name = node.metadata.name.clone().unwrap_or_default();
        self.present = true;
        self.allocatable =
            status.and_then(|s| s.allocatable.as_ref()).map(Resources::of_list).unwrap_or_default();
        let mut images = HashMap::new();
        for image in status.and_then(|s| s.images.as_ref()).into_iter().flatten() {
            for name in image.names.iter().flatten() {
                images.insert(name.clone(), image.size_bytes.unwrap_or(0));
            }
        }
        if *self.images != images {
            self.images = Arc::new(images);
        }
        self.platform = platform::of_node(labels_of(&node.metadata.labels)).map(Arc::new);
        self.node = node;
    }

    pub fn labels(&self) -> &Labels {
        labels_of(&self.node.metadata.labels)
    }

    pub fn taints(&self) -> &[Taint] {
        self.node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default()
    }

    pub fn unschedulable(&self) -> bool {
        self.node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true)
    }

    pub fn add_pod(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.non_zero.0 += pod.non_zero.0;
        self.non_zero.1 += pod.non_zero.1;
        self.ports.extend(pod.ports.iter().cloned());
        if pod.has_affinity() {
            self.with_affinity.push(pod.clone());
        }
        if !pod.required_anti_affinity.is_empty() {
            self.with_required_anti_affinity.push(pod.clone());
        }
        let terminating = i64::from(pod.terminating);
        match self.groups.iter_mut().find(|g| g.label_set == pod.label_set) {
            Some(group) => {
                group.count += 1;
                group.terminating += terminating;
            }
            None => {
                let (label_set, sample) = (pod.label_set, pod.clone());
                self.groups.push(PodGroup { label_set, sample, count: 1, terminating });
            }
        }
        self.pods.push(pod);
    }

    /// Removes the pod of that UID, and returns it.
    pub fn remove_pod(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let place = self.pods.iter().position(|p| &*p.uid == uid)?;
        let pod = self.pods.swap_remove(place);
        self.requested.sub(&pod.requests);
        self.non_zero.0 -= pod.non_zero.0;
        self.non_zero.1 -= pod.non_zero.1;
        for port in &pod.ports {
            if let Some(place) = self.ports.iter().position(|p| p == port) {
                self.ports.swap_remove(place);
            }
        }
        self.with_affinity.retain(|p| *p.uid != *uid);
        self.with_required_anti_affinity.retain(|p| *p.uid != *uid);
        if let Some(place) = self.groups.iter().position(|g| g.label_set == pod.label_set) {
            let group = &mut self.groups[place];
            group.count -= 1;
            group.terminating -= i64::from(pod.terminating);
            if group.count == 0 {
                self.groups.swap_remove(place);
            }
        }
        Some(pod)
    }

    /// Failure domain: region and zone.
    pub fn zone(&self) -> (&str, &str) {
        let label = |key: &str| self.labels().get(key).map_or("", String::as_str);
        (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
    }
}
