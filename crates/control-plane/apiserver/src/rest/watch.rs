//! WATCH: the present state where asked for, then every change.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/handlers/watch.go, …/storage/cacher/cache_watcher.go. What
//! stays true: a watcher holds a revision and nothing else; each change is encoded once for all who watch alike.
//! A start that is too old is an ERROR event in the stream, as upstream has it; a watcher that falls behind the ring
//! is closed and learns the same when it comes back.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::Response;
use sampan_world::random;
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tokio::time::Instant;

use crate::Server;
use crate::body::{self, Body};
use crate::cache::{Cache, Change, ChangeType, Changes, EncodingKey, Object, Predicate};
use crate::call::Call;
use crate::codec;
use crate::negotiate::{Format, Output};
use crate::registry::Resource;
use crate::reply;
use crate::resource_version::{self, Read, Start};
use crate::status::{Result, Status};
use crate::storage::splice;

/// Bookmarks come about this often (upstream: a minute).
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch that states no timeout lasts this long to twice as long.
const DEFAULT_TIMEOUT_S: u64 = 1800;
/// Events are sent in pieces of about this size.
const PIECE: usize = 64 << 10;
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

pub async fn serve(call: &Call) -> Result<Response<Body>> {
    let predicate = call.predicate()?;
    let start = resource_version::for_watch(&call.query)?;
    if call.output.format == Format::Yaml {
        let accepted = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];
        return Err(Status::not_acceptable(&accepted));
    }
    let seconds = match u64::try_from(call.query.integer("timeoutSeconds")?.unwrap_or(0)).unwrap_or(0) {
        0 => DEFAULT_TIMEOUT_S + random::below(DEFAULT_TIMEOUT_S),
        seconds => seconds,
    };
    let cache = call.cache().await?;
    let mut watcher = Watcher {
        changed: cache.subscribe(),
        server: call.server.clone(),
        resource: call.resource.clone(),
        // A watch's JSON is one line an event.
        output: Output { pretty: false, ..call.output },
        predicate,
        cache,
        after: 0,
        initial: VecDeque::new(),
        initial_end: None,
        headed: true,
        bookmarks: call.query.flag("allowWatchBookmarks"),
        next_bookmark: Instant::now() + BOOKMARK_EVERY,
        deadline: Instant::now() + Duration::from_secs(seconds),
        ended: false,
    };
    let failed = watcher.start(start).await?;
    let media_type = match call.output.format {
        Format::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        _ => "application/json",
    };
    let stream = futures::stream::unfold((watcher, failed), |(mut watcher, mut failed)| async move {
        let chunk = match failed.take() {
            Some(status) => {
                watcher.ended = true;
                Some(watcher.error(&status))
            }
            None => watcher.next().await,
        };
        chunk.map(|bytes| (bytes, (watcher, failed)))
    });
    Ok(reply::bytes(200, media_type, body::stream(stream)))
}

struct Watcher {
    server: Arc<Server>,
    resource: Arc<Resource>,
    output: Output,
    predicate: Predicate,
    cache: Arc<Cache>,
    changed: Receiver<u64>,
    /// Everything up to this revision has been sent.
    after: u64,
    initial: VecDeque<Arc<Object>>,
    /// The bookmark that ends the initial events is still to be sent, at this revision.
    initial_end: Option<u64>,
    /// The next table carries its column definitions.
    headed: bool,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    ended: bool,
}

impl Watcher {
    /// Finds where to begin. An error that belongs into the stream is returned as Some.
    async fn start(&mut self, start: Start) -> Result<Option<Status>> {
        let caches = self.server.caches.clone();
        match start {
            Start::After(revision) => {
                self.after = revision;
                return Ok(self.cache.reaches_back_to(revision).err());
            }
            Start::Now => {
                caches.catch_up().await?;
                self.after = caches.progress().max(self.cache.revision());
            }
            Start::State { not_older_than, bookmark } => {
                match not_older_than {
                    Read::Any => {}
                    Read::NotOlderThan(revision) => caches.reach(revision).await?,
                    _ => caches.catch_up().await?,
                }
                let prefix = self.resource.storage.namespace_prefix(&self.predicate.namespace);
                let snapshot = caches.snapshot(&self.cache, &prefix, None);
                self.after = snapshot.revision;
                self.initial = snapshot.objects.into();
                self.initial.retain(|object| self.predicate.matches(object));
                self.initial_end = bookmark.then_some(snapshot.revision);
            }
        }
        Ok(None)
    }

    /// The next piece of the stream; None ends it.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if !self.initial.is_empty() || self.initial_end.is_some() {
            return self.initial_piece();
        }
        loop {
            self.changed.mark_unchanged();
            // Read before the changes: whatever is at hand by then has been looked at.
            let progress = self.server.caches.progress();
            match self.cache.changes_after(self.after) {
                Changes::Lost => return None,
                Changes::Some(changes) => {
                    if let Some(piece) = self.piece(&changes) {
                        return Some(piece);
                    }
                }
            }
            self.after = self.after.max(progress);
            let wake = match self.bookmarks {
                true => self.next_bookmark.min(self.deadline),
                false => self.deadline,
            };
            tokio::select! {
                changed = self.changed.changed() => changed.ok()?,
                () = self.server.shutdown.cancelled() => return None,
                () = tokio::time::sleep_until(wake) => {
                    if wake == self.deadline {
                        return None;
                    }
                    self.next_bookmark = wake + BOOKMARK_EVERY;
                    let at = self.server.caches.progress();
                    if let Changes::Some(changes) = self.cache.changes_after(self.after) && changes.is_empty() {
                        self.after = self.after.max(at);
                        return self.bookmark(self.after, false).ok();
                    }
                }
            }
        }
    }

    fn initial_piece(&mut self) -> Option<Bytes> {
        let mut out = BytesMut::with_capacity(PIECE.min(4096 * (self.initial.len() + 1)));
        while out.len() < PIECE {
            let Some(object) = self.initial.pop_front() else { break };
            let frame = self.frame(ChangeType::Added, &object, object.revision, self.headed).ok()?;
            self.headed = false;
            out.extend_from_slice(&frame);
        }
        if self.initial.is_empty()
            && let Some(revision) = self.initial_end.take()
        {
            out.extend_from_slice(&self.bookmark(revision, true).ok()?);
        }
        Some(out.freeze())
    }

    /// What of these changes the watcher is to see; None if nothing.
    fn piece(&mut self, changes: &[Arc<Change>]) -> Option<Bytes> {
        let mut single: Option<Bytes> = None;
        let mut out = BytesMut::new();
        for change in changes {
            if out.len() >= PIECE {
                break;
            }
            self.after = change.revision;
            let Some((change_type, object)) = change.seen_by(&self.predicate) else { continue };
            let frame = if self.headed {
                self.frame(change_type, object, change.revision, true)
            } else {
                let key =
                    EncodingKey { resource: self.resource.id, output: self.output, change: change_type };
                change.encoding(key, || self.frame(change_type, object, change.revision, false))
            };
            self.headed = false;
            let Ok(frame) = frame else { continue };
            if let Some(first) = single.take() {
                out.extend_from_slice(&first);
            }
            match out.is_empty() {
                true => single = Some(frame),
                false => out.extend_from_slice(&frame),
            }
        }
        single.or_else(|| (!out.is_empty()).then(|| out.freeze()))
    }

    fn frame(&self, change: ChangeType, object: &Object, revision: u64, headed: bool) -> Result<Bytes> {
        if self.output == Output::JSON && self.resource.convert.is_none() {
            let api_version = self.resource.api_version();
            return Ok(body::build(object.bytes.len() + 160, |out| {
                out.extend_from_slice(b"{\"type\":\"");
                out.extend_from_slice(change.name().as_bytes());
                out.extend_from_slice(b"\",\"object\":");
                splice(out, Some((&api_version, &self.resource.kind)), revision, &object.bytes);
                out.extend_from_slice(b"}\n");
            }));
        }
        let encoded =
            reply::encode_object(&self.resource, self.output, &object.bytes, revision, &|_| {}, headed)?;
        Ok(self.wrap(change.name(), &encoded))
    }

    /// An event around an encoded object: a line of JSON, or a protobuf message behind its length.
    fn wrap(&self, event: &str, object: &[u8]) -> Bytes {
        body::build(object.len() + 64, |out| match self.output.format {
            Format::Protobuf => {
                let message = sampan_schema::proto::watch_event(event, object);
                out.put_u32(message.len() as u32);
                out.extend_from_slice(&message);
            }
            _ => {
                out.extend_from_slice(b"{\"type\":\"");
                out.extend_from_slice(event.as_bytes());
                out.extend_from_slice(b"\",\"object\":");
                out.extend_from_slice(object);
                out.extend_from_slice(b"}\n");
            }
        })
    }

    fn bookmark(&self, revision: u64, initial_end: bool) -> Result<Bytes> {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let object = json!({"kind": self.resource.kind, "apiVersion": self.resource.api_version(),
            "metadata": metadata});
        let encoded = reply::encode_value(&self.resource, self.output, object, self.headed)?;
        Ok(self.wrap("BOOKMARK", &encoded))
    }

    fn error(&self, status: &Status) -> Bytes {
        let body: Value = status.body();
        let encoded = match self.output.format {
            Format::Protobuf => codec::to_protobuf(codec::status_type(), &body).unwrap_or_default(),
            _ => body.to_string().into(),
        };
        self.wrap("ERROR", &encoded)
    }
}
