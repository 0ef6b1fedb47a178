//! Manifests dropped into <data>/server/manifests: applied, applied again when they change, pruned when they go.
//!
//! Upstream counterpart: K3s' deploy controller. What a file brought into being is remembered in a ConfigMap of
//! kube-system, so that a restart neither applies unchanged files again nor forgets what to prune. Of several servers each
//! follows its own folder, with a record of its own, as in K3s; what another's files say too is not pruned.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
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

/// Follows the folder for as long as the process lives. `server` names this one where there may be others.
pub fn start(client: Client, folder: PathBuf, server: Option<&str>) -> Result<()> {
    let record = server.map_or_else(|| MANAGER.to_string(), |server| format!("{MANAGER}.{server}"));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let changes = FolderChanges::of(&[&folder], ARRIVALS | REMOVALS);
    let changes = Arc::new(changes.with_context(|| format!("watching {}", folder.display()))?);
    sampan_telemetry::supervise("manifests", move || {
        let (client, folder, changes) = (client.clone(), folder.clone(), changes.clone());
        let record = record.clone();
        async move { follow(&client, &folder, &record, &changes).await }
    });
    Ok(())
}

async fn follow(client: &Client, folder: &Path, record: &str, changes: &FolderChanges) {
    loop {
        let done = match reconcile(client, folder, record).await {
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
async fn reconcile(client: &Client, folder: &Path, record_name: &str) -> Result<bool> {
    let records = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
    let record = records.get_opt(record_name).await?.and_then(|r| r.data).unwrap_or_default();
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
                failed |= prune_own(&records, record_name, name, &gone).await;
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
            && prune_own(&records, record_name, name, &gone.objects).await
        {
            failed = true;
            next.insert(name.clone(), text.clone());
        }
    }
    if next != record {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(record_name.to_string());
        map.data = Some(next);
        let params = PatchParams::apply(MANAGER).force();
        records
            .patch(record_name, &params, &Patch::Apply(&map))
            .await
            .context("remembering what was applied")?;
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

/// Deletes those objects that no other server's files say; true when something has to be tried again.
async fn prune_own(records: &Api<ConfigMap>, own: &str, manifest: &str, objects: &[Applied]) -> bool {
    if objects.is_empty() {
        return false;
    }
    let client = records.clone().into_client();
    if own == MANAGER {
        return prune(&client, manifest, objects).await;
    }
    let all = match records.list(&ListParams::default()).await {
        Ok(all) => all.items,
        Err(error) => {
            tracing::warn!(manifest, "not pruned: {error}");
            return true;
        }
    };
    let kept = said_by_others(&all, own);
    let gone: Vec<Applied> = objects.iter().filter(|object| !kept.contains(object)).cloned().collect();
    prune(&client, manifest, &gone).await
}

/// What other servers' records name.
fn said_by_others(records: &[ConfigMap], own: &str) -> Vec<Applied> {
    let is_other = |map: &&ConfigMap| {
        let name = map.name_any();
        name != own && name.strip_prefix(MANAGER).is_some_and(|rest| rest.starts_with('.'))
    };
    let texts =
        records.iter().filter(is_other).flat_map(|map| map.data.iter().flat_map(|data| data.values()));
    texts.filter_map(|text| serde_json::from_str::<Record>(text).ok()).flat_map(|r| r.objects).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_servers_say_stays() {
        let record = |name: &str, object: &str| {
            let objects = vec![Applied {
                api_version: "v1".to_string(),
                kind: "ConfigMap".to_string(),
                namespace: "default".to_string(),
                name: object.to_string(),
            }];
            let mut map = ConfigMap::default();
            map.metadata.name = Some(name.to_string());
            let text = serde_json::to_string(&Record { hash: "h".to_string(), objects }).unwrap();
            map.data = Some([("a.yaml".to_string(), text)].into());
            map
        };
        let all = [
            record("sampan-manifests.one", "mine"),
            record("sampan-manifests.two", "theirs"),
            record("sampan-manifestsnot", "x"),
            record("other", "y"),
        ];
        let names: Vec<String> =
            said_by_others(&all, "sampan-manifests.one").into_iter().map(|o| o.name).collect();
        assert_eq!(names, ["theirs"]);
    }
}
