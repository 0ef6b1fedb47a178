//! ControllerRevisions: the history of templates of DaemonSets and StatefulSets.
//! Upstream counterpart: pkg/controller/history.
//!
//! A revision's data is a strategic merge patch that sets the template, as `kubectl rollout undo` applies it.
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::controller::SyncError;
use crate::controller_ref::{Namespaced, controller_reference, is_controlled_by, name, namespace};
use crate::label_selector::Labels;
use crate::{api_error, template_hash};

/// The label that holds a revision's hash.
pub const HASH_LABEL: &str = "controller.kubernetes.io/hash";
/// The label that tells pods of different revisions apart.
pub const REVISION_HASH_LABEL: &str = "controller-revision-hash";

/// The patch that sets a template.
pub fn template_patch<T: serde::Serialize>(template: &T) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

/// A revision of `data` that does not exist yet.
pub fn new_revision<O: Namespaced>(
    owner: &O,
    mut labels: Labels,
    hash_label: &str,
    data: Value,
    revision: i64,
    collision_count: i32,
) -> ControllerRevision {
    let hash = template_hash::compute(&data, Some(collision_count));
    labels.insert(hash_label.to_string(), hash.clone());
    let base: String = name(owner).chars().take(223).collect();
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{base}-{hash}")),
            namespace: Some(namespace(owner).to_string()),
            annotations: owner.meta().annotations.clone(),
            owner_references: Some(vec![controller_reference(owner)]),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        data: Some(RawExtension(data)),
        revision,
    }
}

pub fn data_of(revision: &ControllerRevision) -> Option<&Value> {
    revision.data.as_ref().map(|d| &d.0)
}

/// What became of creating a revision.
pub enum Created {
    Revision(Box<ControllerRevision>),
    /// Another revision has the same name: try again with a higher collision count.
    Collision,
}

pub async fn create<O: Namespaced>(
    client: &Client,
    owner: &O,
    revision: &ControllerRevision,
) -> Result<Created, SyncError> {
    let api: Api<ControllerRevision> = Api::namespaced(client.clone(), namespace(owner));
    match api.create(&PostParams::default(), revision).await {
        Ok(created) => Ok(Created::Revision(Box::new(created))),
        Err(e) if api_error::is_already_exists(&e) => {
            let existing = api.get(name(revision)).await?;
            let same = data_of(&existing) == data_of(revision) && is_controlled_by(&existing, owner);
            Ok(if same { Created::Revision(Box::new(existing)) } else { Created::Collision })
        }
        Err(e) => Err(e.into()),
    }
}

/// Gives an old revision a new number: it is the current one again.
pub async fn renumber(
    client: &Client,
    revision: &ControllerRevision,
    number: i64,
) -> Result<ControllerRevision, SyncError> {
    let api: Api<ControllerRevision> = Api::namespaced(client.clone(), namespace(revision));
    let patch = Patch::Merge(json!({"revision": number}));
    Ok(api.patch(name(revision), &PatchParams::default(), &patch).await?)
}

/// Deletes the oldest revisions beyond `limit` that `is_live` does not claim.
pub async fn truncate(
    client: &Client,
    mut old: Vec<Arc<ControllerRevision>>,
    limit: i32,
    is_live: impl Fn(&ControllerRevision) -> bool,
) -> Result<(), SyncError> {
    old.retain(|r| !is_live(r));
    old.sort_by_key(|r| r.revision);
    let excess = old.len().saturating_sub(limit.max(0) as usize);
    for revision in old.into_iter().take(excess) {
        let api: Api<ControllerRevision> = Api::namespaced(client.clone(), namespace(&*revision));
        api_error::found(api.delete(name(&*revision), &DeleteParams::default()).await)?;
    }
    Ok(())
}
