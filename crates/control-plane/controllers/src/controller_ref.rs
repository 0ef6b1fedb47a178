//! Controller references: what owns what, adopting orphans and releasing what no longer matches.
//! Upstream counterpart: pkg/controller/controller_ref_manager.go.
//!
//! What stays true: before anything is adopted, the owner is read live once, and must have the same UID and not be
//! deleted; each patch carries the object's UID, so that it cannot hit a namesake.
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource};
use sampan_client::Informer;
use sampan_client::informer::{Object, controller_of};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::api_error;
use crate::controller::SyncError;

/// A namespaced object that can own or be owned.
pub trait Namespaced:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + DeserializeOwned
    + Debug
    + Send
    + Sync
    + 'static
{
}
impl<K> Namespaced for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + Sync
        + 'static
{
}

pub fn uid<K: Resource>(object: &K) -> &str {
    object.meta().uid.as_deref().unwrap_or_default()
}

pub fn name<K: Resource>(object: &K) -> &str {
    object.meta().name.as_deref().unwrap_or_default()
}

pub fn namespace<K: Resource>(object: &K) -> &str {
    object.meta().namespace.as_deref().unwrap_or_default()
}

pub fn is_deleting<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// Whether `owner` is the controller of the object of that metadata.
pub fn is_controlled_by<K: Resource, O: Resource>(object: &K, owner: &O) -> bool {
    controller_of(object).is_some_and(|r| r.uid == uid(owner))
}

/// The reference that makes `owner` an object's controller.
pub fn controller_reference<O: Resource<DynamicType = ()>>(owner: &O) -> OwnerReference {
    OwnerReference {
        api_version: O::api_version(&()).into_owned(),
        kind: O::kind(&()).into_owned(),
        name: name(owner).to_string(),
        uid: uid(owner).to_string(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Resolves a controller reference: the object of that name, when it has the kind and UID.
pub fn resolve<O: Object>(
    owners: &Informer<O>,
    namespace: &str,
    reference: &OwnerReference,
) -> Option<Arc<O>> {
    if reference.kind != O::kind(&()) {
        return None;
    }
    owners.get(namespace, &reference.name).filter(|o| uid(&**o) == reference.uid)
}

/// What the object of that UID controls, and what nothing controls, in its namespace.
pub fn owned_and_orphans<K: Object>(objects: &Informer<K>, namespace: &str, owner_uid: &str) -> Vec<Arc<K>> {
    let mut found = objects.controlled_by(owner_uid);
    found.extend(objects.list_in(namespace).into_iter().filter(|o| controller_of(&**o).is_none()));
    found
}

/// What `owner` should do with an object.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    Keep,
    Adopt,
    Release,
    Ignore,
}

/// Decides over an object's metadata, given whether the owner's selector matches it.
pub fn decide(owner: &ObjectMeta, object: &ObjectMeta, matches: bool) -> Claim {
    let controller = object.owner_references.iter().flatten().find(|r| r.controller == Some(true));
    let owner_deleting = owner.deletion_timestamp.is_some();
    match controller {
        Some(r) if Some(&r.uid) != owner.uid.as_ref() => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if owner_deleting => Claim::Ignore,
        Some(_) => Claim::Release,
        None if owner_deleting || !matches || object.deletion_timestamp.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// Claims `objects` for `owner`: keeps those that match, adopts matching orphans, releases what no longer matches.
/// `finalizer` is added and removed together with the reference.
pub async fn claim<O: Namespaced, K: Namespaced>(
    client: &Client,
    owner: &O,
    objects: Vec<Arc<K>>,
    finalizer: Option<&str>,
    matches: impl Fn(&K) -> bool + Send + Sync,
) -> Result<Vec<Arc<K>>, SyncError> {
    let api: Api<K> = Api::namespaced(client.clone(), namespace(owner));
    let mut claimed = Vec::new();
    let mut failed = None;
    let mut may_adopt = false;
    for object in objects {
        match decide(owner.meta(), object.meta(), matches(&object)) {
            Claim::Ignore => {}
            Claim::Keep => claimed.push(object),
            Claim::Adopt => {
                if !may_adopt {
                    recheck(client, owner).await?;
                    may_adopt = true;
                }
                match adopt(&api, owner, &object, finalizer).await {
                    Ok(()) => claimed.push(object),
                    Err(e) if api_error::is_not_found(&e) => {}
                    Err(e) => failed = Some(e),
                }
            }
            Claim::Release => match release(&api, owner, &object, finalizer).await {
                Err(e) if !api_error::is_not_found(&e) && !api_error::is_invalid(&e) => failed = Some(e),
                _ => {}
            },
        }
    }
    match failed {
        Some(e) => Err(e.into()),
        None => Ok(claimed),
    }
}

/// Reads the owner live and fails when it is another one or being deleted.
async fn recheck<O: Namespaced>(client: &Client, owner: &O) -> Result<(), SyncError> {
    let api: Api<O> = Api::namespaced(client.clone(), namespace(owner));
    let fresh = api.get(name(owner)).await?;
    let what = format!("{} {}/{}", O::kind(&()), namespace(owner), name(owner));
    if uid(&fresh) != uid(owner) {
        return Err(SyncError::failed(format!(
            "original {what} is gone: got uid {}, wanted {}",
            uid(&fresh),
            uid(owner)
        )));
    }
    match fresh.meta().deletion_timestamp {
        Some(_) => Err(SyncError::failed(format!("{what} has just been deleted"))),
        None => Ok(()),
    }
}

async fn adopt<O: Namespaced, K: Namespaced>(
    api: &Api<K>,
    owner: &O,
    object: &K,
    finalizer: Option<&str>,
) -> Result<(), kube::Error> {
    let mut metadata = json!({"uid": uid(object), "ownerReferences": [controller_reference(owner)]});
    if let Some(finalizer) = finalizer {
        metadata["finalizers"] = json!([finalizer]);
    }
    let patch = Patch::Strategic(json!({"metadata": metadata}));
    api.patch(name(object), &PatchParams::default(), &patch).await.map(drop)
}

/// Removes `owner`'s reference from `object`.
pub async fn release<O: Namespaced, K: Namespaced>(
    api: &Api<K>,
    owner: &O,
    object: &K,
    finalizer: Option<&str>,
) -> Result<(), kube::Error> {
    let mut metadata =
        json!({"uid": uid(object), "ownerReferences": [{"$patch": "delete", "uid": uid(owner)}]});
    if let Some(finalizer) = finalizer {
        metadata["$deleteFromPrimitiveList/finalizers"] = json!([finalizer]);
    }
    let patch = Patch::Strategic(json!({"metadata": metadata}));
    api.patch(name(object), &PatchParams::default(), &patch).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims() {
        let meta = |controller: Option<&str>, deleting: bool| ObjectMeta {
            uid: Some("me".into()),
            owner_references: controller.map(|uid| {
                vec![OwnerReference { uid: uid.into(), controller: Some(true), ..OwnerReference::default() }]
            }),
            deletion_timestamp: deleting.then(|| sampan_world::clock::now().into()),
            ..ObjectMeta::default()
        };
        let cases = [
            (meta(None, false), meta(Some("me"), false), true, Claim::Keep),
            (meta(None, true), meta(Some("me"), false), true, Claim::Keep),
            (meta(None, false), meta(Some("me"), false), false, Claim::Release),
            (meta(None, true), meta(Some("me"), false), false, Claim::Ignore),
            (meta(None, false), meta(Some("other"), false), true, Claim::Ignore),
            (meta(None, false), meta(None, false), true, Claim::Adopt),
            (meta(None, false), meta(None, true), true, Claim::Ignore),
            (meta(None, true), meta(None, false), true, Claim::Ignore),
            (meta(None, false), meta(None, false), false, Claim::Ignore),
        ];
        for (owner, object, matches, expected) in cases {
            assert_eq!(decide(&owner, &object, matches), expected, "{owner:?} {object:?} {matches}");
        }
    }
}
