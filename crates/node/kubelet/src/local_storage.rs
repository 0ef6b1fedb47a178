//! Pods that take more of the node's disk than they may: emptyDir sizeLimit and ephemeral-storage limits.
//!
//! Upstream counterpart: pkg/kubelet/eviction/eviction_manager.go (localStorageEviction); the messages are upstream's.
//! Only pods with such a limit are measured, and only when the file systems have changed since the last time. An emptyDir
//! in memory is as large as its limit by its own file system.
use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use sampan_kinds::core::v1::pod_spec::requests;
use sampan_kinds::quantity::{self, Amount, Format};

use crate::node_services::NodeServices;
use crate::recorder::WARNING;
use crate::worker::{Eviction, Snapshot};

const RESOURCE: &str = "ephemeral-storage";
/// A tree with more entries than this is measured by these alone.
const ENTRIES_MAX: usize = 200_000;

/// What a pod takes.
#[derive(Debug, Default)]
struct Usage {
    volumes: BTreeMap<String, u64>,
    /// By container: its writable layer and its logs.
    containers: BTreeMap<String, u64>,
}

fn on_disk(volume: &Volume) -> bool {
    volume.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or_default() != "Memory")
}

fn size_limit(volume: &Volume) -> Option<&Quantity> {
    let limit = volume.empty_dir.as_ref().filter(|_| on_disk(volume))?.size_limit.as_ref()?;
    quantity::parse(&limit.0).filter(|(size, _)| *size > Amount::ZERO).map(|_| limit)
}

fn storage_limit(container: &k8s_openapi::api::core::v1::Container) -> Option<&Quantity> {
    container.resources.as_ref()?.limits.as_ref()?.get(RESOURCE)
}

/// Whether there is anything to measure.
fn is_limited(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let init = spec.init_containers.iter().flatten();
    spec.volumes.iter().flatten().any(|v| size_limit(v).is_some())
        || spec.containers.iter().chain(init).any(|c| storage_limit(c).is_some())
}

fn shown(limit: &Quantity) -> String {
    quantity::text(limit)
}

/// The pod's limit as a whole, in the form that the first container has it in.
fn pod_limit(pod: &Pod) -> Option<(Amount, String)> {
    let spec = pod.spec.as_ref()?;
    let limit = requests::pod_limits(spec).get(RESOURCE).copied()?;
    let form = spec.containers.iter().find_map(storage_limit).and_then(|q| quantity::parse(&q.0));
    Some((limit, quantity::canonical(limit, form.map_or(Format::BinarySi, |(_, form)| form))))
}

/// Which limit the pod is over, if any.
fn over(pod: &Pod, usage: &Usage) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let bytes = |n: u64| Amount::units(i64::try_from(n).unwrap_or(i64::MAX));
    for volume in spec.volumes.iter().flatten() {
        let (Some(limit), Some(used)) = (size_limit(volume), usage.volumes.get(&volume.name)) else {
            continue;
        };
        if bytes(*used) > quantity::amount(limit) {
            return Some(format!(
                "Usage of EmptyDir volume {:?} exceeds the limit {:?}. ",
                volume.name,
                shown(limit)
            ));
        }
    }
    let total = usage.volumes.values().chain(usage.containers.values()).sum();
    if let Some((limit, text)) = pod_limit(pod)
        && bytes(total) > limit
    {
        return Some(format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {text}. "
        ));
    }
    spec.containers.iter().find_map(|container| {
        let limit = storage_limit(container).filter(|l| quantity::amount(l) > Amount::ZERO)?;
        let used = usage.containers.get(&container.name)?;
        let name = &container.name;
        (bytes(*used) > quantity::amount(limit)).then(|| {
            format!("Container {name} exceeded its local ephemeral storage limit {:?}. ", shown(limit))
        })
    })
}

/// Bytes on disk below `folder`, each file once however many names it has.
fn disk_bytes(folder: &Path) -> u64 {
    let (mut folders, mut bytes, mut entries) = (vec![folder.to_path_buf()], 0, 0);
    let mut linked = HashSet::new();
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() == 1 || metadata.is_dir() || linked.insert((metadata.dev(), metadata.ino())) {
                bytes += metadata.blocks() * 512;
            }
            entries += 1;
            if entries > ENTRIES_MAX {
                return bytes;
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    bytes
}

async fn measured(folder: PathBuf) -> u64 {
    tokio::task::spawn_blocking(move || disk_bytes(&folder)).await.unwrap_or(0)
}

async fn usage(services: &NodeServices, snapshot: &Snapshot) -> Usage {
    let (pod, mut usage) = (&snapshot.pod, Usage::default());
    let uid = pod.uid().unwrap_or_default();
    let Some(spec) = &pod.spec else { return usage };
    let volumes = services.volumes.pod_dir(&uid).join("volumes");
    for volume in spec.volumes.iter().flatten() {
        let kind = match volume {
            v if on_disk(v) => "kubernetes.io~empty-dir",
            v if v.config_map.is_some() => "kubernetes.io~configmap",
            _ => continue,
        };
        let bytes = measured(volumes.join(kind).join(&volume.name)).await;
        usage.volumes.insert(volume.name.clone(), bytes);
    }
    let logs = services.config.pod_log_dir(&pod.namespace().unwrap_or_default(), &pod.name_any(), &uid);
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let mut bytes = measured(logs.join(&container.name)).await;
        if let Some(record) = snapshot.records.newest(&container.name) {
            bytes += services.runtime.writable_layer_bytes(&record.id).await.unwrap_or(0);
        }
        usage.containers.insert(container.name.clone(), bytes);
    }
    usage
}

/// (free blocks, free inodes) of the file systems that pods write to.
type Free = [Option<(u64, u64)>; 2];

/// Remembers when nothing can have grown.
#[derive(Default)]
pub struct Sampler(tokio::sync::Mutex<Option<Free>>);

impl Sampler {
    /// Measures the pods that have limits; those that are over one are told through `evict`. One at a time: a second call
    /// while a first is under way does nothing.
    pub async fn sample(&self, services: &NodeServices, pods: Vec<Snapshot>, evict: impl Fn(&str, Eviction)) {
        let Ok(mut last) = self.0.try_lock() else { return };
        let limited: Vec<Snapshot> = pods.into_iter().filter(|s| is_limited(&s.pod)).collect();
        if limited.is_empty() {
            *last = None;
            return;
        }
        let free: Free = [&services.config.root_dir, &services.config.log_dir].map(|path| {
            let stat = path.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
            Some((stat.f_bfree, stat.f_ffree))
        });
        if *last == Some(free) && free.iter().all(Option::is_some) {
            return;
        }
        *last = Some(free);
        for snapshot in limited {
            let used = usage(services, &snapshot).await;
            if let Some(message) = over(&snapshot.pod, &used) {
                services.recorder.pod(&snapshot.pod, WARNING, "Evicted", message.clone());
                let reason = "Evicted".to_string();
                let eviction = Eviction { reason, message, grace_seconds: 1, condition: None };
                evict(&snapshot.pod.uid().unwrap_or_default(), eviction);
                *last = None;
            }
        }
    }
}

/// Whether the pod may be ended at all for what it takes.
pub fn may_go(pod: &Arc<Pod>) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let is_critical = pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|p| p >= 2_000_000_000);
    let is_over = matches!(phase, Some("Succeeded" | "Failed")) || pod.metadata.deletion_timestamp.is_some();
    !is_critical && !is_over && !crate::static_pods::is_static(pod)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_limit_that_is_passed_is_told() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}, {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1"}}],
            "containers": [{"name": "a", "resources": {"limits": {"ephemeral-storage": "2Mi"}}},
                {"name": "b", "resources": {"limits": {"ephemeral-storage": "1Mi"}}}]}}))
        .unwrap();
        assert!(is_limited(&pod));
        let mi = 1 << 20;
        let cases = [
            (mi, mi, mi, None),
            (mi + 1, 0, 0, Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ")),
            (
                mi,
                mi,
                mi + 1,
                Some("Pod ephemeral local storage usage exceeds the total limit of containers 3Mi. "),
            ),
            (0, 2 * mi + 1, 0, Some("Container a exceeded its local ephemeral storage limit \"2Mi\". ")),
            (0, 0, mi + 1, Some("Container b exceeded its local ephemeral storage limit \"1Mi\". ")),
        ];
        for (volume, a, b, want) in cases {
            let usage = Usage {
                volumes: [("v".to_string(), volume)].into(),
                containers: [("a".to_string(), a), ("b".to_string(), b)].into(),
            };
            assert_eq!(over(&pod, &usage).as_deref(), want, "{volume} {a} {b}");
        }
        let none: Pod = serde_json::from_value(json!({"spec": {"containers": [{"name": "a"}],
            "volumes": [{"name": "v", "emptyDir": {}}]}}))
        .unwrap();
        assert!(!is_limited(&none));
    }

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("a"), vec![1; 100_000]).unwrap();
        let once = disk_bytes(dir.path());
        std::fs::hard_link(dir.path().join("a"), dir.path().join("sub/b")).unwrap();
        assert!(once >= 100_000);
        assert!(disk_bytes(dir.path()) < once + 50_000);
    }
}
