//! Events about pods and the node. Upstream counterpart: client-go tools/record.
//!
//! Recording never waits: a bounded queue feeds one task, and what does not fit is dropped. The same event again
//! raises its count. An object may make 25 events at once and one every five minutes after that, as upstream.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use sampan_world::clock;
use tokio::sync::mpsc;
use tokio::time::Instant;

const QUEUE: usize = 512;
const REMEMBERED: usize = 512;
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
pub struct Recorded {
    pub object: ObjectReference,
    pub kind: &'static str,
    pub reason: String,
    pub message: String,
}

/// A handle to record events with.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Recorded>,
    node: Arc<str>,
}

pub const NORMAL: &str = "Normal";
pub const WARNING: &str = "Warning";

/// Which list of a pod's spec a container is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Init,
    Main,
    Ephemeral,
}

/// A reference to the pod.
pub fn pod_reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        api_version: Some("v1".into()),
        namespace: pod.namespace(),
        name: pod.metadata.name.clone(),
        uid: pod.uid(),
        resource_version: pod.resource_version(),
        field_path: None,
    }
}

/// A reference to one container of the pod.
pub fn container_reference(pod: &Pod, kind: Kind, container: &str) -> ObjectReference {
    let list = match kind {
        Kind::Init => "initContainers",
        Kind::Main => "containers",
        Kind::Ephemeral => "ephemeralContainers",
    };
    ObjectReference { field_path: Some(format!("spec.{list}{{{container}}}")), ..pod_reference(pod) }
}

impl Recorder {
    /// A recorder and its queue, which [`run`] empties.
    pub fn new(node: &str) -> (Self, mpsc::Receiver<Recorded>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue, node: node.into() }, receiver)
    }

    pub fn record(
        &self,
        object: ObjectReference,
        kind: &'static str,
        reason: &str,
        message: impl Into<String>,
    ) {
        let mut message = message.into();
        if message.len() > 1024 {
            let end = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(end);
            message.push_str("...");
        }
        tracing::debug!(object = ?object.name, reason, message, "event");
        let _ = self.queue.try_send(Recorded { object, kind, reason: reason.into(), message });
    }

    pub fn pod(&self, pod: &Pod, kind: &'static str, reason: &str, message: impl Into<String>) {
        self.record(pod_reference(pod), kind, reason, message);
    }

    pub fn node(&self, kind: &'static str, reason: &str, message: impl Into<String>) {
        let node = self.node.to_string();
        let object = ObjectReference {
            kind: Some("Node".into()),
            name: Some(node.clone()),
            uid: Some(node),
            ..ObjectReference::default()
        };
        self.record(object, kind, reason, message);
    }
}

type Key = (Option<String>, Option<String>, Option<String>, String, String);

struct Known {
    name: String,
    count: i32,
    used: u64,
}

/// Writes what is recorded. Runs as long as there are recorders.
pub async fn run(client: Client, node: String, mut queue: mpsc::Receiver<Recorded>) {
    let mut known: HashMap<Key, Known> = HashMap::new();
    let mut allowed: HashMap<Option<String>, (f64, Instant)> = HashMap::new();
    let mut used = 0;
    while let Some(event) = queue.recv().await {
        if !allow(&mut allowed, &event) {
            continue;
        }
        used += 1;
        let object = &event.object;
        let key = (
            object.uid.clone(),
            object.name.clone(),
            object.field_path.clone(),
            event.reason.clone(),
            event.message.clone(),
        );
        if let Some(entry) = known.get_mut(&key) {
            entry.count += 1;
            entry.used = used;
            if raise(&client, &event, &entry.name, entry.count).await {
                continue;
            }
        }
        if let Some(name) = create(&client, &node, &event).await {
            if known.len() >= REMEMBERED
                && let Some(oldest) = known.iter().min_by_key(|(_, k)| k.used).map(|(k, _)| k.clone())
            {
                known.remove(&oldest);
            }
            known.insert(key, Known { name, count: 1, used });
        }
    }
}

fn allow(allowed: &mut HashMap<Option<String>, (f64, Instant)>, event: &Recorded) -> bool {
    let now = clock::monotonic();
    if allowed.len() >= REMEMBERED {
        allowed.retain(|_, (left, at)| *left < 1.0 && now.duration_since(*at) < REFILL);
    }
    let (left, at) = allowed.entry(event.object.uid.clone()).or_insert((BURST, now));
    *left = (*left + now.duration_since(*at).as_secs_f64() / REFILL.as_secs_f64()).min(BURST);
    *at = now;
    if *left < 1.0 {
        return false;
    }
    *left -= 1.0;
    true
}

fn namespace(event: &Recorded) -> String {
    event.object.namespace.clone().unwrap_or_else(|| "default".to_string())
}

async fn raise(client: &Client, event: &Recorded, name: &str, count: i32) -> bool {
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace(event));
    let patch = serde_json::json!({"count": count, "lastTimestamp": Time(clock::now_seconds())});
    api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.is_ok()
}

async fn create(client: &Client, node: &str, event: &Recorded) -> Option<String> {
    let now = clock::now();
    let namespace = namespace(event);
    let name = format!("{}.{:x}", event.object.name.as_deref().unwrap_or_default(), now.as_nanosecond());
    let stamp = Time(clock::now_seconds());
    let object = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: event.object.clone(),
        type_: Some(event.kind.to_string()),
        reason: Some(event.reason.clone()),
        message: Some(event.message.clone()),
        count: Some(1),
        first_timestamp: Some(stamp.clone()),
        last_timestamp: Some(stamp),
        source: Some(EventSource { component: Some("kubelet".into()), host: Some(node.to_string()) }),
        reporting_component: Some("kubelet".into()),
        reporting_instance: Some(node.to_string()),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    for wait in [0, 1, 5] {
        tokio::time::sleep(Duration::from_secs(wait)).await;
        match api.create(&PostParams::default(), &object).await {
            Ok(_) => return Some(name),
            // refused (a namespace that is going): asking again would not help
            Err(kube::Error::Api(_)) => return None,
            Err(error) => tracing::debug!(%error, "event not written"),
        }
    }
    None
}
