//! Objects and a cluster for tests.
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::event_recorder::EventRecorder;
use crate::framework::{NodeInfo, PodInfo};
use crate::plugins::Context;
use crate::preemptor::Preemptor;
use crate::sources::Sources;
use crate::status_writer::StatusWriter;
use crate::writes::{ClusterWrites, WriteError};

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// A pod of namespace `ns` whose UID is its name.
pub fn api_pod(name: &str, more: Value) -> Pod {
    let mut pod =
        json!({"metadata": {"name": name, "namespace": "ns", "uid": name}, "spec": {"containers": []}});
    merge(&mut pod, &more);
    serde_json::from_value(pod).unwrap()
}

pub fn pod(name: &str, more: Value) -> Arc<PodInfo> {
    PodInfo::new(Arc::new(api_pod(name, more)))
}

pub fn node(name: &str, more: Value) -> Node {
    let mut node = json!({"metadata": {"name": name}});
    merge(&mut node, &more);
    serde_json::from_value(node).unwrap()
}

pub fn node_info(name: &str, more: Value) -> NodeInfo {
    NodeInfo::of(Arc::new(node(name, more)))
}

/// An API of nothing but pods, that does at once what it is told.
pub struct TestCluster {
    pub sources: Sources,
    /// (pod, reason, note)
    pub events: Mutex<Vec<(String, String, String)>>,
    /// Refuse bindings.
    pub refuse: std::sync::atomic::AtomicBool,
    version: std::sync::atomic::AtomicU64,
}

impl TestCluster {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            sources: Sources::detached(),
            events: Mutex::default(),
            refuse: false.into(),
            version: 1.into(),
        })
    }

    /// Creates a pod or replaces it.
    pub fn put(&self, mut pod: Pod) {
        let version = self.version.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        pod.metadata.resource_version = Some(version.to_string());
        self.sources.pods.put(pod);
    }

    pub fn put_node(&self, mut node: Node) {
        let version = self.version.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        node.metadata.resource_version = Some(version.to_string());
        self.sources.nodes.put(node);
    }

    pub fn delete(&self, name: &str) {
        self.sources.pods.remove(&("ns".to_string(), name.to_string()));
    }

    pub fn node_of(&self, name: &str) -> Option<String> {
        self.sources.pods.get("ns", name)?.spec.as_ref()?.node_name.clone()
    }

    pub fn pod(&self, name: &str) -> Pod {
        (*self.sources.pods.get("ns", name).unwrap()).clone()
    }

    pub fn notes(&self, reason: &str) -> Vec<String> {
        self.events.lock().iter().filter(|(_, r, _)| r == reason).map(|(_, _, n)| n.clone()).collect()
    }
}

#[async_trait]
impl ClusterWrites for TestCluster {
    async fn bind(&self, pod: &PodInfo, node: &str) -> Result<(), WriteError> {
        if self.refuse.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(WriteError::Refused { key: pod.name.clone(), message: "no".to_string() });
        }
        let mut pod = self.pod(&pod.name);
        pod.spec.get_or_insert_default().node_name = Some(node.to_string());
        self.put(pod);
        Ok(())
    }

    async fn patch_status(&self, pod: &PodInfo, status: Value) -> Result<(), WriteError> {
        let Some(latest) = self.sources.pods.get(&pod.namespace, &pod.name) else {
            return Err(WriteError::NotFound { key: pod.name.clone() });
        };
        let mut value = serde_json::to_value(&*latest).unwrap();
        merge(&mut value, &json!({"status": status}));
        self.put(serde_json::from_value(value).unwrap());
        Ok(())
    }

    async fn delete_pod(&self, pod: &PodInfo) -> Result<(), WriteError> {
        self.delete(&pod.name);
        Ok(())
    }

    async fn create_event(&self, event: &Event) -> Result<(), WriteError> {
        let text = |t: &Option<String>| t.clone().unwrap_or_default();
        let about = text(&event.involved_object.name);
        self.events.lock().push((about, text(&event.reason), text(&event.message)));
        Ok(())
    }

    async fn patch_event(&self, _namespace: &str, _name: &str, _patch: Value) -> Result<(), WriteError> {
        Ok(())
    }
}

/// What plugins are made from, over an empty cluster.
pub fn context() -> Context {
    let cluster = TestCluster::new();
    let writes: Arc<dyn ClusterWrites> = cluster.clone();
    let cache = Arc::new(Cache::default());
    let (recorder, _) = EventRecorder::new();
    let statuses = Arc::new(StatusWriter::new(writes.clone()));
    let preemptor = Arc::new(Preemptor::new(writes.clone(), recorder, statuses, cache.clone()));
    Context { sources: cluster.sources.clone(), cache, writes, preemptor, platforms: None }
}
