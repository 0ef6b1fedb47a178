//! What a lab consists of, on disk: `<root>/<name>/lab.json`.
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::LabError;
use crate::process::Process;

/// One node of a lab; the first is the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeState {
    pub name: String,
    /// Kubernetes' word: `amd64`, `arm64` or `arm`.
    pub arch: String,
    pub ip: String,
    pub init: Option<Process>,
    pub agent: Option<Process>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabState {
    pub name: String,
    pub nodes: Vec<NodeState>,
    pub hub: Option<Process>,
    pub registry: Option<Process>,
    pub forward: Option<Process>,
    pub api_port: u16,
    pub token: String,
    /// The lab starts no agents.
    #[serde(default)]
    pub bare: bool,
    /// What every server and agent of the lab gets besides.
    pub server_args: Vec<String>,
    pub agent_args: Vec<String>,
}

/// Where labs are kept: `SAMPAN_LAB_ROOT`, else `/var/lib/sampan-lab`.
pub fn root() -> PathBuf {
    std::env::var_os("SAMPAN_LAB_ROOT").map_or_else(|| PathBuf::from("/var/lib/sampan-lab"), PathBuf::from)
}

impl LabState {
    pub fn folder(&self) -> PathBuf {
        root().join(&self.name)
    }

    /// A node's own folder: `data`, `etc`, `var`, `tmp`, `agent.log`.
    pub fn node_folder(&self, node: &str) -> PathBuf {
        self.folder().join("nodes").join(node)
    }

    /// The cgroup below each hierarchy's root that holds all of the node.
    pub fn cgroup(&self, node: &str) -> String {
        format!("sampan-lab/{}/{node}", self.name)
    }

    pub fn node(&self, name: &str) -> Result<&NodeState, LabError> {
        self.nodes.iter().find(|n| n.name == name).ok_or_else(|| LabError::NoNode {
            lab: self.name.clone(),
            node: name.to_string(),
            nodes: self.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    pub fn load(name: &str) -> Result<Self, LabError> {
        let path = root().join(name).join("lab.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(LabError::NoLab(name.to_string()));
            }
            Err(e) => return Err(LabError::File { path, source: e }),
        };
        serde_json::from_slice(&text).map_err(|e| LabError::failed(path.display().to_string(), e))
    }

    pub fn save(&self) -> Result<(), LabError> {
        let path = self.folder().join("lab.json");
        let text = serde_json::to_vec_pretty(self).map_err(|e| LabError::failed("lab.json", e))?;
        sampan_world::files::write_atomic(&path, &text, 0o600).map_err(LabError::file(path))
    }

    /// The labs there are, running or not.
    pub fn all() -> Vec<String> {
        let Ok(entries) = fs::read_dir(root()) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|e| e.path().join("lab.json").exists())
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Creates a folder and all above it.
pub fn make_folder(path: &Path) -> Result<(), LabError> {
    fs::create_dir_all(path).map_err(LabError::file(path))
}
