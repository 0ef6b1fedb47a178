//! The next steps of a StatefulSet, and its status. Pure. Upstream counterpart:
//! pkg/controller/statefulset/stateful_set_control.go.
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};

use super::identity::{matches, ordinal_in, revision_of};
use crate::controller_ref::{is_deleting, name, uid};
use crate::pod_state;

/// The revision that pods had, and the one that they shall have.
pub struct Revisions {
    pub current: String,
    pub update: String,
    pub current_template: PodTemplateSpec,
    pub update_template: PodTemplateSpec,
    pub collisions: i32,
}

#[derive(Debug)]
pub enum Action {
    Create(i32),
    Delete(Arc<Pod>),
    /// A pending pod may wait for claims that someone deleted.
    EnsureClaims(Arc<Pod>),
    FixIdentity(Arc<Pod>),
}

fn start(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.ordinals.as_ref()).and_then(|o| o.start).unwrap_or(0)
}

fn replicas(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

fn min_ready(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
}

pub fn in_range(set: &StatefulSet, ordinal: i32) -> bool {
    (start(set)..start(set) + replicas(set)).contains(&ordinal)
}

fn is_rolling(set: &StatefulSet) -> bool {
    let strategy = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()) != Some("OnDelete")
}

fn partition(set: &StatefulSet) -> Option<i32> {
    let strategy = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref());
    strategy.and_then(|s| s.rolling_update.as_ref()).map(|r| r.partition.unwrap_or(0))
}

/// Whether a new pod of that ordinal is still made from the current revision.
pub fn takes_current_revision(set: &StatefulSet, ordinal: i32) -> bool {
    let kept = match partition(set) {
        Some(partition) => partition,
        None => set.status.as_ref().and_then(|s| s.current_replicas).unwrap_or(0),
    };
    is_rolling(set) && ordinal < start(set) + kept
}

fn is_ready(pod: &Pod) -> bool {
    pod_state::phase(pod) == "Running" && pod_state::is_ready(pod)
}

fn is_available(set: &StatefulSet, pod: &Pod, now: Timestamp) -> bool {
    pod_state::phase(pod) == "Running" && pod_state::is_available(pod, min_ready(set), now)
}

fn is_healthy(set: &StatefulSet, pod: &Pod, now: Timestamp) -> bool {
    is_available(set, pod, now) && !is_deleting(pod)
}

/// What to do now, in this order.
pub fn plan(set: &StatefulSet, revisions: &Revisions, pods: &[Arc<Pod>], now: Timestamp) -> Vec<Action> {
    let ordered = set.spec.as_ref().and_then(|s| s.pod_management_policy.as_deref()) != Some("Parallel");
    let by_ordinal: BTreeMap<i32, &Arc<Pod>> =
        pods.iter().filter_map(|p| Some((ordinal_in(name(set), name(&**p))?, p))).collect();
    let mut actions = Vec::new();
    for ordinal in start(set)..start(set) + replicas(set) {
        let done = replica(set, by_ordinal.get(&ordinal).copied(), ordinal, &mut actions, now);
        if ordered && !done {
            return actions;
        }
    }
    let condemned: Vec<&Arc<Pod>> =
        by_ordinal.iter().rev().filter(|(o, _)| !in_range(set, **o)).map(|(_, p)| *p).collect();
    let replica_pods: Vec<Option<&Arc<Pod>>> =
        (start(set)..start(set) + replicas(set)).map(|o| by_ordinal.get(&o).copied()).collect();
    let ascending = replica_pods.iter().flatten().copied().chain(condemned.iter().rev().copied());
    let first_unhealthy =
        ascending.into_iter().find(|p| !is_healthy(set, p, now)).map(|p| uid(&**p).to_string());
    for pod in condemned {
        if is_deleting(&**pod) {
            if ordered {
                return actions;
            }
            continue;
        }
        let is_first = first_unhealthy.as_deref() == Some(uid(&**pod));
        if ordered && !is_available(set, pod, now) && !is_first {
            return actions;
        }
        actions.push(Action::Delete(pod.clone()));
        if ordered {
            return actions;
        }
    }
    if is_rolling(set) {
        actions.extend(next_update(set, revisions, &replica_pods, now));
    }
    actions
}

/// Brings one replica forward; tells whether it is all right, so that the next may follow.
fn replica(
    set: &StatefulSet,
    pod: Option<&Arc<Pod>>,
    ordinal: i32,
    actions: &mut Vec<Action>,
    now: Timestamp,
) -> bool {
    let Some(pod) = pod else {
        actions.push(Action::Create(ordinal));
        return false;
    };
    if pod_state::is_terminal(pod) {
        if !is_deleting(&**pod) {
            actions.push(Action::Delete(pod.clone()));
        }
        return false;
    }
    if pod_state::phase(pod) == "Pending" {
        actions.push(Action::EnsureClaims(pod.clone()));
    }
    let healthy = is_healthy(set, pod, now);
    let parallel = set.spec.as_ref().and_then(|s| s.pod_management_policy.as_deref()) == Some("Parallel");
    if (healthy || parallel) && !is_deleting(&**pod) && !matches(set, pod) {
        actions.push(Action::FixIdentity(pod.clone()));
    }
    healthy
}

/// The one pod, from the last ordinal down to the partition, that is to be replaced next; none as long as a later
/// one is not available.
fn next_update(
    set: &StatefulSet,
    revisions: &Revisions,
    replicas: &[Option<&Arc<Pod>>],
    now: Timestamp,
) -> Option<Action> {
    let from = partition(set).unwrap_or(0).max(0) as usize;
    for pod in replicas.iter().skip(from).rev() {
        let pod = (*pod)?;
        if revision_of(pod) != revisions.update && !is_deleting(&**pod) {
            return Some(Action::Delete(pod.clone())).filter(|_| !pod_state::is_terminal(pod));
        }
        if !is_healthy(set, pod, now) {
            return None;
        }
    }
    None
}

pub fn status(
    set: &StatefulSet,
    revisions: &Revisions,
    pods: &[Arc<Pod>],
    now: Timestamp,
) -> StatefulSetStatus {
    let count = |f: &dyn Fn(&Pod) -> bool| pods.iter().filter(|p| f(p)).count() as i32;
    let of = |revision: &str| count(&|p| !is_deleting(p) && revision_of(p) == revision);
    let total = count(&|p| !pod_state::phase(p).is_empty());
    let ready = count(&is_ready);
    let (mut current, updated) = (of(&revisions.current), of(&revisions.update));
    let mut current_revision = revisions.current.clone();
    let wanted = replicas(set);
    if is_rolling(set) && updated == wanted && total == wanted && ready == wanted {
        // the rollout is complete: what was the update is current now
        current = updated;
        current_revision = revisions.update.clone();
    }
    let before = set.status.clone().unwrap_or_default();
    let some = |n: i32| (n != 0).then_some(n);
    StatefulSetStatus {
        replicas: total,
        ready_replicas: some(ready),
        available_replicas: Some(count(&|p| is_available(set, p, now))),
        current_replicas: some(current),
        updated_replicas: some(updated),
        current_revision: Some(current_revision),
        update_revision: Some(revisions.update.clone()),
        collision_count: Some(revisions.collisions),
        observed_generation: set.metadata.generation,
        conditions: before.conditions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(replicas: i32, extra: serde_json::Value) -> StatefulSet {
        let mut set = json!({"metadata": {"name": "web", "namespace": "ns", "uid": "s"},
            "spec": {"replicas": replicas, "selector": {}, "serviceName": "web", "template": {},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}}});
        for (k, v) in extra.as_object().unwrap() {
            set["spec"][k] = v.clone();
        }
        serde_json::from_value(set).unwrap()
    }

    fn revisions() -> Revisions {
        Revisions {
            current: "old".into(),
            update: "new".into(),
            current_template: PodTemplateSpec::default(),
            update_template: PodTemplateSpec::default(),
            collisions: 0,
        }
    }

    fn pod(ordinal: i32, revision: &str, ready: bool) -> Arc<Pod> {
        let name = format!("web-{ordinal}");
        let mut pod = pod_state::test_pod(&name, "Running", "n", ready);
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert("controller-revision-hash".into(), revision.into());
        labels.insert("statefulset.kubernetes.io/pod-name".into(), name);
        Arc::new(pod)
    }

    fn told(set: &StatefulSet, pods: &[Arc<Pod>]) -> Vec<String> {
        let tell = |a: Action| match a {
            Action::Create(o) => format!("create {o}"),
            Action::Delete(p) => format!("delete {}", name(&*p)),
            Action::EnsureClaims(p) => format!("claims {}", name(&*p)),
            Action::FixIdentity(p) => format!("fix {}", name(&*p)),
        };
        plan(set, &revisions(), pods, sampan_world::clock::now()).into_iter().map(tell).collect()
    }

    #[test]
    fn ordered_and_parallel() {
        let ordered = set(3, json!({}));
        assert_eq!(told(&ordered, &[]), ["create 0"]);
        assert_eq!(told(&ordered, &[pod(0, "new", false)]), Vec::<String>::new());
        assert_eq!(told(&ordered, &[pod(0, "new", true)]), ["create 1"]);
        let parallel = set(3, json!({"podManagementPolicy": "Parallel"}));
        assert_eq!(told(&parallel, &[pod(1, "new", false)]), ["create 0", "create 2"]);
        let small = set(1, json!({}));
        let three = [pod(0, "new", true), pod(1, "new", true), pod(2, "new", true)];
        assert_eq!(told(&small, &three), ["delete web-2"]);
        let sick = [pod(0, "new", true), pod(1, "new", false), pod(2, "new", true)];
        assert_eq!(told(&small, &sick), ["delete web-2"]);
    }

    #[test]
    fn updates_go_down_to_the_partition() {
        let all = |p| {
            set(3, json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": p}}}))
        };
        let old = [pod(0, "old", true), pod(1, "old", true), pod(2, "old", true)];
        assert_eq!(told(&all(0), &old), ["delete web-2"]);
        let one = [pod(0, "old", true), pod(1, "old", true), pod(2, "new", true)];
        assert_eq!(told(&all(0), &one), ["delete web-1"]);
        assert_eq!(told(&all(2), &one), Vec::<String>::new());
        assert_eq!(told(&all(3), &old), Vec::<String>::new());
        assert!(takes_current_revision(&all(2), 1) && !takes_current_revision(&all(2), 2));
        let done = [pod(0, "new", true), pod(1, "new", true), pod(2, "new", true)];
        let status = status(&all(0), &revisions(), &done, sampan_world::clock::now());
        assert_eq!((status.current_revision.as_deref(), status.current_replicas), (Some("new"), Some(3)));
    }
}
