//! Empties and finalizes namespaces that are being deleted. Upstream counterpart: pkg/controller/namespace.
//!
//! What stays true: pods go first; nothing is finalized before a list of every namespaced resource came back empty;
//! what remains is told in the namespace's conditions. Deliberate differences: the deletion of the namespace's last
//! pod wakes the controller, it does not wait for half of the estimated time; resources that list as empty are not
//! sent a deletion.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, NamespaceStatus, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams};
use kube::{Api, Client};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;

use crate::controller::{Controller, Descriptor, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace, uid};
use crate::discovery::{self, Discovered};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "namespace-controller",
    service_account: "namespace-controller",
    component: "namespace-controller",
    build: |scope| run(NamespaceController::new(&scope)),
};

const FINALIZER: &str = "kubernetes";
/// How long content with finalizers is expected to take.
const FINALIZER_ESTIMATE_SECONDS: i64 = 15;

struct NamespaceController {
    client: Client,
    namespaces: Informer<Namespace>,
    pods: Informer<Pod>,
    queue: WorkQueue<String>,
}

/// What is left of a namespace's content.
#[derive(Default)]
struct Remaining {
    estimate_seconds: i64,
    /// Instances by `resource.group`.
    resources: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
    discovery_error: Option<String>,
    errors: Vec<String>,
}

impl NamespaceController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            namespaces: scope.informers.of(),
            pods: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.namespaces.on_event(move |event| {
            if is_deleting(&**event.object()) {
                me.queue.add(name(&**event.object()).to_string());
            }
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            let Event::Deleted(pod) = event else { return };
            if me.namespaces.get("", namespace(&***pod)).is_some_and(|n| is_deleting(&*n)) {
                me.queue.add(namespace(&***pod).to_string());
            }
        });
        this
    }

    /// Seconds until the namespace's pods have had their grace period, since its deletion.
    fn pod_estimate(&self, object: &Namespace) -> i64 {
        let pods = self.pods.list_in(name(object));
        let running = pods.iter().filter(|p| !pod_state::is_terminal(p));
        let grace =
            running.filter_map(|p| p.spec.as_ref()?.termination_grace_period_seconds).max().unwrap_or(0);
        let deleted = object.metadata.deletion_timestamp.as_ref();
        let since = deleted.map_or(0, |t| clock::now().duration_since(t.0).as_secs());
        if since >= grace { 0 } else { grace }
    }

    /// Deletes all of one resource; tells what is left.
    async fn delete_all_of(&self, kind: &Discovered, object: &Namespace, left: &mut Remaining) {
        let is_pods = kind.resource.group.is_empty() && kind.resource.plural == "pods";
        let estimate = if is_pods { self.pod_estimate(object) } else { 0 };
        match self.delete_and_list(kind, name(object)).await {
            Ok(finalizers) if finalizers.is_empty() => {}
            Ok(items) => {
                left.resources.insert(kind.group_resource(), items.len());
                let mut finalized = false;
                for finalizer in items.into_iter().flatten() {
                    *left.finalizers.entry(finalizer).or_default() += 1;
                    finalized = true;
                }
                let estimate = if estimate == 0 && finalized { FINALIZER_ESTIMATE_SECONDS } else { estimate };
                left.estimate_seconds = left.estimate_seconds.max(estimate);
                if estimate == 0 {
                    let resource = &kind.resource;
                    left.errors.push(format!(
                        "unexpected items still remain in namespace: {} for gvr: {}/{}, Resource={}",
                        name(object),
                        resource.group,
                        resource.version,
                        resource.plural
                    ));
                }
            }
            Err(e) => {
                left.estimate_seconds = left.estimate_seconds.max(estimate);
                left.errors.push(api_error::message(&e));
            }
        }
    }

    /// The finalizers of each object that is left after the deletion.
    async fn delete_and_list(
        &self,
        kind: &Discovered,
        namespace: &str,
    ) -> Result<Vec<Vec<String>>, kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &kind.resource);
        let can_list = kind.supports("list");
        if can_list && list(&api).await?.is_empty() {
            return Ok(Vec::new());
        }
        let background = DeleteParams::background();
        if kind.supports("deletecollection") {
            match api.delete_collection(&background, &ListParams::default()).await {
                Err(e) if !api_error::is_not_found(&e) && !api_error::is_method_not_supported(&e) => {
                    return Err(e);
                }
                _ => {}
            }
        } else if can_list {
            for (name, _) in list(&api).await? {
                api_error::found(api.delete(&name, &background).await)?;
            }
        }
        if !can_list {
            return Ok(Vec::new());
        }
        Ok(list(&api).await?.into_iter().map(|(_, finalizers)| finalizers).collect())
    }

    async fn delete_content(&self, object: &Namespace) -> Remaining {
        let mut left = Remaining::default();
        let kinds = match discovery::all(&self.client).await {
            Ok(kinds) => kinds,
            Err(e) => {
                left.discovery_error = Some(api_error::message(&e));
                return left;
            }
        };
        let mut kinds: Vec<_> = kinds.into_iter().filter(|k| k.namespaced && k.supports("delete")).collect();
        kinds.sort_by_key(|k| !(k.resource.group.is_empty() && k.resource.plural == "pods"));
        for kind in &kinds {
            self.delete_all_of(kind, object, &mut left).await;
            // pods may need the rest of the namespace until they are gone
            if kind.resource.plural == "pods" && left.resources.contains_key("pods.") {
                break;
            }
        }
        left
    }

    async fn finalize(&self, object: &Namespace) -> SyncResult {
        let mut object = object.clone();
        if let Some(finalizers) = object.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
            finalizers.retain(|f| f != FINALIZER);
        }
        let api: Api<Namespace> = Api::all(self.client.clone());
        let finalized: Result<Namespace, _> =
            api.replace_subresource("finalize", name(&object), &PostParams::default(), &object).await;
        api_error::found(finalized)?;
        Ok(())
    }
}

/// Names and finalizers of what there is, from a metadata-only list.
async fn list(api: &Api<DynamicObject>) -> Result<Vec<(String, Vec<String>)>, kube::Error> {
    let Some(list) = api_error::found(api.list_metadata(&ListParams::default()).await)? else {
        return Ok(Vec::new());
    };
    let item = |m: kube::core::ObjectMeta| (m.name.unwrap_or_default(), m.finalizers.unwrap_or_default());
    Ok(list.items.into_iter().map(|o| item(o.metadata)).collect())
}

fn listed(counts: &BTreeMap<String, usize>, joint: &str) -> String {
    let each: Vec<String> =
        counts.iter().map(|(what, n)| format!("{what} {joint} {n} resource instances")).collect();
    each.join(", ")
}

/// The five conditions that tell how far a deletion is.
fn conditions(left: &Remaining) -> Vec<NamespaceCondition> {
    let new = |kind: &str, failed: Option<(&str, String)>, ok: (&str, &str)| {
        let status = if failed.is_some() { "True" } else { "False" };
        let (reason, message) = failed.unwrap_or_else(|| (ok.0, ok.1.to_string()));
        NamespaceCondition {
            type_: kind.into(),
            status: status.into(),
            last_transition_time: Some(clock::now_seconds().into()),
            reason: Some(reason.into()),
            message: Some(message),
        }
    };
    let mut errors = left.errors.clone();
    errors.sort();
    let failure = (!errors.is_empty()).then(|| {
        let message =
            format!("Failed to delete all resource types, {} remaining: {}", errors.len(), errors.join(", "));
        ("ContentDeletionFailed", message)
    });
    let remaining = (!left.resources.is_empty()).then(|| {
        ("SomeResourcesRemain", format!("Some resources are remaining: {}", listed(&left.resources, "has")))
    });
    let finalizers = (!left.finalizers.is_empty()).then(|| {
        let which = listed(&left.finalizers, "in");
        ("SomeFinalizersRemain", format!("Some content in the namespace has finalizers remaining: {which}"))
    });
    let discovery = left.discovery_error.clone().map(|e| ("DiscoveryFailed", e));
    vec![
        new(
            "NamespaceDeletionDiscoveryFailure",
            discovery,
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        new(
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        new(
            "NamespaceDeletionContentFailure",
            failure,
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        new("NamespaceContentRemaining", remaining, ("ContentRemoved", "All content successfully removed")),
        new(
            "NamespaceFinalizersRemaining",
            finalizers,
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ]
}

/// Puts the conditions into the status; tells whether any changed.
fn apply_conditions(status: &mut NamespaceStatus, new: Vec<NamespaceCondition>) -> bool {
    let own = status.conditions.get_or_insert_with(Vec::new);
    let mut changed = false;
    for condition in new {
        match own.iter_mut().find(|c| c.type_ == condition.type_) {
            None => own.push(condition),
            Some(old)
                if (&old.status, &old.reason, &old.message)
                    == (&condition.status, &condition.reason, &condition.message) =>
            {
                continue;
            }
            Some(old) => {
                let since =
                    (old.status == condition.status).then(|| old.last_transition_time.clone()).flatten();
                *old = condition;
                if since.is_some() {
                    old.last_transition_time = since;
                }
            }
        }
        changed = true;
    }
    changed
}

impl Controller for NamespaceController {
    type Key = String;
    const WORKERS: usize = 5;

    fn queue(&self) -> &WorkQueue<String> {
        &self.queue
    }

    async fn synced(&self) {
        self.namespaces.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<String> {
        self.namespaces.list().iter().filter(|n| is_deleting(&***n)).map(|n| name(&**n).to_string()).collect()
    }

    async fn sync(&self, key: String) -> SyncResult {
        let Some(cached) = self.namespaces.get("", &key) else { return Ok(()) };
        let api: Api<Namespace> = Api::all(self.client.clone());
        // live, as the conditions are written onto it
        let Some(mut object) = api_error::found(api.get(&key).await)? else { return Ok(()) };
        let finalizers = object.spec.as_ref().and_then(|s| s.finalizers.as_ref()).map_or(0, Vec::len);
        if uid(&object) != uid(&*cached) || !is_deleting(&object) || finalizers == 0 {
            return Ok(());
        }
        let status = object.status.get_or_insert_with(NamespaceStatus::default);
        if status.phase.as_deref() != Some("Terminating") {
            status.phase = Some("Terminating".into());
            object = api.replace_status(&key, &PostParams::default(), &object).await?;
        }
        let left = self.delete_content(&object).await;
        let status = object.status.get_or_insert_with(NamespaceStatus::default);
        if apply_conditions(status, conditions(&left)) {
            match api.replace_status(&key, &PostParams::default(), &object).await {
                Ok(updated) => object = updated,
                Err(error) => {
                    tracing::debug!(namespace = key, %error, "cannot update the namespace's conditions")
                }
            }
        }
        if let Some(error) = left.discovery_error.or_else(|| left.errors.first().cloned()) {
            return Err(SyncError::failed(error));
        }
        if left.estimate_seconds > 0 {
            let after = Duration::from_secs(left.estimate_seconds.unsigned_abs() / 2 + 1);
            self.queue.add_after(key, after);
            return Ok(());
        }
        match self.finalize(&object).await {
            Err(SyncError::Api(e)) if api_error::is_conflict(&e) => {
                let Some(fresh) = api_error::found(api.get(&key).await)? else { return Ok(()) };
                if uid(&fresh) != uid(&object) {
                    return Ok(());
                }
                self.finalize(&fresh).await
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_tell_what_remains_and_change_once() {
        let mut status = NamespaceStatus::default();
        let mut left = Remaining::default();
        left.resources.insert("pods.".into(), 2);
        left.finalizers.insert("example.com/f".into(), 1);
        assert!(apply_conditions(&mut status, conditions(&left)));
        assert!(!apply_conditions(&mut status, conditions(&left)));
        let of = |s: &NamespaceStatus, kind: &str| {
            let c = s.conditions.as_ref().unwrap().iter().find(|c| c.type_ == kind).unwrap().clone();
            (c.status, c.message.unwrap())
        };
        assert_eq!(
            of(&status, "NamespaceContentRemaining"),
            ("True".into(), "Some resources are remaining: pods. has 2 resource instances".into())
        );
        assert_eq!(of(&status, "NamespaceFinalizersRemaining").0, "True");
        assert!(apply_conditions(&mut status, conditions(&Remaining::default())));
        assert_eq!(of(&status, "NamespaceContentRemaining").0, "False");
        assert_eq!(status.conditions.unwrap().len(), 5);
    }
}
