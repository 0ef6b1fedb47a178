//! What this node hands out: the images that it keeps, to other nodes, over the server's tunnel and on a port.
use std::convert::Infallible;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use sampan_image::Registries;
use sampan_kubelet::api::ImageLender;
use sampan_registry::holdings::{Holdings, Lending, Limits};
use sampan_runtime::Node;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::{Membership, PORT, wire};

/// Small boards: this many blobs at a time, and a few that wait for their turn.
const LIMITS: Limits = Limits { streams: 4, waiting: 16, wait: Duration::from_secs(10) };
const CONNECTIONS_MAX: usize = 24;
const HEADERS: Duration = Duration::from_secs(10);

/// The images of this node, as far as they are others' to have.
struct Shelf {
    node: Node,
    registries: Registries,
    enabled: watch::Receiver<bool>,
}

impl Shelf {
    fn shares(&self, registry: &str) -> bool {
        *self.enabled.borrow() && self.registries.shares(registry)
    }
}

impl Holdings for Shelf {
    fn manifest(&self, registry: &str, repository: &str, reference: &str) -> Option<Vec<u8>> {
        self.shares(registry).then(|| self.node.shared_manifest(registry, repository, reference)).flatten()
    }

    fn blob(&self, registry: &str, digest: &str) -> Option<(File, u64)> {
        self.shares(registry).then(|| self.node.shared_blob(registry, digest)).flatten()
    }
}

/// Hands out images while the mirror is on. What is returned answers those who come through the tunnel.
pub fn start(node: Node, registries: Registries, address: IpAddr, membership: &Membership) -> ImageLender {
    let enabled = membership.enabled.clone();
    let shelf = Shelf { node: node.clone(), registries: registries.clone(), enabled };
    let lending = Lending::new(Arc::new(shelf), LIMITS);
    let served = lending.clone();
    let part = Part {
        takes_part: registries.shares_any(),
        archives_kept: *membership.enabled.borrow(),
        node,
        address: SocketAddr::new(address, PORT),
        lending: served,
        membership: membership.clone(),
    };
    sampan_telemetry::supervise("embedded mirror", move || part.clone().follow());
    Arc::new(move |request| {
        let lending = lending.clone();
        Box::pin(lending.answer(request))
    })
}

#[derive(Clone)]
struct Part {
    /// Whether registries.yaml names any registry to share.
    takes_part: bool,
    archives_kept: bool,
    node: Node,
    address: SocketAddr,
    lending: Arc<Lending>,
    membership: Membership,
}

impl Part {
    /// Does what the setting says, and waits for the next.
    async fn follow(mut self) {
        let mut enabled = self.membership.enabled.clone();
        loop {
            let on = *enabled.borrow_and_update();
            if on && !self.takes_part {
                tracing::info!(
                    "the cluster has an embedded registry; registries.yaml lists no mirrors, so this node has no part in it"
                );
            }
            let on = on && self.takes_part;
            if on && !std::mem::replace(&mut self.archives_kept, true) {
                self.node.keep_archives().await;
            }
            let serving = async {
                if on && let Err(error) = serve(self.address, &self.lending, &self.membership).await {
                    tracing::warn!("other nodes get this one's images through the server only: {error:#}");
                }
                std::future::pending::<()>().await;
            };
            let changed = async {
                if enabled.changed().await.is_err() {
                    // nobody changes it any more
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = serving => {}
                () = changed => {}
            }
        }
    }
}

async fn serve(address: SocketAddr, lending: &Arc<Lending>, membership: &Membership) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
    tracing::info!(%address, "other nodes can have this node's images");
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "accepting a node");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let config = wire::server_config(membership.own.clone(), (membership.trust)()?)?;
        let lending = lending.clone();
        tokio::spawn(async move {
            let _place = place;
            let (stream, node) = match wire::accept(&config, stream).await {
                Ok(accepted) => accepted,
                Err(error) => {
                    return tracing::debug!("who asks for images is no node of this cluster: {error:#}");
                }
            };
            let service = service_fn(move |request: Request<Incoming>| {
                let lending = lending.clone();
                async move { Ok::<_, Infallible>(lending.answer(request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(node, %error, "a node's connection broke off");
            }
        });
    }
}
