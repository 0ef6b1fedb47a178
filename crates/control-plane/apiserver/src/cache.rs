//! Watch caches: each resource's present objects and recent changes, in memory.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/storage/cacher. What stays true: one watch of the store feeds every
//! cache in the order of revisions, so one number says how far all of them are, and a consistent read waits until
//! that number reaches the store's. A watcher has no queue of its own: it remembers a revision and reads the
//! resource's ring of changes from there; when the ring has moved past it the watcher is closed. Deliberately
//! different: a cache is made when its resource is first asked for.
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use sampan_store::{Batch, Event, Range, Store};
use tokio::sync::watch;

pub use object::{Change, ChangeType, EncodingKey, Object, Predicate};

use crate::status::{Result, Status};
use crate::storage::Storage;

pub mod object;

/// A ring keeps at most so many changes, …
const RING_CHANGES_MAX: usize = 4096;
/// … and about so many bytes beyond a minimum of changes.
const RING_BYTES_MAX: usize = 2 << 20;
const RING_CHANGES_MIN: usize = 128;
/// A consistent read waits so long for the cache to catch up.
const CATCH_UP: Duration = Duration::from_secs(10);
/// A read not older than a revision that isn't there yet waits so long (upstream: 3 s).
const FUTURE_REVISION: Duration = Duration::from_secs(3);

/// One resource's cache.
pub struct Cache {
    pub storage: Arc<Storage>,
    state: RwLock<State>,
    /// Bumped at each change and when the cache is closed; watchers wait on it.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Arc<str>, Arc<Object>>,
    ring: VecDeque<Arc<Change>>,
    ring_bytes: usize,
    /// The ring has every change after this revision.
    complete_after: u64,
    /// The revision of the last change, or of the first listing.
    revision: u64,
    /// Events that came while the first listing was under way.
    waiting: Option<Vec<Event>>,
    closed: bool,
}

/// Objects at a revision.
pub struct Snapshot {
    pub objects: Vec<Arc<Object>>,
    pub revision: u64,
}

/// What a watcher gets when it reads on.
pub enum Changes {
    Some(Vec<Arc<Change>>),
    /// The ring no longer has what comes next, or the cache was closed.
    Lost,
}

impl Cache {
    pub fn get(&self, key: &str) -> Option<Arc<Object>> {
        self.state.read().objects.get(key).cloned()
    }

    pub fn revision(&self) -> u64 {
        self.state.read().revision
    }

    /// The objects whose keys begin with `prefix`, from `from` on.
    fn range(&self, prefix: &str, from: Option<&str>, progress: u64) -> Snapshot {
        let state = self.state.read();
        let start = from.unwrap_or(prefix).max(prefix);
        let objects = state
            .objects
            .range::<str, _>((Bound::Included(start), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, object)| object.clone())
            .collect();
        Snapshot { objects, revision: state.revision.max(progress) }
    }

    /// Calls `visit` for each object of a namespace ("" for all) without copying the list.
    pub fn visit(&self, namespace: &str, mut visit: impl FnMut(&Object)) {
        let prefix = self.storage.namespace_prefix(namespace);
        let state = self.state.read();
        let range = state.objects.range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded));
        for (_, object) in range.take_while(|(key, _)| key.starts_with(&prefix)) {
            visit(object);
        }
    }

    /// Told of each change.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether a watch can begin after `revision`; the error says how old the oldest is.
    pub fn reaches_back_to(&self, revision: u64) -> Result<()> {
        let oldest = self.state.read().complete_after;
        if revision >= oldest {
            return Ok(());
        }
        Err(Status::expired(format!("too old resource version: {revision} ({oldest})")))
    }

    /// The changes after `revision`.
    pub fn changes_after(&self, revision: u64) -> Changes {
        let state = self.state.read();
        if state.closed || revision < state.complete_after {
            return Changes::Lost;
        }
        let at = state.ring.partition_point(|change| change.revision <= revision);
        Changes::Some(state.ring.range(at..).cloned().collect())
    }

    fn apply(&self, event: Event) {
        let mut state = self.state.write();
        match &mut state.waiting {
            Some(waiting) => waiting.push(event),
            None => self.apply_now(&mut state, event),
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    fn apply_now(&self, state: &mut State, event: Event) {
        if event.revision <= state.revision {
            return;
        }
        let before = state.objects.get(&event.key).cloned();
        let after = event
            .after()
            .map(|entry| Arc::new(Object::new(&self.storage, entry.key, entry.value, entry.mod_revision)));
        match &after {
            Some(object) => state.objects.insert(event.key.clone(), object.clone()),
            None => state.objects.remove(&event.key),
        };
        state.revision = event.revision;
        let change = Change::new(event.revision, after, before);
        state.ring_bytes += change.size_bytes();
        state.ring.push_back(Arc::new(change));
        while state.ring.len() > RING_CHANGES_MAX
            || (state.ring.len() > RING_CHANGES_MIN && state.ring_bytes > RING_BYTES_MAX)
        {
            let Some(oldest) = state.ring.pop_front() else { break };
            state.ring_bytes = state.ring_bytes.saturating_sub(oldest.size_bytes());
            state.complete_after = oldest.revision;
        }
    }

    fn filled(&self, objects: BTreeMap<Arc<str>, Arc<Object>>, revision: u64) {
        let mut state = self.state.write();
        state.objects = objects;
        state.revision = revision;
        state.complete_after = revision;
        for event in state.waiting.take().unwrap_or_default() {
            self.apply_now(&mut state, event);
        }
    }

    fn close(&self) {
        self.state.write().closed = true;
        self.changed.send_modify(|count| *count += 1);
    }
}

type Slot = Arc<tokio::sync::OnceCell<Arc<Cache>>>;

/// All caches, and the one watch that feeds them.
pub struct Caches {
    store: Store,
    slots: Mutex<HashMap<String, Slot>>,
    /// Caches that events go to, by the resource's prefix; they are here before their first listing.
    fed: RwLock<HashMap<String, Arc<Cache>>>,
    /// Every event up to this revision has been given to the caches.
    progress: watch::Sender<u64>,
}

impl Caches {
    /// Begins to watch the store.
    pub async fn start(store: Store) -> std::result::Result<Arc<Self>, sampan_store::StoreError> {
        let revision = store.revision();
        let caches = Arc::new(Self {
            store,
            slots: Mutex::default(),
            fed: RwLock::default(),
            progress: watch::Sender::new(revision),
        });
        tokio::spawn(pump(Arc::downgrade(&caches), caches.store.clone(), revision));
        Ok(caches)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn progress(&self) -> u64 {
        *self.progress.borrow()
    }

    /// The cache of a resource, made now if it isn't there.
    pub async fn cache(&self, storage: &Arc<Storage>) -> Result<Arc<Cache>> {
        let slot = self.slots.lock().entry(storage.prefix.clone()).or_default().clone();
        slot.get_or_try_init(|| self.fill(storage)).await.cloned()
    }

    /// The cache of a resource, if it has been asked for before.
    pub fn existing(&self, storage: &Storage) -> Option<Arc<Cache>> {
        self.slots.lock().get(&storage.prefix)?.get().cloned()
    }

    async fn fill(&self, storage: &Arc<Storage>) -> Result<Arc<Cache>> {
        let cache = Arc::new(Cache {
            storage: storage.clone(),
            state: RwLock::new(State { waiting: Some(Vec::new()), ..State::default() }),
            changed: watch::Sender::new(0),
        });
        self.fed.write().insert(storage.prefix.clone(), cache.clone());
        let listed = self.list_all(&cache).await;
        match listed {
            Ok((objects, revision)) => {
                cache.filled(objects, revision);
                Ok(cache)
            }
            Err(status) => {
                self.fed.write().remove(&storage.prefix);
                Err(status)
            }
        }
    }

    async fn list_all(&self, cache: &Cache) -> Result<(BTreeMap<Arc<str>, Arc<Object>>, u64)> {
        let mut objects = BTreeMap::new();
        let mut range = Range::prefix(&cache.storage.prefix).limit(500);
        loop {
            let page = self.store.range(range.clone()).await.map_err(store_failed)?;
            let last = page.entries.last().map(|entry| entry.key.clone());
            for entry in page.entries {
                let revision = entry.mod_revision;
                let object = Object::new(&cache.storage, entry.key.clone(), entry.value, revision);
                objects.insert(entry.key, Arc::new(object));
            }
            match last {
                Some(last) if page.more => range = range.start_after(&last).at(page.revision),
                _ => return Ok((objects, page.revision)),
            }
        }
    }

    /// Waits until the caches have seen all that was acknowledged before this call, by whichever server.
    pub async fn catch_up(&self) -> Result<()> {
        let revision = self.store.latest().await.map_err(store_failed)?;
        if self.progress() >= revision {
            return Ok(());
        }
        let mut progress = self.progress.subscribe();
        match tokio::time::timeout(CATCH_UP, progress.wait_for(|at| *at >= revision)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Status::timeout("the watch cache did not catch up with the store", 1)),
        }
    }

    /// Waits until the caches have seen `revision`.
    pub async fn reach(&self, revision: u64) -> Result<()> {
        let mut progress = self.progress.subscribe();
        let reached = tokio::time::timeout(FUTURE_REVISION, progress.wait_for(|at| *at >= revision)).await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Status::too_large_resource_version(revision, self.progress())),
        }
    }

    /// The objects under `prefix` as they are now.
    pub fn snapshot(&self, cache: &Cache, prefix: &str, from: Option<&str>) -> Snapshot {
        // Read before the objects: they may be newer than this, never older.
        let progress = self.progress();
        cache.range(prefix, from, progress)
    }

    fn give(&self, batch: Batch) {
        let fed = self.fed.read();
        for event in batch.events {
            if let Some(cache) = fed.get(resource_prefix(&event.key)) {
                cache.apply(event);
            }
        }
        drop(fed);
        self.progress.send_replace(batch.through);
    }

    /// Forgets every cache: after a gap in the store's events nothing cached can be trusted.
    fn reset(&self, revision: u64) {
        self.slots.lock().clear();
        for (_, cache) in self.fed.write().drain() {
            cache.close();
        }
        self.progress.send_replace(revision);
    }
}

/// `/registry/apps/deployments/` of a key below it.
fn resource_prefix(key: &str) -> &str {
    let end = key.match_indices('/').nth(3).map_or(key.len(), |(at, _)| at + 1);
    &key[..end]
}

/// Gives the store's events to the caches for as long as they are there.
async fn pump(caches: std::sync::Weak<Caches>, store: Store, mut revision: u64) {
    loop {
        if let Ok(mut events) = store.watch("", revision) {
            loop {
                match events.next_batch().await {
                    Ok(batch) => {
                        let Some(caches) = caches.upgrade() else { return };
                        caches.give(batch);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the store's watch ended; watch caches are made anew");
                        break;
                    }
                }
            }
        }
        let Some(caches) = caches.upgrade() else { return };
        revision = store.revision();
        caches.reset(revision);
        drop(caches);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The store's errors as the client sees them.
pub fn store_failed(error: sampan_store::StoreError) -> Status {
    use sampan_store::StoreError;
    match error {
        StoreError::Compacted { .. } => {
            Status::expired("The resourceVersion for the provided list is too old.")
        }
        StoreError::FutureRevision { requested, current } => {
            Status::too_large_resource_version(requested, current)
        }
        StoreError::TooLarge { size_bytes, limit_bytes, .. } => {
            Status::too_large(format_args!("the object has {size_bytes} bytes, the limit is {limit_bytes}"))
        }
        StoreError::Full { .. } => Status::new(507, "InsufficientStorage", error.to_string()),
        StoreError::Busy { .. } | StoreError::Unreachable { .. } | StoreError::Closed => {
            Status::unavailable(error.to_string())
        }
        _ => Status::internal(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn caches_catch_up_with_what_is_no_object() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(sampan_store::Options::new(folder.path().join("state.db"))).unwrap();
        let caches = Caches::start(store.clone()).await.unwrap();
        let object = store.write(sampan_store::Write::create("/registry/core/pods/a/b", "{}")).await.unwrap();
        let plain = store.write(sampan_store::Write::create("/sampan/counter", "1")).await.unwrap();
        assert!(object < plain);
        tokio::time::timeout(Duration::from_secs(5), caches.catch_up()).await.unwrap().unwrap();
        assert_eq!(caches.progress(), plain);
    }

    #[test]
    fn a_keys_resource() {
        assert_eq!(resource_prefix("/registry/core/pods/a/b"), "/registry/core/pods/");
        assert_eq!(resource_prefix("/registry/core/nodes/a"), "/registry/core/nodes/");
    }
}
