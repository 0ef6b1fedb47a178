//! emptyDir: a folder that lives as long as its pod, on disk or in memory.
//!
//! Upstream counterpart: pkg/volume/emptydir. A memory medium is at most as large as sizeLimit, the pod's memory limit
//! and the node's memory. Huge pages are refused with a clear error.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Volume};
use sampan_kinds::quantity;

use super::Plugin;
use crate::{Mounted, SetUp, VolumeError, mounts, ownership};

pub static PLUGIN: EmptyDir = EmptyDir;

pub struct EmptyDir;

#[async_trait]
impl Plugin for EmptyDir {
    fn name(&self) -> &'static str {
        "emptyDir"
    }

    fn supports(&self, volume: &Volume) -> bool {
        volume.empty_dir.is_some()
    }

    async fn set_up(&self, set_up: &SetUp<'_>) -> Result<Mounted, VolumeError> {
        let source = set_up.volume.empty_dir.clone().unwrap_or_default();
        let dir = &set_up.dir;
        let fail = |what: &str| VolumeError::io(format!("{what} {}", dir.display()));
        // the marker says that ownership is done: a pod's own changes must survive a repeated set-up
        let ready = dir.with_file_name(format!(".{}.ready", set_up.volume.name));
        let is_memory = match source.medium.as_deref().unwrap_or_default() {
            "" => false,
            "Memory" => true,
            medium => {
                return Err(VolumeError::Invalid(format!(
                    "emptyDir medium {medium:?} is not supported by this node"
                )));
            }
        };
        let mounted = is_memory && mounts::is_mount_point(dir).map_err(fail("looking at"))?;
        if ready.exists() && dir.exists() && (mounted || !is_memory) {
            return Ok(Mounted::at(dir));
        }
        fs::create_dir_all(dir).map_err(fail("making"))?;
        if is_memory && !mounted {
            mounts::tmpfs(dir, size_bytes(&source, set_up))
                .map_err(fail("mounting a memory file system at"))?;
        }
        open_to_all(dir).map_err(fail("setting the mode of"))?;
        ownership::set(dir, set_up.fs_group(), false).map_err(fail("giving the group"))?;
        fs::write(&ready, "").map_err(fail("marking"))?;
        Ok(Mounted::at(dir))
    }
}

fn open_to_all(dir: &Path) -> std::io::Result<()> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777))
}

fn size_bytes(source: &EmptyDirVolumeSource, set_up: &SetUp<'_>) -> Option<i64> {
    let node = set_up.host.allocatable.read().get("memory").and_then(|q| quantity::parse(&q.0));
    let own = source.size_limit.as_ref().and_then(|q| quantity::parse(&q.0));
    let containers = set_up.pod.spec.iter().flat_map(|s| s.containers.iter());
    let limits: Option<Vec<i64>> = containers
        .map(|c| {
            let limit = c.resources.as_ref()?.limits.as_ref()?.get("memory")?;
            quantity::parse(&limit.0).map(|(amount, _)| amount.value())
        })
        .collect();
    let pod = limits.filter(|l| !l.is_empty()).map(|l| l.into_iter().sum());
    let sizes = [node.map(|(a, _)| a.value()), own.map(|(a, _)| a.value()), pod];
    sizes.into_iter().flatten().filter(|size| *size > 0).min()
}
