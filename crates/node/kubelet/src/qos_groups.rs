//! The control groups above pods: `kubepods` and its `burstable` and `besteffort`.
//!
//! Upstream counterparts: pkg/kubelet/cm/qos_container_manager_linux.go, node_container_manager_linux.go. Burstable pods
//! together weigh as much as they ask for, best-effort pods as little as there is. Unlike upstream nothing is written
//! periodically, only when the sum has changed; memory is limited only on a node that keeps some for itself.
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use sampan_drivers::runtime::Resources;
use sampan_kinds::core::v1::pod_spec::requests;
use sampan_kinds::quantity::Amount;

use crate::node_services::NodeServices;
use crate::resources;

const ROOT: &str = "kubepods";

async fn limit(services: &NodeServices, group: &str, resources: Resources) {
    if let Err(error) = services.runtime.limit_group(group, &resources).await {
        tracing::warn!(group, %error, "setting the limits of a group of pods");
    }
}

/// Makes the groups as they are without pods.
pub async fn start(services: &Arc<NodeServices>) {
    let (cpu, memory) = {
        let allocatable = services.volumes.allocatable.read();
        (resources::amount(Some(&allocatable), "cpu"), resources::amount(Some(&allocatable), "memory"))
    };
    let is_kept = services.config.reserved.contains_key("memory");
    let all = Resources {
        cpu_shares: resources::shares(cpu.map_or(0, Amount::milli_value)),
        memory_limit_bytes: memory.filter(|_| is_kept).map_or(0, Amount::value),
        ..Resources::default()
    };
    limit(services, ROOT, all).await;
    let least = || Resources { cpu_shares: resources::shares(0), ..Resources::default() };
    limit(services, &format!("{ROOT}/besteffort"), least()).await;
    limit(services, &format!("{ROOT}/burstable"), least()).await;
}

/// What all burstable pods ask for, in thousandths of a processor.
fn burstable_milli<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>) -> i64 {
    pods.filter(|pod| resources::qos(pod) == "Burstable")
        .filter_map(|pod| requests::pod_requests(pod.spec.as_ref()?).get("cpu").copied())
        .map(Amount::milli_value)
        .sum()
}

/// To be called after a pod was let in or has gone.
pub fn update(services: &Arc<NodeServices>) {
    let shares = resources::shares(burstable_milli(services.admitted.lock().values()));
    if std::mem::replace(&mut *services.burstable_shares.lock(), shares) == shares {
        return;
    }
    let services = services.clone();
    tokio::spawn(async move {
        // whoever writes last has the newest number, however many are under way
        let _order = services.burstable_order.lock().await;
        let shares = *services.burstable_shares.lock();
        let burstable = Resources { cpu_shares: shares, ..Resources::default() };
        limit(&services, &format!("{ROOT}/burstable"), burstable).await;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_burstable_pods_count() {
        let pod = |resources: serde_json::Value| -> Arc<Pod> {
            let pod = json!({"spec": {"containers": [{"name": "c", "resources": resources}]}});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let same = json!({"cpu": "1", "memory": "1Gi"});
        let pods = [
            pod(json!({})),
            pod(json!({"requests": {"cpu": "300m"}})),
            pod(json!({"requests": {"cpu": "200m", "memory": "1Mi"}})),
            pod(json!({"requests": same, "limits": same})),
        ];
        assert_eq!(burstable_milli(pods.iter()), 500);
    }
}
