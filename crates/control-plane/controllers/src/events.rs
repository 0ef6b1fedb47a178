//! Records events about objects. Upstream counterpart: client-go tools/record.
//!
//! Recording never waits and never fails: events go through a bounded queue to one task a controller, and what does
//! not fit is dropped. The same event again raises its count; an object that causes too many (25 at once, then one
//! each five minutes) is silenced, as upstream's spam filter does.
use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use sampan_world::clock;
use tokio::sync::mpsc;
use tokio::time::Instant;

const QUEUE: usize = 1000;
const REMEMBERED: usize = 1024;
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

pub const NORMAL: &str = "Normal";
pub const WARNING: &str = "Warning";

#[derive(Clone)]
pub struct EventRecorder(mpsc::Sender<Record>);

struct Record {
    about: ObjectReference,
    kind: &'static str,
    reason: String,
    message: String,
}

impl EventRecorder {
    /// A recorder with its own task, which ends when the last clone is dropped.
    pub fn start(client: Client, component: &'static str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write(client, component, receiver));
        Self(sender)
    }

    /// A recorder that keeps silent.
    pub fn silent() -> Self {
        Self(mpsc::channel(1).0)
    }

    pub fn normal<K: Resource<DynamicType = ()>>(&self, about: &K, reason: &str, message: impl Into<String>) {
        self.record(reference(about), NORMAL, reason, message.into());
    }

    pub fn warning<K: Resource<DynamicType = ()>>(
        &self,
        about: &K,
        reason: &str,
        message: impl Into<String>,
    ) {
        self.record(reference(about), WARNING, reason, message.into());
    }

    /// Records an event about what `about` refers to.
    pub fn record(&self, about: ObjectReference, kind: &'static str, reason: &str, message: String) {
        let mut message = message;
        if message.len() > 1024 {
            let end = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(end);
            message.push_str("...");
        }
        let _ = self.0.try_send(Record { about, kind, reason: reason.to_string(), message });
    }
}

/// The reference to an object that events and ownerless messages use.
pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    let meta = object.meta();
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

struct Seen {
    name: String,
    count: i32,
    used: Instant,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

async fn write(client: Client, component: &'static str, mut records: mpsc::Receiver<Record>) {
    let mut seen: HashMap<String, Seen> = HashMap::new();
    let mut buckets: HashMap<String, Bucket> = HashMap::new();
    while let Some(record) = records.recv().await {
        if !allowed(&mut buckets, &record.about, clock::monotonic()) {
            continue;
        }
        let namespace = record.about.namespace.clone().unwrap_or_else(|| "default".to_string());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let key = format!(
            "{}/{}/{}/{}/{}",
            record.about.uid.as_deref().unwrap_or_default(),
            record.about.name.as_deref().unwrap_or_default(),
            record.kind,
            record.reason,
            record.message
        );
        if let Some(known) = seen.get_mut(&key) {
            known.count += 1;
            known.used = clock::monotonic();
            let patch =
                serde_json::json!({"count": known.count, "lastTimestamp": Time(clock::now_seconds())});
            let name = known.name.clone();
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => continue,
                Err(e) if crate::api_error::is_not_found(&e) => seen.remove(&key),
                Err(error) => {
                    tracing::debug!(%error, "cannot update an event");
                    continue;
                }
            };
        }
        let event = event(&record, component, &namespace);
        match api.create(&PostParams::default(), &event).await {
            Ok(created) => {
                bound(&mut seen, |s| s.used);
                let name = created.metadata.name.unwrap_or_default();
                seen.insert(key, Seen { name, count: 1, used: clock::monotonic() });
            }
            Err(error) => tracing::debug!(%error, "cannot record an event"),
        }
    }
}

/// Takes one token of the object's bucket.
fn allowed(buckets: &mut HashMap<String, Bucket>, about: &ObjectReference, now: Instant) -> bool {
    let key = format!(
        "{}/{}/{}",
        about.kind.as_deref().unwrap_or_default(),
        about.namespace.as_deref().unwrap_or_default(),
        about.name.as_deref().unwrap_or_default()
    );
    bound(buckets, |b| b.at);
    let bucket = buckets.entry(key).or_insert(Bucket { tokens: BURST, at: now });
    let refill = now.duration_since(bucket.at).as_secs_f64() / REFILL.as_secs_f64();
    bucket.tokens = (bucket.tokens + refill).min(BURST);
    bucket.at = now;
    if bucket.tokens < 1.0 {
        return false;
    }
    bucket.tokens -= 1.0;
    true
}

/// Forgets the half used least recently when the map is full.
fn bound<V>(map: &mut HashMap<String, V>, used: impl Fn(&V) -> Instant) {
    if map.len() < REMEMBERED {
        return;
    }
    let mut times: Vec<Instant> = map.values().map(&used).collect();
    times.sort();
    let middle = times[times.len() / 2];
    map.retain(|_, v| used(v) > middle);
}

fn event(record: &Record, component: &str, namespace: &str) -> Event {
    let now = Time(clock::now_seconds());
    let name = record.about.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", sampan_world::random::u64())),
            namespace: Some(namespace.to_string()),
            ..ObjectMeta::default()
        },
        involved_object: record.about.clone(),
        reason: Some(record.reason.clone()),
        message: Some(record.message.clone()),
        type_: Some(record.kind.to_string()),
        source: Some(EventSource { component: Some(component.to_string()), host: None }),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        reporting_component: Some(component.to_string()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_object_that_causes_too_many_events_is_silenced() {
        let mut buckets = HashMap::new();
        let about = ObjectReference { name: Some("a".into()), ..ObjectReference::default() };
        let now = clock::monotonic();
        assert_eq!((0..30).filter(|_| allowed(&mut buckets, &about, now)).count(), 25);
        assert!(allowed(&mut buckets, &about, now + REFILL));
    }
}
