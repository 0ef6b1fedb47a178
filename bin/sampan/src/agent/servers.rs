//! The servers of the cluster, as a node knows them: which there are, and which of them to ask first.
//!
//! Upstream counterpart: K3s' pkg/agent/loadbalancer and the endpoints watch of pkg/agent/tunnel. What stays true: the
//! server that the owner named comes first, the others follow as the cluster lists them (the endpoints of
//! default/kubernetes); one that failed goes to the end for a while, but is not given up while there is no other. The
//! list is kept beside the node's certificate, so that a node starts when the server it was told of is gone.
//! Deliberately different: no local load balancer, as the node's one client knows the list itself; and the list rides on
//! the informer that the services have anyway.
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use parking_lot::Mutex;
use sampan_client::{Informer, Informers};
use sampan_pki::LiveCertificate;
use sampan_telemetry::supervise;
use sampan_world::clock;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio_rustls::client::TlsStream;

use crate::join;

/// More are not remembered.
const MAX: usize = 16;
/// How long a server that failed goes to the end.
const AVOIDED: Duration = Duration::from_secs(30);
/// For a connection, TLS included: when there is no other server, and when there is.
const CONNECT: Duration = Duration::from_secs(10);
const CONNECT_ONE_OF_SEVERAL: Duration = Duration::from_secs(4);
/// A server that starts comes and goes a few times.
const SETTLING: Duration = Duration::from_secs(1);
const FILE: &str = "servers.json";

/// What the cluster has said of its servers, as URLs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Those that live.
    pub live: Vec<String>,
    /// Those that did once; nobody is asked before the others.
    #[serde(default)]
    pub earlier: Vec<String>,
}

pub struct Servers {
    /// Where the list is kept; nowhere for a server's own node.
    path: Option<PathBuf>,
    /// What the owner named; a load balancer's name, maybe.
    given: Option<String>,
    known: watch::Sender<Known>,
    /// The one that answered last.
    current: watch::Sender<Option<String>>,
    failed: Mutex<HashMap<String, tokio::time::Instant>>,
}

impl Servers {
    /// Those of an agent, with what an earlier start has learned.
    pub fn of_agent(folder: &Path, given: &str) -> Result<Arc<Self>> {
        let path = folder.join(FILE);
        let kept = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Known>(&text).ok());
        let mut known = kept.unwrap_or_default();
        // nobody but this wrote the file, but a node must start with whatever is there
        known.live.retain(|url| normal(url).is_ok());
        known.earlier.retain(|url| normal(url).is_ok());
        Ok(Self::new(Some(path), Some(normal(given)?), known))
    }

    /// Those that a server's own node has besides its server.
    pub fn of_server() -> Arc<Self> {
        Self::new(None, None, Known::default())
    }

    fn new(path: Option<PathBuf>, given: Option<String>, known: Known) -> Arc<Self> {
        let (known, current) = (watch::channel(known).0, watch::channel(None).0);
        Arc::new(Self { path, given, known, current, failed: Mutex::default() })
    }

    pub fn given(&self) -> Option<&str> {
        self.given.as_deref()
    }

    pub fn known(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// The server that answered last, and its changes.
    pub fn current(&self) -> watch::Receiver<Option<String>> {
        self.current.subscribe()
    }

    /// All, in the order to ask them in.
    pub fn order(&self) -> Vec<String> {
        let known = self.known.borrow().clone();
        let mut all: Vec<String> = Vec::new();
        for url in self.given.iter().chain(&known.live).chain(&known.earlier) {
            if !all.contains(url) {
                all.push(url.clone());
            }
        }
        let mut failed = self.failed.lock();
        failed.retain(|url, at| all.contains(url) && at.elapsed() < AVOIDED);
        // stable: among those that failed, too, the first stays the first
        all.sort_by_key(|url| failed.contains_key(url));
        all
    }

    /// The one to ask first.
    pub fn first(&self) -> Result<String> {
        self.order().into_iter().next().context("no server is known")
    }

    pub fn has_several(&self) -> bool {
        self.order().len() > 1
    }

    pub fn failed(&self, url: &str) {
        self.failed.lock().insert(url.to_string(), clock::monotonic());
    }

    pub fn worked(&self, url: &str) {
        self.failed.lock().remove(url);
        self.current.send_if_modified(|current| {
            let changed = current.as_deref() != Some(url);
            if changed {
                if current.is_some() {
                    tracing::info!(server = url, "another server is asked from now on");
                }
                *current = Some(url.to_string());
            }
            changed
        });
    }

    /// A TLS connection to the first server that answers.
    pub async fn connect(
        &self,
        trusted_pem: &str,
        own: Arc<LiveCertificate>,
        protocol: &[u8],
    ) -> Result<TlsStream<TcpStream>> {
        let order = self.order();
        let limit = if order.len() > 1 { CONNECT_ONE_OF_SEVERAL } else { CONNECT };
        let mut last = None;
        for url in order {
            let connecting = join::connect(&url, Some(trusted_pem), Some(own.clone()), Some(protocol));
            let error = match tokio::time::timeout(limit, connecting).await {
                Ok(Ok(stream)) => {
                    self.worked(&url);
                    return Ok(stream);
                }
                Ok(Err(error)) => error,
                Err(_) => anyhow::anyhow!("connecting to {url}: no answer within {} s", limit.as_secs()),
            };
            tracing::debug!("{error:#}");
            self.failed(&url);
            last = Some(error);
        }
        match last {
            Some(error) => Err(error),
            None => bail!("no server is known"),
        }
    }

    /// Takes what the cluster says. Nothing at all is no news: a cluster has a server.
    pub(super) fn learn(&self, live: Vec<String>) -> Result<()> {
        let mut next = Known { live, earlier: Vec::new() };
        next.live.truncate(MAX);
        let before = self.known.borrow().clone();
        if next.live.is_empty() || next.live == before.live {
            return Ok(());
        }
        let gone = before.live.into_iter().chain(before.earlier);
        next.earlier = gone.filter(|url| !next.live.contains(url)).take(MAX).collect();
        tracing::info!(servers = next.live.join(" "), "the cluster's servers");
        self.known.send_replace(next.clone());
        let Some(path) = &self.path else { return Ok(()) };
        sampan_world::files::write_atomic(path, &serde_json::to_vec(&next)?, 0o600)
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// Has the node learn of the servers that come and go, from the endpoints that it knows anyway.
pub fn follow(servers: &Arc<Servers>, informers: &Informers) {
    let (slices, changed) = (informers.of::<EndpointSlice>(), Arc::new(Notify::new()));
    let told = changed.clone();
    slices.on_event(move |event| {
        if is_of_servers(event.object()) {
            told.notify_one();
        }
    });
    let shared = Arc::new((servers.clone(), slices, changed));
    supervise("servers", move || {
        let shared = shared.clone();
        async move {
            let (servers, slices, changed) = &*shared;
            loop {
                if let Err(error) = servers.learn(urls(slices)) {
                    tracing::warn!("the cluster's servers: {error:#}");
                }
                changed.notified().await;
                tokio::time::sleep(SETTLING).await;
            }
        }
    });
}

fn is_of_servers(slice: &EndpointSlice) -> bool {
    let label = |labels: &std::collections::BTreeMap<String, String>| {
        labels.get("kubernetes.io/service-name").is_some_and(|service| service == "kubernetes")
    };
    slice.metadata.namespace.as_deref() == Some("default")
        && slice.metadata.labels.as_ref().is_some_and(label)
}

/// Where the servers' APIs are, in order.
fn urls(slices: &Informer<EndpointSlice>) -> Vec<String> {
    let mut urls: Vec<String> = Vec::new();
    for slice in slices.list_in("default").iter().filter(|slice| is_of_servers(slice)) {
        let port = slice.ports.iter().flatten().find(|port| port.name.as_deref() == Some("https"));
        let Some(port) = port.and_then(|port| u16::try_from(port.port?).ok()) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            let is_ready = endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
            let addresses = endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok());
            urls.extend(addresses.filter(|_| is_ready).map(|ip| join::url_of(&ip.to_string(), port)));
        }
    }
    urls.sort();
    urls.dedup();
    urls
}

/// The URL with its port, as all are written here.
pub fn normal(url: &str) -> Result<String> {
    let (host, port) = join::address_of(url)?;
    Ok(join::url_of(&host, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn slice(name: &str, service: &str, port: u16, addresses: &[(&str, bool)]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses
            .iter()
            .map(|(ip, ready)| json!({"addresses": [ip], "conditions": {"ready": ready}}))
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "https", "port": port}],
        }))
        .unwrap()
    }

    #[test]
    fn the_endpoints_are_the_servers() {
        let slices = Informer::<EndpointSlice>::detached();
        slices.put(slice("kubernetes", "kubernetes", 6443, &[("10.0.0.2", true), ("10.0.0.1", true)]));
        slices.put(slice("other-port", "kubernetes", 7443, &[("10.0.0.3", true), ("10.0.0.4", false)]));
        slices.put(slice("app", "app", 6443, &[("10.0.0.9", true)]));
        let want = ["https://10.0.0.1:6443", "https://10.0.0.2:6443", "https://10.0.0.3:7443"];
        assert_eq!(urls(&slices), want);
    }

    #[tokio::test(start_paused = true)]
    async fn the_order_to_ask_in() {
        let folder = tempfile::tempdir().unwrap();
        let servers = Servers::of_agent(folder.path(), "https://a").unwrap();
        let order = || servers.order().join(" ").replace("https://", "").replace(":6443", "");
        let live = |names: &[&str]| names.iter().map(|n| format!("https://{n}:6443")).collect();
        assert_eq!((order().as_str(), servers.has_several()), ("a", false));
        servers.learn(live(&["a", "b", "c"])).unwrap();
        assert_eq!((order().as_str(), servers.has_several()), ("a b c", true));
        servers.failed("https://a:6443");
        assert_eq!(order(), "b c a");
        servers.failed("https://c:6443");
        assert_eq!(order(), "b a c");
        tokio::time::advance(AVOIDED).await;
        assert_eq!(order(), "a b c", "not for ever");
        servers.failed("https://a:6443");
        servers.worked("https://a:6443");
        assert_eq!(order(), "a b c");
        servers.learn(live(&["c", "d"])).unwrap();
        assert_eq!(order(), "a c d b", "what was, comes last");
        servers.learn(Vec::new()).unwrap();
        assert_eq!(order(), "a c d b", "no server is no news");
        // the next start knows them, without the one it is told of
        let again = Servers::of_agent(folder.path(), "https://z:7443").unwrap();
        assert_eq!(again.order().len(), 5);
        assert_eq!((again.order()[0].as_str(), again.given()), ("https://z:7443", Some("https://z:7443")));
        std::fs::write(folder.path().join(FILE), r#"{"live": ["nonsense", "https://b:6443"]}"#).unwrap();
        assert_eq!(Servers::of_agent(folder.path(), "https://a").unwrap().order().len(), 2);
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Servers::of_agent(folder.path(), "https://a").unwrap().order().len(), 1);
    }
}
