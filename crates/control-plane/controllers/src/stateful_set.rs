//! StatefulSets: pods with names, an order and claims of their own. Upstream counterpart: pkg/controller/statefulset.
//!
//! What stays true: no two pods of one ordinal at a time; unless pods are managed in parallel, a pod is only touched
//! when all before it are available. Deliberate difference: claims get their owner for the retention policy when they
//! are made and when the set shrinks; a policy that is changed later does not reach back.
pub mod identity;
pub mod plan;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::core::SelectorExt;
use kube::{Api, Client};
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;

use self::plan::{Action, Revisions};
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{
    self, controller_reference, is_deleting, name, namespace, owned_and_orphans, resolve, uid,
};
use crate::events::EventRecorder;
use crate::expectations::OwnWrites;
use crate::label_selector::{self, labels_of};
use crate::revision_history::{self, Created, HASH_LABEL};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "statefulset-controller",
    service_account: "statefulset-controller",
    component: "statefulset-controller",
    build: |scope| run(StatefulSetController::new(&scope)),
};

struct StatefulSetController {
    client: Client,
    events: EventRecorder,
    sets: Informer<StatefulSet>,
    revisions: Informer<ControllerRevision>,
    claims: Informer<PersistentVolumeClaim>,
    pods: Informer<Pod>,
    writes: OwnWrites,
    queue: WorkQueue<Key>,
}

impl StatefulSetController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            sets: scope.informers.of(),
            revisions: scope.informers.of(),
            claims: scope.informers.of(),
            pods: scope.informers.of(),
            writes: OwnWrites::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.sets.on_event(move |event| {
            let set_key = key(&**event.object());
            if matches!(event, Event::Deleted(_)) {
                me.writes.forget(&set_key);
            }
            me.queue.add(set_key);
        });
        let me = this.clone();
        this.pods.on_event(move |event| {
            if let Event::Updated { old, .. } = event {
                me.wake_owner(old);
            }
            me.wake_owner(event.object());
        });
        this
    }

    fn wake_owner(&self, pod: &Pod) {
        if let Some(reference) = controller_of(pod) {
            if let Some(set) = resolve(&self.sets, namespace(pod), reference) {
                self.queue.add(key(&*set));
            }
            return;
        }
        let labels = labels_of(&pod.metadata.labels);
        for set in self.sets.list_in(namespace(pod)) {
            if selector(&set).is_some_and(|s| !s.selects_all() && s.matches(labels)) {
                self.queue.add(key(&*set));
            }
        }
    }

    async fn claimed_pods(&self, set: &StatefulSet) -> Result<Vec<Arc<Pod>>, SyncError> {
        let Some(selector) = selector(set) else {
            return Err(SyncError::failed("the selector is not valid"));
        };
        let mut candidates = owned_and_orphans(&self.pods, namespace(set), uid(set));
        candidates.retain(|p| identity::ordinal_in(name(set), name(&**p)).is_some());
        let matches = |p: &Pod| selector.matches(labels_of(&p.metadata.labels));
        controller_ref::claim(&self.client, set, candidates, None, matches).await
    }

    /// The current and the update revision, and all there are.
    async fn revisions(
        &self,
        set: &StatefulSet,
    ) -> Result<(Revisions, Vec<Arc<ControllerRevision>>), SyncError> {
        let Some(spec) = &set.spec else { return Err(SyncError::failed("no spec")) };
        let Some(selector) = selector(set) else {
            return Err(SyncError::failed("the selector is not valid"));
        };
        let candidates = owned_and_orphans(&self.revisions, namespace(set), uid(set));
        let matches = |r: &ControllerRevision| selector.matches(labels_of(&r.metadata.labels));
        let mut all = controller_ref::claim(&self.client, set, candidates, None, matches).await?;
        all.sort_by_key(|r| (r.revision, r.metadata.creation_timestamp.clone(), r.metadata.name.clone()));
        let data = revision_history::template_patch(&spec.template);
        let next = all.last().map_or(0, |r| r.revision) + 1;
        let same = all.iter().rposition(|r| revision_history::data_of(r) == Some(&data));
        let mut collisions = set.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
        let update = match same {
            Some(i) if i + 1 == all.len() => (*all[i]).clone(),
            Some(i) => revision_history::renumber(&self.client, &all[i], next).await?,
            None => loop {
                let labels = spec.selector.match_labels.clone().unwrap_or_default();
                let new =
                    revision_history::new_revision(set, labels, HASH_LABEL, data.clone(), next, collisions);
                match revision_history::create(&self.client, set, &new).await? {
                    Created::Revision(created) => break *created,
                    Created::Collision if collisions < 1000 => collisions += 1,
                    Created::Collision => return Err(SyncError::failed("no free name for a revision")),
                }
            },
        };
        let recorded = set.status.as_ref().and_then(|s| s.current_revision.clone()).unwrap_or_default();
        let current =
            all.iter().find(|r| name(&***r) == recorded).map_or_else(|| update.clone(), |r| (**r).clone());
        let revisions = Revisions {
            current: name(&current).to_string(),
            update: name(&update).to_string(),
            current_template: template_of(&current).unwrap_or_else(|| spec.template.clone()),
            update_template: spec.template.clone(),
            collisions,
        };
        Ok((revisions, all))
    }

    async fn act(&self, set: &StatefulSet, revisions: &Revisions, action: Action) -> SyncResult {
        match action {
            Action::Delete(pod) => self.delete(set, &pod).await,
            Action::EnsureClaims(pod) => self.ensure_claims(set, &pod).await,
            Action::Create(ordinal) => {
                let pod = identity::new_pod(set, revisions, ordinal);
                self.create(set, &pod).await
            }
            Action::FixIdentity(pod) => {
                self.ensure_claims(set, &pod).await?;
                let mut fixed = (*pod).clone();
                identity::set_identity(set, &mut fixed);
                let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(set));
                let updated = api.replace(name(&fixed), &PostParams::default(), &fixed).await;
                self.tell("update", set, &pod, updated.as_ref().err());
                updated?;
                Ok(())
            }
        }
    }

    async fn create(&self, set: &StatefulSet, pod: &Pod) -> SyncResult {
        self.ensure_claims(set, pod).await?;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(set));
        match api.create(&PostParams::default(), pod).await {
            Err(e) if api_error::is_already_exists(&e) => Err(e.into()),
            Err(e) if api_error::is_namespace_terminating(&e) => Ok(()),
            result => {
                self.tell("create", set, pod, result.as_ref().err());
                Ok(result.map(drop)?)
            }
        }
    }

    async fn delete(&self, set: &StatefulSet, pod: &Pod) -> SyncResult {
        self.own_claims_for_scale_down(set, pod).await?;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace(set));
        let exactly = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        match api.delete(name(pod), &DeleteParams::default().preconditions(exactly)).await {
            Err(e) if api_error::is_not_found(&e) || api_error::is_conflict(&e) => Ok(()),
            result => {
                self.tell("delete", set, pod, result.as_ref().err());
                Ok(result.map(drop)?)
            }
        }
    }

    fn tell(&self, verb: &str, set: &StatefulSet, pod: &Pod, error: Option<&kube::Error>) {
        let mut title = verb.to_string();
        title[..1].make_ascii_uppercase();
        let what = format!("{verb} Pod {} in StatefulSet {}", name(pod), name(set));
        match error {
            None => self.events.normal(set, &format!("Successful{title}"), format!("{what} successful")),
            Some(e) => {
                let message = format!("{what} failed error: {}", api_error::message(e));
                self.events.warning(set, &format!("Failed{title}"), message);
            }
        }
    }

    /// Makes the claims that a pod needs and that are not there.
    async fn ensure_claims(&self, set: &StatefulSet, pod: &Pod) -> SyncResult {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace(set));
        for claim in identity::claims(set, pod) {
            if let Some(existing) = self.claims.get(namespace(set), name(&claim)) {
                if is_deleting(&*existing) {
                    return Err(SyncError::failed(format!("pvc {} is being deleted", name(&claim))));
                }
                continue;
            }
            let what = format!("Claim {} Pod {} in StatefulSet {}", name(&claim), name(pod), name(set));
            match api.create(&PostParams::default(), &claim).await {
                Ok(_) => self.events.normal(set, "SuccessfulCreate", format!("create {what} success")),
                Err(e) if api_error::is_already_exists(&e) => {}
                Err(e) => {
                    let message = format!("create {what} failed error: {}", api_error::message(&e));
                    self.events.warning(set, "FailedCreate", message);
                    return Err(e.into());
                }
            }
        }
        Ok(())
    }

    /// With `whenScaled: Delete`, the claims of a pod beyond the wanted number go with it.
    async fn own_claims_for_scale_down(&self, set: &StatefulSet, pod: &Pod) -> SyncResult {
        let policy = set.spec.as_ref().and_then(|s| s.persistent_volume_claim_retention_policy.as_ref());
        let deletes = policy.and_then(|p| p.when_scaled.as_deref()) == Some("Delete");
        let ordinal = identity::ordinal_in(name(set), name(pod)).unwrap_or(-1);
        if !deletes || plan::in_range(set, ordinal) {
            return Ok(());
        }
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace(set));
        let owner =
            OwnerReference { controller: None, block_owner_deletion: None, ..controller_reference(pod) };
        for claim in identity::claims(set, pod) {
            let Some(existing) = self.claims.get(namespace(set), name(&claim)) else { continue };
            let mut owned = (*existing).clone();
            let owners = owned.metadata.owner_references.get_or_insert_with(Vec::new);
            if owners.iter().any(|o| o.uid == owner.uid) {
                continue;
            }
            owners.push(owner.clone());
            api_error::found(api.replace(name(&claim), &PostParams::default(), &owned).await)?;
        }
        Ok(())
    }

    async fn write_status(&self, set: &StatefulSet, status: StatefulSetStatus) -> SyncResult {
        if set.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let api: Api<StatefulSet> = Api::namespaced(self.client.clone(), namespace(set));
        let mut changed = set.clone();
        changed.status = Some(status);
        let written = api.replace_status(name(set), &PostParams::default(), &changed).await?;
        self.writes.wrote(&written);
        Ok(())
    }
}

fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let template = revision_history::data_of(revision)?.get("spec")?.get("template")?;
    serde_json::from_value(template.clone()).ok()
}

fn selector(set: &StatefulSet) -> Option<kube::core::Selector> {
    label_selector::selector(&set.spec.as_ref()?.selector)
}

impl Controller for StatefulSetController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.sets.synced().await;
        self.revisions.synced().await;
        self.claims.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.sets.list().iter().map(|s| key(&**s)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(set) = self.sets.get(&key.0, &key.1) else { return Ok(()) };
        if !self.writes.observed(&*set) {
            return Ok(());
        }
        let pods = self.claimed_pods(&set).await?;
        let (revisions, all) = self.revisions(&set).await?;
        let now = clock::now();
        let mut acted = Ok(());
        if !is_deleting(&*set) {
            for action in plan::plan(&set, &revisions, &pods, now) {
                if let Err(e) = self.act(&set, &revisions, action).await {
                    acted = Err(e);
                    break;
                }
            }
        }
        let status = plan::status(&set, &revisions, &pods, now);
        let waits = status.ready_replicas != status.available_replicas;
        self.write_status(&set, status).await?;
        acted?;
        let limit = set.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10);
        let live = |r: &ControllerRevision| {
            let own = name(r);
            own == revisions.current
                || own == revisions.update
                || pods.iter().any(|p| identity::revision_of(p) == own)
        };
        revision_history::truncate(&self.client, all, limit, live).await?;
        let min_ready = set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0);
        if min_ready > 0 && waits {
            let next = pod_state::next_availability(&pods, min_ready, now);
            self.queue.add_after(key, next.unwrap_or(Duration::from_secs(min_ready.unsigned_abs().into())));
        }
        Ok(())
    }
}
