//! The Kubernetes client of an agent: one HTTP/2 connection to one of its servers carries every request and watch.
//!
//! Upstream counterparts: client-go's transport (HTTP/2 with ReadIdleTimeout 30 s and PingTimeout 15 s), K3s' load balancer
//! of the agent. What stays true: a wire that was cut is noticed by a ping, not by TCP's retransmissions, so watches begin
//! anew within 45 s, and sooner where there is another server to turn to; a server that takes no connection is passed over
//! at once. What may have been executed is never sent again here: who asked decides. After the certificate was renewed new
//! requests go over a new connection, and the old one ends with the last of its watches. Deliberately different: kubelet
//! cuts the old connections.
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http::{Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::client::Body;
use kube::client::middleware::BaseUriLayer;
use parking_lot::Mutex;
use sampan_pki::LiveCertificate;
use sampan_world::clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tower::{BoxError, Service, ServiceBuilder, service_fn};

use crate::join::Membership;

/// How often an idle server is asked whether it lives, and how long it may take to say so.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(15));
/// The same where there is another server.
const PING_ONE_OF_SEVERAL: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// So many errors of its own in a row, and a server is left for another, at most once in so long.
const TROUBLE: u32 = 8;
const LEFT_AT_MOST: Duration = Duration::from_secs(60);

/// The connections to the server, and what they say of the node's certificate.
pub struct Transport {
    connector: Connector,
    current: RwLock<Client<Connector, Body>>,
    on_refused: Box<dyn Fn() + Send + Sync>,
    /// Errors of the server's since its last good answer.
    errors: AtomicU32,
    left: Mutex<Option<tokio::time::Instant>>,
}

impl Transport {
    /// `on_refused` is called when the server does not accept the node's certificate.
    pub fn new(
        membership: Arc<Membership>,
        own: Arc<LiveCertificate>,
        on_refused: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let mut known = membership.servers.known();
        let is_alone = !membership.servers.has_several();
        let connector = Connector { membership, own };
        let current = RwLock::new(connections(connector.clone()));
        let on_refused = Box::new(on_refused);
        let (errors, left) = (AtomicU32::default(), Mutex::default());
        let this = Arc::new(Self { connector, current, on_refused, errors, left });
        if is_alone {
            let later = Arc::downgrade(&this);
            tokio::spawn(async move {
                let several = known.wait_for(|known| known.live.len() > 1).await.is_ok();
                if let Some(this) = later.upgrade().filter(|_| several) {
                    // another server came: from now on a dead one is to be noticed sooner
                    this.connect_anew();
                }
            });
        }
        this
    }

    pub fn client(self: &Arc<Self>) -> Result<kube::Client> {
        let base: Uri = self.connector.membership.server.parse()?;
        let transport = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let transport = transport.clone();
            async move {
                let client = transport.current.read().unwrap_or_else(PoisonError::into_inner).clone();
                let response = client.request(request).await.map_err(BoxError::from)?;
                transport.judge(response.status());
                Ok::<_, BoxError>(response)
            }
        });
        let service = ServiceBuilder::new().layer(BaseUriLayer::new(base)).service(service);
        Ok(kube::Client::new(service, "default"))
    }

    fn judge(&self, status: StatusCode) {
        match status {
            StatusCode::UNAUTHORIZED => (self.on_refused)(),
            StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                if self.errors.fetch_add(1, Ordering::Relaxed) + 1 >= TROUBLE {
                    self.leave();
                }
                return;
            }
            _ => {}
        }
        self.errors.store(0, Ordering::Relaxed);
    }

    /// Turns to another server, when there is one: this one answers, but can do nothing.
    fn leave(&self) {
        let servers = &self.connector.membership.servers;
        let mut left = self.left.lock();
        if !servers.has_several() || left.is_some_and(|at| at.elapsed() < LEFT_AT_MOST) {
            return;
        }
        let Some(present) = servers.current().borrow().clone() else { return };
        tracing::warn!(server = present, "the server has had errors only; turning to another");
        *left = Some(clock::monotonic());
        self.errors.store(0, Ordering::Relaxed);
        servers.failed(&present);
        self.connect_anew();
    }

    /// Has new requests go over a new connection, which presents the present certificate.
    pub fn connect_anew(&self) {
        let next = connections(self.connector.clone());
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
    }
}

fn connections(connector: Connector) -> Client<Connector, Body> {
    let several = connector.membership.servers.has_several();
    let (interval, timeout) = if several { PING_ONE_OF_SEVERAL } else { PING };
    Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .http2_keep_alive_interval(interval)
        .http2_keep_alive_timeout(timeout)
        .build(connector)
}

#[derive(Clone)]
struct Connector {
    membership: Arc<Membership>,
    own: Arc<LiveCertificate>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Wire>;
    // anyhow's errors are no std errors
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    /// The address says which cluster; which of its servers, is decided here.
    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { membership, own } = self.clone();
        Box::pin(async move { Ok(TokioIo::new(Wire(membership.connect(own, b"h2").await?))) })
    }
}

/// A TLS stream that tells the connection pool what it is.
pub struct Wire(TlsStream<TcpStream>);

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new().negotiated_h2()
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::AtomicBool;

    use http::Response;
    use http_body_util::Full;
    use sampan_pki::Authority;

    use super::*;
    use crate::agent::servers::Servers;
    use crate::join::{self, Cluster};

    /// A server that tells its name, or holds its answer back for ever.
    struct Server {
        url: String,
        asked: Arc<AtomicU32>,
        is_stuck: Arc<AtomicBool>,
        is_broken: Arc<AtomicBool>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Server {
        async fn start(authority: &Authority, name: &'static str, ip: &str) -> Self {
            let pair = authority.server(name, &[ip.to_string()]).unwrap();
            let mut config = sampan_pki::tls::server_config(LiveCertificate::new(&pair).unwrap()).unwrap();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            let at: SocketAddr = format!("{ip}:0").parse().unwrap();
            let listener = tokio::net::TcpListener::bind(at).await.unwrap();
            let url = join::url_of(ip, listener.local_addr().unwrap().port());
            let asked = Arc::<AtomicU32>::default();
            let [is_stuck, is_broken] = [(); 2].map(|()| Arc::<AtomicBool>::default());
            let shared = (asked.clone(), is_stuck.clone(), is_broken.clone());
            let task = tokio::spawn(async move {
                // its connections end with it
                let mut connections = tokio::task::JoinSet::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (acceptor, shared) = (acceptor.clone(), shared.clone());
                    connections.spawn(async move {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        let service = hyper::service::service_fn(move |_| answer(name, shared.clone()));
                        let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = http2.serve_connection(TokioIo::new(stream), service).await;
                    });
                }
            });
            Self { url, asked, is_stuck, is_broken, task }
        }
    }

    type State = (Arc<AtomicU32>, Arc<AtomicBool>, Arc<AtomicBool>);

    async fn answer(
        name: &'static str,
        (asked, is_stuck, is_broken): State,
    ) -> Result<Response<Full<bytes::Bytes>>, std::convert::Infallible> {
        asked.fetch_add(1, Ordering::SeqCst);
        if is_stuck.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let status = if is_broken.load(Ordering::SeqCst) { 503 } else { 200 };
        let mut response = Response::new(Full::new(name.into()));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        Ok(response)
    }

    async fn ask(client: &kube::Client) -> Result<String, String> {
        let request = Request::get("/version").body(Vec::new()).unwrap();
        let asking = tokio::time::timeout(Duration::from_secs(20), client.request_text(request));
        asking.await.map_err(|_| "no answer".to_string())?.map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn another_server_takes_over() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(folder.path()).unwrap();
        let a = Server::start(&authority, "a", "127.0.0.1").await;
        let b = Server::start(&authority, "b", "127.0.0.2").await;
        let kept = serde_json::json!({"live": [a.url, b.url]});
        std::fs::write(folder.path().join("servers.json"), kept.to_string()).unwrap();
        let servers = Servers::of_agent(folder.path(), &a.url).unwrap();
        let cluster = serde_json::from_value::<Cluster>(serde_json::json!({
            "clusterCidr": "", "serviceCidr": "", "clusterDns": "", "clusterDomain": ""
        }));
        let trusted = authority.certificate_pem().to_string();
        let membership = Membership::new(servers.clone(), "n", cluster.unwrap(), trusted);
        let pair = authority.client("system:node:n", &["system:nodes"]).unwrap();
        let own = LiveCertificate::new(&pair).unwrap();
        let client = Transport::new(Arc::new(membership), own, || {}).client().unwrap();

        assert_eq!(ask(&client).await.unwrap(), "a");
        // what was under way when the server died is its caller's to ask again
        a.is_stuck.store(true, Ordering::SeqCst);
        let asking = tokio::spawn({
            let client = client.clone();
            async move { ask(&client).await }
        });
        while a.asked.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        a.task.abort();
        asking.await.unwrap().unwrap_err();
        assert_eq!(
            b.asked.load(Ordering::SeqCst),
            0,
            "a request that may have been executed is not repeated"
        );
        assert_eq!(ask(&client).await.unwrap(), "b");
        assert_eq!(servers.current().borrow().as_deref(), Some(b.url.as_str()));
        assert_eq!(servers.order(), [b.url.clone(), a.url.clone()]);

        // one that answers, but with errors only, is left for one that comes
        let c = Server::start(&authority, "c", "127.0.0.3").await;
        let kept = serde_json::json!({"live": [b.url, c.url]});
        std::fs::write(folder.path().join("servers.json"), kept.to_string()).unwrap();
        let servers = Servers::of_agent(folder.path(), &b.url).unwrap();
        let cluster = serde_json::from_value::<Cluster>(serde_json::json!({
            "clusterCidr": "", "serviceCidr": "", "clusterDns": "", "clusterDomain": ""
        }));
        let trusted = authority.certificate_pem().to_string();
        let membership = Membership::new(servers, "n", cluster.unwrap(), trusted);
        let own = LiveCertificate::new(&pair).unwrap();
        let client = Transport::new(Arc::new(membership), own, || {}).client().unwrap();
        b.is_broken.store(true, Ordering::SeqCst);
        for _ in 0..TROUBLE {
            ask(&client).await.unwrap_err();
        }
        assert_eq!(ask(&client).await.unwrap(), "c");
    }
}
