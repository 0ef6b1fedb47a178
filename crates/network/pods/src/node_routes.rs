//! Routes to the pods of other nodes. Upstream counterpart: flannel's host-gw and vxlan backends.
//!
//! A node on the same link is the gateway to its pods; one behind a router is reached through VXLAN. Deliberate
//! difference: nothing is published for that. A node's end of the tunnel has the first address of its pod range, and a
//! MAC made from it, so every node knows those of all others from `spec.podCIDR`.
//!
//! What stays true: routes of others are never touched (ours bear [`sampan_netlink::route::PROTOCOL`]), nor are
//! the /32 routes of this node's own pods.
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use k8s_openapi::api::core::v1::Node;
use sampan_netlink::route::{LOOPBACK, Neighbour, Route, Vxlan};
use sampan_netlink::{Cidr, Error, Socket};

use crate::wire::mac_of;

const TUNNEL: &str = "sampan.1";
const VNI: u32 = 1;
const PORT: u16 = 8472;
/// Outer Ethernet, IP, UDP and VXLAN headers.
const OVERHEAD_BYTES: u32 = 50;

/// Another node: its address, and the range of its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    pub ip: Ipv4Addr,
    pub range: Cidr,
}

/// The node's range of IPv4 addresses for pods.
pub fn range_of(node: &Node) -> Option<Cidr> {
    let spec = node.spec.as_ref()?;
    let all = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    all.filter_map(|c| c.parse().ok()).next()
}

impl Peer {
    pub fn of(node: &Node) -> Option<Self> {
        let addresses = node.status.as_ref()?.addresses.as_ref()?;
        let internal = addresses.iter().filter(|a| a.type_ == "InternalIP");
        let ip = internal.filter_map(|a| a.address.parse().ok()).next()?;
        Some(Self { ip, range: range_of(node)? })
    }
}

/// Makes the kernel's routes those to `peers`. Returns the peers that no route leads to now.
pub fn apply(own: Option<Cidr>, node_ip: IpAddr, peers: &BTreeSet<Peer>) -> Result<Vec<Peer>, Error> {
    let mut socket = Socket::route()?;
    let (mut direct, mut tunnelled, mut unreachable) = (BTreeSet::new(), Vec::new(), Vec::new());
    direct.extend(own.map(Route::nowhere));
    for peer in peers {
        let to = IpAddr::V4(peer.range.network());
        let way = socket.route_to(peer.ip.into())?;
        match way {
            // another node with this node's address: two records of one machine
            Some(way) if way.link == LOOPBACK => {}
            Some(Route { via: None, link, .. }) if link != 0 => {
                let via = Some(peer.ip.into());
                direct.insert(Route { to, prefix_bits: peer.range.prefix_bits, via, link, source: None });
            }
            Some(way) if way.link != 0 => tunnelled.push((*peer, way.link)),
            _ => unreachable.push(*peer),
        }
    }
    let (tunnel, through) = tunnel(&mut socket, own, node_ip, &tunnelled)?;
    direct.extend(through);
    let mut present = BTreeSet::new();
    for route in socket.routes()?.into_iter().filter(|r| r.prefix_bits < 32) {
        if direct.contains(&route) {
            present.insert(route)
        } else {
            socket.delete_route(&route).is_ok()
        };
    }
    for route in direct.difference(&present) {
        socket.set_route(route)?;
    }
    if tunnelled.is_empty()
        && let Some(index) = tunnel
    {
        socket.delete_link(index)?;
    }
    Ok(unreachable)
}

/// Sets the tunnel up as far as it is needed; returns its index if it is there, and the routes through it.
fn tunnel(
    socket: &mut Socket,
    own: Option<Cidr>,
    node_ip: IpAddr,
    peers: &[(Peer, u32)],
) -> Result<(Option<u32>, Vec<Route>), Error> {
    let present = socket.link(TUNNEL)?;
    let (Some(own), IpAddr::V4(local), Some((_, underlay))) = (own, node_ip, peers.first()) else {
        return Ok((present.map(|l| l.index), Vec::new()));
    };
    let mac = mac_of(own.network());
    let index = match present {
        Some(link) if link.mac == Some(mac) => link.index,
        other => {
            if let Some(stale) = other {
                socket.delete_link(stale.index)?;
            }
            let mtu = socket.links()?.iter().find(|l| l.index == *underlay).map_or(1500, |l| l.mtu);
            let mtu = mtu.saturating_sub(OVERHEAD_BYTES);
            let vxlan = Vxlan { name: TUNNEL, mac, vni: VNI, port: PORT, local, underlay: *underlay, mtu };
            socket.add_vxlan(&vxlan)?;
            socket.link(TUNNEL)?.map(|l| l.index).unwrap_or_default()
        }
    };
    socket.set_up(index)?;
    socket.add_address(index, own.network().into(), 32)?;
    let mut wanted = BTreeSet::new();
    let mut routes = Vec::new();
    for (peer, _) in peers {
        let end = IpAddr::V4(peer.range.network());
        let mac = mac_of(peer.range.network());
        wanted.insert(Neighbour { link: index, ip: end, mac, forwarding: false });
        wanted.insert(Neighbour { link: index, ip: peer.ip.into(), mac, forwarding: true });
        let prefix_bits = peer.range.prefix_bits;
        routes.push(Route { to: end, prefix_bits, via: Some(end), link: index, source: None });
    }
    let present: BTreeSet<Neighbour> = socket.neighbours(index)?.into_iter().collect();
    for stale in present.difference(&wanted) {
        socket.delete_neighbour(stale)?;
    }
    for neighbour in wanted.difference(&present) {
        socket.set_neighbour(neighbour)?;
    }
    Ok((Some(index), routes))
}
