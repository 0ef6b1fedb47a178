//! The one watch of etcd that everything else follows.
//!
//! Upstream counterpart: the reflectors of k8s.io/apiserver/pkg/storage/cacher over `etcd3/watcher.go`.
//!
//! It watches all keys, not only ours: so every revision comes with an event, and how far this watch is behind needs
//! no progress notifications, which etcd before 3.4.31 and 3.5.13 may send ahead of the events they speak of. (An etcd
//! that serves others too sends their changes along; nobody looks at them.) What stays true: each change is published
//! once, in order. A watch that breaks goes on at another member after the last revision it has published. Where that
//! cannot be (it was compacted meanwhile, etcd was restored from a backup) all watches of this store end, so that
//! their readers list again.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::grpc::CallError;
use super::messages::{
    RangeRequest, RangeResponse, ResponseHeader, WatchCreateRequest, WatchEvent, WatchRequest, WatchResponse,
};
use super::transaction::{OBJECT_PREFIX, entry, signed, unsigned};
use super::{Core, RANGE, compactor};
use crate::entry::{Event, EventKind};
use crate::memory::PLAIN_PREFIX;

const WATCH: &str = "/etcdserverpb.Watch/Watch";
/// A member has so long to answer that the watch begins.
const BEGIN: Duration = Duration::from_secs(5);
/// The pause after a watch that broke, doubled while none holds.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);

/// etcd's "from this key on".
const ALL: Bytes = Bytes::from_static(&[0]);

/// What one message of the watch brings.
#[derive(Debug, Default, PartialEq)]
struct Changes {
    events: Vec<Event>,
    /// The last revision in it.
    through: u64,
    /// What [`compactor::KEY`] says.
    compacted: u64,
    /// Two objects in one revision: others wrote them, and nobody here could tell the order.
    merged: bool,
}

/// How a watch ended.
enum End {
    Broken(CallError),
    /// What came after the last published revision can no longer be had.
    Gone,
}

impl From<CallError> for End {
    fn from(e: CallError) -> Self {
        End::Broken(e)
    }
}

pub(super) struct Feed {
    core: Arc<Core>,
    /// Published up to here.
    at: u64,
    cluster_id: u64,
    index: usize,
    /// Something came since the last failure.
    lively: bool,
}

impl Feed {
    /// Goes on after the state that `header` is of.
    pub(super) fn new(core: Arc<Core>, header: &ResponseHeader, index: usize) -> Self {
        let at = unsigned(header.revision);
        Self { core, at, cluster_id: header.cluster_id, index, lively: true }
    }

    /// Runs until it is aborted.
    pub(super) async fn run(mut self) {
        // also after a panic: whoever waits must learn that nothing comes any more
        let _ended = Ended(self.core.clone());
        let mut pause = PAUSE_MIN;
        loop {
            let (error, member) = match self.follow().await {
                End::Broken(error) => (error.to_string(), self.core.endpoints.name(self.index)),
                End::Gone => match self.begin_anew().await {
                    Ok(()) => continue,
                    Err(error) => (error.to_string(), self.core.endpoints.names()),
                },
            };
            if self.lively {
                tracing::warn!(member, error, "the watch of etcd broke; going on at the next member");
                pause = PAUSE_MIN;
            }
            self.lively = false;
            self.index += 1;
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Follows one member for as long as it goes.
    async fn follow(&mut self) -> End {
        match self.try_follow().await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn try_follow(&mut self) -> Result<End, End> {
        // the watch has a connection of its own: nothing else can hold it up
        let connection = self.core.endpoints.open(self.index).await?;
        let now: RangeResponse = connection.unary(RANGE, &probe(), BEGIN).await?;
        let now = now.header.unwrap_or_default();
        if now.cluster_id != self.cluster_id || unsigned(now.revision) < self.at {
            tracing::warn!(
                revision = now.revision,
                before = self.at,
                "etcd is not the one it was, or went back: was it restored from a backup?"
            );
            self.cluster_id = now.cluster_id;
            return Ok(End::Gone);
        }
        let create = WatchCreateRequest {
            key: ALL,
            range_end: ALL,
            start_revision: signed(self.at + 1),
            prev_kv: true,
        };
        let mut messages = connection.stream(WATCH, &WatchRequest { create: Some(create) }, BEGIN).await?;
        if !self.lively {
            tracing::info!(member = self.core.endpoints.name(self.index), "the watch of etcd goes on");
        }
        self.lively = true;
        loop {
            let message: WatchResponse = messages.next().await?;
            if message.canceled {
                if message.compact_revision > 0 {
                    return Ok(End::Gone);
                }
                let reason = format!("etcd ended it: {}", message.cancel_reason);
                return Ok(End::Broken(CallError::Unanswered(reason)));
            }
            self.publish(changes(message.events, self.at));
        }
    }

    fn publish(&mut self, changes: Changes) {
        if changes.through <= self.at {
            return;
        }
        self.at = changes.through;
        let wake = {
            let mut memory = self.core.memory.lock();
            memory.compacted = memory.compacted.max(changes.compacted);
            if changes.merged {
                memory.gap(self.at)
            } else {
                let events = changes.events.into_iter().map(|e| (e, false)).collect();
                let mut wake = memory.publish(events);
                wake.extend(memory.advance(self.at));
                wake
            }
        };
        for watcher in wake {
            watcher.notify_one();
        }
        self.core.published.send_replace(self.at);
    }

    /// Goes on with what is there now; what was before is listed, not followed.
    async fn begin_anew(&mut self) -> Result<(), CallError> {
        let now: RangeResponse = self.core.endpoints.read(RANGE, &probe()).await?;
        let revision = unsigned(now.header.unwrap_or_default().revision);
        tracing::warn!(
            after = self.at,
            revision,
            "etcd no longer has the changes that come next; all is listed anew"
        );
        self.at = revision;
        let wake = self.core.memory.lock().gap(revision);
        for watcher in wake {
            watcher.notify_one();
        }
        self.core.published.send_replace(revision);
        Ok(())
    }
}

/// Asks for nothing but the header; the answer is linearizable.
pub(super) fn probe() -> RangeRequest {
    let key = Bytes::from_static(PLAIN_PREFIX.as_bytes());
    RangeRequest { key, limit: 1, keys_only: true, ..RangeRequest::default() }
}

/// What of a message's events comes after `at`, in the store's words.
fn changes(events: Vec<WatchEvent>, at: u64) -> Changes {
    let mut changes = Changes { through: at, ..Changes::default() };
    let mut last_object = 0;
    for event in events {
        let Some(kv) = &event.kv else { continue };
        let revision = unsigned(kv.mod_revision);
        if revision <= at {
            continue;
        }
        changes.through = changes.through.max(revision);
        if kv.key == compactor::KEY {
            let said = std::str::from_utf8(&kv.value).ok().and_then(|v| v.parse().ok());
            changes.compacted = changes.compacted.max(said.unwrap_or(0));
        }
        let object = kv.key.starts_with(OBJECT_PREFIX.as_bytes());
        if !object && !kv.key.starts_with(PLAIN_PREFIX.as_bytes()) {
            continue;
        }
        let Some(now) = entry(kv) else { continue };
        if object {
            changes.merged |= last_object == revision;
            last_object = revision;
        }
        let prev = event.prev_kv.as_ref().and_then(entry);
        let (kind, create_revision) = match event.kind {
            0 => (EventKind::Put, now.create_revision),
            _ => (EventKind::Delete, prev.as_ref().map_or(0, |p| p.create_revision)),
        };
        changes.events.push(Event { kind, key: now.key, value: now.value, prev, revision, create_revision });
    }
    changes
}

struct Ended(Arc<Core>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.memory.lock().close();
    }
}

#[cfg(test)]
mod tests {
    use super::super::messages::KeyValue;
    use super::*;

    fn put(key: &'static str, value: &'static str, revision: i64) -> WatchEvent {
        let kv = KeyValue {
            key: key.into(),
            value: value.into(),
            mod_revision: revision,
            create_revision: 3,
            version: 1,
        };
        WatchEvent { kind: 0, kv: Some(kv), prev_kv: None }
    }

    fn deletion(key: &'static str, revision: i64) -> WatchEvent {
        let kv = KeyValue { key: key.into(), mod_revision: revision, ..KeyValue::default() };
        WatchEvent { kind: 1, kv: Some(kv), prev_kv: put(key, "old", 4).kv }
    }

    #[test]
    fn a_messages_changes() {
        let told = |events: Vec<WatchEvent>| {
            let changes = changes(events, 5);
            let shown: Vec<String> = changes
                .events
                .iter()
                .map(|e| format!("{:?} {} {}/{}", e.kind, e.key, e.revision, e.create_revision))
                .collect();
            (shown.join(", "), changes.through, changes.compacted, changes.merged)
        };
        for (events, want) in [
            (vec![], ("", 5, 0, false)),
            (vec![put("/registry/a", "1", 6)], ("Put /registry/a 6/3", 6, 0, false)),
            // what has been published is not published again
            (
                vec![put("/registry/a", "1", 5), put("/registry/b", "1", 6)],
                ("Put /registry/b 6/3", 6, 0, false),
            ),
            (vec![deletion("/registry/a", 7)], ("Delete /registry/a 7/3", 7, 0, false)),
            // others' keys only count
            (vec![put("/other", "1", 8), put("/registryx", "1", 9)], ("", 9, 0, false)),
            (vec![put("compact_rev_key", "4", 6)], ("", 6, 4, false)),
            (
                vec![put("/registry/a", "1", 6), put("/sampan/b", "1", 6), put("/sampan/c", "1", 6)],
                ("Put /registry/a 6/3, Put /sampan/b 6/3, Put /sampan/c 6/3", 6, 0, false),
            ),
            (
                vec![deletion("/registry/a", 6), deletion("/registry/b", 6)],
                ("Delete /registry/a 6/3, Delete /registry/b 6/3", 6, 0, true),
            ),
        ] {
            let (shown, through, compacted, merged) = told(events);
            assert_eq!((shown.as_str(), through, compacted, merged), want);
        }
    }
}
