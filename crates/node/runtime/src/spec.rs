//! What agent and shim tell each other through files and the control socket.
//!
//! Upstream counterparts: the OCI runtime specification and containerd's task API, reduced to what the CRI needs.
//! The agent resolves everything but the user (names live in the container's own /etc/passwd), so that the shim's
//! child can go straight through it. All of it is written by this program for this program: unknown fields are
//! ignored and missing ones default, so that an agent can take over shims of an older release.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `sandboxes/<id>/shim.json`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ShimSpec {
    pub hostname: String,
    pub host_network: bool,
    pub host_ipc: bool,
    /// One PID namespace for all containers, held by a process of the shim.
    pub shared_pid: bool,
    pub sysctls: Vec<(String, String)>,
    /// `cgroup.procs` files that the shim puts itself into.
    pub cgroup_procs: Vec<PathBuf>,
    /// A tmpfs for the pod's /dev/shm is mounted here.
    pub shm: Option<PathBuf>,
}

/// `sandboxes/<id>/containers/<id>/spec.json`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    pub process: ProcessSpec,
    /// Where `layers` lie.
    pub layers_folder: PathBuf,
    /// Names of layer folders, topmost first.
    pub layers: Vec<String>,
    pub readonly_rootfs: bool,
    /// What is written becomes a layer: overlayfs may leave nothing there that only it understands.
    pub plain_upper: bool,
    pub mounts: Vec<MountSpec>,
    pub devices: Vec<DeviceSpec>,
    pub privileged: bool,
    pub masked_paths: bool,
    /// Made the container's /dev/shm.
    pub shm: PathBuf,
    pub pid: PidMode,
    /// On cgroup v2 a container sees its own group as the root.
    pub cgroup_namespace: bool,
    /// v1: (controller, folder of the container's group).
    pub cgroup_v1: Vec<(String, PathBuf)>,
    /// Files that show whether the kernel killed for memory: `memory.events` or `memory.oom_control`.
    pub oom_file: Option<PathBuf>,
    /// All groups' `cgroup.procs`: for killing what a container without a PID namespace of its own leaves.
    pub cgroup_procs: Vec<PathBuf>,
    pub log_path: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    #[default]
    Container,
    Pod,
    Node,
}

/// A process in a container: its first, or an exec.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessSpec {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub tty: bool,
    pub user: UserSpec,
    /// Bit n is capability n.
    pub capabilities: u64,
    pub no_new_privileges: bool,
    /// A compiled filter.
    pub seccomp: Option<PathBuf>,
    pub oom_score_adj: i32,
    pub cgroup_procs: Vec<PathBuf>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UserSpec {
    /// The image's `User`: `[name|uid][:group|gid]`.
    pub image: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub supplemental: Vec<u32>,
    /// Leaves the groups of the image's /etc/group out.
    pub strict: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountSpec {
    pub source: PathBuf,
    pub target: String,
    pub readonly: bool,
    pub recursive_readonly: bool,
    /// `private`, `slave` or `shared`
    pub propagation: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceSpec {
    pub source: PathBuf,
    pub target: String,
}

/// `started.json`, written by the shim once the program runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Started {
    pub pid: i32,
    pub at_ns: i64,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// `exit.json`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub at_ns: i64,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`
    pub reason: String,
    pub message: String,
}

/// One connection carries one request.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Answered by `Event`s from then on.
    Watch,
    Start {
        id: String,
    },
    Kill {
        id: String,
        signal: i32,
    },
    /// With standard input, output and error attached (not with a terminal). `Started`, then `Exited`.
    Exec {
        id: String,
        process: Box<ProcessSpec>,
        /// Kill it when the connection ends: a probe that ran out of time.
        kill_on_close: bool,
    },
    /// With the ends of pipes for output and error attached; the answer carries the way to standard input.
    Attach {
        id: String,
    },
    Reopen {
        id: String,
    },
    CloseStdin {
        id: String,
    },
    /// Kills everything; the shim ends.
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Ok,
    Started { pid: i32 },
    Exited { code: i32 },
    Event { id: String },
    Error { message: String },
}
