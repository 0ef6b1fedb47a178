//! What a worker sets going: making the sandbox, starting and stopping a container.
//!
//! Upstream counterparts: kuberuntime_sandbox.go, kuberuntime_container.go (startContainer, killContainer).
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container as Spec, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, ResourceExt};
use sampan_drivers::network::HostPort;
use sampan_drivers::runtime::{Container, Image, Sandbox};
use sampan_volumes::PodVolumes;
use sampan_world::clock;
use tokio_util::sync::CancellationToken;

use super::inbox::{Done, Inbox};
use super::running::is_not_found;
use crate::container_config::{self, MESSAGE_PATH, MESSAGE_POLICY, Making};
use crate::hooks;
use crate::node_services::NodeServices;
use crate::pull::Waiting;
use crate::recorder::{Kind, NORMAL, WARNING, container_reference};

/// Upstream's least grace after a preStop hook used all of it.
const LEAST_GRACE_SECONDS: i64 = 2;
const MESSAGE_BYTES: u64 = 4096;
const LOG_MESSAGE_BYTES: u64 = 2048;
const LOG_MESSAGE_LINES: usize = 80;

/// A sandbox with its network, made anew or adopted.
pub async fn sandbox(
    node: &NodeServices,
    pod: &Pod,
    attempt: u32,
    adopted: Option<Sandbox>,
    old: Option<Sandbox>,
) -> Result<(Sandbox, Vec<IpAddr>), String> {
    let uid = pod.uid().unwrap_or_default();
    if let Some(old) = old {
        node.runtime.stop_sandbox(&old.id).await.map_err(|e| e.to_string())?;
        node.network.detach(&uid).await.map_err(|e| e.to_string())?;
    }
    let sandbox = match adopted {
        Some(sandbox) => sandbox,
        None => {
            check_runtime_class(node, pod).await?;
            let config = container_config::sandbox(pod, node, attempt)?;
            let id = node.runtime.run_sandbox(&config).await.map_err(|e| e.to_string())?;
            let all = node.runtime.list_sandboxes().await.map_err(|e| e.to_string())?;
            all.into_iter()
                .find(|s| s.id == id)
                .ok_or_else(|| format!("sandbox {id} is gone right after it was made"))?
        }
    };
    let Some(netns) = &sandbox.netns else { return Ok((sandbox, node.config.host_ips())) };
    match node.network.attach(&uid, netns, &host_ports(pod)).await {
        Ok(ips) => Ok((sandbox, ips)),
        Err(error) => {
            // the next try makes its own
            if let Err(error) = node.runtime.remove_sandbox(&sandbox.id).await {
                tracing::warn!(pod = uid, %error, "removing a sandbox without network");
            }
            Err(format!("failed to set up network for sandbox: {error}"))
        }
    }
}

async fn check_runtime_class(node: &NodeServices, pod: &Pod) -> Result<(), String> {
    let name = pod.spec.as_ref().and_then(|s| s.runtime_class_name.clone()).unwrap_or_default();
    if name.is_empty() {
        return Ok(());
    }
    let class = Api::<RuntimeClass>::all(node.client.clone()).get(&name).await;
    let class = class.map_err(|e| format!("failed to get RuntimeClass {name:?}: {e}"))?;
    match class.handler.as_str() {
        "runc" | "sampan" => Ok(()),
        handler => Err(format!("no runtime for {handler:?} is configured")),
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let spec = pod.spec.as_ref();
    let containers =
        spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    containers
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            Some(HostPort {
                host_ip: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
                host_port: u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?,
                container_port: u16::try_from(port.container_port).ok()?,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_string()),
            })
        })
        .collect()
}

/// One start of one container.
pub struct Start {
    pub node: Arc<NodeServices>,
    pub inbox: Arc<Inbox>,
    pub pod: Arc<Pod>,
    pub kind: Kind,
    pub spec: Spec,
    pub attempt: u32,
    pub image: Image,
    pub sandbox_id: String,
    pub ips: Vec<IpAddr>,
    pub volumes: PodVolumes,
    pub cancel: CancellationToken,
}

impl Start {
    fn record(&self, kind: &'static str, reason: &str, message: impl Into<String>) {
        let object = container_reference(&self.pod, self.kind, &self.spec.name);
        self.node.recorder.record(object, kind, reason, message);
    }

    pub async fn run(self) -> Done {
        let mut id = None;
        let result = self.start(&mut id).await;
        let container = match &id {
            Some(id) => self.node.runtime.container_status(id).await.ok(),
            None => None,
        };
        Done::Start { name: self.spec.name.clone(), result, container }
    }

    async fn start(&self, made: &mut Option<String>) -> Result<(), Waiting> {
        if self.cancel.is_cancelled() {
            return Err(Waiting::new("ContainerCreating", ""));
        }
        let fail = |reason: &str, message: String| {
            self.record(WARNING, "Failed", format!("Error: {message}"));
            Waiting::new(reason, message)
        };
        let making = Making {
            node: &self.node,
            pod: &self.pod,
            container: &self.spec,
            attempt: self.attempt,
            image: &self.image,
            ips: &self.ips,
            volumes: &self.volumes,
        };
        let config = making.config().await.map_err(|e| fail("CreateContainerConfigError", e))?;
        let runtime = &self.node.runtime;
        let id = runtime.create_container(&self.sandbox_id, &config).await;
        let id = id.map_err(|e| fail("CreateContainerError", e.to_string()))?;
        *made = Some(id.clone());
        self.record(NORMAL, "Created", "Container created");
        if let Err(error) = runtime.start_container(&id).await {
            let waiting = fail("RunContainerError", error.to_string());
            let is_exited = runtime.container_status(&id).await.is_ok_and(|c| crate::plan::is_exited(&c));
            if !is_exited {
                // one that never ran leaves no exit behind: the next try makes its own
                *made = None;
                if let Err(error) = runtime.remove_container(&id).await {
                    tracing::debug!(%error, "removing a container that did not start");
                }
            }
            return Err(waiting);
        }
        self.record(NORMAL, "Started", "Container started");
        if let Ok(container) = runtime.container_status(&id).await {
            self.inbox.done(Done::Running(container));
        }
        self.post_start(&id).await
    }

    async fn post_start(&self, id: &str) -> Result<(), Waiting> {
        let hook = self.spec.lifecycle.as_ref().and_then(|l| l.post_start.as_ref());
        let Some(hook) = hook else { return Ok(()) };
        let limit = Duration::from_secs(24 * 3600);
        let ip = self.ips.first().copied();
        let result = tokio::select! {
            result = hooks::run(&self.node, &self.spec, id, ip, hook, limit) => result,
            () = self.cancel.cancelled() => return Ok(()),
        };
        let Err(error) = result else { return Ok(()) };
        tracing::info!(pod = self.pod.name_any(), container = self.spec.name, error, "postStart hook failed");
        self.record(WARNING, "FailedPostStartHook", "PostStartHook failed");
        let stop = Stop {
            node: self.node.clone(),
            pod: self.pod.clone(),
            kind: self.kind,
            spec: self.spec.clone(),
            id: id.to_string(),
            ip,
            grace_seconds: self
                .pod
                .spec
                .as_ref()
                .and_then(|s| s.termination_grace_period_seconds)
                .unwrap_or(30),
            message: Some("FailedPostStartHook".to_string()),
        };
        stop.run().await;
        Err(Waiting::new("PostStartHookError", error))
    }
}

/// One stop of one container.
pub struct Stop {
    pub node: Arc<NodeServices>,
    pub pod: Arc<Pod>,
    pub kind: Kind,
    pub spec: Spec,
    pub id: String,
    pub ip: Option<IpAddr>,
    pub grace_seconds: i64,
    pub message: Option<String>,
}

impl Stop {
    pub async fn run(self) -> Done {
        let object = container_reference(&self.pod, self.kind, &self.spec.name);
        let message =
            self.message.clone().unwrap_or_else(|| format!("Stopping container {}", self.spec.name));
        self.node.recorder.record(object.clone(), NORMAL, "Killing", message);
        let mut grace = self.grace_seconds.max(0);
        let hook = self.spec.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()).filter(|_| grace > 0);
        if let Some(hook) = hook {
            let began = clock::monotonic();
            let limit = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
            let run = hooks::run(&self.node, &self.spec, &self.id, self.ip, hook, limit);
            let result = tokio::time::timeout(limit, run).await;
            if !matches!(result, Ok(Ok(()))) {
                tracing::info!(
                    pod = self.pod.name_any(),
                    container = self.spec.name,
                    ?result,
                    "preStop hook failed"
                );
                self.node.recorder.record(object, WARNING, "FailedPreStopHook", "PreStopHook failed");
            }
            let took = i64::try_from(began.elapsed().as_secs()).unwrap_or(0);
            grace = (grace - took).max(LEAST_GRACE_SECONDS);
        }
        match self.node.runtime.stop_container(&self.id, grace).await {
            Err(error) if !is_not_found(&error) => {
                self.node.recorder.pod(
                    &self.pod,
                    WARNING,
                    "FailedKillPod",
                    format!("error killing pod: {error}"),
                );
                // asked again at once it would only fail again
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            _ => {}
        }
        Done::Killed(self.id)
    }
}

/// What a container that ended has to say.
pub fn termination_message(node: &NodeServices, pod: &Pod, container: &Container) -> String {
    let uid = pod.uid().unwrap_or_default();
    let has_path = container.annotations.get(MESSAGE_PATH).is_some_and(|p| !p.is_empty());
    if has_path {
        let file =
            container_config::message_file(&node.volumes.pod_dir(&uid), &container.name, container.attempt);
        let text = tail(&file, MESSAGE_BYTES).unwrap_or_default();
        if !text.is_empty() {
            return text;
        }
    }
    let policy = container.annotations.get(MESSAGE_POLICY).map(String::as_str).unwrap_or_default();
    if policy == "FallbackToLogsOnError" && container.exit_code != 0 {
        let log = if container.log_path.is_absolute() {
            container.log_path.clone()
        } else {
            let dir = node.config.pod_log_dir(&pod.namespace().unwrap_or_default(), &pod.name_any(), &uid);
            dir.join(&container.log_path)
        };
        let text = log_tail(&tail(&log, 4 * LOG_MESSAGE_BYTES).unwrap_or_default());
        if !text.is_empty() {
            return text;
        }
    }
    container.message.clone()
}

/// The end of a file, whole characters only.
fn tail(path: &Path, limit_bytes: u64) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit_bytes)))?;
    let mut bytes = Vec::new();
    file.take(limit_bytes).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a log in CRI format, without stamps.
fn log_tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_MESSAGE_LINES);
    let mut out = String::new();
    for line in &lines[from..] {
        let mut parts = line.splitn(4, ' ');
        let (Some(_), Some("stdout" | "stderr"), Some(tag), Some(content)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        out.push_str(content);
        if tag != "P" {
            out.push('\n');
        }
    }
    let limit = usize::try_from(LOG_MESSAGE_BYTES).unwrap_or(usize::MAX);
    let start = (out.len().saturating_sub(limit)..=out.len()).find(|i| out.is_char_boundary(*i)).unwrap_or(0);
    out[start..].to_string()
}

#[cfg(test)]
mod tests {
    #[test]
    fn logs_lose_their_stamps() {
        let text = "2026 stdout F one\n2026 stderr P tw\n2026 stderr F o\n";
        assert_eq!(super::log_tail(text), "one\ntwo\n");
    }
}
