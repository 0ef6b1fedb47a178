//! Services on this node: kube-proxy's job, from Services and EndpointSlices to one nftables table.
//!
//! Upstream counterpart: cmd/kube-proxy and pkg/proxy/nftables. ClusterIP, NodePort, external and load balancer
//! addresses, both traffic policies, session affinity, endpoints that end; IPv4. Deliberate differences: no periodic
//! synchronisation, changes only; NodePorts answer on every address of the node but 127.0.0.0/8.
mod desired;
mod endpoints;
mod table;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use parking_lot::Mutex;
use sampan_client::{Event, Informer, Informers};
use tokio::sync::Notify;

use endpoints::SERVICE_NAME;
use table::Table;

/// Changes that come together are applied together.
const COALESCE: Duration = Duration::from_millis(20);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// What the services of a node must know.
#[derive(Clone, Debug)]
pub struct ServicesConfig {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// The range of all pods: what leaves it is masqueraded.
    pub cluster_cidr: String,
    /// Answered by the node itself, so never redirected.
    pub cluster_dns: IpAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum ServicesError {
    #[error("services: {0}")]
    Kernel(#[from] sampan_netlink::Error),
    #[error("services: the task that changes the kernel's table ended: {0}")]
    Ended(#[from] tokio::task::JoinError),
}

pub struct Services {
    config: ServicesConfig,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    changed: Arc<Notify>,
    table: Arc<Mutex<Table>>,
}

impl Services {
    pub fn new(config: ServicesConfig, informers: &Informers) -> Arc<Self> {
        Self::with(config, informers.of::<Service>(), informers.of::<EndpointSlice>())
    }

    /// As [`Self::new`], with the informers to learn from.
    pub fn with(
        config: ServicesConfig,
        services: Informer<Service>,
        slices: Informer<EndpointSlice>,
    ) -> Arc<Self> {
        let changed = Arc::new(Notify::new());
        let notify = changed.clone();
        services.on_event(move |event| {
            let same = |old: &Service, new: &Service| old.spec == new.spec && old.status == new.status;
            if !matches!(event, Event::Updated { old, new } if same(old, new)) {
                notify.notify_one();
            }
        });
        let notify = changed.clone();
        slices.on_event(move |event| {
            let same = |old: &EndpointSlice, new: &EndpointSlice| {
                old.endpoints == new.endpoints && old.ports == new.ports
            };
            if !matches!(event, Event::Updated { old, new } if same(old, new)) {
                notify.notify_one();
            }
        });
        let pods = config.cluster_cidr.split(',').find_map(|c| c.parse().ok());
        Arc::new(Self { config, services, slices, changed, table: Arc::new(Mutex::new(Table::new(pods))) })
    }

    /// Keeps the kernel's table up to date. Never returns.
    pub async fn run(&self) {
        // until both lists are complete, the table of the agent before this one stands
        self.services.synced().await;
        self.slices.synced().await;
        let mut retry = FIRST_RETRY;
        loop {
            match self.synchronise().await {
                Ok(()) => {
                    retry = FIRST_RETRY;
                    self.changed.notified().await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot set up services, will retry");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(MAX_RETRY);
                }
            }
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// Makes the kernel's table follow from what the informers hold now.
    pub async fn synchronise(&self) -> Result<(), ServicesError> {
        let services = self.services.list();
        let mut by_service = std::collections::HashMap::<(String, String), Vec<Arc<EndpointSlice>>>::new();
        for slice in self.slices.list() {
            let name = slice.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)).cloned();
            let namespace = slice.metadata.namespace.clone().unwrap_or_default();
            if let Some(name) = name {
                by_service.entry((namespace, name)).or_default().push(slice);
            }
        }
        let desired = desired::desired(&self.config, services.iter().map(|s| &**s), |service| {
            let meta = &service.metadata;
            let key = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
            by_service.get(&key).cloned().unwrap_or_default()
        });
        let table = self.table.clone();
        tokio::task::spawn_blocking(move || table.lock().apply(desired)).await??;
        Ok(())
    }
}
