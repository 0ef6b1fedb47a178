//! The agent's side of the runtime: the CRI's verbs over state folders and shims.
//!
//! Upstream counterpart: containerd's CRI plugin. State on disk: `sandboxes/<id>/{sandbox,shim}.json`, and below it
//! `containers/<id>/{container,spec,started,exit}.json` with `upper` and `work`. What stays true: memory only mirrors
//! those files; a folder without its `sandbox.json` or `container.json` was never made and is removed at the next start.
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use sampan_drivers::runtime::{
    Container, ContainerConfig, ContainerState, ImageError, Platform, PodEvent, RuntimeError, Sandbox,
    SandboxConfig, SandboxState,
};
use sampan_image::{Client, Mirror, Registries};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::cgroups::Cgroups;
use crate::images::Images;
use crate::spec::{Exit, Request, Started};

mod connection;
mod containers;
mod images;
mod runtime;
mod sandboxes;
mod streams;

/// Subscribers to [`PodEvent`]s, and how far one may lag; a lost event does no harm but delay.
const SUBSCRIBERS_MAX: usize = 8;
const EVENTS_MAX: usize = 256;

/// How a node's runtime is set up.
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// `<data>/agent`: state lies in `runtime/` below it, archives to import in `images/`.
    pub data_dir: PathBuf,
    /// For what need not survive a reboot; only made, not otherwise used as yet.
    pub run_dir: PathBuf,
    /// Where this node's control groups begin: `sampan`.
    pub cgroup_root: String,
    /// The architecture that this node declares; may be foreign to the machine, through binfmt.
    pub platform: Platform,
    pub registries: Registries,
    /// The program whose `shim` subcommand calls `shim_main`.
    pub shim_exe: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SandboxRecord {
    id: String,
    config: SandboxConfig,
    created_at: Timestamp,
    #[serde(skip)]
    shim_pid: Option<i32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ContainerRecord {
    id: String,
    sandbox_id: String,
    config: ContainerConfig,
    created_at: Timestamp,
    layers: Vec<String>,
    stop_signal: String,
    #[serde(skip)]
    started: Option<Started>,
    #[serde(skip)]
    exit: Option<Exit>,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, SandboxRecord>,
    containers: BTreeMap<String, ContainerRecord>,
    subscribers: Vec<mpsc::Sender<PodEvent>>,
}

/// The runtime of one node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    options: RuntimeOptions,
    cgroups: Cgroups,
    images: Arc<Images>,
    state: Mutex<State>,
    /// Counts changes, for those who wait for one.
    changed: watch::Sender<u64>,
}

fn failed(message: impl Into<String>) -> RuntimeError {
    RuntimeError::Failed { message: message.into() }
}

fn io_failed(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> RuntimeError {
    let doing = doing.into();
    move |e| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => RuntimeError::NoSpace { doing },
        _ => failed(format!("{doing}: {e}")),
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RuntimeError> {
    let bytes = serde_json::to_vec(value).map_err(|e| failed(e.to_string()))?;
    sampan_world::files::write_atomic(path, &bytes, 0o600)
        .map_err(io_failed(format!("writing {}", path.display())))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn timestamp(ns: i64) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(ns)).ok()
}

/// 64 hexadecimal digits, as containerd names things.
fn new_id() -> String {
    let mut bytes = [0; 32];
    sampan_world::random::fill(&mut bytes);
    sampan_image::manifest::hex_digest(&bytes).trim_start_matches("sha256:").to_string()
}

impl Node {
    /// Opens a node's state, imports archives and takes over the shims that live.
    pub async fn open(options: RuntimeOptions) -> Result<Node, RuntimeError> {
        Node::open_mirrored(options, None).await
    }

    /// The same, for a node that shares images with others: it asks them, and keeps for them what they may ask for.
    pub async fn open_mirrored(
        options: RuntimeOptions,
        mirror: Option<Arc<dyn Mirror>>,
    ) -> Result<Node, RuntimeError> {
        let folder = options.data_dir.join("runtime");
        for path in [folder.join("sandboxes"), options.data_dir.join("images"), options.run_dir.clone()] {
            fs::create_dir_all(&path).map_err(io_failed(format!("making {}", path.display())))?;
        }
        let client = Client::new(options.registries.clone()).with_mirror(mirror);
        let images = Images::open(&folder, client, options.platform.clone())?;
        let inner = Inner {
            cgroups: Cgroups::detect(&options.cgroup_root),
            images,
            state: Mutex::default(),
            changed: watch::channel(0).0,
            options,
        };
        let node = Node { inner: Arc::new(inner) };
        node.take_over().await;
        let importer = node.clone();
        let imported = tokio::task::spawn_blocking(move || {
            importer.inner.images.import_folder(&importer.inner.options.data_dir.join("images"));
            importer.inner.images.collect(&importer.used_layers());
        });
        imported.await.map_err(|e| failed(e.to_string()))?;
        Ok(node)
    }

    /// The platforms that an image really has, from this node or its registry.
    pub async fn platforms(
        &self,
        image: &str,
        auth: &[sampan_drivers::runtime::Auth],
    ) -> Result<Vec<Platform>, ImageError> {
        self.inner.images.platforms(image, auth).await
    }

    /// Imports an image archive; the ids of what it has for this node.
    pub async fn import(&self, archive: &Path) -> Result<Vec<String>, RuntimeError> {
        let (images, archive) = (self.inner.images.clone(), archive.to_path_buf());
        let imported = tokio::task::spawn_blocking(move || images.import(&archive)).await;
        imported.map_err(|e| failed(e.to_string()))?
    }

    fn sandbox_folder(&self, id: &str) -> PathBuf {
        self.inner.options.data_dir.join("runtime/sandboxes").join(id)
    }

    fn container_folder(&self, sandbox_id: &str, id: &str) -> PathBuf {
        self.sandbox_folder(sandbox_id).join("containers").join(id)
    }

    fn used_layers(&self) -> Vec<String> {
        self.inner.state.lock().containers.values().flat_map(|c| c.layers.clone()).collect()
    }

    /// Reads back what was there, and connects to the shims that still are.
    async fn take_over(&self) {
        let folder = self.inner.options.data_dir.join("runtime/sandboxes");
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let folder = entry.path();
            let Some(record) = read_json::<SandboxRecord>(&folder.join("sandbox.json")) else {
                self.forget_folder(&folder);
                continue;
            };
            let id = record.id.clone();
            for entry in fs::read_dir(folder.join("containers")).into_iter().flatten().flatten() {
                match read_json::<ContainerRecord>(&entry.path().join("container.json")) {
                    Some(mut container) => {
                        container.started = read_json(&entry.path().join("started.json"));
                        container.exit = read_json(&entry.path().join("exit.json"));
                        self.inner.state.lock().containers.insert(container.id.clone(), container);
                    }
                    None => {
                        let _ = fs::remove_dir_all(entry.path());
                    }
                }
            }
            self.inner.state.lock().sandboxes.insert(id.clone(), record);
            if self.watch_shim(&id).await.is_err() {
                self.shim_is_gone(&id).await;
            }
        }
    }

    fn forget_folder(&self, folder: &Path) {
        let _ = nix::mount::umount2(&folder.join("shm"), nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(folder);
    }

    /// Follows a shim's events until it is gone.
    async fn watch_shim(&self, id: &str) -> Result<(), RuntimeError> {
        let folder = self.sandbox_folder(id);
        let mut connection = connection::Connection::open(&folder, &Request::Watch, &[]).await?;
        connection.next().await?;
        let pid = fs::read_to_string(folder.join("shim.pid")).ok().and_then(|p| p.trim().parse().ok());
        if let Some(sandbox) = self.inner.state.lock().sandboxes.get_mut(id) {
            sandbox.shim_pid = pid;
        }
        // Whatever ended while nobody watched.
        let ids: Vec<String> = self.containers_of(id);
        ids.iter().for_each(|c| self.reread(id, c));
        let weak = Arc::downgrade(&self.inner);
        let id = id.to_string();
        tokio::spawn(async move {
            loop {
                let event = connection.next().await;
                let Some(inner) = weak.upgrade() else { return };
                let node = Node { inner };
                match event {
                    Ok((crate::spec::Reply::Event { id: container }, _)) => node.reread(&id, &container),
                    Ok(_) => {}
                    Err(_) => return node.shim_is_gone(&id).await,
                }
                node.announce(&id);
            }
        });
        Ok(())
    }

    fn containers_of(&self, sandbox_id: &str) -> Vec<String> {
        let state = self.inner.state.lock();
        state.containers.values().filter(|c| c.sandbox_id == sandbox_id).map(|c| c.id.clone()).collect()
    }

    /// Mirrors a container's files.
    fn reread(&self, sandbox_id: &str, id: &str) {
        let folder = self.container_folder(sandbox_id, id);
        let (started, exit) = (read_json(&folder.join("started.json")), read_json(&folder.join("exit.json")));
        if let Some(container) = self.inner.state.lock().containers.get_mut(id) {
            container.started = started.or(container.started.take());
            container.exit = exit.or(container.exit.take());
        }
    }

    /// The shim ended: what it held is dead or must die, and the sandbox is no longer ready.
    async fn shim_is_gone(&self, id: &str) {
        let Some(group) = self.inner.state.lock().sandboxes.get_mut(id).map(|s| {
            s.shim_pid = None;
            s.config.cgroup_parent.clone()
        }) else {
            return;
        };
        for container in self.containers_of(id) {
            self.reread(id, &container);
            let cgroups = self.inner.cgroups.clone();
            let group = format!("{}/{container}", group.trim_end_matches('/'));
            let _ = tokio::task::spawn_blocking(move || cgroups.kill(&group)).await;
            let mut state = self.inner.state.lock();
            let Some(record) = state.containers.get_mut(&container) else { continue };
            if record.started.is_some() && record.exit.is_none() {
                let exit = Exit {
                    code: 255,
                    at_ns: i64::try_from(sampan_world::clock::now().as_nanosecond()).unwrap_or(0),
                    reason: "Unknown".into(),
                    message: "the pod's shim ended unexpectedly".into(),
                };
                let _ = write_json(&self.container_folder(id, &container).join("exit.json"), &exit);
                record.exit = Some(exit);
            }
        }
        let _ = nix::mount::umount2(&self.sandbox_folder(id).join("shm"), nix::mount::MntFlags::MNT_DETACH);
        self.announce(id);
    }

    fn announce(&self, sandbox_id: &str) {
        let mut state = self.inner.state.lock();
        if let Some(pod_uid) = state.sandboxes.get(sandbox_id).map(|s| s.config.uid.clone()) {
            let event = PodEvent { pod_uid };
            state
                .subscribers
                .retain(|s| !matches!(s.try_send(event.clone()), Err(mpsc::error::TrySendError::Closed(_))));
        }
        drop(state);
        self.inner.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Waits until `done` says so; `false` when `limit` passes first.
    async fn wait_until(&self, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let mut changes = self.inner.changed.subscribe();
        let waiting = async {
            loop {
                changes.borrow_and_update();
                if done(&self.inner.state.lock()) {
                    return;
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(limit, waiting).await.is_ok()
    }

    fn sandbox(&self, id: &str) -> Result<SandboxRecord, RuntimeError> {
        let found = self.inner.state.lock().sandboxes.get(id).cloned();
        found.ok_or_else(|| RuntimeError::NotFound { what: format!("sandbox {id}") })
    }

    fn container(&self, id: &str) -> Result<ContainerRecord, RuntimeError> {
        let found = self.inner.state.lock().containers.get(id).cloned();
        found.ok_or_else(|| RuntimeError::NotFound { what: format!("container {id}") })
    }
}

impl SandboxRecord {
    fn describe(&self) -> Sandbox {
        let c = &self.config;
        Sandbox {
            id: self.id.clone(),
            namespace: c.namespace.clone(),
            name: c.name.clone(),
            uid: c.uid.clone(),
            attempt: c.attempt,
            state: if self.shim_pid.is_some() { SandboxState::Ready } else { SandboxState::NotReady },
            created_at: self.created_at,
            netns: self.shim_pid.filter(|_| !c.host_network).map(|pid| format!("/proc/{pid}/ns/net").into()),
            labels: c.labels.clone(),
            annotations: c.annotations.clone(),
        }
    }

    /// The container's own group, below the pod's.
    fn group(&self, container: &str) -> String {
        format!("{}/{container}", self.config.cgroup_parent.trim_end_matches('/'))
    }
}

impl ContainerRecord {
    fn state(&self) -> ContainerState {
        match (&self.started, &self.exit) {
            (_, Some(_)) => ContainerState::Exited,
            (Some(_), None) => ContainerState::Running,
            (None, None) => ContainerState::Created,
        }
    }

    fn describe(&self) -> Container {
        let exit = self.exit.clone().unwrap_or_default();
        let c = &self.config;
        let user = self
            .started
            .as_ref()
            .map(|s| (i64::from(s.uid), i64::from(s.gid), s.groups.iter().map(|g| i64::from(*g)).collect()));
        Container {
            id: self.id.clone(),
            sandbox_id: self.sandbox_id.clone(),
            name: c.name.clone(),
            attempt: c.attempt,
            image: c.image.clone(),
            image_id: c.image_id.clone(),
            state: self.state(),
            created_at: self.created_at,
            started_at: self.started.as_ref().and_then(|s| timestamp(s.at_ns)),
            finished_at: self.exit.as_ref().and_then(|e| timestamp(e.at_ns)),
            exit_code: exit.code,
            reason: exit.reason,
            message: exit.message,
            labels: c.labels.clone(),
            annotations: c.annotations.clone(),
            log_path: c.log_path.clone(),
            user,
        }
    }
}
