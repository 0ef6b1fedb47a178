//! Amounts of resources as machine words. Upstream counterparts: `Resource` in pkg/scheduler/framework/types.go,
//! non_zero.go in pkg/scheduler/util.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use sampan_kinds::core::v1::pod_spec::pod_requests;
use sampan_kinds::quantity::{Amount, amount};

/// What scoring takes a container for that requests nothing, so that such pods spread too.
const DEFAULT_MILLI_CPU: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub milli_cpu: i64,
    pub memory_bytes: i64,
    pub ephemeral_storage_bytes: i64,
    /// Of a node: how many pods it takes.
    pub pods: i64,
    /// Extended resources and huge pages.
    pub scalar: BTreeMap<String, i64>,
}

impl Resources {
    pub fn of_pod(spec: &PodSpec) -> Self {
        let mut resources = Self::default();
        for (name, amount) in pod_requests(spec) {
            resources.set(&name, amount);
        }
        resources
    }

    pub fn of_list(list: &BTreeMap<String, Quantity>) -> Self {
        let mut resources = Self::default();
        for (name, quantity) in list {
            resources.set(name, amount(quantity));
        }
        resources
    }

    fn set(&mut self, name: &str, amount: Amount) {
        match name {
            "cpu" => self.milli_cpu = amount.milli_value(),
            "memory" => self.memory_bytes = amount.value(),
            "ephemeral-storage" => self.ephemeral_storage_bytes = amount.value(),
            "pods" => self.pods = amount.value(),
            name if is_scalar(name) => {
                self.scalar.insert(name.to_string(), amount.value());
            }
            _ => {}
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.change(other, 1);
    }

    pub fn sub(&mut self, other: &Self) {
        self.change(other, -1);
    }

    fn change(&mut self, other: &Self, sign: i64) {
        self.milli_cpu += sign * other.milli_cpu;
        self.memory_bytes += sign * other.memory_bytes;
        self.ephemeral_storage_bytes += sign * other.ephemeral_storage_bytes;
        for (name, amount) in &other.scalar {
            *self.scalar.entry(name.clone()).or_default() += sign * amount;
        }
    }

    pub fn scalar_of(&self, name: &str) -> i64 {
        self.scalar.get(name).copied().unwrap_or(0)
    }

    /// Whether there is more of anything than in `other`.
    pub fn exceeds_anywhere(&self, other: &Self) -> bool {
        self.milli_cpu > other.milli_cpu
            || self.memory_bytes > other.memory_bytes
            || self.ephemeral_storage_bytes > other.ephemeral_storage_bytes
            || self.scalar.iter().any(|(name, amount)| *amount > other.scalar_of(name))
    }

    /// No request that could be insufficient.
    pub fn is_nothing(&self) -> bool {
        self.milli_cpu == 0
            && self.memory_bytes == 0
            && self.ephemeral_storage_bytes == 0
            && self.scalar.values().all(|v| *v == 0)
    }
}

/// Extended, huge page and attachable volume resources.
fn is_scalar(name: &str) -> bool {
    name.contains('/') || name.starts_with("hugepages-") || name.starts_with("attachable-volumes-")
}

/// CPU (milli) and memory with defaults for containers that request none.
pub fn non_zero_requests(spec: &PodSpec) -> (i64, i64) {
    let cpu = one_request(spec, "cpu", Amount::units(DEFAULT_MILLI_CPU), true);
    let memory = one_request(spec, "memory", Amount::units(DEFAULT_MEMORY_BYTES), false);
    (cpu, memory)
}

/// The pod's request of one resource with `default` for containers without one, by the rules of `pod_requests`.
fn one_request(spec: &PodSpec, name: &str, default: Amount, milli: bool) -> i64 {
    let read = |q: &Quantity| if milli { amount(q).milli_value() } else { amount(q).value() };
    let default = default.value();
    let of = |c: &Container| {
        let own = c.resources.as_ref().and_then(|r| r.requests.as_ref()).and_then(|r| r.get(name));
        own.map_or(default, read)
    };
    let mut total: i64 = spec.containers.iter().map(of).sum();
    let (mut sidecars, mut init) = (0, 0);
    for container in spec.init_containers.iter().flatten() {
        if container.restart_policy.as_deref() == Some("Always") {
            total += of(container);
            sidecars += of(container);
            init = init.max(sidecars);
        } else {
            init = init.max(sidecars + of(container));
        }
    }
    total = total.max(init);
    let own = spec.resources.as_ref().and_then(|r| r.requests.as_ref()).and_then(|r| r.get(name));
    total = own.map_or(total, read);
    total + spec.overhead.as_ref().and_then(|o| o.get(name)).map_or(0, read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_requests_and_what_scoring_takes_them_for() {
        let spec: PodSpec = serde_json::from_value(json!({
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "1", "example.com/gpu": "2"}}}, {"name": "b"}],
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "3", "memory": "1Gi"}}}],
            "overhead": {"cpu": "50m"}
        }))
        .unwrap();
        let requests = Resources::of_pod(&spec);
        assert_eq!(requests.milli_cpu, 3050);
        assert_eq!(requests.memory_bytes, 1 << 30);
        assert_eq!(requests.scalar_of("example.com/gpu"), 2);
        assert_eq!(non_zero_requests(&spec), (3050, 1 << 30));
        let spec: PodSpec =
            serde_json::from_value(json!({"containers": [{"name": "a"}, {"name": "b"}]})).unwrap();
        assert_eq!(non_zero_requests(&spec), (200, 400 << 20));
    }
}
