//! [`Runtime`] for [`Node`]: each verb is one call into the file that does it.
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use sampan_drivers::Runtime;
use sampan_drivers::runtime::{
    Auth, Container, ContainerConfig, ContainerState, ContainerStats, ExecResult, Image, Platform, PodEvent,
    Resources, RuntimeError, Sandbox, SandboxConfig, Streams,
};
use sampan_drivers::tunnel::Stream;
use tokio::sync::mpsc;

use super::connection::ask;
use super::{EVENTS_MAX, Node, SUBSCRIBERS_MAX, failed, io_failed};
use crate::spec::Request;

/// A writable layer with more files than this is measured by these alone.
const FILES_MAX: usize = 100_000;

#[async_trait]
impl Runtime for Node {
    fn version(&self) -> String {
        concat!("sampan://", env!("CARGO_PKG_VERSION")).to_string()
    }

    fn platform(&self) -> Platform {
        self.inner.options.platform.clone()
    }

    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<String, RuntimeError> {
        self.make_sandbox(config).await
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        self.end_sandbox(id).await
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        self.delete_sandbox(id).await
    }

    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, RuntimeError> {
        Ok(self.inner.state.lock().sandboxes.values().map(|s| s.describe()).collect())
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: &ContainerConfig,
    ) -> Result<String, RuntimeError> {
        let (node, sandbox_id, config) = (self.clone(), sandbox_id.to_string(), config.clone());
        let made = tokio::task::spawn_blocking(move || node.make_container(&sandbox_id, &config)).await;
        made.map_err(|e| failed(e.to_string()))?
    }

    async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        self.run_container(id).await
    }

    async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), RuntimeError> {
        self.end_container(id, grace_seconds).await
    }

    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        self.delete_container(id).await
    }

    async fn list_containers(&self) -> Result<Vec<Container>, RuntimeError> {
        Ok(self.inner.state.lock().containers.values().map(|c| c.describe()).collect())
    }

    async fn container_status(&self, id: &str) -> Result<Container, RuntimeError> {
        Ok(self.container(id)?.describe())
    }

    async fn reopen_container_log(&self, id: &str) -> Result<(), RuntimeError> {
        let record = self.container(id)?;
        ask(&self.sandbox_folder(&record.sandbox_id), &Request::Reopen { id: id.to_string() })
            .await
            .map(|_| ())
    }

    async fn update_container_resources(&self, id: &str, resources: &Resources) -> Result<(), RuntimeError> {
        let record = self.container(id)?;
        let group = self.sandbox(&record.sandbox_id)?.group(id);
        self.inner.cgroups.limit(&group, resources).map_err(io_failed("setting limits"))
    }

    async fn container_stats(&self) -> Result<Vec<ContainerStats>, RuntimeError> {
        let node = self.clone();
        let stats = tokio::task::spawn_blocking(move || {
            let running: Vec<(String, String)> = {
                let state = node.inner.state.lock();
                let running = state.containers.values().filter(|c| c.state() == ContainerState::Running);
                running.map(|c| (c.id.clone(), c.sandbox_id.clone())).collect()
            };
            let stat = |(id, sandbox_id): (String, String)| {
                let usage = node.inner.cgroups.usage(&node.sandbox(&sandbox_id).ok()?.group(&id));
                let upper = node.container_folder(&sandbox_id, &id).join("upper");
                Some(ContainerStats {
                    container_id: id,
                    cpu_usage_ns: usage.cpu_ns,
                    memory_working_set_bytes: usage.memory_working_set_bytes,
                    memory_rss_bytes: usage.memory_rss_bytes,
                    writable_layer_bytes: disk_bytes(&upper),
                })
            };
            running.into_iter().filter_map(stat).collect()
        });
        stats.await.map_err(|e| failed(e.to_string()))
    }

    async fn writable_layer_bytes(&self, id: &str) -> Result<u64, RuntimeError> {
        let record = self.container(id)?;
        let upper = self.container_folder(&record.sandbox_id, id).join("upper");
        tokio::task::spawn_blocking(move || disk_bytes(&upper)).await.map_err(|e| failed(e.to_string()))
    }

    async fn limit_group(&self, group: &str, resources: &Resources) -> Result<(), RuntimeError> {
        let cgroups = &self.inner.cgroups;
        cgroups.create(group).map_err(io_failed(format!("making cgroup {group}")))?;
        cgroups.limit_pods(group, resources).map_err(io_failed(format!("limiting cgroup {group}")))
    }

    async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
        limit_bytes: usize,
    ) -> Result<(Vec<u8>, Vec<u8>, i32), RuntimeError> {
        self.run_exec_sync(id, command, timeout, limit_bytes).await
    }

    async fn exec(&self, id: &str, command: &[String], streams: Streams) -> Result<ExecResult, RuntimeError> {
        self.run_exec(id, command, streams).await
    }

    async fn attach(&self, id: &str, streams: Streams) -> Result<(), RuntimeError> {
        self.run_attach(id, streams).await
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn Stream>, RuntimeError> {
        Ok(Box::new(self.connect_in(sandbox_id, port).await?))
    }

    async fn pull_image(&self, image: &str, auth: &[Auth]) -> Result<String, RuntimeError> {
        self.inner.images.pull(image, auth).await
    }

    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError> {
        let is_id = image.strip_prefix("sha256:").unwrap_or(image).bytes().all(|b| b.is_ascii_hexdigit());
        if let (false, Err(source)) = (is_id, sampan_image::Reference::parse(image)) {
            return Err(RuntimeError::Image { image: image.to_string(), source });
        }
        if let Some(found) = self.inner.images.find(image) {
            return Ok(Some(self.inner.images.describe(&found)));
        }
        match self.inner.images.foreign(image) {
            Some(source) => Err(RuntimeError::Image { image: image.to_string(), source }),
            None => Ok(None),
        }
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        let images = &self.inner.images;
        Ok(images.list().iter().map(|i| images.describe(i)).collect())
    }

    async fn remove_image(&self, image: &str) -> Result<(), RuntimeError> {
        self.inner.images.remove(image, &self.used_layers()).await
    }

    async fn image_fs_bytes(&self) -> Result<u64, RuntimeError> {
        let images: u64 = self.inner.images.list().iter().map(|i| i.unpacked_bytes).sum();
        let writable: u64 = self.container_stats().await?.iter().map(|s| s.writable_layer_bytes).sum();
        Ok(images + self.inner.images.kept_bytes() + writable)
    }

    fn events(&self) -> mpsc::Receiver<PodEvent> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        let mut state = self.inner.state.lock();
        state.subscribers.retain(|s| !s.is_closed());
        if state.subscribers.len() < SUBSCRIBERS_MAX {
            state.subscribers.push(sender);
        }
        receiver
    }
}

/// Bytes on disk below a folder.
fn disk_bytes(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let (mut folders, mut bytes, mut files) = (vec![folder.to_path_buf()], 0, 0);
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += metadata.blocks() * 512;
            files += 1;
            if files > FILES_MAX {
                return bytes;
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    bytes
}
