//! Deletes what lost its owners; makes foreground deletion and orphaning work. Upstream counterpart:
//! pkg/controller/garbagecollector.
//!
//! What stays true: nothing is deleted on the word of the graph, the object and its owners are read live first; every
//! write carries the UID it means. Deliberate differences: the graph keeps objects that have owners or are waiting to
//! be deleted, and of all others only the UID; new kinds are looked for when a CustomResourceDefinition or APIService
//! changes, not on a timer.
mod graph;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::{Api, Client, Resource};
use parking_lot::Mutex;
use sampan_client::WorkQueue;
use sampan_client::reflector::{self, Following, Sink, Source};
use serde_json::json;

use self::graph::{Graph, Node, Place, Task};
use crate::controller::{Controller, Descriptor, SyncError, SyncResult, run};
use crate::discovery::{self, Discovered};
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "garbage-collector-controller",
    service_account: "generic-garbage-collector",
    component: "garbage-collector-controller",
    build: |scope| run(GarbageCollector::new(&scope)),
};

pub const ORPHAN: &str = "orphan";
pub const FOREGROUND: &str = "foregroundDeletion";
/// How long the first lists of all kinds may take before work begins without them.
const FIRST_SYNC: Duration = Duration::from_secs(30);

struct GarbageCollector {
    client: Client,
    graph: Arc<Mutex<Graph>>,
    queue: WorkQueue<Task>,
    monitors: Mutex<HashMap<String, Following>>,
    /// By (group, kind).
    kinds: Mutex<BTreeMap<(String, String), Arc<Discovered>>>,
    synced: tokio::sync::watch::Sender<usize>,
}

/// Takes in one kind's objects, of which only the metadata is followed.
struct Monitor {
    kind: Arc<Discovered>,
    graph: Arc<Mutex<Graph>>,
    queue: WorkQueue<Task>,
    /// How many kinds have been listed.
    synced: tokio::sync::watch::Sender<usize>,
    has_synced: AtomicBool,
    /// The UIDs that came so far, while all objects come.
    listed: Mutex<Option<Vec<String>>>,
}

impl Monitor {
    fn enqueue(&self, tasks: Vec<Task>) {
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }

    fn changed(&self) {
        if matches!(self.kind.resource.plural.as_str(), "customresourcedefinitions" | "apiservices") {
            // a new kind is served a moment after its definition changed
            self.queue.add_after(Task::Discover, Duration::from_secs(1));
        }
    }
}

impl Sink for Monitor {
    fn begin(&self) {
        *self.listed.lock() = Some(Vec::new());
    }

    fn apply(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        let meta = reflector::metadata(object)?;
        let tasks = self.graph.lock().apply(node(&self.kind, &meta));
        self.enqueue(tasks);
        match self.listed.lock().as_mut() {
            Some(listed) => listed.extend(meta.uid),
            None => self.changed(),
        }
        Ok(meta.resource_version)
    }

    fn delete(&self, object: &str) -> Result<Option<String>, serde_json::Error> {
        let meta = reflector::metadata(object)?;
        let tasks = self.graph.lock().remove(meta.uid.as_deref().unwrap_or_default());
        self.enqueue(tasks);
        self.changed();
        Ok(meta.resource_version)
    }

    fn complete(&self) {
        let (listed, resource) = (self.listed.lock().take().unwrap_or_default(), &self.kind.resource);
        let tasks = self.graph.lock().retain(&resource.group, &resource.kind, listed);
        self.enqueue(tasks);
        if !self.has_synced.swap(true, Ordering::Relaxed) {
            self.synced.send_modify(|n| *n += 1);
        }
    }
}

/// An object's owners as they are now.
#[derive(Default)]
struct Owners {
    solid: usize,
    /// UIDs of owners that are gone.
    dangling: Vec<String>,
    /// UIDs of owners that wait for their dependents to go.
    waiting: Vec<String>,
}

impl GarbageCollector {
    fn new(scope: &Scope) -> Arc<Self> {
        Arc::new(Self {
            client: scope.client.clone(),
            graph: Arc::default(),
            queue: WorkQueue::new(),
            monitors: Mutex::default(),
            kinds: Mutex::default(),
            synced: tokio::sync::watch::channel(0).0,
        })
    }

    /// Starts a watch for each kind that has none, and ends those of kinds that are gone.
    async fn discover(&self) -> SyncResult {
        let found = discovery::all(&self.client).await?;
        let ignored = |d: &Discovered| {
            d.resource.plural == "events" && matches!(d.resource.group.as_str(), "" | "events.k8s.io")
        };
        let found: Vec<Arc<Discovered>> =
            found.into_iter().filter(|d| d.is_collectable() && !ignored(d)).map(Arc::new).collect();
        let id =
            |d: &Discovered| format!("{}/{}/{}", d.resource.group, d.resource.version, d.resource.plural);
        let kind = |d: &Arc<Discovered>| ((d.resource.group.clone(), d.resource.kind.clone()), d.clone());
        *self.kinds.lock() = found.iter().map(kind).collect();
        let mut monitors = self.monitors.lock();
        monitors.retain(|known, _| found.iter().any(|d| id(d) == *known));
        for discovered in found {
            monitors.entry(id(&discovered)).or_insert_with(|| self.monitor(discovered));
        }
        Ok(())
    }

    fn monitor(&self, kind: Arc<Discovered>) -> Following {
        let path = DynamicObject::url_path(&kind.resource, None);
        // a kind that goes away is refused until that is discovered
        let source = Source { path, metadata_only: true, may_be_refused: true, ..Source::default() };
        let monitor = Monitor {
            kind,
            graph: self.graph.clone(),
            queue: self.queue.clone(),
            synced: self.synced.clone(),
            has_synced: AtomicBool::default(),
            listed: Mutex::default(),
        };
        reflector::start(self.client.clone(), source, Arc::new(monitor))
    }

    fn kind_of(&self, group: &str, kind: &str) -> Option<Arc<Discovered>> {
        self.kinds.lock().get(&(group.to_string(), kind.to_string())).cloned()
    }

    fn api(&self, kind: &Discovered, namespace: &str) -> Api<DynamicObject> {
        match kind.namespaced && !namespace.is_empty() {
            true => Api::namespaced_with(self.client.clone(), namespace, &kind.resource),
            false => Api::all_with(self.client.clone(), &kind.resource),
        }
    }

    fn api_of(&self, place: &Place) -> Result<Api<DynamicObject>, SyncError> {
        let kind = self.kind_of(&place.group, &place.kind);
        let kind = kind
            .ok_or_else(|| SyncError::failed(format!("no kind {} in group {:?}", place.kind, place.group)))?;
        Ok(self.api(&kind, &place.namespace))
    }

    /// The object's metadata, when it still is the one of that UID.
    async fn live(&self, node: &Node) -> Result<Option<ObjectMeta>, SyncError> {
        let api = self.api_of(&node.place)?;
        let found = api.get_metadata_opt(&node.place.name).await?;
        Ok(found.map(|o| o.metadata).filter(|m| m.uid.as_deref() == Some(&*node.uid)))
    }

    fn forget(&self, uid: &str) {
        let tasks = self.graph.lock().remove(uid);
        tasks.into_iter().for_each(|t| self.queue.add(t));
    }

    /// Finds out which owners are there, live.
    async fn classify(&self, node: &Node, references: &[OwnerReference]) -> Result<Owners, SyncError> {
        let mut owners = Owners::default();
        for reference in references {
            let group = reference.api_version.split_once('/').map_or("", |(group, _)| group);
            let Some(kind) = self.kind_of(group, &reference.kind) else {
                return Err(SyncError::failed(format!(
                    "no kind {} in {}",
                    reference.kind, reference.api_version
                )));
            };
            if kind.namespaced && node.place.namespace.is_empty() {
                // a cluster-scoped object cannot have a namespaced owner: leave it alone
                owners.solid += 1;
                continue;
            }
            let api = self.api(&kind, &node.place.namespace);
            match api.get_metadata_opt(&reference.name).await? {
                Some(owner) if owner.metadata.uid.as_deref() == Some(reference.uid.as_str()) => {
                    match is_waiting(&owner.metadata) {
                        true => owners.waiting.push(reference.uid.clone()),
                        false => owners.solid += 1,
                    }
                }
                _ => owners.dangling.push(reference.uid.clone()),
            }
        }
        Ok(owners)
    }

    async fn attempt_to_delete(&self, uid: String) -> SyncResult {
        let Some(node) = self.graph.lock().get(&uid) else { return Ok(()) };
        if node.deleting && !node.foreground {
            return Ok(());
        }
        let Some(live) = self.live(&node).await? else {
            self.forget(&uid);
            return Ok(());
        };
        if live.deletion_timestamp.is_some() && has_finalizer(&live, FOREGROUND) {
            return self.continue_foreground(&node).await;
        }
        let references = live.owner_references.clone().unwrap_or_default();
        if references.is_empty() || live.deletion_timestamp.is_some() {
            return Ok(());
        }
        let owners = self.classify(&node, &references).await?;
        if owners.solid > 0 {
            let gone: Vec<&String> = owners.dangling.iter().chain(&owners.waiting).collect();
            return match gone.is_empty() {
                true => Ok(()),
                false => self.set_owners(&node, &live, |r| !gone.contains(&&r.uid)).await,
            };
        }
        let dependents = self.graph.lock().dependents(&uid);
        if !owners.waiting.is_empty() && !dependents.is_empty() {
            if dependents.iter().any(|d| d.foreground) {
                // a circle: neither may block the other
                self.unblock(&node, &live).await?;
            }
            return self.delete(&node, &live, PropagationPolicy::Foreground).await;
        }
        let policy = match () {
            () if has_finalizer(&live, ORPHAN) => PropagationPolicy::Orphan,
            () if has_finalizer(&live, FOREGROUND) => PropagationPolicy::Foreground,
            () => PropagationPolicy::Background,
        };
        self.delete(&node, &live, policy).await
    }

    /// An owner in foreground deletion goes when nothing blocks it any more.
    async fn continue_foreground(&self, node: &Node) -> SyncResult {
        let blocking: Vec<Node> = {
            let dependents = self.graph.lock().dependents(&node.uid);
            dependents.into_iter().filter(|d| d.blocks(&node.uid)).collect()
        };
        if blocking.is_empty() {
            return self.remove_finalizer(node, FOREGROUND).await;
        }
        for dependent in blocking.into_iter().filter(|d| !d.foreground) {
            self.queue.add(Task::Delete(dependent.uid.to_string()));
        }
        Ok(())
    }

    async fn delete(&self, node: &Node, live: &ObjectMeta, policy: PropagationPolicy) -> SyncResult {
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions {
                uid: Some(node.uid.to_string()),
                resource_version: live.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        api_error::found(self.api_of(&node.place)?.delete(&node.place.name, &params).await)?;
        Ok(())
    }

    /// Keeps only the owner references that `keep` chooses.
    async fn set_owners(
        &self,
        node: &Node,
        live: &ObjectMeta,
        keep: impl Fn(&OwnerReference) -> bool,
    ) -> SyncResult {
        let kept: Vec<&OwnerReference> = live.owner_references.iter().flatten().filter(|r| keep(r)).collect();
        self.patch(node, live, json!({"ownerReferences": (!kept.is_empty()).then_some(kept)})).await
    }

    async fn unblock(&self, node: &Node, live: &ObjectMeta) -> SyncResult {
        let mut owners = live.owner_references.clone().unwrap_or_default();
        owners.iter_mut().for_each(|o| o.block_owner_deletion = Some(false));
        self.patch(node, live, json!({"ownerReferences": owners})).await
    }

    async fn remove_finalizer(&self, node: &Node, finalizer: &str) -> SyncResult {
        let Some(live) = self.live(node).await? else {
            self.forget(&node.uid);
            return Ok(());
        };
        if !has_finalizer(&live, finalizer) {
            return Ok(());
        }
        let kept: Vec<&String> = live.finalizers.iter().flatten().filter(|f| *f != finalizer).collect();
        self.patch(node, &live, json!({"finalizers": (!kept.is_empty()).then_some(kept)})).await
    }

    /// A merge patch of the metadata of exactly the version that was read.
    async fn patch(&self, node: &Node, live: &ObjectMeta, mut metadata: serde_json::Value) -> SyncResult {
        metadata["uid"] = json!(live.uid);
        metadata["resourceVersion"] = json!(live.resource_version);
        let patch = Patch::Merge(json!({"metadata": metadata}));
        let api = self.api_of(&node.place)?;
        api_error::found(api.patch_metadata(&node.place.name, &PatchParams::default(), &patch).await)?;
        Ok(())
    }

    /// Takes an owner out of its dependents, then lets it go.
    async fn attempt_to_orphan(&self, uid: String) -> SyncResult {
        let Some(owner) = self.graph.lock().get(&uid) else { return Ok(()) };
        let dependents = self.graph.lock().dependents(&uid);
        for dependent in dependents {
            let Some(live) = self.live(&dependent).await? else { continue };
            if live.owner_references.iter().flatten().any(|r| r.uid == uid) {
                self.set_owners(&dependent, &live, |r| r.uid != uid).await?;
            }
        }
        self.remove_finalizer(&owner, ORPHAN).await
    }
}

fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|f| f == finalizer)
}

fn is_waiting(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some() && has_finalizer(meta, FOREGROUND)
}

fn node(kind: &Discovered, meta: &ObjectMeta) -> Node {
    let deleting = meta.deletion_timestamp.is_some();
    let owner = |r: &OwnerReference| (r.uid.as_str().into(), r.block_owner_deletion == Some(true));
    Node {
        uid: meta.uid.as_deref().unwrap_or_default().into(),
        place: Arc::new(Place {
            group: kind.resource.group.clone(),
            kind: kind.resource.kind.clone(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        }),
        owners: meta.owner_references.iter().flatten().map(owner).collect(),
        deleting,
        foreground: is_waiting(meta),
        orphan: deleting && has_finalizer(meta, ORPHAN),
    }
}

impl Controller for GarbageCollector {
    type Key = Task;
    const WORKERS: usize = 5;

    fn queue(&self) -> &WorkQueue<Task> {
        &self.queue
    }

    async fn synced(&self) {
        while let Err(error) = self.discover().await {
            tracing::debug!(%error, "discovery failed, will retry");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let all = self.monitors.lock().len();
        let mut synced = self.synced.subscribe();
        if tokio::time::timeout(FIRST_SYNC, synced.wait_for(|n| *n >= all)).await.is_err() {
            tracing::warn!("some kinds could not be listed; collecting garbage without them");
        }
    }

    fn all(&self) -> Vec<Task> {
        self.graph.lock().everything()
    }

    async fn sync(&self, task: Task) -> SyncResult {
        let result = match task {
            Task::Discover => self.discover().await,
            Task::Delete(uid) => self.attempt_to_delete(uid).await,
            Task::Orphan(uid) => self.attempt_to_orphan(uid).await,
        };
        match result {
            // an owner's kind may have appeared since
            Err(SyncError::Failed(why)) => {
                self.discover().await?;
                Err(SyncError::Failed(why))
            }
            other => other,
        }
    }
}
