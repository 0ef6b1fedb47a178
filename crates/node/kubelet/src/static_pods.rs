//! Static pods: pods that a node runs because a file in a folder says so, with or without a server.
//!
//! Upstream counterparts: pkg/kubelet/config/file.go, file_linux.go and common.go. A pod's UID is made from its file's
//! content, path and node, so that a changed file is another pod and an unchanged one is the same after a restart. What
//! stays true: the folder as it is now is what counts; a file that cannot be used is named in the log and in an event of
//! the node, and its pod does not run, while the other files' do. Unlike upstream the folder is made where it is missing,
//! and it is never read again without a change.
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodSpec, Volume};
use kube::ResourceExt;
use rustix::fs::inotify;
use sampan_kinds::meta;
use sampan_kinds::registry;
use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;

use crate::api::log_file::registered;

pub const SOURCE: &str = "kubernetes.io/config.source";
pub const HASH: &str = "kubernetes.io/config.hash";
pub const MIRROR: &str = "kubernetes.io/config.mirror";

const FILE_MAX_BYTES: u64 = 10 << 20;
/// Editors write in several steps.
const SETTLE: Duration = Duration::from_millis(100);
/// While the folder cannot be made or watched.
const RETRY: Duration = Duration::from_secs(20);

/// (namespace, name)
pub type Key = (String, String);

/// Why a file makes no pod; each says which file it is.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{path}: not a regular file")]
    NotAFile { path: String },
    #[error("{path}: larger than {FILE_MAX_BYTES} bytes")]
    TooLarge { path: String },
    #[error("{path}: {message}")]
    Syntax { path: String, message: String },
    #[error("{path}: invalid pod: {message}")]
    Invalid { path: String, message: String },
    #[error("{path}: static pods may not reference {resource}")]
    Reference { path: String, resource: &'static str },
    #[error("{path}: pod {namespace}/{name} is in another file already")]
    Twice { path: String, namespace: String, name: String },
}

/// What a folder holds.
#[derive(Debug, Default)]
pub struct Found {
    pub pods: BTreeMap<Key, Arc<Pod>>,
    pub errors: Vec<FileError>,
}

pub fn is_static(pod: &Pod) -> bool {
    pod.annotations().get(SOURCE).is_some_and(|source| source != "api")
}

/// The API's picture of a static pod.
pub fn is_mirror(pod: &Pod) -> bool {
    pod.annotations().contains_key(MIRROR)
}

/// FNV-1a, 128 bits wide.
fn fnv(parts: &[&[u8]]) -> u128 {
    let bytes = parts.iter().copied().flatten();
    bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

fn volume_reference(volume: &Volume) -> Option<&'static str> {
    if volume.config_map.is_some() {
        return Some("configmaps (via configmap volumes)");
    }
    if volume.secret.is_some() {
        return Some("secrets (via secret volumes)");
    }
    if volume.csi.is_some() {
        return Some("csidrivers (via CSI volumes)");
    }
    if volume.persistent_volume_claim.is_some() {
        return Some("persistentvolumeclaims");
    }
    if volume.ephemeral.is_some() {
        return Some("persistentvolumeclaims (via ephemeral volumes)");
    }
    volume.projected.iter().flat_map(|p| p.sources.iter().flatten()).find_map(|source| {
        if source.config_map.is_some() {
            Some("configmaps (via projected volumes)")
        } else if source.secret.is_some() {
            Some("secrets (via projected volumes)")
        } else if source.service_account_token.is_some() {
            Some("serviceaccounts (via projected volumes)")
        } else if source.cluster_trust_bundle.is_some() {
            Some("clustertrustbundles")
        } else if source.pod_certificate.is_some() {
            Some("podcertificates")
        } else {
            None
        }
    })
}

/// The first thing of the API that the pod would need: there may be no API yet when it starts.
fn reference(spec: &PodSpec) -> Option<&'static str> {
    if spec.service_account_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return Some("serviceaccounts");
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let (mut secrets, mut maps) = (spec.image_pull_secrets.iter().flatten().next().is_some(), false);
    for container in containers {
        for source in container.env_from.iter().flatten() {
            secrets |= source.secret_ref.is_some();
            maps |= source.config_map_ref.is_some();
        }
        for source in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            secrets |= source.secret_key_ref.is_some();
            maps |= source.config_map_key_ref.is_some();
        }
    }
    match (secrets, maps) {
        (true, _) => Some("secrets"),
        (_, true) => Some("configmaps"),
        _ if spec.resource_claims.iter().flatten().next().is_some() => Some("resourceclaims"),
        _ => spec.volumes.iter().flatten().find_map(volume_reference),
    }
}

/// Says what the file does not: where the pod runs, who it is, and that no taint drives it away.
fn complete(pod: &mut Value, path: &str, node: &str) {
    if pod.pointer("/metadata/uid").and_then(Value::as_str).is_none_or(str::is_empty) {
        let content = serde_json::to_vec(pod).unwrap_or_default();
        let parts: [&[u8]; 5] = [&content, b"host:", node.as_bytes(), b"file:", path.as_bytes()];
        pod["metadata"]["uid"] = format!("{:032x}", fnv(&parts)).into();
    }
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    pod["metadata"]["name"] = format!("{name}-{}", node.to_lowercase()).into();
    if pod["metadata"]["namespace"].as_str().is_none_or(str::is_empty) {
        pod["metadata"]["namespace"] = "default".into();
    }
    pod["spec"]["nodeName"] = node.into();
    let uid = pod["metadata"]["uid"].clone();
    if !pod["metadata"]["annotations"].is_object() {
        pod["metadata"]["annotations"] = json!({});
    }
    pod["metadata"]["annotations"][HASH] = uid;
    pod["metadata"]["annotations"][SOURCE] = "file".into();
    let endures = json!({"operator": "Exists", "effect": "NoExecute"});
    match pod["spec"]["tolerations"].as_array_mut() {
        Some(all) if all.contains(&endures) => {}
        Some(all) => all.push(endures),
        None => pod["spec"]["tolerations"] = json!([endures]),
    }
    pod["status"] = json!({"phase": "Pending"});
}

fn parse(bytes: &[u8], path: &str, node: &str) -> Result<Pod, FileError> {
    let syntax = |message: String| FileError::Syntax { path: path.into(), message };
    let invalid = |message: String| FileError::Invalid { path: path.into(), message };
    let mut pod: Value = serde_yaml_ng::from_slice(bytes).map_err(|e| syntax(e.to_string()))?;
    let (version, kind) = (pod["apiVersion"].as_str(), pod["kind"].as_str());
    if (version, kind) != (Some("v1"), Some("Pod")) {
        let said = format!("{} {}", version.unwrap_or("no apiVersion"), kind.unwrap_or("no kind"));
        return Err(syntax(format!("expected a v1 Pod, found {said}")));
    }
    if pod.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(invalid("name is needed for the pod".into()));
    }
    if !pod["spec"].is_object() {
        return Err(invalid("spec: Required value".into()));
    }
    complete(&mut pod, path, node);
    let Some(rules) = registry::find("", "v1", "Pod") else {
        return Err(invalid("no rules for pods".into()));
    };
    (rules.defaults)(&mut pod);
    let typed: Pod = serde_json::from_value(pod.clone()).map_err(|e| invalid(e.to_string()))?;
    let mut errors = meta::validate(&pod, true, rules.name_rule);
    errors.extend((rules.rest.validate)(&pod));
    if !errors.is_empty() {
        return Err(invalid(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")));
    }
    match typed.spec.as_ref().and_then(reference) {
        Some(resource) => Err(FileError::Reference { path: path.into(), resource }),
        None => Ok(typed),
    }
}

fn read_file(path: &Path, node: &str) -> Result<Pod, FileError> {
    let shown = path.display().to_string();
    let failed = |source| FileError::Io { path: shown.clone(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile { path: shown });
    }
    if metadata.len() > FILE_MAX_BYTES {
        return Err(FileError::TooLarge { path: shown });
    }
    parse(&std::fs::read(path).map_err(failed)?, &shown, node)
}

/// All pods of a folder; files whose names begin with a dot are left alone.
pub fn read_folder(folder: &Path, node: &str) -> Found {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    paths.retain(|p| !p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".")));
    paths.sort();
    let mut found = Found::default();
    for path in paths {
        match read_file(&path, node) {
            // it went between listing and reading
            Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => found.errors.push(error),
            Ok(pod) => match found.pods.entry((pod.namespace().unwrap_or_default(), pod.name_any())) {
                Entry::Vacant(free) => drop(free.insert(Arc::new(pod))),
                Entry::Occupied(taken) => {
                    let (path, (namespace, name)) = (path.display().to_string(), taken.key().clone());
                    found.errors.push(FileError::Twice { path, namespace, name });
                }
            },
        }
    }
    found
}

/// Changes of a folder, by inotify.
struct FolderWatch {
    fd: AsyncFd<OwnedFd>,
    folder: PathBuf,
}

impl FolderWatch {
    fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let watch = Self { fd: registered(fd)?, folder: folder.to_path_buf() };
        watch.add()?;
        Ok(watch)
    }

    /// Also after the folder was moved away or removed; where it is the same one this changes nothing.
    fn add(&self) -> io::Result<()> {
        use inotify::WatchFlags as Flags;
        let flags = Flags::CREATE
            | Flags::CLOSE_WRITE
            | Flags::MOVED_TO
            | Flags::MOVED_FROM
            | Flags::DELETE
            | Flags::ATTRIB
            | Flags::DELETE_SELF
            | Flags::MOVE_SELF;
        inotify::add_watch(self.fd.get_ref(), &self.folder, flags).map(drop).map_err(io::Error::from)
    }

    /// Waits for a change, then until there are no more.
    async fn changed(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        self.fd.readable().await?.clear_ready();
        loop {
            while rustix::io::read(self.fd.get_ref(), &mut buffer).is_ok_and(|n| n > 0) {}
            let quiet = tokio::time::timeout(SETTLE, self.fd.readable()).await;
            match quiet {
                Err(_) => return Ok(()),
                Ok(ready) => ready?.clear_ready(),
            }
        }
    }
}

/// Waits for changes of `folder` for ever, and tells each.
pub async fn follow(folder: PathBuf, tell: impl Fn()) {
    loop {
        match FolderWatch::open(&folder) {
            Ok(watch) => {
                // what came before the watch was there
                tell();
                while watch.changed().await.is_ok() && folder.is_dir() && watch.add().is_ok() {
                    tell();
                }
                tell();
            }
            Err(error) => {
                tracing::warn!(folder = %folder.display(), %error, "the folder of static pods cannot be watched");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
