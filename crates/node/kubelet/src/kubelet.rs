//! The kubelet as a whole: workers for pods, and what others may ask of it.
//!
//! Upstream counterpart: pkg/kubelet/kubelet.go (Run, syncLoop, HandlePodCleanups).
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::{Client, ResourceExt};
use parking_lot::{Mutex, RwLock};
use sampan_client::{Event, Informer, Informers};
use sampan_drivers::runtime::{Container, Sandbox};
use sampan_drivers::{PodNetwork, Runtime};
use sampan_volumes::{ObjectWatches, VolumeHost};
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::config::KubeletConfig;
use crate::node_services::NodeServices;
use crate::recorder::{self, Recorded, Recorder, WARNING};
use crate::static_pods as manifests;
use crate::worker::{Inbox, Snapshot, Worker};
use crate::{container_config, last_known, local_storage, logs, node, pressure, qos_groups};

/// How long a start waits for the server before it goes on with the last known pods.
const SERVER_WAIT: Duration = Duration::from_secs(3);
const SAVE_DELAY: Duration = Duration::from_secs(1);
const WRITES: usize = 16;

struct Entry {
    namespace: String,
    name: String,
    is_static: bool,
    inbox: Arc<Inbox>,
    snapshot: Arc<RwLock<Snapshot>>,
}

/// What the runtime had when this agent started, until a worker takes it.
type Adopted = HashMap<String, (Vec<Sandbox>, Vec<Container>)>;

struct Inner {
    services: Arc<NodeServices>,
    pods: Informer<Pod>,
    workers: Mutex<HashMap<String, Entry>>,
    adopted: Mutex<Adopted>,
    statics: static_pods::Statics,
    storage: local_storage::Sampler,
    queue: Mutex<Option<mpsc::Receiver<Recorded>>>,
    changed: Notify,
}

/// A handle to the node's kubelet; clones are the same one.
#[derive(Clone)]
pub struct Kubelet(Arc<Inner>);

/// Why a pod or container cannot be named; the texts are upstream's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("pod {name:?} not found", name = format!("{namespace}/{name}"))]
    NoPod { namespace: String, name: String },
    #[error("container {container:?} in pod {pod:?} is not available")]
    NoContainer { pod: String, container: String },
    #[error("previous terminated container {container:?} in pod {pod:?} not found")]
    NoPrevious { pod: String, container: String },
    #[error("container {container:?} in pod {pod:?} is waiting to start: {reason}")]
    Waiting { pod: String, container: String, reason: String },
}

/// A container by its place in the runtime.
#[derive(Clone, Debug)]
pub struct ContainerRef {
    pub pod_uid: String,
    pub id: String,
    pub sandbox_id: String,
    pub is_running: bool,
    pub log_path: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
}

impl Kubelet {
    pub fn new(
        config: KubeletConfig,
        client: Client,
        informers: Informers,
        runtime: Arc<dyn Runtime>,
        network: Arc<dyn PodNetwork>,
    ) -> Self {
        let pods = informers.selected(&format!("spec.nodeName={}", config.node_name));
        let node = informers.selected(&format!("metadata.name={}", config.node_name));
        let services = informers.of::<Service>();
        let watches = ObjectWatches::new(client.clone()).with_last_known(config.root_dir.join("last-known"));
        Self::assemble(config, client, (pods, node, services), watches, runtime, network)
    }

    /// The same from informers that are there already.
    pub fn assemble(
        config: KubeletConfig,
        client: Client,
        (pods, node, services): (Informer<Pod>, Informer<Node>, Informer<Service>),
        watches: ObjectWatches,
        runtime: Arc<dyn Runtime>,
        network: Arc<dyn PodNetwork>,
    ) -> Self {
        let (recorder, queue) = Recorder::new(&config.node_name);
        let volumes = VolumeHost {
            root: config.root_dir.clone(),
            objects: Arc::new(watches.clone()),
            memory_backed: config.memory_backed_secrets,
            allocatable: RwLock::default(),
        };
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let services = NodeServices {
            pulls: Semaphore::new(config.parallel_pulls.max(1)),
            writes: Semaphore::new(WRITES),
            admitted: Mutex::default(),
            burstable_shares: Mutex::default(),
            burstable_order: Default::default(),
            watches: Some(watches),
            config,
            client,
            runtime,
            network,
            volumes,
            recorder,
            services,
            node,
            hostname,
        };
        *services.volumes.allocatable.write() = node::capacity(&services).1;
        Self(Arc::new(Inner {
            services: Arc::new(services),
            pods,
            workers: Mutex::default(),
            adopted: Mutex::default(),
            statics: Default::default(),
            storage: Default::default(),
            queue: Mutex::new(Some(queue)),
            changed: Notify::new(),
        }))
    }

    pub fn config(&self) -> &KubeletConfig {
        &self.0.services.config
    }

    pub fn runtime(&self) -> Arc<dyn Runtime> {
        self.0.services.runtime.clone()
    }

    pub fn client(&self) -> Client {
        self.0.services.client.clone()
    }

    /// The pods of this node with the statuses that this kubelet gave them.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.0.workers.lock().values().map(|e| e.snapshot.read().pod.clone()).collect()
    }

    fn snapshot(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<Snapshot, LookupError> {
        let workers = self.0.workers.lock();
        let mut found: Vec<Snapshot> = workers
            .iter()
            .filter(|(id, e)| e.namespace == namespace && e.name == name && uid.is_none_or(|u| u == *id))
            .map(|(_, e)| e.snapshot.read().clone())
            .collect();
        // a pod that ends may still be there beside its successor of the same name
        found.sort_by_key(|s| s.pod.metadata.creation_timestamp.clone());
        found.pop().ok_or_else(|| LookupError::NoPod { namespace: namespace.into(), name: name.into() })
    }

    pub fn pod(&self, namespace: &str, name: &str) -> Result<Arc<Pod>, LookupError> {
        self.snapshot(namespace, name, None).map(|s| s.pod)
    }

    /// The pod's sandbox, where it has one.
    pub fn sandbox_id(&self, namespace: &str, name: &str) -> Result<Option<String>, LookupError> {
        self.snapshot(namespace, name, None).map(|s| s.sandbox_id)
    }

    /// The newest container of that name, or the one before it.
    pub fn container(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
        container: &str,
        is_previous: bool,
    ) -> Result<ContainerRef, LookupError> {
        let snapshot = self.snapshot(namespace, name, uid)?;
        let (pod, container_name) = (name.to_string(), container.to_string());
        let spec = snapshot.pod.spec.clone().unwrap_or_default();
        let ephemeral: Vec<_> =
            spec.ephemeral_containers.iter().flatten().map(container_config::from_ephemeral).collect();
        let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten()).chain(&ephemeral);
        let Some(declared) = all.find(|c| c.name == container) else {
            return Err(LookupError::NoContainer { pod, container: container_name });
        };
        let record = if is_previous {
            let before = snapshot.records.previous(container);
            before.ok_or(LookupError::NoPrevious { pod, container: container_name })?
        } else {
            snapshot.records.newest(container).ok_or_else(|| {
                let reason = waiting_reason(&snapshot.pod, container);
                LookupError::Waiting { pod, container: container_name, reason }
            })?
        };
        let uid = snapshot.pod.uid().unwrap_or_default();
        let log_path = if record.log_path.is_absolute() {
            record.log_path.clone()
        } else {
            self.config().pod_log_dir(namespace, name, &uid).join(&record.log_path)
        };
        Ok(ContainerRef {
            pod_uid: uid,
            id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            is_running: crate::plan::is_running(record),
            log_path,
            stdin: declared.stdin.unwrap_or(false),
            stdin_once: declared.stdin_once.unwrap_or(false),
            tty: declared.tty.unwrap_or(false),
        })
    }

    /// Runs the node. Returns only when the process ends.
    pub async fn run(&self) {
        let inner = &self.0;
        if let Some(queue) = inner.queue.lock().take() {
            let (client, name) = (inner.services.client.clone(), inner.services.config.node_name.clone());
            tokio::spawn(recorder::run(client, name, queue));
        }
        if let Some(watches) = &inner.services.watches {
            let weak = Arc::downgrade(inner);
            watches.on_change(move |uid| {
                let inner = weak.upgrade();
                inner.iter().for_each(|i| i.with(uid, |inbox| inbox.refresh()));
            });
        }
        let mut events = inner.services.runtime.events();
        qos_groups::start(&inner.services).await;
        inner.adopt().await;
        // before anything is asked of the server, and before what belongs to no pod is cleaned away
        inner.read_static_pods();
        let keeper = self.clone();
        let keep = tokio::spawn(async move { keeper.0.keep_static_pods().await });
        let node = tokio::spawn(node::run(inner.services.clone(), {
            let weak = Arc::downgrade(inner);
            move || weak.upgrade().map(|i| i.sample()).unwrap_or_default()
        }));
        let starter = self.clone();
        let start = tokio::spawn(async move { starter.0.start().await });
        let saver = self.clone();
        let save = tokio::spawn(async move { saver.0.save().await });
        while let Some(event) = events.recv().await {
            inner.with(&event.pod_uid, |inbox| inbox.look());
        }
        tracing::warn!("the runtime tells no more events");
        let _ = tokio::join!(node, start, save, keep);
    }
}

fn waiting_reason(pod: &Pod, container: &str) -> String {
    let status = pod.status.as_ref();
    let lists =
        status.map(|s| [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses]);
    let mut all = lists.into_iter().flatten().flatten().flatten();
    let found =
        all.find(|s| s.name == container).and_then(|s| s.state.as_ref()?.waiting.as_ref()?.reason.clone());
    match found.as_deref() {
        Some("ErrImagePull") => "image can't be pulled".to_string(),
        Some("ImagePullBackOff") => "trying and failing to pull image".to_string(),
        Some(reason) => reason.to_string(),
        None => "no logs yet".to_string(),
    }
}

impl Inner {
    fn with(&self, uid: &str, tell: impl FnOnce(&Inbox)) {
        if let Some(entry) = self.workers.lock().get(uid) {
            tell(&entry.inbox);
        }
    }

    /// Reads what runs already.
    async fn adopt(&self) {
        let mut adopted = Adopted::new();
        match self.services.runtime.list_sandboxes().await {
            Ok(sandboxes) => {
                sandboxes.into_iter().for_each(|s| adopted.entry(s.uid.clone()).or_default().0.push(s))
            }
            Err(error) => tracing::error!(%error, "listing sandboxes"),
        }
        let owners: HashMap<String, String> =
            adopted.values().flat_map(|(s, _)| s).map(|s| (s.id.clone(), s.uid.clone())).collect();
        match self.services.runtime.list_containers().await {
            Ok(containers) => {
                for container in containers {
                    let label = container.labels.get(container_config::POD_UID).cloned();
                    if let Some(uid) = label.or_else(|| owners.get(&container.sandbox_id).cloned()) {
                        adopted.entry(uid).or_default().1.push(container);
                    }
                }
            }
            Err(error) => tracing::error!(%error, "listing containers"),
        }
        *self.adopted.lock() = adopted;
    }

    /// Follows the pods; falls back to the last known ones where the server is away.
    async fn start(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        self.pods.on_event(move |event| {
            let Some(inner) = weak.upgrade() else { return };
            match event {
                Event::Deleted(pod) => {
                    inner.with(&pod.uid().unwrap_or_default(), |inbox| inbox.gone());
                    inner.statics.changed.notify_one();
                }
                event => {
                    if let Event::Updated { old, new } = event
                        && old.metadata.uid != new.metadata.uid
                    {
                        inner.with(&old.uid().unwrap_or_default(), |inbox| inbox.gone());
                    }
                    inner.update(event.object());
                }
            }
            inner.changed.notify_one();
        });
        self.statics.changed.notify_one();
        if tokio::time::timeout(SERVER_WAIT, self.pods.synced()).await.is_err() {
            let known = last_known::load(&self.services.config.root_dir);
            tracing::warn!(
                pods = known.len(),
                "the server does not answer: going on with the last known pods"
            );
            known.into_iter().for_each(|pod| self.update(&Arc::new(pod)));
            self.pods.synced().await;
        }
        self.statics.changed.notify_one();
        let current: BTreeSet<String> = self.pods.list().iter().filter_map(|p| p.uid()).collect();
        for (uid, entry) in self.workers.lock().iter() {
            if !entry.is_static && !current.contains(uid) {
                entry.inbox.gone();
            }
        }
        self.clean_orphans().await;
        self.changed.notify_one();
    }

    /// Hands the pod to its worker, which is made where there is none.
    fn update(self: &Arc<Self>, pod: &Arc<Pod>) {
        if manifests::is_mirror(pod) {
            return self.statics.changed.notify_one();
        }
        let uid = pod.uid().unwrap_or_default();
        let mut workers = self.workers.lock();
        if let Some(entry) = workers.get(&uid) {
            entry.inbox.pod(pod.clone());
            return;
        }
        let (sandboxes, containers) = self.adopted.lock().remove(&uid).unwrap_or_default();
        let worker = Worker::new(self.services.clone(), pod.clone(), sandboxes, containers);
        let entry = Entry {
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            is_static: manifests::is_static(pod),
            inbox: worker.inbox(),
            snapshot: worker.snapshot(),
        };
        workers.insert(uid.clone(), entry);
        drop(workers);
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            // its own task, so that a panic is counted as its end and leaves the node alive
            let ended = tokio::spawn(worker.run()).await;
            let Some(inner) = weak.upgrade() else { return };
            inner.workers.lock().remove(&uid);
            inner.changed.notify_one();
            inner.statics.changed.notify_one();
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(uid, "a pod's worker panicked; it is started anew");
                tokio::time::sleep(Duration::from_secs(1)).await;
                inner.adopt_one(&uid).await;
                let statics: Vec<_> = inner.statics.pods.lock().values().cloned().collect();
                let is_it = |p: &Arc<Pod>| p.uid().as_deref() == Some(uid.as_str());
                let pod = inner.pods.list().into_iter().chain(statics).find(is_it);
                pod.iter().for_each(|pod| inner.update(pod));
            }
        });
    }

    async fn adopt_one(&self, uid: &str) {
        let sandboxes = self.services.runtime.list_sandboxes().await.unwrap_or_default();
        let containers = self.services.runtime.list_containers().await.unwrap_or_default();
        let sandboxes = sandboxes.into_iter().filter(|s| s.uid == uid).collect();
        let is_ours = |c: &Container| c.labels.get(container_config::POD_UID).is_some_and(|u| u == uid);
        let containers = containers.into_iter().filter(is_ours).collect();
        self.adopted.lock().insert(uid.to_string(), (sandboxes, containers));
    }

    /// Removes what belongs to no pod of this node.
    async fn clean_orphans(&self) {
        let orphans: Adopted = std::mem::take(&mut *self.adopted.lock());
        for (uid, (sandboxes, containers)) in orphans {
            tracing::info!(uid, "cleaning up after a pod that is no longer there");
            for container in containers.iter().filter(|c| crate::plan::is_running(c)) {
                let grace =
                    container.annotations.get(container_config::GRACE_PERIOD).and_then(|g| g.parse().ok());
                if let Err(error) =
                    self.services.runtime.stop_container(&container.id, grace.unwrap_or(30)).await
                {
                    tracing::warn!(uid, %error, "stopping an orphan");
                }
            }
            for sandbox in sandboxes {
                let runtime = &self.services.runtime;
                let removed = match runtime.stop_sandbox(&sandbox.id).await {
                    Ok(()) => runtime.remove_sandbox(&sandbox.id).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = removed {
                    tracing::warn!(uid, %error, "removing an orphan");
                }
            }
        }
        let known: Vec<String> = self.workers.lock().keys().cloned().collect();
        for uid in self.services.volumes.pods_on_disk() {
            if !known.contains(&uid)
                && let Err(error) = self.services.volumes.tear_down(&uid).await
            {
                tracing::warn!(uid, %error, "removing an orphan's volumes");
            }
        }
        if let Err(error) = self.services.network.retain(&known).await {
            tracing::warn!(%error, "cleaning up the pod network");
        }
    }

    /// Writes the last known pods a moment after they changed.
    async fn save(&self) {
        let mut written = Vec::new();
        loop {
            self.changed.notified().await;
            tokio::time::sleep(SAVE_DELAY).await;
            if !self.pods.has_synced() {
                continue;
            }
            let content = last_known::content(&self.pods.list());
            if content != written {
                match last_known::save(&self.services.config.root_dir, &content) {
                    Ok(()) => written = content,
                    Err(error) => tracing::warn!(%error, "writing the last known pods"),
                }
            }
        }
    }

    /// Looks whether the node is short of something, and evicts one pod where it is.
    fn sample(self: &Arc<Self>) -> pressure::Pressure {
        let found = pressure::sample(&self.services.config);
        let inner = self.clone();
        tokio::spawn(async move {
            logs::rotate(&inner.services).await;
            pressure::collect_images(&inner.services).await;
            let all: Vec<Snapshot> =
                inner.workers.lock().values().map(|entry| entry.snapshot.read().clone()).collect();
            let pods = all.into_iter().filter(|s| local_storage::may_go(&s.pod)).collect();
            let evict = |uid: &str, eviction| inner.with(uid, |inbox| inbox.evict(eviction));
            inner.storage.sample(&inner.services, pods, evict).await;
        });
        let short = if found.memory { Some("memory") } else { found.disk.then_some("ephemeral-storage") };
        if let Some(resource) = short {
            let pods: Vec<Arc<Pod>> =
                self.workers.lock().values().map(|e| e.snapshot.read().pod.clone()).collect();
            if let Some(victim) = pressure::victim(&pods) {
                let eviction = pressure::eviction(resource);
                self.services.recorder.pod(&victim, WARNING, "Evicted", eviction.message.clone());
                self.with(&victim.uid().unwrap_or_default(), |inbox| inbox.evict(eviction));
            }
        }
        found
    }
}

mod static_pods;

#[cfg(test)]
mod fakes;
#[cfg(test)]
mod tests;
