//! Sandboxes: a folder, a control group, a shim.
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::process::Stdio;
use std::time::Duration;

use sampan_drivers::runtime::{NamespaceMode, RuntimeError, SandboxConfig};

use super::connection::ask;
use super::{Node, SandboxRecord, failed, io_failed, new_id, write_json};
use crate::spec::{Request, ShimSpec};

/// Making namespaces takes milliseconds; more than this and the machine is ill.
const SHIM_START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(60);

impl Node {
    pub(super) async fn make_sandbox(&self, config: &SandboxConfig) -> Result<String, RuntimeError> {
        let id = new_id();
        let made = self.make_sandbox_parts(&id, config).await;
        if made.is_err() {
            self.inner.state.lock().sandboxes.remove(&id);
            self.forget_folder(&self.sandbox_folder(&id));
        }
        made.map(|()| id)
    }

    async fn make_sandbox_parts(&self, id: &str, config: &SandboxConfig) -> Result<(), RuntimeError> {
        let folder = self.sandbox_folder(id);
        let making = |what: &str| io_failed(format!("making sandbox {id}: {what}"));
        fs::DirBuilder::new().mode(0o711).create(&folder).map_err(making("folder"))?;
        fs::create_dir(folder.join("containers")).map_err(making("folder"))?;
        fs::create_dir_all(&config.log_directory).map_err(making("log folder"))?;
        let (cgroups, shims) = (&self.inner.cgroups, "sampan-shims");
        cgroups.create(shims).map_err(making("cgroup"))?;
        cgroups.create(&config.cgroup_parent).map_err(making("cgroup"))?;
        cgroups.limit_pods(&config.cgroup_parent, &config.resources).map_err(making("cgroup"))?;
        let host_ipc = config.ipc == NamespaceMode::Node;
        let spec = ShimSpec {
            hostname: config.hostname.clone(),
            host_network: config.host_network,
            host_ipc,
            shared_pid: config.pid == NamespaceMode::Pod,
            sysctls: config.sysctls.clone().into_iter().collect(),
            cgroup_procs: cgroups.procs_files(shims),
            shm: (!host_ipc).then(|| folder.join("shm")),
        };
        write_json(&folder.join("shim.json"), &spec)?;
        let record = SandboxRecord {
            id: id.to_string(),
            config: config.clone(),
            created_at: sampan_world::clock::now(),
            shim_pid: None,
        };
        let log = fs::File::create(folder.join("shim.log")).map_err(making("shim.log"))?;
        let mut child = tokio::process::Command::new(&self.inner.options.shim_exe)
            .arg("shim")
            .arg(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(making("starting the shim"))?;
        let status = tokio::time::timeout(SHIM_START, child.wait()).await;
        let status = match status {
            Ok(status) => status.map_err(making("waiting for the shim"))?,
            Err(_) => {
                let _ = child.kill().await;
                return Err(failed(format!("making sandbox {id}: the shim did not start")));
            }
        };
        if !status.success() {
            let said = fs::read_to_string(folder.join("shim.log")).unwrap_or_default();
            return Err(failed(format!("making sandbox {id}: {}", said.trim())));
        }
        self.inner.state.lock().sandboxes.insert(id.to_string(), record.clone());
        let watched = self.watch_shim(id).await;
        // From here on a restarted agent knows it; before, it would be cleaned away with the folder.
        let written = watched.and(write_json(&folder.join("sandbox.json"), &record));
        if written.is_err() {
            let _ = ask(&folder, &Request::Stop).await;
        }
        written
    }

    pub(super) async fn end_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let Ok(record) = self.sandbox(id) else { return Ok(()) };
        if record.shim_pid.is_some() {
            let folder = self.sandbox_folder(id);
            let _ = ask(&folder, &Request::Stop).await;
            let gone = |s: &super::State| s.sandboxes.get(id).is_none_or(|s| s.shim_pid.is_none());
            if !self.wait_until(STOP, gone).await {
                return Err(failed(format!("sandbox {id}: its shim does not end")));
            }
        }
        Ok(())
    }

    pub(super) async fn delete_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let Ok(record) = self.sandbox(id) else { return Ok(()) };
        self.end_sandbox(id).await?;
        for container in self.containers_of(id) {
            self.delete_container(&container).await?;
        }
        // The record first: what is left of the folder is then rubbish.
        let folder = self.sandbox_folder(id);
        let _ = fs::remove_file(folder.join("sandbox.json"));
        self.forget_folder(&folder);
        let parent = record.config.cgroup_parent.clone();
        let shared = {
            let mut state = self.inner.state.lock();
            state.sandboxes.remove(id);
            state.sandboxes.values().any(|s| s.config.cgroup_parent == parent)
        };
        if !shared {
            let cgroups = self.inner.cgroups.clone();
            let _ = tokio::task::spawn_blocking(move || cgroups.remove(&parent)).await;
        }
        Ok(())
    }
}
