//! One object, followed for as long as pods use it.
//!
//! Upstream counterpart: the reflector that watch_based_manager.go starts for each object. What the server refuses is no
//! news: a node may lose the right to an object (its pod is deleted) before it hears of that itself.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::serde::de::DeserializeOwned;
use kube::{Client, Resource};
use sampan_client::reflector::{self, Following, Sink, Source};

use super::{Held, Inner, Reference};

pub(super) fn follow(inner: Weak<Inner>, client: Client, reference: Reference) -> Following {
    let namespace = Some(reference.namespace.as_str());
    let path = match reference.is_secret {
        true => Secret::url_path(&(), namespace),
        false => ConfigMap::url_path(&(), namespace),
    };
    let fields = format!("metadata.name={}", reference.name);
    let source = Source { path, fields, may_be_refused: true, ..Source::default() };
    reflector::start(client, source, Arc::new(One { inner, reference, is_there: AtomicBool::default() }))
}

/// The collection of all objects of that name: one, or none.
struct One {
    inner: Weak<Inner>,
    reference: Reference,
    /// Whether it came since the objects began to come anew.
    is_there: AtomicBool,
}

impl One {
    fn tell(&self, now: Option<Held>) {
        if let Some(inner) = self.inner.upgrade() {
            inner.changed(&self.reference, now);
        }
    }
}

impl Sink for One {
    fn begin(&self) {
        self.is_there.store(false, Ordering::Relaxed);
    }

    fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        // what cannot be read is there all the same
        self.is_there.store(true, Ordering::Relaxed);
        let (held, revision) = match self.reference.is_secret {
            true => read(object, Held::Secret)?,
            false => read(object, Held::ConfigMap)?,
        };
        self.tell(Some(held));
        Ok(revision)
    }

    fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        self.tell(None);
        Ok(reflector::metadata(object)?.resource_version)
    }

    fn complete(&self) {
        if !self.is_there.load(Ordering::Relaxed) {
            self.tell(None);
        }
    }
}

fn read<K>(object: &str, hold: fn(Arc<K>) -> Held) -> Result<(Held, Option<String>), serde_json::Error>
where
    K: Resource + DeserializeOwned,
{
    let mut object: K = serde_json::from_str(object)?;
    object.meta_mut().managed_fields = None;
    let revision = object.meta().resource_version.clone();
    Ok((hold(Arc::new(object)), revision))
}

#[cfg(test)]
mod tests {
    use super::super::ObjectWatches;
    use super::*;
    use std::time::Duration;

    use k8s_openapi::api::core::v1::Pod;
    use kube::client::Body;
    use parking_lot::Mutex;
    use serde_json::json;

    fn event(kind: &str, revision: &str, metadata: serde_json::Value) -> String {
        let mut object = json!({"metadata": metadata, "data": {"at": revision}});
        object["metadata"]["resourceVersion"] = revision.into();
        json!({"type": kind, "object": object}).to_string() + "\n"
    }

    #[tokio::test(start_paused = true)]
    async fn an_object_comes_changes_and_goes() {
        let named = || json!({"name": "a", "namespace": "ns"});
        let end = |at| event("BOOKMARK", at, json!({"annotations": {"k8s.io/initial-events-end": "true"}}));
        let answers = [
            (403_u16, json!({"code": 403, "message": "not yet"}).to_string()),
            (200, end("2")),
            (200, event("ADDED", "3", named()) + &event("MODIFIED", "4", named())),
            (200, json!({"type": "ERROR", "object": {"code": 410}}).to_string() + "\n"),
            // gone while the watch was away
            (200, end("9")),
            (200, event("ADDED", "10", named()) + &event("DELETED", "11", named())),
        ];
        let asked = Arc::new(Mutex::new(Vec::new()));
        let record = asked.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let mut asked = record.lock();
            asked.push(request.uri().to_string());
            let down = || (500, String::new());
            let (code, text) = answers.get(asked.len() - 1).cloned().unwrap_or_else(down);
            let body = Body::from(text.into_bytes());
            async move { Ok::<_, std::io::Error>(http::Response::builder().status(code).body(body).unwrap()) }
        });
        let watches = ObjectWatches::new(Client::new(service, "default"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (record, of) = (seen.clone(), Arc::downgrade(&watches.0));
        watches.on_change(move |uid| {
            let watches = ObjectWatches(of.upgrade().unwrap());
            let now = match watches.seen(false, "ns", "a").unwrap() {
                Some(Held::ConfigMap(object)) => object.data.as_ref().unwrap()["at"].clone(),
                _ => "gone".to_string(),
            };
            record.lock().push(format!("{uid} {now}"));
        });
        let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "u", "namespace": "ns"}, "spec": {
            "containers": [], "volumes": [{"name": "v", "configMap": {"name": "a"}}]}}))
        .unwrap();
        watches.register(&pod);
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(*seen.lock(), ["u gone", "u 3", "u 4", "u gone", "u 10", "u gone"]);
        let first =
            "/api/v1/namespaces/ns/configmaps?watch=true&allowWatchBookmarks=true&sendInitialEvents=true";
        assert!(asked.lock()[0].starts_with(first) && asked.lock()[0].ends_with("metadata.name%3Da"));
        watches.unregister("u");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = asked.lock().len();
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(asked.lock().len(), before, "nobody uses it any more");
    }
}
