//! Cluster DNS in every node: answers the cluster's names from memory and forwards the rest.
//!
//! Upstream counterpart: CoreDNS with the kubernetes, forward and cache plugins. Deliberate difference: no pods; the
//! cluster DNS address is an address of every node, so answers need no network and survive the server's absence.
mod upstream;
mod wire;
mod zone;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sampan_client::{Informer, Informers};
use sampan_netlink::Socket;
use sampan_netlink::route::LOOPBACK;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use upstream::Upstream;
use wire::{Query, Reply, Unreadable};
use zone::{Found, Zone};

const PORT: u16 = 53;
const MAX_QUERY_BYTES: usize = 4096;
/// Questions in work at a time, and connections.
const MAX_FORWARDED: usize = 256;
const MAX_CONNECTIONS: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);
/// How far an alias of an alias is followed within the cluster.
const MAX_ALIASES: usize = 8;

/// What cluster DNS must know.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// Put on `lo`, and served at port 53.
    pub cluster_dns: IpAddr,
    /// Served besides.
    pub listen: Vec<SocketAddr>,
    /// The cluster's domain, `cluster.local`.
    pub domain: String,
    /// Where the node's own resolvers stand, usually /etc/resolv.conf.
    pub resolv_conf: PathBuf,
}

pub struct Dns {
    listen: Vec<SocketAddr>,
    cluster_dns: IpAddr,
    zone: Zone,
    upstream: Upstream,
    forwarded: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Dns {
    pub fn new(config: DnsConfig, informers: &Informers) -> Arc<Self> {
        Self::with(config, informers.of::<Service>(), informers.of::<EndpointSlice>())
    }

    /// As [`Self::new`], with the informers to learn from.
    pub fn with(
        config: DnsConfig,
        services: Informer<Service>,
        slices: Informer<EndpointSlice>,
    ) -> Arc<Self> {
        let mut listen = config.listen;
        listen.push((config.cluster_dns, PORT).into());
        let own = listen.iter().map(SocketAddr::ip).collect();
        Arc::new(Self {
            listen,
            cluster_dns: config.cluster_dns,
            zone: Zone::new(&config.domain, services, slices),
            upstream: Upstream::new(config.resolv_conf, own),
            forwarded: Arc::new(Semaphore::new(MAX_FORWARDED)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        })
    }

    /// Serves. Never returns.
    pub async fn run(self: &Arc<Self>) {
        futures::future::join_all(self.listen.iter().map(|address| self.keep_serving(*address))).await;
    }

    async fn keep_serving(self: &Arc<Self>, address: SocketAddr) {
        let mut retry = FIRST_RETRY;
        loop {
            let Err(error) = self.serve(address).await;
            tracing::warn!(%address, %error, "cannot serve cluster DNS, will retry");
            sleep(retry).await;
            retry = (retry * 2).min(MAX_RETRY);
        }
    }

    async fn serve(self: &Arc<Self>, address: SocketAddr) -> io::Result<std::convert::Infallible> {
        if address.ip() == self.cluster_dns {
            let ip = self.cluster_dns;
            let bits = if ip.is_ipv4() { 32 } else { 128 };
            let added = move || Socket::route().and_then(|mut s| s.add_address(LOOPBACK, ip, bits));
            tokio::task::spawn_blocking(added).await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        }
        let socket = Arc::new(UdpSocket::bind(address).await?);
        let listener = TcpListener::bind(address).await?;
        tokio::select! {
            ended = self.serve_udp(socket) => ended,
            ended = self.serve_tcp(listener) => ended,
        }
    }

    async fn serve_udp(self: &Arc<Self>, socket: Arc<UdpSocket>) -> io::Result<std::convert::Infallible> {
        let mut buffer = vec![0; MAX_QUERY_BYTES];
        loop {
            let (count, peer) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // an earlier answer was refused
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            let raw = &buffer[..count];
            let query = match Query::read(raw) {
                Ok(query) => query,
                Err(Unreadable(answer)) => {
                    if let Some(answer) = answer {
                        let _ = socket.send_to(&answer, peer).await;
                    }
                    continue;
                }
            };
            if let Some(reply) = self.at_once(&query) {
                let _ = socket.send_to(&reply.write(&query, query.limit()), peer).await;
                continue;
            }
            // over the bound questions are dropped: the client asks again
            let Ok(permit) = self.forwarded.clone().try_acquire_owned() else { continue };
            let (dns, socket, raw) = (self.clone(), socket.clone(), raw.to_vec());
            tokio::spawn(async move {
                let answer = dns.answer(&query, &raw, false).await;
                let _ = socket.send_to(&answer, peer).await;
                drop(permit);
            });
        }
    }

    async fn serve_tcp(self: &Arc<Self>, listener: TcpListener) -> io::Result<std::convert::Infallible> {
        loop {
            let (stream, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "a connection to cluster DNS failed");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(permit) = self.connections.clone().try_acquire_owned() else { continue };
            let dns = self.clone();
            tokio::spawn(async move {
                let _ = dns.serve_connection(stream).await;
                drop(permit);
            });
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let read = async {
                let length = usize::from(stream.read_u16().await?);
                if length > MAX_QUERY_BYTES {
                    return Err(io::Error::other("a query of that length"));
                }
                let mut raw = vec![0; length];
                stream.read_exact(&mut raw).await?;
                Ok(raw)
            };
            let raw = timeout(IDLE_TIMEOUT, read).await.map_err(io::Error::other)??;
            let answer = match Query::read(&raw) {
                Ok(query) => self.answer(&query, &raw, true).await,
                Err(Unreadable(Some(answer))) => answer,
                Err(Unreadable(None)) => return Ok(()),
            };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let framed = [&length.to_be_bytes()[..], &answer].concat();
            timeout(IDLE_TIMEOUT, stream.write_all(&framed)).await.map_err(io::Error::other)??;
        }
    }

    /// What can be answered without asking others.
    fn at_once(&self, query: &Query) -> Option<Reply> {
        match self.zone.find(&query.name, query.kind) {
            Found::Reply(reply) => Some(reply),
            Found::Elsewhere | Found::Alias { .. } => None,
        }
    }

    async fn answer(&self, query: &Query, raw: &[u8], by_tcp: bool) -> Vec<u8> {
        let limit = if by_tcp { usize::from(u16::MAX) } else { query.limit() };
        match self.zone.find(&query.name, query.kind) {
            Found::Reply(reply) => reply.write(query, limit),
            Found::Elsewhere => match self.upstream.ask(query, raw, by_tcp).await {
                Ok(answer) => answer,
                Err(code) => Reply::failure(code).write(query, limit),
            },
            Found::Alias { alias, target } => {
                self.follow(alias, target, query.kind).await.write(query, limit)
            }
        }
    }

    /// An alias and what it leads to, within the cluster or outside.
    async fn follow(&self, alias: wire::Answer, mut target: Vec<String>, kind: u16) -> Reply {
        let mut reply = Reply { authoritative: true, answers: vec![alias], ..Reply::default() };
        for _ in 0..MAX_ALIASES {
            match self.zone.find(&target, kind) {
                Found::Alias { alias, target: next } => {
                    reply.answers.push(alias);
                    target = next;
                }
                Found::Reply(found) => {
                    reply.answers.extend(found.answers);
                    return reply;
                }
                Found::Elsewhere => {
                    let raw = wire::question(0, &target, kind);
                    if let Ok(query) = Query::read(&raw)
                        && let Ok(answer) = self.upstream.ask(&query, &raw, false).await
                    {
                        reply.answers.extend(wire::chased(&answer));
                    }
                    return reply;
                }
            }
        }
        Reply::failure(wire::SERVER_FAILURE)
    }
}

#[cfg(test)]
mod tests;
