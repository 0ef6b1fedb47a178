//! Turns what the informers see into changes of cache and queue. Upstream counterpart: pkg/scheduler/eventhandlers.go.
//!
//! A pod that has ended counts as deleted: it takes nothing from its node any more.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use sampan_client::Event;

use crate::SCHEDULER_NAME;
use crate::cache::Cache;
use crate::framework::{ClusterEvent, NodeChange, PodChange, PodInfo};
use crate::queue::Queue;
use crate::sources::Sources;

/// Registers all handlers: nodes first, so that pods find them.
pub fn register(sources: &Sources, cache: &Arc<Cache>, queue: &Arc<Queue>) {
    let (c, q) = (cache.clone(), queue.clone());
    sources.nodes.on_event(move |event| on_node(event, &c, &q));
    let (c, q) = (cache.clone(), queue.clone());
    sources.pods.on_event(move |event| on_pod(event, &c, &q));
    let storage = |queue: &Queue, namespace: &Option<String>| {
        queue.on_event(&ClusterEvent::StorageChanged { namespace: namespace.clone().unwrap_or_default() });
    };
    let q = queue.clone();
    sources.claims.on_event(move |event| storage(&q, &event.object().metadata.namespace));
    let q = queue.clone();
    sources.volumes.on_event(move |_| storage(&q, &None));
    let q = queue.clone();
    sources.classes.on_event(move |_| storage(&q, &None));
    let q = queue.clone();
    sources.namespaces.on_event(move |event| match event {
        Event::Updated { old, new } if old.metadata.labels == new.metadata.labels => {}
        _ => q.on_event(&ClusterEvent::NamespaceChanged),
    });
}

fn on_node(event: &Event<'_, Node>, cache: &Cache, queue: &Queue) {
    match event {
        Event::Added(node) => {
            cache.put_node((*node).clone());
            queue.on_event(&ClusterEvent::NodeAdded((*node).clone()));
        }
        Event::Updated { old, new } => {
            cache.put_node((*new).clone());
            let change = NodeChange::between(old, new);
            if !change.is_empty() {
                let (old, new) = ((*old).clone(), (*new).clone());
                queue.on_event(&ClusterEvent::NodeUpdated { old, new, change });
            }
        }
        Event::Deleted(node) => {
            cache.remove_node(node.metadata.name.as_deref().unwrap_or_default());
            queue.on_event(&ClusterEvent::NodeDeleted((*node).clone()));
        }
    }
}

/// What a pod is to the scheduler.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It takes from a node.
    Assigned,
    /// It waits for this scheduler.
    Waiting,
    /// It has ended, or waits for another scheduler.
    None,
}

fn role(pod: &Pod) -> Role {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        return Role::None;
    }
    let spec = pod.spec.as_ref();
    let node = spec.and_then(|s| s.node_name.as_deref()).unwrap_or_default();
    let scheduler = spec.and_then(|s| s.scheduler_name.as_deref()).unwrap_or(SCHEDULER_NAME);
    match (node, scheduler) {
        ("", SCHEDULER_NAME) => Role::Waiting,
        ("", _) => Role::None,
        _ => Role::Assigned,
    }
}

fn on_pod(event: &Event<'_, Pod>, cache: &Cache, queue: &Queue) {
    match event {
        Event::Added(pod) => appear(pod, cache, queue),
        Event::Deleted(pod) => vanish(pod, cache, queue),
        // another pod of the same name: the old one's end was missed
        Event::Updated { old, new } if old.metadata.uid != new.metadata.uid => {
            vanish(old, cache, queue);
            appear(new, cache, queue);
        }
        Event::Updated { old, new } => match (role(old), role(new)) {
            (Role::Assigned, Role::Assigned) => {
                let (old, new) = (PodInfo::new((*old).clone()), PodInfo::new((*new).clone()));
                cache.put_pod(&new);
                let change = PodChange::between(&old, &new);
                if change != PodChange::default() {
                    queue.on_event(&ClusterEvent::AssignedPodUpdated { old, new, change });
                }
            }
            (Role::Waiting, Role::Waiting) => update_waiting(old, new, cache, queue),
            (before, after) => {
                if before != Role::None && after != Role::Assigned {
                    vanish(old, cache, queue);
                }
                if before == Role::Waiting {
                    queue.remove(new.metadata.uid.as_deref().unwrap_or_default());
                }
                appear(new, cache, queue);
            }
        },
    }
}

fn update_waiting(old: &Arc<Pod>, new: &Arc<Pod>, cache: &Cache, queue: &Queue) {
    let (old, new) = (PodInfo::new(old.clone()), PodInfo::new(new.clone()));
    if cache.is_assumed(&new.uid) {
        return;
    }
    if old.nominated_node_name() != new.nominated_node_name() {
        cache.nominate(&new, new.nominated_node_name());
        if !old.nominated_node_name().is_empty() {
            queue.on_event(&ClusterEvent::AssignedPodDeleted(old.clone()));
        }
    }
    queue.put(&new);
    let change = PodChange::between(&old, &new);
    queue.on_event(&ClusterEvent::PodUpdated { old, new, change });
}

fn appear(pod: &Arc<Pod>, cache: &Cache, queue: &Queue) {
    match role(pod) {
        Role::Assigned => {
            let info = PodInfo::new(pod.clone());
            cache.nominate(&info, "");
            cache.put_pod(&info);
            queue.on_event(&ClusterEvent::AssignedPodAdded(info));
        }
        Role::Waiting => {
            let info = PodInfo::new(pod.clone());
            cache.nominate(&info, info.nominated_node_name());
            queue.put(&info);
        }
        Role::None => {}
    }
}

fn vanish(pod: &Arc<Pod>, cache: &Cache, queue: &Queue) {
    if role(pod) == Role::None {
        return;
    }
    let info = PodInfo::new(pod.clone());
    queue.remove(&info.uid);
    cache.nominate(&info, "");
    let counted = role(pod) == Role::Assigned || cache.is_assumed(&info.uid);
    cache.remove_pod(&info.uid);
    if counted || !info.nominated_node_name().is_empty() {
        queue.on_event(&ClusterEvent::AssignedPodDeleted(info));
    }
}
