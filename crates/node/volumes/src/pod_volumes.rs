//! All volumes of one pod. Upstream counterpart: pkg/kubelet/volumemanager/reconciler and pkg/kubelet/kubelet_volumes.go.
//!
//! A pod's folder is `pods/<uid>` with `volumes/kubernetes.io~<plugin>/<name>` below it, as upstream has it.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use parking_lot::RwLock;

use crate::{Mounted, PodObjects, SetUp, VolumeError, mounts, plugins};

/// What plugins may use of the node.
pub struct VolumeHost {
    /// The kubelet's root folder, which holds `pods`.
    pub root: PathBuf,
    pub objects: Arc<dyn PodObjects>,
    /// Whether secrets may lie in memory file systems; without the privilege to mount they lie on disk.
    pub memory_backed: bool,
    /// The node's allocatable resources: what limits default to.
    pub allocatable: RwLock<BTreeMap<String, Quantity>>,
}

impl VolumeHost {
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(uid)
    }

    /// The UIDs that have a folder on this node.
    pub fn pods_on_disk(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join("pods"));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// Sets up every volume of the pod. Errors are per volume and complete: all that can be set up is.
    pub async fn set_up(&self, pod: &Pod) -> Result<PodVolumes, Vec<(String, VolumeError)>> {
        let uid = pod.uid().unwrap_or_default();
        let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_deref()).unwrap_or_default();
        let results = join_all(volumes.iter().map(|volume| async {
            let plugin = plugins::find(volume)?;
            let kind = format!("kubernetes.io~{}", folder_name(plugin.name()));
            let dir = self.pod_dir(&uid).join("volumes").join(kind).join(&volume.name);
            plugin.set_up(&SetUp { host: self, pod, volume, dir }).await
        }))
        .await;
        let (mut mounted, mut errors) = (BTreeMap::new(), Vec::new());
        for (volume, result) in volumes.iter().zip(results) {
            match result {
                Ok(done) => drop(mounted.insert(volume.name.clone(), done)),
                Err(error) => errors.push((volume.name.clone(), error)),
            }
        }
        if errors.is_empty() { Ok(PodVolumes { mounted }) } else { Err(errors) }
    }

    /// Unmounts all of the pod and removes its folder. Safe to repeat.
    pub async fn tear_down(&self, uid: &str) -> Result<(), VolumeError> {
        if uid.is_empty() || uid.contains('/') || uid.starts_with('.') {
            return Err(VolumeError::Invalid(format!("{uid:?} is not a pod's UID")));
        }
        let dir = self.pod_dir(uid);
        let shown = dir.display().to_string();
        let removed = tokio::task::spawn_blocking(move || mounts::remove_tree(&dir)).await;
        removed
            .map_err(|e| VolumeError::Invalid(e.to_string()))?
            .map_err(VolumeError::io(format!("removing {shown}")))
    }
}

fn folder_name(plugin: &str) -> String {
    match plugin {
        "emptyDir" => "empty-dir".to_string(),
        "downwardAPI" => "downward-api".to_string(),
        "hostPath" => "host-path".to_string(),
        other => other.to_lowercase(),
    }
}

/// A pod's volumes, set up.
#[derive(Clone, Debug, Default)]
pub struct PodVolumes {
    mounted: BTreeMap<String, Mounted>,
}

impl PodVolumes {
    /// Where the volume of that name lies on the node.
    pub fn path(&self, volume: &str) -> Option<&Path> {
        self.mounted.get(volume).map(|m| m.host_path.as_path())
    }

    /// When to set up again at the latest.
    pub fn refresh_after(&self) -> Option<Duration> {
        self.mounted.values().filter_map(|m| m.refresh_after).min()
    }
}
