//! Watches over nodes: conditions become Unknown when a node is silent, taints follow from conditions.
//! Upstream counterpart: pkg/controller/nodelifecycle.
//!
//! What stays true: silence is measured by this process's own clock from when it saw the node's status or lease change,
//! so a clock that jumps does no harm; when every node is silent it is more likely ourselves who are cut off, and
//! nothing is evicted. A node that falls silent has its pods marked not ready once; what says they are ready after that
//! is the node itself. Deliberate differences: nothing is polled, a node is looked at when it could have become silent;
//! there are no zones with their own eviction rates, but as upstream does in small zones, when more than two nodes and
//! over 55 % of them are not ready, no more are tainted for eviction.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use sampan_client::informer::{Key, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;
use serde_json::json;
use tokio::time::Instant;

use crate::controller::{Controller, Descriptor, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace, uid};
use crate::events::EventRecorder;
use crate::expectations::OwnWrites;
use crate::{Options, Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "node-lifecycle-controller",
    service_account: "node-controller",
    component: "node-controller",
    build: |scope| run(NodeLifecycleController::new(&scope)),
};

pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const MEMORY_PRESSURE: &str = "node.kubernetes.io/memory-pressure";
const DISK_PRESSURE: &str = "node.kubernetes.io/disk-pressure";
const PID_PRESSURE: &str = "node.kubernetes.io/pid-pressure";
const NETWORK_UNAVAILABLE: &str = "node.kubernetes.io/network-unavailable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Taints of effect NoSchedule that this controller alone keeps.
const CONDITION_TAINTS: [&str; 7] = [
    NOT_READY,
    UNREACHABLE,
    MEMORY_PRESSURE,
    DISK_PRESSURE,
    PID_PRESSURE,
    NETWORK_UNAVAILABLE,
    UNSCHEDULABLE,
];
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
const UNHEALTHY_SHARE: f64 = 0.55;
const LEASES: &str = "kube-node-lease";

struct NodeLifecycleController {
    client: Client,
    events: EventRecorder,
    options: Arc<Options>,
    nodes: Informer<Node>,
    leases: Informer<Lease>,
    pods: Informer<Pod>,
    /// When each node was last seen to report.
    heard: Mutex<HashMap<String, Instant>>,
    /// Nodes that fell silent and whose pods are not all marked yet.
    unmarked: Mutex<HashSet<String>>,
    writes: OwnWrites,
    queue: WorkQueue<Item>,
}

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Item {
    Node(String),
    /// A pod that was put on a node that may not be ready.
    Pod(Key),
}

impl NodeLifecycleController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            options: scope.options.clone(),
            nodes: scope.informers.of(),
            leases: scope.informers.selected("metadata.namespace=kube-node-lease"),
            pods: scope.informers.of(),
            heard: Mutex::default(),
            unmarked: Mutex::default(),
            writes: OwnWrites::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.nodes.on_event(move |event| me.node_changed(event));
        let me = this.clone();
        this.leases.on_event(move |event| me.lease_changed(event));
        let me = this.clone();
        this.pods.on_event(move |event| me.pod_changed(event));
        this
    }

    fn hear(&self, node: &str) {
        self.heard.lock().insert(node.to_string(), clock::monotonic());
    }

    fn node_changed(&self, event: &Event<'_, Node>) {
        let node = name(&**event.object()).to_string();
        match event {
            Event::Added(new) => {
                self.hear(&node);
                self.events.normal(
                    &***new,
                    "RegisteredNode",
                    format!("Node {node} event: Registered Node {node} in Controller"),
                );
                self.wake_all();
            }
            Event::Updated { old, new } => {
                let heartbeat = |n: &Node| condition(n, "Ready").and_then(|c| c.last_heartbeat_time.clone());
                if heartbeat(old) != heartbeat(new) || condition_statuses(old) != condition_statuses(new) {
                    self.hear(&node);
                }
                if ready(old) != ready(new) {
                    self.wake_all();
                }
                self.queue.add(Item::Node(node));
            }
            Event::Deleted(old) => {
                self.heard.lock().remove(&node);
                self.unmarked.lock().remove(&node);
                self.writes.forget(&key(&***old));
                self.events.normal(
                    &***old,
                    "RemovingNode",
                    format!("Node {node} event: Removing Node {node} from Controller"),
                );
                self.wake_all();
            }
        }
    }

    /// A renewed lease only moves the time; a node that was Unknown is looked at when its status says more.
    fn lease_changed(&self, event: &Event<'_, Lease>) {
        let renewed = |l: &Lease| l.spec.as_ref().and_then(|s| s.renew_time.clone());
        let lease = event.object();
        let news = match event {
            Event::Added(_) => true,
            Event::Updated { old, new } => renewed(old) != renewed(new),
            Event::Deleted(_) => false,
        };
        if news && namespace(&**lease) == LEASES && self.heard.lock().contains_key(name(&**lease)) {
            self.hear(name(&**lease));
        }
    }

    fn pod_changed(&self, event: &Event<'_, Pod>) {
        if is_new_on_node(event) {
            self.queue.add(Item::Pod(key(&**event.object())));
        }
    }

    /// One node's health may decide whether others are tainted.
    fn wake_all(&self) {
        for node in self.nodes.list() {
            self.queue.add(Item::Node(name(&*node).to_string()));
        }
    }

    /// How long until `node` counts as silent; zero when it does.
    fn left(&self, node: &Node) -> Duration {
        let grace = match condition(node, "Ready") {
            Some(_) => self.options.node_monitor_grace_period,
            None => self.options.node_startup_grace_period,
        };
        let heard = *self.heard.lock().entry(name(node).to_string()).or_insert_with(clock::monotonic);
        (heard + grace).saturating_duration_since(clock::monotonic())
    }

    /// Sets what a silent node does not report any more to Unknown.
    async fn mark_unknown(&self, node: &Node) -> SyncResult {
        let conditions = unknown_conditions(node, Time(clock::now_seconds()));
        if conditions.is_empty() {
            return Ok(());
        }
        let patch = json!({"status": {"conditions": conditions}});
        let api: Api<Node> = Api::all(self.client.clone());
        let patched = api.patch_status(name(node), &PatchParams::default(), &Patch::Strategic(&patch)).await;
        let Some(written) = api_error::found(patched)? else { return Ok(()) };
        self.writes.wrote(&written);
        if ready(node) == "True" {
            self.unmarked.lock().insert(name(node).to_string());
            let message = format!("Node {} status is now: NodeNotReady", name(node));
            self.events.normal(node, "NodeNotReady", message);
        }
        Ok(())
    }

    /// Sets the Ready condition of all pods of a node that fell silent to False, if that is still to be done.
    async fn mark_pods_not_ready(&self, node: &str) -> SyncResult {
        if !self.unmarked.lock().contains(node) {
            return Ok(());
        }
        for pod in self.pods.list().iter().filter(|p| pod_state::node_name(p) == node) {
            self.mark_pod_not_ready(pod).await?;
        }
        self.unmarked.lock().remove(node);
        Ok(())
    }

    async fn mark_pod_not_ready(&self, pod: &Pod) -> SyncResult {
        let Some(patch) = not_ready_patch(pod, &Time(clock::now_seconds())) else { return Ok(()) };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(pod));
        let patched = api.patch_status(name(pod), &PatchParams::default(), &Patch::Strategic(&patch)).await;
        match patched {
            Ok(_) => self.events.warning(pod, "NodeNotReady", "Node is not ready"),
            // it is gone, or another one of its name is there
            Err(e) if api_error::is_not_found(&e) || api_error::is_conflict(&e) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    async fn sync_pod(&self, key: &Key) -> SyncResult {
        let Some(pod) = self.pods.get(&key.0, &key.1) else { return Ok(()) };
        let Some(node) = self.nodes.get("", pod_state::node_name(&pod)) else { return Ok(()) };
        match condition(&node, "Ready") {
            Some(c) if c.status != "True" => self.mark_pod_not_ready(&pod).await,
            _ => Ok(()),
        }
    }

    async fn sync_node(&self, node_name: &str) -> SyncResult {
        let Some(node) = self.nodes.get("", node_name) else { return Ok(()) };
        // an older version than the own last write would have the same transition written and told again
        if is_deleting(&*node) || !self.writes.observed(&*node) {
            return Ok(());
        }
        let left = self.left(&node);
        if left.is_zero() {
            self.mark_unknown(&node).await?;
        } else {
            if ready(&node) == "True" {
                // back before all its pods were marked
                self.unmarked.lock().remove(node_name);
            }
            self.queue.add_after(Item::Node(node_name.to_string()), left + Duration::from_millis(1));
        }
        let nodes = self.nodes.list();
        let ready_count = nodes.iter().filter(|n| ready(n) == "True").count();
        let health = health(ready_count, nodes.len() - ready_count);
        if let Some(taints) = wanted_taints(&node, health, &Time(clock::now_seconds())) {
            self.write_taints(&node, taints).await?;
        }
        self.mark_pods_not_ready(node_name).await
    }

    async fn write_taints(&self, node: &Node, taints: Vec<Taint>) -> SyncResult {
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": (!taints.is_empty()).then_some(taints)},
        });
        let api: Api<Node> = Api::all(self.client.clone());
        let patched = api.patch(name(node), &PatchParams::default(), &Patch::Merge(&patch)).await;
        api_error::found(patched)?;
        Ok(())
    }
}

/// Whether a pod that says it is ready came to a node. One that says so anew is the node's own word and stands.
fn is_new_on_node(event: &Event<'_, Pod>) -> bool {
    let moved = match event {
        Event::Added(_) => true,
        Event::Updated { old, new } => pod_state::node_name(old) != pod_state::node_name(new),
        Event::Deleted(_) => false,
    };
    moved && !pod_state::node_name(event.object()).is_empty() && pod_state::is_ready(event.object())
}

/// What makes a pod not ready; `None` for one that is not.
fn not_ready_patch(pod: &Pod, now: &Time) -> Option<serde_json::Value> {
    if !pod_state::is_ready(pod) {
        return None;
    }
    let condition = json!({"type": "Ready", "status": "False", "lastTransitionTime": now});
    Some(json!({"metadata": {"uid": uid(pod)}, "status": {"conditions": [condition]}}))
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

fn condition_statuses(node: &Node) -> Vec<(String, String)> {
    let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.map(|c| (c.type_.clone(), c.status.clone())).collect()
}

/// The status of the Ready condition; Unknown where there is none.
pub fn ready(node: &Node) -> &str {
    condition(node, "Ready").map_or("Unknown", |c| c.status.as_str())
}

/// The conditions of a silent node that are not Unknown yet, as they shall be.
fn unknown_conditions(node: &Node, now: Time) -> Vec<NodeCondition> {
    let to_unknown = |kind: &&str| match condition(node, kind) {
        Some(c) if c.status == "Unknown" => None,
        Some(c) => Some(NodeCondition {
            status: "Unknown".into(),
            reason: Some("NodeStatusUnknown".into()),
            message: Some("Kubelet stopped posting node status.".into()),
            last_transition_time: Some(now.clone()),
            ..c.clone()
        }),
        None => Some(NodeCondition {
            type_: (*kind).into(),
            status: "Unknown".into(),
            reason: Some("NodeStatusNeverUpdated".into()),
            message: Some("Kubelet never posted node status.".into()),
            last_heartbeat_time: node.metadata.creation_timestamp.clone(),
            last_transition_time: Some(now.clone()),
        }),
    };
    REPORTED.iter().filter_map(to_unknown).collect()
}

/// Keys of the NoSchedule taints that a node's conditions call for.
fn wanted_no_schedule(node: &Node) -> Vec<&'static str> {
    let is = |kind: &str, status: &str| condition(node, kind).is_some_and(|c| c.status == status);
    let unschedulable = node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true);
    let table = [
        (NOT_READY, is("Ready", "False")),
        (UNREACHABLE, is("Ready", "Unknown")),
        (MEMORY_PRESSURE, is("MemoryPressure", "True")),
        (DISK_PRESSURE, is("DiskPressure", "True")),
        (PID_PRESSURE, is("PIDPressure", "True")),
        (NETWORK_UNAVAILABLE, is("NetworkUnavailable", "True")),
        (UNSCHEDULABLE, unschedulable),
    ];
    table.into_iter().filter(|(_, wanted)| *wanted).map(|(key, _)| key).collect()
}

/// How far the cluster's nodes are healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Normal,
    /// Too many are not ready to evict from more.
    Partial,
    /// None is ready: taints for eviction are lifted.
    None,
}

fn health(ready: usize, not_ready: usize) -> Health {
    if ready == 0 && not_ready > 0 {
        Health::None
    } else if not_ready > 2 && not_ready as f64 / (ready + not_ready) as f64 >= UNHEALTHY_SHARE {
        Health::Partial
    } else {
        Health::Normal
    }
}

/// The node's taints as they should be; `None` when they are.
fn wanted_taints(node: &Node, health: Health, now: &Time) -> Option<Vec<Taint>> {
    let current = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
    let no_schedule = wanted_no_schedule(node);
    let no_execute = match (ready(node), health) {
        (_, Health::None) | ("True", _) => None,
        ("False", _) => Some(NOT_READY),
        _ if condition(node, "Ready").is_some() => Some(UNREACHABLE),
        _ => None,
    };
    let is_ours = |t: &Taint| match t.effect.as_str() {
        "NoSchedule" => CONDITION_TAINTS.contains(&t.key.as_str()),
        "NoExecute" => t.key == NOT_READY || t.key == UNREACHABLE,
        _ => false,
    };
    let has = |key: &str, effect: &str| current.iter().any(|t| t.key == key && t.effect == effect);
    let evicts = has(NOT_READY, "NoExecute") || has(UNREACHABLE, "NoExecute");
    let keep = |t: &Taint| {
        !is_ours(t)
            || (t.effect == "NoSchedule" && no_schedule.contains(&t.key.as_str()))
            || (t.effect == "NoExecute" && no_execute == Some(t.key.as_str()))
    };
    let mut taints: Vec<Taint> = current.iter().filter(|t| keep(t)).cloned().collect();
    for key in no_schedule.into_iter().filter(|k| !has(k, "NoSchedule")) {
        taints.push(Taint {
            key: key.into(),
            effect: "NoSchedule".into(),
            value: None,
            time_added: Some(now.clone()),
        });
    }
    if let Some(key) = no_execute.filter(|k| !has(k, "NoExecute"))
        && (health == Health::Normal || evicts)
    {
        taints.push(Taint {
            key: key.into(),
            effect: "NoExecute".into(),
            value: None,
            time_added: Some(now.clone()),
        });
    }
    (taints != current).then_some(taints)
}

impl Controller for NodeLifecycleController {
    type Key = Item;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Item> {
        &self.queue
    }

    async fn synced(&self) {
        self.nodes.synced().await;
        self.leases.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Item> {
        self.nodes.list().iter().map(|n| Item::Node(name(&**n).to_string())).collect()
    }

    async fn sync(&self, item: Item) -> SyncResult {
        match item {
            Item::Node(node) => self.sync_node(&node).await,
            Item::Pod(pod) => self.sync_pod(&pod).await,
        }
    }
}

/// The key of a node's lease.
pub fn lease_key(node: &str) -> Key {
    (LEASES.to_string(), node.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: Option<&str>, taints: serde_json::Value) -> Node {
        let conditions = ready.map(|s| json!([{"type": "Ready", "status": s}])).unwrap_or(json!([]));
        serde_json::from_value(json!({
            "metadata": {"name": "n"}, "spec": {"taints": taints}, "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    #[test]
    fn taints_follow_conditions() {
        let now = Time(clock::now_seconds());
        let keys = |n: &Node, h: Health| {
            let taints = wanted_taints(n, h, &now)?;
            Some(taints.iter().map(|t| format!("{}:{}", t.key, t.effect)).collect::<Vec<_>>())
        };
        assert_eq!(keys(&node(Some("True"), json!([])), Health::Normal), None);
        let unknown = node(Some("Unknown"), json!([]));
        let both = vec![format!("{UNREACHABLE}:NoSchedule"), format!("{UNREACHABLE}:NoExecute")];
        assert_eq!(keys(&unknown, Health::Normal), Some(both));
        assert_eq!(keys(&unknown, Health::Partial), Some(vec![format!("{UNREACHABLE}:NoSchedule")]));
        assert_eq!(keys(&unknown, Health::None), Some(vec![format!("{UNREACHABLE}:NoSchedule")]));
        let recovered = node(
            Some("True"),
            json!([{"key": NOT_READY, "effect": "NoExecute"}, {"key": "mine", "effect": "NoExecute"}]),
        );
        assert_eq!(keys(&recovered, Health::Normal), Some(vec!["mine:NoExecute".to_string()]));
    }

    #[test]
    fn silence_becomes_unknown_once() {
        let now = Time(clock::now_seconds());
        let silent = unknown_conditions(&node(Some("True"), json!([])), now.clone());
        let reasons: Vec<_> = silent.iter().map(|c| c.reason.as_deref().unwrap()).collect();
        assert_eq!(reasons[0], "NodeStatusUnknown");
        assert_eq!(reasons[1], "NodeStatusNeverUpdated");
        let mut done = node(None, json!([]));
        done.status.as_mut().unwrap().conditions = Some(silent);
        assert!(unknown_conditions(&done, now).is_empty());
    }

    #[test]
    fn many_silent_nodes_stop_eviction() {
        let cases =
            [(1, 0, Health::Normal), (0, 1, Health::None), (1, 2, Health::Normal), (2, 3, Health::Partial)];
        for (ready, not_ready, expected) in cases {
            assert_eq!(health(ready, not_ready), expected, "{ready} {not_ready}");
        }
    }

    #[test]
    fn pods_are_marked_once_a_transition() {
        let pod = |node: &str, ready: bool| Arc::new(pod_state::test_pod("p", "Running", node, ready));
        let updated = |old: &Arc<Pod>, new: &Arc<Pod>| is_new_on_node(&Event::Updated { old, new });
        assert!(is_new_on_node(&Event::Added(&pod("n", true))));
        assert!(
            !is_new_on_node(&Event::Added(&pod("n", false)))
                && !is_new_on_node(&Event::Added(&pod("", true)))
        );
        assert!(updated(&pod("", true), &pod("n", true)));
        // its kubelet says it is ready: not ours to deny
        assert!(!updated(&pod("n", false), &pod("n", true)));
        assert!(!is_new_on_node(&Event::Deleted(&pod("n", true))));
        let now = Time(clock::now_seconds());
        assert!(not_ready_patch(&pod("n", false), &now).is_none());
        let patch = not_ready_patch(&pod("n", true), &now).unwrap();
        assert_eq!(patch["status"]["conditions"][0]["status"], "False");
    }
}
