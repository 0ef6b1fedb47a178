//! Manifests dropped into <data>/server/manifests: applied, applied again when they change, pruned when they go.
//!
//! Upstream counterpart: K3s' deploy controller. What a file brought into being is remembered in a ConfigMap of
//! kube-system, so that a restart neither applies unchanged files again nor forgets what to prune.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{ApiResource, Scope};
use kube::{Api, Client, ResourceExt};
use serde::{Deserialize, Serialize};

use crate::folder_changes::{ARRIVALS, FolderChanges, REMOVALS};

const MANAGER: &str = "sampan-manifests";
const NAMESPACE: &str = "kube-system";
/// After a change, so long until the folder is read: editors write in several steps.
const SETTLE: Duration = Duration::from_millis(300);
/// After a failure.
const RETRY: Duration = Duration::from_secs(15);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Applied {
    api_version: String,
    kind: String,
    namespace: String,
    name: String,
}

/// Follows the folder for as long as the process lives.
pub fn start(client: Client, folder: PathBuf) -> Result<()> {
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let changes = FolderChanges::of(&[&folder], ARRIVALS | REMOVALS);
    let changes = Arc::new(changes.with_context(|| format!("watching {}", folder.display()))?);
    sampan_telemetry::supervise("manifests", move || {
        let (client, folder, changes) = (client.clone(), folder.clone(), changes.clone());
        async move { follow(&client, &folder, &changes).await }
    });
    Ok(())
}

async fn follow(client: &Client, folder: &Path, changes: &FolderChanges) {
    loop {
        let done = match reconcile(client, folder).await {
            Ok(failed) => !failed,
            Err(error) => {
                tracing::warn!(folder = %folder.display(), "manifests: {error:#}");
                false
            }
        };
        let _ = match done {
            true => changes.next().await,
            false => tokio::time::timeout(RETRY, changes.next()).await.unwrap_or(Ok(())),
        };
        tokio::time::sleep(SETTLE).await;
    }
}

/// Brings the cluster to what the folder says; true when something has to be tried again.
async fn reconcile(client: &Client, folder: &Path) -> Result<bool> {
    let records = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
    let record = records.get_opt(MANAGER).await?.and_then(|r| r.data).unwrap_or_default();
    let mut next = BTreeMap::new();
    let mut failed = false;
    let files = manifests(folder)?;
    for (name, text) in &files {
        let hash = sampan_pki::sha256_hex(text.as_bytes());
        let before: Option<Record> = record.get(name).and_then(|r| serde_json::from_str(r).ok());
        if before.as_ref().is_some_and(|b| b.hash == hash) {
            next.extend(record.get(name).map(|r| (name.clone(), r.clone())));
            continue;
        }
        let earlier = before.map(|b| b.objects).unwrap_or_default();
        match apply(client, text).await {
            Ok(objects) => {
                let gone: Vec<Applied> = earlier.into_iter().filter(|o| !objects.contains(o)).collect();
                failed |= prune(client, name, &gone).await;
                tracing::info!(manifest = name, objects = objects.len(), "manifest applied");
                next.insert(name.clone(), serde_json::to_string(&Record { hash, objects })?);
            }
            Err(error) => {
                tracing::warn!(manifest = name, "manifest not applied, will try again: {error:#}");
                failed = true;
                next.extend(record.get(name).map(|r| (name.clone(), r.clone())));
            }
        }
    }
    for (name, text) in &record {
        if !files.contains_key(name)
            && let Ok(gone) = serde_json::from_str::<Record>(text)
            && prune(client, name, &gone.objects).await
        {
            failed = true;
            next.insert(name.clone(), text.clone());
        }
    }
    if next != record {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(MANAGER.to_string());
        map.data = Some(next);
        let params = PatchParams::apply(MANAGER).force();
        records.patch(MANAGER, &params, &Patch::Apply(&map)).await.context("remembering what was applied")?;
    }
    Ok(failed)
}

#[derive(Serialize, Deserialize)]
struct Record {
    hash: String,
    objects: Vec<Applied>,
}

/// The folder's manifests by file name; what ends in `.skip` beside one leaves it out, as in K3s.
fn manifests(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"));
        if name.starts_with('.') || !known || folder.join(format!("{name}.skip")).exists() {
            continue;
        }
        files.insert(name, std::fs::read_to_string(&path).with_context(|| path.display().to_string())?);
    }
    Ok(files)
}

/// The objects of a manifest, lists taken apart.
fn objects(text: &str) -> Result<Vec<serde_json::Value>> {
    let mut objects = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let mut value = serde_json::Value::deserialize(document).context("not YAML")?;
        let is_list = value["kind"].as_str().is_some_and(|k| k.ends_with("List"));
        if is_list && let Some(items) = value.get_mut("items").and_then(serde_json::Value::as_array_mut) {
            objects.append(items);
        } else if !value.is_null() {
            objects.push(value);
        }
    }
    Ok(objects)
}

async fn apply(client: &Client, text: &str) -> Result<Vec<Applied>> {
    let mut applied = Vec::new();
    for item in objects(text)? {
        let mut object: DynamicObject = serde_json::from_value(item).context("not an object of the API")?;
        let types = object.types.clone().context("an object without apiVersion and kind")?;
        let name = object.name_any();
        let shown = format!("{} {name}", types.kind);
        let api = api_of(client, &types.api_version, &types.kind, object.namespace()).await?;
        object.metadata.managed_fields = None;
        let params = PatchParams::apply(MANAGER).force();
        let made = api.patch(&name, &params, &Patch::Apply(&object)).await.with_context(|| shown)?;
        applied.push(Applied {
            api_version: types.api_version,
            kind: types.kind,
            namespace: made.namespace().unwrap_or_default(),
            name,
        });
    }
    Ok(applied)
}

async fn api_of(
    client: &Client,
    api_version: &str,
    kind: &str,
    namespace: Option<String>,
) -> Result<Api<DynamicObject>> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let gvk = GroupVersionKind::gvk(group, version, kind);
    let (resource, capabilities): (ApiResource, _) =
        kube::discovery::pinned_kind(client, &gvk).await.with_context(|| format!("{api_version} {kind}"))?;
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => {
            Api::namespaced_with(client.clone(), namespace.as_deref().unwrap_or("default"), &resource)
        }
    })
}

/// Deletes objects; true when one could not be deleted.
async fn prune(client: &Client, manifest: &str, objects: &[Applied]) -> bool {
    let mut failed = false;
    for object in objects {
        let namespace = Some(object.namespace.clone()).filter(|n| !n.is_empty());
        let deleted = async {
            let api = api_of(client, &object.api_version, &object.kind, namespace).await?;
            match api.delete(&object.name, &DeleteParams::background()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => anyhow::Ok(()),
                Err(error) => Err(error.into()),
                Ok(_) => Ok(()),
            }
        };
        match deleted.await {
            Ok(()) => tracing::info!(manifest, kind = object.kind, name = object.name, "pruned"),
            Err(error) => {
                tracing::warn!(manifest, kind = object.kind, name = object.name, "not pruned: {error:#}");
                failed = true;
            }
        }
    }
    failed
}
