//! Shared informers: one list and watch a kind and process, a map of what there is, and handlers that are called
//! on each change. Upstream counterpart: client-go tools/cache.
//!
//! Handlers run in the watch's own task: they must only look and enqueue (see [`crate::WorkQueue`]). Objects are kept
//! without `managedFields`. An informer is started when it is first asked for.
use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Client, Resource, ResourceExt};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::reflector::{self, Sink, Source};

/// What an informer can hold.
pub trait Object:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}
impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}

/// A change, as handlers see it. After a relist, changes missed in between arrive as the same three.
#[derive(Debug)]
pub enum Event<'a, K> {
    Added(&'a Arc<K>),
    Updated { old: &'a Arc<K>, new: &'a Arc<K> },
    Deleted(&'a Arc<K>),
}

impl<'a, K> Event<'a, K> {
    /// The object after the change, or the last one seen.
    pub fn object(&self) -> &'a Arc<K> {
        match self {
            Self::Added(o) | Self::Updated { new: o, .. } | Self::Deleted(o) => o,
        }
    }
}

/// (namespace, name); the namespace is "" for cluster-scoped kinds.
pub type Key = (String, String);

/// The key of `object`.
pub fn key<K: Resource>(object: &K) -> Key {
    (object.meta().namespace.clone().unwrap_or_default(), object.meta().name.clone().unwrap_or_default())
}

/// The owner reference with `controller: true`.
pub fn controller_of<K: Resource>(object: &K) -> Option<&OwnerReference> {
    object.meta().owner_references.as_ref()?.iter().find(|o| o.controller == Some(true))
}

type Handler<K> = Box<dyn Fn(&Event<'_, K>) + Send + Sync>;

struct Shared<K> {
    objects: RwLock<BTreeMap<Key, Arc<K>>>,
    /// Keys by the UID of their controller.
    owned: RwLock<HashMap<String, Vec<Key>>>,
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
    /// What a relist brought so far, to find what is gone when it is complete.
    listed: Mutex<Option<BTreeSet<Key>>>,
}

impl<K: Object> Sink for Shared<K> {
    fn begin(&self) {
        *self.listed.lock() = Some(BTreeSet::new());
    }

    fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        let object: K = serde_json::from_str(object)?;
        let revision = object.meta().resource_version.clone();
        if let Some(listed) = self.listed.lock().as_mut() {
            listed.insert(key(&object));
        }
        self.put(object);
        Ok(revision)
    }

    fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        let last: K = serde_json::from_str(object)?;
        let revision = last.meta().resource_version.clone();
        self.remove(&key(&last), Some(last));
        Ok(revision)
    }

    fn complete(&self) {
        if let Some(listed) = self.listed.lock().take() {
            let gone: Vec<Key> =
                self.objects.read().keys().filter(|k| !listed.contains(*k)).cloned().collect();
            gone.iter().for_each(|k| self.remove(k, None));
        }
        self.synced.send_replace(true);
    }
}

impl<K: Object> Shared<K> {
    fn put(&self, mut object: K) {
        object.managed_fields_mut().clear();
        let (key, new) = (key(&object), Arc::new(object));
        let handlers = self.handlers.lock();
        let old = self.objects.write().insert(key.clone(), new.clone());
        let owner = controller_of(&*new).map(|o| o.uid.clone());
        let old_owner = old.as_ref().and_then(|o| controller_of(&**o)).map(|o| o.uid.clone());
        if owner != old_owner {
            self.unindex(&key, old_owner);
            if let Some(uid) = owner {
                self.owned.write().entry(uid).or_default().push(key);
            }
        }
        match &old {
            Some(old) if old.meta().resource_version == new.meta().resource_version => {}
            Some(old) => handlers.iter().for_each(|h| h(&Event::Updated { old, new: &new })),
            None => handlers.iter().for_each(|h| h(&Event::Added(&new))),
        }
    }

    /// The handlers see the object's last state where it is known.
    fn remove(&self, key: &Key, last: Option<K>) {
        let handlers = self.handlers.lock();
        let Some(old) = self.objects.write().remove(key) else { return };
        self.unindex(key, controller_of(&*old).map(|o| o.uid.clone()));
        let last = last.map_or(old, Arc::new);
        handlers.iter().for_each(|h| h(&Event::Deleted(&last)));
    }

    fn unindex(&self, key: &Key, owner: Option<String>) {
        let Some(uid) = owner else { return };
        let mut owned = self.owned.write();
        if let Some(keys) = owned.get_mut(&uid) {
            keys.retain(|k| k != key);
            if keys.is_empty() {
                owned.remove(&uid);
            }
        }
    }
}

/// A handle to a shared informer.
pub struct Informer<K>(Arc<Shared<K>>);

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Object> Informer<K> {
    /// An informer over all objects that match a field selector ("": all), with its own task, ended with the runtime.
    pub fn start(client: Client, fields: &str) -> Self {
        let informer = Self::detached();
        let sink: Arc<dyn Sink> = informer.0.clone();
        let source = Source { path: K::url_path(&(), None), fields: fields.to_string(), ..Source::default() };
        tokio::spawn(async move { reflector::follow(&client, &source, &*sink).await });
        informer
    }

    /// An informer that follows nothing: tests fill it with [`Self::put`] and [`Self::remove`].
    pub fn detached() -> Self {
        Self(Arc::new(Shared {
            objects: RwLock::default(),
            owned: RwLock::default(),
            handlers: Mutex::default(),
            synced: watch::channel(false).0,
            listed: Mutex::default(),
        }))
    }

    /// Holds `object` and tells the handlers.
    pub fn put(&self, object: K) {
        self.0.put(object);
    }

    /// A detached one has all objects now.
    pub fn complete(&self) {
        self.0.synced.send_replace(true);
    }

    /// Drops the object of that key and tells the handlers.
    pub fn remove(&self, key: &Key) {
        self.0.remove(key, None);
    }

    /// Calls `handler` on every change; what is there already arrives as `Added` at once.
    pub fn on_event(&self, handler: impl Fn(&Event<'_, K>) + Send + Sync + 'static) {
        let mut handlers = self.0.handlers.lock();
        let present: Vec<Arc<K>> = self.0.objects.read().values().cloned().collect();
        present.iter().for_each(|o| handler(&Event::Added(o)));
        handlers.push(Box::new(handler));
    }

    /// Waits until the first list is complete.
    pub async fn synced(&self) {
        let _ = self.0.synced.subscribe().wait_for(|s| *s).await;
    }

    pub fn has_synced(&self) -> bool {
        *self.0.synced.borrow()
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.0.objects.read().get(&(namespace.to_string(), name.to_string())).cloned()
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.0.objects.read().values().cloned().collect()
    }

    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let objects = self.0.objects.read();
        let from = (namespace.to_string(), String::new());
        objects.range(from..).take_while(|((ns, _), _)| ns == namespace).map(|(_, o)| o.clone()).collect()
    }

    /// What the object of that UID controls.
    pub fn controlled_by(&self, uid: &str) -> Vec<Arc<K>> {
        let owned = self.0.owned.read();
        let objects = self.0.objects.read();
        owned.get(uid).into_iter().flatten().filter_map(|k| objects.get(k).cloned()).collect()
    }
}

/// Informers by the type of their objects and their field selector.
type Started = HashMap<(TypeId, String), Box<dyn Any + Send + Sync>>;

/// The process's shared informers.
#[derive(Clone)]
pub struct Informers {
    client: Client,
    started: Arc<Mutex<Started>>,
}

impl Informers {
    pub fn new(client: Client) -> Self {
        Self { client, started: Arc::default() }
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The informer of all objects of a kind.
    pub fn of<K: Object>(&self) -> Informer<K> {
        self.selected("")
    }

    /// The informer of the objects that match a field selector.
    pub fn selected<K: Object>(&self, fields: &str) -> Informer<K> {
        let mut started = self.started.lock();
        let informer = started
            .entry((TypeId::of::<K>(), fields.to_string()))
            .or_insert_with(|| Box::new(Informer::<K>::start(self.client.clone(), fields)));
        match informer.downcast_ref::<Informer<K>>() {
            Some(informer) => informer.clone(),
            // the key holds the type, so this does not happen; a detached one would only be silent
            None => Informer::detached(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn pod(name: &str, owner: Option<&str>, version: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.into());
        pod.metadata.namespace = Some("ns".into());
        pod.metadata.resource_version = Some(version.into());
        pod.metadata.owner_references = owner.map(|uid| {
            vec![OwnerReference { uid: uid.into(), controller: Some(true), ..OwnerReference::default() }]
        });
        pod
    }

    #[test]
    fn holds_indexes_and_tells() {
        let informer = Informer::<Pod>::detached();
        informer.put(pod("a", Some("u1"), "1"));
        let seen = Arc::new(AtomicUsize::new(0));
        let counter = seen.clone();
        informer.on_event(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(seen.load(Ordering::Relaxed), 1, "what is there arrives as added");
        informer.put(pod("a", Some("u2"), "2"));
        informer.put(pod("a", Some("u2"), "2"));
        assert_eq!(seen.load(Ordering::Relaxed), 2, "the same version is told once");
        assert!(informer.controlled_by("u1").is_empty());
        assert_eq!(informer.controlled_by("u2").len(), 1);
        assert_eq!(informer.list_in("ns").len(), 1);
        assert!(informer.list_in("n").is_empty());
        informer.remove(&("ns".into(), "a".into()));
        assert!(informer.controlled_by("u2").is_empty());
        assert_eq!(seen.load(Ordering::Relaxed), 3);
    }
}
