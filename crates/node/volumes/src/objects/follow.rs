//! One object's watch: listed once, then followed.
//!
//! Upstream counterpart: the reflector that watch_based_manager.go starts for each object. What stays true: a watch that
//! ends goes on where it was; what the server refuses is asked for again later and later, and said at debug level only,
//! since a node may lose the right to an object (its pod is deleted) before it hears of that itself.
use std::fmt::Debug;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::serde::de::DeserializeOwned;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use sampan_world::clock;

use super::{Held, Inner, Reference};

const BACK_OFF_FIRST: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// A watch that ends sooner than this is not begun again at once.
const WATCH_LEAST: Duration = Duration::from_secs(1);

pub(super) async fn follow(inner: Weak<Inner>, client: Client, reference: Reference) {
    let namespace = reference.namespace.clone();
    if reference.is_secret {
        let hold = |object| Held::Secret(Arc::new(object));
        follow_one::<Secret>(inner, Api::namespaced(client, &namespace), reference, hold).await;
    } else {
        let hold = |object| Held::ConfigMap(Arc::new(object));
        follow_one::<ConfigMap>(inner, Api::namespaced(client, &namespace), reference, hold).await;
    }
}

async fn follow_one<K>(inner: Weak<Inner>, api: Api<K>, reference: Reference, hold: fn(K) -> Held)
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + Send + DeserializeOwned + 'static,
{
    let tell = |object: Option<K>| {
        let now = object.map(|mut object| {
            object.meta_mut().managed_fields = None;
            hold(object)
        });
        inner.upgrade().map(|inner| inner.changed(&reference, now)).is_some()
    };
    let mut wait = BACK_OFF_FIRST;
    loop {
        let began = clock::monotonic();
        match list_and_watch(&api, &reference.name, &tell).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(name = reference.name, %error, "following an object, will retry"),
        }
        if began.elapsed() > BACK_OFF_MAX {
            wait = BACK_OFF_FIRST;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(BACK_OFF_MAX);
    }
}

/// Returns `Ok` once nobody listens any more.
async fn list_and_watch<K>(
    api: &Api<K>,
    name: &str,
    tell: &impl Fn(Option<K>) -> bool,
) -> Result<(), kube::Error>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + 'static,
{
    let fields = format!("metadata.name={name}");
    let listed = api.list(&ListParams::default().fields(&fields)).await?;
    let mut version = listed.metadata.resource_version.unwrap_or_default();
    if !tell(listed.items.into_iter().next()) {
        return Ok(());
    }
    let parameters = WatchParams::default().fields(&fields);
    loop {
        let began = clock::monotonic();
        let mut events = api.watch(&parameters, &version).await?.boxed();
        while let Some(event) = events.next().await {
            let now = match event? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => Some(object),
                WatchEvent::Deleted(object) => {
                    version = object.meta().resource_version.clone().unwrap_or(version);
                    if !tell(None) {
                        return Ok(());
                    }
                    continue;
                }
                WatchEvent::Bookmark(bookmark) => {
                    version = bookmark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
            };
            if let Some(seen) = now.as_ref().and_then(|o| o.meta().resource_version.clone()) {
                version = seen;
            }
            if !tell(now) {
                return Ok(());
            }
        }
        if began.elapsed() < WATCH_LEAST {
            tokio::time::sleep(WATCH_LEAST).await;
        }
    }
}
