//! The server's part: who has an image, and a way to it for nodes that can't reach each other.
//!
//! What stays true: only nodes are answered, and only with manifests and blobs; no content is looked at here. Nodes are
//! asked anew each time, a few at once: what `status.images` says is up to fifty names and some seconds old.
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use futures::StreamExt;
use http::request::Parts;
use http::{Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use parking_lot::Mutex;
use sampan_apiserver::{Body, Status, body};
use sampan_drivers::{Dialer, Target};
use sampan_image::{Mirror, Registries};
use sampan_registry::holdings::is_read;
use tokio::sync::{Semaphore, watch};

use crate::certificate::server::ServerCertificates;

use super::{Holder, Membership, PATH, Peers, Rendezvous, Verifier, ask};

/// Nodes asked at the same time.
const ASKED_AT_ONCE: usize = 8;
/// More who have it are not looked for.
const HOLDERS_MAX: usize = 3;
/// For one node's answer, and for all.
const ONE: Duration = Duration::from_secs(2);
const ALL: Duration = Duration::from_secs(6);
/// Blobs on their way through this server.
const RELAYS_MAX: usize = 8;
/// Images whose holders are remembered, to be asked first.
const REMEMBERED_MAX: usize = 64;

pub struct Directory {
    nodes: Arc<sampan_tunnel::Nodes>,
    client: kube::Client,
    /// By image: who had something of it last.
    remembered: Mutex<HashMap<String, Vec<String>>>,
    relays: Arc<Semaphore>,
}

impl Directory {
    /// `client` must be allowed to read nodes.
    pub fn new(nodes: Arc<sampan_tunnel::Nodes>, client: kube::Client) -> Arc<Self> {
        let relays = Arc::new(Semaphore::new(RELAYS_MAX));
        Arc::new(Self { nodes, client, remembered: Mutex::default(), relays })
    }

    /// Answers a node.
    pub async fn answer(&self, node: &str, parts: &Parts) -> Result<Response<Body>, Status> {
        let uri = parts.uri.path_and_query().map_or("", |p| p.as_str());
        let asked = uri.strip_prefix(PATH).and_then(Asked::parse);
        match asked.filter(|_| parts.method == Method::GET) {
            Some(Asked::Holders { uri }) => {
                let holders = self.holders(Some(node), uri).await;
                let text = serde_json::to_vec(&holders).map_err(|e| Status::internal(e.to_string()))?;
                Ok(Response::new(body::full(text)))
            }
            Some(Asked::Of { node, uri }) => self.relay(node, uri, &parts.headers).await,
            None => Err(Status::bad_request(format!("{}: no image is named so", parts.uri.path()))),
        }
    }

    /// Connected nodes but `asker` that have it.
    async fn holders(&self, asker: Option<&str>, uri: &str) -> Vec<Holder> {
        let image = uri.split(['?']).next().unwrap_or(uri).rsplitn(3, '/').last().unwrap_or(uri).to_string();
        let names = self.in_order(&image, asker);
        let mut answers = futures::stream::iter(names)
            .map(|name| async move { self.has(&name, uri).await.then_some(name) })
            .buffer_unordered(ASKED_AT_ONCE);
        let mut found: Vec<String> = Vec::new();
        let asking = async {
            while let Some(answer) = answers.next().await {
                found.extend(answer);
                if found.len() >= HOLDERS_MAX {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(ALL, asking).await;
        drop(answers);
        if !found.is_empty() {
            let mut remembered = self.remembered.lock();
            if remembered.len() >= REMEMBERED_MAX {
                remembered.clear();
            }
            remembered.insert(image, found.clone());
        }
        let mut holders = Vec::new();
        for node in found {
            let address = self.address(&node).await;
            holders.push(Holder { node, address });
        }
        holders
    }

    /// Those that had something of the image first, the others by chance, so that no node serves all.
    fn in_order(&self, image: &str, asker: Option<&str>) -> Vec<String> {
        let first = self.remembered.lock().get(image).cloned().unwrap_or_default();
        let mut names = self.nodes.names();
        names.retain(|name| Some(name.as_str()) != asker);
        names.sort_by_cached_key(|name| (!first.contains(name), sampan_world::random::u64()));
        names
    }

    async fn has(&self, node: &str, uri: &str) -> bool {
        let asking = async {
            let stream = self.nodes.dial(node, Target::Kubelet).await?;
            anyhow::Ok(ask(stream, node, Method::HEAD, uri, 0).await?.status())
        };
        matches!(tokio::time::timeout(ONE, asking).await, Ok(Ok(StatusCode::OK)))
    }

    async fn address(&self, node: &str) -> Option<IpAddr> {
        let found = Api::<Node>::all(self.client.clone()).get_opt(node).await.ok()??;
        let addresses = found.status?.addresses?;
        addresses.iter().find(|a| a.type_ == "InternalIP")?.address.parse().ok()
    }

    async fn get(&self, node: &str, uri: &str, offset: u64) -> Result<Response<Incoming>> {
        let stream = self.nodes.dial(node, Target::Kubelet).await?;
        ask(stream, node, Method::GET, uri, offset).await
    }

    /// What another node has, passed on as it comes.
    async fn relay(
        &self,
        node: &str,
        uri: &str,
        headers: &http::HeaderMap,
    ) -> Result<Response<Body>, Status> {
        let Ok(permit) = self.relays.clone().try_acquire_owned() else {
            return Err(Status::unavailable("this server hands on as much as it may already"));
        };
        let answer = self.get(node, uri, offset_of(headers)).await;
        let response = answer.map_err(|e| Status::unavailable(format!("node {node}: {e:#}")))?;
        let (mut parts, body) = response.into_parts();
        for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
            parts.headers.remove(name);
        }
        // the permit goes with the body, however that ends
        let body = body.map_frame(move |frame| {
            let _ = &permit;
            frame
        });
        Ok(Response::from_parts(parts, body.map_err(Into::into).boxed_unsync()))
    }
}

/// Where `Range: bytes=N-` begins.
fn offset_of(headers: &http::HeaderMap) -> u64 {
    let range = headers.get(header::RANGE).and_then(|v| v.to_str().ok());
    let first = range.and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.strip_suffix('-'));
    first.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// What a node asks for, below [`PATH`].
#[derive(Debug, PartialEq, Eq)]
enum Asked<'a> {
    Holders { uri: &'a str },
    Of { node: &'a str, uri: &'a str },
}

impl<'a> Asked<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (asked, uri) = match text.strip_prefix("holders") {
            Some(uri) => (None, uri),
            None => {
                let rest = text.strip_prefix("nodes/")?;
                let (node, uri) = rest.split_at(rest.find('/')?);
                (Some(node), uri)
            }
        };
        let path = uri.split('?').next().unwrap_or("");
        if !is_read(&Method::GET, path) {
            return None;
        }
        Some(match asked {
            None => Asked::Holders { uri },
            Some(node) => Asked::Of { node, uri },
        })
    }
}

/// The part of the server's own node.
pub fn of_server(
    directory: Arc<Directory>,
    name: String,
    certificates: &Arc<ServerCertificates>,
) -> Result<Membership> {
    let own = certificates.node().context("this server runs no node")?;
    let certificates = certificates.clone();
    Ok(Membership {
        enabled: watch::channel(true).1,
        rendezvous: Arc::new(Local { directory, asker: Some(name) }),
        own,
        trust: Arc::new(move || -> Result<Verifier> {
            Ok(sampan_pki::tls::client_verifier(certificates.authority().trusted())?)
        }),
    })
}

/// For the server itself, which only wants to know what images are.
pub fn through_tunnels(directory: &Arc<Directory>, registries: &Registries) -> Arc<dyn Mirror> {
    let rendezvous = Arc::new(Local { directory: directory.clone(), asker: None });
    Arc::new(Peers::through_tunnels(registries.clone(), watch::channel(true).1, rendezvous))
}

/// The directory for the server's own node and for the server itself, without a detour over the network.
struct Local {
    directory: Arc<Directory>,
    asker: Option<String>,
}

#[async_trait]
impl Rendezvous for Local {
    async fn holders(&self, uri: &str) -> Result<Vec<Holder>> {
        Ok(self.directory.holders(self.asker.as_deref(), uri).await)
    }

    async fn get(&self, node: &str, uri: &str, offset: u64) -> Result<Response<Incoming>> {
        self.directory.get(node, uri, offset).await.with_context(|| format!("node {node}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_ask_for_images_and_nothing_else() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let manifest = "/v2/library/x/manifests/1?ns=docker.io";
        let blob = format!("/v2/library/x/blobs/{digest}?ns=docker.io");
        let parse = |text: &str| Asked::parse(text).map(|a| format!("{a:?}"));
        let is = |asked: Asked<'_>| Some(format!("{asked:?}"));
        assert_eq!(parse(&format!("holders{manifest}")), is(Asked::Holders { uri: manifest }));
        assert_eq!(parse(&format!("nodes/n1{blob}")), is(Asked::Of { node: "n1", uri: &blob }));
        for bad in [
            "holders/pods",
            "nodes/n1/exec/default/p/c?command=sh",
            "nodes/n1/v2/",
            "nodes/n1/v2/_catalog",
            "nodes/n1/v2/x/blobs/uploads/",
            "nodes/n1/v2/../exec/x/manifests/y/../../z",
            "nodes/n1",
            "holders",
            "",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn transfers_go_on_from_an_offset() {
        for (range, wanted) in [("bytes=5-", 5), ("bytes=5-9", 0), ("lines=5-", 0), ("", 0)] {
            let mut headers = http::HeaderMap::new();
            headers.insert(header::RANGE, range.parse().unwrap());
            assert_eq!(offset_of(&headers), wanted, "{range}");
        }
    }
}
