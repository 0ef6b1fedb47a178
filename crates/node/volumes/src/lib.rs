//! Volumes of pods: one plugin a file in [`plugins`], listed in order of asking in [`plugins::PLUGINS`].
//!
//! Upstream counterpart: pkg/volume and the part of pkg/kubelet/volumemanager that sets up. What stays true: setting
//! up is level-triggered (repeat it after any change of the pod or of an object that it names and only differences
//! are written), what containers see changes atomically, and nothing is ever deleted through a mount.
pub mod atomic_writer;
pub mod field_path;
pub mod mounts;
pub mod objects;
pub mod ownership;
pub mod plugins;
pub mod pod_volumes;
pub mod subpath;

pub use objects::{FetchError, ObjectWatches, PodObjects, Token};
pub use pod_volumes::{PodVolumes, VolumeHost};

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Volume};

/// Why a volume cannot be set up; the text goes into a `FailedMount` event.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("{0}")]
    Fetch(#[from] FetchError),
    #[error("references non-existent {kind} key: {key}")]
    MissingKey { kind: &'static str, key: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// This node has no plugin for such a volume.
    #[error("volumes of type {kind} are not supported by this node yet")]
    Unsupported { kind: String },
}

impl VolumeError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What one volume is set up from.
pub struct SetUp<'a> {
    pub host: &'a VolumeHost,
    pub pod: &'a Pod,
    pub volume: &'a Volume,
    /// The folder that is the plugin's own for this volume.
    pub dir: PathBuf,
}

impl SetUp<'_> {
    /// `spec.securityContext.fsGroup`.
    pub fn fs_group(&self) -> Option<i64> {
        self.pod.spec.as_ref()?.security_context.as_ref()?.fs_group
    }

    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or_default()
    }
}

/// A volume that is ready to be mounted into containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    pub host_path: PathBuf,
    /// Set up again after this time even where nothing changed (tokens).
    pub refresh_after: Option<Duration>,
}

impl Mounted {
    pub fn at(host_path: impl Into<PathBuf>) -> Self {
        Self { host_path: host_path.into(), refresh_after: None }
    }
}
