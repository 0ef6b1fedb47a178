//! The connections that servers reach a node through: one to each server that lives.
//!
//! Upstream counterpart: K3s' pkg/agent/tunnel. What stays true: the server that the owner named is held on to whether the
//! cluster lists it or not; servers that come are connected to, the connections to those that leave end; one that breaks
//! is made anew with back-off. A server says which endpoint it is: the named server may be a load balancer, or an address
//! that only this side of a NAT knows, and is not connected to twice. A server's own node does the same for the other
//! servers; its own server reaches it in memory.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use futures::future::BoxFuture;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use sampan_client::Informers;
use sampan_drivers::tunnel::Stream;
use sampan_pki::LiveCertificate;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::servers::{self, Servers};
use crate::join;
use crate::mirror;
use crate::node::KubeletApi;
use crate::tunnel_endpoint::SERVER;

const FIRST_DELAY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(15);
/// For connection, TLS and the server's answer.
const CONNECT: Duration = Duration::from_secs(15);

/// Serves the kubelet's API on one stream.
pub type Kubelet = Arc<dyn Fn(Box<dyn Stream>) -> BoxFuture<'static, ()> + Send + Sync>;

/// How a node shows servers what it is, and what it does for them.
pub struct Tunnels {
    pub servers: Arc<Servers>,
    /// Whom to believe that they are servers, PEM, as it is now.
    pub trusted: Box<dyn Fn() -> String + Send + Sync>,
    pub own: Arc<LiveCertificate>,
    pub kubelet: Kubelet,
    /// Follows what servers say of the mirror; a server's own node knows already.
    pub setting: Option<Arc<mirror::Setting>>,
    /// The server that this process is, as the cluster lists it.
    pub myself: Option<String>,
}

/// What a server's own node needs to be reached by the other servers.
pub struct Others {
    /// Where this server's API is, as the cluster lists it.
    pub myself: std::net::SocketAddr,
    pub own: Arc<LiveCertificate>,
    pub trusted: Box<dyn Fn() -> String + Send + Sync>,
}

/// The node's own.
pub fn kubelet(api: &KubeletApi) -> Kubelet {
    let api = api.clone();
    Arc::new(move |stream| Box::pin(api.clone().serve(stream)))
}

/// Has the other servers reach this server's node, as they come and go.
pub fn of_server(others: Others, api: &KubeletApi, informers: &Informers) {
    let servers = Servers::of_server();
    servers::follow(&servers, informers);
    let Others { myself, own, trusted } = others;
    let myself = Some(join::url_of(&myself.ip().to_string(), myself.port()));
    let tunnels = Arc::new(Tunnels { servers, trusted, own, kubelet: kubelet(api), setting: None, myself });
    sampan_telemetry::supervise("tunnels", move || tunnels.clone().keep());
}

impl Tunnels {
    /// Holds them for as long as it is polled.
    pub async fn keep(self: Arc<Self>) {
        let mut known = self.servers.known();
        // the endpoint that the named server turned out to be
        let (leads_to, mut led) = watch::channel(None::<String>);
        let leads_to = Arc::new(leads_to);
        let mut tasks = JoinSet::new();
        let mut held = HashMap::<String, AbortHandle>::new();
        loop {
            let wanted = self.wanted(&known.borrow_and_update().live, led.borrow_and_update().as_deref());
            held.retain(|url, task| {
                let stays = wanted.contains(url) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            for url in wanted {
                held.entry(url.clone())
                    .or_insert_with(|| tasks.spawn(self.clone().hold(url, leads_to.clone())));
            }
            tokio::select! {
                changed = known.changed() => if changed.is_err() { return },
                changed = led.changed() => if changed.is_err() { return },
                Some(ended) = tasks.join_next() => if let Err(error) = ended && error.is_panic() {
                    tracing::error!("a tunnel panicked: {error}");
                    tokio::time::sleep(FIRST_DELAY).await;
                },
            }
        }
    }

    /// Which to hold, while the named server is the endpoint `led`.
    fn wanted(&self, live: &[String], led: Option<&str>) -> HashSet<String> {
        let given = self.servers.given();
        let is_held =
            |url: &&String| Some(url.as_str()) != self.myself.as_deref() && Some(url.as_str()) != led;
        let others = live.iter().filter(is_held).map(String::as_str);
        given.into_iter().chain(others).map(str::to_string).collect()
    }

    /// One tunnel, for ever.
    async fn hold(self: Arc<Self>, url: String, leads_to: Arc<watch::Sender<Option<String>>>) {
        let mut delay = FIRST_DELAY;
        loop {
            let connecting = tokio::time::timeout(CONNECT, self.connect(&url));
            let error = match connecting.await {
                Ok(Ok((server, stream))) => {
                    delay = FIRST_DELAY;
                    let is_given = self.servers.given() == Some(url.as_str());
                    let _led = is_given.then(|| Led::new(&leads_to, server.filter(|server| *server != url)));
                    let kubelet = self.kubelet.clone();
                    let serve = sampan_tunnel::serve(TokioIo::new(stream), move |s| kubelet(s));
                    serve.await.err().map(anyhow::Error::from)
                }
                Ok(Err(error)) => Some(error),
                Err(_) => Some(anyhow::anyhow!("no answer within {} s", CONNECT.as_secs())),
            };
            match error {
                // one that stays away is told of a few times, not for ever
                Some(error) if delay < MAX_DELAY => tracing::warn!(
                    "server {url} cannot reach this node: {error:#}; trying again in {} ms",
                    delay.as_millis()
                ),
                Some(error) => tracing::debug!("server {url} cannot reach this node: {error:#}"),
                None => {}
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(MAX_DELAY);
        }
    }

    /// The upgraded connection, and which endpoint the server says that it is.
    async fn connect(&self, url: &str) -> Result<(Option<String>, Upgraded)> {
        let trusted = (self.trusted)();
        let stream = join::connect(url, Some(&trusted), Some(self.own.clone()), Some(b"http/1.1")).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let (host, port) = join::address_of(url)?;
        let request = Request::get(sampan_tunnel::PATH)
            .header(header::HOST, format!("{host}:{port}"))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, sampan_tunnel::PROTOCOL)
            .body(Empty::<bytes::Bytes>::new())?;
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            bail!("it answered {} to the tunnel", response.status());
        }
        if let Some(setting) = &self.setting {
            setting.hear(response.headers())?;
        }
        let server = response.headers().get(SERVER).and_then(|server| server.to_str().ok());
        let server = server.and_then(|server| servers::normal(server).ok());
        Ok((server, hyper::upgrade::on(response).await?))
    }
}

/// The named server is known to be that endpoint, for as long as this lives.
struct Led<'a>(&'a watch::Sender<Option<String>>);

impl<'a> Led<'a> {
    fn new(leads_to: &'a watch::Sender<Option<String>>, server: Option<String>) -> Self {
        leads_to.send_if_modified(|led| std::mem::replace(led, server.clone()) != server);
        Self(leads_to)
    }
}

impl Drop for Led<'_> {
    fn drop(&mut self) {
        self.0.send_if_modified(|led| led.take().is_some());
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::SocketAddr;

    use bytes::Bytes;
    use http::{HeaderValue, Response};
    use http_body_util::{BodyExt, Full};
    use sampan_drivers::{Dialer, Target};
    use sampan_pki::Authority;
    use sampan_tunnel::Nodes;

    use super::*;

    /// What servers answer nodes with, and nothing else of them.
    struct Server {
        nodes: Arc<Nodes>,
        address: SocketAddr,
        task: tokio::task::JoinHandle<()>,
    }

    impl Server {
        async fn start(authority: &Authority, address: &str) -> Self {
            let names = ["localhost".to_string(), "127.0.0.1".to_string(), "127.0.0.2".to_string()];
            let pair = authority.server("test", &names).unwrap();
            let config = sampan_pki::tls::server_config(LiveCertificate::new(&pair).unwrap()).unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let address = listener.local_addr().unwrap();
            let nodes = Arc::<Nodes>::default();
            let held = nodes.clone();
            let task = tokio::spawn(async move {
                // its connections end with it
                let mut connections = JoinSet::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (acceptor, nodes) = (acceptor.clone(), held.clone());
                    connections.spawn(async move {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        let (upgraded, mut upgrades) = tokio::sync::mpsc::unbounded_channel();
                        let service = hyper::service::service_fn(move |request| {
                            upgraded.send(hyper::upgrade::on(request)).unwrap();
                            let mut response = Response::new(Full::<Bytes>::default());
                            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                            let headers = response.headers_mut();
                            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                            headers
                                .insert(header::UPGRADE, HeaderValue::from_static(sampan_tunnel::PROTOCOL));
                            headers.insert(SERVER, url(address).parse().unwrap());
                            async { Ok::<_, Infallible>(response) }
                        });
                        let http1 = hyper::server::conn::http1::Builder::new();
                        let _ = http1.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
                        if let Some(upgrade) = upgrades.recv().await {
                            nodes.hold("n", TokioIo::new(upgrade.await.unwrap())).await;
                        }
                    });
                }
            });
            Self { nodes, address, task }
        }

        /// Waits until it reaches the node, or does not any more.
        async fn reaches(&self, want: bool) {
            let seen = async {
                while (self.nodes.names() == ["n"]) != want {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), seen).await.unwrap();
        }

        /// Asks the node's kubelet for its answer over a connection that ends with it, and reads that slowly.
        async fn ask(&self) -> usize {
            let stream = self.nodes.dial("n", Target::Kubelet).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let request = Request::get("/").header("host", "n").header("connection", "close");
            let answer = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
            let (mut got, mut body) = (0, answer.into_body());
            while let Some(frame) = body.frame().await {
                got += frame.unwrap_or_else(|e| panic!("after {got} bytes: {e}")).into_data().unwrap().len();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            got
        }
    }

    fn url(address: SocketAddr) -> String {
        join::url_of(&address.ip().to_string(), address.port())
    }

    const LARGE: usize = 6 << 20;

    fn large_answers() -> Kubelet {
        Arc::new(|stream| {
            Box::pin(async move {
                let service = hyper::service::service_fn(|_| async {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![7; LARGE]))))
                });
                let http1 = hyper::server::conn::http1::Builder::new();
                let _ = http1.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
            })
        })
    }

    #[tokio::test]
    async fn a_tunnel_to_each_server_that_lives() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let a = Server::start(&authority, "127.0.0.1:0").await;
        let mut b = Server::start(&authority, "127.0.0.2:0").await;
        // the owner knows the first by another name than the cluster
        let given = format!("https://localhost:{}", a.address.port());
        let servers = Servers::of_agent(folder.path(), &given).unwrap();
        let trusted = authority.certificate_pem().to_string();
        let pair = authority.client("system:node:n", &["system:nodes"]).unwrap();
        let tunnels = Arc::new(Tunnels {
            servers: servers.clone(),
            trusted: Box::new(move || trusted.clone()),
            own: LiveCertificate::new(&pair).unwrap(),
            kubelet: large_answers(),
            setting: None,
            myself: None,
        });
        let keeping = tokio::spawn(tunnels.clone().keep());
        a.reaches(true).await;
        servers.learn(vec![url(a.address), url(b.address)]).unwrap();
        b.reaches(true).await;
        a.reaches(true).await;
        assert_eq!((a.ask().await, b.ask().await), (LARGE, LARGE));
        servers.learn(vec![url(a.address)]).unwrap();
        b.reaches(false).await;
        servers.learn(vec![url(a.address), url(b.address)]).unwrap();
        b.reaches(true).await;
        // it dies, and comes back in the same place
        b.task.abort();
        b.reaches(false).await;
        b = Server::start(&authority, &b.address.to_string()).await;
        b.reaches(true).await;
        assert_eq!((a.ask().await, b.ask().await), (LARGE, LARGE));
        keeping.abort();
        a.reaches(false).await;
        b.reaches(false).await;
    }

    #[test]
    fn which_tunnels_are_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let pair = authority.client("system:node:n", &["system:nodes"]).unwrap();
        let tunnels = |servers, myself: Option<&str>| Tunnels {
            servers,
            trusted: Box::new(String::new),
            own: LiveCertificate::new(&pair).unwrap(),
            kubelet: large_answers(),
            setting: None,
            myself: myself.map(full),
        };
        fn full(name: &str) -> String {
            format!("https://{name}:6443")
        }
        let agent = tunnels(Servers::of_agent(folder.path(), "https://lb").unwrap(), None);
        let server = tunnels(Servers::of_server(), Some("a"));
        for (who, live, led, want) in [
            (&agent, &[][..], None, &["lb"][..]),
            (&agent, &["a", "b"], None, &["lb", "a", "b"]),
            (&agent, &["a", "b"], Some("a"), &["lb", "b"]),
            (&agent, &["a", "lb"], None, &["lb", "a"]),
            (&server, &[], None, &[]),
            (&server, &["a"], None, &[]),
            (&server, &["a", "b", "c"], None, &["b", "c"]),
        ] {
            let live: Vec<String> = live.iter().map(|name| full(name)).collect();
            let want: HashSet<String> = want.iter().map(|name| full(name)).collect();
            assert_eq!(who.wanted(&live, led.map(full).as_deref()), want);
        }
    }
}
