//! The pods that this node last knew, on disk, so that it can start them after a reboot without its server.
//!
//! Upstream has no counterpart (only static pods). Written a moment after a pod came, went or changed its spec, not on
//! status changes; a pod that has ended is kept as ended.
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::ResourceExt;

const FILE: &str = "last-known-pods.json";

/// What of a pod is kept.
fn kept(pod: &Pod) -> Pod {
    let mut kept = pod.clone();
    kept.metadata.managed_fields = None;
    kept.metadata.resource_version = None;
    kept.status = pod.status.as_ref().map(|status| PodStatus {
        // only an end matters: what runs is seen in the runtime
        phase: status.phase.clone().filter(|p| p == "Succeeded" || p == "Failed"),
        start_time: status.start_time.clone(),
        ..PodStatus::default()
    });
    kept
}

/// The file's content; equal where nothing that matters changed.
pub fn content(pods: &[Arc<Pod>]) -> Vec<u8> {
    let mut kept: Vec<Pod> = pods.iter().map(|p| kept(p)).collect();
    kept.sort_by_key(|p| p.uid());
    serde_json::to_vec(&kept).unwrap_or_default()
}

pub fn save(root: &Path, content: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(root)?;
    sampan_world::files::write_atomic(&root.join(FILE), content, 0o600)
}

/// Nothing where there is no file, or none that can be read.
pub fn load(root: &Path) -> Vec<Pod> {
    let Ok(text) = std::fs::read_to_string(root.join(FILE)) else { return Vec::new() };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        tracing::warn!(%error, "the last known pods cannot be read");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keeps_pods_and_ends_but_not_statuses() {
        let dir = tempfile::tempdir().unwrap();
        let pod = |phase: &str, version: &str| -> Arc<Pod> {
            Arc::new(
                serde_json::from_value(
                    json!({"metadata": {"name": "p", "uid": "u", "resourceVersion": version},
                    "spec": {"containers": []}, "status": {"phase": phase}}),
                )
                .unwrap(),
            )
        };
        assert!(load(dir.path()).is_empty());
        assert_eq!(content(&[pod("Running", "1")]), content(&[pod("Pending", "2")]), "no write for a status");
        save(dir.path(), &content(&[pod("Failed", "3")])).unwrap();
        assert_eq!(load(dir.path())[0].status.as_ref().unwrap().phase.as_deref(), Some("Failed"));
    }
}
