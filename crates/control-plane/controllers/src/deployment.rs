//! Deployments: rolls out pod templates through ReplicaSets. Upstream counterpart: pkg/controller/deployment.
//!
//! What stays true: one write a step, then the next event continues; a rollout never goes below the availability or
//! above the surge that the strategy allows. Deliberate difference: the annotation
//! `deprecated.deployment.rollback.to` of extensions/v1beta1 does nothing.
pub mod arithmetic;
mod progress;
mod revision;
mod rollout;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::core::SelectorExt;
use kube::{Api, Client};
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};

use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{self, is_deleting, name, namespace, owned_and_orphans, resolve, uid};
use crate::events::EventRecorder;
use crate::label_selector::{self, labels_of};
use crate::{Scope, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "deployment-controller",
    service_account: "deployment-controller",
    component: "deployment-controller",
    build: |scope| run(DeploymentController::new(&scope)),
};

pub struct DeploymentController {
    client: Client,
    events: EventRecorder,
    deployments: Informer<Deployment>,
    replica_sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
    queue: WorkQueue<Key>,
}

/// The replica sets of a deployment: the one with its template, and all others.
struct ReplicaSets {
    new: Option<ReplicaSet>,
    old: Vec<ReplicaSet>,
}

impl ReplicaSets {
    fn all(&self) -> impl Iterator<Item = &ReplicaSet> + Clone {
        self.old.iter().chain(&self.new)
    }
}

impl DeploymentController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            deployments: scope.informers.of(),
            replica_sets: scope.informers.of(),
            pods: scope.informers.of(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.deployments.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.replica_sets.on_event(move |event| me.replica_set_changed(event));
        let me = this.clone();
        this.pods.on_event(move |event| me.pod_changed(event));
        this
    }

    fn replica_set_changed(&self, event: &Event<'_, ReplicaSet>) {
        let set = event.object();
        if let Event::Updated { old, new } = event {
            if controller_of(&***old) != controller_of(&***new) {
                self.wake_owner(old);
            } else if controller_of(&***new).is_none() && old.metadata.labels == new.metadata.labels {
                return;
            }
        }
        if controller_of(&**set).is_some() {
            return self.wake_owner(set);
        }
        if matches!(event, Event::Deleted(_)) || is_deleting(&**set) {
            return;
        }
        let labels = labels_of(&set.metadata.labels);
        for deployment in self.deployments.list_in(namespace(&**set)) {
            let selector = deployment.spec.as_ref().and_then(|s| label_selector::selector(&s.selector));
            if selector.is_some_and(|s| !s.selects_all() && s.matches(labels)) {
                self.queue.add(key(&*deployment));
            }
        }
    }

    fn wake_owner(&self, set: &ReplicaSet) {
        let owner = controller_of(set).and_then(|r| resolve(&self.deployments, namespace(set), r));
        if let Some(deployment) = owner {
            self.queue.add(key(&*deployment));
        }
    }

    /// A Recreate rollout goes on when the last old pod is gone or finished.
    fn pod_changed(&self, event: &Event<'_, Pod>) {
        let pod = match event {
            Event::Deleted(pod) => pod,
            Event::Updated { old, new } if pod_state::is_terminal(new) && !pod_state::is_terminal(old) => new,
            _ => return,
        };
        let set = controller_of(&***pod).and_then(|r| resolve(&self.replica_sets, namespace(&***pod), r));
        let Some(set) = set else { return };
        let owner = controller_of(&*set).and_then(|r| resolve(&self.deployments, namespace(&*set), r));
        if let Some(deployment) = owner.filter(|d| arithmetic::strategy(d) == "Recreate") {
            self.queue.add(key(&*deployment));
        }
    }

    fn api(&self, deployment: &Deployment) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), namespace(deployment))
    }

    fn sets_api(&self, deployment: &Deployment) -> Api<ReplicaSet> {
        Api::namespaced(self.client.clone(), namespace(deployment))
    }

    /// Writes the status that `deployment` carries and takes over what came back.
    async fn write_status(&self, deployment: &mut Deployment) -> SyncResult {
        let api = self.api(deployment);
        *deployment = api.replace_status(name(deployment), &PostParams::default(), deployment).await?;
        Ok(())
    }

    async fn claimed(&self, deployment: &Deployment) -> Result<Vec<ReplicaSet>, SyncError> {
        let spec = deployment.spec.as_ref();
        let Some(selector) = spec.and_then(|s| label_selector::selector(&s.selector)) else {
            return Err(SyncError::failed("the selector is not valid"));
        };
        let candidates = owned_and_orphans(&self.replica_sets, namespace(deployment), uid(deployment));
        let matches = |set: &ReplicaSet| selector.matches(labels_of(&set.metadata.labels));
        let claimed = controller_ref::claim(&self.client, deployment, candidates, None, matches).await?;
        Ok(claimed.iter().map(|s| (**s).clone()).collect())
    }

    /// Only the status, nothing else.
    async fn sync_status_only(&self, deployment: &mut Deployment, sets: Vec<ReplicaSet>) -> SyncResult {
        let sets = self.with_revisions(deployment, sets, false).await?;
        self.sync_status(deployment, &sets).await
    }

    /// Scaling, or a paused deployment.
    async fn sync_scale(&self, deployment: &mut Deployment, sets: Vec<ReplicaSet>) -> SyncResult {
        let mut sets = self.with_revisions(deployment, sets, false).await?;
        self.scale(deployment, &mut sets).await?;
        if deployment.spec.as_ref().and_then(|s| s.paused) == Some(true) {
            self.clean_up(deployment, &sets.old).await?;
        }
        self.sync_status(deployment, &sets).await
    }

    async fn sync_status(&self, deployment: &mut Deployment, sets: &ReplicaSets) -> SyncResult {
        let status = progress::calculate_status(deployment, sets);
        if progress::same(&deployment.status.clone().unwrap_or_default(), &status) {
            return Ok(());
        }
        deployment.status = Some(status);
        self.write_status(deployment).await
    }

    /// Writes the status with the progress of the rollout.
    async fn sync_rollout_status(&self, deployment: &mut Deployment, sets: &ReplicaSets) -> SyncResult {
        let status = progress::rollout_status(deployment, sets, sampan_world::clock::now());
        if !progress::same(&deployment.status.clone().unwrap_or_default(), &status) {
            deployment.status = Some(status);
            return self.write_status(deployment).await;
        }
        if let Some(after) = progress::next_check(deployment, &status, sampan_world::clock::now()) {
            match after {
                Duration::ZERO => self.queue.add_rate_limited(key(deployment)),
                after => self.queue.add_after(key(deployment), after),
            }
        }
        Ok(())
    }

    /// Records pausing and resuming, so that a pause is not taken for lack of progress.
    async fn check_paused(&self, deployment: &mut Deployment) -> SyncResult {
        let Some(condition) = progress::paused_condition(deployment) else { return Ok(()) };
        let status = deployment.status.get_or_insert_with(DeploymentStatus::default);
        progress::set_condition(status, condition);
        self.write_status(deployment).await
    }

    async fn is_scaling(&self, deployment: &mut Deployment, sets: &[ReplicaSet]) -> Result<bool, SyncError> {
        let sets = self.with_revisions(deployment, sets.to_vec(), false).await?;
        let wanted = arithmetic::replicas(deployment);
        let scaled = sets.all().filter(|s| arithmetic::size(s) > 0);
        Ok(scaled.into_iter().any(|s| arithmetic::desired_annotation(s).is_some_and(|d| d != wanted)))
    }
}

impl Controller for DeploymentController {
    type Key = Key;
    const WORKERS: usize = 5;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.deployments.synced().await;
        self.replica_sets.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.deployments.list().iter().map(|d| key(&**d)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(deployment) = self.deployments.get(&key.0, &key.1) else { return Ok(()) };
        let mut deployment = (*deployment).clone();
        let Some(spec) = deployment.spec.clone() else { return Ok(()) };
        if label_selector::is_empty(&spec.selector) {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            self.events.warning(&deployment, "SelectingAll", message);
            let generation = deployment.metadata.generation;
            let status = deployment.status.get_or_insert_with(DeploymentStatus::default);
            if status.observed_generation < generation {
                status.observed_generation = generation;
                self.write_status(&mut deployment).await?;
            }
            return Ok(());
        }
        let sets = self.claimed(&deployment).await?;
        if is_deleting(&deployment) {
            return self.sync_status_only(&mut deployment, sets).await;
        }
        self.check_paused(&mut deployment).await?;
        if spec.paused == Some(true) || self.is_scaling(&mut deployment, &sets).await? {
            return self.sync_scale(&mut deployment, sets).await;
        }
        match arithmetic::strategy(&deployment) {
            "Recreate" => self.recreate(&mut deployment, sets).await,
            "RollingUpdate" => self.rolling_update(&mut deployment, sets).await,
            other => Err(SyncError::failed(format!("unexpected deployment strategy type: {other}"))),
        }
    }
}
