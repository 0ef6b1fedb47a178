//! A pod's wire: a veth pair between its network namespace and the node's, with /32 routes.
//! Upstream counterpart: CNI's ptp plugin.
//!
//! The pod's default route leads to 169.254.1.1, an address that nothing has: the pod knows the MAC of the node's end
//! as its neighbour, and the node knows the pod's, so no ARP is needed on the wire. There is no bridge: traffic between
//! two pods of a node passes the node's forwarding, and so its policies.
use std::collections::HashSet;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::Path;

use sampan_netlink::route::{LOOPBACK, Link, Mac, Neighbour, Route, Veth};
use sampan_netlink::{Error, Socket, inside};

pub const PREFIX: &str = "spn";
const POD_INTERFACE: &str = "eth0";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The name of the node's end.
pub fn name_of(uid: &str) -> String {
    format!("{PREFIX}{:011x}", hash(uid) & 0xfff_ffff_ffff)
}

/// FNV-1a: the names need only differ from one another.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn host_mac(uid: &str) -> Mac {
    let h = hash(uid).to_be_bytes();
    [0x02, h[3], h[4], h[5], h[6], h[7]]
}

/// The MAC of whatever has that address: no two have it in a cluster.
pub fn mac_of(ip: Ipv4Addr) -> Mac {
    let [a, b, c, d] = ip.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// Connects the namespace; again without harm, also when an earlier attempt ended half-way.
pub fn connect(uid: &str, netns: &Path, ip: Ipv4Addr, node_ip: IpAddr, mtu: u32) -> Result<(), Error> {
    let name = name_of(uid);
    let mut socket = Socket::route()?;
    let near = socket.link(&name)?;
    let connected = match &near {
        None => None,
        Some(near) => inside(netns, || {
            let far = Socket::route()?.link(POD_INTERFACE)?;
            Ok(far.filter(|far| far.peer == Some(near.index)))
        })?
        .map(|_| near.index),
    };
    let index = match (connected, near) {
        (Some(index), _) => index,
        (None, stale) => {
            if let Some(stale) = stale {
                socket.delete_link(stale.index)?;
            }
            make_pair(&mut socket, uid, &name, netns, ip, mtu)?
        }
    };
    inside(netns, || configure_pod(uid, ip))?;
    set_sysctl(&format!("net/ipv4/conf/{name}/route_localnet"), "1");
    lead_to(&mut socket, index, ip, node_ip)
}

/// Has the node know the way to a pod.
fn lead_to(socket: &mut Socket, index: u32, ip: Ipv4Addr, node_ip: IpAddr) -> Result<(), Error> {
    socket.set_neighbour(&Neighbour { link: index, ip: ip.into(), mac: mac_of(ip), forwarding: false })?;
    let route = Route { to: ip.into(), prefix_bits: 32, via: None, link: index, source: Some(node_ip) };
    // the node's address may be one that its own interfaces do not have
    socket.set_route(&route).or_else(|_| socket.set_route(&Route { source: None, ..route }))
}

/// Sets the routes to these pods again that others have taken away: systemd-networkd does when it starts anew.
pub fn restore(pods: &[(String, Ipv4Addr)], node_ip: IpAddr) -> Result<(), Error> {
    let mut socket = Socket::route()?;
    let present: HashSet<IpAddr> =
        socket.routes()?.iter().filter(|r| r.prefix_bits == 32).map(|r| r.to).collect();
    for (uid, ip) in pods.iter().filter(|(_, ip)| !present.contains(&IpAddr::V4(*ip))) {
        // no wire: it is being made, or taken away
        let Some(link) = socket.link(&name_of(uid))? else { continue };
        tracing::info!(pod = %uid, %ip, "the route to the pod was gone: set again");
        lead_to(&mut socket, link.index, *ip, node_ip)?;
    }
    Ok(())
}

fn make_pair(
    socket: &mut Socket,
    uid: &str,
    name: &str,
    netns: &Path,
    ip: Ipv4Addr,
    mtu: u32,
) -> Result<u32, Error> {
    let namespace =
        File::open(netns).map_err(|error| Error::Namespace { path: netns.display().to_string(), error })?;
    socket.add_veth(&Veth {
        name,
        mac: host_mac(uid),
        peer_name: POD_INTERFACE,
        peer_mac: mac_of(ip),
        peer_namespace: namespace.as_fd(),
        mtu,
    })?;
    let made = socket.link(name)?.map(|l| l.index);
    made.ok_or_else(|| Error::Socket(std::io::Error::other(format!("{name} went away while it was set up"))))
}

/// What is to be set inside the pod's namespace; on a thread that is in it.
fn configure_pod(uid: &str, ip: Ipv4Addr) -> Result<(), Error> {
    let mut socket = Socket::route()?;
    socket.set_up(LOOPBACK)?;
    let Some(Link { index, .. }) = socket.link(POD_INTERFACE)? else {
        return Err(Error::Socket(std::io::Error::other(
            "the pod's interface went away while it was set up",
        )));
    };
    socket.set_up(index)?;
    socket.add_address(index, ip.into(), 32)?;
    let gateway = IpAddr::V4(GATEWAY);
    socket.set_neighbour(&Neighbour { link: index, ip: gateway, mac: host_mac(uid), forwarding: false })?;
    socket.set_route(&Route { to: gateway, prefix_bits: 32, via: None, link: index, source: None })?;
    let anywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    socket.set_route(&Route { to: anywhere, prefix_bits: 0, via: Some(gateway), link: index, source: None })
}

/// Takes the wire away, if there is one. Its route goes with it.
pub fn disconnect(uid: &str) -> Result<(), Error> {
    let mut socket = Socket::route()?;
    match socket.link(&name_of(uid))? {
        Some(link) => socket.delete_link(link.index),
        None => Ok(()),
    }
}

/// Takes away the wires that belong to none of the pods.
pub fn disconnect_all_but(uids: &[String]) -> Result<(), Error> {
    let names: Vec<String> = uids.iter().map(|uid| name_of(uid)).collect();
    let mut socket = Socket::route()?;
    for link in socket.links()? {
        let ours = link.name.len() == names.first().map_or(14, String::len) && link.name.starts_with(PREFIX);
        if ours && !names.contains(&link.name) {
            socket.delete_link(link.index)?;
        }
    }
    Ok(())
}

/// The largest packet that the interface with the node's address takes.
pub fn uplink_mtu(node_ip: IpAddr) -> u32 {
    const ETHERNET: u32 = 1500;
    let look = || -> Result<Option<u32>, Error> {
        let mut socket = Socket::route()?;
        let Some((index, _)) = socket.addresses()?.into_iter().find(|(_, ip)| *ip == node_ip) else {
            return Ok(None);
        };
        Ok(socket.links()?.into_iter().find(|l| l.index == index && index != LOOPBACK).map(|l| l.mtu))
    };
    look().ok().flatten().filter(|mtu| (576..=65535).contains(mtu)).unwrap_or(ETHERNET)
}

/// Sets a kernel setting of this network namespace, unless it is so already.
pub fn set_sysctl(name: &str, value: &str) {
    let path = format!("/proc/sys/{name}");
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return;
    }
    if let Err(error) = fs::write(&path, value) {
        tracing::warn!(%path, value, %error, "cannot change a kernel setting that pods need");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_fit_an_interface() {
        let name = super::name_of("7b9b8c7e-58a4-4a3c-9f0e-2f6a0c6f7a51");
        assert_eq!(name.len(), 14);
        assert_ne!(name, super::name_of("7b9b8c7e-58a4-4a3c-9f0e-2f6a0c6f7a52"));
    }
}
