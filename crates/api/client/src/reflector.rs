//! Follows one collection: its objects first, then every change, again and again from where it broke off.
//!
//! Upstream counterpart: client-go tools/cache/reflector.go, with WatchList: the objects come over the watch itself
//! (`sendInitialEvents`) and a bookmark says when all have. Works on text and knows no kinds: what is generic over a
//! kind is only how a [`Sink`] reads an object, so sixty informers share this code. What stays true: a watch goes on
//! from the last revision seen; only where that is gone (410) all objects come anew, between [`Sink::begin`] and
//! [`Sink::complete`].
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::task::AbortHandle;

/// Where the objects go.
pub trait Sink: Send + Sync {
    /// All objects come (again); what is not among them by [`Self::complete`] is gone.
    fn begin(&self);
    /// An object as it is now; returns its resourceVersion.
    fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error>;
    /// An object as it was last; returns the revision of its deletion.
    fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error>;
    fn complete(&self);
}

/// What is followed.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The collection, such as `/api/v1/pods`.
    pub path: String,
    /// "" or a field selector.
    pub fields: String,
    /// Only the objects' metadata is wanted.
    pub metadata_only: bool,
    /// The server may well refuse (the right to see it comes late, or the kind goes away): no word to the owner.
    pub may_be_refused: bool,
}

const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const FIRST_DELAY: Duration = Duration::from_millis(200);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// A server that cannot be reached is asked more often: what waits on this node should not wait long for its return.
const MAX_DELAY_UNREACHABLE: Duration = Duration::from_secs(4);
/// A watch that ends sooner counts as failed, so that a server in trouble isn't asked in a tight loop.
const SHORT: Duration = Duration::from_secs(1);
/// An object is at most 1.5 MiB in the store and never twice that in an answer.
const MAX_EVENT_BYTES: usize = 4 << 20;
/// So many failures in a row are worth a word to the owner.
const TOLD_AFTER: u32 = 8;

#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("{0}")]
    Client(#[from] kube::Error),
    #[error("{code} {message}")]
    Refused { code: u16, message: String },
    #[error("the stream broke: {0}")]
    Stream(String),
    #[error("an event is not what a watch sends: {0}")]
    Event(#[from] serde_json::Error),
    #[error("an event exceeds {MAX_EVENT_BYTES} bytes")]
    TooLarge,
}

impl WatchError {
    /// The revision to go on from is not kept any more, or not known.
    fn is_expired(&self) -> bool {
        matches!(self, Self::Refused { code: 410 | 504, .. })
    }
}

#[derive(Deserialize)]
struct WatchEvent<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Bookmark {
    metadata: BookmarkMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BookmarkMeta {
    resource_version: Option<String>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    code: u16,
    message: String,
}

/// The metadata of an object, for sinks that look at nothing else.
pub fn metadata(object: &str) -> Result<ObjectMeta, serde_json::Error> {
    #[derive(Deserialize)]
    struct Object {
        metadata: ObjectMeta,
    }
    Ok(serde_json::from_str::<Object>(object)?.metadata)
}

/// How far a collection has been followed.
#[derive(Default)]
struct Progress {
    /// Set once all objects have come.
    revision: Option<String>,
}

/// A collection that is followed until this is dropped.
#[must_use]
pub struct Following(AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows `source` into `sink` in a task of its own.
pub fn start(client: Client, source: Source, sink: Arc<dyn Sink>) -> Following {
    Following(tokio::spawn(async move { follow(&client, &source, &*sink).await }).abort_handle())
}

/// Follows `source` into `sink` for ever.
pub async fn follow(client: &Client, source: &Source, sink: &dyn Sink) {
    let mut progress = Progress::default();
    let (mut delay, mut failures) = (FIRST_DELAY, 0_u32);
    loop {
        let began = sampan_world::clock::monotonic();
        let before = progress.revision.clone();
        let outcome = watch(client, source, sink, &mut progress).await;
        let got_on = progress.revision != before;
        match &outcome {
            Ok(()) if got_on || began.elapsed() > SHORT => (delay, failures) = (FIRST_DELAY, 0),
            Ok(()) => failures += 1,
            Err(error) => {
                if error.is_expired() {
                    progress.revision = None;
                }
                failures = if got_on { 1 } else { failures + 1 };
                let path = &source.path;
                let is_expected = source.may_be_refused && matches!(error, WatchError::Refused { .. });
                match failures {
                    TOLD_AFTER if !is_expected => {
                        tracing::warn!("watching {path} fails again and again: {error}")
                    }
                    _ => tracing::debug!(%error, "watching {path} failed, will retry"),
                }
            }
        }
        if failures > 0 {
            let jitter = Duration::from_millis(sampan_world::random::below(delay.as_millis() as u64 / 2 + 1));
            tokio::time::sleep(delay + jitter).await;
            let is_unreachable = matches!(outcome, Err(WatchError::Client(_) | WatchError::Stream(_)));
            delay = (delay * 2).min(if is_unreachable { MAX_DELAY_UNREACHABLE } else { MAX_DELAY });
        }
    }
}

/// One watch, until it ends.
async fn watch(
    client: &Client,
    source: &Source,
    sink: &dyn Sink,
    progress: &mut Progress,
) -> Result<(), WatchError> {
    let mut request = Request::get(query(source, progress.revision.as_deref()));
    if source.metadata_only {
        request = request.header(header::ACCEPT, METADATA_ONLY);
    }
    let request = request.body(Body::empty()).map_err(|e| WatchError::Stream(e.to_string()))?;
    let response = client.send(request).await?;
    let code = response.status();
    let mut body = response.into_body();
    if code != StatusCode::OK {
        let text = read_some(&mut body).await;
        let status: Status = serde_json::from_slice(&text).unwrap_or_default();
        return Err(WatchError::Refused { code: code.as_u16(), message: status.message });
    }
    if progress.revision.is_none() {
        sink.begin();
    }
    let mut buffer = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| WatchError::Stream(e.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        // mostly a frame is one whole event: no need to copy it
        let mut rest: &[u8] = &data;
        if !buffer.is_empty() {
            buffer.extend_from_slice(rest);
            let whole = buffer.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            events(&buffer[..whole], sink, progress)?;
            buffer.advance(whole);
        } else {
            let whole = rest.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            events(&rest[..whole], sink, progress)?;
            rest = &rest[whole..];
            buffer.extend_from_slice(rest);
        }
        if buffer.is_empty() {
            buffer = BytesMut::new();
        } else if buffer.len() > MAX_EVENT_BYTES {
            return Err(WatchError::TooLarge);
        }
    }
    Ok(())
}

fn query(source: &Source, revision: Option<&str>) -> String {
    let mut query = format!("{}?watch=true&allowWatchBookmarks=true", source.path);
    match revision {
        Some(revision) => query.push_str(&format!("&resourceVersion={revision}")),
        None => query.push_str("&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"),
    }
    if !source.fields.is_empty() {
        // of what selectors hold only these need to be escaped
        let fields =
            source.fields.replace('%', "%25").replace('!', "%21").replace('=', "%3D").replace(',', "%2C");
        query.push_str(&format!("&fieldSelector={fields}"));
    }
    query
}

/// The beginning of an error's body.
async fn read_some(body: &mut Body) -> Vec<u8> {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            text.extend_from_slice(&data);
        }
        if text.len() > 64 << 10 {
            break;
        }
    }
    text
}

/// Whole lines, each an event.
fn events(lines: &[u8], sink: &dyn Sink, progress: &mut Progress) -> Result<(), WatchError> {
    for line in lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        let event: WatchEvent<'_> = serde_json::from_slice(line)?;
        let object = event.object.get();
        let revision = match event.kind {
            "ADDED" | "MODIFIED" => told(sink.apply(object), object),
            "DELETED" => told(sink.delete(object), object),
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(object)?;
                let annotations = &bookmark.metadata.annotations;
                if progress.revision.is_none()
                    && annotations.get("k8s.io/initial-events-end").is_some_and(|v| v == "true")
                {
                    sink.complete();
                    progress.revision.clone_from(&bookmark.metadata.resource_version);
                }
                bookmark.metadata.resource_version
            }
            "ERROR" => {
                let status: Status = serde_json::from_str(object)?;
                return Err(WatchError::Refused { code: status.code, message: status.message });
            }
            _ => None,
        };
        // until all objects have come, a broken watch begins anew
        if progress.revision.is_some() && revision.is_some() {
            progress.revision = revision;
        }
    }
    Ok(())
}

/// An object that cannot be read is left out, and said so: the others are no less true for it.
fn told(read: Result<Option<String>, serde_json::Error>, object: &str) -> Option<String> {
    read.unwrap_or_else(|error| {
        let start: String = object.chars().take(200).collect();
        tracing::warn!(%error, "an object cannot be read and is left out: {start}");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    use parking_lot::Mutex;
    use serde_json::json;

    #[derive(Default)]
    struct Seen(Mutex<Vec<String>>);

    impl Sink for Seen {
        fn begin(&self) {
            self.0.lock().push("begin".into());
        }
        fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
            let object: serde_json::Value = serde_json::from_str(object)?;
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if name == "bad" {
                return serde_json::from_str("{").map(Some);
            }
            self.0.lock().push(format!("+{name}"));
            Ok(object["metadata"]["resourceVersion"].as_str().map(str::to_string))
        }
        fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
            let object: serde_json::Value = serde_json::from_str(object)?;
            self.0.lock().push(format!("-{}", object["metadata"]["name"].as_str().unwrap_or_default()));
            Ok(object["metadata"]["resourceVersion"].as_str().map(str::to_string))
        }
        fn complete(&self) {
            self.0.lock().push("complete".into());
        }
    }

    fn event(kind: &str, name: &str, revision: &str) -> String {
        let object = json!({"metadata": {"name": name, "resourceVersion": revision}});
        json!({"type": kind, "object": object}).to_string() + "\n"
    }

    fn end(revision: &str) -> String {
        let annotations = json!({"k8s.io/initial-events-end": "true"});
        let meta = json!({"resourceVersion": revision, "annotations": annotations});
        json!({"type": "BOOKMARK", "object": {"metadata": meta}}).to_string() + "\n"
    }

    /// A server that answers each request with the next of `answers`, body in pieces of `piece` bytes.
    fn client(answers: VecDeque<(u16, String)>, asked: Arc<Mutex<Vec<String>>>, piece: usize) -> Client {
        let answers = Arc::new(Mutex::new(answers));
        let service = tower::service_fn(move |request: Request<Body>| {
            let (answers, asked) = (answers.clone(), asked.clone());
            async move {
                asked.lock().push(request.uri().query().unwrap_or_default().to_string());
                let next = answers.lock().pop_front();
                let Some((code, text)) = next else { return std::future::pending().await };
                let frames: Vec<_> = text
                    .as_bytes()
                    .chunks(piece)
                    .map(|c| {
                        Ok::<_, std::io::Error>(http_body::Frame::data(bytes::Bytes::copy_from_slice(c)))
                    })
                    .collect();
                let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
                Ok::<_, std::convert::Infallible>(http::Response::builder().status(code).body(body).unwrap())
            }
        });
        Client::new(service, "default")
    }

    #[tokio::test(start_paused = true)]
    async fn goes_on_where_it_broke_off() {
        let gone = json!({"type": "ERROR", "object": {"code": 410, "message": "too old"}}).to_string() + "\n";
        let answers = vec![
            (500, json!({"code": 500, "message": "no"}).to_string()),
            // breaks off before all have come: nothing to go on from
            (200, event("ADDED", "a", "1")),
            (
                200,
                event("ADDED", "a", "1")
                    + &event("ADDED", "bad", "1")
                    + &end("5")
                    + &event("MODIFIED", "a", "7"),
            ),
            (200, event("DELETED", "a", "9") + &gone),
            (200, event("ADDED", "b", "10") + &end("11")),
        ];
        for piece in [1, 64, 100_000] {
            let (seen, asked) = (Seen::default(), Arc::<Mutex<Vec<String>>>::default());
            let client = client(answers.clone().into(), Arc::clone(&asked), piece);
            let source = Source { path: "/api/v1/pods".into(), fields: "a=b".into(), ..Source::default() };
            let _ = tokio::time::timeout(Duration::from_secs(60), follow(&client, &source, &seen)).await;
            let told = seen.0.lock().join(" ");
            assert_eq!(told, "begin +a begin +a complete +a -a begin +b complete", "{piece}");
            let from = |query: &String| match query.split('&').nth(2) {
                Some("sendInitialEvents=true") => "all".to_string(),
                other => other.unwrap_or_default().trim_start_matches("resourceVersion=").to_string(),
            };
            let asked: Vec<String> = asked.lock().iter().map(from).collect();
            assert_eq!(asked, ["all", "all", "all", "7", "all", "11"]);
        }
    }
}
