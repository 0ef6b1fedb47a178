//! The lab: a whole cluster on one Linux machine, minikube's and kind's job without Docker, and our own test bench.
//!
//! Every node is a network, mount, UTS, IPC and PID namespace whose PID 1 is a tiny reaping init; the agent is started
//! into it and can be stopped, killed and started again while the containers stay. Nodes hang on a bridge in a
//! namespace of its own (the hub) that leads nowhere outside. The API is reached at 127.0.0.1:PORT through a
//! forwarder process. What exists is written down in `lab.json` before it is made, so `down` finds it after a crash.
pub mod cluster;
pub mod enter;
pub mod forward;
pub mod init;
pub mod net;
pub mod process;
pub mod state;

pub use cluster::{Lab, Up};
pub use state::{LabState, NodeState};

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("lab {0} runs already; `sampan lab down --name {0}` ends it")]
    Exists(String),
    #[error("there is no lab {0}; `sampan lab ls` lists them")]
    NoLab(String),
    #[error("lab {lab} has no node {node}; it has {nodes}")]
    NoNode { lab: String, node: String, nodes: String },
    #[error("unknown architecture {0}: a node is amd64, arm64 or arm")]
    UnknownArchitecture(String),
    #[error("{0} programs do not run on this machine: {1}")]
    NoEmulation(String, String),
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{what}: {source}")]
    Os { what: String, source: std::io::Error },
    #[error("{what}: {message}")]
    Failed { what: String, message: String },
}

impl LabError {
    pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Os { what, source }
    }
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
    pub(crate) fn failed(what: impl Into<String>, message: impl ToString) -> Self {
        Self::Failed { what: what.into(), message: message.to_string() }
    }
}

/// Runs a hidden entry point when `args` (without the program's name) ask for one. They must run before any thread
/// exists, as they change namespaces.
pub fn hidden(args: &[String]) -> Option<i32> {
    let rest = args.get(1..).unwrap_or_default();
    let result = match args.first().map(String::as_str) {
        Some("lab-spawn") => init::spawn(rest),
        Some("lab-init") => init::run(rest),
        Some("lab-enter") => enter::run(rest),
        Some("lab-forward") => forward::run(rest),
        _ => return None,
    };
    Some(result.unwrap_or_else(|error| {
        eprintln!("sampan: {error}");
        1
    }))
}
