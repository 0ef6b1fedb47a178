//! The pods that have no node yet. Upstream counterpart: pkg/scheduler/backend/queue.
//!
//! Active pods are tried by priority, then age. A pod that fitted nowhere is set aside until an event comes that one of
//! the plugins that rejected it thinks may help; then it is active again, after a back-off that doubles from 1 s to
//! 10 s. When there is nothing else to do, back-offs are not waited out, except after errors. After five minutes a pod
//! is tried without any event. Events that come while a pod is being tried count for it afterwards.
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sampan_world::clock;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::framework::{ClusterEvent, Framework, PluginSet, PodInfo};

const INITIAL_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
const MAX_UNSCHEDULABLE: Duration = Duration::from_secs(300);
/// Events kept for the pod that is being tried; more count as one that helps.
const MAX_EVENTS: usize = 1000;

/// A pod and how it fared.
#[derive(Clone, Debug)]
pub struct QueuedPod {
    pub info: Arc<PodInfo>,
    pub attempts: u32,
    /// The plugins that rejected it in its last attempt.
    pub rejectors: PluginSet,
    /// The last attempt ended in an error, not a rejection.
    pub errored: bool,
    /// The plugin that keeps it out of the active queue.
    gate: Option<usize>,
    /// When it came into the queue, or back from its last attempt.
    since: Instant,
    /// In which order it came.
    order: u64,
}

impl QueuedPod {
    fn backoff_until(&self) -> Instant {
        let doublings = self.attempts.saturating_sub(1).min(10);
        let backoff = INITIAL_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
        self.since + if self.attempts == 0 { Duration::ZERO } else { backoff }
    }
}

/// Higher priority first, then first come.
type ActiveKey = (std::cmp::Reverse<i32>, u64);
type BackoffKey = (Instant, u64);

#[derive(Clone, Copy)]
enum Place {
    Active(ActiveKey),
    Backoff(BackoffKey),
    Unschedulable,
}

#[derive(Default)]
struct Inner {
    active: BTreeMap<ActiveKey, QueuedPod>,
    backoff: BTreeMap<BackoffKey, QueuedPod>,
    unschedulable: HashMap<Arc<str>, QueuedPod>,
    places: HashMap<Arc<str>, Place>,
    order: u64,
    in_flight: Option<InFlight>,
}

struct InFlight {
    uid: Arc<str>,
    events: Vec<ClusterEvent>,
    /// The newest state, where it changed; `deleted` where it is gone.
    latest: Option<Arc<PodInfo>>,
    deleted: bool,
}

pub struct Queue {
    inner: Mutex<Inner>,
    wake: Notify,
    framework: Arc<Framework>,
}

impl Queue {
    pub fn new(framework: Arc<Framework>) -> Self {
        Self { inner: Mutex::default(), wake: Notify::new(), framework }
    }

    /// Adds a pod without a node, or its newest state.
    pub fn put(&self, info: &Arc<PodInfo>) {
        let mut inner = self.inner.lock();
        if let Some(flight) = inner.in_flight.as_mut().filter(|f| f.uid == info.uid) {
            flight.latest = Some(info.clone());
            return;
        }
        if let Some(known) = inner.get_mut(&info.uid) {
            known.info = info.clone();
            return;
        }
        inner.order += 1;
        let order = inner.order;
        let pod = QueuedPod {
            info: info.clone(),
            attempts: 0,
            rejectors: PluginSet::default(),
            errored: false,
            gate: None,
            since: clock::monotonic(),
            order,
        };
        self.activate(&mut inner, pod);
    }

    /// Drops a pod that was deleted or has a node.
    pub fn remove(&self, uid: &str) {
        let mut inner = self.inner.lock();
        if let Some(flight) = inner.in_flight.as_mut().filter(|f| *f.uid == *uid) {
            flight.deleted = true;
        }
        inner.take(uid);
    }

    /// Moves the pods that `event` may help.
    pub fn on_event(&self, event: &ClusterEvent) {
        let mut inner = self.inner.lock();
        if let Some(flight) = inner.in_flight.as_mut().filter(|f| f.events.len() < MAX_EVENTS) {
            flight.events.push(event.clone());
        }
        let helped = |pod: &QueuedPod| self.helps(pod, event);
        let uids: Vec<Arc<str>> =
            inner.unschedulable.values().filter(|p| helped(p)).map(|p| p.info.uid.clone()).collect();
        for uid in uids {
            if let Some(pod) = inner.take(&uid) {
                self.requeue(&mut inner, pod);
            }
        }
    }

    fn helps(&self, pod: &QueuedPod, event: &ClusterEvent) -> bool {
        if let ClusterEvent::Activate { uid } = event {
            return *uid == pod.info.uid;
        }
        if let Some(gate) = pod.gate {
            let mut rejectors = PluginSet::default();
            rejectors.insert(gate);
            return self.framework.may_help(rejectors, &pod.info, event);
        }
        if pod.rejectors.is_empty() {
            // nobody knows what it waits for; the pod's own changes are no reason, as its status is written by us
            return !matches!(event, ClusterEvent::PodUpdated { .. });
        }
        self.framework.may_help(pod.rejectors, &pod.info, event)
    }

    /// The next pod to try, as soon as there is one.
    pub async fn pop(&self) -> QueuedPod {
        loop {
            let woken = self.wake.notified();
            let deadline = match self.try_pop() {
                Ok(pod) => return pod,
                Err(deadline) => deadline,
            };
            match deadline {
                Some(deadline) => tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep_until(deadline) => {}
                },
                None => woken.await,
            }
        }
    }

    /// The next pod to try, or when there may be one without an event.
    pub fn try_pop(&self) -> Result<QueuedPod, Option<Instant>> {
        let mut inner = self.inner.lock();
        let now = clock::monotonic();
        self.flush(&mut inner, now);
        if inner.active.is_empty() {
            // idle: no need to wait, unless the API is in trouble
            let next = inner.backoff.values().find(|p| !p.errored).map(|p| p.info.uid.clone());
            if let Some(pod) = next.and_then(|uid| inner.take(&uid)) {
                self.activate(&mut inner, pod);
            }
        }
        let Some((_, mut pod)) = inner.active.pop_first() else {
            let backoff = inner.backoff.keys().next().map(|(at, _)| *at);
            let ungated = inner.unschedulable.values().filter(|p| p.gate.is_none());
            let leftover = ungated.map(|p| p.since + MAX_UNSCHEDULABLE).min();
            return Err([backoff, leftover].into_iter().flatten().min());
        };
        inner.places.remove(&pod.info.uid);
        pod.attempts += 1;
        let uid = pod.info.uid.clone();
        inner.in_flight = Some(InFlight { uid, events: Vec::new(), latest: None, deleted: false });
        Ok(pod)
    }

    /// The pod being tried was placed, or is no more.
    pub fn done(&self) {
        self.inner.lock().in_flight = None;
    }

    /// The pod being tried fitted nowhere (`rejectors`) or met an error (none): it comes back with its newest state.
    /// Returns that, or `None` where the pod is gone meanwhile.
    pub fn put_back(&self, mut pod: QueuedPod, rejectors: PluginSet) -> Option<Arc<PodInfo>> {
        let mut inner = self.inner.lock();
        let flight = inner.in_flight.take_if(|f| f.uid == pod.info.uid);
        let (events, latest, deleted) =
            flight.map_or_else(Default::default, |f| (f.events, f.latest, f.deleted));
        if deleted || inner.places.contains_key(&pod.info.uid) {
            return None;
        }
        pod.info = latest.unwrap_or(pod.info);
        pod.rejectors = rejectors;
        pod.errored = rejectors.is_empty();
        pod.since = clock::monotonic();
        let info = pod.info.clone();
        let missed = events.len() >= MAX_EVENTS || events.iter().any(|e| self.helps(&pod, e));
        if missed || pod.errored {
            self.requeue(&mut inner, pod);
        } else {
            inner.places.insert(info.uid.clone(), Place::Unschedulable);
            inner.unschedulable.insert(info.uid.clone(), pod);
            self.wake.notify_one();
        }
        Some(info)
    }

    /// Sets a pod aside that fits nowhere because there are no nodes: any event brings it back.
    pub fn set_aside(&self, mut pod: QueuedPod) -> Option<Arc<PodInfo>> {
        let mut inner = self.inner.lock();
        let flight = inner.in_flight.take_if(|f| f.uid == pod.info.uid);
        let (events, latest, deleted) =
            flight.map_or_else(Default::default, |f| (f.events, f.latest, f.deleted));
        if deleted {
            return None;
        }
        pod.info = latest.unwrap_or(pod.info);
        pod.rejectors = PluginSet::default();
        pod.since = clock::monotonic();
        let info = pod.info.clone();
        if events.iter().any(|e| self.helps(&pod, e)) {
            self.requeue(&mut inner, pod);
        } else {
            inner.places.insert(info.uid.clone(), Place::Unschedulable);
            inner.unschedulable.insert(info.uid.clone(), pod);
        }
        Some(info)
    }

    /// How many pods wait: active, backing off, set aside.
    pub fn lengths(&self) -> (usize, usize, usize) {
        let inner = self.inner.lock();
        (inner.active.len(), inner.backoff.len(), inner.unschedulable.len())
    }

    /// Moves what has waited long enough.
    fn flush(&self, inner: &mut Inner, now: Instant) {
        while let Some(entry) = inner.backoff.first_entry().filter(|e| e.key().0 <= now) {
            let pod = entry.remove();
            inner.places.remove(&pod.info.uid);
            self.activate(inner, pod);
        }
        let old = |p: &&QueuedPod| p.gate.is_none() && p.since + MAX_UNSCHEDULABLE <= now;
        let old: Vec<Arc<str>> =
            inner.unschedulable.values().filter(old).map(|p| p.info.uid.clone()).collect();
        for uid in old {
            if let Some(pod) = inner.take(&uid) {
                self.requeue(inner, pod);
            }
        }
    }

    /// Active again, at once or after the back-off.
    fn requeue(&self, inner: &mut Inner, pod: QueuedPod) {
        let until = pod.backoff_until();
        if until <= clock::monotonic() || pod.gate.is_some() {
            self.activate(inner, pod);
            return;
        }
        let key = (until, pod.order);
        inner.places.insert(pod.info.uid.clone(), Place::Backoff(key));
        inner.backoff.insert(key, pod);
        self.wake.notify_one();
    }

    /// Makes a pod active unless a plugin keeps it out.
    fn activate(&self, inner: &mut Inner, mut pod: QueuedPod) {
        let uid = pod.info.uid.clone();
        pod.gate = self.framework.pre_enqueue(&pod.info).map(|r| r.plugin);
        if pod.gate.is_some() {
            inner.places.insert(uid.clone(), Place::Unschedulable);
            inner.unschedulable.insert(uid, pod);
            return;
        }
        let key = (std::cmp::Reverse(pod.info.priority), pod.order);
        inner.places.insert(uid, Place::Active(key));
        inner.active.insert(key, pod);
        self.wake.notify_one();
    }
}

impl Inner {
    fn get_mut(&mut self, uid: &str) -> Option<&mut QueuedPod> {
        match *self.places.get(uid)? {
            Place::Active(key) => self.active.get_mut(&key),
            Place::Backoff(key) => self.backoff.get_mut(&key),
            Place::Unschedulable => self.unschedulable.get_mut(uid),
        }
    }

    fn take(&mut self, uid: &str) -> Option<QueuedPod> {
        match self.places.remove(uid)? {
            Place::Active(key) => self.active.remove(&key),
            Place::Backoff(key) => self.backoff.remove(&key),
            Place::Unschedulable => self.unschedulable.remove(uid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::framework;
    use crate::testing::{context, node, pod};
    use serde_json::json;

    fn queue() -> Queue {
        Queue::new(Arc::new(framework(&context())))
    }

    fn rejected_by(queue: &Queue, name: &str) -> PluginSet {
        let mut set = PluginSet::default();
        set.insert((0..64).find(|i| queue.framework.name_of(*i) == name).unwrap());
        set
    }

    #[tokio::test(start_paused = true)]
    async fn priority_comes_before_age() {
        let queue = queue();
        for (name, priority) in [("old", 0), ("urgent", 10), ("new", 0)] {
            queue.put(&pod(name, json!({"spec": {"containers": [], "priority": priority}})));
        }
        let order: Vec<String> = (0..3).map(|_| queue.try_pop().unwrap().info.name.clone()).collect();
        assert_eq!(order, ["urgent", "old", "new"]);
    }

    #[tokio::test(start_paused = true)]
    async fn events_bring_back_only_pods_they_may_help() {
        let queue = queue();
        let spec = json!({"spec": {"containers": [], "nodeSelector": {"arch": "arm64"}}});
        queue.put(&pod("p", spec));
        let popped = queue.try_pop().unwrap();
        let affinity = rejected_by(&queue, "NodeAffinity");
        queue.put_back(popped, affinity);
        assert_eq!(queue.lengths(), (0, 0, 1));
        let added =
            |labels| ClusterEvent::NodeAdded(node("n", json!({"metadata": {"labels": labels}})).into());
        queue.on_event(&added(json!({"arch": "amd64"})));
        assert_eq!(queue.lengths(), (0, 0, 1));
        queue.on_event(&added(json!({"arch": "arm64"})));
        assert_eq!(queue.lengths(), (0, 1, 0), "it backs off first");
        assert_eq!(queue.try_pop().unwrap().attempts, 2, "but not when there is nothing else to do");
    }

    #[tokio::test(start_paused = true)]
    async fn events_during_an_attempt_count_and_errors_back_off() {
        let queue = queue();
        queue.put(&pod("p", json!({})));
        let popped = queue.try_pop().unwrap();
        queue.on_event(&ClusterEvent::AssignedPodDeleted(pod("gone", json!({}))));
        let fit = rejected_by(&queue, "NodeResourcesFit");
        queue.put_back(popped, fit);
        assert_eq!(queue.lengths(), (0, 1, 0));
        let popped = queue.try_pop().unwrap();
        queue.put_back(popped, PluginSet::default());
        let deadline = queue.try_pop().unwrap_err().unwrap();
        assert_eq!(
            deadline,
            Instant::now() + Duration::from_secs(2),
            "after an error the back-off is waited out"
        );
        assert_eq!(queue.pop().await.attempts, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn gated_pods_wait_for_their_gates_and_lost_ones_are_flushed() {
        let queue = queue();
        let gated = pod("g", json!({"spec": {"containers": [], "schedulingGates": [{"name": "x"}]}}));
        queue.put(&gated);
        queue.on_event(&ClusterEvent::NodeAdded(node("n", json!({})).into()));
        assert_eq!(queue.try_pop().unwrap_err(), None, "nothing to wake up for");
        let free = pod("g", json!({}));
        queue.put(&free);
        let change = crate::framework::PodChange::between(&gated, &free);
        queue.on_event(&ClusterEvent::PodUpdated { old: gated, new: free, change });
        let popped = queue.try_pop().unwrap();
        let affinity = rejected_by(&queue, "NodeAffinity");
        queue.put_back(popped, affinity);
        tokio::time::sleep(MAX_UNSCHEDULABLE).await;
        assert!(queue.try_pop().is_ok());
        queue.remove("g");
        assert_eq!(queue.lengths(), (0, 0, 0));
    }
}
