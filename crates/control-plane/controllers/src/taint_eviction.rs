//! Evicts pods from nodes with NoExecute taints that they do not, or not any longer, tolerate.
//! Upstream counterpart: pkg/controller/tainteviction.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use parking_lot::Mutex;
use sampan_client::informer::key;
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;
use serde_json::json;
use tokio::time::Instant;

use crate::controller::{Controller, Descriptor, Key, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace, uid};
use crate::events::EventRecorder;
use crate::node_fit::tolerates;
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "taint-eviction-controller",
    service_account: "node-controller",
    component: "taint-eviction-controller",
    build: |scope| run(TaintEvictionController::new(&scope)),
};

struct TaintEvictionController {
    client: Client,
    events: EventRecorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    /// Since when each pod lives on borrowed time, by UID.
    since: Mutex<HashMap<String, Instant>>,
    queue: WorkQueue<Key>,
}

/// How long a pod may stay.
#[derive(Debug, PartialEq, Eq)]
enum Stay {
    Forever,
    For(Duration),
    No,
}

/// Zero and negative seconds are no time; the shortest time of those that are used counts.
fn stay(taints: &[&Taint], tolerations: &[Toleration]) -> Stay {
    let mut shortest: Option<i64> = None;
    for taint in taints {
        let mut used = tolerations.iter().filter(|t| tolerates(t, taint)).peekable();
        if used.peek().is_none() {
            return Stay::No;
        }
        for seconds in used.filter_map(|t| t.toleration_seconds) {
            shortest = Some(shortest.map_or(seconds, |s| s.min(seconds)).max(0));
        }
    }
    match shortest {
        None => Stay::Forever,
        Some(0) => Stay::No,
        Some(seconds) => Stay::For(Duration::from_secs(seconds.unsigned_abs())),
    }
}

fn no_execute(node: &Node) -> Vec<&Taint> {
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    taints.filter(|t| t.effect == "NoExecute").collect()
}

impl TaintEvictionController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            nodes: scope.informers.of(),
            pods: scope.informers.of(),
            since: Mutex::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.nodes.on_event(move |event| {
            let changed = match event {
                Event::Added(node) => !no_execute(node).is_empty(),
                Event::Updated { old, new } => no_execute(old) != no_execute(new),
                Event::Deleted(_) => false,
            };
            if changed {
                me.wake_pods_of(name(&**event.object()));
            }
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            let pod = event.object();
            match event {
                Event::Deleted(_) => drop(me.since.lock().remove(uid(&**pod))),
                Event::Updated { old, new } if !moved(old, new) => {}
                _ if !pod_state::node_name(pod).is_empty() => me.queue.add(key(&**pod)),
                _ => {}
            }
        });
        this
    }

    fn wake_pods_of(&self, node: &str) {
        for pod in self.pods.list() {
            if pod_state::node_name(&pod) == node {
                self.queue.add(key(&*pod));
            }
        }
    }

    fn cancel(&self, pod: &Pod) {
        if self.since.lock().remove(uid(pod)).is_some() {
            let message = format!("Cancelling deletion of Pod {}/{}", namespace(pod), name(pod));
            self.events.normal(pod, "TaintManagerEviction", message);
        }
    }

    async fn evict(&self, pod: &Pod) -> SyncResult {
        let message = format!("Marking for deletion Pod {}/{}", namespace(pod), name(pod));
        self.events.normal(pod, "TaintManagerEviction", message);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(pod));
        let target = pod_state::condition(pod, "DisruptionTarget").is_some_and(|c| c.status == "True");
        if !target {
            let patch = disruption_target(
                "DeletionByTaintManager",
                "Taint manager: deleting due to NoExecute taint",
                pod,
            );
            let patched =
                api.patch_status(name(pod), &PatchParams::default(), &Patch::Strategic(&patch)).await;
            if api_error::found(patched)?.is_none() {
                return Ok(());
            }
        }
        let exactly = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        api_error::found(api.delete(name(pod), &DeleteParams::default().preconditions(exactly)).await)?;
        Ok(())
    }
}

/// The patch of a pod's status that says why it is going to be deleted.
pub(crate) fn disruption_target(reason: &str, message: &str, pod: &Pod) -> serde_json::Value {
    let condition = json!({
        "type": "DisruptionTarget", "status": "True", "reason": reason, "message": message,
        "lastTransitionTime": Time(clock::now_seconds()), "observedGeneration": pod.metadata.generation,
    });
    json!({"metadata": {"uid": uid(pod)}, "status": {"conditions": [condition]}})
}

fn moved(old: &Pod, new: &Pod) -> bool {
    let tolerations = |p: &Pod| p.spec.as_ref().and_then(|s| s.tolerations.clone());
    pod_state::node_name(old) != pod_state::node_name(new) || tolerations(old) != tolerations(new)
}

impl Controller for TaintEvictionController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.nodes.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.pods.list().iter().map(|p| key(&**p)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(pod) = self.pods.get(&key.0, &key.1).filter(|p| !is_deleting(&**p)) else { return Ok(()) };
        let Some(node) = self.nodes.get("", pod_state::node_name(&pod)) else { return Ok(()) };
        let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
        match stay(&no_execute(&node), tolerations) {
            Stay::Forever => self.cancel(&pod),
            Stay::No => self.evict(&pod).await?,
            Stay::For(time) => {
                let since = *self.since.lock().entry(uid(&*pod).to_string()).or_insert_with(clock::monotonic);
                let left = (since + time).saturating_duration_since(clock::monotonic());
                if left.is_zero() {
                    self.evict(&pod).await?;
                } else {
                    self.queue.add_after(key, left);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_toleration_counts() {
        let taint = |key: &str| Taint { key: key.into(), effect: "NoExecute".into(), ..Taint::default() };
        let tolerate = |key: &str, seconds: Option<i64>| Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            toleration_seconds: seconds,
            ..Toleration::default()
        };
        let (a, b) = (taint("a"), taint("b"));
        assert_eq!(stay(&[], &[]), Stay::Forever);
        assert_eq!(stay(&[&a], &[]), Stay::No);
        assert_eq!(stay(&[&a], &[tolerate("a", None)]), Stay::Forever);
        let both = [tolerate("a", Some(300)), tolerate("b", Some(5))];
        assert_eq!(stay(&[&a, &b], &both), Stay::For(Duration::from_secs(5)));
        assert_eq!(stay(&[&a], &both), Stay::For(Duration::from_secs(300)));
        assert_eq!(stay(&[&a], &[tolerate("a", Some(-1))]), Stay::No);
    }
}
