//! One pod's life on this node: a task with a state of its own, woken by events.
//!
//! Upstream counterparts: pkg/kubelet/pod_workers.go, kubelet.go (SyncPod, SyncTerminatingPod, SyncTerminatedPod).
//! What stays true: the task never waits for anything slow (pulls, hooks, stops and API calls are operations of their
//! own that report back), at most one operation of a kind is in flight a container, and everything is decided anew
//! from what there is, so that a lost event costs time and nothing else. Stages only go forward.
mod clean;
mod inbox;
mod operations;
mod report;
mod running;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use parking_lot::RwLock;
use sampan_drivers::runtime::{Container, Image, Sandbox, SandboxState};
use sampan_volumes::PodVolumes;
use sampan_world::clock;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use inbox::{Done, Eviction, Inbox};

use crate::back_off::BackOff;
use crate::node_services::NodeServices;
use crate::plan::{Probe, Records, is_exited};
use crate::pull::Waiting;
use crate::recorder::WARNING;
use crate::{admission, qos_groups};

/// What others may know of a pod.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The pod with this kubelet's own view of its status.
    pub pod: Arc<Pod>,
    pub sandbox_id: Option<String>,
    pub records: Records,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    New,
    Running,
    /// Containers are being stopped.
    Ending,
    /// Nothing runs and nothing is mounted; kept for its logs until it is deleted.
    Ended,
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Op {
    Volumes,
    Sandbox,
    Image(String),
    Start(String),
    /// By container id, with the grace period that it was given.
    Kill(String),
    Clean,
    Status,
    Delete,
}

struct Probing {
    task: Option<AbortHandle>,
    result: Option<bool>,
    /// It begins once the pod's addresses are known.
    awaits_sandbox: bool,
}

/// Failures of one thing in a row, and when to try again.
#[derive(Default)]
struct Retry {
    failures: u32,
    at: Option<Instant>,
}

impl Retry {
    fn fail(&mut self, base: Duration, max: Duration) {
        let delay = base.saturating_mul(1 << self.failures.min(16)).min(max);
        self.failures = self.failures.saturating_add(1);
        self.at = Some(clock::monotonic() + delay);
    }

    fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at <= clock::monotonic())
    }
}

pub struct Worker {
    node: Arc<NodeServices>,
    inbox: Arc<Inbox>,
    snapshot: Arc<RwLock<Snapshot>>,
    pod: Arc<Pod>,
    /// A static pod, and what the API shows of it.
    is_static: bool,
    mirror: Option<Arc<Pod>>,
    uid: String,
    stage: Stage,
    sandbox: Option<Sandbox>,
    attempts: u32,
    /// `None` until the network is attached.
    ips: Option<Vec<IpAddr>>,
    records: Records,
    volumes: Option<PodVolumes>,
    refresh_volumes: bool,
    refresh_at: Option<Instant>,
    ops: BTreeSet<Op>,
    images: HashMap<String, Image>,
    images_by_id: HashMap<String, Image>,
    waiting: HashMap<String, Waiting>,
    retry_containers: HashMap<String, Instant>,
    retry_volumes: Retry,
    retry_sandbox: Retry,
    retry_clean: Retry,
    retry_status: Retry,
    pulls: HashMap<String, (BackOff, Timestamp, String)>,
    crashes: HashMap<String, BackOff>,
    probes: HashMap<(String, Probe), Probing>,
    condemned: BTreeMap<String, Probe>,
    restarting: BTreeSet<String>,
    messages: HashMap<String, String>,
    verdict: Option<(String, String)>,
    /// The verdict came before any container.
    is_refused: bool,
    began: Instant,
    disruption: Option<PodCondition>,
    start_time: Option<Time>,
    /// The grace period that containers are being stopped with.
    grace_given: Option<i64>,
    ending_since: Option<Instant>,
    evict_grace: Option<i64>,
    status: PodStatus,
    written: PodStatus,
    written_version: u64,
    is_gone: bool,
    cancel: CancellationToken,
    wake_at: Option<Instant>,
}

fn version(pod: &Pod) -> u64 {
    pod.resource_version().and_then(|v| v.parse().ok()).unwrap_or(0)
}

impl Worker {
    pub fn new(
        node: Arc<NodeServices>,
        pod: Arc<Pod>,
        sandboxes: Vec<Sandbox>,
        containers: Vec<Container>,
    ) -> Self {
        let status = pod.status.clone().unwrap_or_default();
        let mut records = Records::default();
        containers.into_iter().for_each(|c| records.put(c));
        let sandbox = sandboxes.into_iter().max_by_key(|s| s.attempt);
        let snapshot = Snapshot {
            pod: pod.clone(),
            sandbox_id: sandbox.as_ref().map(|s| s.id.clone()),
            records: records.clone(),
        };
        let is_over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        Self {
            uid: pod.uid().unwrap_or_default(),
            attempts: sandbox.as_ref().map_or(0, |s| s.attempt + 1),
            stage: if is_over { Stage::Ending } else { Stage::New },
            written_version: version(&pod),
            start_time: status.start_time.clone(),
            written: status.clone(),
            status,
            inbox: Arc::default(),
            snapshot: Arc::new(RwLock::new(snapshot)),
            is_static: crate::static_pods::is_static(&pod),
            mirror: None,
            is_refused: false,
            began: clock::monotonic(),
            node,
            pod,
            sandbox,
            records,
            ips: None,
            volumes: None,
            refresh_volumes: false,
            refresh_at: None,
            ops: BTreeSet::new(),
            images: HashMap::new(),
            images_by_id: HashMap::new(),
            waiting: HashMap::new(),
            retry_containers: HashMap::new(),
            retry_volumes: Retry::default(),
            retry_sandbox: Retry::default(),
            retry_clean: Retry::default(),
            retry_status: Retry::default(),
            pulls: HashMap::new(),
            crashes: HashMap::new(),
            probes: HashMap::new(),
            condemned: BTreeMap::new(),
            restarting: BTreeSet::new(),
            messages: HashMap::new(),
            verdict: None,
            disruption: None,
            grace_given: None,
            ending_since: None,
            evict_grace: None,
            is_gone: false,
            cancel: CancellationToken::new(),
            wake_at: None,
        }
    }

    pub fn inbox(&self) -> Arc<Inbox> {
        self.inbox.clone()
    }

    pub fn snapshot(&self) -> Arc<RwLock<Snapshot>> {
        self.snapshot.clone()
    }

    /// Lives until the pod is gone from this node.
    pub async fn run(mut self) {
        if let Some(watches) = &self.node.watches {
            watches.register(&self.pod);
        }
        self.look().await;
        loop {
            self.step().await;
            if self.stage == Stage::Gone {
                break;
            }
            self.inbox.wait(self.wake_at).await;
            self.absorb().await;
        }
        self.probes.values().filter_map(|p| p.task.as_ref()).for_each(AbortHandle::abort);
        if let Some(watches) = &self.node.watches {
            watches.unregister(&self.uid);
        }
        self.leave();
    }

    /// No longer counts for what the node has left.
    fn leave(&self) {
        self.node.admitted.lock().remove(&self.uid);
        qos_groups::update(&self.node);
    }

    /// Takes in what happened.
    async fn absorb(&mut self) {
        let taken = self.inbox.take();
        if let Some(pod) = taken.pod {
            self.take_pod(pod);
        }
        if let Some(mirror) = taken.mirror {
            self.take_mirror(mirror);
        }
        self.is_gone |= taken.is_gone;
        if taken.refresh {
            self.refresh_volumes = true;
            self.retry_volumes.at = None;
            let waiting = &self.waiting;
            let on_config =
                |name: &String| waiting.get(name).is_some_and(|w| w.reason == "CreateContainerConfigError");
            self.retry_containers.retain(|name, _| !on_config(name));
        }
        if let Some(eviction) = taken.eviction {
            self.verdict = Some((eviction.reason, eviction.message));
            self.disruption = eviction.condition;
            self.evict_grace = Some(eviction.grace_seconds);
        }
        for ((id, probe), success) in taken.probes {
            self.probed(&id, probe, success);
        }
        let mut look = taken.look;
        for done in taken.done {
            look |= self.take_done(done);
        }
        if look {
            self.look().await;
        }
    }

    fn take_pod(&mut self, pod: Arc<Pod>) {
        let version = version(&pod);
        // newer than our own last write: somebody else's change counts
        if version > self.written_version && !self.ops.contains(&Op::Status) {
            self.written = pod.status.clone().unwrap_or_default();
            self.written_version = version;
        }
        let changed = pod.metadata.labels != self.pod.metadata.labels
            || pod.metadata.annotations != self.pod.metadata.annotations
            || pod.spec != self.pod.spec;
        self.refresh_volumes |= changed && self.volumes.is_some();
        if changed && let Some(watches) = &self.node.watches {
            watches.register(&pod);
        }
        self.pod = pod;
        let mut admitted = self.node.admitted.lock();
        if let Some(entry) = admitted.get_mut(&self.uid) {
            *entry = self.pod.clone();
        }
    }

    fn probed(&mut self, id: &str, probe: Probe, success: bool) {
        if let Some(probing) = self.probes.get_mut(&(id.to_string(), probe)) {
            probing.result = Some(success);
        }
        if !success && probe != Probe::Readiness {
            self.condemned.insert(id.to_string(), probe);
        }
    }

    /// Reads the state of the pod's sandbox and containers from the runtime.
    async fn look(&mut self) {
        let open: Vec<String> = self
            .records
            .all()
            .filter(|c| !is_exited(c) || c.finished_at.is_none())
            .map(|c| c.id.clone())
            .collect();
        for id in open {
            match self.node.runtime.container_status(&id).await {
                Ok(container) => self.records.put(container),
                Err(sampan_drivers::runtime::RuntimeError::NotFound { .. }) => self.records.remove(&id),
                Err(error) => tracing::warn!(pod = self.uid, container = id, %error, "container status"),
            }
        }
        let exited: Vec<Container> = self
            .records
            .all()
            .filter(|c| is_exited(c) && !self.messages.contains_key(&c.id))
            .cloned()
            .collect();
        for container in exited {
            self.stop_probes(&container.id);
            let message = operations::termination_message(&self.node, &self.pod, &container);
            self.messages.insert(container.id, message);
        }
        let Some(id) = self.sandbox.as_ref().map(|s| s.id.clone()) else { return };
        match self.node.runtime.list_sandboxes().await {
            Ok(all) => self.sandbox = all.into_iter().find(|s| s.id == id),
            Err(error) => tracing::warn!(pod = self.uid, %error, "sandbox status"),
        }
        let known: BTreeSet<String> = self.records.all().map(|c| c.id.clone()).collect();
        self.messages.retain(|id, _| known.contains(id));
        self.condemned.retain(|id, _| known.contains(id));
        self.restarting.retain(|id| known.contains(id));
        self.probes.retain(|(id, _), _| known.contains(id));
        let in_use: BTreeSet<String> = self.records.all().map(|c| c.image_id.clone()).collect();
        // a container that is being made is in no list yet
        if !self.ops.iter().any(|op| matches!(op, Op::Start(_))) {
            self.images_by_id.retain(|id, _| in_use.contains(id));
        }
    }

    fn stop_probes(&mut self, id: &str) {
        for ((container, _), probing) in &mut self.probes {
            if container == id
                && let Some(task) = probing.task.take()
            {
                task.abort();
            }
        }
    }

    fn is_deleting(&self) -> bool {
        self.is_gone || self.pod.metadata.deletion_timestamp.is_some()
    }

    fn has_sandbox(&self) -> bool {
        self.ips.is_some() && self.sandbox.as_ref().is_some_and(|s| s.state == SandboxState::Ready)
    }

    fn wake(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
    }

    /// Decides what is next and sets it going.
    async fn step(&mut self) {
        self.wake_at = None;
        if self.stage == Stage::New {
            self.admit();
        }
        self.check_deadline();
        if self.stage == Stage::Running && (self.is_deleting() || self.verdict.is_some()) {
            self.end();
        }
        if self.stage == Stage::Running {
            self.step_running();
        }
        if self.stage == Stage::Ending {
            self.step_ending();
        }
        self.report();
        if self.stage == Stage::Ended {
            self.step_ended();
        }
    }

    fn end(&mut self) {
        self.stage = Stage::Ending;
        self.ending_since = Some(clock::monotonic());
        self.cancel.cancel();
    }

    fn admit(&mut self) {
        if self.is_deleting() && self.records.all().next().is_none() && self.sandbox.is_none() {
            self.end();
            return;
        }
        // what this kubelet had taken before it was restarted stays
        let was_in = self.sandbox.is_some();
        match admission::admit(&self.node, &self.pod) {
            Err(refusal) if !was_in => {
                self.node.recorder.pod(&self.pod, WARNING, &refusal.reason, refusal.message.clone());
                self.verdict = Some((refusal.reason, format!("Pod was rejected: {}", refusal.message)));
                self.is_refused = true;
                self.end();
            }
            _ => {
                qos_groups::update(&self.node);
                self.start_time.get_or_insert_with(|| Time(clock::now_seconds()));
                self.stage = Stage::Running;
            }
        }
    }

    fn check_deadline(&mut self) {
        if self.stage != Stage::Running {
            return;
        }
        let seconds = self.pod.spec.as_ref().and_then(|s| s.active_deadline_seconds);
        let (Some(seconds), Some(start)) = (seconds, &self.start_time) else { return };
        let age = clock::now().duration_since(start.0);
        let left = jiff::SignedDuration::from_secs(seconds).saturating_sub(age);
        match Duration::try_from(left) {
            Ok(left) if !left.is_zero() => self.wake(clock::monotonic() + left),
            _ => {
                let message = "Pod was active on the node longer than the specified deadline";
                self.node.recorder.pod(&self.pod, crate::recorder::NORMAL, "DeadlineExceeded", message);
                self.verdict = Some(("DeadlineExceeded".into(), message.into()));
            }
        }
    }

    /// Runs `operation` beside the worker, at most one of its name at a time.
    fn spawn<F>(&mut self, op: Op, operation: F)
    where
        F: Future<Output = Done> + Send + 'static,
    {
        if self.ops.insert(op) {
            let inbox = self.inbox.clone();
            tokio::spawn(async move {
                let done = operation.await;
                inbox.done(done);
            });
        }
    }
}
