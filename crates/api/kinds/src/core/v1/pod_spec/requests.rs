//! What a pod asks for altogether, and its quality-of-service class.
//!
//! Upstream counterpart: k8s.io/component-helpers/resource/helpers.go and pkg/apis/core/helper/qos.
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

use crate::quantity::{Amount, ResourceList, amount};

type Quantities = BTreeMap<String, Quantity>;

/// cpu, memory and huge pages may be asked for by a pod as a whole.
pub fn is_supported_pod_level_resource(name: &str) -> bool {
    name == "cpu" || name == "memory" || name.starts_with("hugepages-")
}

/// An init container that keeps running beside the others.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What the scheduler holds free for a pod: containers together, or the init containers' highest demand, sidecars
/// included, pod-level requests in their place where set, and the overhead.
pub fn pod_requests(spec: &PodSpec) -> ResourceList {
    let mut requests = aggregate_container_requests(spec);
    for (name, quantity) in spec.resources.iter().filter_map(|r| r.requests.as_ref()).flatten() {
        if is_supported_pod_level_resource(name) {
            requests.insert(name.clone(), amount(quantity));
        }
    }
    add(&mut requests, spec.overhead.as_ref());
    requests
}

/// A pod's limits: as [`pod_requests`], the overhead added only where there is a limit.
pub fn pod_limits(spec: &PodSpec) -> ResourceList {
    let mut limits = aggregate_container_limits(spec);
    for (name, quantity) in spec.resources.iter().filter_map(|r| r.limits.as_ref()).flatten() {
        if is_supported_pod_level_resource(name) {
            limits.insert(name.clone(), amount(quantity));
        }
    }
    for (name, quantity) in spec.overhead.iter().flatten() {
        if let Some(limit) = limits.get_mut(name).filter(|l| **l != Amount::ZERO) {
            *limit = limit.plus(amount(quantity));
        }
    }
    limits
}

/// The containers' requests without pod-level ones and overhead.
pub fn aggregate_container_requests(spec: &PodSpec) -> ResourceList {
    aggregate(spec, |resources| resources.requests.as_ref())
}

/// The containers' limits without pod-level ones and overhead.
pub fn aggregate_container_limits(spec: &PodSpec) -> ResourceList {
    aggregate(spec, |resources| resources.limits.as_ref())
}

fn aggregate(spec: &PodSpec, pick: fn(&ResourceRequirements) -> Option<&Quantities>) -> ResourceList {
    let of = |container: &'_ Container| -> ResourceList {
        let mut list = ResourceList::new();
        add(&mut list, container.resources.as_ref().and_then(pick));
        list
    };
    let mut total = ResourceList::new();
    for container in &spec.containers {
        add_amounts(&mut total, &of(container));
    }
    let (mut sidecars, mut init) = (ResourceList::new(), ResourceList::new());
    for container in spec.init_containers.iter().flatten() {
        let own = of(container);
        if is_sidecar(container) {
            add_amounts(&mut total, &own);
            add_amounts(&mut sidecars, &own);
            raise(&mut init, &sidecars);
        } else {
            let mut then = sidecars.clone();
            add_amounts(&mut then, &own);
            raise(&mut init, &then);
        }
    }
    raise(&mut total, &init);
    total
}

fn add(list: &mut ResourceList, more: Option<&Quantities>) {
    for (name, quantity) in more.into_iter().flatten() {
        let sum = list.entry(name.clone()).or_default();
        *sum = sum.plus(amount(quantity));
    }
}

fn add_amounts(list: &mut ResourceList, more: &ResourceList) {
    for (name, amount) in more {
        let sum = list.entry(name.clone()).or_default();
        *sum = sum.plus(*amount);
    }
}

fn raise(list: &mut ResourceList, other: &ResourceList) {
    for (name, amount) in other {
        let highest = list.entry(name.clone()).or_insert(*amount);
        *highest = (*highest).max(*amount);
    }
}

/// The QoS class of a pod: the one in its status, else computed.
pub fn pod_qos(pod: &Pod) -> &'static str {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => "Guaranteed",
        Some("Burstable") => "Burstable",
        Some("BestEffort") => "BestEffort",
        _ => pod.spec.as_ref().map_or("BestEffort", compute_qos),
    }
}

/// The QoS class that a spec makes.
pub fn compute_qos(spec: &PodSpec) -> &'static str {
    let counted = |list: Option<&Quantities>| -> ResourceList {
        let positive = |(name, quantity): (&String, &Quantity)| (name.clone(), amount(quantity));
        list.into_iter()
            .flatten()
            .map(positive)
            .filter(|(name, amount)| (name == "cpu" || name == "memory") && *amount > Amount::ZERO)
            .collect()
    };
    let (mut requests, mut limits) = (ResourceList::new(), ResourceList::new());
    let mut guaranteed = true;
    let mut take = |resources: &ResourceRequirements, is_pod: bool| {
        add_amounts(&mut requests, &counted(resources.requests.as_ref()));
        let own = counted(resources.limits.as_ref());
        let unlimited = is_pod && resources.limits.as_ref().is_none_or(BTreeMap::is_empty);
        guaranteed &= own.len() == 2 || unlimited;
        add_amounts(&mut limits, &own);
    };
    match &spec.resources {
        Some(resources) => take(resources, true),
        None => {
            let none = ResourceRequirements::default();
            for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
                take(container.resources.as_ref().unwrap_or(&none), false);
            }
        }
    }
    if requests.is_empty() && limits.is_empty() {
        return "BestEffort";
    }
    let covered = requests.iter().all(|(name, request)| limits.get(name) == Some(request));
    if guaranteed && covered && requests.len() == limits.len() { "Guaranteed" } else { "Burstable" }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: Value) -> PodSpec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn init_containers_and_sidecars_count_as_upstream() {
        let container = |cpu: &str, policy: Option<&str>| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}, "restartPolicy": policy});
        let cases = [
            (json!([container("1", None)]), json!([]), json!(null), 1000),
            (json!([container("1", None)]), json!([container("3", None)]), json!(null), 3000),
            (json!([container("1", None)]), json!([container("1", Some("Always"))]), json!(null), 2000),
            (
                json!([container("1", None)]),
                json!([container("1", Some("Always")), container("2", None)]),
                json!(null),
                3000,
            ),
            (json!([container("1", None)]), json!([]), json!({"requests": {"cpu": "5"}}), 5000),
        ];
        for (containers, init, resources, want) in cases {
            let spec = spec(json!({"containers": containers, "initContainers": init, "resources": resources,
                "overhead": {"cpu": "100m"}}));
            assert_eq!(pod_requests(&spec)["cpu"].milli_value(), want + 100, "{spec:?}");
        }
    }

    #[test]
    fn qos_classes() {
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let cases = [
            (json!({}), "BestEffort"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
            (json!({"requests": both, "limits": both}), "Guaranteed"),
            (json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": both}), "Burstable"),
            (json!({"requests": {"cpu": "1000m", "memory": "1Gi"}, "limits": both}), "Guaranteed"),
        ];
        for (resources, want) in cases {
            let pod = spec(json!({"containers": [{"name": "a", "resources": resources}]}));
            assert_eq!(compute_qos(&pod), want, "{resources}");
        }
    }
}
