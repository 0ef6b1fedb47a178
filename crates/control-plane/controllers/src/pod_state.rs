//! What a pod's status says: active, ready, available; and which pods to delete first.
//! Upstream counterpart: pkg/api/v1/pod/util.go and pkg/controller/controller_utils.go (ActivePodsWithRanks).
use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

pub fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Neither finished nor being deleted.
pub fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && pod.metadata.deletion_timestamp.is_none()
}

/// Being deleted, but not yet finished.
pub fn is_terminating(pod: &Pod) -> bool {
    !is_terminal(pod) && pod.metadata.deletion_timestamp.is_some()
}

pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

fn ready_condition(pod: &Pod) -> Option<&PodCondition> {
    condition(pod, "Ready").filter(|c| c.status == "True")
}

pub fn is_ready(pod: &Pod) -> bool {
    ready_condition(pod).is_some()
}

pub fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).unwrap_or_default()
}

fn ready_since(pod: &Pod) -> Option<Timestamp> {
    ready_condition(pod)?.last_transition_time.as_ref().map(|t| t.0)
}

/// Ready for at least `min_ready_seconds`.
pub fn is_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> bool {
    is_ready(pod)
        && (min_ready_seconds <= 0
            || ready_since(pod).is_some_and(|t| left(t, min_ready_seconds, now).is_none()))
}

fn left(since: Timestamp, seconds: i32, now: Timestamp) -> Option<Duration> {
    let left = i64::from(seconds) * 1000 - now.duration_since(since).as_millis() as i64;
    u64::try_from(left).ok().filter(|ms| *ms > 0).map(Duration::from_millis)
}

/// When the first of `pods` that is ready but not yet available becomes available.
pub fn next_availability<'a>(
    pods: impl IntoIterator<Item = &'a Arc<Pod>>,
    min_ready_seconds: i32,
    now: Timestamp,
) -> Option<Duration> {
    if min_ready_seconds <= 0 {
        return None;
    }
    pods.into_iter().filter_map(|p| left(ready_since(p)?, min_ready_seconds, now)).min()
}

fn phase_rank(pod: &Pod) -> u8 {
    match phase(pod) {
        "Unknown" => 1,
        "Running" => 2,
        _ => 0,
    }
}

pub fn deletion_cost(pod: &Pod) -> i32 {
    let annotations = pod.metadata.annotations.as_ref();
    annotations
        .and_then(|a| a.get("controller.kubernetes.io/pod-deletion-cost"))
        .and_then(|c| c.parse().ok())
        .unwrap_or(0)
}

/// The most restarts of a regular container and of a sidecar.
fn max_restarts(pod: &Pod) -> (i32, i32) {
    let Some(status) = &pod.status else { return (0, 0) };
    let regular = status.container_statuses.iter().flatten().map(|c| c.restart_count).max().unwrap_or(0);
    let init = pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten());
    let sidecars: Vec<&str> =
        init.filter(|c| c.restart_policy.as_deref() == Some("Always")).map(|c| c.name.as_str()).collect();
    let statuses = status.init_container_statuses.iter().flatten();
    let sidecar =
        statuses.filter(|c| sidecars.contains(&c.name.as_str())).map(|c| c.restart_count).max().unwrap_or(0);
    (regular, sidecar)
}

/// The base-2 logarithm of an age: pods of similar age count as equally old.
fn age_rank(since: Timestamp, now: Timestamp) -> i64 {
    let age = now.duration_since(since).as_nanos();
    if age > 0 { i64::from(age.ilog2()) } else { -1 }
}

/// Newer first, in a logarithmic scale; no time at all first; then by UID.
fn newer_first(a: &Pod, b: &Pod, times: (Option<Timestamp>, Option<Timestamp>), now: Timestamp) -> Ordering {
    match times {
        (None, None) => Ordering::Equal,
        (None, _) => Ordering::Less,
        (_, None) => Ordering::Greater,
        (Some(x), Some(y)) if x == y => Ordering::Equal,
        (Some(x), Some(y)) => {
            age_rank(x, now).cmp(&age_rank(y, now)).then_with(|| a.metadata.uid.cmp(&b.metadata.uid))
        }
    }
}

/// Orders pods by which to delete first; `rank` is how many active pods of its owner share the pod's node.
pub fn deletion_order(a: (&Pod, usize), b: (&Pod, usize), now: Timestamp) -> Ordering {
    let ((a, rank_a), (b, rank_b)) = (a, b);
    let created = |p: &Pod| p.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let assigned = (!node_name(a).is_empty()).cmp(&!node_name(b).is_empty());
    assigned
        .then_with(|| phase_rank(a).cmp(&phase_rank(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| deletion_cost(a).cmp(&deletion_cost(b)))
        .then_with(|| rank_b.cmp(&rank_a))
        .then_with(|| match is_ready(a) && is_ready(b) {
            true => newer_first(a, b, (ready_since(a), ready_since(b)), now),
            false => Ordering::Equal,
        })
        .then_with(|| max_restarts(b).cmp(&max_restarts(a)))
        .then_with(|| newer_first(a, b, (created(a), created(b)), now))
}

/// A pod of that name, phase and node for tests.
#[cfg(test)]
pub(crate) fn test_pod(name: &str, phase: &str, node: &str, ready: bool) -> Pod {
    let conditions = serde_json::json!([{"type": "Ready", "status": if ready { "True" } else { "False" },
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let pod = serde_json::json!({
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "labels": {"app": "a"},
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": phase, "conditions": conditions},
    });
    serde_json::from_value(pod).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims() {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let pods = [
            (test_pod("ready-alone", "Running", "n1", true), 1),
            (test_pod("ready-doubled", "Running", "n2", true), 2),
            (test_pod("unready", "Running", "n1", false), 1),
            (test_pod("pending", "Pending", "n1", false), 1),
            (test_pod("unassigned", "Pending", "", false), 0),
        ];
        let mut order: Vec<_> = pods.iter().collect();
        order.sort_by(|a, b| deletion_order((&a.0, a.1), (&b.0, b.1), now));
        let names: Vec<_> = order.iter().map(|p| p.0.metadata.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["unassigned", "pending", "unready", "ready-doubled", "ready-alone"]);
    }

    #[test]
    fn availability_needs_time() {
        let pod = Arc::new(test_pod("a", "Running", "n", true));
        let at = |s: &str| s.parse::<Timestamp>().unwrap();
        assert!(!is_available(&pod, 10, at("2026-01-01T00:00:09Z")));
        assert!(is_available(&pod, 10, at("2026-01-01T00:00:10Z")));
        assert_eq!(next_availability([&pod], 10, at("2026-01-01T00:00:04Z")), Some(Duration::from_secs(6)));
        assert_eq!(next_availability([&pod], 10, at("2026-01-01T00:00:10Z")), None);
    }
}
