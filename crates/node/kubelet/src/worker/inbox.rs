//! What a pod's worker is told. Newer news of a kind replace older ones, so it stays small without losing anything.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use parking_lot::Mutex;
use sampan_drivers::runtime::{Container, Image, Sandbox};
use sampan_volumes::PodVolumes;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::plan::Probe;
use crate::pull::Waiting;

/// The node ends the pod.
#[derive(Clone, Debug)]
pub struct Eviction {
    pub reason: String,
    pub message: String,
    pub grace_seconds: i64,
    pub condition: Option<PodCondition>,
}

/// An operation's end, or a step of it.
pub enum Done {
    Volumes(Result<PodVolumes, Vec<String>>),
    Sandbox(Result<(Sandbox, Vec<IpAddr>), String>),
    Image(String, Result<Image, Waiting>),
    /// The container runs; its postStart hook may still be under way.
    Running(Container),
    Start {
        name: String,
        result: Result<(), Waiting>,
        container: Option<Container>,
    },
    Killed(String),
    Cleaned(Result<(), String>),
    Status {
        sent: PodStatus,
        result: Result<u64, StatusError>,
    },
    Deleted(Result<(), String>),
}

pub enum StatusError {
    /// The pod is no longer in the API.
    Gone,
    Failed(String),
}

#[derive(Default)]
pub struct News {
    pub pod: Option<Arc<Pod>>,
    /// What the API shows of a static pod, if anything.
    pub mirror: Option<Option<Arc<Pod>>>,
    pub is_gone: bool,
    pub look: bool,
    pub refresh: bool,
    pub eviction: Option<Eviction>,
    pub probes: BTreeMap<(String, Probe), bool>,
    /// Bounded by the operations in flight.
    pub done: Vec<Done>,
}

#[derive(Default)]
pub struct Inbox {
    news: Mutex<News>,
    wake: Notify,
}

impl Inbox {
    fn tell(&self, change: impl FnOnce(&mut News)) {
        change(&mut self.news.lock());
        self.wake.notify_one();
    }

    /// The pod as the API has it now.
    pub fn pod(&self, pod: Arc<Pod>) {
        self.tell(|n| n.pod = Some(pod));
    }

    /// What the API shows of this static pod.
    pub fn mirror(&self, mirror: Option<Arc<Pod>>) {
        self.tell(|n| n.mirror = Some(mirror));
    }

    /// The pod is no longer in the API.
    pub fn gone(&self) {
        self.tell(|n| n.is_gone = true);
    }

    /// Something happened in the runtime.
    pub fn look(&self) {
        self.tell(|n| n.look = true);
    }

    /// An object that the pod uses has changed.
    pub fn refresh(&self) {
        self.tell(|n| n.refresh = true);
    }

    pub fn evict(&self, eviction: Eviction) {
        self.tell(|n| n.eviction = Some(eviction));
    }

    pub fn probed(&self, id: &str, probe: Probe, success: bool) {
        self.tell(|n| {
            n.probes.insert((id.to_string(), probe), success);
        });
    }

    pub fn done(&self, done: Done) {
        self.tell(|n| n.done.push(done));
    }

    pub fn take(&self) -> News {
        std::mem::take(&mut self.news.lock())
    }

    /// Waits for news, at most until then.
    pub async fn wait(&self, until: Option<Instant>) {
        match until {
            Some(at) => drop(tokio::time::timeout_at(at, self.wake.notified()).await),
            None => self.wake.notified().await,
        }
    }
}
