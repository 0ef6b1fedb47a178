//! Jobs: run pods until enough succeeded. Upstream counterpart: pkg/controller/job.
//!
//! What stays true: an ended pod is counted exactly once, through its finalizer and the status' list of UIDs
//! ([`tracking`]); a finished Job is never touched again; nothing is created while own writes are unseen.
pub mod decision;
pub mod failure_policy;
pub mod indexes;
mod tracking;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use kube::Client;
use kube::core::SelectorExt;
use parking_lot::Mutex;
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;

use self::decision::{End, FINALIZER, INDEX, INDEX_FAILURES, Situation, is_finished, is_indexed};
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{self, is_deleting, name, namespace, owned_and_orphans, resolve, uid};
use crate::events::EventRecorder;
use crate::expectations::{Expectations, OwnWrites};
use crate::label_selector::{self, labels_of};
use crate::pod_control::{
    BURST_REPLICAS, PodControl, SLOW_START_INITIAL_BATCH, pod_from_template, slow_start_batch,
};
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "job-controller",
    service_account: "job-controller",
    component: "job-controller",
    build: |scope| run(JobController::new(&scope)),
};

const MANAGER: &str = "kubernetes.io/job-controller";

/// A Job, or a pod that holds the tracking finalizer of a Job that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Item {
    Job(Key),
    Orphan(Key),
}

pub struct JobController {
    client: Client,
    events: EventRecorder,
    jobs: Informer<Job>,
    pods: Informer<Pod>,
    queue: WorkQueue<Item>,
    expectations: Expectations,
    writes: OwnWrites,
    control: PodControl,
    /// UIDs of pods whose finalizer was removed and that the informer still shows with it.
    releasing: Mutex<HashMap<Key, HashSet<String>>>,
}

impl JobController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            jobs: scope.informers.of(),
            pods: scope.informers.of(),
            queue: WorkQueue::new(),
            expectations: Expectations::default(),
            writes: OwnWrites::default(),
            control: PodControl::new(scope),
            releasing: Mutex::default(),
        });
        let me = this.clone();
        this.jobs.on_event(move |event| me.job_changed(event));
        let me = this.clone();
        this.pods.on_event(move |event| me.pod_changed(event));
        this
    }

    fn job_changed(&self, event: &Event<'_, Job>) {
        let job = event.object();
        let job_key = key(&**job);
        if matches!(event, Event::Deleted(_)) {
            self.expectations.forget(&job_key);
            self.releasing.lock().remove(&job_key);
            for pod in self.pods.controlled_by(uid(&**job)) {
                self.queue.add(Item::Orphan(key(&*pod)));
            }
        }
        self.queue.add(Item::Job(job_key));
    }

    fn pod_changed(&self, event: &Event<'_, Pod>) {
        let pod = event.object();
        if let Event::Updated { old, new } = event
            && controller_of(&***old) != controller_of(&***new)
            && let Some(owner) = self.owner_of(old)
        {
            self.queue.add(Item::Job(owner));
        }
        let gone = matches!(event, Event::Deleted(_));
        let Some(owner) = self.owner_of(pod) else {
            if !gone && decision::has_finalizer(pod) {
                self.queue.add(Item::Orphan(key(&**pod)));
            }
            if controller_of(&**pod).is_none() && !gone {
                self.wake_adopters(pod);
            }
            return;
        };
        if gone || !decision::has_finalizer(pod) {
            self.forget_released(&owner, uid(&**pod));
        }
        if gone || is_deleting(&**pod) {
            self.expectations.deletion_observed(&owner, uid(&**pod));
        } else if matches!(event, Event::Added(_)) {
            self.expectations.creation_observed(&owner);
        }
        self.queue.add(Item::Job(owner));
    }

    fn wake_adopters(&self, pod: &Pod) {
        let labels = labels_of(&pod.metadata.labels);
        for job in self.jobs.list_in(namespace(pod)) {
            if selector(&job).is_some_and(|s| !s.selects_all() && s.matches(labels)) {
                self.queue.add(Item::Job(key(&*job)));
            }
        }
    }

    fn owner_of(&self, pod: &Pod) -> Option<Key> {
        let job = resolve(&self.jobs, namespace(pod), controller_of(pod)?)?;
        Some(key(&*job))
    }

    fn released(&self, job: &Key) -> HashSet<String> {
        self.releasing.lock().get(job).cloned().unwrap_or_default()
    }

    fn remember_released(&self, job: &Key, uid: &str) {
        self.releasing.lock().entry(job.clone()).or_default().insert(uid.to_string());
    }

    fn forget_released(&self, job: &Key, uid: &str) {
        let mut releasing = self.releasing.lock();
        if let Some(uids) = releasing.get_mut(job) {
            uids.remove(uid);
            if uids.is_empty() {
                releasing.remove(job);
            }
        }
    }

    /// A pod whose Job is gone must not be held by it.
    async fn sync_orphan(&self, key: Key) -> SyncResult {
        let Some(pod) = self.pods.get(&key.0, &key.1).filter(|p| decision::has_finalizer(p)) else {
            return Ok(());
        };
        let job_of_pod = controller_of(&*pod).filter(|r| r.kind == "Job");
        if job_of_pod.is_some_and(|r| self.jobs.get(&key.0, &r.name).is_some_and(|j| uid(&*j) == r.uid)) {
            return Ok(());
        }
        let owner = (key.0.clone(), String::new());
        let result = self.release(&owner, &pod).await;
        self.forget_released(&owner, uid(&*pod));
        Ok(result?)
    }

    async fn delete_pods(&self, job: &Job, pods: &[Arc<Pod>], uncounted: bool) -> SyncResult {
        let job_key = key(job);
        let pods = &pods[..pods.len().min(BURST_REPLICAS)];
        self.expectations.expect(&job_key, 0, pods.iter().map(|p| uid(&**p).to_string()));
        let mut failed = None;
        for pod in pods {
            let mut result = match uncounted {
                // the Job takes it back itself: it is not to be counted as failed
                true => self.release(&job_key, pod).await,
                false => Ok(()),
            };
            if result.is_ok() {
                result = self.control.delete(job, name(&**pod)).await;
            }
            if let Err(e) = result {
                self.expectations.deletion_observed(&job_key, uid(&**pod));
                failed = failed.or(Some(e).filter(|e| !api_error::is_not_found(e)));
            }
        }
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    /// Creates and deletes pods; returns how many are active then.
    async fn manage(&self, s: &mut Situation<'_>, pods: &[Arc<Pod>]) -> SyncResult {
        let job_key = key(s.job);
        let now = clock::now();
        if s.spec.suspend == Some(true) {
            let active = std::mem::take(&mut s.active);
            if !active.is_empty() {
                self.delete_pods(s.job, &active, true).await?;
            }
            return Ok(());
        }
        let (active, wanted) = (s.active.len() as i32, s.wanted_active());
        let surplus = s.surplus((active - wanted).max(0) as usize, now);
        if !surplus.is_empty() {
            let gone: HashSet<String> = surplus.iter().map(|p| uid(&**p).to_string()).collect();
            s.active.retain(|p| !gone.contains(uid(&**p)));
            return self.delete_pods(s.job, &surplus, true).await;
        }
        let waiting = if decision::replaces_only_failed(s.spec) { s.terminating } else { 0 };
        let missing = ((wanted - waiting - active).max(0) as usize).min(BURST_REPLICAS);
        if missing == 0 {
            return Ok(());
        }
        let per_index = s.spec.backoff_limit_per_index.is_some() && is_indexed(s.spec);
        if !per_index {
            let left = decision::back_off_left(pods, s.spec, None, now);
            if !left.is_zero() {
                self.queue.add_after(Item::Job(job_key), left);
                return Ok(());
            }
        }
        let mut new: Vec<Pod> = match is_indexed(s.spec) {
            false => vec![template_pod(s.job, s.spec); missing],
            true => {
                let mut ready = s.pending_indexes(missing, pods);
                if per_index {
                    ready.retain(|i| {
                        let left = decision::back_off_left(pods, s.spec, Some(*i), now);
                        if !left.is_zero() {
                            self.queue.add_after(Item::Job(job_key.clone()), left);
                        }
                        left.is_zero()
                    });
                }
                ready.into_iter().map(|i| indexed_pod(s, i)).collect()
            }
        };
        new.truncate(missing);
        self.create_pods(s.job, &new).await
    }

    async fn create_pods(&self, job: &Job, new: &[Pod]) -> SyncResult {
        if new.is_empty() {
            return Ok(());
        }
        let job_key = key(job);
        self.expectations.expect(&job_key, new.len(), []);
        let create = |i: usize| async move {
            match self.control.create(job, &new[i]).await {
                Err(e) if api_error::is_namespace_terminating(&e) => Ok(()),
                Err(e) => Err(e),
                Ok(_) => Ok(()),
            }
        };
        let (created, failed) = slow_start_batch(new.len(), SLOW_START_INITIAL_BATCH, create).await;
        self.expectations.lower_creations(&job_key, new.len() - created);
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    async fn claimed(&self, job: &Job) -> Result<Vec<Arc<Pod>>, SyncError> {
        let Some(selector) = selector(job) else {
            return Err(SyncError::failed("the selector is not valid"));
        };
        let candidates = owned_and_orphans(&self.pods, namespace(job), uid(job));
        let matches = |pod: &Pod| selector.matches(labels_of(&pod.metadata.labels));
        controller_ref::claim(&self.client, job, candidates, Some(FINALIZER), matches).await
    }

    async fn sync_job(&self, job_key: Key) -> SyncResult {
        let Some(job) = self.jobs.get(&job_key.0, &job_key.1) else {
            self.expectations.forget(&job_key);
            self.writes.forget(&job_key);
            return Ok(());
        };
        if !self.writes.observed(&*job) {
            return Ok(());
        }
        let Some(spec) = &job.spec else { return Ok(()) };
        if spec.managed_by.as_deref().is_some_and(|m| m != MANAGER) {
            return Ok(());
        }
        if is_finished(&job) {
            for pod in self.pods.controlled_by(uid(&*job)) {
                self.release(&job_key, &pod).await?;
            }
            return Ok(());
        }
        let satisfied = self.expectations.satisfied(&job_key);
        let pods = self.claimed(&job).await?;
        let mut status = job.status.clone().unwrap_or_default();
        let suspended = spec.suspend == Some(true);
        if status.start_time.is_none() && !suspended {
            status.start_time = Some(clock::now_seconds().into());
        }
        let started = Job { status: Some(status.clone()), ..(*job).clone() };
        let mut s = Situation::new(&started, spec, &pods, &self.released(&job_key));
        let mut end = s.end(clock::now());
        let mut managed = Ok(());
        let mut active = s.active.len();
        if end.is_some() {
            let running = s.active.clone();
            if !running.is_empty() && satisfied {
                managed = self.delete_pods(&job, &running, false).await;
            }
        } else {
            if let Some(left) = s.deadline_left(clock::now()) {
                self.queue.add_after(Item::Job(job_key.clone()), left);
            }
            if satisfied && !is_deleting(&*job) {
                managed = self.manage(&mut s, &pods).await;
                active = s.active.len();
            }
            if s.is_complete() && !(suspended && s.spec.completions.is_none()) {
                let (reason, message) = ("CompletionsReached", "Reached expected number of succeeded pods");
                end = Some(End { succeeded: true, reason: reason.into(), message: message.into() });
            } else if satisfied {
                self.note_suspension(&job, &mut status, suspended);
            }
        }
        status.active = Some(active as i32).filter(|n| *n != 0);
        status.ready = Some(s.ready.min(active as i32));
        status.terminating = Some(s.terminating);
        let more = self.track(&s, &pods, status, end).await?;
        managed?;
        if more {
            self.queue.add(Item::Job(job_key));
        }
        Ok(())
    }

    /// Records suspending and resuming in the conditions.
    fn note_suspension(&self, job: &Job, status: &mut JobStatus, suspended: bool) {
        let was = decision::condition_is_true(status, "Suspended");
        if suspended && !was {
            tracking::set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended");
            status.start_time = None;
            self.events.normal(job, "Suspended", "Job suspended");
        } else if !suspended && was {
            tracking::set_condition(status, "Suspended", "False", "JobResumed", "Job resumed");
            status.start_time = Some(clock::now_seconds().into());
            self.events.normal(job, "Resumed", "Job resumed");
            if let Some(seconds) = job.spec.as_ref().and_then(|s| s.active_deadline_seconds) {
                let deadline = Duration::from_secs(seconds.max(0).unsigned_abs());
                self.queue.add_after(Item::Job(key(job)), deadline);
            }
        }
    }
}

fn selector(job: &Job) -> Option<kube::core::Selector> {
    label_selector::selector(job.spec.as_ref()?.selector.as_ref()?)
}

fn template_pod(job: &Job, spec: &JobSpec) -> Pod {
    let mut pod = pod_from_template(job, &spec.template);
    let finalizers = pod.metadata.finalizers.get_or_insert_with(Vec::new);
    if !finalizers.iter().any(|f| f == FINALIZER) {
        finalizers.push(FINALIZER.into());
    }
    pod
}

/// The pod of one index: its number is in its name, host name, annotation, label and environment.
fn indexed_pod(s: &Situation<'_>, index: i32) -> Pod {
    let mut pod = template_pod(s.job, s.spec);
    let job = name(s.job);
    pod.metadata.generate_name = Some(format!("{job}-{index}-"));
    let annotations = pod.metadata.annotations.get_or_insert_with(BTreeMap::new);
    annotations.insert(INDEX.into(), index.to_string());
    if s.spec.backoff_limit_per_index.is_some() {
        let failures = s.index_failures.get(&index).copied().unwrap_or(0);
        annotations.insert(INDEX_FAILURES.into(), failures.to_string());
    }
    pod.metadata.labels.get_or_insert_with(BTreeMap::new).insert(INDEX.into(), index.to_string());
    let Some(spec) = pod.spec.as_mut() else { return pod };
    spec.hostname = Some(format!("{job}-{index}"));
    let field =
        ObjectFieldSelector { field_path: format!("metadata.annotations['{INDEX}']"), api_version: None };
    let variable = EnvVar {
        name: "JOB_COMPLETION_INDEX".into(),
        value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
        ..EnvVar::default()
    };
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let env = container.env.get_or_insert_with(Vec::new);
        if !env.iter().any(|e| e.name == variable.name) {
            env.push(variable.clone());
        }
    }
    pod
}

impl Controller for JobController {
    type Key = Item;
    const WORKERS: usize = 5;

    fn queue(&self) -> &WorkQueue<Item> {
        &self.queue
    }

    async fn synced(&self) {
        self.jobs.synced().await;
        self.pods.synced().await;
    }

    fn all(&self) -> Vec<Item> {
        let orphans = self.pods.list();
        let orphans = orphans.iter().filter(|p| decision::has_finalizer(p)).map(|p| Item::Orphan(key(&**p)));
        self.jobs.list().iter().map(|j| Item::Job(key(&**j))).chain(orphans).collect()
    }

    async fn sync(&self, item: Item) -> SyncResult {
        match item {
            Item::Job(key) => self.sync_job(key).await,
            Item::Orphan(key) => self.sync_orphan(key).await,
        }
    }
}
