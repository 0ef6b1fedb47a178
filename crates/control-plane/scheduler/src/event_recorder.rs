//! Records events about pods. Upstream counterpart: client-go tools/events.
//!
//! Recording never waits: a bounded queue feeds one task, and what does not fit is dropped. The same event again
//! raises its count. Deliberate difference: events carry the old API's fields (count, first and last time, source) too,
//! so that old clients show their age.
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use sampan_world::clock;
use serde_json::json;
use tokio::sync::mpsc;

use crate::SCHEDULER_NAME;
use crate::framework::PodInfo;
use crate::writes::{ClusterWrites, WriteError};

const QUEUE: usize = 1000;
const REMEMBERED: usize = 512;
/// The longest note that the API takes.
const MAX_NOTE_BYTES: usize = 1024;

pub const NORMAL: &str = "Normal";
pub const WARNING: &str = "Warning";

struct Record {
    about: ObjectReference,
    kind: &'static str,
    reason: &'static str,
    action: &'static str,
    note: String,
}

#[derive(Clone)]
pub struct EventRecorder(mpsc::Sender<Record>);

/// The records that a recorder's task writes.
pub struct Records(mpsc::Receiver<Record>);

impl EventRecorder {
    pub fn new() -> (Self, Records) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), Records(receiver))
    }

    pub fn record(
        &self,
        pod: &PodInfo,
        kind: &'static str,
        reason: &'static str,
        action: &'static str,
        note: String,
    ) {
        let about = ObjectReference {
            api_version: Some("v1".to_string()),
            kind: Some("Pod".to_string()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.to_string()),
            resource_version: pod.pod.metadata.resource_version.clone(),
            field_path: None,
        };
        let _ = self.0.try_send(Record { about, kind, reason, action, note: truncated(note) });
    }
}

fn truncated(mut note: String) -> String {
    const MORE: &str = " ...";
    if note.len() > MAX_NOTE_BYTES {
        let end = (0..=MAX_NOTE_BYTES - MORE.len()).rev().find(|i| note.is_char_boundary(*i)).unwrap_or(0);
        note.truncate(end);
        note.push_str(MORE);
    }
    note
}

/// Which event a record repeats.
#[derive(PartialEq, Eq, Hash)]
struct Same {
    uid: Option<String>,
    reason: &'static str,
    note: String,
}

impl Records {
    /// Writes the records until all recorders are gone.
    pub async fn write(mut self, writes: Arc<dyn ClusterWrites>) {
        let mut seen: HashMap<Same, (String, i32)> = HashMap::new();
        while let Some(record) = self.0.recv().await {
            let namespace = record.about.namespace.clone().unwrap_or_default();
            let same =
                Same { uid: record.about.uid.clone(), reason: record.reason, note: record.note.clone() };
            if let Some((name, count)) = seen.get_mut(&same) {
                *count += 1;
                let patch = json!({"count": count, "lastTimestamp": Time(clock::now_seconds())});
                match writes.patch_event(&namespace, name, patch).await {
                    Err(WriteError::NotFound { .. }) => {}
                    _ => continue,
                }
            }
            let event = event(record, namespace);
            if let Err(error) = writes.create_event(&event).await {
                tracing::debug!(%error, "cannot record an event");
                continue;
            }
            if seen.len() >= REMEMBERED {
                seen.clear();
            }
            // a pod is bound once: nothing would repeat that
            if same.reason == "FailedScheduling" {
                seen.insert(same, (event.metadata.name.unwrap_or_default(), 1));
            }
        }
    }
}

fn event(record: Record, namespace: String) -> Event {
    let (now, exact) = (Time(clock::now_seconds()), MicroTime(clock::now()));
    let name = record.about.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", sampan_world::random::u64())),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        involved_object: record.about,
        reason: Some(record.reason.to_string()),
        message: Some(record.note),
        action: Some(record.action.to_string()),
        type_: Some(record.kind.to_string()),
        source: Some(EventSource { component: Some(SCHEDULER_NAME.to_string()), host: None }),
        event_time: Some(exact),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        reporting_component: Some(SCHEDULER_NAME.to_string()),
        reporting_instance: Some(SCHEDULER_NAME.to_string()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_notes_are_cut_at_a_character() {
        let cut = truncated("ü".repeat(1000));
        assert!(cut.len() <= MAX_NOTE_BYTES && cut.ends_with("ü ..."));
        assert_eq!(truncated("short".into()), "short");
    }
}
