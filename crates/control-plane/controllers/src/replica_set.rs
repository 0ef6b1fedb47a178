//! ReplicaSets: keeps the wanted number of pods. The core is generic and serves ReplicationControllers too.
//! Upstream counterpart: pkg/controller/replicaset.
//!
//! What stays true: nothing is created or deleted before the own writes of the last time were observed; a pod counts
//! only when it is active and claimed.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::Api;
use kube::api::PostParams;
use kube::core::{Selector, SelectorExt};
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;
use serde::Serialize;

use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{
    self, Namespaced, is_controlled_by, is_deleting, name, namespace, owned_and_orphans, uid,
};
use crate::expectations::Expectations;
use crate::label_selector::{contains_all, labels_of, selector};
use crate::pod_control::{
    BURST_REPLICAS, PodControl, SLOW_START_INITIAL_BATCH, pod_from_template, slow_start_batch,
};
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "replicaset-controller",
    service_account: "replicaset-controller",
    component: "replicaset-controller",
    build: |scope| run(ReplicaController::<ReplicaSet>::new(&scope)),
};

/// What the generic core needs of a kind.
pub trait Replicated: Namespaced + Serialize {
    /// Whether its status counts terminating pods.
    const COUNTS_TERMINATING: bool;
    fn replicas(&self) -> i32;
    fn pod_selector(&self) -> Option<Selector>;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn min_ready_seconds(&self) -> i32;
    fn status(&self) -> ReplicaSetStatus;
    fn set_status(&mut self, status: ReplicaSetStatus);
}

impl Replicated for ReplicaSet {
    const COUNTS_TERMINATING: bool = true;
    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
    }
    fn pod_selector(&self) -> Option<Selector> {
        selector(&self.spec.as_ref()?.selector)
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
    }
    fn status(&self) -> ReplicaSetStatus {
        self.status.clone().unwrap_or_default()
    }
    fn set_status(&mut self, status: ReplicaSetStatus) {
        self.status = Some(status);
    }
}

pub struct ReplicaController<K> {
    owners: Informer<K>,
    pods: Informer<Pod>,
    queue: WorkQueue<Key>,
    expectations: Expectations,
    control: PodControl,
}

impl<K: Replicated> ReplicaController<K> {
    pub fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            owners: scope.informers.of(),
            pods: scope.informers.of(),
            queue: WorkQueue::new(),
            expectations: Expectations::default(),
            control: PodControl::new(scope),
        });
        let me = this.clone();
        this.owners.on_event(move |event| me.owner_changed(event));
        let me = this.clone();
        this.pods.on_event(move |event| me.pod_changed(event));
        this
    }

    fn owner_changed(&self, event: &Event<'_, K>) {
        let key = key(&**event.object());
        match event {
            Event::Deleted(_) => self.expectations.forget(&key),
            // made anew under the same name while we were not looking
            Event::Updated { old, new } if uid(&***old) != uid(&***new) => self.expectations.forget(&key),
            _ => {}
        }
        self.queue.add(key);
    }

    fn pod_changed(&self, event: &Event<'_, Pod>) {
        match event {
            Event::Added(pod) if is_deleting(&***pod) => self.pod_deleted(pod),
            Event::Added(pod) => match self.owner_of(pod) {
                Some(owner) => {
                    self.expectations.creation_observed(&owner);
                    self.queue.add(owner);
                }
                None => self.wake_adopters(pod),
            },
            Event::Updated { old, new } => self.pod_updated(old, new),
            Event::Deleted(pod) => self.pod_deleted(pod),
        }
    }

    fn pod_updated(&self, old: &Pod, new: &Pod) {
        let relabelled = old.metadata.labels != new.metadata.labels;
        if is_deleting(new) {
            // a graceful deletion counts from its start
            self.pod_deleted(new);
            if relabelled {
                self.pod_deleted(old);
            }
            return;
        }
        let moved = controller_of(old) != controller_of(new);
        if moved && let Some(owner) = self.owner_of(old) {
            self.queue.add(owner);
        }
        if controller_of(new).is_some() {
            if let Some(owner) = self.owner_of(new) {
                self.queue.add(owner);
            }
        } else if relabelled || moved {
            self.wake_adopters(new);
        }
    }

    fn pod_deleted(&self, pod: &Pod) {
        if let Some(owner) = self.owner_of(pod) {
            self.expectations.deletion_observed(&owner, uid(pod));
            self.queue.add(owner);
        }
    }

    fn owner_of(&self, pod: &Pod) -> Option<Key> {
        let owner = controller_ref::resolve(&self.owners, namespace(pod), controller_of(pod)?)?;
        Some(key(&*owner))
    }

    /// Wakes all that might adopt an orphan.
    fn wake_adopters(&self, pod: &Pod) {
        if controller_of(pod).is_some() {
            return;
        }
        let labels = labels_of(&pod.metadata.labels);
        for owner in self.owners.list_in(namespace(pod)) {
            if owner.pod_selector().is_some_and(|s| !s.selects_all() && s.matches(labels)) {
                self.queue.add(key(&*owner));
            }
        }
    }

    /// Creates what is missing, deletes what is too many.
    async fn manage(&self, key: &Key, owner: &K, active: &[Arc<Pod>]) -> SyncResult {
        let diff = active.len() as i64 - i64::from(owner.replicas());
        if diff < 0 {
            return self.create(key, owner, (diff.unsigned_abs() as usize).min(BURST_REPLICAS)).await;
        }
        if diff == 0 {
            return Ok(());
        }
        let count = (diff as usize).min(BURST_REPLICAS);
        let victims = victims(active, &self.related(owner), count, clock::now());
        self.expectations.expect(key, 0, victims.iter().map(|p| uid(&**p).to_string()));
        let deletions = victims.iter().map(|pod| async move {
            let result = self.control.delete(owner, name(&**pod)).await;
            if result.is_err() {
                self.expectations.deletion_observed(key, uid(&**pod));
            }
            result
        });
        let failed = futures::future::join_all(deletions).await.into_iter().filter_map(Result::err);
        match failed.into_iter().find(|e| !api_error::is_not_found(e)) {
            Some(e) => Err(e.into()),
            None => Ok(()),
        }
    }

    async fn create(&self, key: &Key, owner: &K, count: usize) -> SyncResult {
        let Some(template) = owner.template() else { return Ok(()) };
        let pod = pod_from_template(owner, template);
        self.expectations.expect(key, count, []);
        let create = |_| async {
            match self.control.create(owner, &pod).await {
                Err(e) if api_error::is_namespace_terminating(&e) => Ok(()),
                Err(e) => Err(e),
                Ok(_) => Ok(()),
            }
        };
        let (created, failed) = slow_start_batch(count, SLOW_START_INITIAL_BATCH, create).await;
        self.expectations.lower_creations(key, count - created);
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    /// Active pods of all owners that share this owner's controller: pods that spread together.
    fn related(&self, owner: &K) -> Vec<Arc<Pod>> {
        let siblings = match controller_of(owner) {
            Some(controller) => self.owners.controlled_by(&controller.uid),
            None => Vec::new(),
        };
        let mut uids: HashSet<String> = siblings.iter().map(|o| uid(&**o).to_string()).collect();
        uids.insert(uid(owner).to_string());
        let pods = uids.iter().flat_map(|uid| self.pods.controlled_by(uid));
        pods.filter(|p| pod_state::is_active(p)).collect()
    }

    /// Writes the status where it differs, once more on a conflict.
    async fn write_status(&self, owner: &K, mut status: ReplicaSetStatus) -> Result<(), SyncError> {
        let generation = owner.meta().generation;
        let current = owner.status();
        if same_counts(&current, &status)
            && current.observed_generation.unwrap_or(0) == generation.unwrap_or(0)
        {
            return Ok(());
        }
        status.observed_generation = generation;
        let api: Api<K> = Api::namespaced(self.control.client.clone(), namespace(owner));
        let mut changed = owner.clone();
        changed.set_status(status.clone());
        if api.replace_status(name(owner), &PostParams::default(), &changed).await.is_ok() {
            return Ok(());
        }
        let mut fresh = api.get(name(owner)).await?;
        fresh.set_status(status);
        api.replace_status(name(owner), &PostParams::default(), &fresh).await?;
        Ok(())
    }
}

impl<K: Replicated> Controller for ReplicaController<K> {
    type Key = Key;
    const WORKERS: usize = 5;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.owners.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.owners.list().iter().map(|o| key(&**o)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(owner) = self.owners.get(&key.0, &key.1) else {
            self.expectations.forget(&key);
            return Ok(());
        };
        let Some(selector) = owner.pod_selector() else { return Ok(()) };
        let may_manage = self.expectations.satisfied(&key);
        let matches = |pod: &Pod| selector.matches(labels_of(&pod.metadata.labels));
        let all = owned_and_orphans(&self.pods, &key.0, uid(&*owner));
        let terminating = all
            .iter()
            .filter(|p| pod_state::is_terminating(p) && is_controlled_by(&***p, &*owner) && matches(p));
        let terminating = terminating.count() as i32;
        let active = all.into_iter().filter(|p| pod_state::is_active(p)).collect();
        let active = controller_ref::claim(&self.control.client, &*owner, active, None, matches).await?;
        let managed = match may_manage && !is_deleting(&*owner) {
            true => self.manage(&key, &owner, &active).await,
            false => Ok(()),
        };
        let now = clock::now();
        let status = calculate_status(&*owner, &active, terminating, managed.as_ref().err(), now);
        let waits = status.ready_replicas != status.available_replicas;
        self.write_status(&owner, status).await?;
        managed?;
        let min_ready = owner.min_ready_seconds();
        if min_ready > 0 && waits {
            let next = pod_state::next_availability(&active, min_ready, now);
            self.queue.add_after(key, next.unwrap_or(Duration::from_secs(min_ready.unsigned_abs().into())));
        }
        Ok(())
    }
}

/// Chooses `count` of `active` to delete.
fn victims(active: &[Arc<Pod>], related: &[Arc<Pod>], count: usize, now: Timestamp) -> Vec<Arc<Pod>> {
    if count >= active.len() {
        return active.to_vec();
    }
    let mut on_node: HashMap<&str, usize> = HashMap::new();
    for pod in related {
        *on_node.entry(pod_state::node_name(pod)).or_default() += 1;
    }
    let rank = |p: &Pod| on_node.get(pod_state::node_name(p)).copied().unwrap_or(0);
    let mut sorted = active.to_vec();
    sorted.sort_by(|a, b| pod_state::deletion_order((a, rank(a)), (b, rank(b)), now));
    sorted.truncate(count);
    sorted
}

/// Zero is left out of the API's JSON.
fn some(n: i32) -> Option<i32> {
    (n != 0).then_some(n)
}

fn same_counts(a: &ReplicaSetStatus, b: &ReplicaSetStatus) -> bool {
    let counts = |s: &ReplicaSetStatus| {
        let n = |v: Option<i32>| v.unwrap_or(0);
        (
            s.replicas,
            n(s.fully_labeled_replicas),
            n(s.ready_replicas),
            n(s.available_replicas),
            s.terminating_replicas,
        )
    };
    let conditions = |s: &ReplicaSetStatus| s.conditions.clone().unwrap_or_default();
    counts(a) == counts(b) && conditions(a) == conditions(b)
}

fn calculate_status<K: Replicated>(
    owner: &K,
    active: &[Arc<Pod>],
    terminating: i32,
    failure: Option<&SyncError>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let mut status = owner.status();
    let template = owner.template().and_then(|t| t.metadata.as_ref());
    let empty = Default::default();
    let wanted = template.map_or(&empty, |m| labels_of(&m.labels));
    let count = |f: &dyn Fn(&Pod) -> bool| active.iter().filter(|p| f(p)).count() as i32;
    status.replicas = active.len() as i32;
    status.fully_labeled_replicas = some(count(&|p| contains_all(wanted, labels_of(&p.metadata.labels))));
    status.ready_replicas = some(count(&pod_state::is_ready));
    status.available_replicas = some(count(&|p| pod_state::is_available(p, owner.min_ready_seconds(), now)));
    status.terminating_replicas = K::COUNTS_TERMINATING.then_some(terminating);
    let mut conditions = status.conditions.take().unwrap_or_default();
    let present = conditions.iter().any(|c| c.type_ == "ReplicaFailure");
    match failure {
        Some(error) if !present => {
            let reason = match active.len() as i64 - i64::from(owner.replicas()) {
                d if d < 0 => "FailedCreate",
                d if d > 0 => "FailedDelete",
                _ => "",
            };
            conditions.push(ReplicaSetCondition {
                type_: "ReplicaFailure".into(),
                status: "True".into(),
                last_transition_time: Some(clock::now_seconds().into()),
                reason: Some(reason.into()),
                message: Some(error.message()),
            });
        }
        None => conditions.retain(|c| c.type_ != "ReplicaFailure"),
        Some(_) => {}
    }
    status.conditions = (!conditions.is_empty()).then_some(conditions);
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_state::test_pod;

    fn replica_set(replicas: i32) -> ReplicaSet {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "rs", "namespace": "ns", "uid": "u", "generation": 1},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "a"}},
                "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": []}}},
        }))
        .unwrap()
    }

    #[test]
    fn status_counts_and_tells_of_failure() {
        let pods =
            [Arc::new(test_pod("a", "Running", "n", true)), Arc::new(test_pod("b", "Running", "n", false))];
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        let failure = SyncError::failed("quota");
        let status = calculate_status(&replica_set(3), &pods, 1, Some(&failure), now);
        assert_eq!(
            (status.replicas, status.ready_replicas, status.terminating_replicas),
            (2, Some(1), Some(1))
        );
        assert_eq!(status.fully_labeled_replicas, Some(2));
        let condition = &status.conditions.as_ref().unwrap()[0];
        assert_eq!(
            (condition.reason.as_deref(), condition.message.as_deref()),
            (Some("FailedCreate"), Some("quota"))
        );
        let mut healed = replica_set(3);
        healed.set_status(status);
        assert_eq!(calculate_status(&healed, &pods, 0, None, now).conditions, None);
    }

    #[test]
    fn victims_are_those_that_share_a_node() {
        let pods: Vec<_> = [("a", "n1"), ("b", "n2"), ("c", "n2")]
            .iter()
            .map(|(name, node)| Arc::new(test_pod(name, "Running", node, true)))
            .collect();
        let chosen = victims(&pods, &pods, 1, "2026-01-02T00:00:00Z".parse().unwrap());
        assert_eq!(pod_state::node_name(&chosen[0]), "n2");
        assert_eq!(victims(&pods, &pods, 3, clock::now()).len(), 3);
    }
}
