//! How many replicas each replica set may have: pure numbers. Upstream counterpart:
//! pkg/controller/deployment/util/deployment_util.go, rolling.go, sync.go.
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::int_or_percent::scaled;

pub const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";

pub fn strategy(deployment: &Deployment) -> &str {
    let strategy = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()).unwrap_or("RollingUpdate")
}

pub fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

/// The replicas that a replica set is asked to have.
pub fn size(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

pub fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
}

pub fn sizes<'a>(sets: impl IntoIterator<Item = &'a ReplicaSet>) -> i32 {
    sets.into_iter().map(size).sum()
}

fn annotation(set: &ReplicaSet, name: &str) -> Option<i32> {
    set.metadata.annotations.as_ref()?.get(name)?.parse().ok()
}

pub fn desired_annotation(set: &ReplicaSet) -> Option<i32> {
    annotation(set, DESIRED_REPLICAS)
}

/// maxSurge and maxUnavailable as numbers; both zero would get nowhere, so then one may be unavailable.
fn fence_posts(deployment: &Deployment) -> (i32, i32) {
    let rolling =
        deployment.spec.as_ref().and_then(|s| s.strategy.as_ref()).and_then(|s| s.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_string());
    let total = replicas(deployment);
    let surge = rolling.and_then(|r| r.max_surge.as_ref()).unwrap_or(&quarter);
    let unavailable = rolling.and_then(|r| r.max_unavailable.as_ref()).unwrap_or(&quarter);
    let surge = scaled(surge, total, true).unwrap_or(0);
    let unavailable = scaled(unavailable, total, false).unwrap_or(0);
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

pub fn max_surge(deployment: &Deployment) -> i32 {
    if strategy(deployment) == "RollingUpdate" { fence_posts(deployment).0 } else { 0 }
}

pub fn max_unavailable(deployment: &Deployment) -> i32 {
    let replicas = replicas(deployment);
    if strategy(deployment) != "RollingUpdate" || replicas == 0 {
        return 0;
    }
    fence_posts(deployment).1.min(replicas)
}

/// The size that the new replica set may have now, given the sizes of all (itself included).
pub fn new_size(deployment: &Deployment, all: i32, new: i32) -> i32 {
    let wanted = replicas(deployment);
    if strategy(deployment) == "Recreate" {
        return wanted;
    }
    let most = wanted + max_surge(deployment);
    if all >= most { new } else { new + (most - all).min(wanted - new) }
}

/// How many replicas may go from old replica sets altogether.
pub fn max_scaled_down(deployment: &Deployment, all: i32, new: &ReplicaSet) -> i32 {
    let min_available = replicas(deployment) - max_unavailable(deployment);
    all - min_available - (size(new) - available(new))
}

/// The sizes that take up to `most` replicas that are not available from `old`, in its order.
pub fn without_unhealthy(old: &[ReplicaSet], most: i32) -> Vec<i32> {
    let mut left = most;
    let shrink = |set: &ReplicaSet| {
        let take = (size(set) - available(set)).clamp(0, left.max(0));
        left -= take;
        size(set) - take
    };
    old.iter().map(shrink).collect()
}

/// The sizes that take up to `most` replicas from `old`, in its order.
pub fn scaled_down(old: &[ReplicaSet], most: i32) -> Vec<i32> {
    let mut left = most;
    let shrink = |set: &ReplicaSet| {
        let take = size(set).min(left.max(0));
        left -= take;
        size(set) - take
    };
    old.iter().map(shrink).collect()
}

/// Whether the new replica set has and is known to have all replicas, all available.
pub fn is_saturated(deployment: &Deployment, new: &ReplicaSet) -> bool {
    let wanted = replicas(deployment);
    size(new) == wanted && desired_annotation(new) == Some(wanted) && available(new) == wanted
}

/// The share of a change in size that falls to `set`.
fn proportion(deployment: &Deployment, set: &ReplicaSet, to_add: i32, added: i32) -> i32 {
    if size(set) == 0 || to_add == 0 || to_add == added {
        return 0;
    }
    let fraction = fraction(deployment, set);
    let allowed = to_add - added;
    if to_add > 0 { fraction.min(allowed) } else { fraction.max(allowed) }
}

fn fraction(deployment: &Deployment, set: &ReplicaSet) -> i32 {
    let wanted = replicas(deployment);
    if wanted == 0 {
        return -size(set);
    }
    let before = annotation(set, MAX_REPLICAS).filter(|n| *n != 0);
    let before = before.or(deployment.status.as_ref().and_then(|s| s.replicas)).unwrap_or(0);
    if before == 0 {
        return 0;
    }
    let new = f64::from(size(set)) * f64::from(wanted + max_surge(deployment)) / f64::from(before);
    new.round() as i32 - size(set)
}

/// Spreads a change of the deployment's size over its active replica sets: their names and new sizes.
pub fn proportional_sizes(deployment: &Deployment, active: &mut [ReplicaSet]) -> Vec<i32> {
    let wanted = replicas(deployment);
    let allowed = if wanted > 0 { wanted + max_surge(deployment) } else { 0 };
    let to_add = allowed - sizes(&*active);
    let created = |s: &ReplicaSet| s.metadata.creation_timestamp.clone();
    // the largest first; of equals the newest when growing, the oldest when shrinking
    active.sort_by(|a, b| {
        let by_age = if to_add > 0 { created(b).cmp(&created(a)) } else { created(a).cmp(&created(b)) };
        size(b).cmp(&size(a)).then(by_age).then_with(|| a.metadata.name.cmp(&b.metadata.name))
    });
    let mut added = 0;
    let mut new_sizes = Vec::with_capacity(active.len());
    for set in &*active {
        let share = proportion(deployment, set, to_add, added);
        added += share;
        new_sizes.push(size(set) + share);
    }
    if let Some(first) = new_sizes.first_mut().filter(|_| to_add != 0) {
        *first = (*first + to_add - added).max(0);
    }
    new_sizes
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn deployment(
        replicas: i32,
        surge: serde_json::Value,
        unavailable: serde_json::Value,
    ) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "d", "namespace": "ns", "uid": "d-uid", "generation": 1},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "a"}},
                "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c"}]}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}},
        }))
        .unwrap()
    }

    pub(crate) fn set(name: &str, size: i32, available: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "ns", "uid": name},
            "spec": {"replicas": size, "selector": {}},
            "status": {"replicas": size, "availableReplicas": available},
        }))
        .unwrap()
    }

    #[test]
    fn fence_posts_never_stand_still() {
        let d = deployment(10, json!("25%"), json!("25%"));
        assert_eq!((max_surge(&d), max_unavailable(&d)), (3, 2));
        let d = deployment(10, json!(0), json!("1%"));
        assert_eq!((max_surge(&d), max_unavailable(&d)), (0, 1));
        assert_eq!(max_unavailable(&deployment(2, json!(0), json!(5))), 2);
    }

    #[test]
    fn the_new_set_grows_within_the_surge() {
        let d = deployment(10, json!(2), json!(0));
        for (all, new, expected) in [(10, 0, 2), (12, 2, 2), (11, 2, 3), (10, 9, 10), (0, 0, 10)] {
            assert_eq!(new_size(&d, all, new), expected, "{all} {new}");
        }
    }

    #[test]
    fn old_sets_shrink_unhealthy_first() {
        let d = deployment(10, json!(0), json!(2));
        assert_eq!(max_scaled_down(&d, 10, &set("new", 0, 0)), 2);
        assert_eq!(max_scaled_down(&d, 10, &set("new", 2, 0)), 0);
        assert_eq!(without_unhealthy(&[set("a", 5, 5), set("b", 5, 3)], 1), [5, 4]);
        assert_eq!(scaled_down(&[set("a", 1, 1), set("b", 5, 5)], 3), [0, 3]);
    }

    #[test]
    fn scaling_is_proportional() {
        let d = deployment(20, json!(0), json!(1));
        let mut sets = [set("a", 8, 8), set("b", 2, 2)];
        for set in &mut sets {
            set.metadata.annotations = Some([(MAX_REPLICAS.to_string(), "10".to_string())].into());
        }
        assert_eq!(proportional_sizes(&d, &mut sets), [16, 4]);
        let d = deployment(0, json!(0), json!(1));
        assert_eq!(proportional_sizes(&d, &mut sets), [0, 0]);
    }
}
