//! Requests and limits as the kernel counts them, and where in the cgroup tree a pod lies.
//!
//! Upstream counterparts: pkg/kubelet/cm/helpers_linux.go, pkg/kubelet/qos/policy.go, kuberuntime_container_linux.go.
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use sampan_drivers::runtime::Resources;
use sampan_kinds::core::v1::pod_spec::requests;
use sampan_kinds::quantity::{self, Amount};

pub fn amount(list: Option<&std::collections::BTreeMap<String, Quantity>>, name: &str) -> Option<Amount> {
    list?.get(name).and_then(|q| quantity::parse(&q.0)).map(|(a, _)| a)
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub fn qos(pod: &Pod) -> &'static str {
    requests::pod_qos(pod)
}

/// `kubepods[/burstable|/besteffort]/pod<uid>`.
pub fn cgroup_parent(pod: &Pod) -> String {
    let uid = pod.uid().unwrap_or_default();
    match qos(pod) {
        "Guaranteed" => format!("kubepods/pod{uid}"),
        class => format!("kubepods/{}/pod{uid}", class.to_lowercase()),
    }
}

pub fn shares(milli: i64) -> i64 {
    (milli * 1024 / 1000).clamp(2, 262_144)
}

fn quota_us(milli: i64) -> i64 {
    if milli <= 0 { 0 } else { (milli * 100).max(1000) }
}

/// -997 for what must live, 1000 for what may go first, in between by share of the node's memory.
fn oom_score_adj(pod: &Pod, container: &Container, node_memory_bytes: i64) -> i32 {
    let spec = pod.spec.as_ref();
    if spec.and_then(|s| s.priority).is_some_and(|p| p >= 2_000_000_000) {
        return -997;
    }
    match qos(pod) {
        "Guaranteed" => -997,
        "BestEffort" => 1000,
        _ => {
            let request = amount(container.resources.as_ref().and_then(|r| r.requests.as_ref()), "memory");
            let request = request.map_or(0, Amount::value);
            let adjusted = 1000 - (1000 * request).checked_div(node_memory_bytes.max(1)).unwrap_or(0);
            i32::try_from(adjusted.clamp(3, 999)).unwrap_or(999)
        }
    }
}

/// The limits of one container; the pod's count where it has none of its own.
pub fn of_container(pod: &Pod, container: &Container, node_memory_bytes: i64) -> Resources {
    let own = container.resources.as_ref();
    let of_pod = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    let limit = |name: &str| {
        amount(own.and_then(|r| r.limits.as_ref()), name)
            .or_else(|| amount(of_pod.and_then(|r| r.limits.as_ref()), name))
    };
    let request = amount(own.and_then(|r| r.requests.as_ref()), "cpu");
    let cpu_limit = limit("cpu").map_or(0, Amount::milli_value);
    Resources {
        cpu_period_us: 100_000,
        cpu_quota_us: quota_us(cpu_limit),
        cpu_shares: shares(request.map_or(cpu_limit, Amount::milli_value)),
        memory_limit_bytes: limit("memory").map_or(0, Amount::value),
        pids_limit: 0,
        oom_score_adj: oom_score_adj(pod, container, node_memory_bytes),
    }
}

/// The limits of the pod as a whole. A sum of limits counts only where each container has one, or the pod itself.
pub fn of_pod(pod: &Pod, pids_limit: i64) -> Resources {
    let spec = pod.spec.clone().unwrap_or_default();
    let limits = requests::pod_limits(&spec);
    let of_pod = spec.resources.as_ref().and_then(|r| r.limits.as_ref());
    let limit = |name: &str| {
        let is_set = |list| amount(list, name).is_some_and(|a| a > Amount::ZERO);
        let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let each = all.all(|c| is_set(c.resources.as_ref().and_then(|r| r.limits.as_ref())));
        limits.get(name).copied().filter(|_| each || is_set(of_pod))
    };
    let request = requests::pod_requests(&spec).get("cpu").copied().unwrap_or_default();
    Resources {
        cpu_period_us: 100_000,
        cpu_quota_us: quota_us(limit("cpu").map_or(0, Amount::milli_value)),
        cpu_shares: shares(request.milli_value()),
        memory_limit_bytes: limit("memory").map_or(0, Amount::value),
        pids_limit,
        oom_score_adj: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cgroup_values() {
        let cases = [
            (json!({}), "kubepods/besteffort/podu", 2, 0, 0, 1000),
            (
                json!({"requests": {"cpu": "500m", "memory": "1Gi"}}),
                "kubepods/burstable/podu",
                512,
                0,
                0,
                750,
            ),
            (
                json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}),
                "kubepods/podu",
                1024,
                100_000,
                1 << 30,
                -997,
            ),
            (
                json!({"limits": {"cpu": "5m"}, "requests": {"cpu": "1m"}}),
                "kubepods/burstable/podu",
                2,
                1000,
                0,
                999,
            ),
        ];
        for (resources, parent, shares, quota, memory, oom) in cases {
            let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "u"},
                "spec": {"containers": [{"name": "c", "resources": resources}]}}))
            .unwrap();
            let got = of_container(&pod, &pod.spec.as_ref().unwrap().containers[0], 4 << 30);
            assert_eq!(cgroup_parent(&pod), parent);
            let values = (got.cpu_shares, got.cpu_quota_us, got.memory_limit_bytes, got.oom_score_adj);
            assert_eq!(values, (shares, quota, memory, oom), "{resources}");
        }
    }

    #[test]
    fn a_pods_group_has_the_sums() {
        let limited = |cpu: &str, memory: &str| json!({"limits": {"cpu": cpu, "memory": memory}, "requests": {"cpu": "100m"}});
        let both = limited("500m", "1Mi");
        // containers, the pod's own resources, want: shares, quota, memory
        let cases = [
            (json!([{}]), json!(null), 2, 0, 0),
            (json!([{"resources": both}, {"resources": both}]), json!(null), 204, 100_000, 2 << 20),
            (json!([{"resources": both}, {}]), json!(null), 102, 0, 0),
            (json!([{"resources": both}, {}]), limited("2", "8Mi"), 102, 200_000, 8 << 20),
            (json!([{"resources": {"limits": {"memory": "1Mi"}}}]), json!(null), 2, 0, 1 << 20),
        ];
        for (containers, own, shares, quota, memory) in cases {
            let mut spec = json!({"containers": containers, "resources": own});
            for container in spec["containers"].as_array_mut().unwrap() {
                container["name"] = "c".into();
            }
            let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
            let got = of_pod(&pod, 7);
            let values = (got.cpu_shares, got.cpu_quota_us, got.memory_limit_bytes, got.pids_limit);
            assert_eq!(values, (shares, quota, memory, 7), "{spec}");
        }
    }
}
