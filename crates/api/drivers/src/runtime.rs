//! The container runtime as the kubelet sees it. Upstream counterpart: the CRI (runtime.v1), whose nouns, states and
//! meaning these are; a remote CRI runtime fits behind the same trait.
use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::tunnel::Stream;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{what} not found")]
    NotFound { what: String },
    /// Shown in the container's waiting message with reason `RunContainerError` or `CreateContainerError`.
    #[error("{message}")]
    Failed { message: String },
    #[error("image {image}: {source}")]
    Image { image: String, source: ImageError },
    #[error("no space left on the node while {doing}")]
    NoSpace { doing: String },
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("couldn't parse image name: {0}")]
    InvalidName(String),
    #[error("not found in its registry: {0}")]
    NotFound(String),
    #[error("pull access denied: {0}")]
    Denied(String),
    #[error("registry unavailable: {0}")]
    Unavailable(String),
    #[error("no image for {wanted}; it is built for {available}")]
    NoPlatform { wanted: String, available: String },
    #[error("{0}")]
    Invalid(String),
}

/// A platform as images name it: `linux/arm/v7`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceMode {
    Pod,
    Container,
    Node,
}

/// What a sandbox is made from (`PodSandboxConfig`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxConfig {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub attempt: u32,
    pub hostname: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub log_directory: PathBuf,
    /// The content for /etc/resolv.conf is the kubelet's business: it mounts the file. These are kept for remote runtimes.
    pub dns_servers: Vec<String>,
    pub dns_searches: Vec<String>,
    pub dns_options: Vec<String>,
    pub host_network: bool,
    /// `Pod` for shareProcessNamespace, else `Container`; `Node` for hostPID.
    pub pid: NamespaceMode,
    pub ipc: NamespaceMode,
    pub sysctls: BTreeMap<String, String>,
    /// Relative to the kubelet's cgroup root: `kubepods/burstable/pod<uid>`.
    pub cgroup_parent: String,
    /// The limits of the pod's own group, `cgroup_parent`.
    #[serde(default)]
    pub resources: Resources,
    pub seccomp: Seccomp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SandboxState {
    Ready,
    NotReady,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sandbox {
    pub id: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub attempt: u32,
    pub state: SandboxState,
    pub created_at: Timestamp,
    /// Where the network namespace can be entered; `None` with the host's network.
    pub netns: Option<PathBuf>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    RuntimeDefault,
    Unconfined,
    /// A profile file in OCI JSON.
    Localhost(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    pub container_path: String,
    pub host_path: PathBuf,
    pub readonly: bool,
    pub recursive_readonly: bool,
    pub propagation: Propagation,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Device {
    pub container_path: String,
    pub host_path: PathBuf,
    pub permissions: String,
}

/// `LinuxContainerResources`; 0 means not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu_period_us: i64,
    pub cpu_quota_us: i64,
    pub cpu_shares: i64,
    pub memory_limit_bytes: i64,
    pub pids_limit: i64,
    pub oom_score_adj: i32,
}

/// `LinuxContainerSecurityContext`, resolved by the kubelet as far as the pod says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityContext {
    pub privileged: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    /// `None`: the image's user.
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    /// `Strict` ignores the image's /etc/group.
    pub supplemental_groups_strict: bool,
    pub readonly_rootfs: bool,
    pub no_new_privileges: bool,
    pub seccomp: Seccomp,
    pub masked_paths: bool,
}

/// What a container is made from (`ContainerConfig`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerConfig {
    pub name: String,
    pub attempt: u32,
    /// As [`Runtime::pull_image`] or [`Runtime::image_status`] returned it.
    pub image_id: String,
    /// As the pod names it.
    pub image: String,
    /// Replaces the image's entrypoint when not empty (and drops the image's cmd).
    pub command: Vec<String>,
    /// Replaces the image's cmd when not empty.
    pub args: Vec<String>,
    pub working_dir: Option<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Below the sandbox's log directory: `<container>/<attempt>.log`.
    pub log_path: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    pub resources: Resources,
    pub security: SecurityContext,
    /// SIGTERM, the image's, or the pod's `stopSignal`.
    pub stop_signal: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running,
    Exited,
    Unknown,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    pub attempt: u32,
    pub image: String,
    pub image_id: String,
    pub state: ContainerState,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `ContainerCannotRun`, `StartError`.
    pub reason: String,
    pub message: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub log_path: PathBuf,
    /// The user the process was started as, for `status.containerStatuses[].user`.
    pub user: Option<(i64, i64, Vec<i64>)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// The config's digest, `sha256:…`.
    pub id: String,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    pub size_bytes: u64,
    /// The image's user, numeric when it is, for runAsNonRoot.
    pub user: String,
    pub platform: Platform,
    pub pinned: bool,
}

/// Credentials for one pull.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Auth {
    pub username: String,
    pub password: String,
    pub identity_token: String,
    pub registry_token: String,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerStats {
    pub container_id: String,
    pub cpu_usage_ns: u64,
    pub memory_working_set_bytes: u64,
    pub memory_rss_bytes: u64,
    pub writable_layer_bytes: u64,
}

/// Something happened in a pod: the kubelet looks again. Lost events do no harm but delay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvent {
    pub pod_uid: String,
}

/// How an exec ended: an exit code, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecResult {
    Exited(i32),
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// The ends of an exec or attach. Dropping `resize` or ending a stream is how a client goes away.
pub struct Streams {
    pub stdin: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>,
    pub stdout: Option<Box<dyn tokio::io::AsyncWrite + Send + Unpin>>,
    /// Never set together with a terminal.
    pub stderr: Option<Box<dyn tokio::io::AsyncWrite + Send + Unpin>>,
    pub tty: bool,
    pub resize: Option<mpsc::Receiver<TerminalSize>>,
}

#[async_trait]
pub trait Runtime: Send + Sync {
    /// For `status.nodeInfo.containerRuntimeVersion`: `sampan://0.1.0`.
    fn version(&self) -> String;
    fn platform(&self) -> Platform;

    /// Makes namespaces and cgroup; the network is attached afterwards by the caller.
    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<String, RuntimeError>;
    /// Kills what runs in it and lets its namespaces go. Safe to repeat.
    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError>;
    /// Removes the sandbox with all its containers. Safe to repeat.
    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError>;
    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, RuntimeError>;

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: &ContainerConfig,
    ) -> Result<String, RuntimeError>;
    async fn start_container(&self, id: &str) -> Result<(), RuntimeError>;
    /// Stop signal, then SIGKILL after `grace_seconds`; returns when it is gone.
    async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), RuntimeError>;
    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError>;
    async fn list_containers(&self) -> Result<Vec<Container>, RuntimeError>;
    async fn container_status(&self, id: &str) -> Result<Container, RuntimeError>;
    /// Starts the log file anew after the kubelet has renamed it.
    async fn reopen_container_log(&self, id: &str) -> Result<(), RuntimeError>;
    async fn update_container_resources(&self, id: &str, resources: &Resources) -> Result<(), RuntimeError>;
    async fn container_stats(&self) -> Result<Vec<ContainerStats>, RuntimeError>;
    /// Bytes on disk of one container's writable layer.
    async fn writable_layer_bytes(&self, id: &str) -> Result<u64, RuntimeError> {
        let all = self.container_stats().await?;
        let found = all.iter().find(|stats| stats.container_id == id).map(|stats| stats.writable_layer_bytes);
        found.ok_or_else(|| RuntimeError::NotFound { what: format!("container {id}") })
    }
    /// Sets the limits of a group of pods (`kubepods/burstable`), which is made where it is missing. A runtime that makes
    /// no groups leaves that out.
    async fn limit_group(&self, _group: &str, _resources: &Resources) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Runs a command and returns (stdout, stderr, exit code), each output cut at `limit_bytes`. For probes and hooks.
    async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: std::time::Duration,
        limit_bytes: usize,
    ) -> Result<(Vec<u8>, Vec<u8>, i32), RuntimeError>;
    async fn exec(&self, id: &str, command: &[String], streams: Streams) -> Result<ExecResult, RuntimeError>;
    async fn attach(&self, id: &str, streams: Streams) -> Result<(), RuntimeError>;
    /// Connects to a port on the pod's loopback.
    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn Stream>, RuntimeError>;

    /// The image's id.
    async fn pull_image(&self, image: &str, auth: &[Auth]) -> Result<String, RuntimeError>;
    /// `None` where it is not present.
    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError>;
    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError>;
    async fn remove_image(&self, image: &str) -> Result<(), RuntimeError>;
    /// Bytes used by images and containers on disk.
    async fn image_fs_bytes(&self) -> Result<u64, RuntimeError>;

    /// Changes of sandboxes and containers, from now on.
    fn events(&self) -> mpsc::Receiver<PodEvent>;
}
