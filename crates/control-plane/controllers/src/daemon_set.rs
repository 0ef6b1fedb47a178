//! DaemonSets: one pod on each node that fits. Upstream counterpart: pkg/controller/daemon.
//!
//! What stays true: pods are made for a node by a required node affinity on its name, and bound by the scheduler.
//! Deliberate difference: nodes whose platform the images lack are skipped, where that is known.
pub mod placement;
mod rollout;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::core::SelectorExt;
use kube::{Api, Client};
use parking_lot::Mutex;
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_drivers::platform::Platforms;
use sampan_world::clock;
use tokio::time::Instant;

use self::placement::{Placement, decide};
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{self, is_deleting, name, namespace, owned_and_orphans, resolve, uid};
use crate::events::EventRecorder;
use crate::expectations::Expectations;
use crate::label_selector::{self, labels_of};
use crate::pod_control::{
    BURST_REPLICAS, PodControl, SLOW_START_INITIAL_BATCH, pod_from_template, slow_start_batch,
};
use crate::revision_history::REVISION_HASH_LABEL;
use crate::{Scope, api_error, pod_state};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "daemonset-controller",
    service_account: "daemon-set-controller",
    component: "daemonset-controller",
    build: |scope| run(DaemonSetController::new(&scope)),
};

const TEMPLATE_GENERATION_LABEL: &str = "pod-template-generation";
const TEMPLATE_GENERATION_ANNOTATION: &str = "deprecated.daemonset.template.generation";
const FAILED_FIRST_DELAY: Duration = Duration::from_secs(1);
const FAILED_MAX_DELAY: Duration = Duration::from_secs(15 * 60);

pub struct DaemonSetController {
    client: Client,
    events: EventRecorder,
    image_platforms: Option<Arc<dyn Platforms>>,
    daemon_sets: Informer<DaemonSet>,
    revisions: Informer<ControllerRevision>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    queue: WorkQueue<Key>,
    expectations: Expectations,
    control: PodControl,
    /// Back-off of failed pods by (DaemonSet's UID, node).
    failed: Mutex<HashMap<(String, String), (Duration, Instant)>>,
}

type NodePods = BTreeMap<String, Vec<Arc<Pod>>>;

impl DaemonSetController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            image_platforms: scope.image_platforms.clone(),
            daemon_sets: scope.informers.of(),
            revisions: scope.informers.of(),
            pods: scope.informers.of(),
            nodes: scope.informers.of(),
            queue: WorkQueue::new(),
            expectations: Expectations::default(),
            control: PodControl::new(scope),
            failed: Mutex::default(),
        });
        let me = this.clone();
        this.daemon_sets.on_event(move |event| {
            let set = event.object();
            if let Event::Deleted(_) = event {
                me.expectations.forget(&key(&**set));
                me.failed.lock().retain(|(owner, _), _| owner != uid(&**set));
            }
            me.queue.add(key(&**set));
        });
        let me = this.clone();
        this.pods.on_event(move |event| me.pod_changed(event));
        let me = this.clone();
        this.revisions.on_event(move |event| {
            let revision = event.object();
            let owner =
                controller_of(&**revision).and_then(|r| resolve(&me.daemon_sets, namespace(&**revision), r));
            if let Some(set) = owner {
                me.queue.add(key(&*set));
            }
        });
        let me = this.clone();
        this.nodes.on_event(move |event| {
            let spec = |n: &Node| n.spec.as_ref().and_then(|s| s.taints.clone());
            match event {
                Event::Updated { old, new }
                    if old.metadata.labels == new.metadata.labels && spec(old) == spec(new) => {}
                _ => me.daemon_sets.list().iter().for_each(|d| me.queue.add(key(&**d))),
            }
        });
        this
    }

    fn pod_changed(&self, event: &Event<'_, Pod>) {
        let pod = event.object();
        if let Event::Updated { old, new } = event
            && controller_of(&***old) != controller_of(&***new)
            && let Some(owner) = self.owner_of(old)
        {
            self.queue.add(owner);
        }
        if let Some(owner) = self.owner_of(pod) {
            let gone = matches!(event, Event::Deleted(_)) || is_deleting(&**pod);
            if gone {
                self.expectations.deletion_observed(&owner, uid(&**pod));
            } else if matches!(event, Event::Added(_)) {
                self.expectations.creation_observed(&owner);
            }
            return self.queue.add(owner);
        }
        if controller_of(&**pod).is_some() || matches!(event, Event::Deleted(_)) {
            return;
        }
        if let Event::Updated { old, new } = event
            && old.metadata.labels == new.metadata.labels
            && controller_of(&***old).is_none()
        {
            return;
        }
        let labels = labels_of(&pod.metadata.labels);
        for set in self.daemon_sets.list_in(namespace(&**pod)) {
            if selector(&set).is_some_and(|s| !s.selects_all() && s.matches(labels)) {
                self.queue.add(key(&*set));
            }
        }
    }

    fn owner_of(&self, pod: &Pod) -> Option<Key> {
        let set = resolve(&self.daemon_sets, namespace(pod), controller_of(pod)?)?;
        Some(key(&*set))
    }

    /// The claimed pods by the node they are on or meant for.
    async fn node_pods(&self, set: &DaemonSet) -> Result<NodePods, SyncError> {
        let Some(selector) = selector(set) else { return Ok(NodePods::new()) };
        let candidates = owned_and_orphans(&self.pods, namespace(set), uid(set));
        let matches = |pod: &Pod| selector.matches(labels_of(&pod.metadata.labels));
        let claimed = controller_ref::claim(&self.client, set, candidates, None, matches).await?;
        let mut by_node = NodePods::new();
        for pod in claimed {
            if is_deleting(&*pod) && pod_state::is_terminal(&pod) {
                continue;
            }
            if let Some(node) = placement::target_node(&pod) {
                by_node.entry(node.to_string()).or_default().push(pod);
            }
        }
        for pods in by_node.values_mut() {
            pods.sort_by(|a, b| placement::oldest_first(a, b));
        }
        Ok(by_node)
    }

    /// Where the set's pods should run.
    async fn placements(&self, set: &DaemonSet) -> BTreeMap<String, Placement> {
        let Some(spec) = set.spec.as_ref().and_then(|s| s.template.spec.as_ref()) else {
            return BTreeMap::new();
        };
        let nodes = self.nodes.list();
        let mut images = Vec::new();
        if let Some(platforms) = &self.image_platforms {
            let queries = placement::images_in_question(namespace(set), spec, &nodes);
            let answers = futures::future::join_all(queries.iter().map(|q| platforms.lookup(q))).await;
            images.extend(answers.into_iter().flatten());
        }
        nodes.iter().map(|n| (name(&**n).to_string(), decide(spec, n, &images))).collect()
    }

    /// Creates what is missing and deletes what is too many, node by node.
    async fn manage(
        &self,
        set: &DaemonSet,
        places: &BTreeMap<String, Placement>,
        by_node: &NodePods,
        hash: &str,
    ) -> SyncResult {
        let (mut create, mut delete) = (Vec::new(), Vec::new());
        let none = Vec::new();
        for (node, place) in places {
            let pods = by_node.get(node).unwrap_or(&none);
            let decision =
                placement::on_node(set, *place, by_node.contains_key(node), pods, hash, clock::now());
            if decision.create {
                create.push(node.clone());
            }
            delete.extend(decision.delete);
            for pod in decision.finished {
                if self.may_replace(set, node, &pod) {
                    delete.push(pod);
                }
            }
        }
        // pods made for nodes that are gone will never be bound
        for (node, pods) in by_node.iter().filter(|(n, _)| !places.contains_key(*n)) {
            tracing::debug!(node, "deleting pods of a node that is gone");
            delete.extend(
                pods.iter().filter(|p| pod_state::node_name(p).is_empty() && !is_deleting(&***p)).cloned(),
            );
        }
        self.sync_nodes(set, create, delete, hash).await
    }

    /// Tells of a finished daemon pod; whether its back-off lets it be replaced now.
    fn may_replace(&self, set: &DaemonSet, node: &str, pod: &Pod) -> bool {
        let what = format!("daemon pod {}/{} on node {node}", namespace(pod), name(pod));
        if pod_state::phase(pod) == "Succeeded" {
            self.events.normal(
                set,
                "SucceededDaemonPod",
                format!("Found succeeded {what}, will try to delete it"),
            );
            return true;
        }
        let now = clock::monotonic();
        let mut failed = self.failed.lock();
        let entry = failed.entry((uid(set).to_string(), node.to_string()));
        let (delay, last) = *entry.or_insert((Duration::ZERO, now));
        if !delay.is_zero() && now.duration_since(last) < delay {
            self.queue.add_after(key(set), delay - now.duration_since(last));
            return false;
        }
        let idle = now.duration_since(last) > FAILED_MAX_DELAY * 2;
        let next =
            if idle { FAILED_FIRST_DELAY } else { (delay * 2).clamp(FAILED_FIRST_DELAY, FAILED_MAX_DELAY) };
        failed.insert((uid(set).to_string(), node.to_string()), (next, now));
        self.events.warning(set, "FailedDaemonPod", format!("Found failed {what}, will try to kill it"));
        true
    }

    async fn sync_nodes(
        &self,
        set: &DaemonSet,
        create: Vec<String>,
        delete: Vec<Arc<Pod>>,
        hash: &str,
    ) -> SyncResult {
        let key = key(set);
        let create = &create[..create.len().min(BURST_REPLICAS)];
        let delete = &delete[..delete.len().min(BURST_REPLICAS)];
        if create.is_empty() && delete.is_empty() {
            return Ok(());
        }
        self.expectations.expect(&key, create.len(), delete.iter().map(|p| uid(&**p).to_string()));
        let template = pod_of(set, hash);
        let create_one = |i: usize| {
            let mut pod = template.clone();
            placement::pin(&mut pod, &create[i]);
            async move {
                match self.control.create(set, &pod).await {
                    Err(e) if api_error::is_namespace_terminating(&e) => Ok(()),
                    Err(e) => Err(e),
                    Ok(_) => Ok(()),
                }
            }
        };
        let (created, failed) = slow_start_batch(create.len(), SLOW_START_INITIAL_BATCH, create_one).await;
        self.expectations.lower_creations(&key, create.len() - created);
        let deletions = delete.iter().map(|pod| async {
            let result = self.control.delete(set, name(&**pod)).await;
            if result.is_err() {
                self.expectations.deletion_observed(&key, uid(&**pod));
            }
            result
        });
        let deleted = futures::future::join_all(deletions).await.into_iter().filter_map(Result::err);
        let failed = failed.or(deleted.into_iter().find(|e| !api_error::is_not_found(e)));
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    async fn write_status(&self, set: &DaemonSet, mut status: DaemonSetStatus) -> SyncResult {
        let current = set.status.clone().unwrap_or_default();
        status.collision_count = current.collision_count;
        status.conditions = current.conditions.clone();
        if current == status {
            return Ok(());
        }
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), namespace(set));
        let mut changed = set.clone();
        changed.status = Some(status.clone());
        if api.replace_status(name(set), &PostParams::default(), &changed).await.is_ok() {
            return Ok(());
        }
        let mut fresh = api.get(name(set)).await?;
        fresh.status = Some(status);
        api.replace_status(name(set), &PostParams::default(), &fresh).await?;
        Ok(())
    }

    async fn update(
        &self,
        set: &DaemonSet,
        places: &BTreeMap<String, Placement>,
        history: &rollout::History,
    ) -> SyncResult {
        let by_node = self.node_pods(set).await?;
        self.manage(set, places, &by_node, &history.hash).await?;
        let strategy =
            set.spec.as_ref().and_then(|s| s.update_strategy.as_ref()).and_then(|s| s.type_.as_deref());
        if self.expectations.satisfied(&key(set)) && strategy != Some("OnDelete") {
            let by_node = self.node_pods(set).await?;
            let (create, delete) = rollout::plan(set, places, &by_node, &history.hash, clock::now());
            self.sync_nodes(set, create, delete, &history.hash).await?;
        }
        self.clean_up_history(set, history, &by_node).await
    }
}

fn selector(set: &DaemonSet) -> Option<kube::core::Selector> {
    label_selector::selector(&set.spec.as_ref()?.selector)
}

fn template_generation(set: &DaemonSet) -> Option<&String> {
    set.metadata.annotations.as_ref()?.get(TEMPLATE_GENERATION_ANNOTATION)
}

/// The pod that the set's template makes, before it is pinned to a node.
fn pod_of(set: &DaemonSet, hash: &str) -> Pod {
    let mut template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let labels =
        template.metadata.get_or_insert_with(ObjectMeta::default).labels.get_or_insert_with(BTreeMap::new);
    labels.insert(REVISION_HASH_LABEL.into(), hash.to_string());
    if let Some(generation) = template_generation(set) {
        labels.insert(TEMPLATE_GENERATION_LABEL.into(), generation.clone());
    }
    if let Some(spec) = template.spec.as_mut() {
        placement::add_tolerations(spec);
    }
    pod_from_template(set, &template)
}

/// Whether a pod was made from the set's current template.
fn is_updated(set: &DaemonSet, pod: &Pod, hash: &str) -> bool {
    let labels = labels_of(&pod.metadata.labels);
    let generation = template_generation(set);
    labels.get(REVISION_HASH_LABEL).is_some_and(|h| h == hash)
        || generation.is_some() && labels.get(TEMPLATE_GENERATION_LABEL) == generation
}

fn status(
    set: &DaemonSet,
    places: &BTreeMap<String, Placement>,
    by_node: &NodePods,
    hash: &str,
) -> DaemonSetStatus {
    let min_ready = set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0);
    let (mut desired, mut current, mut misscheduled) = (0, 0, 0);
    let (mut ready, mut updated, mut available) = (0, 0, 0);
    let now = clock::now();
    for (node, place) in places {
        let pod = by_node.get(node).and_then(|p| p.first());
        if !place.run {
            misscheduled += i32::from(pod.is_some());
            continue;
        }
        desired += 1;
        let Some(pod) = pod else { continue };
        current += 1;
        ready += i32::from(pod_state::is_ready(pod));
        available += i32::from(pod_state::is_available(pod, min_ready, now));
        updated += i32::from(is_updated(set, pod, hash));
    }
    let some = |n: i32| (n != 0).then_some(n);
    DaemonSetStatus {
        desired_number_scheduled: desired,
        current_number_scheduled: current,
        number_misscheduled: misscheduled,
        number_ready: ready,
        updated_number_scheduled: some(updated),
        number_available: some(available),
        number_unavailable: some(desired - available),
        observed_generation: set.metadata.generation,
        ..DaemonSetStatus::default()
    }
}

impl Controller for DaemonSetController {
    type Key = Key;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.daemon_sets.synced().await;
        self.revisions.synced().await;
        self.pods.synced().await;
        self.nodes.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.daemon_sets.list().iter().map(|d| key(&**d)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(set) = self.daemon_sets.get(&key.0, &key.1) else {
            self.expectations.forget(&key);
            return Ok(());
        };
        let Some(spec) = &set.spec else { return Ok(()) };
        if label_selector::is_empty(&spec.selector) {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.events.warning(&*set, "SelectingAll", message);
            return Ok(());
        }
        if is_deleting(&*set) {
            return Ok(());
        }
        let history = self.history(&set).await?;
        let places = self.placements(&set).await;
        let managed = match self.expectations.satisfied(&key) {
            true => Some(self.update(&set, &places, &history).await),
            false => None,
        };
        let by_node = self.node_pods(&set).await?;
        let mut status = status(&set, &places, &by_node, &history.hash);
        if managed.is_none() {
            status.observed_generation = set.status.as_ref().and_then(|s| s.observed_generation);
        }
        let waits = status.number_ready != status.number_available.unwrap_or(0);
        self.write_status(&set, status).await?;
        managed.unwrap_or(Ok(()))?;
        let min_ready = spec.min_ready_seconds.unwrap_or(0);
        if min_ready > 0 && waits {
            let next = pod_state::next_availability(by_node.values().flatten(), min_ready, clock::now());
            self.queue.add_after(key, next.unwrap_or(Duration::from_secs(min_ready.unsigned_abs().into())));
        }
        Ok(())
    }
}
