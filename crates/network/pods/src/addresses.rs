//! Which pod has which address (IPAM). Upstream counterpart: CNI's host-local plugin.
//!
//! What stays true: an address belongs to one pod at most; the one that has been free for longest is given out next;
//! what is in use survives a restart of the agent. After a reboot no pod has an address: their namespaces are gone.
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use sampan_drivers::network::HostPort;
use sampan_netlink::Cidr;
use serde::{Deserialize, Serialize};

/// How many freed addresses have their order kept: more than any node has pods.
const MAX_FREED: usize = 4096;

/// A pod's place in the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub ip: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
}

/// A port of the node that leads to the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<Ipv4Addr>,
    pub host_port: u16,
    pub container_port: u16,
    /// As in the IP header.
    pub protocol: u8,
}

impl Port {
    /// `None` for a protocol without ports, or an address of another family.
    pub fn of(port: &HostPort) -> Option<Self> {
        let host_ip = match port.host_ip {
            None => None,
            Some(std::net::IpAddr::V4(ip)) => Some(ip).filter(|ip| !ip.is_unspecified()),
            Some(std::net::IpAddr::V6(ip)) if ip.is_unspecified() => None,
            Some(std::net::IpAddr::V6(_)) => return None,
        };
        let protocol = match port.protocol.as_str() {
            "TCP" | "" => 6,
            "UDP" => 17,
            "SCTP" => 132,
            _ => return None,
        };
        Some(Self { host_ip, host_port: port.host_port, container_port: port.container_port, protocol })
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct State {
    boot_id: String,
    range: Option<String>,
    /// The highest address given out so far; what is above has been free for longest.
    highest: Option<Ipv4Addr>,
    freed: VecDeque<Ipv4Addr>,
    pods: BTreeMap<String, Place>,
}

pub struct Addresses {
    path: PathBuf,
    state: State,
    range: Option<Cidr>,
    /// In use by something that no record names.
    taken: BTreeSet<Ipv4Addr>,
}

impl Addresses {
    /// Takes up what the file at `path` says; without one, nothing is in use.
    pub fn load(path: PathBuf, boot_id: &str) -> Self {
        let mut state: State = match fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(state)) => state,
            Ok(Err(error)) => {
                tracing::warn!(path = %path.display(), %error, "the pods' addresses cannot be read; asking the kernel");
                State::default()
            }
            Err(_) => State::default(),
        };
        if state.boot_id != boot_id {
            state.boot_id = boot_id.to_string();
            let gone = std::mem::take(&mut state.pods);
            state.freed.extend(gone.into_values().map(|p| p.ip));
        }
        let range = state.range.as_deref().and_then(|r| r.parse().ok());
        Self { path, state, range, taken: BTreeSet::new() }
    }

    pub fn range(&self) -> Option<Cidr> {
        self.range
    }

    /// The node's range. Pods that have an address of an earlier one keep it.
    pub fn set_range(&mut self, range: Cidr) {
        if self.range != Some(range) {
            self.range = Some(range);
            self.state.range = Some(range.to_string());
            self.state.highest = None;
            self.state.freed.clear();
        }
    }

    /// Addresses that the kernel has routes for: not given out until [`Self::retain_only`] has cleaned up.
    pub fn set_taken(&mut self, taken: impl IntoIterator<Item = Ipv4Addr>) {
        let known: BTreeSet<Ipv4Addr> = self.state.pods.values().map(|p| p.ip).collect();
        self.taken = taken.into_iter().filter(|ip| !known.contains(ip)).collect();
    }

    pub fn get(&self, uid: &str) -> Option<&Place> {
        self.state.pods.get(uid)
    }

    pub fn places(&self) -> impl Iterator<Item = (&String, &Place)> {
        self.state.pods.iter()
    }

    /// The pod's address: the one it has, or the next free one.
    pub fn assign(&mut self, uid: &str, ports: Vec<Port>) -> Option<Ipv4Addr> {
        if let Some(place) = self.state.pods.get_mut(uid) {
            place.ports = ports;
            return Some(place.ip);
        }
        let ip = self.next_free()?;
        self.state.pods.insert(uid.to_string(), Place { ip, ports });
        Some(ip)
    }

    fn next_free(&mut self) -> Option<Ipv4Addr> {
        let range = self.range?;
        let used: BTreeSet<Ipv4Addr> =
            self.state.pods.values().map(|p| p.ip).chain(self.taken.iter().copied()).collect();
        // the first is the tunnel's, the second is left for the node, the last is the broadcast address
        let first = u32::from(range.network()).saturating_add(2);
        let last = u32::from(range.last()).saturating_sub(1);
        let above = self.state.highest.map_or(first, |h| u32::from(h).saturating_add(1)).max(first);
        let untouched = (above..=last).map(Ipv4Addr::from).find(|ip| !used.contains(ip));
        if let Some(ip) = untouched {
            self.state.highest = Some(ip);
            self.state.freed.retain(|f| *f != ip);
            return Some(ip);
        }
        self.state.highest = Some(Ipv4Addr::from(last));
        while let Some(ip) = self.state.freed.pop_front() {
            if range.contains(ip) && !used.contains(&ip) {
                return Some(ip);
            }
        }
        // whatever the list of freed ones has lost
        (first..=last).map(Ipv4Addr::from).find(|ip| !used.contains(ip))
    }

    pub fn release(&mut self, uid: &str) -> Option<Place> {
        let place = self.state.pods.remove(uid)?;
        if self.state.freed.len() >= MAX_FREED {
            self.state.freed.pop_front();
        }
        self.state.freed.push_back(place.ip);
        Some(place)
    }

    /// The pods that are not in `uids`. Addresses that no record names are free from now on.
    pub fn retain_only(&mut self, uids: &[String]) -> Vec<String> {
        self.taken.clear();
        self.state.pods.keys().filter(|uid| !uids.contains(uid)).cloned().collect()
    }

    /// What is to be written by [`save`].
    pub fn snapshot(&self) -> (PathBuf, Vec<u8>) {
        (self.path.clone(), serde_json::to_vec(&self.state).unwrap_or_default())
    }
}

/// Replaces the file, without waiting for the disk: the file must outlive the agent, not the kernel, and an SD card
/// may take longer for that than all the rest of starting a pod.
pub fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(folder: &Path, boot: &str) -> Addresses {
        let mut addresses = Addresses::load(folder.join("addresses.json"), boot);
        addresses.set_range("10.42.1.0/29".parse().unwrap());
        addresses
    }

    fn ip(last: u8) -> Option<Ipv4Addr> {
        Some(Ipv4Addr::new(10, 42, 1, last))
    }

    #[test]
    fn each_address_once_and_the_longest_free_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut addresses = loaded(folder.path(), "b1");
        assert_eq!(addresses.assign("a", vec![]), ip(2));
        assert_eq!(addresses.assign("a", vec![]), ip(2), "the same pod keeps its address");
        assert_eq!(addresses.assign("b", vec![]), ip(3));
        addresses.release("a");
        assert_eq!(addresses.assign("c", vec![]), ip(4), "not the one that was freed just now");
        addresses.release("c");
        assert_eq!(addresses.assign("d", vec![]), ip(5));
        assert_eq!(addresses.assign("e", vec![]), ip(6));
        assert_eq!(addresses.assign("f", vec![]), ip(2), "freed first");
        assert_eq!(addresses.assign("g", vec![]), ip(4));
        assert_eq!(addresses.assign("h", vec![]), None, "exhausted");
        addresses.release("e");
        assert_eq!(addresses.assign("h", vec![]), ip(6));
    }

    #[test]
    fn survives_a_restart_but_not_a_reboot() {
        let folder = tempfile::tempdir().unwrap();
        let mut addresses = loaded(folder.path(), "b1");
        let port = Port { host_ip: None, host_port: 80, container_port: 8080, protocol: 6 };
        addresses.assign("a", vec![port.clone()]);
        let (path, bytes) = addresses.snapshot();
        save(&path, &bytes).unwrap();
        let mut again = loaded(folder.path(), "b1");
        assert_eq!(again.get("a"), Some(&Place { ip: ip(2).unwrap(), ports: vec![port] }));
        assert_eq!(again.assign("b", vec![]), ip(3));
        let mut rebooted = loaded(folder.path(), "b2");
        assert_eq!(rebooted.get("a"), None);
        assert_eq!(rebooted.assign("x", vec![]), ip(3));
        fs::write(&path, b"half").unwrap();
        let mut lost = loaded(folder.path(), "b1");
        lost.set_taken(ip(2));
        assert_eq!(lost.assign("x", vec![]), ip(3), "the kernel's routes tell what is in use");
    }
}
