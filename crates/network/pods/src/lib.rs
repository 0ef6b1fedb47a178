//! The pod network.
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use sampan_client::Informers;
use sampan_drivers::network::{HostPort, NetworkError, PodNetwork};

/// What the pod network must know.
#[derive(Clone, Debug)]
pub struct PodNetConfig {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// Where addresses in use are kept.
    pub state_dir: PathBuf,
    pub cluster_cidr: String,
}

pub struct PodNet {}

impl PodNet {
    pub fn new(_config: PodNetConfig, _informers: &Informers) -> Arc<Self> {
        Arc::new(Self {})
    }
    pub async fn run(&self) {}
}

#[async_trait]
impl PodNetwork for PodNet {
    async fn attach(&self, _: &str, _: &Path, _: &[HostPort]) -> Result<Vec<IpAddr>, NetworkError> {
        Err(NetworkError::NoRange)
    }
    async fn detach(&self, _: &str) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn retain(&self, _: &[String]) -> Result<(), NetworkError> {
        Ok(())
    }
}
