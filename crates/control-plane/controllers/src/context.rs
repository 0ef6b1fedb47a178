//! What controllers are handed: the process's [`Context`], and each controller's [`Scope`] of it.
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use sampan_client::Informers;
use sampan_drivers::platform::Platforms;
use sampan_kinds::upgrade::Program;
use tokio::sync::watch;

use crate::events::EventRecorder;

/// Makes the client of the service account `kube-system/<name>`.
pub type Clients = Arc<dyn Fn(&'static str) -> Client + Send + Sync>;

/// Starts to look, at the first call, at the programs that the server has for its nodes.
pub type Programs = Arc<dyn Fn() -> watch::Receiver<Vec<Program>> + Send + Sync>;

/// What kube-controller-manager has as flags; defaults are upstream's.
#[derive(Clone, Debug)]
pub struct Options {
    /// The range of pod addresses that nodes get their podCIDR from; `None` leaves nodes without one.
    pub cluster_cidr: Option<String>,
    /// The range of service addresses: never given to a node.
    pub service_cidr: Option<String>,
    /// Prefix length of a node's podCIDR, IPv4 and IPv6.
    pub node_cidr_mask_v4: u8,
    pub node_cidr_mask_v6: u8,
    /// How long a node may be silent before its Ready condition becomes Unknown.
    pub node_monitor_grace_period: Duration,
    /// The same for a node that never reported.
    pub node_startup_grace_period: Duration,
    /// The cluster's CA certificates (PEM), published to every namespace, again when they change.
    pub root_ca_pem: watch::Receiver<String>,
    /// How many finished pods may stay before the oldest are deleted; 0 keeps all.
    pub terminated_pod_threshold: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cluster_cidr: None,
            service_cidr: None,
            node_cidr_mask_v4: 24,
            node_cidr_mask_v6: 64,
            node_monitor_grace_period: Duration::from_secs(40),
            node_startup_grace_period: Duration::from_secs(60),
            root_ca_pem: watch::channel(String::new()).1,
            terminated_pod_threshold: 12_500,
        }
    }
}

/// What [`crate::start`] needs.
#[derive(Clone)]
pub struct Context {
    pub clients: Clients,
    pub informers: Informers,
    pub options: Options,
    pub image_platforms: Option<Arc<dyn Platforms>>,
    pub programs: Option<Programs>,
}

/// A controller's view of the context: its own client and event source.
#[derive(Clone)]
pub struct Scope {
    pub client: Client,
    pub informers: Informers,
    pub events: EventRecorder,
    pub options: Arc<Options>,
    pub image_platforms: Option<Arc<dyn Platforms>>,
    pub programs: Option<Programs>,
}
