//! The cluster's embedded mirror (`sampan server --embedded-registry`): nodes hand each other the images that they have.
//!
//! Upstream counterparts: K3s' pkg/spegel, spegel. The setting is the server's; agents hear it when they join and each
//! time their tunnel connects. Which registries are shared says each node's registries.yaml: those below `mirrors`, for
//! both directions. Who has something is asked of the server, which asks the nodes over their tunnels; the bytes come
//! from the other node directly where it can be reached, else through the server. What stays true: nobody but nodes is
//! answered, and nothing is taken without its digest. Deliberate difference: no peer-to-peer network and no list of
//! contents, as the server holds a connection to every node anyway; so an idle mirror says and keeps nothing.
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::server::danger::ClientCertVerifier;
use sampan_pki::LiveCertificate;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

mod agent;
mod directory;
mod peers;
mod share;
mod wire;

pub use agent::{Setting, part};
pub use directory::{Directory, of_server, through_tunnels};
pub use peers::Peers;
use peers::Remote;
pub use share::start;

/// Where nodes listen for each other: the kubelet's port, of which only `/v2/` is served.
pub const PORT: u16 = 10250;
/// Of the server's answer to a tunnel: whether the mirror is on.
pub const SETTING: &str = "sampan-embedded-registry";
/// Where the server answers nodes.
pub const PATH: &str = "/v1-sampan/images/";

/// Until an answer begins.
const ANSWER: Duration = Duration::from_secs(15);

/// Decides whose certificates are the cluster's.
pub type Verifier = Arc<dyn ClientCertVerifier>;
pub type Trust = Arc<dyn Fn() -> Result<Verifier> + Send + Sync>;

/// What a node needs to take part.
#[derive(Clone)]
pub struct Membership {
    /// The server's setting.
    pub enabled: watch::Receiver<bool>,
    pub rendezvous: Arc<dyn Rendezvous>,
    /// With which this node shows other nodes what it is, as server and as client.
    pub own: Arc<LiveCertificate>,
    /// Whom to believe that, now: authorities may be replaced.
    pub trust: Trust,
}

/// A node that has what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub node: String,
    pub address: Option<std::net::IpAddr>,
}

/// The server, as nodes ask it.
#[async_trait]
pub trait Rendezvous: Send + Sync {
    /// Other nodes that have `uri` (`/v2/NAME/manifests/…?ns=REGISTRY` or a blob's).
    async fn holders(&self, uri: &str) -> Result<Vec<Holder>>;
    /// `uri` of that node, through the server.
    async fn get(&self, node: &str, uri: &str, offset: u64) -> Result<Response<Incoming>>;
}

/// One request over a connection of its own, which ends with the answer's body.
async fn ask<S>(stream: S, host: &str, method: Method, uri: &str, offset: u64) -> Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let asking = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(uri).header(header::HOST, host);
        if offset > 0 {
            request = request.header(header::RANGE, format!("bytes={offset}-"));
        }
        anyhow::Ok(sender.send_request(request.body(Empty::<Bytes>::new())?).await?)
    };
    match tokio::time::timeout(ANSWER, asking).await {
        Ok(answer) => answer,
        Err(_) => bail!("no answer within {} s", ANSWER.as_secs()),
    }
}
