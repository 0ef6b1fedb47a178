//! The servers of a cluster, where several share a store: each keeps a Lease, and all together keep the endpoints of the
//! `kubernetes` service.
//!
//! Upstream counterparts: pkg/controlplane/apiserver's identity leases and pkg/controlplane/reconcilers (the lease
//! endpoint reconciler). What stays true: whether another server lives is judged by this one's own clock, from when it saw
//! that server's lease change; of one that it does not know yet it leaves the endpoints as they are, so a server that
//! starts neither adds the dead nor takes out the living. A server that ends takes its address out; the last one leaves
//! it, since there is nobody else to ask. Deliberately different: one lease is both, and lasts 20 seconds, since keys of
//! ours do not expire by themselves.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use sampan_world::clock;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::Server;
use crate::bootstrap::{call, failed};
use crate::status::{Result, Status};

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
const ENDPOINTS: &str = "/api/v1/namespaces/default/endpoints";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const LABEL: &str = "apiserver.kubernetes.io/identity";
/// Upstream's annotation for servers that proxy to each other: `IP:PORT`.
const ADDRESS: &str = "kubernetes.io/peer-advertise-address";
const EVERY: Duration = Duration::from_secs(10);
const LIFE: Duration = Duration::from_secs(20);
/// The lease of a server that was silent for so long is removed.
const FORGOTTEN: Duration = Duration::from_secs(3600);
/// A pass that takes longer is given up; the next one begins anew.
const PASS: Duration = Duration::from_secs(8);
/// Others write the same objects.
const ROUNDS: usize = 5;

/// A server that is among those of its cluster.
pub struct Announced {
    server: Arc<Server>,
    name: String,
    ending: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Puts this server, which runs on `host`, among those that the `kubernetes` service leads to.
pub fn announce(server: &Arc<Server>, host: &str) -> Announced {
    let name = lease_name(host);
    let ending = watch::Sender::new(false);
    let mut ended = ending.subscribe();
    let mut servers = Servers { name: name.clone(), host: host.to_string(), ..Servers::default() };
    let shared = server.clone();
    let task = tokio::spawn(async move {
        loop {
            match tokio::time::timeout(PASS, servers.pass(&shared)).await {
                Ok(Ok(())) => {}
                Ok(Err(status)) => tracing::warn!("keeping this server's lease: {}", status.0.message),
                Err(_) => tracing::warn!("keeping this server's lease: no answer"),
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                _ = ended.wait_for(|ended| *ended) => return,
            }
        }
    });
    Announced { server: server.clone(), name, ending, task }
}

impl Announced {
    /// Takes this server out again.
    pub async fn withdraw(self) {
        self.ending.send_replace(true);
        let withdrawing = async {
            let _ = self.task.await;
            call(&self.server, Method::DELETE, &format!("{LEASES}/{}", self.name), None).await?;
            // what is known of the others is gone with the task: all that are in the endpoints stay
            let mut servers = Servers { name: self.name.clone(), ..Servers::default() };
            let leases = servers.leases(&self.server).await?;
            let mut states = servers.observe(&leases, clock::monotonic());
            states.extend(self.server.config.advertise.map(|own| (own, State::Dead)));
            keep_endpoints(&self.server, &states).await
        };
        match tokio::time::timeout(PASS, withdrawing).await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => tracing::warn!("the others notice by themselves: {}", status.0.message),
            Err(_) => tracing::warn!("the others notice by themselves that this server ended"),
        }
    }
}

/// Upstream's name: from the host's.
fn lease_name(host: &str) -> String {
    let digest = Sha256::digest(host.as_bytes());
    format!("apiserver-{}", base32(digest.get(..16).unwrap_or_default()))
}

/// RFC 4648 without padding, in lower case.
fn base32(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let (mut text, mut bits, mut count) = (String::new(), 0_u32, 0);
    for byte in bytes {
        bits = (bits << 8) | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(char::from(LETTERS[(bits >> count) as usize & 31]));
        }
    }
    if count > 0 {
        text.push(char::from(LETTERS[(bits << (5 - count)) as usize & 31]));
    }
    text
}

/// How a server stands, as this one knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Dead,
    /// Seen for too short a time to tell.
    Unknown,
    Live,
}

type States = BTreeMap<SocketAddr, State>;

/// What this server knows of all.
#[derive(Default)]
struct Servers {
    /// Of the own lease.
    name: String,
    host: String,
    seen: HashMap<String, Seen>,
    /// When leases were last read.
    looked: Option<Instant>,
}

struct Seen {
    renewed: String,
    since: Instant,
    /// It was renewed since it was first seen.
    has_changed: bool,
}

impl Servers {
    async fn pass(&mut self, server: &Arc<Server>) -> Result<()> {
        self.renew(server).await?;
        let leases = self.leases(server).await?;
        let states = self.observe(&leases, clock::monotonic());
        for name in self.forgotten(clock::monotonic()) {
            tracing::info!(lease = name, "a server that is long gone is forgotten");
            call(server, Method::DELETE, &format!("{LEASES}/{name}"), None).await?;
            self.seen.remove(&name);
        }
        keep_endpoints(server, &states).await
    }

    async fn leases(&self, server: &Arc<Server>) -> Result<Vec<Value>> {
        let (code, list) =
            call(server, Method::GET, &format!("{LEASES}?labelSelector={LABEL}%3Dkube-apiserver"), None)
                .await?;
        match code {
            200 => Ok(list.get("items").and_then(Value::as_array).cloned().unwrap_or_default()),
            _ => Err(failed(LEASES, "", &list)),
        }
    }

    /// Renews the own lease, or makes it.
    async fn renew(&self, server: &Arc<Server>) -> Result<()> {
        let now = format!("{:.6}", clock::now());
        let mut labels = json!({});
        labels[LABEL] = "kube-apiserver".into();
        labels["kubernetes.io/hostname"] = self.host.as_str().into();
        let mut annotations = json!({});
        if let Some(address) = server.config.advertise.filter(|a| is_reachable(*a)) {
            annotations[ADDRESS] = address.to_string().into();
        }
        let path = format!("{LEASES}/{}", self.name);
        for _ in 0..ROUNDS {
            let (code, found) = call(server, Method::GET, &path, None).await?;
            let mut lease = match code {
                200 => found,
                404 => json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                    "metadata": {"name": self.name, "namespace": "kube-system"}}),
                _ => return Err(failed(LEASES, &self.name, &found)),
            };
            lease["metadata"]["labels"] = labels.clone();
            lease["metadata"]["annotations"] = annotations.clone();
            lease["spec"] = json!({"holderIdentity": self.name, "leaseDurationSeconds": LIFE.as_secs(),
                "renewTime": now});
            let written = match code {
                200 => call(server, Method::PUT, &path, Some(&lease)).await?,
                _ => call(server, Method::POST, LEASES, Some(&lease)).await?,
            };
            match written {
                (200 | 201, _) => return Ok(()),
                (409, _) => {}
                (_, body) => return Err(failed(LEASES, &self.name, &body)),
            }
        }
        Err(Status::internal(format_args!("{path}: another writer keeps changing it")))
    }

    /// How all servers with a lease stand.
    fn observe(&mut self, leases: &[Value], now: Instant) -> States {
        let text = |lease: &Value, pointer: &str| {
            lease.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_string()
        };
        if self.looked.replace(now).is_some_and(|looked| now.duration_since(looked) >= LIFE) {
            // the store was away, so nobody could renew
            self.seen.clear();
        }
        let mut states = States::new();
        let mut names = BTreeSet::new();
        for lease in leases {
            let (name, renewed) = (text(lease, "/metadata/name"), text(lease, "/spec/renewTime"));
            let seen = self.seen.entry(name.clone()).or_insert_with(|| Seen {
                renewed: renewed.clone(),
                since: now,
                has_changed: false,
            });
            if seen.renewed != renewed {
                *seen = Seen { renewed, since: now, has_changed: true };
            }
            let is_recent = now.duration_since(seen.since) < LIFE;
            let state = match (is_recent, seen.has_changed || name == self.name) {
                (true, true) => State::Live,
                (true, false) => State::Unknown,
                (false, _) => State::Dead,
            };
            let address = lease.pointer("/metadata/annotations").and_then(|all| all.get(ADDRESS)?.as_str());
            if let Some(address) = address.and_then(|address| address.parse().ok()) {
                // a server that got another name leaves a lease behind, with its address
                let known = states.entry(address).or_insert(state);
                *known = state.max(*known);
            }
            names.insert(name);
        }
        self.seen.retain(|name, _| names.contains(name));
        states
    }

    fn forgotten(&self, now: Instant) -> Vec<String> {
        let is_old = |seen: &Seen| now.duration_since(seen.since) > FORGOTTEN;
        let old = self.seen.iter().filter(|(name, seen)| **name != self.name && is_old(seen));
        old.map(|(name, _)| name.clone()).collect()
    }
}

/// Whether others can reach a server there.
pub fn is_reachable(address: SocketAddr) -> bool {
    !address.ip().is_loopback() && !address.ip().is_unspecified()
}

/// The addresses that the service is to have; `None` when it is to stay as it is.
fn wanted(present: &BTreeSet<SocketAddr>, states: &States) -> Option<BTreeSet<SocketAddr>> {
    let is_wanted = |address: &SocketAddr, state: State| match state {
        State::Live => true,
        State::Unknown => present.contains(address),
        State::Dead => false,
    };
    let wanted: BTreeSet<SocketAddr> =
        states.iter().filter(|(address, state)| is_wanted(address, **state)).map(|(a, _)| *a).collect();
    (!wanted.is_empty()).then_some(wanted)
}

/// The ports, each with who has it.
fn by_port(addresses: &BTreeSet<SocketAddr>) -> BTreeMap<u16, Vec<SocketAddr>> {
    let mut ports = BTreeMap::<u16, Vec<SocketAddr>>::new();
    for address in addresses {
        ports.entry(address.port()).or_default().push(*address);
    }
    ports
}

fn subsets(addresses: &BTreeSet<SocketAddr>) -> Value {
    let subset = |(port, all): (u16, Vec<SocketAddr>)| {
        let all: Vec<Value> = all.iter().map(|address| json!({"ip": address.ip().to_string()})).collect();
        json!({"addresses": all, "ports": [{"name": "https", "port": port, "protocol": "TCP"}]})
    };
    by_port(addresses).into_iter().map(subset).collect::<Vec<_>>().into()
}

/// One slice a port, the first with the service's own name. As upstream: IPv6 addresses only where there are no others.
fn slices(addresses: &BTreeSet<SocketAddr>) -> BTreeMap<String, Value> {
    let mut slices = BTreeMap::new();
    for (number, (port, all)) in by_port(addresses).into_iter().enumerate() {
        let name = if number == 0 { "kubernetes".to_string() } else { format!("kubernetes-{port}") };
        let is_v4 = all.iter().any(SocketAddr::is_ipv4);
        let endpoints: Vec<Value> = all
            .iter()
            .filter(|address| address.is_ipv4() == is_v4)
            .map(|a| json!({"addresses": [a.ip().to_string()], "conditions": {"ready": true}}))
            .collect();
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if is_v4 { "IPv4" } else { "IPv6" },
            "endpoints": endpoints,
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}]});
        slices.insert(name, slice);
    }
    slices
}

fn addresses_of(endpoints: &Value) -> BTreeSet<SocketAddr> {
    let list =
        |value: &Value, field: &str| value.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut addresses = BTreeSet::new();
    for subset in list(endpoints, "subsets") {
        for port in list(&subset, "ports") {
            let port = port.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
            for address in list(&subset, "addresses") {
                let ip = address.get("ip").and_then(Value::as_str).and_then(|ip| ip.parse().ok());
                addresses.extend(ip.zip(port).map(|(ip, port)| SocketAddr::new(ip, port)));
            }
        }
    }
    addresses
}

/// What of a slice is ours to say.
fn told(slice: &Value) -> Value {
    let addresses: BTreeSet<&str> = slice
        .get("endpoints")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|endpoint| endpoint.pointer("/addresses/0")?.as_str())
        .collect();
    json!([
        slice.get("addressType"),
        slice.pointer("/ports/0/port"),
        slice.pointer("/metadata/labels"),
        addresses
    ])
}

/// Brings Endpoints and EndpointSlices to what the servers' states say.
async fn keep_endpoints(server: &Arc<Server>, states: &States) -> Result<()> {
    for _ in 0..ROUNDS {
        let path = format!("{ENDPOINTS}/kubernetes");
        let (code, found) = call(server, Method::GET, &path, None).await?;
        let mut object = match code {
            200 => found,
            404 => json!({"apiVersion": "v1", "kind": "Endpoints",
                "metadata": {"name": "kubernetes", "namespace": "default"}}),
            _ => return Err(failed(ENDPOINTS, "kubernetes", &found)),
        };
        let present = addresses_of(&object);
        let Some(wanted) = wanted(&present, states) else { return Ok(()) };
        let skips = object.pointer("/metadata/labels").and_then(|l| l.get(SKIP_MIRROR)?.as_str());
        if present == wanted && skips == Some("true") {
            return keep_slices(server, &slices(&wanted)).await;
        }
        tracing::info!(?wanted, "the servers that the kubernetes service leads to");
        let mut labels = object
            .pointer("/metadata/labels")
            .filter(|l| l.is_object())
            .cloned()
            .unwrap_or_else(|| json!({}));
        labels[SKIP_MIRROR] = "true".into();
        object["metadata"]["labels"] = labels;
        object["subsets"] = subsets(&wanted);
        let written = match code {
            200 => call(server, Method::PUT, &path, Some(&object)).await?,
            _ => call(server, Method::POST, ENDPOINTS, Some(&object)).await?,
        };
        match written {
            (200 | 201, _) => return keep_slices(server, &slices(&wanted)).await,
            (409, _) => {}
            (_, body) => return Err(failed(ENDPOINTS, "kubernetes", &body)),
        }
    }
    Ok(())
}

const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";

/// What another server writes at the same time it judges the same; what is left the next pass sees.
async fn keep_slices(server: &Arc<Server>, wanted: &BTreeMap<String, Value>) -> Result<()> {
    let selected = format!("{SLICES}?labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes");
    let (code, list) = call(server, Method::GET, &selected, None).await?;
    if code != 200 {
        return Err(failed(SLICES, "", &list));
    }
    let mut found = BTreeMap::new();
    for slice in list.get("items").and_then(Value::as_array).into_iter().flatten() {
        let name = slice.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        found.insert(name.to_string(), slice.clone());
    }
    for (name, slice) in wanted {
        let path = format!("{SLICES}/{name}");
        let written = match found.remove(name) {
            Some(present) if told(&present) == told(slice) => continue,
            Some(present) if present.get("addressType") == slice.get("addressType") => {
                let mut next = present;
                for field in ["endpoints", "ports"] {
                    next[field] = slice[field].clone();
                }
                next["metadata"]["labels"] = slice["metadata"]["labels"].clone();
                next["apiVersion"] = slice["apiVersion"].clone();
                next["kind"] = slice["kind"].clone();
                call(server, Method::PUT, &path, Some(&next)).await?
            }
            // a slice's kind of addresses cannot be changed
            Some(_) => {
                call(server, Method::DELETE, &path, None).await?;
                call(server, Method::POST, SLICES, Some(slice)).await?
            }
            None => call(server, Method::POST, SLICES, Some(slice)).await?,
        };
        match written {
            (200 | 201 | 404 | 409, _) => {}
            (_, body) => return Err(failed(SLICES, name, &body)),
        }
    }
    for name in found.keys().filter(|name| name.starts_with("kubernetes-")) {
        call(server, Method::DELETE, &format!("{SLICES}/{name}"), None).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(name: &str, renewed: &str, address: &str) -> Value {
        json!({"metadata": {"name": name, "annotations": {ADDRESS: address}}, "spec": {"renewTime": renewed}})
    }

    fn set(addresses: &[&str]) -> BTreeSet<SocketAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn names_are_upstreams() {
        assert_eq!(base32(b"foobar"), "mzxw6ytboi");
        assert_eq!(base32(b"f"), "my");
        assert_eq!(lease_name("a").len(), "apiserver-".len() + 26);
        assert_ne!(lease_name("a"), lease_name("b"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_dead_go_and_the_unknown_stay_as_they_are() {
        let mut servers = Servers { name: "a".into(), ..Servers::default() };
        let start = clock::monotonic();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let (a, b, c) = ("10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443");
        let mut pass = |second: u64, leases: &[Value], present: &[&str]| {
            let states = servers.observe(leases, at(second));
            wanted(&set(present), &states)
        };
        // a starts: b, which it does not know, is in; c is not
        let mut leases = [lease("a", "1", a), lease("b", "1", b), lease("c", "1", c)];
        assert_eq!(pass(0, &leases, &[b]), Some(set(&[a, b])));
        assert_eq!(pass(10, &leases, &[a, b]), Some(set(&[a, b])));
        // c renews, b does not
        leases[0] = lease("a", "2", a);
        leases[2] = lease("c", "2", c);
        assert_eq!(pass(15, &leases, &[a, b]), Some(set(&[a, b, c])));
        assert_eq!(pass(21, &leases, &[a, b, c]), Some(set(&[a, c])));
        // it comes back
        leases[1] = lease("b", "2", b);
        leases[0] = lease("a", "3", a);
        assert_eq!(pass(30, &leases, &[a, c]), Some(set(&[a, b, c])));
        // c ended and took its lease away; b got another name and left the old lease
        leases[2] = lease("c", "3", c);
        assert_eq!(pass(40, &leases, &[a, b, c]), Some(set(&[a, b, c])));
        let renamed = [lease("a", "4", a), lease("b", "2", b), lease("b2", "9", b)];
        assert_eq!(pass(51, &renamed, &[a, b, c]), Some(set(&[a, b])));
        // nothing could be read for a while: who is in stays in, until there is more to go by
        assert_eq!(pass(90, &renamed, &[a, b]), Some(set(&[a, b])));
        // the last one leaves its address
        assert_eq!(wanted(&set(&[a]), &[(a.parse().unwrap(), State::Dead)].into()), None);
    }

    #[test]
    fn endpoints_and_slices_say_the_same() {
        let all = set(&["10.0.0.2:6443", "10.0.0.1:6443", "10.0.0.3:7443", "[fd00::1]:6443"]);
        let object = json!({"subsets": subsets(&all)});
        assert_eq!(addresses_of(&object), all);
        assert_eq!(object["subsets"][0]["addresses"][0]["ip"], "10.0.0.1");
        let slices = slices(&all);
        assert_eq!(slices.keys().collect::<Vec<_>>(), ["kubernetes", "kubernetes-7443"]);
        let first = &slices["kubernetes"];
        assert_eq!((&first["addressType"], &first["ports"][0]["port"]), (&json!("IPv4"), &json!(6443)));
        assert_eq!(first["endpoints"].as_array().map(Vec::len), Some(2));
        let mut stored = first.clone();
        stored["endpoints"].as_array_mut().unwrap().reverse();
        stored["metadata"]["resourceVersion"] = "7".into();
        assert_eq!(told(&stored), told(first));
        stored["endpoints"].as_array_mut().unwrap().pop();
        assert_ne!(told(&stored), told(first));
        let six = super::slices(&set(&["[fd00::1]:6443"]));
        assert_eq!(six["kubernetes"]["addressType"], "IPv6");
    }
}
