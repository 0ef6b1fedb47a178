//! The status of PodDisruptionBudgets: how many pods may be evicted now. Upstream counterpart:
//! pkg/controller/disruption.
//!
//! Deliberate difference: the size of what controls the pods is known for Deployments, ReplicaSets,
//! ReplicationControllers and StatefulSets; pods of other controllers make the budget allow nothing, with the reason
//! in its condition.
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::PostParams;
use kube::{Api, Client};
use sampan_client::informer::{controller_of, key};
use sampan_client::{Event, Informer, WorkQueue};
use sampan_world::clock;

use crate::Scope;
use crate::controller::{Controller, Descriptor, Key, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name, namespace, resolve};
use crate::events::EventRecorder;
use crate::expectations::OwnWrites;
use crate::int_or_percent::scaled;
use crate::label_selector::{labels_of, matches};
use crate::pod_state;

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "disruption-controller",
    service_account: "disruption-controller",
    component: "controllermanager",
    build: |scope| run(DisruptionController::new(&scope)),
};

/// How long an eviction may take to show before it no longer counts.
const DELETION_TIMEOUT: Duration = Duration::from_secs(120);

struct DisruptionController {
    client: Client,
    events: EventRecorder,
    budgets: Informer<PodDisruptionBudget>,
    pods: Informer<Pod>,
    deployments: Informer<Deployment>,
    replica_sets: Informer<ReplicaSet>,
    replication: Informer<ReplicationController>,
    stateful_sets: Informer<StatefulSet>,
    writes: OwnWrites,
    queue: WorkQueue<Key>,
}

/// How many pods there should be, and how many healthy ones are wanted.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    expected: i32,
    healthy: i32,
}

impl DisruptionController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            budgets: scope.informers.of(),
            pods: scope.informers.of(),
            deployments: scope.informers.of(),
            replica_sets: scope.informers.of(),
            replication: scope.informers.of(),
            stateful_sets: scope.informers.of(),
            writes: OwnWrites::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.budgets.on_event(move |event| me.queue.add(key(&**event.object())));
        let me = this.clone();
        this.pods.on_event(move |event| {
            if let Event::Updated { old, .. } = event {
                me.wake(old);
            }
            me.wake(event.object());
        });
        let me = this.clone();
        this.deployments.on_event(move |event| me.wake_namespace(namespace(&**event.object())));
        let me = this.clone();
        this.stateful_sets.on_event(move |event| {
            let size = |s: &StatefulSet| s.spec.as_ref().and_then(|s| s.replicas);
            match event {
                Event::Updated { old, new } if size(old) == size(new) => {}
                _ => me.wake_namespace(namespace(&**event.object())),
            }
        });
        this
    }

    fn wake(&self, pod: &Pod) {
        for budget in self.budgets.list_in(namespace(pod)) {
            let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
            if matches(selector, labels_of(&pod.metadata.labels)) {
                self.queue.add(key(&*budget));
            }
        }
    }

    fn wake_namespace(&self, namespace: &str) {
        for budget in self.budgets.list_in(namespace) {
            self.queue.add(key(&*budget));
        }
    }

    /// The UID and size of what controls a pod in the end.
    fn scale_of(&self, pod: &Pod) -> Result<(String, i32), String> {
        let ns = namespace(pod);
        let reference =
            controller_of(pod).ok_or_else(|| format!("found no controller ref for pod \"{}\"", name(pod)))?;
        let found = |uid: &str, replicas: Option<i32>| Ok((uid.to_string(), replicas.unwrap_or(1)));
        if let Some(set) = resolve(&self.replica_sets, ns, reference) {
            let owner = controller_of(&*set).and_then(|r| resolve(&self.deployments, ns, r));
            return match owner {
                Some(d) => found(
                    d.metadata.uid.as_deref().unwrap_or_default(),
                    d.spec.as_ref().and_then(|s| s.replicas),
                ),
                None => found(&reference.uid, set.spec.as_ref().and_then(|s| s.replicas)),
            };
        }
        if let Some(rc) = resolve(&self.replication, ns, reference) {
            return found(&reference.uid, rc.spec.as_ref().and_then(|s| s.replicas));
        }
        if let Some(set) = resolve(&self.stateful_sets, ns, reference) {
            return found(&reference.uid, set.spec.as_ref().and_then(|s| s.replicas));
        }
        Err(format!(
            "{} \"{}\", which controls pod \"{}\", has no known scale",
            reference.kind,
            reference.name,
            name(pod)
        ))
    }

    fn expected(&self, pods: &[Arc<Pod>]) -> Result<i32, String> {
        let mut scales: BTreeMap<String, i32> = BTreeMap::new();
        for pod in pods {
            let (uid, scale) = self.scale_of(pod)?;
            scales.insert(uid, scale);
        }
        Ok(scales.values().sum())
    }

    async fn write(&self, budget: &PodDisruptionBudget, status: PodDisruptionBudgetStatus) -> SyncResult {
        if budget.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let api: Api<PodDisruptionBudget> = Api::namespaced(self.client.clone(), namespace(budget));
        let changed = PodDisruptionBudget { status: Some(status), ..budget.clone() };
        let written = api.replace_status(name(budget), &PostParams::default(), &changed).await?;
        self.writes.wrote(&written);
        Ok(())
    }
}

fn wanted(
    budget: &PodDisruptionBudget,
    pods: usize,
    expected: impl FnOnce() -> Result<i32, String>,
) -> Result<Wanted, String> {
    let Some(spec) = &budget.spec else { return Err("no spec".into()) };
    let invalid = || "the budget's number is neither a number nor a percentage".to_string();
    if let Some(most) = &spec.max_unavailable {
        let expected = expected()?;
        let most = scaled(most, expected, true).ok_or_else(invalid)?;
        return Ok(Wanted { expected, healthy: (expected - most).max(0) });
    }
    match &spec.min_available {
        Some(IntOrString::Int(least)) => Ok(Wanted { expected: pods as i32, healthy: *least }),
        Some(percent) => {
            let expected = expected()?;
            Ok(Wanted { expected, healthy: scaled(percent, expected, true).ok_or_else(invalid)? })
        }
        None => Ok(Wanted { expected: 0, healthy: 0 }),
    }
}

/// Evictions that still count, and when the first of them stops to.
fn disrupted(
    recorded: &BTreeMap<String, Time>,
    pods: &[Arc<Pod>],
    now: Timestamp,
) -> (BTreeMap<String, Time>, Option<Duration>) {
    let (mut kept, mut next) = (BTreeMap::new(), None);
    for pod in pods.iter().filter(|p| !is_deleting(&***p)) {
        let Some(since) = recorded.get(name(&**pod)) else { continue };
        let waited = u64::try_from(now.duration_since(since.0).as_millis()).unwrap_or(0);
        let left = DELETION_TIMEOUT.saturating_sub(Duration::from_millis(waited));
        if left.is_zero() {
            continue;
        }
        kept.insert(name(&**pod).to_string(), since.clone());
        next = Some(next.map_or(left, |n: Duration| n.min(left)));
    }
    (kept, next)
}

/// The condition, keeping the time of its last change.
fn condition(
    before: Option<&PodDisruptionBudgetStatus>,
    new: (&str, &str, &str),
    generation: Option<i64>,
) -> Condition {
    let (status, reason, message) = new;
    let old = before.and_then(|s| s.conditions.as_ref()?.iter().find(|c| c.type_ == "DisruptionAllowed"));
    let since = old.filter(|c| c.status == status).map(|c| c.last_transition_time.clone());
    Condition {
        type_: "DisruptionAllowed".into(),
        status: status.into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation: generation,
        last_transition_time: since.unwrap_or_else(|| Time(clock::now_seconds())),
    }
}

impl Controller for DisruptionController {
    type Key = Key;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<Key> {
        &self.queue
    }

    async fn synced(&self) {
        self.budgets.synced().await;
        self.pods.synced().await;
        self.deployments.synced().await;
        self.replica_sets.synced().await;
        self.replication.synced().await;
        self.stateful_sets.synced().await;
    }

    fn all(&self) -> Vec<Key> {
        self.budgets.list().iter().map(|b| key(&**b)).collect()
    }

    async fn sync(&self, key: Key) -> SyncResult {
        let Some(budget) = self.budgets.get(&key.0, &key.1) else {
            self.writes.forget(&key);
            return Ok(());
        };
        if !self.writes.observed(&*budget) {
            return Ok(());
        }
        let before = budget.status.as_ref();
        let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
        let mut pods = self.pods.list_in(&key.0);
        pods.retain(|p| matches(selector, labels_of(&p.metadata.labels)));
        if pods.is_empty() {
            self.events.normal(&*budget, "NoPods", "No matching pods found");
        }
        let generation = budget.metadata.generation;
        let wanted = match wanted(&budget, pods.len(), || self.expected(&pods)) {
            Ok(wanted) => wanted,
            Err(why) => {
                let message = format!("Failed to calculate the number of expected pods: {why}");
                self.events.warning(&*budget, "CalculateExpectedPodCountFailed", message);
                let mut status = before.cloned().unwrap_or_default();
                status.disruptions_allowed = Some(0);
                status.conditions = Some(vec![condition(before, ("False", "SyncFailed", &why), generation)]);
                self.write(&budget, status).await?;
                return Err(SyncError::failed(why));
            }
        };
        let recorded = before.and_then(|s| s.disrupted_pods.clone()).unwrap_or_default();
        let (disrupted, next) = disrupted(&recorded, &pods, clock::now());
        let gone: HashSet<&String> = disrupted.keys().collect();
        let healthy = |p: &&Arc<Pod>| {
            !is_deleting(&***p) && pod_state::is_ready(p) && !gone.contains(&name(&***p).to_string())
        };
        let current = pods.iter().filter(healthy).count() as i32;
        let allowed = if wanted.expected <= 0 { 0 } else { (current - wanted.healthy).max(0) };
        let state =
            if allowed > 0 { ("True", "SufficientPods", "") } else { ("False", "InsufficientPods", "") };
        let status = PodDisruptionBudgetStatus {
            current_healthy: Some(current),
            desired_healthy: Some(wanted.healthy),
            expected_pods: Some(wanted.expected),
            disruptions_allowed: Some(allowed),
            disrupted_pods: (!disrupted.is_empty()).then(|| disrupted.clone()),
            observed_generation: generation,
            conditions: Some(vec![condition(before, state, generation)]),
        };
        self.write(&budget, status).await?;
        if let Some(next) = next {
            self.queue.add_after(key, next);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_budget_wants() {
        let budget = |spec: serde_json::Value| -> PodDisruptionBudget {
            serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
        };
        let ten = || Ok(10);
        let cases = [
            (json!({"minAvailable": 2}), Wanted { expected: 3, healthy: 2 }),
            (json!({"minAvailable": "75%"}), Wanted { expected: 10, healthy: 8 }),
            (json!({"maxUnavailable": 1}), Wanted { expected: 10, healthy: 9 }),
            (json!({"maxUnavailable": "25%"}), Wanted { expected: 10, healthy: 7 }),
        ];
        for (spec, expected) in cases {
            assert_eq!(wanted(&budget(spec.clone()), 3, ten), Ok(expected), "{spec}");
        }
        assert!(wanted(&budget(json!({"maxUnavailable": 1})), 3, || Err("no".into())).is_err());
    }

    #[test]
    fn evictions_count_for_two_minutes() {
        let pods = [Arc::new(pod_state::test_pod("a", "Running", "n", true))];
        let recorded = [
            ("a".to_string(), Time("2026-01-01T00:00:00Z".parse().unwrap())),
            ("gone".into(), Time(clock::now())),
        ]
        .into();
        let (kept, next) = disrupted(&recorded, &pods, "2026-01-01T00:00:30Z".parse().unwrap());
        assert_eq!((kept.len(), next), (1, Some(Duration::from_secs(90))));
        assert!(disrupted(&recorded, &pods, "2026-01-01T00:02:00Z".parse().unwrap()).0.is_empty());
    }
}
