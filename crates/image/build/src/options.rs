//! What a build is asked for.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use sampan_image::{Platform, Reference};

use crate::dockerfile::Network;
use crate::error::BuildError;

#[derive(Clone, Debug)]
pub struct Options {
    /// The folder that COPY takes from.
    pub context: PathBuf,
    /// The Dockerfile's name, for messages, and its text.
    pub dockerfile_name: String,
    pub dockerfile: Vec<u8>,
    /// `.dockerignore`: its name and text, when there is one.
    pub ignore: Option<(String, String)>,
    /// In the order of the image's index.
    pub platforms: Vec<Platform>,
    pub build_args: BTreeMap<String, String>,
    pub target: Option<String>,
    /// Take no step from an earlier build.
    pub no_cache: bool,
    /// Ask registries even for what was built here.
    pub pull: bool,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub index_annotations: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, Vec<u8>>,
    pub network: Network,
    pub add_hosts: Vec<(String, IpAddr)>,
    /// The program whose `step` subcommand runs steps.
    pub exe: PathBuf,
    /// Control groups of steps begin here.
    pub cgroup_root: String,
}

/// Where a build ends early.
#[derive(Default)]
pub struct Cancel {
    asked: AtomicBool,
    child: Mutex<Option<u32>>,
}

impl Cancel {
    /// Kills the step that runs; the build fails at the next occasion.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(pid) = *self.child.lock() {
            kill(pid);
        }
    }

    pub(crate) fn check(&self) -> Result<(), BuildError> {
        match self.asked.load(Ordering::SeqCst) {
            true => Err(BuildError::Cancelled),
            false => Ok(()),
        }
    }

    /// The process to be killed; before it is waited for it is taken back.
    pub(crate) fn set_child(&self, pid: Option<u32>) {
        let mut child = self.child.lock();
        *child = pid;
        if let (Some(pid), true) = (pid, self.asked.load(Ordering::SeqCst)) {
            kill(pid);
        }
    }
}

fn kill(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
    }
}

/// Images that this machine's node has, for bases that no registry gives.
#[async_trait::async_trait]
pub trait LocalImages: Send + Sync {
    /// Writes the image as an archive; `false` when the node hasn't got it, or there is no node.
    async fn export(&self, name: &Reference, archive: &Path) -> Result<bool, std::io::Error>;
}
