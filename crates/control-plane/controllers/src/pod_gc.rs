//! Deletes pods that nobody else will: of nodes that are gone, deleted before they were scheduled, on nodes that are
//! declared out of service, and finished ones beyond a number. Upstream counterpart: pkg/controller/podgc.
//!
//! Deliberate difference: woken by events, not every 20 s; a node must have been gone for 40 s, as upstream.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
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
use crate::taint_eviction::disruption_target;
use crate::{Scope, api_error, node_lifecycle, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "pod-garbage-collector-controller",
    service_account: "pod-garbage-collector",
    component: "pod-garbage-collector",
    build: |scope| run(PodGcController::new(&scope)),
};

/// How long a node must be gone before its pods go.
const QUARANTINE: Duration = Duration::from_secs(40);
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// A pod, or the number of finished pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Item {
    Pod(Key),
    Threshold,
}

struct PodGcController {
    client: Client,
    threshold: usize,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    /// Since when nodes that pods name are missing.
    missing: Mutex<HashMap<String, Instant>>,
    queue: WorkQueue<Item>,
}

/// Why a pod is to be deleted by force.
#[derive(Debug, PartialEq, Eq)]
enum Reason {
    OutOfService,
    Orphaned,
    Unscheduled,
}

fn reason(pod: &Pod, node: Option<&Node>) -> Option<Reason> {
    let deleting = is_deleting(pod);
    if pod_state::node_name(pod).is_empty() {
        return deleting.then_some(Reason::Unscheduled);
    }
    let Some(node) = node else { return Some(Reason::Orphaned) };
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    let out_of_service = taints.into_iter().any(|t| t.key == OUT_OF_SERVICE);
    (deleting && out_of_service && node_lifecycle::ready(node) != "True").then_some(Reason::OutOfService)
}

impl PodGcController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            threshold: scope.options.terminated_pod_threshold,
            pods: scope.informers.of(),
            nodes: scope.informers.of(),
            missing: Mutex::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            if matches!(event, Event::Deleted(_)) {
                return;
            }
            let pod = event.object();
            let node = me.nodes.get("", pod_state::node_name(pod));
            if reason(pod, node.as_deref()).is_some() {
                me.queue.add(Item::Pod(key(&**pod)));
            }
            if pod_state::is_terminal(pod) {
                me.queue.add(Item::Threshold);
            }
        });
        let me = this.clone();
        this.nodes.on_event(move |event| {
            let node = name(&**event.object());
            match event {
                Event::Added(_) => drop(me.missing.lock().remove(node)),
                Event::Updated { old, new }
                    if old.spec == new.spec && node_lifecycle::ready(old) == node_lifecycle::ready(new) =>
                {
                    return;
                }
                _ => {}
            }
            for pod in me.pods.list() {
                if pod_state::node_name(&pod) == node {
                    me.queue.add(Item::Pod(key(&*pod)));
                }
            }
        });
        this
    }

    async fn delete(&self, pod: &Pod, orphaned: bool) -> SyncResult {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(pod));
        if !pod_state::is_terminal(pod) {
            // a pod that will never be heard of again ends as failed
            let mut patch = json!({"metadata": {"uid": uid(pod)}, "status": {}});
            if orphaned {
                patch = disruption_target("DeletionByPodGC", "PodGC: node no longer exists", pod);
            }
            patch["status"]["phase"] = json!("Failed");
            let patched =
                api.patch_status(name(pod), &PatchParams::default(), &Patch::Strategic(&patch)).await;
            if api_error::found(patched)?.is_none() {
                return Ok(());
            }
        }
        let exactly = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let params = DeleteParams::default().grace_period(0).preconditions(exactly);
        api_error::found(api.delete(name(pod), &params).await)?;
        Ok(())
    }

    async fn sync_pod(&self, pod_key: Key) -> SyncResult {
        let Some(pod) = self.pods.get(&pod_key.0, &pod_key.1) else { return Ok(()) };
        let node = pod_state::node_name(&pod);
        match reason(&pod, self.nodes.get("", node).as_deref()) {
            None => Ok(()),
            Some(Reason::Unscheduled | Reason::OutOfService) => self.delete(&pod, false).await,
            Some(Reason::Orphaned) => {
                let since = *self.missing.lock().entry(node.to_string()).or_insert_with(clock::monotonic);
                let left = (since + QUARANTINE).saturating_duration_since(clock::monotonic());
                if !left.is_zero() {
                    self.queue.add_after(Item::Pod(pod_key), left);
                    return Ok(());
                }
                // live, as the informer may be behind
                let api: Api<Node> = Api::all(self.client.clone());
                match api.get_opt(node).await? {
                    Some(_) => Ok(()),
                    None => self.delete(&pod, true).await,
                }
            }
        }
    }

    async fn sync_threshold(&self) -> SyncResult {
        let mut finished = self.pods.list();
        finished.retain(|p| pod_state::is_terminal(p));
        if self.threshold == 0 || finished.len() <= self.threshold {
            return Ok(());
        }
        finished.sort_by_key(|p| p.metadata.creation_timestamp.clone());
        let excess = finished.len() - self.threshold;
        for pod in finished.into_iter().take(excess) {
            self.delete(&pod, false).await?;
        }
        Ok(())
    }
}

impl Controller for PodGcController {
    type Key = Item;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Item> {
        &self.queue
    }

    async fn synced(&self) {
        self.pods.synced().await;
        self.nodes.synced().await;
    }

    fn all(&self) -> Vec<Item> {
        let pods = self.pods.list();
        pods.iter().map(|p| Item::Pod(key(&**p))).chain([Item::Threshold]).collect()
    }

    async fn sync(&self, item: Item) -> SyncResult {
        match item {
            Item::Pod(key) => self.sync_pod(key).await,
            Item::Threshold => self.sync_threshold().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons() {
        let node = |ready: &str, tainted: bool| -> Node {
            let taints =
                if tainted { json!([{"key": OUT_OF_SERVICE, "effect": "NoExecute"}]) } else { json!([]) };
            serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}}))
            .unwrap()
        };
        let pod = |node: &str, deleting: bool| {
            let mut pod = pod_state::test_pod("p", "Running", node, true);
            pod.metadata.deletion_timestamp = deleting.then(|| clock::now().into());
            pod
        };
        assert_eq!(reason(&pod("n", false), Some(&node("True", false))), None);
        assert_eq!(reason(&pod("n", false), None), Some(Reason::Orphaned));
        assert_eq!(reason(&pod("", true), None), Some(Reason::Unscheduled));
        assert_eq!(reason(&pod("", false), None), None);
        assert_eq!(reason(&pod("n", true), Some(&node("Unknown", true))), Some(Reason::OutOfService));
        assert_eq!(reason(&pod("n", true), Some(&node("True", true))), None);
    }
}
