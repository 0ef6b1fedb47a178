//! A node that runs short: which pods go, and which images.
//!
//! Upstream counterparts: pkg/kubelet/eviction, pkg/kubelet/images/image_gc_manager.go. Simpler than upstream: hard
//! thresholds for memory and disk, one pod a sample, no grace; images by use only. Sampled with the lease, every 10 s.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt;
use sampan_kinds::core::v1::pod_spec::requests;

use crate::config::KubeletConfig;
use crate::node::machine;
use crate::node_services::NodeServices;
use crate::resources;
use crate::worker::Eviction;

/// What the node is short of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pids: bool,
}

pub fn sample(config: &KubeletConfig) -> Pressure {
    let available = machine::meminfo_bytes("MemAvailable");
    let disk = machine::filesystem_bytes(&config.root_dir);
    Pressure {
        memory: available.is_some_and(|bytes| bytes < config.eviction_memory_bytes),
        disk: disk.is_some_and(|(all, free)| free < all / 100 * config.eviction_disk_percent),
        pids: false,
    }
}

/// The pod that goes first: best effort before burstable before guaranteed, low priority first, then those that asked
/// for least. Critical pods stay.
pub fn victim(pods: &[Arc<Pod>]) -> Option<Arc<Pod>> {
    let class = |pod: &Pod| match resources::qos(pod) {
        "BestEffort" => 0,
        "Burstable" => 1,
        _ => 2,
    };
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
    let is_over = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed")) || pod.metadata.deletion_timestamp.is_some()
    };
    let asked =
        |pod: &Pod| pod.spec.as_ref().map(requests::pod_requests).and_then(|r| r.get("memory").copied());
    pods.iter()
        .filter(|p| priority(p) < 2_000_000_000 && !is_over(p) && !crate::static_pods::is_static(p))
        .min_by_key(|p| (class(p), priority(p), asked(p).unwrap_or_default(), p.uid()))
        .cloned()
}

pub fn eviction(resource: &str) -> Eviction {
    let message = format!("The node was low on resource: {resource}. ");
    Eviction {
        reason: "Evicted".to_string(),
        message: message.clone(),
        grace_seconds: 1,
        condition: Some(PodCondition {
            type_: "DisruptionTarget".into(),
            status: "True".into(),
            reason: Some("TerminationByKubelet".into()),
            message: Some(message),
            ..PodCondition::default()
        }),
    }
}

/// Removes images that no container uses until the file system is below the lower mark.
pub async fn collect_images(services: &NodeServices) {
    let config = &services.config;
    let used_percent = || {
        let (all, free) = machine::filesystem_bytes(&config.root_dir)?;
        Some(100 - (free * 100).checked_div(all)?)
    };
    if used_percent().is_none_or(|used| used < config.image_gc_high_percent) {
        return;
    }
    let Ok(containers) = services.runtime.list_containers().await else { return };
    let Ok(mut images) = services.runtime.list_images().await else { return };
    images.retain(|image| !image.pinned && !containers.iter().any(|c| c.image_id == image.id));
    images.sort_by_key(|image| std::cmp::Reverse(image.size_bytes));
    for image in images {
        if used_percent().is_none_or(|used| used < config.image_gc_low_percent) {
            return;
        }
        match services.runtime.remove_image(&image.id).await {
            Ok(()) => tracing::info!(image = image.id, "removed an unused image: the disk is nearly full"),
            Err(error) => tracing::warn!(image = image.id, %error, "removing an unused image"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn best_effort_goes_first_and_critical_stays() {
        let pod = |uid: &str, memory: Option<&str>, priority: i32, phase: &str| -> Arc<Pod> {
            let resources = memory.map(|m| json!({"requests": {"memory": m}})).unwrap_or(json!({}));
            Arc::new(
                serde_json::from_value(json!({"metadata": {"uid": uid}, "status": {"phase": phase}, "spec":
                    {"priority": priority, "containers": [{"name": "c", "resources": resources}]}}))
                .unwrap(),
            )
        };
        let all = [
            pod("burstable", Some("1Gi"), 0, "Running"),
            pod("high", None, 5, "Running"),
            pod("low", None, 0, "Running"),
            pod("over", None, -5, "Failed"),
            pod("critical", None, 2_000_001_000, "Running"),
        ];
        assert_eq!(victim(&all).unwrap().uid().unwrap(), "low");
        assert_eq!(victim(&all[..1]).unwrap().uid().unwrap(), "burstable");
        assert!(victim(&all[3..]).is_none());
    }
}
