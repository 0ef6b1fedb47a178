//! Cluster DNS.
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use sampan_client::Informers;

#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// Put on `lo`, and served at port 53.
    pub cluster_dns: IpAddr,
    /// Served besides.
    pub listen: Vec<SocketAddr>,
    /// `cluster.local`
    pub domain: String,
    /// Where the node's own resolvers stand.
    pub resolv_conf: PathBuf,
}

pub struct Dns {}

impl Dns {
    pub fn new(_config: DnsConfig, _informers: &Informers) -> Arc<Self> {
        Arc::new(Self {})
    }
    pub async fn run(&self) {}
}
