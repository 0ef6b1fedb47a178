//! Keeps containers' logs bounded: at most five files of 10 MiB a container.
//!
//! Upstream counterpart: pkg/kubelet/logs/container_log_manager.go. Older files are not compressed.
use std::path::{Path, PathBuf};

use sampan_world::clock;

use crate::container_config::{POD_NAME, POD_NAMESPACE, POD_UID};
use crate::node_services::NodeServices;
use crate::plan::is_running;

const MAX_BYTES: u64 = 10 * 1024 * 1024;
const MAX_FILES: usize = 5;

/// Starts a new file for each running container whose log has grown too large.
pub async fn rotate(services: &NodeServices) {
    let Ok(containers) = services.runtime.list_containers().await else { return };
    for container in containers.iter().filter(|c| is_running(c)) {
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        let dir = services.config.pod_log_dir(label(POD_NAMESPACE), label(POD_NAME), label(POD_UID));
        let log = dir.join(&container.log_path);
        if !std::fs::metadata(&log).is_ok_and(|m| m.len() > MAX_BYTES) {
            continue;
        }
        let stamp = clock::now().as_second();
        let rotated = with_suffix(&log, &stamp.to_string());
        if let Err(error) = std::fs::rename(&log, &rotated) {
            tracing::warn!(%error, "rotating a log");
            continue;
        }
        if let Err(error) = services.runtime.reopen_container_log(&container.id).await {
            tracing::warn!(%error, "reopening a log");
            // the runtime still writes to the old file: give it its name back
            let _ = std::fs::rename(&rotated, &log);
            continue;
        }
        remove_oldest(&log);
    }
}

fn with_suffix(log: &Path, suffix: &str) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Leaves the newest rotated files beside the one that is written.
fn remove_oldest(log: &Path) {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name()) else { return };
    let prefix = format!("{}.", name.to_string_lossy());
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut rotated: Vec<PathBuf> = entries
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
        .collect();
    rotated.sort();
    let surplus = rotated.len().saturating_sub(MAX_FILES - 1);
    for path in &rotated[..surplus] {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        for stamp in 1000..1010 {
            std::fs::write(with_suffix(&log, &stamp.to_string()), "").unwrap();
        }
        std::fs::write(&log, "").unwrap();
        remove_oldest(&log);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), MAX_FILES);
        assert!(with_suffix(&log, "1009").exists() && log.exists());
    }
}
