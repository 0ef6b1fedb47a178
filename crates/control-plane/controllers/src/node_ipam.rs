//! Gives each node its range of pod addresses (podCIDR). Upstream counterpart: pkg/controller/nodeipam.
//!
//! What stays true: no two nodes get the same range, and none overlaps the services'. What is taken follows from the
//! nodes themselves, and from what was given out and not yet observed.
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use sampan_client::{Event, Informer, WorkQueue};
use serde_json::json;

use crate::Scope;
use crate::controller::{Controller, Descriptor, SyncError, SyncResult, run};
use crate::controller_ref::{is_deleting, name};
use crate::events::EventRecorder;

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "node-ipam-controller",
    service_account: "node-controller",
    component: "cidrAllocator",
    build: |scope| run(NodeIpamController::new(&scope)),
};

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    base: u128,
    prefix: u8,
    is_v4: bool,
}

impl Cidr {
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.trim().split_once('/')?;
        let prefix: u8 = prefix.parse().ok()?;
        let (bits, is_v4, width) = match address.parse().ok()? {
            IpAddr::V4(a) => (u128::from(u32::from(a)), true, 32),
            IpAddr::V6(a) => (u128::from(a), false, 128),
        };
        if prefix > width {
            return None;
        }
        let cidr = Self { base: bits, prefix, is_v4 };
        Some(Self { base: bits & !(cidr.size_minus_one()), ..cidr })
    }

    fn width(&self) -> u8 {
        if self.is_v4 { 32 } else { 128 }
    }

    fn size_minus_one(&self) -> u128 {
        match self.width() - self.prefix {
            128 => u128::MAX,
            host => (1 << host) - 1,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.is_v4 == other.is_v4
            && self.base <= other.base + other.size_minus_one()
            && other.base <= self.base + self.size_minus_one()
    }

    /// The `index`th range of that prefix length within this one.
    fn subnet(&self, prefix: u8, index: u64) -> Option<Self> {
        let bits = prefix.checked_sub(self.prefix)?;
        if prefix > self.width() || (bits < 64 && index >> bits != 0) {
            return None;
        }
        let shift = u32::from(self.width() - prefix);
        let offset = u128::from(index).checked_shl(shift)?;
        Some(Self { base: self.base + offset, prefix, is_v4: self.is_v4 })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = match self.is_v4 {
            true => IpAddr::V4((self.base as u32).into()),
            false => IpAddr::V6(self.base.into()),
        };
        write!(f, "{address}/{}", self.prefix)
    }
}

/// The most ranges that are looked through for a free one.
const MAX_NODES: u64 = 65_536;

/// The first range of `cluster` with that prefix that overlaps none of `taken`.
fn first_free(cluster: &Cidr, prefix: u8, taken: &[Cidr]) -> Option<Cidr> {
    let subnets = (0..MAX_NODES).map_while(|i| cluster.subnet(prefix, i));
    subnets.into_iter().find(|c| !taken.iter().any(|t| t.overlaps(c)))
}

struct NodeIpamController {
    client: Client,
    events: EventRecorder,
    nodes: Informer<Node>,
    clusters: Vec<(Cidr, u8)>,
    services: Vec<Cidr>,
    /// Given out by this process, by node.
    given: Mutex<HashMap<String, Vec<Cidr>>>,
    queue: WorkQueue<String>,
}

impl NodeIpamController {
    fn new(scope: &Scope) -> Arc<Self> {
        let parse = |list: &Option<String>| -> Vec<Cidr> {
            list.iter().flat_map(|l| l.split(',')).filter_map(Cidr::parse).collect()
        };
        let mask = |c: &Cidr| match c.is_v4 {
            true => scope.options.node_cidr_mask_v4,
            false => scope.options.node_cidr_mask_v6,
        };
        let clusters =
            parse(&scope.options.cluster_cidr).into_iter().map(|c| (c, mask(&c).max(c.prefix))).collect();
        let this = Arc::new(Self {
            client: scope.client.clone(),
            events: scope.events.clone(),
            nodes: scope.informers.of(),
            clusters,
            services: parse(&scope.options.service_cidr),
            given: Mutex::default(),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.nodes.on_event(move |event| {
            let node = name(&**event.object());
            match event {
                Event::Deleted(_) => drop(me.given.lock().remove(node)),
                _ if cidrs(event.object()).is_empty() => me.queue.add(node.to_string()),
                _ => {}
            }
        });
        this
    }

    /// Reserves a range of each family for `node`; the same again when it asks again.
    fn reserve(&self, node: &str) -> Option<Vec<Cidr>> {
        let mut given = self.given.lock();
        if let Some(cidrs) = given.get(node) {
            return Some(cidrs.clone());
        }
        let mut taken = self.services.clone();
        taken.extend(self.nodes.list().iter().flat_map(|n| cidrs(n)));
        taken.extend(given.values().flatten());
        let free: Option<Vec<Cidr>> =
            self.clusters.iter().map(|(cluster, prefix)| first_free(cluster, *prefix, &taken)).collect();
        let free = free?;
        given.insert(node.to_string(), free.clone());
        Some(free)
    }
}

fn cidrs(node: &Node) -> Vec<Cidr> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let all = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    all.filter_map(|c| Cidr::parse(c)).collect()
}

impl Controller for NodeIpamController {
    type Key = String;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<String> {
        &self.queue
    }

    async fn synced(&self) {
        self.nodes.synced().await;
    }

    fn all(&self) -> Vec<String> {
        self.nodes.list().iter().map(|n| name(&**n).to_string()).collect()
    }

    async fn sync(&self, key: String) -> SyncResult {
        let Some(node) = self.nodes.get("", &key) else { return Ok(()) };
        if self.clusters.is_empty() || !cidrs(&node).is_empty() || is_deleting(&*node) {
            return Ok(());
        }
        let Some(ranges) = self.reserve(&key) else {
            self.events.normal(
                &*node,
                "CIDRNotAvailable",
                format!("Node {key} status is now: CIDRNotAvailable"),
            );
            return Err(SyncError::failed(format!("no free pod CIDR for node {key}")));
        };
        let ranges: Vec<String> = ranges.iter().map(Cidr::to_string).collect();
        let patch = json!({"spec": {"podCIDR": ranges[0], "podCIDRs": ranges}});
        let api: Api<Node> = Api::all(self.client.clone());
        let patched = api.patch(&key, &PatchParams::default(), &Patch::Strategic(&patch)).await;
        crate::api_error::found(patched)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap() {
        let cluster = Cidr::parse("10.42.0.0/16").unwrap();
        let taken = [Cidr::parse("10.42.0.0/24").unwrap(), Cidr::parse("10.42.1.128/25").unwrap()];
        assert_eq!(first_free(&cluster, 24, &taken).unwrap().to_string(), "10.42.2.0/24");
        let small = Cidr::parse("10.42.0.0/23").unwrap();
        assert_eq!(first_free(&small, 24, &taken), None, "all taken");
        let v6 = Cidr::parse("fd00:42::/48").unwrap();
        assert_eq!(v6.subnet(64, 1).unwrap().to_string(), "fd00:42:0:1::/64");
        assert_eq!(Cidr::parse("10.0.0.0/33"), None);
    }
}
