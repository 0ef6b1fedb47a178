//! Services.
use std::net::IpAddr;
use std::sync::Arc;

use sampan_client::Informers;

#[derive(Clone, Debug)]
pub struct ServicesConfig {
    pub node_name: String,
    pub node_ip: IpAddr,
    pub cluster_cidr: String,
    /// Answered by the node itself, so never redirected.
    pub cluster_dns: IpAddr,
}

pub struct Services {}

impl Services {
    pub fn new(_config: ServicesConfig, _informers: &Informers) -> Arc<Self> {
        Arc::new(Self {})
    }
    pub async fn run(&self) {}
}
