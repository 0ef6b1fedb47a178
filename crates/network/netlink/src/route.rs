//! Links, addresses, routes and neighbours (rtnetlink). Upstream counterpart: what CNI's ptp and flannel's host-gw and
//! vxlan backends do through vishvananda/netlink.
//!
//! What stays true: adding what is there and deleting what is not are no errors.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Cidr;
use crate::message::{CREATE, EXCLUSIVE, Message, REPLACE, Received, attribute, u32_at};
use crate::socket::{Error, Socket};

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const DELROUTE: u16 = 25;
const GETROUTE: u16 = 26;
const NEWNEIGH: u16 = 28;
const DELNEIGH: u16 = 29;
const GETNEIGH: u16 = 30;

const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const AF_BRIDGE: u8 = 7;

/// Marks the routes that are ours, so that others' are never touched (see `ip route show proto 113`).
pub const PROTOCOL: u8 = 113;
/// `lo` has it in every namespace.
pub const LOOPBACK: u32 = 1;

pub type Mac = [u8; 6];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: u32,
    /// For a veth: the index of the other end, in its own namespace.
    pub peer: Option<u32>,
    pub is_up: bool,
}

impl Link {
    /// From a message about a link.
    pub fn read(message: Received<'_>) -> Option<Self> {
        let attributes =
            message.payload.get(16..).filter(|_| message.kind == NEWLINK || message.kind == DELLINK)?;
        let name = attribute(attributes, IFLA_IFNAME)?.split(|b| *b == 0).next()?;
        Some(Self {
            index: u32_at(message.payload, 4)?,
            name: String::from_utf8_lossy(name).into_owned(),
            mac: attribute(attributes, IFLA_ADDRESS).and_then(|a| a.try_into().ok()),
            mtu: attribute(attributes, IFLA_MTU).and_then(|a| u32_at(a, 0)).unwrap_or_default(),
            peer: attribute(attributes, IFLA_LINK).and_then(|a| u32_at(a, 0)),
            is_up: u32_at(message.payload, 8)? & IFF_UP != 0,
        })
    }
}

fn link_header(index: u32, up: bool) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let flags = if up { IFF_UP } else { 0 };
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// `Ok` also for what is there already.
fn unless_exists(result: Result<(), Error>) -> Result<(), Error> {
    result.or_else(|e| if e.exists() { Ok(()) } else { Err(e) })
}

/// `Ok` also for what is gone already.
fn unless_missing(result: Result<(), Error>) -> Result<(), Error> {
    result.or_else(|e| if e.is_missing() { Ok(()) } else { Err(e) })
}

/// A pair of virtual interfaces; this namespace's end is up from the start.
pub struct Veth<'a> {
    pub name: &'a str,
    pub mac: Mac,
    pub peer_name: &'a str,
    pub peer_mac: Mac,
    pub peer_namespace: BorrowedFd<'a>,
    pub mtu: u32,
}

/// A VXLAN interface without learning: its owner fills in the neighbours.
pub struct Vxlan<'a> {
    pub name: &'a str,
    pub mac: Mac,
    pub vni: u32,
    pub port: u16,
    pub local: Ipv4Addr,
    pub underlay: u32,
    pub mtu: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub to: IpAddr,
    pub prefix_bits: u8,
    pub via: Option<IpAddr>,
    /// 0 for a route that leads nowhere: senders are told that the host is unreachable.
    pub link: u32,
    /// What the machine itself sends from on this route.
    pub source: Option<IpAddr>,
}

impl Route {
    /// The route of a range that nothing is in unless another route says so.
    pub fn nowhere(range: Cidr) -> Self {
        let to = range.network().into();
        Self { to, prefix_bits: range.prefix_bits, via: None, link: 0, source: None }
    }
}

/// A link-layer address known without asking for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub link: u32,
    pub ip: IpAddr,
    pub mac: Mac,
    /// Whether `ip` is the VXLAN endpoint behind `mac`, rather than the address that has `mac`.
    pub forwarding: bool,
}

impl Socket {
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        let mut message = Message::new(GETLINK, 0, &link_header(0, false));
        message.put_str(IFLA_IFNAME, name);
        match self.get("looking up a link", &message, Link::read) {
            Err(error) if error.is_missing() => Ok(None),
            other => other,
        }
    }

    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        self.dump("listing links", &Message::new(GETLINK, 0, &link_header(0, false)), Link::read)
    }

    pub fn add_veth(&mut self, veth: &Veth<'_>) -> Result<(), Error> {
        let mut message = Message::new(NEWLINK, CREATE | EXCLUSIVE, &link_header(0, true));
        message.put_str(IFLA_IFNAME, veth.name).put(IFLA_ADDRESS, &veth.mac).put_u32(IFLA_MTU, veth.mtu);
        message.nest(IFLA_LINKINFO, |m| {
            m.put_str(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |m| {
                m.nest(VETH_INFO_PEER, |m| {
                    // the kernel cannot make this end up: its other end is not there yet
                    m.raw(&link_header(0, false)).put_str(IFLA_IFNAME, veth.peer_name);
                    m.put(IFLA_ADDRESS, &veth.peer_mac).put_u32(IFLA_MTU, veth.mtu);
                    m.put(IFLA_NET_NS_FD, &veth.peer_namespace.as_raw_fd().to_ne_bytes());
                });
            });
        });
        self.request("adding a veth pair", &message)
    }

    pub fn add_vxlan(&mut self, vxlan: &Vxlan<'_>) -> Result<(), Error> {
        const ID: u16 = 1;
        const LINK: u16 = 3;
        const LOCAL: u16 = 4;
        const LEARNING: u16 = 7;
        const PORT: u16 = 15;
        let mut message = Message::new(NEWLINK, CREATE | EXCLUSIVE, &link_header(0, true));
        message.put_str(IFLA_IFNAME, vxlan.name).put(IFLA_ADDRESS, &vxlan.mac).put_u32(IFLA_MTU, vxlan.mtu);
        message.nest(IFLA_LINKINFO, |m| {
            m.put_str(IFLA_INFO_KIND, "vxlan").nest(IFLA_INFO_DATA, |m| {
                m.put_u32(ID, vxlan.vni).put_u32(LINK, vxlan.underlay).put(LOCAL, &vxlan.local.octets());
                m.put_u8(LEARNING, 0).put(PORT, &vxlan.port.to_be_bytes());
            });
        });
        self.request("adding the VXLAN interface", &message)
    }

    pub fn set_up(&mut self, index: u32) -> Result<(), Error> {
        self.request("setting a link up", &Message::new(NEWLINK, 0, &link_header(index, true)))
    }

    /// Deletes a link; a veth's other end goes with it.
    pub fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        unless_missing(self.request("deleting a link", &Message::new(DELLINK, 0, &link_header(index, false))))
    }

    fn address(
        &mut self,
        kind: u16,
        flags: u16,
        link: u32,
        ip: IpAddr,
        prefix_bits: u8,
    ) -> Result<(), Error> {
        const LOCAL: u16 = 2;
        const ADDRESS: u16 = 1;
        // of scope host on lo, so that it never becomes the source of what goes out elsewhere
        let scope = if link == LOOPBACK { 254 } else { 0 };
        let mut header = [family(ip), prefix_bits, 0, scope, 0, 0, 0, 0];
        header[4..8].copy_from_slice(&link.to_ne_bytes());
        let mut message = Message::new(kind, flags, &header);
        message.put(LOCAL, &octets(ip)).put(ADDRESS, &octets(ip));
        self.request("setting an address", &message)
    }

    pub fn add_address(&mut self, link: u32, ip: IpAddr, prefix_bits: u8) -> Result<(), Error> {
        unless_exists(self.address(NEWADDR, CREATE | EXCLUSIVE, link, ip, prefix_bits))
    }

    pub fn delete_address(&mut self, link: u32, ip: IpAddr, prefix_bits: u8) -> Result<(), Error> {
        unless_missing(self.address(DELADDR, 0, link, ip, prefix_bits))
    }

    /// All addresses: (link, address).
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr)>, Error> {
        const LOCAL: u16 = 2;
        const ADDRESS: u16 = 1;
        self.dump("listing addresses", &Message::new(GETADDR, 0, &[0; 8]), |m| {
            let attributes = m.payload.get(8..)?;
            let value = attribute(attributes, LOCAL).or_else(|| attribute(attributes, ADDRESS))?;
            Some((u32_at(m.payload, 4)?, read_ip(value)?))
        })
    }

    fn route_message(kind: u16, flags: u16, protocol: u8, route: &Route) -> Message {
        const DST: u16 = 1;
        const OIF: u16 = 4;
        const GATEWAY: u16 = 5;
        const ONLINK: u32 = 4;
        const TABLE_MAIN: u8 = 254;
        const PREFERRED_SOURCE: u16 = 7;
        const UNICAST: u8 = 1;
        const UNREACHABLE: u8 = 7;
        let scope = if route.via.is_some() || route.link == 0 { 0 } else { 253 };
        let sort = if route.link == 0 { UNREACHABLE } else { UNICAST };
        let mut header =
            [family(route.to), route.prefix_bits, 0, 0, TABLE_MAIN, protocol, scope, sort, 0, 0, 0, 0];
        let flag = if route.via.is_some() { ONLINK } else { 0 };
        header[8..12].copy_from_slice(&flag.to_ne_bytes());
        let mut message = Message::new(kind, flags, &header);
        if route.prefix_bits > 0 {
            message.put(DST, &octets(route.to));
        }
        if let Some(via) = route.via {
            message.put(GATEWAY, &octets(via));
        }
        if let Some(source) = route.source {
            message.put(PREFERRED_SOURCE, &octets(source));
        }
        if route.link != 0 {
            message.put_u32(OIF, route.link);
        }
        message
    }

    /// Sets the machine's default route, as an administrator would: unmarked.
    pub fn set_default_route(&mut self, via: IpAddr, link: u32) -> Result<(), Error> {
        const BOOT: u8 = 3;
        let any =
            if via.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        let route = Route { to: any, prefix_bits: 0, via: Some(via), link, source: None };
        self.request(
            "setting the default route",
            &Self::route_message(NEWROUTE, CREATE | REPLACE, BOOT, &route),
        )
    }

    /// Adds a route, in place of one to the same range.
    pub fn set_route(&mut self, route: &Route) -> Result<(), Error> {
        self.request("setting a route", &Self::route_message(NEWROUTE, CREATE | REPLACE, PROTOCOL, route))
    }

    pub fn delete_route(&mut self, route: &Route) -> Result<(), Error> {
        unless_missing(self.request("deleting a route", &Self::route_message(DELROUTE, 0, PROTOCOL, route)))
    }

    /// The routes that are ours.
    pub fn routes(&mut self) -> Result<Vec<Route>, Error> {
        self.dump("listing routes", &Message::new(GETROUTE, 0, &[0; 12]), |m| {
            (m.payload.get(5) == Some(&PROTOCOL)).then(|| read_route(m)).flatten()
        })
    }

    /// The route that a packet to `ip` takes; `None` when there is none.
    pub fn route_to(&mut self, ip: IpAddr) -> Result<Option<Route>, Error> {
        const DST: u16 = 1;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let mut message = Message::new(GETROUTE, 0, &[family(ip), bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        message.put(DST, &octets(ip));
        match self.get("looking up a route", &message, read_route) {
            Err(Error::Refused { .. }) => Ok(None),
            other => other,
        }
    }

    fn neighbour(&mut self, kind: u16, flags: u16, neighbour: &Neighbour) -> Result<(), Error> {
        const DST: u16 = 1;
        const LLADDR: u16 = 2;
        const PERMANENT: u16 = 0x80;
        const SELF: u8 = 2;
        let family = if neighbour.forwarding { AF_BRIDGE } else { family(neighbour.ip) };
        let mut header = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        header[4..8].copy_from_slice(&neighbour.link.to_ne_bytes());
        header[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
        header[10] = if neighbour.forwarding { SELF } else { 0 };
        let mut message = Message::new(kind, flags, &header);
        message.put(DST, &octets(neighbour.ip)).put(LLADDR, &neighbour.mac);
        self.request("setting a neighbour", &message)
    }

    pub fn set_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), Error> {
        self.neighbour(NEWNEIGH, CREATE | REPLACE, neighbour)
    }

    pub fn delete_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), Error> {
        unless_missing(self.neighbour(DELNEIGH, 0, neighbour))
    }

    /// The permanent neighbours of `link`, of both sorts.
    pub fn neighbours(&mut self, link: u32) -> Result<Vec<Neighbour>, Error> {
        const PERMANENT: u16 = 0x80;
        let mut found = Vec::new();
        for family in [AF_INET, AF_BRIDGE] {
            let mut header = [0; 12];
            header[0] = family;
            let message = Message::new(GETNEIGH, 0, &header);
            found.extend(self.dump("listing neighbours", &message, |m| {
                let state = u16::from_ne_bytes(m.payload.get(8..10)?.try_into().ok()?);
                let attributes = m.payload.get(12..)?;
                let ours = u32_at(m.payload, 4)? == link && state & PERMANENT != 0;
                let mac = attribute(attributes, 2)?.try_into().ok()?;
                let ip = read_ip(attribute(attributes, 1)?)?;
                ours.then_some(Neighbour { link, ip, mac, forwarding: family == AF_BRIDGE })
            })?);
        }
        Ok(found)
    }
}

fn read_ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Of a message about a route: whether one of ours is gone. `None`: it is about something else.
pub fn own_route_is_gone(message: Received<'_>) -> Option<bool> {
    match message.kind {
        NEWROUTE => Some(false),
        DELROUTE => Some(message.payload.get(5) == Some(&PROTOCOL)),
        _ => None,
    }
}

fn read_route(message: Received<'_>) -> Option<Route> {
    let attributes = message.payload.get(12..).filter(|_| message.kind == NEWROUTE)?;
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    Some(Route {
        to: attribute(attributes, 1).and_then(read_ip).unwrap_or(any),
        prefix_bits: *message.payload.get(1)?,
        via: attribute(attributes, 5).and_then(read_ip),
        link: attribute(attributes, 4).and_then(|a| u32_at(a, 0)).unwrap_or_default(),
        source: attribute(attributes, 7).and_then(read_ip),
    })
}
