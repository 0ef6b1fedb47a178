//! The pod network: each pod's address and wire, and the routes to the pods of other nodes; all by netlink.
//!
//! Upstream counterparts: CNI's ptp, host-local and portmap plugins, and flannel. IPv4.
//! What stays true: a running pod keeps its address and its connections across a restart of the agent.
mod addresses;
mod host_ports;
mod node_routes;
mod wire;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use sampan_client::{Event, Informer, Informers};
use sampan_drivers::network::{HostPort, NetworkError, PodNetwork};
use sampan_netlink::message::{Received, received};
use sampan_netlink::route::{Link, own_route_is_gone};
use sampan_netlink::{Cidr, Socket};
use tokio::net::UnixDatagram;
use tokio::sync::{Notify, OnceCell, watch};

use addresses::{Addresses, Place, Port};
use node_routes::{Peer, range_of};

/// How long a pod waits for the node to get its range of addresses.
const RANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Changes that come together are applied together.
const COALESCE: Duration = Duration::from_millis(20);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// What the pod network must know.
#[derive(Clone, Debug)]
pub struct PodNetConfig {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// Where the addresses in use are kept.
    pub state_dir: PathBuf,
    /// The range of all pods of the cluster.
    pub cluster_cidr: String,
}

pub struct PodNet {
    config: PodNetConfig,
    nodes: Informer<Node>,
    addresses: Arc<Mutex<Addresses>>,
    range: watch::Sender<Option<Cidr>>,
    changed: Arc<Notify>,
    /// Done once, by the first who needs it.
    prepared: OnceCell<u32>,
    /// The file is written in the order in which the addresses change.
    saving: Arc<Mutex<()>>,
}

impl PodNet {
    pub fn new(config: PodNetConfig, informers: &Informers) -> Arc<Self> {
        Self::with_nodes(config, informers.of::<Node>())
    }

    /// As [`Self::new`], with the informer to learn of nodes from.
    pub fn with_nodes(config: PodNetConfig, nodes: Informer<Node>) -> Arc<Self> {
        if let Err(error) = std::fs::create_dir_all(&config.state_dir) {
            tracing::warn!(path = %config.state_dir.display(), %error, "cannot make the folder for pods' addresses");
        }
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let addresses = Addresses::load(config.state_dir.join("addresses.json"), boot_id.trim());
        let range = watch::channel(addresses.range()).0;
        let pod_net = Arc::new(Self {
            config,
            nodes: nodes.clone(),
            addresses: Arc::new(Mutex::new(addresses)),
            range,
            changed: Arc::new(Notify::new()),
            prepared: OnceCell::new(),
            saving: Arc::default(),
        });
        let watcher = Arc::downgrade(&pod_net);
        nodes.on_event(move |event| {
            if let Some(pod_net) = watcher.upgrade() {
                pod_net.node_changed(event);
            }
        });
        pod_net
    }

    fn node_changed(&self, event: &Event<'_, Node>) {
        let node = event.object();
        if node.metadata.name.as_deref() == Some(&self.config.node_name)
            && let Some(range) = range_of(node)
        {
            self.addresses.lock().set_range(range);
            self.range.send_if_modified(|now| now.replace(range) != Some(range));
        }
        // a node's status is written every few seconds: only what routes follow from matters
        let same = matches!(event, Event::Updated { old, new } if Peer::of(old) == Peer::of(new));
        if !same {
            self.changed.notify_one();
        }
    }

    async fn range(&self) -> Result<Cidr, NetworkError> {
        let mut range = self.range.subscribe();
        let set = tokio::time::timeout(RANGE_TIMEOUT, range.wait_for(Option::is_some)).await;
        set.ok().and_then(|r| r.ok().and_then(|r| *r)).ok_or(NetworkError::NoRange)
    }

    /// Makes the node ready for pods: forwarding, the table of host ports. Returns the MTU of pods.
    async fn prepare(&self) -> Result<u32, NetworkError> {
        let prepared = self.prepared.get_or_try_init(|| {
            let (addresses, node_ip) = (self.addresses.clone(), self.config.node_ip);
            blocking("", move || {
                wire::set_sysctl("net/ipv4/ip_forward", "1");
                let routes = Socket::route()?.routes()?;
                let taken = routes.iter().filter(|r| r.prefix_bits == 32).filter_map(|r| match r.to {
                    IpAddr::V4(ip) => Some(ip),
                    IpAddr::V6(_) => None,
                });
                let mut addresses = addresses.lock();
                addresses.set_taken(taken);
                host_ports::install(addresses.places().map(|(_, place)| place))?;
                Ok(wire::uplink_mtu(node_ip))
            })
        });
        prepared.await.copied()
    }

    /// Writes down which pod has which address.
    fn save(addresses: &Mutex<Addresses>, saving: &Mutex<()>) -> Result<(), sampan_netlink::Error> {
        let _in_order = saving.lock();
        let (path, bytes) = addresses.lock().snapshot();
        addresses::save(&path, &bytes).map_err(sampan_netlink::Error::from)
    }

    /// Keeps the routes to pods, this node's and others'. Never returns.
    pub async fn run(&self) {
        if let Err(error) = self.prepare().await {
            tracing::warn!(%error, "cannot prepare this node for pods");
        }
        self.nodes.synced().await;
        let links = link_events();
        if let Err(error) = &links {
            tracing::warn!(%error, "changes of this node's interfaces go unnoticed");
        }
        let mut retry = FIRST_RETRY;
        loop {
            let complete = match self.apply_routes().await {
                Ok(unreachable) => {
                    unreachable.iter().for_each(|p| tracing::debug!(node = %p.ip, "no route to that node"));
                    unreachable.is_empty()
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot set the routes to other nodes' pods, will retry");
                    false
                }
            };
            let again = async {
                if complete {
                    return std::future::pending().await;
                }
                tokio::time::sleep(retry).await;
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = link_changed(links.as_ref().ok()) => {}
                () = again => {}
            }
            retry = if complete { FIRST_RETRY } else { (retry * 2).min(MAX_RETRY) };
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// Sets the routes to other nodes' pods once.
    pub async fn synchronise(&self) -> Result<(), NetworkError> {
        self.prepare().await?;
        self.apply_routes().await.map(drop)
    }

    async fn apply_routes(&self) -> Result<Vec<Peer>, NetworkError> {
        let own = self.config.node_name.as_str();
        let others = self.nodes.list().into_iter().filter(|n| n.metadata.name.as_deref() != Some(own));
        let peers: BTreeSet<Peer> = others.filter_map(|n| Peer::of(&n)).collect();
        let (range, node_ip) = (*self.range.borrow(), self.config.node_ip);
        let addresses = self.addresses.clone();
        blocking("", move || {
            let pods: Vec<_> = addresses.lock().places().map(|(uid, p)| (uid.clone(), p.ip)).collect();
            wire::restore(&pods, node_ip)?;
            node_routes::apply(range, node_ip, &peers)
        })
        .await
    }

    fn detach_now(addresses: &Mutex<Addresses>, uid: &str) -> Result<(), sampan_netlink::Error> {
        let place = addresses.lock().get(uid).cloned();
        if let Some(place) = &place {
            host_ports::close(place)?;
        }
        wire::disconnect(uid)?;
        addresses.lock().release(uid);
        Ok(())
    }
}

/// The kernel's telling of changes. A datagram socket is one to tokio, whatever family it has.
fn link_events() -> std::io::Result<UnixDatagram> {
    let fd = sampan_netlink::link_events().map_err(std::io::Error::other)?;
    UnixDatagram::from_std(fd.into())
}

/// Waits for a change of an interface other than the pods', or for a route of ours to go.
async fn link_changed(events: Option<&UnixDatagram>) {
    const BUFFER_BYTES: usize = 8 * 1024;
    let Some(events) = events else { return std::future::pending().await };
    let mut buffer = vec![0; BUFFER_BYTES];
    let matters = |m: Received<'_>| match own_route_is_gone(m) {
        Some(gone) => gone,
        None => Link::read(m).is_none_or(|link| !link.name.starts_with(wire::PREFIX)),
    };
    // an error says that some were lost
    while let Ok(count) = events.recv(&mut buffer).await {
        if received(&buffer[..count]).any(matters) {
            return;
        }
    }
}

/// Runs netlink's short, blocking work off the runtime's threads.
async fn blocking<T: Send + 'static>(
    pod: &str,
    work: impl FnOnce() -> Result<T, sampan_netlink::Error> + Send + 'static,
) -> Result<T, NetworkError> {
    let failed = |message: String| NetworkError::Failed { pod: pod.to_string(), message };
    let done = tokio::task::spawn_blocking(work).await.map_err(|e| failed(e.to_string()))?;
    done.map_err(|e| failed(e.to_string()))
}

#[async_trait]
impl PodNetwork for PodNet {
    async fn attach(&self, uid: &str, netns: &Path, ports: &[HostPort]) -> Result<Vec<IpAddr>, NetworkError> {
        let range = self.range().await?;
        let mtu = self.prepare().await?;
        let ports: Vec<Port> = ports.iter().filter_map(Port::of).collect();
        let before = self.addresses.lock().get(uid).cloned();
        let assigned = self.addresses.lock().assign(uid, ports.clone());
        let ip: Ipv4Addr = assigned.ok_or_else(|| NetworkError::Exhausted { range: range.to_string() })?;
        let (addresses, saving) = (self.addresses.clone(), self.saving.clone());
        let (pod, netns, node_ip) = (uid.to_string(), netns.to_path_buf(), self.config.node_ip);
        blocking(uid, move || {
            Self::save(&addresses, &saving)?;
            wire::connect(&pod, &netns, ip, node_ip, mtu)?;
            let place = Place { ip, ports };
            match before {
                Some(before) if before != place => host_ports::close(&before)?,
                _ => {}
            }
            match host_ports::open(&place) {
                // someone emptied the ruleset
                Err(error) if error.is_missing() => {
                    let places: Vec<Place> = addresses.lock().places().map(|(_, p)| p.clone()).collect();
                    host_ports::install(places.iter())
                }
                other => other,
            }
        })
        .await?;
        Ok(vec![ip.into()])
    }

    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        self.prepare().await?;
        let (addresses, saving, pod) = (self.addresses.clone(), self.saving.clone(), uid.to_string());
        blocking(uid, move || {
            Self::detach_now(&addresses, &pod)?;
            Self::save(&addresses, &saving)
        })
        .await
    }

    async fn retain(&self, uids: &[String]) -> Result<(), NetworkError> {
        self.prepare().await?;
        let (addresses, saving, uids) = (self.addresses.clone(), self.saving.clone(), uids.to_vec());
        blocking("", move || {
            wire::disconnect_all_but(&uids)?;
            let gone = addresses.lock().retain_only(&uids);
            for uid in &gone {
                Self::detach_now(&addresses, uid)?;
            }
            Self::save(&addresses, &saving)
        })
        .await
    }
}
