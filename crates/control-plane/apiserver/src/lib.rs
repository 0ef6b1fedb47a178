//! The API server: one handler for callers from the network and from memory.
//!
//! Upstream counterparts: k8s.io/apiserver, pkg/controlplane, pkg/registry. A request passes, in this order: audit id,
//! in-flight limits, authentication, impersonation, authorization, routing, the verb. See [`handler`].
pub mod access;
pub mod admission_chain;
pub mod admit;
pub mod authn;
pub mod authz;
pub mod body;
pub mod bootstrap;
pub mod cache;
pub mod call;
pub mod certificates;
pub mod codec;
pub mod config;
pub mod convert;
pub mod discovery;
pub mod events_ttl;
pub mod handler;
pub mod http_server;
pub mod identity_lease;
pub mod managed;
pub mod metrics;
pub mod negotiate;
pub mod nonresource;
pub mod openapi;
pub mod proxy;
pub mod query;
pub mod registry;
pub mod reply;
pub mod request_info;
pub mod resource_version;
pub mod rest;
pub mod selector;
pub mod service_ip;
pub mod status;
pub mod storage;
pub mod table;
pub mod write;

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use http::{Request, Response};
use http_body_util::BodyExt;
use sampan_client::{Identity, in_process};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::{service_fn, util::BoxCloneSyncService};

pub use access::{Authenticator, Authorizer, PeerCertificates, Reviews};
pub use admit::Admission;
pub use body::Body;
pub use config::Config;
pub use status::Status;

use crate::cache::Caches;
use crate::registry::Registry;

/// What all requests share.
pub struct Server {
    pub config: Config,
    pub registry: Registry,
    pub caches: Arc<Caches>,
    pub authenticator: OnceLock<Arc<dyn Authenticator>>,
    pub authorizer: OnceLock<Arc<dyn Authorizer>>,
    pub admission: OnceLock<Arc<dyn Admission>>,
    pub reviews: OnceLock<Arc<dyn Reviews>>,
    /// One service at a time is given addresses and ports.
    pub service_lock: Arc<tokio::sync::Mutex<()>>,
    pub reads: Arc<Semaphore>,
    pub writes: Arc<Semaphore>,
    pub metrics: metrics::Metrics,
    /// Cancelled when the server goes down: watches end, `/readyz` fails.
    pub shutdown: CancellationToken,
    /// Default namespaces, priority classes and the `kubernetes` service are there.
    pub bootstrapped: OnceLock<()>,
}

/// The API server. Clones are the same one.
#[derive(Clone)]
pub struct ApiServer {
    server: Arc<Server>,
}

impl ApiServer {
    /// A server over the store. It serves callers in memory who are `system:masters` at once, everybody else once
    /// [`Self::install_authentication`] and [`Self::install_authorization`] were called.
    pub async fn new(config: Config) -> Result<Self, sampan_store::StoreError> {
        let caches = Caches::start(config.store.clone()).await?;
        let server = Arc::new(Server {
            registry: Registry::built_in(),
            caches,
            authenticator: OnceLock::new(),
            authorizer: OnceLock::new(),
            admission: OnceLock::new(),
            reviews: OnceLock::new(),
            service_lock: Arc::default(),
            reads: Arc::new(Semaphore::new(config.reads_max)),
            writes: Arc::new(Semaphore::new(config.writes_max)),
            metrics: metrics::Metrics::default(),
            shutdown: CancellationToken::new(),
            bootstrapped: OnceLock::new(),
            config,
        });
        tokio::spawn(events_ttl::run(Arc::downgrade(&server)));
        Ok(Self { server })
    }

    /// Who calls from the network. The first call counts.
    pub fn install_authentication(&self, authenticator: Arc<dyn Authenticator>) {
        drop(self.server.authenticator.set(authenticator));
    }

    /// What callers may do. The first call counts.
    pub fn install_authorization(&self, authorizer: Arc<dyn Authorizer>) {
        drop(self.server.authorizer.set(authorizer));
    }

    /// The admission chain. The first call counts; before it writes are admitted as they are.
    pub fn install_admission(&self, admission: Arc<dyn Admission>) {
        drop(self.server.admission.set(admission));
    }

    /// Token and access reviews and service account tokens. The first call counts.
    pub fn install_reviews(&self, reviews: Arc<dyn Reviews>) {
        drop(self.server.reviews.set(reviews));
    }

    /// The router for callers in this process; see [`sampan_client::in_process::client`].
    pub fn router(&self) -> in_process::Router {
        let server = self.server.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move {
                let request =
                    request.map(|body| body.map_err(|e| Box::new(e) as body::BoxError).boxed_unsync());
                Ok::<Response<Body>, Infallible>(handler::handle(server, request).await)
            }
        }))
    }

    /// A client that calls this server in memory.
    pub fn client(&self, identity: Identity, user_agent: &'static str) -> kube::Client {
        in_process::client(self.router(), identity, user_agent)
    }

    /// Makes sure of the default namespaces, the system priority classes and the `kubernetes` service.
    pub async fn bootstrap(&self) -> status::Result<()> {
        bootstrap::run(&self.server).await
    }

    /// With a store that several servers share: puts this one, which runs on `host`, among those that the
    /// `kubernetes` service leads to. To be called when connections are served.
    pub fn announce(&self, host: &str) -> identity_lease::Announced {
        identity_lease::announce(&self.server, host)
    }

    /// Watches end and connections close after the requests under way.
    pub fn shut_down(&self) {
        self.server.shutdown.cancel();
    }

    /// Serves connections until [`Self::shut_down`].
    pub async fn serve(
        &self,
        listener: tokio::net::TcpListener,
        tls: Arc<rustls::ServerConfig>,
    ) -> std::io::Result<()> {
        http_server::serve(self.server.clone(), listener, tls).await
    }

    /// The shared state, for those who extend the server.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }
}
